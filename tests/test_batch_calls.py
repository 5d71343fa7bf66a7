"""One batch, whoever calls it: several threads, ids that call back, a cache that has been closed, members that died."""

import itertools
import threading
import time

import numpy as np
import pytest
from observation import unchanged

from kvcache import CacheClosed, CacheHeld, DecodeBatch, KVCacheError, SequenceExists

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])
READ = ("slots", "positions", "splits", "lengths", "starts", "block_tables", "generation")


class Caller:
    """An id whose hash calls back, once it is armed."""

    def __init__(self):
        self.call = None

    def __hash__(self):
        call, self.call = self.call, None
        if call is not None:
            call()
        return 7


def crowd(make_cache, placement, members=24):
    cache = make_cache(1, 1, 4, 4096, 4, placement=placement, overcommit=float("inf"))
    for number in range(members):
        cache.allocate_for(number, 1 + number % 7, max_tokens=4000)
    return cache, cache.batch(range(members))


# ---- threads


@BOTH
def test_a_batch_that_several_threads_use_at_once_stays_whole(make_cache, placement):
    cache, batch = crowd(make_cache, placement)
    stop, errors = time.monotonic() + 2, []

    def append(number):
        batch.append(counts=[number % 3] * len(batch)) if number % 2 else batch.append()
        batch.truncate(1)

    def turn_over(number):
        batch.remove(number)
        batch.add(number)

    def look(_):
        slots, tables = batch.slots, batch.block_tables
        assert slots.dtype == np.int32 and tables.shape[0] >= 22

    def repeat(call, number):
        while time.monotonic() < stop and not errors:
            try:
                call(number)
            except ValueError as error:  # as many counts as there were members a moment ago
                if not str(error).startswith("2") and "cannot drop" not in str(error):
                    errors.append(error)
            except (AssertionError, KVCacheError) as error:
                errors.append(error)

    jobs = [(append, 1), (append, 2), (turn_over, 3), (turn_over, 11), (look, 0)]
    threads = [threading.Thread(target=repeat, args=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors and not any(thread.is_alive() for thread in threads)
    assert sorted(batch) == list(range(24))
    assert batch.lengths.tolist() == [cache.used_tokens(number) for number in batch]


def test_a_holder_does_not_wait_for_a_step_that_waits_for_its_hold(make_cache):
    cache = make_cache(1, 1, 4, 16, 4, placement="paged", overcommit=2.0)
    cache.allocate_for("a", 4, max_tokens=16)
    cache.allocate_for("b", 12, max_tokens=12)
    batch = cache.batch(["a"])
    granted = []
    with cache.hold():
        cache.free_for("b")
        stepping = threading.Thread(target=lambda: granted.append(batch.append().tolist()), daemon=True)
        stepping.start()
        while not cache_waits(batch):
            time.sleep(0.001)
        assert not granted
    stepping.join(10)
    assert granted == [[True]]


def cache_waits(batch):
    """Whether the batch is in a call that waits for this thread's hold."""
    try:
        return batch.generation < 0
    except CacheHeld:
        return True


# ---- ids that call back


def test_an_id_whose_hash_adds_to_the_same_batch_is_refused_and_nothing_is_added(make_cache):
    cache = make_cache()
    caller = Caller()
    cache.allocate_for("a", 3)
    cache.allocate_for(caller, 3)
    batch = cache.batch(["a"])
    with unchanged(cache):
        caller.call = lambda: batch.add("a")
        pytest.raises(KVCacheError, batch.add, caller).match("a call of this very thread")
    assert list(batch) == ["a"] and batch.append().tolist() == [True]
    batch.add(caller)
    assert batch.lengths.tolist() == [4, 3]


def test_an_id_whose_hash_uses_the_cache_joins_a_batch(make_cache):
    cache = make_cache()
    caller = Caller()
    cache.allocate_for("a", 3, max_tokens=8)
    cache.allocate_for(caller, 3)
    batch = cache.batch(["a"])
    caller.call = lambda: cache.append_token("a")
    batch.add(caller)
    assert batch.lengths.tolist() == [4, 3]


def test_a_member_that_an_inconstant_hash_lets_in_twice_is_not_cut_to_less_than_nothing(make_cache):
    class Inconstant:
        hashes = None

        def __hash__(self):
            return next(self.hashes) if self.hashes else 7

    cache = make_cache()
    member = Inconstant()
    cache.allocate_for(member, 5)
    batch = cache.batch([member])
    member.hashes = itertools.cycle([7, 8, 8])  # found in the cache, not in the batch
    batch.add(member)
    member.hashes = None
    assert len(batch) == 2
    batch.truncate(3)
    assert cache.used_tokens(member) == 0
    cache.check()


# ---- made by halves


@pytest.mark.parametrize("name", READ)
def test_a_batch_without_init_reads_as_an_error(name):
    with pytest.raises(KVCacheError, match="__init__ has not been called"):
        getattr(DecodeBatch.__new__(DecodeBatch), name)


@pytest.mark.parametrize(
    "call",
    [
        lambda batch: batch.append(),
        lambda batch: batch.append(counts=2),
        lambda batch: batch.truncate(1),
        lambda batch: batch.add("a"),
        lambda batch: batch.remove("a"),
        lambda batch: batch.reorder([]),
    ],
)
def test_a_batch_without_init_does_nothing_but_raise(call):
    with pytest.raises(KVCacheError, match="__init__ has not been called"):
        call(DecodeBatch.__new__(DecodeBatch))


def test_a_batch_whose_init_failed_is_not_made(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3)
    batch = DecodeBatch.__new__(DecodeBatch)
    pytest.raises(KeyError, batch.__init__, cache, ["a", "nobody"])
    with unchanged(cache), pytest.raises(KVCacheError, match="__init__ has not been called"):
        batch.append()


def test_a_batch_is_made_once(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3)
    batch = cache.batch(["a"])
    with pytest.raises(KVCacheError, match="made once"):
        batch.__init__(cache, [])
    assert list(batch) == ["a"]


def test_a_batch_is_not_made_while_it_is_being_made(make_cache):
    cache = make_cache()
    for name in "abc":
        cache.allocate_for(name, 3)
    batch = DecodeBatch.__new__(DecodeBatch)

    def members():
        yield "a"
        pytest.raises(KVCacheError, batch.__init__, cache, ["b"]).match("made once")
        pytest.raises(KVCacheError, batch.append).match("has not been called")
        yield "c"

    batch.__init__(cache, members())
    assert list(batch) == ["a", "c"] and batch.lengths.tolist() == [3, 3]


# ---- after close


def test_after_close_a_batch_can_neither_be_made_nor_changed_nor_read(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3)
    batch = cache.batch(["a"])
    cache.close()
    calls = [
        cache.batch,
        cache.__enter__,
        batch.append,
        lambda: batch.add("a"),
        lambda: batch.remove("a"),
        lambda: batch.reorder([0]),
        lambda: batch.truncate(0),
        *[lambda name=name: getattr(batch, name) for name in READ],
    ]
    for call in calls:
        pytest.raises(CacheClosed, call)


# ---- members that others change


@BOTH
def test_the_table_of_a_freed_member_is_not_that_of_a_newcomer_with_its_id(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 3)
    cache.allocate_for("b", 9)
    batch = cache.batch(["a", "b"])
    cache.free_for("a")
    cache.allocate_for("a", 8)
    assert batch.block_tables[0].tolist() == [-1, -1, -1]
    assert batch.block_tables[1].tolist() == cache.block_table("b").tolist()
    assert batch.lengths.tolist() == [0, 9]
    with unchanged(cache), pytest.raises(SequenceExists):
        batch.add("a")


@BOTH
def test_splits_count_the_tokens_that_are_still_there(make_cache, placement):
    cache = make_cache(placement=placement)
    for name in "abc":
        cache.allocate_for(name, 3, max_tokens=12)
    batch = cache.batch("abc")
    batch.append(counts=[2, 3, 1])
    cache.truncate("b", 4)
    slots, splits = batch.slots, batch.splits
    there = slots[slots >= 0]
    assert splits.tolist() == [0, 2, 3, 4]
    for index, name in enumerate("abc"):
        first = cache.used_tokens(name) - (splits[index + 1] - splits[index])
        wanted = [cache.block_table(name)[p // 4] * 4 + p % 4 for p in range(first, cache.used_tokens(name))]
        assert there[splits[index] : splits[index + 1]].tolist() == wanted
    assert batch.device_slots.tolist() == there.tolist()
    assert batch.device_positions.tolist() == [3, 4, 3, 3]


def test_a_step_that_asks_for_more_than_any_arena_has_is_refused_at_once(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3)
    batch = cache.batch(["a"])
    for count in (2**24 + 1, 2**30, 2**31 - 1):
        with unchanged(cache), pytest.raises(ValueError, match="at most 16777216 can be asked for"):
            batch.append(counts=count)
    assert batch.append(counts=10**6).tolist() == [False]
