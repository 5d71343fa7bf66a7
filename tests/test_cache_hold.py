"""Holds: nothing moves, nothing held is overwritten, and what is freed is used again only afterwards."""

import pickle
import threading
import time

import numpy as np
import pytest
from observation import unchanged

from kvcache import CacheHeld

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])
PATIENCE = 20  # seconds until a thread that should have gone on is called stuck


class Elsewhere:
    """Runs a call in another thread and knows whether it has come back."""

    def __init__(self, call):
        self.answer = None
        self.thread = threading.Thread(target=self.run, args=(call,), daemon=True)
        self.thread.start()

    def run(self, call):
        self.answer = call()

    def waits(self, seconds=0.15):
        self.thread.join(seconds)
        return self.thread.is_alive()

    def result(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "still waiting"
        return self.answer


def comb(cache, placement):
    """Fills a 16-block pool with single blocks and frees every second one: room, but in no place."""
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)


@BOTH
def test_what_is_freed_under_a_hold_counts_as_used_until_it_ends(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with cache.hold():
        assert cache.free_for("a") is True
        assert "a" not in cache and len(cache) == 0
        assert (cache.stats().used_blocks, cache.stats().free_blocks) == (10, 6)
        cache.check()
    assert (cache.stats().used_blocks, cache.stats().free_blocks) == (0, 16)


@BOTH
def test_what_is_cut_under_a_hold_counts_as_used_until_it_ends(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with cache.hold():
        assert cache.truncate("a", 5) is True
        assert cache.used_tokens("a") == 5
        assert (cache.stats().used_blocks, cache.stats().free_blocks) == (10, 6)
        cache.check()
    assert (cache.stats().used_blocks, cache.stats().free_blocks) == (2, 14)


@BOTH
def test_a_thread_that_holds_is_told_instead_of_waiting(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with cache.hold():
        cache.free_for("a")
        with unchanged(cache), pytest.raises(CacheHeld) as caught:
            cache.allocate_for("b", 28)
    assert caught.value.holds == 1
    assert pickle.loads(pickle.dumps(caught.value)).holds == 1
    assert cache.allocate_for("b", 28)


@BOTH
def test_what_needs_no_held_block_goes_on_under_a_hold(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 20, max_tokens=28)
    with cache.hold():
        assert cache.append_tokens("a", 4) is True
        assert cache.allocate_for("b", 8)
        assert cache.fork("b", "c")
        assert cache.set_limit("b", 12) is True
        cache.write("a", 0, np.ones((2, 1, 4), np.float32), np.ones((2, 1, 4), np.float32))
        cache.check()


@BOTH
def test_what_fits_neither_now_nor_later_is_refused_under_a_hold(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with cache.hold(), unchanged(cache):
        assert cache.allocate_for("b", 28) is None
        assert cache.fork("a", "b") is None or placement == "paged"
        assert cache.append_token("a") is False
        if placement == "paged":
            cache.free_for("b")


def test_a_move_is_refused_to_the_thread_that_holds(make_cache):
    cache = make_cache()
    comb(cache, "contiguous")
    with cache.hold():
        for call in (lambda: cache.allocate_for("large", 8), lambda: cache.append_tokens("empty", 8)):
            if "empty" not in cache:
                cache.allocate_for("empty", 1, max_tokens=16)
                cache.truncate("empty", 0)
            with unchanged(cache), pytest.raises(CacheHeld):
                call()


def test_paged_needs_no_move(make_cache):
    cache = make_cache(placement="paged")
    comb(cache, "paged")
    with cache.hold():
        assert cache.allocate_for("large", 32)


@BOTH
def test_another_thread_waits_for_the_last_hold_to_end(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 40)
    with cache.hold():
        cache.free_for("a")
        late = Elsewhere(lambda: cache.allocate_for("b", 28))
        assert late.waits()
        assert "b" not in cache
    assert late.result().tokens == 28


def test_a_move_waits_in_another_thread(make_cache):
    cache = make_cache()
    comb(cache, "contiguous")
    tables = {request_id: cache.block_table(request_id).tolist() for request_id in cache}
    with cache.hold():
        late = Elsewhere(lambda: cache.allocate_for("large", 32))
        assert late.waits()
        assert {request_id: cache.block_table(request_id).tolist() for request_id in cache} == tables
    assert late.result()
    assert cache.stats().moves > 0


def test_other_threads_go_on_while_one_waits(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 40)
    cache.allocate_for("b", 3)
    with cache.hold():
        cache.free_for("a")
        late = Elsewhere(lambda: cache.allocate_for("c", 60))
        assert late.waits(0.05)
        assert Elsewhere(lambda: cache.append_token("b")).result() is True
        assert Elsewhere(lambda: cache.free_for("b")).result() is True
        assert Elsewhere(cache.stats).result().num_sequences == 0
        Elsewhere(cache.check).result()
    assert late.result()


@BOTH
def test_a_copy_of_a_view_goes_on_while_one_waits_for_a_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    cache.allocate_for("b", 40)
    with cache.hold():
        cache.free_for("b")
        late = Elsewhere(lambda: cache.allocate_for("c", 40))
        assert late.waits(0.05)
        copy = Elsewhere(lambda: cache.get_k_view("a", 0, copy=True))
        assert np.array_equal(copy.result(), values(7, 0))
        assert late.waits(0.05)
    assert late.result()


def test_copies_one_after_another_starve_nobody_who_waits(make_cache):
    cache = with_written(make_cache, "paged")
    cache.allocate_for("b", 40)
    stop = threading.Event()

    def copy_again_and_again():
        while not stop.is_set():
            cache.get_k_view("a", 0, copy=True)

    copying = [Elsewhere(copy_again_and_again) for _ in range(3)]
    with cache.hold():
        cache.free_for("b")
        late = Elsewhere(lambda: cache.allocate_for("c", 40))
        assert late.waits(0.05)
    granted = late.result()
    stop.set()
    for copier in copying:
        copier.result()
    assert granted


def test_holds_nest(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 40)
    with cache.hold():
        with cache.hold():
            cache.free_for("a")
        assert cache.stats().used_blocks == 10
        with pytest.raises(CacheHeld):
            cache.allocate_for("b", 60)
    assert cache.stats().used_blocks == 0


def test_holds_are_shared_between_threads(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 40)
    inside, leave = threading.Event(), threading.Event()

    def hold_too():
        with cache.hold():
            inside.set()
            return leave.wait(PATIENCE)

    with cache.hold():
        other = Elsewhere(hold_too)
        assert inside.wait(PATIENCE)
        cache.free_for("a")
    assert cache.stats().used_blocks == 10
    leave.set()
    assert other.result()
    assert cache.stats().used_blocks == 0


def test_a_hold_ends_when_its_body_raises(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 64)
    with pytest.raises(KeyError), cache.hold():
        cache.used_tokens("never seen")
    cache.free_for("a")
    assert cache.allocate_for("b", 64)


def test_holding_an_idle_cache_changes_nothing(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    with unchanged(cache), cache.hold():
        pass


def test_views_stay_good_inside_a_hold_whatever_other_threads_do(make_cache):
    cache = make_cache(1, 2, 4, 64, 4)
    for number in range(8):
        cache.allocate_for(number, 4, max_tokens=8)
        cache.write(number, 0, *[np.full((2, 4, 4), number, np.float32)] * 2)
    with cache.hold():
        views = {number: cache.get_k_view(number, 0) for number in range(8)}
        frees = [Elsewhere(lambda number=number: cache.free_for(number)) for number in range(0, 8, 2)]
        assert all(free.result() for free in frees)
        late = Elsewhere(lambda: cache.allocate_for("large", 40))
        late.waits(0.05)
        assert all(np.all(view == number) for number, view in views.items())
    late.result()


def test_a_waiting_call_is_not_starved_by_holds_that_follow_each_other(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 64)
    stop = threading.Event()

    def hold_again_and_again():
        while not stop.is_set():
            with cache.hold():
                stop.wait(0.002)

    holders = [Elsewhere(hold_again_and_again) for _ in range(2)]
    cache.free_for("a")
    late = Elsewhere(lambda: cache.allocate_for("b", 64))
    granted = late.result()
    stop.set()
    for holder in holders:
        holder.result()
    assert granted or cache.allocate_for("b", 64)


def test_a_batch_member_that_could_not_be_served_anyway_holds_up_nobody(make_cache):
    cache = make_cache(1, 2, 4, 24, 4, placement="paged", overcommit=float("inf"))
    cache.allocate_for("greedy", 4, max_tokens=24)
    cache.allocate_for("c", 12)
    cache.allocate_for("modest", 4, max_tokens=24)
    with cache.hold():
        cache.truncate("c", 0)
        assert cache.stats().free_blocks == 1
        assert cache.batch(["greedy", "modest"]).append(counts=[20, 1]).tolist() == [False, True]


def test_two_members_that_share_a_block_need_one_copy_of_it(make_cache):
    cache = make_cache(1, 2, 4, 16, 4, placement="paged")
    cache.allocate_for("a", 2, max_tokens=4)
    cache.fork("a", "b")
    cache.allocate_for("c", 8)
    with cache.hold():
        cache.truncate("c", 4)
        assert cache.stats().free_blocks == 1
        assert cache.batch(["a", "b"]).append().tolist() == [True, True]


@BOTH
def test_a_batch_append_that_needs_a_held_block_changes_nothing(make_cache, placement):
    cache = make_cache(placement=placement, overcommit=float("inf"))
    cache.allocate_for("a", 3, max_tokens=4)
    cache.allocate_for("b", 4, max_tokens=8)
    cache.allocate_for("c", 56)
    batch = cache.batch(["a", "b"])
    with cache.hold():
        cache.truncate("c", 4)
        with unchanged(cache), pytest.raises(CacheHeld):
            batch.append()
        assert batch.lengths.tolist() == [3, 4]
    assert batch.append().tolist() == [True, True]


# ---- what is held is not overwritten


def values(count, start):
    return np.arange(start, start + count, dtype=np.float32)[None, :, None] * np.ones((2, 1, 4), np.float32)


def with_written(make_cache, placement, tokens=7):
    cache = make_cache(placement=placement, overcommit=2.0)
    cache.allocate_for("a", tokens, max_tokens=20)
    for layer in range(2):
        cache.write("a", layer, values(tokens, 0), values(tokens, 100))
    return cache


@BOTH
def test_what_is_cut_inside_a_block_is_not_written_again_under_a_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    with cache.hold():
        seen = cache.get_k_view("a", 0)
        before = seen.copy()
        cache.truncate("a", 5)
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.append_token, "a")
            pytest.raises(CacheHeld, cache.batch(["a"]).append)
        assert np.array_equal(seen, before)
    assert cache.append_token("a") and cache.used_tokens("a") == 6


@BOTH
def test_an_append_that_would_fit_after_no_hold_does_not_wait_for_one(make_cache, placement):
    cache = with_written(make_cache, placement)
    cache.allocate_for("b", 56)
    with cache.hold():
        cache.truncate("a", 5)
        with unchanged(cache):
            assert cache.append_tokens("a", 12) is False
            assert cache.batch(["a"]).append(counts=12).tolist() == [False]
            pytest.raises(CacheHeld, cache.append_tokens, "a", 3)


@BOTH
def test_a_thread_that_would_write_over_what_is_cut_waits_for_the_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    with cache.hold():
        cache.truncate("a", 5)
        other = Elsewhere(lambda: cache.append_tokens("a", 3))
        assert other.waits() and cache.used_tokens("a") == 5
    assert other.result() is True and cache.used_tokens("a") == 8


@BOTH
def test_what_has_been_written_is_not_overwritten_under_a_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    batch = cache.batch(["a"])
    batch.append()
    with cache.hold():
        seen = cache.get_k_view("a", 0)
        before = seen[:, :7].copy()
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.write, "a", 0, values(2, 50), values(2, 50), start=3)
        row = np.ones((1, 2, 4), np.float32)
        batch.write(0, row, row)  # a slot that nothing has been written to
        assert np.array_equal(seen[:, :7], before) and (seen[:, 7] == 1).all()
        with unchanged(cache):
            pytest.raises(CacheHeld, batch.write, 0, row, row)
    cache.write("a", 0, values(2, 50), values(2, 50), start=3)
    assert (cache.get_k_view("a", 0)[:, 3] == 50).all()


@BOTH
def test_a_layer_whose_prefix_another_layer_lowered_is_not_overwritten_under_a_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    cache.write("a", 0, values(7, 50), values(7, 50), start=0)
    with cache.hold():
        seen = cache.get_k_view("a", 1)
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.write, "a", 1, values(2, 50), values(2, 50), start=3)
        assert np.array_equal(seen, values(7, 0))


@BOTH
def test_what_was_written_beyond_a_gap_is_not_overwritten_under_a_hold(make_cache, placement):
    cache = make_cache(placement=placement, overcommit=2.0)
    cache.allocate_for("a", 8, max_tokens=12)
    cache.write("a", 0, values(3, 5), values(3, 5), start=5)
    with cache.hold():
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.write, "a", 0, values(1, 0), values(1, 0), start=6)
            pytest.raises(CacheHeld, cache.write, "a", 0, values(6, 0), values(6, 0), start=0)
        cache.write("a", 0, values(5, 0), values(5, 0), start=0)  # the gap
        assert np.array_equal(cache.get_k_view("a", 0), values(8, 0))
    cache.truncate("a", 6)
    cache.append_tokens("a", 6)
    with cache.hold():
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.write, "a", 0, values(7, 5), values(7, 5), start=5)
        cache.write("a", 0, values(6, 6), values(6, 6), start=6)


