"""The queue under tasks that are cancelled at every point, and under threads that contend: nothing is left behind."""

import asyncio
import faulthandler
import gc
import os
import random
import sys
import threading
import time

import pytest

from kvcache import KVCacheError, SequenceExists
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, Wait

SECONDS = float(os.environ.get("KVCACHE_TEST_SECONDS", "10")) / 4
SHAPE = (1, 1, 4, 64, 4)


@pytest.fixture
def watchdog(capfd):
    """Ends the process, with the stack of every thread, when a test does not; threads take turns fast."""
    with capfd.disabled(), os.fdopen(os.dup(2), "w") as stderr:
        faulthandler.dump_traceback_later(4 * SECONDS + 60, exit=True, file=stderr)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(interval)
        faulthandler.cancel_dump_traceback_later()


def assert_nothing_left(queue, cache):
    assert (len(queue), len(cache)) == (0, 0)
    assert not queue._live and not queue._ids and not queue._notes and not list(queue._waiters)
    assert all(each.blocks == each.sequences == each.waiting == 0 for each in queue._accounts.values())
    stats = cache.stats()
    assert (stats.used_blocks, stats.claimed_blocks) == (0, 0)
    cache.check()


# ---- tasks


def test_async_with_frees_at_the_end(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())
    order = []

    async def serve(name):
        async with queue.allocate_async(name, 40) as lease:
            order.append(lease.request_id)
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*[serve(name) for name in range(20)])

    asyncio.run(main())
    assert order == list(range(20))
    assert_nothing_left(queue, cache)


def test_a_wait_in_a_task_times_out_by_the_loops_clock(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait(0.01))

    async def main():
        async with queue.allocate_async("a", 64) as lease, queue.allocate_async("b", 8) as refused:
            assert lease and refused.reason == "timeout"
            assert refused.waited >= 0.01

    asyncio.run(main())
    assert_nothing_left(queue, cache)


def test_a_pending_admission_may_be_a_task_and_may_be_dropped(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())

    async def main():
        lease = await asyncio.create_task(queue.allocate_async("a", 8))
        queue.allocate_async("b", 8).close()
        lease.free()

    asyncio.run(main())
    assert_nothing_left(queue, cache)


def steps_of_a_story(cache, strategy, cancel_at):
    """Three clients in a loop that is stepped by hand; "b" is cancelled after so many steps. False: it was done."""
    queue, cancelled = AllocationQueue(cache, strategy), False
    loop = asyncio.new_event_loop()

    async def serve(name, tokens):
        async with queue.allocate_async(name, tokens) as lease:
            for _ in range(3):
                await asyncio.sleep(0)
            return bool(lease)

    async def grow(name):
        async with queue.allocate_async(name, 4, max_tokens=32) as lease:
            for _ in range(3 if lease else 0):
                await queue.append_async(name, 4)
                await asyncio.sleep(0)
            return bool(lease)

    tasks = [loop.create_task(each) for each in (serve("a", 56), grow("b"), serve("c", 48))]
    for step in range(200):
        if step == cancel_at:
            cancelled = tasks[1].cancel()
        loop.call_soon(loop.stop)
        loop.run_forever()  # one turn
        if all(task.done() for task in tasks):
            break
    answers = loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
    assert answers[0] is True
    assert answers[2] is True or not isinstance(strategy, Wait)
    assert_nothing_left(queue, cache)
    queue.close()
    return cancelled


@pytest.mark.parametrize(
    "strategy",
    [Wait(), Reduce(8) | Wait(), Wait(60) | Evict(), Reject()],
    ids=["wait", "reduce", "evict", "reject"],
)
@pytest.mark.parametrize("overcommit", [1.0, 2.0])
def test_a_task_that_is_cancelled_at_any_step_leaves_nothing(make_cache, watchdog, strategy, overcommit):
    cache = make_cache(*SHAPE, overcommit=overcommit)
    steps = 0
    while steps_of_a_story(cache, strategy, steps):
        steps += 1
    assert steps >= (7 if strategy == Wait() else 1)


