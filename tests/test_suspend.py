"""Suspend and resume: K/V come back byte for byte, into any place; what fails leaves its owner knowing what it has."""

import contextlib
import gc
import itertools
import os
import threading
import time
import weakref

import numpy as np
import pytest
from faulty import Faulty

from kvcache import KVCache, KVCacheError, UnknownSequence, suspension
from kvcache._travel import TravelCore
from kvcache.errors import CacheClosed, SequenceExists, Suspended
from kvcache.store import Outcome, SettledJob
from kvcache.store_files import DirectoryStore
from kvcache.store_memory import MemoryStore
from kvcache.suspension import slot_bytes_of

SOON = 30.0
SECONDS = float(os.environ.get("KVCACHE_TEST_SECONDS", "10")) / 20
LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 64, 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(
        "kvcache.chunks.CHUNK_BYTES", 2 * BLOCK * LAYERS * 2 * HEADS * WIDTH * 4
    )  # two blocks


@pytest.fixture(params=["contiguous", "paged"])
def cache(request):
    with KVCache(LAYERS, HEADS, WIDTH, 16 * BLOCK, BLOCK, placement=request.param) as cache:
        yield cache
        if not cache.closed:
            cache.check()


def rows(seed, tokens):
    return np.random.default_rng(seed).standard_normal((2 * LAYERS, HEADS, tokens, WIDTH)).astype(np.float32)


def fill(cache, request_id, seed, start=0):
    tokens = cache.used_tokens(request_id) - start
    data = rows(seed, tokens)
    for layer in range(LAYERS):
        cache.write(request_id, layer, data[2 * layer], data[2 * layer + 1], start=start)
    return data


def contents(cache, request_id):
    views = [
        np.array(view) for layer in range(LAYERS) for view in cache.get_views(request_id, layer, copy=True)
    ]
    return np.stack(views)


class Clock:
    """Raises once it is stopped."""

    stopped = False

    def __call__(self):
        if self.stopped:
            raise RuntimeError("no time")
        return 1.0


def emptied(store):
    """What nobody wants is deleted by the thread that carries: soon."""
    end = time.monotonic() + SOON
    while len(store) and time.monotonic() < end:
        time.sleep(0.001)
    return len(store) == 0


def suspended(cache, request_id, store=None):
    transfer = cache.suspend(request_id, store)
    assert transfer.wait(SOON) and transfer.ok, transfer
    return transfer


def resumed(cache, request_id, **options):
    transfer = cache.resume(request_id, **options)
    assert transfer.wait(SOON) and transfer.ok, transfer
    return transfer


# ---- there and back


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 30])
def test_what_was_suspended_comes_back_byte_for_byte(cache, tokens):
    cache.allocate_for("a", tokens, max_tokens=40)
    data = fill(cache, "a", 1)
    assert suspended(cache, "a").tokens == tokens
    cache.allocate_for("other", 60)  # all the room there is, and other bytes in it
    fill(cache, "other", 2)
    assert cache.resume("a") is None
    cache.free_for("other")
    assert resumed(cache, "a").tokens == tokens
    np.testing.assert_array_equal(contents(cache, "a"), data)
    assert (cache.used_tokens("a"), cache.limit("a")) == (tokens, 40)


def test_it_comes_back_to_another_place_and_grows_there(cache):
    cache.allocate_for("first", 8)
    cache.allocate_for("a", 9, max_tokens=20)
    data = fill(cache, "a", 1)
    suspended(cache, "a")
    cache.allocate_for("second", 12)
    resumed(cache, "a")
    assert cache.append_tokens("a", 11)
    np.testing.assert_array_equal(contents(cache, "a")[:, :, :9], data)
    assert not cache.append_token("a")


