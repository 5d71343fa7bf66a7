"""`BlockAllocator`: contiguous runs, which carry a generation."""

import copy
import pickle

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from observation import dumped

from kvcache import BlockAllocator, BlockRun, InvalidFree


def state(allocator):
    return (
        allocator.free_blocks,
        allocator.used_blocks,
        allocator.largest_free_run,
        allocator.fragmentation,
        dumped(allocator.dump_block_map),
    )


def test_a_new_pool_is_free(make_allocator):
    allocator = make_allocator(10)
    assert (allocator.num_blocks, allocator.free_blocks, allocator.used_blocks) == (10, 10, 0)
    assert (allocator.largest_free_run, allocator.fragmentation) == (10, 0.0)


def test_a_run_has_a_start_and_a_length(make_allocator):
    allocator = make_allocator(10)
    run = allocator.allocate(4)
    assert isinstance(run, BlockRun)
    assert 0 <= run.start <= 6
    assert run.length == 4
    assert (allocator.free_blocks, allocator.used_blocks) == (6, 4)


def test_runs_do_not_overlap(make_allocator):
    allocator = make_allocator(10)
    runs = [allocator.allocate(length) for length in (3, 1, 4, 2)]
    blocks = [block for run in runs for block in range(run.start, run.start + run.length)]
    assert sorted(blocks) == list(range(10))


def test_one_more_than_is_free_is_none_and_changes_nothing(make_allocator):
    allocator = make_allocator(17)
    allocator.allocate(9)
    before = state(allocator)
    assert allocator.allocate(9) is None
    assert state(allocator) == before


def test_more_than_the_pool_is_none(make_allocator):
    allocator = make_allocator(4)
    for blocks in (5, 2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1):
        assert allocator.allocate(blocks) is None
    assert allocator.free_blocks == 4


def test_scattered_free_blocks_are_no_run(make_allocator):
    allocator = make_allocator(6)
    singles = sorted((allocator.allocate(1) for _ in range(6)), key=lambda run: run.start)
    for run in singles[::2]:
        allocator.free(run)
    assert allocator.free_blocks == 3
    assert allocator.largest_free_run == 1
    assert allocator.allocate(2) is None
    assert allocator.fragmentation == pytest.approx(1 - 1 / 3)


def test_nothing_free_is_not_fragmented(make_allocator):
    allocator = make_allocator(3)
    allocator.allocate(3)
    assert allocator.fragmentation == 0.0
    assert allocator.largest_free_run == 0


def test_freed_neighbours_become_one_run(make_allocator):
    allocator = make_allocator(9)
    runs = [allocator.allocate(3) for _ in range(3)]
    for index in (0, 2, 1):
        allocator.free(runs[index])
        allocator.check()
    assert allocator.largest_free_run == 9


# ---- extend