@BOTH
def test_what_a_fork_has_of_its_parent_is_not_overwritten_under_a_hold(make_cache, placement):
    cache = with_written(make_cache, placement)
    cache.fork("a", "b")
    with cache.hold(), unchanged(cache):
        pytest.raises(CacheHeld, cache.write, "b", 0, values(2, 50), values(2, 50), start=3)


def test_a_layer_is_read_as_an_int_once(make_cache):
    class Layer:
        def __init__(self):
            self.answers = iter([1])

        def __index__(self):
            return next(self.answers)

    cache = with_written(make_cache, "contiguous")
    batch = cache.batch(["a"])
    batch.append()
    rows = np.ones((1, 2, 4), np.float32)
    with cache.hold():
        batch.write(Layer(), rows, rows)
        cache.write("a", 0, values(1, 7), values(1, 7))
    cache.write("a", Layer(), values(1, 9), values(1, 9))
    assert (cache.get_k_view("a", 1)[:, 7] == 9).all()


def test_a_shared_block_that_its_other_holder_leaves_under_a_hold_keeps_its_content(make_cache):
    cache = with_written(make_cache, "paged")
    cache.fork("a", "b")
    cache.truncate("b", 5)
    with cache.hold():
        seen = cache.get_k_view("a", 0)
        before = seen.copy()
        cache.free_for("a")
        with unchanged(cache):
            pytest.raises(CacheHeld, cache.append_token, "b")
        assert np.array_equal(seen, before)
    assert cache.append_token("b")