def test_by_way_of_a_directory(cache, tmp_path):
    store = DirectoryStore(tmp_path, 1 << 20)
    cache.allocate_for("a", 30)
    data = fill(cache, "a", 1)
    suspended(cache, "a", store)
    assert len(store) == 4
    resumed(cache, "a")
    np.testing.assert_array_equal(contents(cache, "a"), data)
    store.close(SOON)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_suspended_sequence_has_its_id_limit_and_tokens_and_no_block(cache):
    cache.allocate_for("a", 9, max_tokens=40)
    before = cache.stats()
    suspended(cache, "a")
    assert "a" in cache and list(cache) == ["a"] and cache.num_allocated_sequences == 1
    assert (cache.used_tokens("a"), cache.limit("a"), cache.capacity("a")) == (9, 40, 0)
    assert cache.is_contiguous("a") and cache.block_table("a").tolist() == []
    now = cache.stats()
    assert (now.used_blocks, now.claimed_blocks, now.suspended_sequences) == (0, 0, 1)
    assert before.claimed_blocks > 0
    assert cache.allocate_for("b", 64) is not None  # everything may be promised to others
    with pytest.raises(SequenceExists):
        cache.allocate_for("a", 1)


def test_everything_else_says_that_it_is_suspended_and_changes_nothing(cache):
    cache.allocate_for("a", 9, max_tokens=40)
    data = fill(cache, "a", 1)
    batch = cache.batch(["a"])
    suspended(cache, "a")
    k = np.zeros((HEADS, 1, WIDTH), np.float32)
    calls = [
        lambda: cache.append_token("a"),
        lambda: cache.append_tokens("a", 2),
        lambda: cache.get_k_view("a", 0),
        lambda: cache.get_views("a", 0, copy=True),
        lambda: cache.write("a", 0, k, k),
        lambda: cache.fork("a", "b"),
        lambda: cache.truncate("a", 3),
        lambda: cache.set_limit("a", 50),
        lambda: cache.commit("a"),
        lambda: cache.suspend("a"),
        batch.append,
        lambda: batch.truncate(1),
        lambda: cache.batch(["a"]).append(),
    ]
    for call in calls:
        with pytest.raises(Suspended) as caught:
            call()
        assert caught.value.request_id == "a"
    assert "b" not in cache
    resumed(cache, "a")
    np.testing.assert_array_equal(contents(cache, "a"), data)


def test_a_batch_asks_for_a_resumed_member_anew(cache):
    cache.allocate_for("a", 9, max_tokens=40)
    batch = cache.batch(["a"])
    suspended(cache, "a")
    resumed(cache, "a")
    with pytest.raises(UnknownSequence):
        batch.append()
    batch.remove("a")
    batch.add("a")
    assert batch.append().tolist() == [True]


def test_of_a_fork_each_has_its_own_when_it_comes_back(cache):
    cache.allocate_for("a", 10, max_tokens=12)
    data = fill(cache, "a", 1)
    cache.fork("a", "b")
    suspended(cache, "a")
    more = fill(cache, "b", 2, start=8)
    resumed(cache, "a")
    np.testing.assert_array_equal(contents(cache, "a"), data)
    np.testing.assert_array_equal(contents(cache, "b"), np.concatenate([data[:, :, :8], more], axis=2))


def test_a_sequence_of_no_tokens_is_suspended_too(cache):
    cache.allocate_for("a", 5, max_tokens=9)
    cache.truncate("a", 0)
    assert suspended(cache, "a").tokens == 0
    resumed(cache, "a")
    assert (cache.used_tokens("a"), cache.limit("a"), cache.capacity("a")) == (0, 9, 0)
    assert cache.append_tokens("a", 9)


def test_ids_and_what_is_committed_come_back(cache):
    ids = list(range(100, 117))
    cache.allocate_for("a", ids, max_tokens=40, salt="x")
    fill(cache, "a", 1)
    suspended(cache, "a")
    filler = cache.allocate_for("filler", 64)  # evicts what was cached of it
    assert filler is not None and cache.probe([*ids, 1], salt="x") == 0
    cache.free_for("filler")
    resumed(cache, "a")
    assert cache.probe([*ids, 1], salt="x") == 16
    assert cache.append_tokens("a", [1, 2, 3])
    cache.commit("a")
    assert cache.probe([*ids, 1, 2, 3, 9], salt="x") == 20
    assert cache.probe([*ids, 1]) == 0