def half_of(allocator):
    """A run over the first half of the pool; the other half is free."""
    first, second = sorted(
        (allocator.allocate(allocator.num_blocks // 2) for _ in range(2)), key=lambda run: run.start
    )
    allocator.free(second)
    return first


def test_a_run_extends_in_place(make_allocator):
    allocator = make_allocator(8)
    run = half_of(allocator)
    longer = allocator.extend(run, 3)
    assert (longer.start, longer.length) == (run.start, 7)
    assert allocator.used_blocks == 7


def test_after_an_extension_only_the_new_run_is_live(make_allocator):
    allocator = make_allocator(8)
    run = half_of(allocator)
    longer = allocator.extend(run, 2)
    for stale in (lambda: allocator.free(run), lambda: allocator.extend(run, 1)):
        before = state(allocator)
        with pytest.raises(InvalidFree):
            stale()
        assert state(allocator) == before
    allocator.free(longer)
    assert allocator.free_blocks == 8


def test_a_run_with_a_neighbour_does_not_extend(make_allocator):
    allocator = make_allocator(8)
    runs = sorted((allocator.allocate(2) for _ in range(3)), key=lambda run: run.start)
    before = state(allocator)
    assert allocator.extend(runs[0], 1) is None
    assert state(allocator) == before
    allocator.free(runs[0])


def test_a_refused_extension_leaves_the_run_live(make_allocator):
    allocator = make_allocator(4)
    run = allocator.allocate(3)
    assert allocator.extend(run, 2) is None
    assert allocator.extend(run, 2**31 - 1) is None
    allocator.free(run)
    assert allocator.free_blocks == 4


# ---- frees that are errors


def refuses(allocator, run):
    before = state(allocator)
    with pytest.raises(InvalidFree) as caught:
        allocator.free(run)
    assert (caught.value.start, caught.value.length) == (run.start, run.length)
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason
    assert state(allocator) == before
    allocator.check()


def test_a_second_free_is_an_error(make_allocator):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    allocator.free(run)
    refuses(allocator, run)


def test_a_second_free_is_an_error_even_if_the_blocks_are_used_again(make_allocator):
    allocator = make_allocator(4)
    stale = allocator.allocate(4)
    allocator.free(stale)
    again = allocator.allocate(4)
    assert (again.start, again.length) == (stale.start, stale.length)
    assert again != stale
    refuses(allocator, stale)
    allocator.free(again)


@pytest.mark.parametrize(
    ("start", "length"), [(0, 2), (1, 3), (0, 5), (1, 4), (3, 4), (0, 2**31), (2**40, 1)]
)
def test_a_partial_or_overlapping_free_is_an_error(make_allocator, start, length):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    refuses(allocator, BlockRun(run.start + start, length))
    allocator.free(run)


def test_a_run_built_by_hand_is_never_live(make_allocator):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    by_hand = BlockRun(run.start, run.length)
    assert by_hand != run
    refuses(allocator, by_hand)
    with pytest.raises(InvalidFree):
        allocator.extend(by_hand, 1)
    allocator.free(run)


def test_a_run_built_by_hand_with_a_generation_is_not_live_either(make_allocator):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    before = state(allocator)
    with pytest.raises((TypeError, InvalidFree)):
        allocator.free(BlockRun(run.start, run.length, run.generation))
    assert state(allocator) == before


def test_a_run_of_another_pool_is_an_error(make_allocator):
    ours, theirs = make_allocator(8), make_allocator(8)
    run, foreign = ours.allocate(4), theirs.allocate(4)
    assert run != foreign
    refuses(ours, foreign)
    refuses(theirs, run)
    ours.free(run)
    theirs.free(foreign)


@pytest.mark.parametrize("thing", [None, 3, (0, 4), "run", object()])
def test_a_free_of_what_is_no_run_is_a_type_error(make_allocator, thing):
    allocator = make_allocator(8)
    allocator.allocate(4)
    before = state(allocator)
    with pytest.raises(TypeError):
        allocator.free(thing)
    with pytest.raises(TypeError):
        allocator.extend(thing, 1)
    assert state(allocator) == before


# ---- runs as values


def test_runs_are_immutable(make_allocator):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    for name in ("start", "length", "generation"):
        with pytest.raises(AttributeError):
            setattr(run, name, 0)
    allocator.free(run)


def test_equal_runs_hash_alike(make_allocator):
    allocator = make_allocator(8)
    run = allocator.allocate(4)
    assert run == run and len({run, run}) == 1
    assert BlockRun(1, 2) == BlockRun(1, 2)
    assert hash(BlockRun(1, 2)) == hash(BlockRun(1, 2))
    assert BlockRun(1, 2) != BlockRun(1, 3)


# ---- arguments


@pytest.mark.parametrize("count", [0, -1, -(2**63), -(2**70)])
def test_a_count_below_one_is_a_value_error(make_allocator, count):
    allocator = make_allocator(8)
    run = allocator.allocate(2)
    before = state(allocator)
    for call in (allocator.allocate, lambda n: allocator.extend(run, n)):
        with pytest.raises(ValueError):
            call(count)
    assert state(allocator) == before


@pytest.mark.parametrize("count", [True, 1.0, "1", None, [1]])
def test_a_count_that_is_no_int_is_a_type_error(make_allocator, count):
    allocator = make_allocator(8)
    run = allocator.allocate(2)
    before = state(allocator)
    for call in (allocator.allocate, lambda n: allocator.extend(run, n)):
        with pytest.raises(TypeError):
            call(count)
    assert state(allocator) == before


@pytest.mark.parametrize("num_blocks", [0, -1, -(2**70)])
def test_a_pool_without_blocks_is_a_value_error(num_blocks):
    with pytest.raises(ValueError):
        BlockAllocator(num_blocks)


@pytest.mark.parametrize("num_blocks", [True, 2.0, "8", None])
def test_a_pool_size_that_is_no_int_is_a_type_error(num_blocks):
    with pytest.raises(TypeError):
        BlockAllocator(num_blocks)


@pytest.mark.parametrize("num_blocks", [2**31, 2**63, 2**70])
def test_a_pool_beyond_32_bits_is_a_value_error(num_blocks):
    with pytest.raises(ValueError):
        BlockAllocator(num_blocks)


def test_the_block_map_is_that_of_the_guide(make_allocator):
    allocator = make_allocator(40)
    run = allocator.allocate(10)
    text = dumped(allocator.dump_block_map, width=16)
    used = "".join("X" if run.start <= block < run.start + 10 else "." for block in range(40))
    lines = text.splitlines()
    assert lines[1:5] == [
        "  Total blocks: 40",
        "  Used: 10 Free: 30",
        f"  Fragmentation: {allocator.fragmentation:.2f}",
        lines[4],
    ]
    assert [line.strip() for line in lines[5:]] == [used[:16], used[16:32], used[32:]]


def test_invalid_free_survives_pickle(make_allocator):
    allocator = make_allocator(8)
    with pytest.raises(InvalidFree) as caught:
        allocator.free(BlockRun(3, 2))
    for twin in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert type(twin) is InvalidFree
        assert (twin.start, twin.length, twin.reason, str(twin)) == (
            3,
            2,
            caught.value.reason,
            str(caught.value),
        )


# ---- random walks


class AllocatorMachine(RuleBasedStateMachine):
    """The oracle is a list that says for each block which run it belongs to."""

    @initialize(num_blocks=st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 200]))
    def make(self, num_blocks):
        self.allocator = BlockAllocator(num_blocks)
        self.owner = [None] * num_blocks
        self.live = []
        self.dead = []

    def fits(self, start, length):
        return (
            start >= 0 and start + length <= len(self.owner) and not any(self.owner[start : start + length])
        )

    def gaps(self):
        text = "".join("X" if owner else "." for owner in self.owner)
        return [len(gap) for gap in text.split("X") if gap]

    @rule(length=st.integers(1, 12) | st.integers(1, 80))
    def allocate(self, length):
        run = self.allocator.allocate(length)
        assert (run is not None) == (length <= max(self.gaps(), default=0))
        if run is not None:
            assert run.length == length and self.fits(run.start, length)
            assert run not in self.dead and run not in self.live
            self.live.append(run)
            self.owner[run.start : run.start + length] = [run] * length

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 1000), more=st.integers(1, 8))
    def extend(self, index, more):
        run = self.live[index % len(self.live)]
        end = run.start + run.length
        longer = self.allocator.extend(run, more)
        assert (longer is not None) == self.fits(end, more)
        if longer is not None:
            assert (longer.start, longer.length) == (run.start, run.length + more)
            self.live.remove(run)
            self.dead.append(run)
            self.live.append(longer)
            self.owner[run.start : end + more] = [longer] * longer.length

    @precondition(lambda self: self.live)
    @rule(index=st.integers(0, 1000))
    def free(self, index):
        run = self.live.pop(index % len(self.live))
        self.allocator.free(run)
        self.dead.append(run)
        self.owner[run.start : run.start + run.length] = [None] * run.length

    @precondition(lambda self: self.dead)
    @rule(index=st.integers(0, 1000))
    def free_what_is_dead(self, index):
        refuses(self.allocator, self.dead[index % len(self.dead)])

    @rule(start=st.integers(-2, 90), length=st.integers(-1, 90))
    def free_what_was_built_by_hand(self, start, length):
        try:
            run = BlockRun(start, length)
        except ValueError:
            return
        refuses(self.allocator, run)

    @invariant()
    def counters_and_map_compare(self):
        if not hasattr(self, "allocator"):
            return
        free, gaps = self.owner.count(None), self.gaps()
        largest = max(gaps, default=0)
        assert (self.allocator.free_blocks, self.allocator.used_blocks) == (free, len(self.owner) - free)
        assert self.allocator.largest_free_run == largest
        assert self.allocator.fragmentation == (1 - largest / free if free else 0.0)
        drawn = "".join(line.strip() for line in dumped(self.allocator.dump_block_map).splitlines()[5:])
        assert drawn == "".join("X" if owner else "." for owner in self.owner)
        self.allocator.check()

    def teardown(self):
        for run in getattr(self, "live", []):
            self.allocator.free(run)
        if hasattr(self, "allocator"):
            assert self.allocator.free_blocks == self.allocator.num_blocks
            self.allocator.check()


def test_a_random_walk_over_runs_never_leaves_the_oracle():
    run_state_machine_as_test(AllocatorMachine)
