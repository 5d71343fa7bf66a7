"""A prompt of 64 to 2,048 tokens comes and goes, in pools that are 75 % full and have been lived in."""

import random

import pytest
from scenes import LivedIn, Population

from kvcache import BlockAllocator

pytestmark = pytest.mark.benchmark(group="allocate and free a prompt")

PAIRS = 200
LIMITS = {
    ("contiguous", 65_536): 250,
    ("contiguous", 2**20): 1.5 * 250,
    ("paged", 65_536): 600,
    ("paged", 2**20): 1_200,
}
POOLS = pytest.mark.parametrize("blocks", [2_048, 65_536, 2**20])
PLACEMENTS = pytest.mark.parametrize("placement", ["contiguous", "paged"])


@pytest.fixture(scope="module")
def lived_in():
    """The last pool that was asked for: the large ones take a while to make."""
    made = {}

    def make(blocks, placement):
        if (blocks, placement) not in made:
            made.clear()
            made[blocks, placement] = LivedIn(blocks, placement)
        return made[blocks, placement]

    return make


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@POOLS
@PLACEMENTS
def test_newcomer_comes_and_goes(measure, lived_in, blocks, placement):
    """The pool's other sequences stay."""
    pool = lived_in(blocks, placement)
    cache, held = pool.cache, pool.held
    newcomers = [(pool.name(), pool.random.randint(64, 2048)) for _ in range(PAIRS)]

    def exchange():
        allocate_for, free_for = cache.allocate_for, cache.free_for
        for request_id, tokens in newcomers:
            allocate_for(request_id, tokens)
            free_for(request_id)

    def verify():  # the same calls in the same pool: what they return now is what they returned
        for request_id, tokens in newcomers:
            assert cache.allocate_for(request_id, tokens).tokens == tokens
            assert cache.free_for(request_id)
        assert pool.held == held and len(cache) == len(pool.tokens)

    before = cache.stats()
    measure(exchange, verify=verify, calls=PAIRS, turns=PAIRS, targets=targets_of(placement, blocks))
    assert cache.stats().peak_used_blocks > before.used_blocks
    cache.check()


@POOLS
@PLACEMENTS
def test_one_replaces_another(measure, lived_in, blocks, placement):
    """Which one has ended is random; the newcomer has a length of its own.

    Its floor is the same in a plain dictionary: what knowing sequences by their ids costs by itself.
    """
    pool, others = lived_in(blocks, placement), Population(blocks, seed=1)
    cache, moves = pool.cache, pool.cache.stats().moves
    records = {request_id: [tokens] for request_id, tokens in others.tokens.items()}
    exchanges, of_others = [], []

    def prepare():
        of_others[:] = others.script(PAIRS)
        exchanges[:] = pool.script(PAIRS)

    def exchange():
        allocate_for, free_for = cache.allocate_for, cache.free_for
        for victim, newcomer, tokens in exchanges:
            free_for(victim)
            allocate_for(newcomer, tokens)

    def exchange_in_a_dict():
        for victim, newcomer, tokens in of_others:
            records.pop(victim, None)
            records[newcomer] = [tokens]

    def verify():
        pool.check()
        assert records.keys() == others.tokens.keys()

    measure(
        exchange,
        prepare=prepare,
        verify=verify,
        calls=PAIRS,
        turns=PAIRS,
        rounds=60,
        floor=("dict", exchange_in_a_dict),
        targets=targets_of(placement, blocks),
    )
    measure.note(moves_per_pair=(cache.stats().moves - moves) / (60 * PAIRS))
    cache.check()


def targets_of(placement, blocks):
    limit = LIMITS.get((placement, blocks))
    return {"median": limit} if limit else None


@POOLS
def test_run_of_blocks(measure, blocks):
    """`BlockAllocator`: a run of 4 to 128 blocks, as far as gaps are so long, comes and goes."""
    allocator, live, draw = BlockAllocator(blocks), [], random.Random(blocks)
    while allocator.used_blocks < 0.95 * blocks:
        live.append(allocator.allocate(draw.randint(4, min(128, allocator.largest_free_run))))
    draw.shuffle(live)
    while allocator.used_blocks > 0.75 * blocks:
        allocator.free(live.pop())
    lengths = [draw.randint(4, min(128, allocator.largest_free_run)) for _ in range(PAIRS)]
    used = allocator.used_blocks

    def exchange():
        allocate, free = allocator.allocate, allocator.free
        for length in lengths:
            free(allocate(length))

    def verify():
        assert allocator.used_blocks == used

    measure(exchange, verify=verify, calls=PAIRS, turns=PAIRS)
    allocator.check()