def test_what_was_not_written_is_not_found_after_it_has_come_back(cache):
    ids = list(range(16))
    cache.allocate_for("a", ids)
    data = rows(1, 8)
    for layer in range(LAYERS):
        cache.write("a", layer, data[2 * layer], data[2 * layer + 1], start=0)
    suspended(cache, "a")
    resumed(cache, "a")
    assert cache.probe([*ids, 99]) == 8


def test_suspending_under_a_hold_keeps_its_bytes_until_the_hold_ends(cache):
    cache.allocate_for("a", 16)
    data = fill(cache, "a", 1)
    with cache.hold():
        view = cache.get_k_view("a", 0)
        suspended(cache, "a")
        np.testing.assert_array_equal(view, data[0])
        assert cache.stats().waiting_blocks == 4
    assert cache.stats().used_blocks == 0


def test_an_owner_that_waits_is_told_of_room(cache):
    told = []
    cache._watch(told.append)
    cache.allocate_for("a", 16)
    suspended(cache, "a")
    assert told == ["a"]


def test_many_threads_suspend_and_resume_each_its_own(cache):
    wrong = []
    store = MemoryStore(1 << 20, 1 << 16)

    def churn(name):
        try:
            while cache.allocate_for(name, 12, max_tokens=16) is None:
                time.sleep(0.001)
            data = fill(cache, name, name)
            for _ in range(12):
                suspended(cache, name, store)
                while (transfer := cache.resume(name)) is None:
                    time.sleep(0.001)
                assert transfer.wait(SOON) and transfer.ok
                np.testing.assert_array_equal(contents(cache, name), data)
            cache.free_for(name)
        except BaseException as error:  # noqa: BLE001
            wrong.append(error)

    threads = [threading.Thread(target=churn, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert cache.stats().used_blocks == 0


def test_mlx_comes_back_too():
    mx = pytest.importorskip("mlx.core")
    with KVCache(LAYERS, HEADS, WIDTH, 16 * BLOCK, BLOCK, dtype="bfloat16", backend="mlx") as cache:
        cache.allocate_for("a", 13)
        k = mx.random.normal((HEADS, 13, WIDTH)).astype(mx.bfloat16)
        for layer in range(LAYERS):
            cache.write("a", layer, k, -k)
        suspended(cache, "a")
        cache.allocate_for("b", 8)
        for layer in range(LAYERS):
            cache.write("b", layer, k[:, :8], k[:, :8])
        resumed(cache, "a")
        for layer in range(LAYERS):
            assert mx.array_equal(cache.get_k_view("a", layer), k)
            assert mx.array_equal(cache.get_v_view("a", layer), -k)
        cache.check()


# ---- refusals


def test_who_is_not_there_cannot_be_suspended_or_resumed(cache):
    with pytest.raises(UnknownSequence):
        cache.suspend("a")
    with pytest.raises(UnknownSequence):
        cache.resume("a")


def test_who_is_not_suspended_cannot_be_resumed(cache):
    cache.allocate_for("a", 3)
    with pytest.raises(ValueError, match="'a' is not suspended"):
        cache.resume("a")
    assert cache.append_token("a")


def test_without_storage_there_is_nothing_to_suspend():
    cache = KVCache(1, 1, 8, 64, backend="none")
    cache.allocate_for("a", 3)
    with pytest.raises(ValueError, match="no storage"):
        cache.suspend("a")


def test_staging_must_have_room_for_a_chunk():
    with pytest.raises(ValueError, match=r"at least one chunk, .* not 100"):
        KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, staging_bytes=100)
    least = slot_bytes_of(KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK).spec)
    with KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, staging_bytes=least) as cache:
        cache.allocate_for("a", 30)
        data = fill(cache, "a", 1)
        suspended(cache, "a")
        resumed(cache, "a")
        np.testing.assert_array_equal(contents(cache, "a"), data)