def test_a_task_cancelled_between_grant_and_resumption_gives_the_memory_back(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())

    async def main():
        first = await queue.allocate_async("a", 64)
        second = asyncio.create_task(queue.allocate_async("b", 64))
        third = asyncio.create_task(queue.allocate_async("c", 64))
        await asyncio.sleep(0)
        first.free()
        assert "b" in cache  # granted by the free; its task has not run
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert "b" not in cache
        (await third).free()

    asyncio.run(main())
    assert_nothing_left(queue, cache)


def test_a_loop_that_is_closed_gives_back_what_its_tasks_were_granted(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())
    first = queue.allocate("a", 64)
    loop = asyncio.new_event_loop()
    task = loop.create_task(queue.allocate_async("b", 64))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    first.free()
    assert list(cache) == []
    task._log_destroy_pending = False
    del task
    gc.collect()
    assert_nothing_left(queue, cache)


def test_a_task_is_woken_by_a_free_in_another_thread(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait(30))

    async def main():
        first = await queue.allocate_async("a", 64)
        thread = threading.Timer(0.02, first.free)
        thread.start()
        async with queue.allocate_async("b", 64) as lease:
            assert lease
        thread.join()

    asyncio.run(main())
    assert_nothing_left(queue, cache)


# ---- threads


def in_threads(works):
    errors = []

    def run(work):
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_a_thread_waits_until_another_one_frees(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait(30))
    first = queue.allocate("a", 64)
    threading.Timer(0.02, first.free).start()
    with queue.allocate("b", 64) as lease:
        assert lease
    assert_nothing_left(queue, cache)


def test_a_thread_times_out(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait(0.02))
    with queue.allocate("a", 64):
        assert queue.allocate("b", 8).reason == "timeout"
    assert_nothing_left(queue, cache)


def test_a_reject_waits_for_the_hold_of_another_thread_as_the_cache_does(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Reject())
    queue.allocate("a", 64)
    held, answers = threading.Event(), []

    def hold():
        with cache.hold():
            cache.free_for("a")
            held.set()
            while not len(queue):
                time.sleep(0.001)

    def ask():
        held.wait()
        answers.append(queue.allocate("b", 64))

    in_threads([hold, ask])
    assert answers[0]
    answers[0].free()
    assert_nothing_left(queue, cache)


def test_a_reject_does_not_wait_on_when_the_hold_has_ended_and_others_were_faster(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Reject())
    queue.allocate("a", 64)
    held, answers = threading.Event(), []

    def hold():
        with cache.hold():
            cache.free_for("a")
            held.set()
            while not len(queue):
                time.sleep(0.001)
            cache._unwatch(queue._watcher)
        assert cache.allocate_for("faster", 64)
        cache._watch(queue._watcher)
        queue.poke()

    def ask():
        held.wait()
        answers.append(queue.allocate("b", 64))

    in_threads([hold, ask])
    assert answers[0].reason == "arena_full"
    assert cache.free_for("faster")
    assert_nothing_left(queue, cache)


def test_what_was_evicted_under_a_hold_of_another_thread_is_there_when_it_ends(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Evict())
    for name in "ab":
        queue.allocate(name, 32)
    held, answers = threading.Event(), []

    def hold():
        with cache.hold():
            held.set()
            while not len(queue) or not queue._blocked:
                time.sleep(0.001)

    def ask():
        held.wait()
        answers.append(queue.allocate("c", 32))

    in_threads([hold, ask])
    assert answers[0]
    assert list(cache) == ["b", "c"]
    assert all(cache.free_for(name) for name in "bc")
    assert_nothing_left(queue, cache)


