"""Swapping: a victim's K/V leave for a store and come back byte for byte, and its owner knows where they are."""

import asyncio
import contextlib
import threading
import time

import numpy as np
import pytest
from crowd import Crowd
from faulty import Faulty

from kvcache import KVCache, UnknownSequence
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, Swap, TenantLimit, Wait
from kvcache.errors import CacheHeld, Suspended
from kvcache.store import Outcome
from kvcache.store_files import DirectoryStore
from kvcache.store_memory import MemoryStore

BLOCKS, SIZE, HEADS, WIDTH = 16, 4, 2, 8
SOON = 30.0


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("kvcache.chunks.CHUNK_BYTES", 2 * SIZE * 2 * HEADS * WIDTH * 4)  # two blocks


@pytest.fixture(params=["contiguous", "paged"])
def placement(request):
    return request.param


@pytest.fixture
def cache(placement):
    with KVCache(1, HEADS, WIDTH, BLOCKS * SIZE, SIZE, placement=placement) as cache:
        yield cache
        if not cache.closed:
            cache.check()


def fill(cache, request_id, seed):
    """Writes K and V that no other seed gives; returns them."""
    shape = (2, HEADS, cache.used_tokens(request_id), WIDTH)
    data = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    cache.write(request_id, 0, *data)
    return data


def contents(cache, request_id):
    return np.stack([np.array(view) for view in cache.get_kv_views(request_id, 0)])


def until(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


class Owner:
    """What the owners of sequences have been told, and what was so at that time."""

    def __init__(self, cache):
        self.cache, self.told, self.objects = cache, [], False
        self.free_blocks = {}

    def __call__(self, request_id, event):
        if self.objects:
            raise LookupError(request_id)
        self.told.append((request_id, event))
        self.free_blocks[request_id, event] = self.cache.free_blocks

    def wait_for(self, *event):
        until(lambda: event in self.told)


def raises(store, keys, buffers):
    raise OSError(28, "No space left on device")


def damaged(store, keys, buffers):
    job = store.inner.get(keys, buffers, timeout=SOON)
    assert job.wait(SOON)
    buffers[0][-1] ^= 1
    return job


# ---- there and back


@pytest.mark.parametrize("kind", ["host memory", "a memory store", "a directory"])
def test_a_victim_comes_back_byte_for_byte_into_another_place(cache, kind, tmp_path):
    stores = {
        "a memory store": MemoryStore(1 << 20, 1 << 16),
        "a directory": DirectoryStore(tmp_path, 1 << 20),
    }
    queue = AllocationQueue(cache, Swap(stores.get(kind)))
    lease = queue.allocate("a", 30, max_tokens=40)
    data, limit = fill(cache, "a", 1), cache.limit("a")
    with queue.allocate("b", 64):
        assert cache.is_suspended("a")
        fill(cache, "b", 2)
    with queue.allocate("c", 9):  # where "a" was
        assert queue.resume("a").ok
        assert not cache.is_suspended("a") and cache.limit("a") == limit
        np.testing.assert_array_equal(contents(cache, "a"), data)
    assert lease.free()
    assert len(cache) == cache.stats().used_blocks == 0


def test_victims_go_one_by_one_until_it_fits(cache):
    queue = AllocationQueue(cache, Swap())
    kept = {name: (queue.allocate(name, 16), fill(cache, name, seed)) for seed, name in enumerate("abcd")}
    with queue.allocate("e", 30):
        assert [name for name in "abcd" if cache.is_suspended(name)] == ["a", "b"]
    for name in "ab":
        assert queue.resume(name).ok
    for name, (_, data) in kept.items():
        np.testing.assert_array_equal(contents(cache, name), data)


def test_growth_swaps_others_out(placement):
    with KVCache(1, HEADS, WIDTH, BLOCKS * SIZE, SIZE, placement=placement, overcommit=2.0) as cache:
        queue = AllocationQueue(cache, Swap())
        for seed, name in enumerate("abcd"):
            queue.allocate(name, 16, max_tokens=32)
            fill(cache, name, seed)
        data = contents(cache, "a")
        assert queue.append("a", [5]) is True
        assert [name for name in "abcd" if cache.is_suspended(name)] == ["b"]
        np.testing.assert_array_equal(contents(cache, "a")[:, :, :16], data)
        cache.check()


def test_prefixes_of_a_victim_are_found_meanwhile(cache):
    """What a victim leaves in the arena is cached, as if it had been freed."""
    queue = AllocationQueue(cache, Swap())
    prompt = list(range(20))
    queue.allocate("a", prompt, salt="s")
    fill(cache, "a", 1)
    assert queue.allocate("b", 48)
    assert cache.is_suspended("a")
    assert cache.probe(prompt, salt="s") == 16
    cache.free_for("b")
    assert queue.resume("a").ok


# ---- what owners are told


def test_an_owner_is_told_before_and_after(cache):
    told = Owner(cache)
    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=told)
    fill(cache, "a", 1)
    assert queue.allocate("b", 30)
    told.wait_for("a", "suspended")
    assert told.told == [("a", "leaving"), ("a", "suspended")]
    assert told.free_blocks["a", "leaving"] == 6  # its memory was still its own