@pytest.mark.parametrize(
    "rate, kind",
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_rate_is_a_number_of_bytes(rate, kind):
    with pytest.raises(kind, match="store_rate"):
        KVCache(1, 1, 8, 64, store_rate=rate)


def test_a_rate_paces_both_ways():
    with KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, store_rate=200_000) as cache:
        cache.allocate_for("a", 32)  # 82 kB in four chunks: after three of them the next one waits
        began = time.monotonic()
        suspended(cache, "a")
        between = time.monotonic()
        resumed(cache, "a")
        assert between - began > 0.2
        assert time.monotonic() - between > 0.2


# ---- what fails


def gone_mad(store, keys, buffers):
    raise OSError("a store that raises")


PUTS = [(Outcome.FULL, "full"), (Outcome.FAILED, "failed"), (gone_mad, "failed")]


@pytest.mark.parametrize("nth", [0, 1, 3])
@pytest.mark.parametrize("answer, reason", PUTS)
def test_a_put_that_fails_leaves_the_sequence_intact(cache, nth, answer, reason):
    store = Faulty("put", nth, answer)
    cache.allocate_for("a", 30, max_tokens=33)
    data = fill(cache, "a", 1)
    batch = cache.batch(["a"])
    transfer = cache.suspend("a", store)
    assert transfer.wait(SOON) and not transfer.ok and transfer.reason == reason
    np.testing.assert_array_equal(contents(cache, "a"), data)
    assert batch.append().tolist() == [True]  # whoever knew it knows it still
    assert emptied(store.inner)
    suspended(cache, "a")
    resumed(cache, "a")


def cut_short(store, keys, buffers):
    buffers[0][:] = bytes(len(buffers[0]))
    return SettledJob([Outcome.OK])


