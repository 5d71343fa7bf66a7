"""Placement: one run for every sequence in whatever mix, nothing refused that fits, bytes where they belong."""

import math
import random

import numpy as np
import pytest
from compiled import compiled
from hypothesis import example, given
from hypothesis import strategies as st

from kvcache import KVCache

BLOCK = 4
NO_BOUND = 2**63 - 1


@pytest.fixture(scope="module")
def placing(tmp_path_factory):
    return compiled("placing", tmp_path_factory.mktemp("placing"))


class Crowd:
    """Sequences whose every token says whose it is and where in it: moves are seen in the contents."""

    def __init__(self, num_blocks, known=False):
        self.cache = KVCache(1, 1, 2, num_blocks * BLOCK, BLOCK, overcommit=math.inf, prefix_cache=False)
        self.num_blocks = num_blocks
        self.known = known
        self.tokens = {}
        self.number = 0

    @property
    def free_blocks(self):
        return self.num_blocks - sum(-(-tokens // BLOCK) for tokens in self.tokens.values())

    def write(self, name, start, count):
        rows = np.empty((1, count, 2), "float32")
        rows[0, :, 0], rows[0, :, 1] = name, np.arange(start, start + count)
        self.cache.write(name, 0, rows, -rows, start=start)

    def enter(self, tokens, growth=8):
        fits = -(-tokens // BLOCK) <= self.free_blocks
        limit = min(tokens + growth, self.num_blocks * BLOCK) if self.known else self.num_blocks * BLOCK
        granted = self.cache.allocate_for(self.number, tokens, max_tokens=limit)
        assert (granted is not None) == fits
        if fits:
            self.tokens[self.number] = tokens
            self.write(self.number, 0, tokens)
            self.number += 1
        return fits

    def append(self, name, count=1):
        tokens = self.tokens[name]
        blocks = -(-(tokens + count) // BLOCK) - -(-tokens // BLOCK)
        fits = blocks <= self.free_blocks and tokens + count <= self.cache.limit(name)
        assert self.cache.append_tokens(name, count) == fits
        if fits:
            self.write(name, tokens, count)
            self.tokens[name] += count
        return fits

    def leave(self, name):
        assert self.cache.free_for(name)
        del self.tokens[name]

    def verify(self):
        self.cache.check()
        for name, tokens in self.tokens.items():
            assert self.cache.is_contiguous(name)
            k, v = self.cache.get_kv_views(name, 0, copy=False)
            assert (k[0, :, 0] == name).all() and (k[0, :, 1] == np.arange(tokens)).all()
            assert (v == -k).all()

    def places(self):
        return {name: self.cache.block_table(name).tolist() for name in self.tokens}


def fill_up(crowd, lengths):
    """Newcomers of these lengths in turn until the next one does not fit."""
    index = 0
    while crowd.enter(lengths[index % len(lengths)]):
        index += 1


def live_on(crowd, rng, steps, lengths):
    """Decode steps in a full pool: every step all append, some leave, newcomers come until one does not fit."""
    for _ in range(steps):
        for name in list(crowd.tokens):
            if name not in crowd.tokens:
                continue
            if not crowd.append(name):
                crowd.leave(rng.choice(list(crowd.tokens)))
                crowd.verify()
            elif rng.random() < 0.01:
                crowd.leave(name)
        while crowd.enter(rng.choice(lengths)):
            pass
    crowd.verify()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[5] * 30 + [150], [3], [1, 60], [200, 2], list(range(1, 60)), [4, 8, 16, 32, 64, 128]],
    ids=["all short but one", "short", "short and long", "long and short", "all lengths", "powers of two"],
)
def test_a_full_pool_goes_on_for_long(lengths, known):
    crowd = Crowd(97, known)
    fill_up(crowd, lengths)
    live_on(crowd, random.Random(len(lengths)), 60, lengths)


@pytest.mark.parametrize("tooth", [1, 2, 3, 7])
def test_a_comb_gives_all_that_is_free_to_one_newcomer(tooth):
    crowd = Crowd(96)
    fill_up(crowd, [tooth * BLOCK])
    for name in list(crowd.tokens)[::2]:
        crowd.leave(name)
    assert crowd.enter(crowd.free_blocks * BLOCK)
    assert crowd.free_blocks == 0
    crowd.verify()


@pytest.mark.parametrize("tooth", [1, 2, 3, 7])
@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_comb_gives_all_that_is_free_to_one_that_grows(tooth, which):
    crowd = Crowd(96)
    fill_up(crowd, [tooth * BLOCK])
    for name in list(crowd.tokens)[::2]:
        crowd.leave(name)
    name = list(crowd.tokens)[which]
    assert crowd.append(name, crowd.free_blocks * BLOCK)
    assert crowd.free_blocks == 0
    assert not crowd.append(name)
    crowd.verify()


def test_the_last_run_grows_at_the_arenas_end():
    crowd = Crowd(12)
    for _ in range(6):
        crowd.enter(2 * BLOCK)
    last = max(crowd.tokens, key=lambda name: crowd.cache.block_table(name)[0])
    crowd.leave(min(crowd.tokens, key=lambda name: crowd.cache.block_table(name)[0]))
    assert crowd.append(last, 2 * BLOCK)
    assert not crowd.append(last)
    crowd.verify()


def test_the_only_block_left_reaches_whoever_wants_it():
    crowd = Crowd(9)
    for _ in range(8):
        crowd.enter(BLOCK)
    for name in range(8):
        assert crowd.append(name)
        crowd.verify()
        assert crowd.cache.truncate(name, BLOCK)
        crowd.tokens[name] = BLOCK


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["enter", "append", "append", "leave"]), st.integers(0, 10**6), st.integers(1, 40)
    ),
    max_size=120,
)