def test_an_owner_without_a_callback_is_told_by_the_strategy(cache):
    told = Owner(cache)
    queue = AllocationQueue(cache, Swap(notify=told))
    queue.allocate("a", 40)
    assert queue.allocate("b", 30)
    told.wait_for("a", "suspended")
    assert told.told[0] == ("a", "leaving")


def test_an_owner_that_objects_keeps_its_sequence(cache):
    told = Owner(cache)
    told.objects = True
    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=told)
    data = fill(cache, "a", 1)
    with pytest.raises(LookupError):
        queue.allocate("b", 30)
    np.testing.assert_array_equal(contents(cache, "a"), data)
    assert list(cache) == ["a"] and len(queue) == 0
    told.objects = False
    assert queue.allocate("b", 30)  # it may be chosen again


def test_a_callback_that_fails_afterwards_is_logged(cache, caplog):
    def notify(request_id, event):
        if event == "suspended":
            raise LookupError(request_id)

    queue = AllocationQueue(cache, Swap(notify=notify))
    queue.allocate("a", 40)
    assert queue.allocate("b", 30)
    until(lambda: "callback" in caplog.text)
    cache.free_for("b")
    assert queue.resume("a").ok  # the thread that carries has survived it


# ---- faults


PUT_FAULTS = {"raises": raises, "fails": Outcome.FAILED, "is full": Outcome.FULL}
GET_FAULTS = {"raises": raises, "fails": Outcome.FAILED, "has lost it": Outcome.MISS}


@pytest.mark.parametrize("fault", PUT_FAULTS)
@pytest.mark.parametrize("nth", range(4))
def test_a_victim_is_intact_when_the_nth_write_fails(cache, nth, fault):
    told = Owner(cache)
    queue = AllocationQueue(cache, Swap(Faulty("put", nth, PUT_FAULTS[fault])))
    lease = queue.allocate("a", 30, on_swap=told)  # four chunks
    data = fill(cache, "a", 1)
    assert queue.allocate("b", 60).reason == "arena_full"
    told.wait_for("a", "intact")
    assert not cache.is_suspended("a")
    np.testing.assert_array_equal(contents(cache, "a"), data)
    assert cache.append_tokens("a", 2)
    figures = queue.stats().tenants[""]
    assert (figures.swapped, figures.swaps_failed, figures.evicted) == (0, 1, 0)
    assert queue.allocate("b", 60)  # the store is well again
    told.wait_for("a", "suspended")
    assert lease.free() and len(cache) == 1


@pytest.mark.parametrize("fault", GET_FAULTS)
@pytest.mark.parametrize("nth", range(4))
def test_a_victim_stays_suspended_when_the_nth_read_fails(cache, nth, fault):
    queue = AllocationQueue(cache, Swap(Faulty("get", nth, GET_FAULTS[fault])))
    queue.allocate("a", 30)
    data = fill(cache, "a", 1)
    with queue.allocate("b", 60):
        pass
    back = queue.resume("a")
    assert back.done() and not back.ok
    assert back.reason == ("lost" if fault == "has lost it" else "failed")
    assert cache.is_suspended("a") and cache.stats().used_blocks == 0
    assert queue.resume("a").ok  # what was put is there: only the read has failed
    np.testing.assert_array_equal(contents(cache, "a"), data)