def one_bit(store, keys, buffers):
    job = store.inner.get(keys, buffers, timeout=SOON)
    buffers[0][len(buffers[0]) // 2] ^= 1
    return job


GETS = [
    (Outcome.MISS, "lost"),
    (Outcome.FAILED, "failed"),
    (Outcome.FULL, "full"),
    (cut_short, "lost"),
    (one_bit, "lost"),
    (gone_mad, "failed"),
]


@pytest.mark.parametrize("nth", [0, 1, 3])
@pytest.mark.parametrize("answer, reason", GETS)
def test_a_get_that_fails_leaves_the_id_suspended_and_no_block_held(cache, nth, answer, reason):
    store = Faulty("get", nth, answer)
    cache.allocate_for("a", 30)
    data = fill(cache, "a", 1)
    suspended(cache, "a", store)
    transfer = cache.resume("a")
    assert transfer.wait(SOON) and not transfer.ok and transfer.reason == reason
    assert cache.stats().used_blocks == 0
    assert cache.stats().corrupt_chunks == (answer in (cut_short, one_bit))
    with pytest.raises(Suspended):
        cache.append_token("a")
    again = cache.resume("a")
    assert again.wait(SOON)
    if answer in (cut_short, one_bit):  # what was wrong has been deleted
        assert again.reason == "lost"
        assert cache.free_for("a") and not cache.free_for("a")
        assert emptied(store.inner)
    else:
        assert again.ok
        np.testing.assert_array_equal(contents(cache, "a"), data)


def test_what_is_lost_is_computed_again(cache):
    store = MemoryStore(1 << 20, 1 << 16)
    ids = list(range(50, 67))
    cache.allocate_for("a", ids, max_tokens=30)
    fill(cache, "a", 1)
    suspended(cache, "a", store)
    cache.clear = store.delete(list(store._slots), timeout=SOON)
    lost = cache.resume("a")
    assert lost.wait(SOON) and lost.reason == "lost"
    transfer = cache.resume("a", recompute=True)
    assert transfer.done() and transfer.ok and transfer.tokens == 16  # the index has whole blocks of it still
    assert (cache.used_tokens("a"), cache.limit("a")) == (17, 30)
    data = fill(cache, "a", 2)
    np.testing.assert_array_equal(contents(cache, "a"), data)


def test_recomputing_what_is_only_counted_begins_at_the_beginning(cache):
    cache.allocate_for("a", 17)
    suspended(cache, "a")
    assert resumed(cache, "a", recompute=True).tokens == 0
    assert cache.used_tokens("a") == 17 and cache.append_tokens("a", 3)


def test_recompute_that_does_not_fit_changes_nothing(cache):
    cache.allocate_for("a", 17)
    data = fill(cache, "a", 1)
    suspended(cache, "a")
    cache.allocate_for("b", 60)
    assert cache.resume("a", recompute=True) is None
    cache.free_for("b")
    resumed(cache, "a")
    np.testing.assert_array_equal(contents(cache, "a"), data)


class Slow(Faulty):
    """A store whose jobs end when the test says."""

    def __init__(self):
        super().__init__(None, 0, None)
        self.gate = threading.Event()
        self.begun = threading.Event()

    def _do(self, call, keys, buffers, timeout):
        self.begun.set()
        assert self.gate.wait(SOON)
        return super()._do(call, keys, buffers, timeout)


@pytest.mark.parametrize("way", ["out", "back"])
def test_who_is_freed_on_the_way_is_gone_and_leaves_nothing(cache, way):
    store = Slow()
    cache.allocate_for("a", 30)
    fill(cache, "a", 1)
    if way == "back":
        store.gate.set()
        suspended(cache, "a", store)
        store.gate.clear()
        store.begun.clear()
    transfer = cache.suspend("a", store) if way == "out" else cache.resume("a")
    assert store.begun.wait(SOON)
    with pytest.raises(Suspended):
        cache.append_token("a")
    with pytest.raises(Suspended):
        cache.resume("a")
    assert cache.free_for("a") and not cache.free_for("a")
    assert cache.stats().used_blocks == 0 and "a" not in cache
    assert cache.allocate_for("a", 5) is not None  # the name is free, for another one
    store.gate.set()
    assert transfer.wait(SOON) and not transfer.ok and transfer.reason == "freed"
    assert emptied(store.inner)
    assert cache.used_tokens("a") == 5 and cache.append_token("a")


def test_who_is_freed_while_suspended_leaves_nothing_in_the_store(cache):
    store = MemoryStore(1 << 20, 1 << 16)
    cache.allocate_for("a", 30)
    suspended(cache, "a", store)
    assert len(store) == 4
    assert cache.free_for("a")
    assert emptied(store)
    with pytest.raises(UnknownSequence):
        cache.resume("a")


def test_a_sequence_keeps_its_blocks_until_it_is_suspended(cache):
    store = Slow()
    cache.allocate_for("a", 30)
    transfer = cache.suspend("a", store)
    assert store.begun.wait(SOON)
    assert cache.stats().used_blocks == 8 and not transfer.ok
    store.gate.set()
    assert transfer.wait(SOON)
    assert cache.stats().used_blocks == 0


def test_blocks_move_about_while_they_are_on_their_way():
    with KVCache(LAYERS, HEADS, WIDTH, 16 * BLOCK, BLOCK) as cache:
        store = Slow()
        cache.allocate_for("first", 16)
        cache.allocate_for("a", 30)
        data = fill(cache, "a", 1)
        transfer = cache.suspend("a", store)
        assert store.begun.wait(SOON)
        cache.free_for("first")
        assert cache.allocate_for("large", 32) is not None and cache.stats().moves > 0
        store.gate.set()
        assert transfer.wait(SOON) and transfer.ok
        resumed(cache, "a")
        np.testing.assert_array_equal(contents(cache, "a"), data)
        cache.check()


def test_closing_the_cache_ends_what_is_under_way(cache):
    store = Slow()
    cache.allocate_for("a", 30)
    transfer = cache.suspend("a", store)
    assert store.begun.wait(SOON)
    threading.Timer(0.05, store.gate.set).start()
    cache.close()
    assert transfer.wait(SOON) and not transfer.ok
    with pytest.raises(CacheClosed):
        cache.resume("a")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(suspension, "JOB_SECONDS", 0.05)


class Never:
    """A job that is not done before it is told to be."""

    def __init__(self):
        self.is_done = False
        self.cancelled = False

    def done(self):
        return self.is_done

    def wait(self, timeout):
        return self.is_done

    def outcomes(self):
        return [Outcome.FAILED]

    def cancel(self):
        self.cancelled = True


def test_staging_that_a_store_does_not_give_back_is_full_now(cache, impatient):
    jobs = []

    def never(store, keys, buffers):
        jobs.append(Never())
        return jobs[-1]

    cache.allocate_for("a", 8)
    data = fill(cache, "a", 1)
    for _ in range(suspension.NUM_STAGED):
        transfer = cache.suspend("a", Faulty("put", 0, never))
        assert transfer.wait(SOON) and transfer.reason == "failed"
    assert all(job.cancelled for job in jobs)
    transfer = cache.suspend("a")
    assert transfer.wait(SOON) and transfer.reason == "full"
    np.testing.assert_array_equal(contents(cache, "a"), data)
    jobs[0].is_done = True
    suspended(cache, "a")
    resumed(cache, "a")


def test_the_default_store_is_full_rather_than_forgetful(cache):
    data, ends = {}, {}
    for name in range(20):  # of 16 tokens, 40 KiB in two chunks; there is room for 384 KiB
        if cache.allocate_for(name, 16) is None:
            break
        data[name] = fill(cache, name, name)
        transfer = cache.suspend(name)
        assert transfer.wait(SOON)
        ends[name] = transfer.reason
    assert list(ends.values()) == [None] * 9 + ["full"] * 4
    for name, reason in ends.items():
        if reason == "full":
            np.testing.assert_array_equal(contents(cache, name), data[name])
            assert cache.free_for(name)
    for name in range(9):
        resumed(cache, name)
        np.testing.assert_array_equal(contents(cache, name), data[name])
        assert cache.free_for(name)


def test_a_cache_with_a_carrier_is_let_go():
    cache = KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK)
    cache.allocate_for("a", 3)
    suspended(cache, "a")
    gone = weakref.ref(cache)
    del cache
    for _ in range(100):
        gc.collect()
        if gone() is None:
            break
        time.sleep(0.01)
    assert gone() is None


