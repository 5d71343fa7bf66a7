"""Prefixes: looking ids up, entering them, continuing what is cached, and giving it away."""

import numpy as np
import pytest
from scenes import BLOCK, books

from kvcache._ids import Tokens

pytestmark = pytest.mark.benchmark(group="prefixes")

PROMPT, SHARED, PROMPTS = 1_536, 1_024, 1_000  # tokens, tokens, prompts
LONG, MILLION = 8_192, 1_048_576  # tokens of a conversation, blocks
CALLS = 100
EVICTED = 10_000  # blocks
LOOKUP, LOOKUP_IN_A_MILLION, MISS, INSERT, LIST = 2_000, 3_000, 300, 8_000, 6_000  # ns at most
REVIVAL, EVICTION = 6_000, 3_000_000

PLACEMENTS = ["contiguous", "paged"]


def draw(seed, tokens):
    return np.random.default_rng(seed).integers(0, 50_000, tokens).astype(np.int32)


def leave(cache, name, ids):
    """Computes a prompt and ends it, so that it is cached."""
    assert cache.allocate_for(name, ids)
    cache.commit(name)
    assert cache.free_for(name)


class Served:
    """1,000 prompts are cached that begin with the same 1,024 tokens."""

    def __init__(self, placement="paged"):
        self.cache = books(120_000, placement)
        self.shared = draw(0, SHARED)
        self.prompts = [self.with_tail(1 + number) for number in range(PROMPTS)]
        for number, prompt in enumerate(self.prompts):
            leave(self.cache, number, prompt)

    def with_tail(self, seed):
        return np.concatenate([self.shared, draw(seed, PROMPT - SHARED)])