@pytest.mark.parametrize("nth", range(4))
def test_a_damaged_chunk_never_reaches_the_arena(cache, nth):
    queue = AllocationQueue(cache, Swap(Faulty("get", nth, damaged)))
    queue.allocate("a", 30)
    fill(cache, "a", 1)
    with queue.allocate("b", 60):
        pass
    back = queue.resume("a")
    assert (back.ok, back.reason, cache.stats().corrupt_chunks) == (False, "lost", 1)
    with pytest.raises(Suspended):
        cache.get_k_view("a", 0)
    assert queue.resume("a").reason == "lost"  # it has been deleted
    back = queue.resume("a", recompute=True)
    assert back.ok and not cache.is_suspended("a") and cache.used_tokens("a") == 30
    data = fill(cache, "a", 3)
    np.testing.assert_array_equal(contents(cache, "a"), data)


def test_what_follows_in_the_chain_is_tried_when_the_store_is_full(cache):
    ended = []
    queue = AllocationQueue(
        cache, Swap(MemoryStore(1 << 16, 1 << 16, evict=False)) | Evict(notify=ended.append)
    )
    queue.allocate("a", 30)
    fill(cache, "a", 1)
    assert queue.allocate("b", 60)
    assert (ended, list(cache)) == (["a"], ["b"])
    figures = queue.stats().tenants[""]
    assert (figures.swapped, figures.swaps_failed, figures.evicted) == (0, 1, 1)


def test_a_victim_that_is_freed_on_its_way_out_makes_room(cache):
    told, store = Owner(cache), Faulty()
    queue = AllocationQueue(cache, Swap(store))
    lease = queue.allocate("a", 30, on_swap=told)
    fill(cache, "a", 1)
    store.gate.clear()
    answers = []
    asker = threading.Thread(target=lambda: answers.append(queue.allocate("b", 60)))
    asker.start()
    until(lambda: cache.is_suspended("a") if "a" in cache else False)
    assert lease.free()
    asker.join(SOON)
    assert answers[0] and list(cache) == ["b"]
    store.gate.set()
    until(lambda: not queue._live.get("a"))
    assert told.told == [("a", "leaving")]


# ---- who is taken


def test_the_least_recently_appended_goes_and_who_came_back_goes_last(cache):
    queue = AllocationQueue(cache, Swap())
    for name in "abcd":
        queue.allocate(name, 16)
    assert queue.append("a", 0) is True
    assert queue.allocate("e", 8) and cache.is_suspended("b")
    cache.free_for("e")
    assert queue.resume("b").ok
    assert queue.allocate("f", 30)
    assert [name for name in "abcd" if cache.is_suspended(name)] == ["c", "d"]


def test_a_request_of_low_priority_swaps_nobody_out(cache):
    queue = AllocationQueue(cache, Swap(victim="priority"))
    queue.allocate("a", 30, priority=1)
    queue.allocate("b", 30, priority=3)
    assert queue.allocate("c", 20, priority=1).reason == "arena_full"
    assert queue.allocate("c", 20, priority=2)
    assert cache.is_suspended("a") and not cache.is_suspended("b")


def test_a_callable_chooses_among_those_that_have_memory(cache):
    offered = []

    def choose(ids):
        offered.append(list(ids))
        return ids[-1]

    queue = AllocationQueue(cache, Swap(victim=choose))
    for name in "abcd":
        queue.allocate(name, 16)
    cache.suspend("c").wait(SOON)
    assert queue.allocate("e", 30)
    assert offered == [["a", "b", "d"]]


def test_what_is_suspended_is_not_ended_in_vain(cache):
    queue = AllocationQueue(cache, Evict())
    queue.allocate("a", 30)
    fill(cache, "a", 1)
    assert cache.suspend("a").wait(SOON)
    queue.allocate("b", 60)
    assert queue.allocate("c", 30)
    assert list(cache) == ["a", "c"]


def test_nobody_is_swapped_out_where_all_of_them_would_not_be_enough(cache):
    queue = AllocationQueue(cache, Swap())
    cache.allocate_for("not of the queue", 30)
    queue.allocate("a", 30)
    assert queue.allocate("b", 60).reason == "arena_full"
    assert not cache.is_suspended("a")