@example(
    num_blocks=2, known=False, calls=[("enter", 0, 4), ("enter", 0, 1), ("leave", 0, 1), ("append", 0, 4)]
)
@given(num_blocks=st.integers(2, 40), known=st.booleans(), calls=CALLS)
def test_whatever_is_called_nothing_is_lost(num_blocks, known, calls):
    crowd = Crowd(num_blocks, known)
    for call, which, count in calls:
        if call == "enter" or not crowd.tokens:
            crowd.enter(min(count, num_blocks * BLOCK))
        elif call == "append":
            crowd.append(list(crowd.tokens)[which % len(crowd.tokens)], count)
        else:
            crowd.leave(list(crowd.tokens)[which % len(crowd.tokens)])
    crowd.verify()


def test_the_same_ten_thousand_calls_give_the_same_places():
    crowds = [Crowd(128), Crowd(128)]
    rng = random.Random(3)
    for call in range(10_000):
        dice, which, count = rng.random(), rng.randrange(10**6), rng.randint(1, 60)
        for crowd in crowds:
            name = list(crowd.tokens)[which % len(crowd.tokens)] if crowd.tokens else None
            if name is None or dice < 0.1:
                crowd.enter(count)
            elif dice < 0.9:
                crowd.append(name, 1 + count // 15)
            else:
                crowd.leave(name)
        if call % 50 == 0:
            assert crowds[0].places() == crowds[1].places()
    assert crowds[0].places() == crowds[1].places()
    assert crowds[0].cache.stats() == crowds[1].cache.stats()
    assert crowds[0].cache.stats().moves > 100
    for crowd in crowds:
        crowd.verify()


# ---- plans within a bound


def crowded(seed):
    """A pool of which a tenth is free."""
    rng = random.Random(seed)
    crowd = Crowd(300)
    while crowd.free_blocks > 30:
        crowd.enter(min(rng.randint(1, 80), crowd.free_blocks * BLOCK))
    for _ in range(40):
        crowd.leave(rng.choice(list(crowd.tokens)))
        while crowd.free_blocks > 30:
            crowd.enter(min(rng.randint(1, 80), (crowd.free_blocks - 29) * BLOCK))
    return crowd


def verify_bounds(plan, before):
    """`plan(most)` keeps to every bound from nothing to what it takes without one, and changes nothing."""
    found, moves, tokens = plan(NO_BOUND)
    assert found and (tokens > 0) == (moves != [])
    for most in sorted({0, 1, tokens // 4, tokens // 2, max(tokens - 1, 0), tokens, tokens + 1}):
        found, moves, moved = plan(most)
        assert moved <= most
        assert found or (moves == [] and moved == 0)
    assert before()


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_for_growth_keeps_to_its_bound(placing, seed):
    crowd = crowded(seed)
    places = crowd.places()
    for name in crowd.tokens:
        for more in (1, 5, crowd.free_blocks):
            verify_bounds(
                lambda most, name=name, more=more: placing.plan_growth(crowd.cache, name, more, most),
                lambda: crowd.places() == places,
            )
    crowd.verify()


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_for_a_newcomer_keeps_to_its_bound(placing, seed):
    crowd = crowded(seed)
    places = crowd.places()
    for length in range(1, crowd.free_blocks + 1):
        verify_bounds(
            lambda most, length=length: placing.plan_newcomer(crowd.cache, length, 8, most),
            lambda: crowd.places() == places,
        )
    crowd.verify()