def test_a_carrier_whose_cache_is_let_go_ends_its_thread():
    cache = KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK)
    cache.allocate_for("a", 3)
    suspended(cache, "a")
    thread = cache._carrier._thread
    del cache
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_clock_that_raises_keeps_nobody_on_the_way():
    clock = Clock()
    with KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, clock=clock) as cache:
        cache.allocate_for("a", 9)
        data = fill(cache, "a", 1)
        clock.stopped = True
        suspended(cache, "a")
        resumed(cache, "a")
        np.testing.assert_array_equal(contents(cache, "a"), data)


def test_a_free_that_cannot_read_the_clock_leaves_a_suspended_sequence_as_it_was():
    clock = Clock()
    with KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, clock=clock) as cache:
        cache.allocate_for("a", 9)
        data = fill(cache, "a", 1)
        suspended(cache, "a")
        clock.stopped = True
        with pytest.raises(RuntimeError, match="no time"):
            cache.free_for("a")
        clock.stopped = False
        cache.check()
        assert "a" in cache and cache.used_tokens("a") == 9
        resumed(cache, "a")
        np.testing.assert_array_equal(contents(cache, "a"), data)
        assert cache.free_for("a") and cache.stats().used_blocks == 0


class Meddling:
    """An id that lets something happen whenever it is hashed."""

    def __init__(self, happens=None):
        self.happens = happens

    def __hash__(self):
        happens, self.happens = self.happens, None
        if happens is not None:
            happens()
        return 1