@pytest.mark.parametrize("limit", [TenantLimit(sequences=1), TenantLimit(tokens=20)])
def test_nobody_is_swapped_out_where_it_is_the_tenants_limit_that_is_in_the_way(cache, limit):
    queue = AllocationQueue(cache, Swap(), tenants={"t": limit})
    queue.allocate("a", 16, tenant="t")
    queue.allocate("other", 16)
    assert queue.allocate("b", 16, tenant="t").reason == "tenant_limit"
    assert cache.stats().suspended_sequences == 0
    assert queue.allocate("b", 16, tenant="t", strategy=Swap() | Evict())
    assert list(cache) == ["other", "b"]


def test_nobody_is_swapped_out_inside_a_hold_of_ones_own(cache):
    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 64)
    with cache.hold(), pytest.raises(CacheHeld):
        queue.allocate("b", 8)
    assert not cache.is_suspended("a") and len(queue) == 0


# ---- the way back


def swapped_out(cache, queue, *names):
    for seed, name in enumerate(names):
        assert queue.allocate(name, 16)
        fill(cache, name, seed)
        assert cache.suspend(name).wait(SOON)


def test_one_that_is_here_has_arrived(cache):
    queue = AllocationQueue(cache)
    queue.allocate("a", 16)
    back = queue.resume("a")
    assert back.ok and back.tokens == 16
    with pytest.raises(UnknownSequence):
        queue.resume("b")


def test_one_that_does_not_fit_is_refused_with_the_numbers(cache):
    queue = AllocationQueue(cache, Reject())
    swapped_out(cache, queue, "a")
    queue.allocate("b", 56)
    refused = queue.resume("a")
    assert not refused
    assert (refused.reason, refused.request_id, refused.tokens, refused.max_tokens) == (
        "arena_full",
        "a",
        16,
        16,
    )
    assert (refused.blocks_needed, refused.blocks_free, refused.blocks_missing) == (4, 2, 2)
    assert cache.is_suspended("a")
    assert queue.stats().tenants[""].resume_refused["arena_full"] == 1


def test_reduce_has_nothing_to_say_to_one_that_returns(cache):
    queue = AllocationQueue(cache, Reduce(4))
    swapped_out(cache, queue, "a")
    queue.allocate("b", 56)
    assert queue.resume("a").reason == "arena_full"


def test_the_watermark_is_not_kept_from_one_that_returns(cache):
    queue = AllocationQueue(cache, Reject(), keep_free=24)
    queue.allocate("a", 32)
    assert cache.suspend("a").wait(SOON)
    cache.allocate_for("b", 32)
    assert queue.allocate("c", 16).reason == "watermark"
    assert queue.resume("a").ok
    assert cache.suspend("a").wait(SOON)
    cache.allocate_for("d", 4)
    refused = queue.resume("a", strategy=Swap())  # nobody else of the queue's is there
    assert (refused.reason, refused.blocks_needed, refused.blocks_free) == ("arena_full", 8, 7)
    queue.allocate("e", 4)
    assert cache.free_for("d")
    assert queue.resume("a", strategy=Swap()).ok
    assert cache.is_suspended("e")


def test_one_that_returns_waits_for_its_way_out_to_end(cache):
    store = Faulty()
    queue = AllocationQueue(cache)
    queue.allocate("a", 16)
    data = fill(cache, "a", 1)
    store.gate.clear()
    out = cache.suspend("a", store)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(queue.resume("a")))
    asker.start()
    time.sleep(0.01)
    assert not answers and not out.done()
    store.gate.set()
    asker.join(SOON)
    assert out.ok and answers[0].ok
    np.testing.assert_array_equal(contents(cache, "a"), data)


def test_one_that_returns_may_swap_others_out(cache):
    queue = AllocationQueue(cache, Swap())
    swapped_out(cache, queue, "a")
    queue.allocate("b", 56)
    assert queue.resume("a").ok
    assert cache.is_suspended("b")


def test_who_returns_is_its_tenants_all_the_time(cache):
    queue = AllocationQueue(cache, Reject(), tenants={"t": TenantLimit(sequences=1)})
    lease = queue.allocate("a", 16, tenant="t")
    fill(cache, "a", 1)
    assert cache.suspend("a").wait(SOON)
    assert queue.allocate("b", 16, tenant="t").reason == "tenant_limit"
    assert queue.stats().tenants["t"].sequences == 1
    assert queue.resume("a").ok
    assert queue.stats().tenants["t"].resumed == 1
    assert lease.free()
    assert queue.allocate("b", 16, tenant="t")