def filled(placement, blocks=MILLION):
    """A cache whose every block is cached, of conversations of 8k tokens."""
    cache = books(blocks, placement)
    for number in range(blocks * BLOCK // LONG):
        leave(cache, number, draw(number, LONG))
    assert cache.stats().cached_blocks == blocks
    return cache


@pytest.fixture(scope="module")
def served():
    return Served()


@pytest.fixture(scope="module")
def million():
    """A million cached blocks, and among them one of the 1,000 prompts' kind."""
    cache = filled("paged")
    prompt = draw(10**6, PROMPT)
    leave(cache, "prompt", prompt)
    return cache, prompt


def look_up(measure, cache, prompt, expected, target, like=None, floor=None):
    """Probes for a prompt; the floor hashes the ids found and compares them, in C."""
    native = measure.floors.native
    compared = np.array(prompt[:expected] if like is None else like, np.int32)
    copy = compared.copy()

    def probe():
        call = cache.probe
        for _ in range(CALLS):
            call(prompt)

    def hash_and_compare():
        native.hash_and_compare(compared, copy, BLOCK, CALLS)

    def verify():
        assert cache.probe(prompt) == expected

    measure(
        probe,
        verify=verify,
        calls=CALLS,
        turns=CALLS,
        floor=floor or ("hash and compare", hash_and_compare),
        targets={"median": target} if target else None,
    )


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


def test_probe(measure, served):
    look_up(measure, served.cache, served.prompts[500], PROMPT - BLOCK, LOOKUP)


def test_probe_in_a_million_blocks(measure, million):
    cache, prompt = million
    look_up(measure, cache, prompt, PROMPT - BLOCK, LOOKUP_IN_A_MILLION)


def test_probe_of_a_new_tail(measure, served):
    look_up(measure, served.cache, served.with_tail(2**31), SHARED, LOOKUP)


def test_probe_that_misses(measure, served):
    """The limit is over the call; a no-op with the same argument is its floor."""
    prompt = draw(2**31, PROMPT)
    nothing = books(64, "paged")

    def without():
        call = nothing.probe
        few = prompt[:BLOCK]
        for _ in range(CALLS):
            call(few)

    look_up(measure, served.cache, prompt, 0, lambda call: MISS + call, floor=("probe of one block", without))


@pytest.mark.parametrize("kind", [list, Tokens], ids=["list", "Tokens"])
def test_probe_of(measure, served, kind):
    prompt = served.prompts[500]
    target = LOOKUP + (LIST if kind is list else 0)
    look_up(
        measure, served.cache, kind(prompt.tolist()), PROMPT - BLOCK, target, like=prompt[: PROMPT - BLOCK]
    )


def test_admit_a_hit_and_free(measure, served):
    """All but the last block are found, and shared; beside it, in floors, the probe of the same."""
    cache, prompt = served.cache, served.prompts[400]

    def admit():
        allocate_for, free_for = cache.allocate_for, cache.free_for
        for _ in range(CALLS):
            allocate_for("hit", prompt)
            free_for("hit")

    def probe():
        call = cache.probe
        for _ in range(CALLS):
            call(prompt)

    def verify():
        assert cache.probe(prompt) == PROMPT - BLOCK and len(cache) == 0

    measure(admit, verify=verify, calls=CALLS, turns=CALLS, floor=("probe", probe))
    cache.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_insert(measure, placement):
    """The commit of a prompt that has been admitted: all of its blocks are entered."""
    cache = books(120_000, placement)
    prompts = [draw(number, PROMPT) for number in range(10)]

    def prepare():
        cache.clear_prefix_cache()
        for number, prompt in enumerate(prompts):
            assert cache.allocate_for(number, prompt)

    def commit():
        call = cache.commit
        for number in range(10):
            call(number)

    def verify():
        for number, prompt in enumerate(prompts):
            assert cache.probe(prompt) == PROMPT - BLOCK
            assert cache.free_for(number)

    measure(
        commit, prepare=prepare, verify=verify, rounds=100, calls=10, turns=10, targets={"median": INSERT}
    )
    cache.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_revive_8k(measure, placement):
    """The next turn of a conversation: what is cached is continued where it is."""
    cache = books(4_096, placement)
    conversation = draw(0, LONG)
    turn = np.concatenate([conversation, draw(1, BLOCK)])
    leave(cache, "before", conversation)
    before = cache.stats()

    def verify():
        assert cache.stats().used_blocks == LONG // BLOCK + 1
        assert cache.free_for("turn") and cache.probe(turn) == LONG

    def admit():
        cache.allocate_for("turn", turn)

    measure(admit, verify=verify, targets={"median": REVIVAL})
    after = cache.stats()
    assert (after.copied_tokens, after.moves) == (before.copied_tokens, before.moves)
    cache.check()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_evict_10000_of_a_million(measure, placement):
    """A prompt that is only counted is admitted where every block is cached."""
    cache = filled(placement)
    names = iter(range(10**6, 2 * 10**6))
    admitted = []

    def admit():
        admitted.append(next(names))
        cache.allocate_for(admitted[-1], EVICTED * BLOCK)

    def verify():
        assert cache.stats().used_blocks == EVICTED * len(admitted)
        assert cache.stats().evicted_blocks >= EVICTED * len(admitted)

    target = {"median": EVICTION} if placement == "paged" else None
    measure(admit, verify=verify, rounds=60, targets=target)
    cache.check()


@pytest.mark.parametrize("named", [False, True], ids=["counted", "named"])
def test_append_of_a_batch(measure, named):
    """1,024 sequences get a token each; with its ids, or without."""
    cache = books(65_536, "paged")
    members = range(1_024)
    for member in members:
        assert cache.allocate_for(member, draw(member, BLOCK), max_tokens=60 * BLOCK)
    batch, ids = cache.batch(members), draw(0, 1_024)
    lengths = batch.lengths.copy()

    def append():
        if named:
            batch.append(ids)
        else:
            batch.append()

    def verify():
        lengths[:] += 1
        assert np.array_equal(batch.lengths, lengths)

    measure(append, verify=verify)
    cache.check()