@pytest.mark.parametrize("end", ["resume", "free"])
def test_a_check_is_not_misled_by_who_comes_back_or_ends_meanwhile(cache, end):
    name = Meddling()
    cache.allocate_for(name, 9)
    suspended(cache, name)
    ends = {"resume": lambda: resumed(cache, name), "free": lambda: cache.free_for(name)}
    name.happens = ends[end]
    cache.check()
    assert name.happens is None and cache.stats().suspended_sequences == 0


def test_who_looks_sees_the_same_of_a_sequence_that_comes_and_goes(cache):
    cache.allocate_for("a", 9, max_tokens=20)
    errors, ended = [], threading.Event()

    def look():
        try:
            while not ended.is_set():
                assert (cache.used_tokens("a"), cache.limit("a")) == (9, 20)
                assert cache.capacity("a") in (0, 12) and len(cache.block_table("a")) in (0, 3)
                assert cache.is_contiguous("a") in (True, False)
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        suspended(cache, "a")
        resumed(cache, "a")
    ended.set()
    for thread in threads:
        thread.join(SOON)
    assert errors == []


def test_threads_that_suspend_the_first_sequences_of_a_cache_at_once_get_them_back():
    for _ in range(20):
        with KVCache(LAYERS, HEADS, WIDTH, 64, BLOCK, staging_bytes=1 << 20) as cache:
            errors, starting = [], threading.Barrier(4)

            def travel(name, cache=cache, errors=errors, starting=starting):
                try:
                    data = fill(cache, name, 1 + name)
                    starting.wait(SOON)
                    transfer = cache.suspend(name)
                    assert transfer.wait(SOON) and (transfer.ok or transfer.reason == "full"), transfer
                    if transfer.ok:
                        resumed(cache, name)
                    np.testing.assert_array_equal(contents(cache, name), data)
                except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
                    errors.append(error)

            for name in range(4):
                cache.allocate_for(name, 9)
            threads = [threading.Thread(target=travel, args=(name,)) for name in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(SOON)
            assert errors == []
            cache.check()


def test_an_arena_that_cannot_be_read_leaves_the_sequence_and_staging_as_they_were(cache, monkeypatch):
    cache.allocate_for("a", 30)
    data = fill(cache, "a", 1)
    calls = []

    def pack(self, *arguments):
        calls.append(arguments)
        if len(calls) % 3 == 0:
            raise RuntimeError("a device gone")
        return TravelCore._pack_chunk(self, *arguments)

    monkeypatch.setattr(KVCache, "_pack_chunk", pack, raising=False)
    for _ in range(suspension.NUM_STAGED + 1):
        transfer = cache.suspend("a")
        assert transfer.wait(SOON) and transfer.reason == "failed"
    monkeypatch.undo()
    np.testing.assert_array_equal(contents(cache, "a"), data)
    suspended(cache, "a")
    resumed(cache, "a")


def test_suspended_is_an_error_of_the_package():
    assert issubclass(Suspended, KVCacheError)


def test_whatever_is_freed_while_it_sets_out_gives_all_back(cache):
    """Two threads suspend what a third one frees: without a GIL they meet at every point."""
    stop, current = time.monotonic() + SECONDS, [None]

    def own():
        for name in itertools.count():
            if time.monotonic() > stop:
                return
            if cache.allocate_for(name, 2 * BLOCK):
                current[0] = name
                assert cache.free_for(name)

    def suspend():
        while time.monotonic() < stop:
            with contextlib.suppress(UnknownSequence, Suspended):
                cache.suspend(current[0])

    threads = [threading.Thread(target=work) for work in (own, suspend, suspend)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    deadline = time.monotonic() + SOON
    while cache.stats().used_blocks and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (cache.stats().num_sequences, cache.stats().used_blocks, len(cache)) == (0, 0, 0)