def test_no_wake_up_is_lost_between_two_threads_that_alternate(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())

    def work(number):
        for turn in range(1500):
            with queue.allocate((number, turn), 64) as lease:
                assert lease

    in_threads([lambda number=number: work(number) for number in range(3)])
    assert_nothing_left(queue, cache)


def storm(cache, queue, number, deadline):
    draw = random.Random(number)
    turn = 0
    while time.monotonic() < deadline:
        turn += 1
        name = (number, turn)
        strategy = draw.choice(
            [None, Reject(), Wait(draw.random() / 100), Reduce(8) | Wait(0.01), Wait(0.002) | Evict()]
        )
        with queue.allocate(
            name,
            draw.randint(1, 24),
            max_new_tokens=draw.randint(0, 24),
            tenant=number % 3,
            priority=draw.randint(0, 2),
            strategy=strategy,
        ) as lease:
            for _ in range(draw.randint(0, 8) if lease else 0):
                try:
                    queue.append(name, strategy=Wait(0.002))
                    if draw.random() < 0.2:
                        cache.truncate(name, draw.randint(0, 3))
                except (KVCacheError, ValueError):  # evicted
                    break
        if draw.random() < 0.05:
            queue.cancel((draw.randrange(8), turn))


def storm_of_tasks(queue, number, deadline):
    draw = random.Random(number)

    async def serve(name):
        async with queue.allocate_async(name, draw.randint(1, 40), strategy=Wait(0.01)) as lease:
            await asyncio.sleep(0)
            return lease

    async def main():
        turn = 0
        while time.monotonic() < deadline:
            turn += 1
            tasks = [asyncio.create_task(serve((number, turn, index))) for index in range(8)]
            for _ in range(draw.randint(0, 3)):
                await asyncio.sleep(0)
            for task in draw.sample(tasks, 4):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("overcommit", [1.0, 1.5])
def test_a_storm_of_threads_and_tasks_leaves_nothing_behind(make_cache, watchdog, placement, overcommit):
    cache = make_cache(*SHAPE, placement=placement, overcommit=overcommit)
    queue = AllocationQueue(cache, Wait(0.05), keep_free=4, patience=0.02, most_overtaken=3)
    deadline = time.monotonic() + SECONDS
    works = [lambda number=number: storm(cache, queue, number, deadline) for number in range(5)]
    works += [lambda number=number: storm_of_tasks(queue, number, deadline) for number in (10, 11)]
    in_threads(works)
    assert_nothing_left(queue, cache)


def test_a_finalizer_that_frees_in_the_middle_of_the_queues_work_does_no_harm(make_cache, watchdog):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait(30))

    class Freed:
        """In a circle with itself: only the garbage collector ends it."""

        def __init__(self, name):
            self.name, self.myself = name, self

        def __del__(self):
            cache.free_for(self.name)

    thresholds = gc.get_threshold()
    gc.set_threshold(5, 2, 2)
    try:
        for name in range(3000):
            lease = queue.allocate(name, 40, strategy=Wait(30) if name else None)
            assert lease
            Freed(name)
            for other in (f"{name}a", f"{name}b"):
                refused = queue.allocate(other, 40, strategy=Reject())
                if refused:
                    refused.free()
            cache.free_for(name)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert_nothing_left(queue, cache)


def test_an_id_that_lives_when_its_turn_comes_is_an_error_of_its_own(make_cache):
    cache = make_cache(*SHAPE)
    queue = AllocationQueue(cache, Wait())

    async def main():
        first = await queue.allocate_async("a", 64)
        second = asyncio.create_task(queue.allocate_async("b", 40))
        third = asyncio.create_task(queue.allocate_async("c", 40))
        await asyncio.sleep(0)
        cache._unwatch(queue._watcher)
        first.free()
        cache.allocate_for("b", 4)
        cache._watch(queue._watcher)
        queue.poke()
        with pytest.raises(SequenceExists):
            await second
        (await third).free()
        cache.free_for("b")

    asyncio.run(main())
    assert_nothing_left(queue, cache)