def test_a_member_whose_copy_keeps_more_than_another_has_is_seen_before_it_is_copied(make_cache):
    cache = with_written(make_cache, "paged")
    cache.fork("a", "b")
    cache.truncate("b", 5)
    batch = cache.batch(["a", "b"])
    with cache.hold(), unchanged(cache):
        pytest.raises(CacheHeld, batch.append)
    assert batch.append().tolist() == [True, True]


def test_a_fork_waits_for_the_step_that_still_writes_its_parent(make_cache):
    cache = with_written(make_cache, "paged")
    batch = cache.batch(["a"])
    batch.append()
    with cache.hold():
        slots = batch.slots.tolist()
        other = Elsewhere(lambda: cache.fork("a", "b"))
        assert other.waits()
        row = np.ones((1, 2, 4), np.float32)
        for layer in range(2):
            batch.write(layer, row, row)
        assert batch.slots.tolist() == slots
    assert other.result().cached_tokens == 8
    assert (cache.get_k_view("b", 1)[:, 7] == 1).all()


@BOTH
def test_copies_of_views_are_never_torn_by_threads_that_move_and_write(make_cache, placement):
    """Every token of a sequence has one value at any time: a copy shows one such moment."""
    cache = make_cache(1, 1, 64, 8192, 4, placement=placement, overcommit=4.0)
    cache.allocate_for("a", 2000, max_tokens=2400)
    cache.write("a", 0, *[np.zeros((1, 2000, 64), np.float32)] * 2)
    stop, torn = time.monotonic() + 1.5, []

    def shake():
        number = 0
        while time.monotonic() < stop:
            number += 1
            tokens = cache.used_tokens("a")
            rows = np.full((1, tokens, 64), number, np.float32)
            cache.write("a", 0, rows, rows, start=0)
            if cache.allocate_for(number, 1 + number % 900, max_tokens=1000):
                cache.append_tokens("a", 4) or cache.truncate("a", 2000)
                cache.free_for(number - 3)

    other = Elsewhere(shake)
    while time.monotonic() < stop:
        shown = cache.get_k_view("a", 0, copy=True)[0, :2000]
        if len({float(value) for value in shown[::97, 0]}) > 1:
            torn.append(shown)
    other.result()
    assert not torn