def test_a_lease_of_a_suspended_sequence_frees_it(cache):
    queue = AllocationQueue(cache, Swap())
    with queue.allocate("a", 40):
        fill(cache, "a", 1)
        assert queue.allocate("b", 30)
        assert cache.is_suspended("a")
    assert list(cache) == ["b"]
    queue.poke()
    assert list(queue._live) == ["b"]


@pytest.fixture
def crowd(cache):
    here = Crowd(cache, Wait())
    yield here
    here.close()


class Back:
    """Clients of a `Crowd` that return: transfers end in a thread of their own, so that answers take a moment."""

    def __init__(self, crowd):
        self.crowd = crowd

    def ask(self, name, **options):
        return self.crowd.start(("back", name), self.crowd.queue.resume_async(name, **options))

    def answer(self, name):
        until(lambda: self.crowd.answer(("back", name)) is not None)
        return self.crowd.answer(("back", name))


def test_who_returns_goes_before_every_newcomer(crowd):
    back = Back(crowd)
    swapped_out(crowd.cache, crowd.queue, "a")
    crowd.ask("full", 64)
    assert crowd.ask("early", 64, priority=9) is None
    assert back.ask("a") is None
    crowd.free("full")
    assert back.answer("a").ok
    assert crowd.answer("early") is None


def test_those_who_return_do_so_in_order_and_beside_each_other(crowd):
    back = Back(crowd)
    queue, cache = crowd.queue, crowd.cache
    swapped_out(cache, queue, "a", "b")
    crowd.ask("full", 64)
    back.ask("b"), back.ask("a")
    assert [each.request_id for each in queue._waiters] == ["b", "a"]
    crowd.free("full")
    assert back.answer("b").ok and back.answer("a").ok
    assert crowd.ask("c", 32)


def test_room_is_kept_for_one_that_has_waited_too_long_to_return(crowd):
    back = Back(crowd)
    queue, cache = crowd.queue, crowd.cache
    queue.allocate("a", 40)
    assert cache.suspend("a").wait(SOON)
    crowd.ask("half", 32)
    assert back.ask("a") is None
    assert crowd.ask("small", 8)  # beside it
    crowd.pass_time(queue._waiters.patience + 1)
    assert crowd.ask("late", 8) is None
    crowd.free("half")
    assert back.answer("a").ok
    assert crowd.answer("late")


def test_one_that_returns_times_out(crowd):
    back = Back(crowd)
    swapped_out(crowd.cache, crowd.queue, "a")
    crowd.ask("full", 64)
    assert back.ask("a", strategy=Wait(5.0)) is None
    crowd.pass_time(6.0)
    assert back.answer("a").reason == "timeout"
    assert crowd.cache.is_suspended("a")


def test_one_that_returns_can_be_told_to_stop_waiting(crowd):
    back = Back(crowd)
    swapped_out(crowd.cache, crowd.queue, "a")
    crowd.ask("full", 64)
    back.ask("a")
    assert "a" in crowd.queue
    assert crowd.queue.cancel("a")
    assert back.answer("a").reason == "cancelled"


def test_one_that_is_freed_while_it_waits_to_return_is_told_at_once(crowd):
    back = Back(crowd)
    swapped_out(crowd.cache, crowd.queue, "a")
    crowd.ask("full", 64)
    back.ask("a")
    crowd.free("a")
    with pytest.raises(UnknownSequence):
        back.answer("a")
    assert len(crowd.queue) == 0


def test_only_one_may_bring_a_sequence_back(crowd):
    back = Back(crowd)
    swapped_out(crowd.cache, crowd.queue, "a")
    crowd.ask("full", 64)
    back.ask("a")
    with pytest.raises(Suspended):
        crowd.start("again", crowd.queue.resume_async("a"))


