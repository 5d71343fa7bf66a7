"""Sixteen blocks out of a pool in which every second block is taken: no two free ones lie together."""

import pytest
from scenes import BLOCK, comb

from kvcache import BlockAllocator

pytestmark = pytest.mark.benchmark(group="16 blocks out of a comb")

LIMITS = {
    ("contiguous", 65_536): 250,
    ("contiguous", 2**20): 375,
    ("paged", 65_536): 600,
    ("paged", 2**20): 1_200,
}
ROUNDS, EACH = 120, 16


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@pytest.mark.parametrize("blocks", [65_536, 2**20])
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_allocate_for(measure, placement, blocks):
    """Every one meets a comb: what was allocated stays, the next one needs teeth that nobody has touched."""
    cache = comb(blocks, placement)
    ids, got = [], []

    def prepare():
        ids[:] = [f"newcomer-{len(cache) + number}" for number in range(EACH)]
        got.clear()

    def allocate():
        allocate_for = cache.allocate_for
        for request_id in ids:
            got.append(allocate_for(request_id, 16 * BLOCK))

    def verify():
        assert [each.tokens for each in got] == [16 * BLOCK] * EACH
        assert cache.free_blocks == blocks // 2 - 16 * (len(cache) - blocks // 2)

    limit = LIMITS[placement, blocks]
    measure(
        allocate,
        prepare=prepare,
        verify=verify,
        rounds=ROUNDS,
        calls=EACH,
        turns=EACH,
        targets={"median": limit},
    )
    stats = cache.stats()
    measure.note(moves_each=stats.moves / (ROUNDS * EACH))
    assert placement == "contiguous" or stats.moves == 0
    cache.check()


@pytest.mark.parametrize("blocks", [65_536, 2**20])
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_allocate_for_and_free_for_again(measure, placement, blocks):
    """The same place every time: the first one has made it."""
    cache = comb(blocks, placement)
    count = 50
    assert cache.allocate_for("newcomer", 16 * BLOCK) and cache.free_for("newcomer")

    def exchange():
        allocate_for, free_for = cache.allocate_for, cache.free_for
        for _ in range(count):
            allocate_for("newcomer", 16 * BLOCK)
            free_for("newcomer")

    def verify():
        assert cache.free_blocks == blocks // 2
        assert cache.allocate_for("newcomer", 16 * BLOCK) and cache.free_for("newcomer")

    limit = LIMITS[placement, blocks]
    measure(exchange, verify=verify, calls=count, turns=count, targets={"median": limit})
    cache.check()


@pytest.fixture
def comb_of_runs():
    allocator = BlockAllocator(65_536)
    runs = [allocator.allocate(1) for _ in range(65_536)]
    for run in runs[::2]:
        allocator.free(run)
    return allocator, runs


def test_a_run_that_is_not_there(measure, comb_of_runs):
    """`BlockAllocator` moves nothing: it says so."""
    allocator, _ = comb_of_runs
    answers = []

    def allocate():
        answers[:] = [allocator.allocate(16) for _ in range(100)]

    def verify():
        assert answers == [None] * 100 and allocator.free_blocks == 32_768

    measure(allocate, verify=verify, calls=100, turns=100)
    allocator.check()


def test_sixteen_single_blocks(measure, comb_of_runs):
    allocator, _ = comb_of_runs
    runs = []

    def give_back():
        while runs:
            allocator.free(runs.pop())

    def allocate():
        runs.extend([allocator.allocate(1) for _ in range(16)])

    def verify():
        assert len({run.start for run in runs}) == 16 and allocator.free_blocks == 32_768 - 16

    measure(allocate, prepare=give_back, verify=verify, turns=16)
    allocator.check()
