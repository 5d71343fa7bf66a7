"""A decode step for many sequences: membership, the arrays of a step, and one write for all."""

import importlib.util

import numpy as np
import pytest
from observation import to_numpy, unchanged

from kvcache import CacheFull, SequenceExists, UnknownSequence

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])
STORES = ["numpy"] + (["mlx"] if importlib.util.find_spec("mlx") else [])


@pytest.fixture(params=["contiguous", "paged"])
def cache(make_cache, request):
    """Three sequences of 3, 4 and 6 tokens that may grow to 12."""
    cache = make_cache(placement=request.param)
    for name, prompt in (("a", 3), ("b", 4), ("c", 6)):
        cache.allocate_for(name, prompt, max_tokens=12)
    return cache


def slot(cache, request_id, position):
    return cache.block_table(request_id)[position // 4] * 4 + position % 4


def rows(values, heads=2, width=4):
    """One row per value, `(B, heads, width)`."""
    return (np.asarray(values, np.float32)[:, None, None] * np.ones((1, heads, width))).astype(np.float32)


# ---- membership


def test_a_new_batch_knows_lengths_and_starts(cache):
    batch = cache.batch(["a", "c"])
    assert batch.lengths.tolist() == [3, 6]
    assert batch.starts.tolist() == [slot(cache, "a", 0), slot(cache, "c", 0)]
    assert batch.splits.tolist() == [0, 0, 0]
    assert set(batch.slots.tolist()) | set(batch.positions.tolist()) <= {-1}


def test_a_batch_may_be_empty(cache):
    batch = cache.batch([])
    assert batch.append().tolist() == []
    assert (batch.lengths.shape, batch.starts.shape, batch.splits.tolist()) == ((0,), (0,), [0])
    assert batch.block_tables.shape[0] == 0


def test_a_member_is_added_at_the_end(cache):
    batch = cache.batch(["b"])
    batch.add("a")
    assert batch.lengths.tolist() == [4, 3]


def test_removing_a_member_keeps_the_others_order(cache):
    batch = cache.batch(["c", "a", "b"])
    batch.remove("a")
    assert batch.lengths.tolist() == [6, 4]


def test_members_are_reordered(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.reorder([2, 0, 1])
    assert batch.lengths.tolist() == [6, 3, 4]


def test_a_reorder_may_leave_members_out(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.reorder(np.array([2]))
    assert batch.lengths.tolist() == [6]
    batch.add("a")
    assert batch.lengths.tolist() == [6, 3]


@pytest.mark.parametrize("indices", [[0, 0], [0, 1, 2, 0]])
def test_a_reorder_names_nobody_twice(cache, indices):
    batch = cache.batch(["a", "b", "c"])
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.reorder(indices)
    assert batch.lengths.tolist() == [3, 4, 6]


@pytest.mark.parametrize("indices", [[3], [-1], [0, 2**31], [2**70]])
def test_a_reorder_names_members_only(cache, indices):
    batch = cache.batch(["a", "b", "c"])
    with unchanged(cache), pytest.raises((IndexError, ValueError)):
        batch.reorder(indices)
    assert batch.lengths.tolist() == [3, 4, 6]


@pytest.mark.parametrize("indices", [[0.0], [True], ["0"], None])
def test_a_reorder_takes_ints(cache, indices):
    batch = cache.batch(["a", "b", "c"])
    with pytest.raises(TypeError):
        batch.reorder(indices)
    assert batch.lengths.tolist() == [3, 4, 6]


def test_membership_touches_no_cache(cache):
    with unchanged(cache):
        batch = cache.batch(["a", "b"])
        batch.add("c")
        batch.remove("a")
        batch.reorder([1, 0])


def test_a_member_twice_is_an_error(cache):
    batch = cache.batch(["a", "b"])
    with pytest.raises(SequenceExists) as caught:
        batch.add("a")
    assert caught.value.request_id == "a"
    assert batch.lengths.tolist() == [3, 4]
    with pytest.raises(SequenceExists):
        cache.batch(["a", "b", "a"])


def test_an_unknown_member_is_an_error(cache):
    batch = cache.batch(["a"])
    for call in (lambda: batch.add("z"), lambda: cache.batch(["a", "z"]), lambda: batch.remove("b")):
        with pytest.raises(UnknownSequence):
            call()
    assert batch.lengths.tolist() == [3]


def test_a_sequence_may_be_in_several_batches(cache):
    first, second = cache.batch(["a", "b"]), cache.batch(["b", "c"])
    first.append()
    second.append()
    assert cache.used_tokens("b") == 6
    assert first.lengths.tolist() == [4, 6]
    assert second.lengths.tolist() == [6, 7]


# ---- a member that has been freed


def test_a_freed_member_is_named_by_whatever_needs_it(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.append()
    cache.free_for("b")
    planes = [rows([1, 2, 3])] * 2
    for call in (batch.append, lambda: batch.truncate(1), lambda: batch.write(0, *planes)):
        with unchanged(cache), pytest.raises(UnknownSequence) as caught:
            call()
        assert caught.value.request_id == "b"


def test_a_step_that_names_a_freed_member_has_moved_nobody(make_cache):
    cache = make_cache(1, 1, 4, 12, 4, overcommit=8.0)
    cache.allocate_for("freed", 1, max_tokens=12)
    cache.truncate("freed", 0)
    for name in "ab":
        cache.allocate_for(name, 4, max_tokens=12)
    blocked = next(name for name in "ab" if neighbour_of(cache, name) != "free")
    batch, bystander = cache.batch([blocked, "freed"]), cache.batch(["a", "b"])
    cache.free_for("freed")
    starts = bystander.starts.tolist()
    with unchanged(cache), pytest.raises(UnknownSequence):
        batch.append()
    assert bystander.starts.tolist() == starts == [slot(cache, name, 0) for name in "ab"]
    assert cache.batch([blocked]).append().tolist() == [True]
    assert bystander.starts.tolist() == [slot(cache, name, 0) for name in "ab"]


def neighbour_of(cache, name):
    after = cache.block_table(name)[-1] + 1
    taken = {block for other in cache for block in cache.block_table(other)}
    return "free" if after < cache.stats().total_blocks and after not in taken else "taken"


def test_an_id_that_lives_again_is_not_the_member(cache):
    batch = cache.batch(["a", "b"])
    cache.free_for("b")
    cache.allocate_for("b", 2, max_tokens=9)
    with unchanged(cache), pytest.raises(UnknownSequence) as caught:
        batch.append()
    assert caught.value.request_id == "b"


def test_a_freed_member_can_be_taken_out(cache):
    batch = cache.batch(["a", "b", "c"])
    cache.free_for("b")
    batch.remove("b")
    assert batch.append().tolist() == [True, True]


def test_a_freed_member_that_lives_again_can_be_replaced(cache):
    batch = cache.batch(["a", "b"])
    cache.free_for("b")
    cache.allocate_for("b", 2, max_tokens=9)
    batch.remove("b")
    batch.add("b")
    assert batch.lengths.tolist() == [3, 2]
    assert batch.append().tolist() == [True, True]


# ---- appending


def test_one_token_each(cache):
    batch = cache.batch(["c", "a", "b"])
    granted = batch.append()
    assert granted.dtype == np.bool_
    assert granted.tolist() == [True, True, True]
    assert batch.lengths.tolist() == [7, 4, 5]
    assert batch.positions.tolist() == [6, 3, 4]
    assert batch.slots.tolist() == [slot(cache, "c", 6), slot(cache, "a", 3), slot(cache, "b", 4)]
    assert batch.splits.tolist() == [0, 1, 2, 3]


def test_several_tokens_each(cache):
    batch = cache.batch(["a", "c"])
    assert batch.append(counts=3).tolist() == [True, True]
    assert batch.positions.tolist() == [3, 4, 5, 6, 7, 8]
    assert batch.splits.tolist() == [0, 3, 6]
    wanted = [slot(cache, "a", p) for p in (3, 4, 5)] + [slot(cache, "c", p) for p in (6, 7, 8)]
    assert batch.slots.tolist() == wanted


@pytest.mark.parametrize("form", [list, tuple, np.array, lambda counts: np.array(counts, np.int32)])
def test_a_count_for_each(cache, form):
    batch = cache.batch(["a", "b", "c"])
    assert batch.append(counts=form([2, 0, 1])).tolist() == [True, True, True]
    assert batch.positions.tolist() == [3, 4, 6]
    assert batch.splits.tolist() == [0, 2, 2, 3]
    assert batch.lengths.tolist() == [5, 4, 7]


def test_a_refused_member_gets_none_and_is_marked(cache):
    cache.set_limit("b", 5)
    batch = cache.batch(["a", "b", "c"])
    assert batch.append(counts=2).tolist() == [True, False, True]
    assert batch.lengths.tolist() == [5, 4, 8]
    assert batch.positions.tolist() == [3, 4, -1, -1, 6, 7]
    assert [index for index, slot in enumerate(batch.slots) if slot == -1] == [2, 3]
    assert batch.splits.tolist() == [0, 2, 2, 4]


def test_splits_point_into_what_was_granted(cache):
    cache.set_limit("b", 4)
    batch = cache.batch(["a", "b", "c"])
    batch.append(counts=[1, 2, 3])
    granted = batch.slots[batch.slots >= 0]
    for index, request_id in enumerate("abc"):
        mine = granted[batch.splits[index] : batch.splits[index + 1]].tolist()
        tokens = cache.used_tokens(request_id)
        assert mine == [slot(cache, request_id, p) for p in range(tokens - len(mine), tokens)]


@BOTH
def test_room_goes_in_batch_order(make_cache, placement):
    cache = make_cache(1, 1, 4, 16, 4, placement=placement, overcommit=4.0)
    for name in "abc":
        cache.allocate_for(name, 4, max_tokens=16)
    assert cache.batch(["c", "a", "b"]).append().tolist() == [True, False, False]
    assert [cache.used_tokens(name) for name in "abc"] == [4, 4, 5]


@BOTH
def test_a_member_gets_all_or_none_and_the_next_may_take_the_room(make_cache, placement):
    cache = make_cache(1, 1, 4, 16, 4, placement=placement, overcommit=4.0)
    for name in "abc":
        cache.allocate_for(name, 4, max_tokens=16)
    assert cache.batch(["a", "b", "c"]).append(counts=[5, 4, 0]).tolist() == [False, True, True]
    assert [cache.used_tokens(name) for name in "abc"] == [4, 8, 4]


def test_tokens_may_be_named(cache):
    batch = cache.batch(["a", "b"])
    assert batch.append([7, 8]).tolist() == [True, True]
    assert batch.append(np.array([[1, 2], [3, 4]]), counts=2).tolist() == [True, True]
    assert batch.append([1, 2, 3], counts=[1, 2]).tolist() == [True, True]
    assert batch.lengths.tolist() == [7, 9]


@pytest.mark.parametrize(
    ("tokens", "counts"),
    [
        ([1], 1),
        ([1, 2, 3], 1),
        ([[1], [2]], 2),
        ([1, 2], [1, 2]),
        ([[1, 2]], 1),
        ([1, -1], 1),
        ([1, 2**31], 1),
    ],
)
def test_tokens_of_the_wrong_number_or_value_are_an_error(cache, tokens, counts):
    batch = cache.batch(["a", "b"])
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.append(tokens, counts=counts)


@pytest.mark.parametrize("tokens", [[1.0, 2.0], [True, False], ["1", "2"], b"12", "12", [None, None]])
def test_tokens_that_are_no_ints_are_an_error(cache, tokens):
    batch = cache.batch(["a", "b"])
    with unchanged(cache), pytest.raises(TypeError):
        batch.append(tokens)


@pytest.mark.parametrize("counts", [-1, [1, -1], [1], [1, 1, 1], [[1, 1]], -(2**70)])
def test_counts_that_are_wrong_are_a_value_error(cache, counts):
    batch = cache.batch(["a", "b"])
    for call in (lambda: batch.append(counts=counts), lambda: batch.truncate(counts)):
        with unchanged(cache), pytest.raises(ValueError, match=r"."):
            call()


class Shrinking:
    """A sequence that has fewer items than it says."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([1])


class ShrinkingArray(np.ndarray):
    def tolist(self):
        return [1]


@pytest.mark.parametrize("counts", [Shrinking(), np.ones(2, np.int32).view(ShrinkingArray)])
def test_there_are_as_many_counts_as_there_turn_out_to_be(cache, counts):
    batch = cache.batch(["a", "b"])
    for call in (lambda: batch.append(counts=counts), lambda: batch.truncate(counts)):
        with unchanged(cache), pytest.raises(ValueError, match="1 counts for 2 members"):
            call()


@pytest.mark.parametrize(
    "counts", [True, 1.0, "1", [1, True], [1, 1.0], np.array([1.0, 1.0]), np.array([True, True])]
)
def test_counts_that_are_no_ints_are_a_type_error(cache, counts):
    batch = cache.batch(["a", "b"])
    for call in (lambda: batch.append(counts=counts), lambda: batch.truncate(counts)):
        with unchanged(cache), pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("count", [10, 2**31 - 1, 2**31, 2**63, 2**70])
def test_an_append_past_all_limits_is_refused_to_all(cache, count):
    batch = cache.batch(["a", "b"])
    with unchanged(cache):
        try:
            assert batch.append(counts=[count, count]).tolist() == [False, False]
        except ValueError:
            assert count >= 2**31 - 1  # more slots than an array could hold


# ---- the arrays of a step


def test_the_arrays_are_the_same_objects_in_the_same_memory(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.append()
    names = ("slots", "positions", "splits", "lengths", "starts")
    before = {name: (getattr(batch, name), getattr(batch, name).ctypes.data) for name in names}
    for _ in range(4):
        batch.append()
        for name in names:
            array = getattr(batch, name)
            assert array is before[name][0]
            assert array.ctypes.data == before[name][1]
    assert batch.lengths.tolist() == [8, 9, 11]


def test_the_arrays_are_contiguous_int32(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.append(counts=[2, 0, 1])
    for name in ("slots", "positions", "splits", "lengths", "starts", "block_tables"):
        array = getattr(batch, name)
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def test_block_tables_are_padded(cache):
    batch = cache.batch(["a", "c"])
    a, c = cache.block_table("a").tolist(), cache.block_table("c").tolist()
    assert batch.block_tables.tolist() == [[*a, -1], c]


def test_an_empty_sequence_starts_nowhere(cache):
    cache.truncate("b", 0)
    batch = cache.batch(["b", "a"])
    assert batch.lengths.tolist() == [0, 3]
    assert batch.starts.tolist() == [-1, slot(cache, "a", 0)]
    assert batch.block_tables[0].tolist() == [-1]


def test_a_scattered_sequence_starts_nowhere(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 4, max_tokens=12)
    cache.allocate_for("b", 4, max_tokens=12)
    batch = cache.batch(["a", "b"])
    batch.append()
    assert batch.starts.tolist() == [
        slot(cache, request_id, 0) if cache.is_contiguous(request_id) else -1 for request_id in "ab"
    ]
    assert -1 in batch.starts.tolist()


@pytest.mark.parametrize(
    "change",
    [
        lambda cache, batch: cache.append_tokens("a", 2),
        lambda cache, batch: cache.truncate("a", 1),
        lambda cache, batch: cache.free_for("a"),
        lambda cache, batch: batch.append(),
        lambda cache, batch: batch.truncate(1),
    ],
)
def test_the_generation_differs_once_a_member_has_changed(cache, change):
    batch = cache.batch(["a", "b"])
    before = batch.generation
    assert batch.generation == before
    change(cache, batch)
    assert batch.generation != before


def test_the_arrays_follow_moves_of_other_calls(make_cache):
    cache = make_cache()
    for number in range(16):
        cache.allocate_for(number, 3)
    members = list(range(1, 16, 2))
    batch = cache.batch(members)
    batch.append()
    generation = batch.generation
    before = batch.slots.tolist()
    for number in range(0, 16, 2):
        cache.free_for(number)
    assert cache.allocate_for("large", 32)
    assert batch.generation != generation
    assert batch.slots.tolist() == [slot(cache, number, 3) for number in members] != before
    assert batch.positions.tolist() == [3] * 8
    assert batch.starts.tolist() == [slot(cache, number, 0) for number in members]


def test_lengths_follow_growth_by_other_calls(cache):
    batch = cache.batch(["a", "b"])
    batch.append()
    cache.append_tokens("a", 3)
    assert batch.lengths.tolist() == [7, 5]
    assert batch.positions.tolist() == [3, 4]


@pytest.mark.parametrize(
    "end",
    [
        lambda batch: batch.add("c"),
        lambda batch: batch.remove("b"),
        lambda batch: batch.reorder([1, 0]),
        lambda batch: batch.truncate(0),
    ],
)
def test_a_step_ends_with_membership_and_cuts(cache, end):
    batch = cache.batch(["a", "b"])
    batch.append()
    end(batch)
    members = len(batch.lengths)
    assert set(batch.slots.tolist()) | set(batch.positions.tolist()) <= {-1}
    assert batch.splits.tolist() == [0] * (members + 1)
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.write(0, *[rows([1] * members)] * 2)


def test_device_arrays_are_what_was_granted(make_cache):
    pytest.importorskip("mlx.core")
    cache = make_cache(backend="mlx")
    for name in "abc":
        cache.allocate_for(name, 3, max_tokens=4 if name == "b" else 8)
    batch = cache.batch(["a", "b", "c"])
    batch.append(counts=2)
    assert to_numpy(batch.device_slots).tolist() == batch.slots[batch.slots >= 0].tolist()
    assert to_numpy(batch.device_positions).tolist() == [3, 4, 3, 4]
    assert batch.device_slots is batch.device_slots
    assert batch.device_positions is batch.device_positions
    first = batch.device_slots
    batch.append([1, 2, 3], counts=[1, 1, 1])
    assert batch.device_slots is not first


# ---- cutting


def test_rejected_drafts_are_dropped(cache):
    batch = cache.batch(["a", "b", "c"])
    batch.append(counts=4)
    assert batch.truncate([3, 0, 4]).tolist() == [True, True, True]
    assert batch.lengths.tolist() == [4, 8, 6]


def test_one_count_drops_from_all(cache):
    batch = cache.batch(["a", "b"])
    dropped = batch.truncate(2)
    assert dropped.dtype == np.bool_
    assert dropped.tolist() == [True, True]
    assert batch.lengths.tolist() == [1, 2]


def test_more_than_a_member_has_cannot_be_dropped(cache):
    batch = cache.batch(["b", "a"])
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.truncate(4)


def test_a_cut_that_needs_a_claim_is_refused_for_that_member_alone(make_cache):
    cache = make_cache(1, 2, 4, 12, 4, placement="paged")
    cache.allocate_for("a", 8)
    cache.fork("a", "b")
    cache.allocate_for("c", 4)
    batch = cache.batch(["a", "c"])
    assert batch.truncate(1).tolist() == [False, True]
    assert batch.lengths.tolist() == [8, 3]


# ---- writing


@BOTH
@pytest.mark.parametrize("backend", STORES)
def test_one_write_for_all_members(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    for name, prompt in (("a", 3), ("b", 4), ("c", 6)):
        cache.allocate_for(name, prompt, max_tokens=12)
    batch = cache.batch(["c", "a", "b"])
    batch.append()
    for layer in range(2):
        assert batch.write(layer, rows([10, 20, 30]) + layer, rows([40, 50, 60]) + layer) is None
    for layer in range(2):
        for name, k, v in (("c", 10, 40), ("a", 20, 50), ("b", 30, 60)):
            views = [to_numpy(view) for view in cache.get_kv_views(name, layer)]
            assert np.all(views[0][:, -1] == k + layer)
            assert np.all(views[1][:, -1] == v + layer)


def test_a_write_leaves_everything_else_alone(cache):
    for name in "abc":
        for layer in range(2):
            planes = [np.full((2, cache.used_tokens(name), 4), 7, np.float32)] * 2
            cache.write(name, layer, *planes)
    batch = cache.batch(["a", "c"])
    batch.append()
    batch.write(0, rows([1, 2]), rows([3, 4]))
    assert np.all(cache.get_k_view("a", 0)[:, :3] == 7)
    assert np.all(cache.get_k_view("c", 0)[:, :6] == 7)
    assert np.all(cache.get_k_view("b", 0) == 7)
    assert np.all(cache.get_k_view("b", 1) == 7)


def test_rows_of_refused_members_are_skipped(cache):
    cache.set_limit("b", 4)
    batch = cache.batch(["a", "b", "c"])
    batch.append()
    last = cache.arena.k[0][:, -1].copy()
    batch.write(0, rows([1, 2, 3]), rows([4, 5, 6]))
    assert np.all(cache.get_k_view("a", 0)[:, 3] == 1)
    assert np.all(cache.get_k_view("c", 0)[:, 6] == 3)
    assert np.array_equal(cache.arena.k[0][:, -1], last)


def test_rows_may_be_those_of_the_granted_only(cache):
    cache.set_limit("b", 4)
    batch = cache.batch(["a", "b", "c"])
    batch.append(counts=[2, 1, 1])
    batch.write(0, rows([1, 2, 3]), rows([4, 5, 6]))
    assert cache.get_k_view("a", 0)[0, 3:, 0].tolist() == [1, 2]
    assert cache.get_k_view("c", 0)[0, 6:, 0].tolist() == [3]
    batch.write(0, rows([7, 8, 99, 9]), rows([4, 5, 99, 6]))
    assert cache.get_k_view("a", 0)[0, 3:, 0].tolist() == [7, 8]
    assert cache.get_k_view("c", 0)[0, 6:, 0].tolist() == [9]


def test_any_other_number_of_rows_is_an_error(cache):
    cache.set_limit("b", 4)
    batch = cache.batch(["a", "b", "c"])
    batch.append()
    for count in (0, 1, 4):
        with unchanged(cache), pytest.raises(ValueError, match=r"."):
            batch.write(0, rows([1] * count), rows([1] * count))


def test_a_write_follows_members_that_have_moved(make_cache):
    cache = make_cache()
    for number in range(16):
        cache.allocate_for(number, 3)
    members = list(range(1, 16, 2))
    batch = cache.batch(members)
    batch.append()
    for number in range(0, 16, 2):
        cache.free_for(number)
    cache.allocate_for("large", 32)
    batch.write(0, rows(members), rows(members))
    for number in members:
        assert np.all(cache.get_k_view(number, 0)[:, 3] == number)


def test_a_position_that_no_longer_exists_is_an_error(cache):
    batch = cache.batch(["a", "b"])
    batch.append()
    cache.truncate("b", 4)
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.write(0, rows([1, 2]), rows([3, 4]))


def test_a_write_before_any_append_is_an_error(cache):
    batch = cache.batch(["a", "b"])
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        batch.write(0, rows([1, 2]), rows([3, 4]))


def test_a_step_can_be_written_again(cache):
    batch = cache.batch(["a", "b"])
    batch.append()
    batch.write(0, rows([1, 2]), rows([3, 4]))
    batch.write(0, rows([5, 6]), rows([7, 8]))
    assert np.all(cache.get_k_view("b", 0)[:, -1] == 6)


def test_a_batch_write_counts_as_written(cache):
    cache.commit("a")
    batch = cache.batch(["a"])
    batch.append()
    for layer in range(2):
        batch.write(layer, rows([1]), rows([2]))
    assert cache.fork("a", "child").cached_tokens == 4


def test_a_batch_write_to_a_block_shared_since_copies_it_first(make_cache):
    cache = make_cache(1, 2, 4, 16, 4, placement="paged")
    cache.allocate_for("a", 3, max_tokens=4)
    batch = cache.batch(["a"])
    batch.append()
    cache.write("a", 0, *[np.full((2, 4, 4), 7, np.float32)] * 2)
    cache.fork("a", "b")
    batch.write(0, rows([1]), rows([2]))
    assert np.all(cache.get_k_view("b", 0) == 7)
    assert cache.get_k_view("a", 0)[0, :, 0].tolist() == [7, 7, 7, 1]
    assert cache.stats().copied_tokens == 4


def test_a_batch_write_without_a_block_for_its_copy_writes_nothing(make_cache):
    cache = make_cache(1, 2, 4, 8, 4, placement="paged")
    cache.allocate_for("a", 3, max_tokens=4)
    cache.allocate_for("z", 3, max_tokens=4)
    batch = cache.batch(["z", "a"])
    batch.append()
    cache.fork("a", "b")
    with unchanged(cache), pytest.raises(CacheFull):
        batch.write(0, rows([1, 2]), rows([3, 4]))


def test_a_batch_write_copies_for_all_members_or_for_none(make_cache):
    cache = make_cache(1, 2, 4, 20, 4, placement="paged")
    for name in "ab":
        cache.allocate_for(name, 3, max_tokens=4)
    batch = cache.batch(["a", "b"])
    batch.append()
    for name in "ab":
        cache.fork(name, ("fork", name))
    cache.allocate_for("c", 8)
    with unchanged(cache), pytest.raises(CacheFull) as caught:
        batch.write(0, rows([1, 2]), rows([3, 4]))
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (2, 1)
    cache.free_for("c")
    batch.write(0, rows([1, 2]), rows([3, 4]))
    assert cache.stats().copied_tokens == 8


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 1, 4), "float32"),
        ((2, 3, 4), "float32"),
        ((2, 2, 5), "float32"),
        ((2, 2, 4), "float64"),
        ((2, 8), "float32"),
    ],
)
def test_rows_of_the_wrong_shape_or_dtype_are_an_error(cache, shape, dtype):
    batch = cache.batch(["a", "b"])
    batch.append()
    good, bad = rows([1, 2]), np.zeros(shape, dtype)
    for planes in ((good, bad), (bad, good), (good,), (good, good, good), ()):
        with unchanged(cache), pytest.raises(ValueError, match=r"."):
            batch.write(0, *planes)


@pytest.mark.parametrize("layer", [2, -1, 2**31, -(2**70)])
def test_a_layer_out_of_range_is_an_error(cache, layer):
    batch = cache.batch(["a"])
    batch.append()
    with unchanged(cache), pytest.raises(IndexError):
        batch.write(layer, rows([1]), rows([2]))


def test_a_thousand_steps_leave_the_arrays_where_they_were(make_cache):
    cache = make_cache(2, 2, 4, 4096, 4)
    for number in range(4):
        cache.allocate_for(number, 3, max_tokens=1003)
    batch = cache.batch(range(4))
    places = [plane.ctypes.data for plane in (*cache.arena.k, *cache.arena.v)]
    for step in range(1000):
        assert batch.append().all()
        batch.write(0, rows([step] * 4), rows([-step] * 4))
    assert [plane.ctypes.data for plane in (*cache.arena.k, *cache.arena.v)] == places
    for number in range(4):
        assert cache.get_k_view(number, 0)[1, 3:, 2].tolist() == list(range(1000))
        assert cache.get_v_view(number, 0)[1, 3:, 2].tolist() == [-step for step in range(1000)]


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_starts_follow_what_other_calls_did_before_a_step_that_only_counts(make_cache, placement):
    cache = make_cache(1, 2, 4, 64, 4, placement=placement)
    cache.allocate_for("a", 4, max_tokens=16)
    cache.allocate_for("b", 4)
    cache.allocate_for("c", 1, max_tokens=16)
    batch = cache.batch(["a", "c"])
    cache.truncate("c", 0)
    batch.truncate(0)
    assert batch.starts[1] == -1
    cache.append_token("a")  # a new block, in paged placement behind that of "b"
    cache.append_token("c")
    assert batch.append().tolist() == [True, True]
    for index, name in enumerate("ac"):
        table = cache.block_table(name)
        scattered = not cache.is_contiguous(name)
        assert batch.starts[index] == (-1 if scattered else table[0] * 4)