def test_a_return_waits_for_a_hold_without_holding_up_the_queue(cache):
    queue = AllocationQueue(cache, Wait(SOON))
    queue.allocate("a", 16), queue.allocate("b", 16)
    assert cache.suspend("a").wait(SOON)
    queue.allocate("c", 48)
    answers = []
    with cache.hold():
        cache.free_for("b")  # comes back when the hold has ended
        asker = threading.Thread(target=lambda: answers.append(queue.resume("a")))
        asker.start()
        time.sleep(0.01)
        assert not answers and queue.stats().waiting == 1
    asker.join(SOON)
    assert answers[0].ok


# ---- tasks


def test_the_loop_goes_on_while_a_victim_leaves(cache):
    store = Faulty()
    queue = AllocationQueue(cache, Swap(store))

    async def main():
        async with queue.allocate_async("a", 40):
            fill(cache, "a", 1)
            store.gate.clear()
            other = asyncio.create_task(serve("b"))
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert cache.is_suspended("a") and not other.done()
            store.gate.set()
            assert await other

    async def serve(name):
        async with queue.allocate_async(name, 40) as lease:
            return bool(lease)

    asyncio.run(main())
    assert len(cache) == 0


@pytest.mark.parametrize("steps", range(12))
def test_a_task_cancelled_while_a_victim_leaves_holds_nothing(cache, steps):
    told, store = Owner(cache), Faulty()
    queue = AllocationQueue(cache, Swap(store))
    queue.allocate("a", 40, on_swap=told)
    data = fill(cache, "a", 1)
    if steps % 2:
        store.gate.clear()

    async def serve():
        async with queue.allocate_async("b", 40):
            await asyncio.sleep(SOON)

    async def main():
        task = asyncio.create_task(serve())
        for _ in range(steps):
            await asyncio.sleep(0)
        if steps > 8:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.gate.set()

    asyncio.run(main())
    if told.told:  # the victim goes on, whoever wanted its memory
        told.wait_for("a", "suspended")
    assert (len(queue), list(cache)) == (0, ["a"])
    assert queue.resume("a").ok
    np.testing.assert_array_equal(contents(cache, "a"), data)


@pytest.mark.parametrize("steps", range(8))
def test_a_task_cancelled_while_it_brings_back_leaves_the_sequence_whole(cache, steps):
    store = Faulty()
    queue = AllocationQueue(cache, Wait())
    queue.allocate("a", 40)
    data = fill(cache, "a", 1)
    assert cache.suspend("a", store).wait(SOON)
    cache.allocate_for("full", 40)

    async def main():
        task = asyncio.create_task(queue.resume_async("a"))
        for step in range(steps):
            if step == 3:
                cache.free_for("full")
            await asyncio.sleep(0.002 if step > 5 else 0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert len(queue) == 0 and not queue._ids
    cache.free_for("full")
    assert queue.resume("a").ok
    np.testing.assert_array_equal(contents(cache, "a"), data)


# ---- what cannot work


def test_a_cache_without_storage_swaps_nothing_out():
    with KVCache(1, 1, 4, 64, 4, backend="none") as cache:
        with pytest.raises(ValueError, match="Swap needs"):
            AllocationQueue(cache, Wait(1.0) | Swap())
        queue = AllocationQueue(cache)
        with pytest.raises(ValueError, match="Swap needs"):
            queue.allocate("a", 4, strategy=Swap())
        assert len(cache) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [({"store": "disk"}, TypeError), ({"victim": "oldest"}, ValueError), ({"notify": 3}, TypeError)],
)
def test_a_swap_of_nonsense_is_refused(options, error):
    with pytest.raises(error):
        Swap(**options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mlx_arrays_leave_and_come_back(dtype, tmp_path):
    mx = pytest.importorskip("mlx.core")
    with KVCache(2, HEADS, WIDTH, BLOCKS * SIZE, SIZE, dtype=dtype, backend="mlx") as cache:
        queue = AllocationQueue(cache, Swap(DirectoryStore(tmp_path, 1 << 20, evict=False)))
        queue.allocate("a", 30)
        rows = mx.random.normal((2, HEADS, 30, WIDTH)).astype(getattr(mx, dtype))
        for layer in range(2):
            cache.write("a", layer, rows[0], rows[1])
        with queue.allocate("b", 60):
            assert cache.is_suspended("a")
            other = mx.ones((HEADS, 60, WIDTH), getattr(mx, dtype))
            cache.write("b", 0, other, other)
            mx.eval(cache.get_k_view("b", 0))
        assert queue.resume("a").ok
        for layer in range(2):
            for view, data in zip(cache.get_kv_views("a", layer), rows, strict=True):
                assert mx.array_equal(view, data).item()
        cache.check()


def test_who_comes_back_past_the_queue_is_its_tenants_too(cache):
    queue = AllocationQueue(cache, Reject(), tenants={"t": TenantLimit(tokens=16)})
    queue.allocate("a", 16, tenant="t")
    assert cache.suspend("a").wait(SOON) and cache.resume("a").wait(SOON)
    until(lambda: not cache.is_suspended("a"))
    assert queue.allocate("b", 4, tenant="t").reason == "tenant_limit"
    assert queue.stats().tenants["t"].blocks == 4
    assert queue.allocate("c", 64, strategy=Evict())  # it may be ended, as any of the queue's
    assert list(cache) == ["c"]


# ---- what owners and others may do meanwhile


def test_an_owner_whose_callback_looks_for_what_is_gone_is_asked_once(cache):
    asked = []

    def look(request_id, event):
        asked.append(event)
        cache.used_tokens("gone")

    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=look)
    with pytest.raises(UnknownSequence):
        queue.allocate("b", 40)
    assert asked == ["leaving"] and not cache.is_suspended("a")


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, asyncio.CancelledError])
def test_whatever_a_callback_raises_afterwards_the_next_one_is_carried(cache, error):
    def leave(request_id, event):
        if event == "suspended":
            raise error

    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=leave)
    data = fill(cache, "a", 1)
    with queue.allocate("b", 40):
        pass
    assert queue.resume("a").ok
    np.testing.assert_array_equal(contents(cache, "a"), data)


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_nobody_leaves_for_one_that_is_given_up_meanwhile(cache, end):
    told = []

    def give_up(request_id, event):
        told.append(event)
        if event == "leaving":
            queue.cancel("b") if end == "cancel" else queue.close()

    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=give_up)
    assert queue.allocate("b", 40).reason == "cancelled"
    assert told == ["leaving", "intact"] and not cache.is_suspended("a")


