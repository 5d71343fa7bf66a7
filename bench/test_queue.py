"""The admission queue: what it adds to the bare calls, and what 10,000 waiters and 64 threads make of it."""

import asyncio
import itertools
import threading
import time

import pytest

from kvcache import KVCache
from kvcache.admission import AllocationQueue, TenantLimit, Wait

pytestmark = pytest.mark.benchmark(group="admission queue")

PAIRS = 200
WAITERS = 10_000
THREADS = 64
BARE, ADDED = 500, 3_000  # ns at most: an allocation and a free, and what the queue adds to them
DECISION = 50_000


def make(strategy=None, **options):
    cache = KVCache(1, 1, 64, 2_048 * 16, 16, backend="none")
    return cache, AllocationQueue(cache, strategy, **options)


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


def test_nobody_waits(measure):
    """An allocation through the queue and a free; its floor is the same without the queue."""
    measure_pairs(measure, *make())


def test_nobody_waits_and_the_tenant_has_a_limit(measure):
    """The same, of a tenant that has room for it."""
    measure_pairs(measure, *make(tenants={None: TenantLimit(sequences=10, share=0.5)}))


def measure_pairs(measure, cache, queue):
    bare = KVCache(1, 1, 64, 2_048 * 16, 16, backend="none")
    ids = [f"request-{number}" for number in range(PAIRS)]

    def through_the_queue():
        allocate, free_for = queue.allocate, cache.free_for
        for request_id in ids:
            allocate(request_id, 500, max_tokens=1_000)
            free_for(request_id)

    def without():
        allocate_for, free_for = bare.allocate_for, bare.free_for
        for request_id in ids:
            allocate_for(request_id, 500, max_tokens=1_000)
            free_for(request_id)

    def verify():
        assert len(cache) == len(bare) == len(queue) == 0

    measure(
        through_the_queue,
        verify=verify,
        calls=PAIRS,
        turns=PAIRS,
        floor=("bare calls", without),
        targets={"median": BARE + ADDED},
    )
    cache.check()


class Waiting:
    """10,000 tasks wait for the whole arena, which one sequence at a time has."""

    def __init__(self, tenants=1):
        self.cache, self.queue = make(Wait(), patience=1e9, most_overtaken=2**60)
        self.loop = asyncio.new_event_loop()
        self.names = itertools.count()
        self.tenants = tenants
        self.holder = self.queue.allocate("first", self.cache.spec.arena_tokens)
        self.tasks = {}
        self.granted = []
        for _ in range(WAITERS):
            self.come()
        self.settle()

    def come(self):
        number = next(self.names)
        tokens = self.cache.spec.arena_tokens - number % 500

        async def wait():
            self.granted.append(await self.queue.allocate_async(number, tokens, tenant=number % self.tenants))

        self.tasks[number] = self.loop.create_task(wait())

    def settle(self):
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def free(self):
        self.cache.free_for(self.holder.request_id)

    def renew(self):
        """Whoever has been granted holds now, and another one comes."""
        self.settle()
        if self.granted:
            (self.holder,) = self.granted
            self.granted.clear()
            del self.tasks[self.holder.request_id]
            self.come()
            self.settle()
        assert len(self.queue) == WAITERS

    def close(self):
        for task in self.tasks.values():
            task.cancel()
        self.settle()
        self.loop.close()
        assert len(self.queue) == 0
        self.cache.check()


@pytest.fixture
def waiting(request):
    made = Waiting(getattr(request, "param", 1))
    yield made
    made.close()


@pytest.mark.parametrize(
    "waiting", [1, 100, 1_000], indirect=True, ids=["tenants=1", "tenants=100", "tenants=1000"]
)
def test_a_free_decides_and_notifies_one_of_many(measure, waiting):
    """The free itself, the choice, the grant, and the call that wakes the task."""

    def verify():
        waiting.renew()

    measure(waiting.free, verify=verify, targets={"median": DECISION})


def test_a_free_that_suffices_for_nobody(measure, waiting):
    cache, queue = waiting.cache, waiting.queue
    assert cache.set_limit("first", cache.spec.arena_tokens)
    cache.truncate("first", 0)
    assert cache.set_limit("first", cache.spec.arena_tokens - 8_000)
    ids = [f"small-{number}" for number in range(100)]

    def prepare():
        for request_id in ids:
            assert cache.allocate_for(request_id, 16)

    def free():
        for request_id in ids:
            cache.free_for(request_id)

    def verify():
        assert len(queue) == WAITERS

    measure(free, prepare=prepare, verify=verify, calls=100, turns=100, targets={"median": DECISION})


def test_one_of_many_comes_and_is_cancelled(measure, waiting):
    """As a task: made, queued, cancelled, gone."""
    loop, queue = waiting.loop, waiting.queue
    tokens = waiting.cache.spec.arena_tokens

    async def come_and_go():
        for number in range(100):
            task = loop.create_task(queue.allocate_async(("late", number), tokens))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.sleep(0)

    def work():
        loop.run_until_complete(come_and_go())

    def verify():
        assert len(queue) == WAITERS

    measure(work, verify=verify, calls=100, turns=100, targets={"median": 2 * DECISION})


class Contention:
    """Threads that wait at a barrier to make their pairs all at once: starting them is no part of the round."""

    def __init__(self, work):
        self.work = work
        self.threads = []

    def prepare(self):
        self.join()
        self.begin, self.end = threading.Barrier(THREADS + 1), threading.Barrier(THREADS + 1)
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(THREADS)]
        for thread in self.threads:
            thread.start()
        while self.begin.n_waiting < THREADS:
            time.sleep(0.001)

    def run(self, number):
        self.begin.wait()
        self.work(number)
        self.end.wait()

    def go(self):
        self.begin.wait()
        self.end.wait()

    def join(self):
        for thread in self.threads:
            thread.join()


@pytest.mark.parametrize("limited", [False, True])
def test_64_threads_contend(measure, limited):
    """As many pairs as one thread makes in its floor: at most twice the time, that is half the rate."""
    tenants = {None: TenantLimit(share=1.0)} if limited else None
    cache, queue = make(Wait(), tenants=tenants)
    pairs = 100 if limited else 500

    def work(number):
        allocate, free_for = queue.allocate, cache.free_for
        for turn in range(pairs):
            allocate((number, turn), 100)
            free_for((number, turn))

    def in_one():
        for number in range(THREADS):
            work(number)

    def verify():
        assert len(cache) == len(queue) == 0 and cache.stats().frees % (THREADS * pairs) == 0

    crowd = Contention(work)
    measure(
        crowd.go,
        prepare=crowd.prepare,
        verify=verify,
        calls=THREADS * pairs,
        rounds=40,
        floor=("one thread", in_one),
    )
    crowd.join()
    measure.note(one_thread=(measure.benchmark.extra_info["units"], 2))
    cache.check()