def test_an_owner_that_suspends_itself_when_it_is_asked_makes_room(cache):
    store = Faulty()
    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 40, on_swap=lambda request_id, event: cache.suspend(request_id, store))
    data = fill(cache, "a", 1)
    with queue.allocate("b", 40) as lease:
        assert lease
    assert queue.resume("a").ok
    np.testing.assert_array_equal(contents(cache, "a"), data)


def test_a_finalizer_in_the_middle_of_a_store_may_free_what_is_in_it(cache):
    store = MemoryStore(1 << 20)
    queue = AllocationQueue(cache, Swap(store))
    queue.allocate("a", 40)
    assert queue.allocate("b", 40)
    with store._lock:  # as when garbage is collected there
        assert cache.free_for("a")
    until(lambda: len(store) == 0)


def test_a_return_refused_to_somebody_else_meanwhile_is_not_lost(cache):
    queue = AllocationQueue(cache, Wait())
    swapped_out(cache, queue, "a")
    cache.allocate_for("full", 64)
    stop, answers = threading.Event(), []

    def ask_again_and_again():
        while not stop.is_set():
            with contextlib.suppress(Suspended):
                assert cache.resume("a") is None

    other = threading.Thread(target=ask_again_and_again)
    asker = threading.Thread(target=lambda: answers.append(queue.resume("a")))
    other.start(), asker.start()
    time.sleep(0.05)
    stop.set()
    other.join(SOON)
    assert cache.free_for("full")
    asker.join(SOON)
    assert answers and answers[0].ok


def test_one_that_was_here_all_the_time_has_not_returned(cache):
    queue = AllocationQueue(cache)
    queue.allocate("a", 16)
    assert queue.resume("a").ok
    assert queue.stats().tenants[""].resumed == 0


def test_an_empty_one_that_does_not_fit_is_told_the_block_that_is_missing(cache):
    queue = AllocationQueue(cache)
    queue.allocate("a", 4, max_tokens=8)
    assert cache.truncate("a", 0) and cache.suspend("a").wait(SOON)
    cache.allocate_for("full", 64)
    refused = queue.resume("a")
    assert (refused.reason, refused.tokens, refused.blocks_missing) == ("arena_full", 0, 2)
