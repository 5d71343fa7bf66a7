"""A storm over a queue and its cache, with cancellations at any point.

    python -X dev -X faulthandler tests/soak.py --seconds 120

Threads and tasks that come and go, with prompts in common or without, evictions, swaps to stores that fill up, fail
and damage what they keep, forks, cuts, pins and holds. Every sequence's K and V are compared with what belongs there;
at the end nothing may be left, in the arena or in a store, and every request has to be accounted for. If nothing
finishes for 30 s, the stacks of all threads are printed, and it ends. The last line is a JSON object of what has
happened. `tests/test_soak.py` runs it for a few seconds.
"""

import argparse
import asyncio
import faulthandler
import itertools
import json
import logging
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from random import Random

import numpy as np

from kvcache import CacheFull, KVCache, KVCacheError, UnknownSequence, chunks
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, Swap, TenantLimit, Wait
from kvcache.errors import Suspended
from kvcache.store import Outcome, SettledJob
from kvcache.store_files import DirectoryStore
from kvcache.store_memory import MemoryStore

BLOCKS, SIZE, WIDTH = 32, 4, 2
FAMILIES, SALTS = 3, [None, "a", "b", "small"]  # prompts of a family begin alike; a tenant's name is its salt
FIRST_OWN, SALTED = (
    1 << 10,
    1 << 21,
)  # token ids from here on are in one prompt only; K of a token under the next salt
CHUNK = 2 * SIZE * 2 * WIDTH * 4  # bytes: two blocks
STILL_SECONDS = 30  # without anything that finishes
WEATHERS = (  # of the cache
    {"placement": "contiguous"},
    {"placement": "paged", "overcommit": 1.5},
    {"placement": "contiguous", "overcommit": 1.5, "max_move_tokens": 24},
    {"placement": "paged"},
)
THREADS, LOOPS, TASKS = 5, 2, 6


class Objection(Exception):
    """An owner does not let its sequence be ended."""


class BadDisk:
    """A store that fails now and then, in every way that a store can."""

    def __init__(self, inner, seed, note):
        self.inner, self.draw, self.note = inner, Random(seed), note

    def put(self, keys, buffers, *, timeout):
        fate = self.draw.random()
        if fate < 0.05:
            self.note("writes that raised")
            raise OSError(28, "No space left on device")
        if fate < 0.1:
            self.note("writes that failed")
            return SettledJob([Outcome.FAILED])
        return self.inner.put(keys, buffers, timeout=timeout)

    def get(self, keys, buffers, *, timeout):
        fate = self.draw.random()
        if fate < 0.05:
            self.note("reads that raised")
            raise OSError(5, "Input/output error")
        job = self.inner.get(keys, buffers, timeout=timeout)
        if fate < 0.1 and job.wait(timeout) and list(job.outcomes()) == [Outcome.OK]:
            self.note("damaged chunks")
            buffers[0][self.draw.randrange(len(buffers[0]))] ^= 1
        return job

    def __getattr__(self, name):  # register, contains, delete, close
        return getattr(self.inner, name)


class Storm:
    """One cache, its queue, and everybody who wants something of it."""

    def __init__(self, seed, seconds, options, folder):
        self.seed, self.until = seed, time.monotonic() + seconds
        self.cache = KVCache(1, 1, WIDTH, BLOCKS * SIZE, SIZE, **options)
        self.queue = AllocationQueue(
            self.cache,
            Wait(0.05),
            keep_free=SIZE,
            patience=0.02,
            most_overtaken=3,
            tenants={"small": TenantLimit(tokens=24, sequences=2)},
        )
        self.numbers = itertools.count(1)
        self.happened = Counter()
        self.finished = 0
        self.counting = threading.Lock()
        self.faults = []
        self.memory = MemoryStore(6 << 13, 1 << 13, evict=False)  # six chunks
        self.disk = DirectoryStore(folder, 8 << 13, evict=False)
        self.stores = [None, self.memory, BadDisk(self.disk, f"{seed} disk", self.note)]

    @property
    def over(self):
        return time.monotonic() >= self.until or bool(self.faults)

    def note(self, what):
        """Counts something that has finished."""
        with self.counting:
            self.happened[what] += 1
            self.finished += 1

    def run(self):
        """Until the time is over and everybody has gone home."""
        works = [lambda n=n: Client(self, n).run() for n in range(THREADS)]
        works += [lambda n=n: asyncio.run(self.run_tasks(100 + n)) for n in range(LOOPS)]
        works += [lambda: self.hold(200), lambda: self.look(300), lambda: self.pin(400)]
        threads = [threading.Thread(target=self.guarded, args=(work,), daemon=True) for work in works]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            finished = self.finished
            faulthandler.dump_traceback_later(STILL_SECONDS, exit=True, file=sys.__stderr__)
            while self.finished == finished and any(thread.is_alive() for thread in threads):
                time.sleep(0.01)
            time.sleep(0.1)
        faulthandler.cancel_dump_traceback_later()
        if not self.faults:
            self.guarded(self.account)

    def guarded(self, work):
        try:
            work()
        except BaseException:  # noqa: BLE001 (told at the end)
            self.faults.append(traceback.format_exc())

    async def run_tasks(self, number):
        draw = Random(f"{self.seed} tasks {number}")
        while not self.over:
            clients = [AsyncClient(self, number + 1000 * next(self.numbers)) for _ in range(TASKS)]
            tasks = [asyncio.create_task(client.run()) for client in clients]
            for task in draw.sample(tasks, draw.randint(0, TASKS)):
                for _ in range(draw.randint(0, 4)):
                    await asyncio.sleep(0)
                if draw.random() < 0.3:
                    await asyncio.sleep(draw.random() / 200)
                task.cancel()
            for answer in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(answer, asyncio.CancelledError):
                    self.note("tasks cancelled")
                elif isinstance(answer, BaseException):
                    raise answer

    def hold(self, number):
        draw = Random(f"{self.seed} {number}")
        while not self.over:
            with self.cache.hold():
                time.sleep(draw.random() / 500)
            self.note("holds")
            time.sleep(draw.random() / 100)

    def look(self, number):
        draw = Random(f"{self.seed} {number}")
        while not self.over:
            stats, seen = self.cache.stats(), self.queue.stats()
            assert stats.used_blocks + stats.free_blocks == BLOCKS
            assert 0 <= seen.oldest_age < STILL_SECONDS and seen.waiting >= 0
            self.cache.check()
            self.cache.check_health()
            self.note("looks")
            time.sleep(draw.random() / 100)

    def pin(self, number):
        draw = Random(f"{self.seed} {number}")
        while not self.over:
            salt, ids = draw.choice(SALTS), family(draw.randrange(FAMILIES))[: draw.randint(SIZE, 16)]
            if self.cache.pin(tokens=ids, salt=salt):
                self.note("pins")
                time.sleep(draw.random() / 200)
                self.cache.unpin(tokens=ids, salt=salt)
            time.sleep(draw.random() / 100)

    def settle(self):
        """What is still on its way to a store ends, and what has been deleted there goes."""
        end = time.monotonic() + STILL_SECONDS
        while self.cache.stats().used_blocks or len(self.memory) or self.disk.used_bytes:
            assert time.monotonic() < end, (self.cache.stats(), len(self.memory), self.disk.used_bytes)
            time.sleep(0.01)

    def account(self):
        """Nothing is left, and whoever came was granted or refused, once."""
        queue, cache = self.queue, self.cache
        self.settle()
        queue.poke()
        assert (len(queue), list(cache), cache.stats().waiting_requests) == (0, [], 0)
        assert not queue._live and not queue._ids and not queue._notes and not list(queue._waiters)
        assert all(each.blocks == each.sequences == each.waiting == 0 for each in queue._accounts.values())
        stats = cache.stats()
        assert (stats.used_blocks, stats.claimed_blocks, stats.waiting_blocks) == (0, 0, 0)
        assert stats.suspended_sequences == stats.pinned_blocks == 0
        assert (
            stats.corrupt_chunks <= self.happened["damaged chunks"]
        )  # one that nobody waits for is not verified
        self.happened["corrupt chunks"] += stats.corrupt_chunks
        self.happened["hit tokens"] += stats.hit_tokens
        assert (stats.free_blocks, stats.allocated_bytes) == (BLOCKS, 0)
        assert stats.admissions == stats.frees
        cache.check()
        told = queue.stats().tenants.values()
        for each in told:
            for outcome, count in {"granted": each.granted, "failed": each.failed, **each.refused}.items():
                self.happened[outcome] += count
            self.happened["evicted"] += each.evicted
            self.happened["swapped"] += each.swapped
            self.happened["swaps failed"] += each.swaps_failed
            self.happened["resumed"] += each.resumed
            self.happened["grown after all"] += each.grown
            assert (each.waiting, each.sequences, each.blocks) == (0, 0, 0)
        answered = sum(each.granted + each.failed + sum(each.refused.values()) for each in told)
        assert answered == self.happened["requests"], (answered, self.happened["requests"])
        assert self.happened["evicted"] <= self.happened["owners told"]
        assert self.happened["swapped"] == self.happened["told suspended"]
        assert self.happened["swaps failed"] <= self.happened["told intact"]  # or nobody needed it any more
        queue.close()
        cache.close()
        self.disk.close(STILL_SECONDS)


def family(number):
    """Token ids that prompts of this family begin with."""
    return list(range(64 * number, 64 * number + 48))


class Visit:
    """One request of a client, and what its sequence has to hold.

    Where its tokens are known K is told by a token's id and the salt, so that what others have left is right, too.
    """

    def __init__(self, storm, draw, number):
        self.storm, self.draw = storm, draw
        self.request_id = (number, next(storm.numbers))
        self.evicted = False
        self.tenant = draw.choice(SALTS)
        self.is_named = draw.random() < 0.6
        count = draw.randint(1, 40)
        self.held = self.values(count)  # K of its tokens, as it has to be
        if self.is_named:
            alike = family(draw.randrange(FAMILIES))[: draw.randint(0, count)]
            self.held[: len(alike)] = np.array(alike) + self.shift
        self.written = 0  # tokens whose K and V are surely there
        self.prompt = self.named(self.held)
        self.options = {
            "max_new_tokens": draw.randint(0, 24),
            "tenant": self.tenant,
            "salt": self.tenant,
            "priority": draw.randint(0, 2),
            "on_evict": self.tell,
            "on_swap": self.tell_of_swap,
        }

    @property
    def shift(self):
        return SALTS.index(self.tenant) * SALTED

    def tell(self, request_id):
        """Called by whoever needs the memory, from any thread."""
        assert request_id == self.request_id
        if hash(request_id) % 17 == 0:
            raise Objection
        self.evicted = True
        self.storm.note("owners told")

    def tell_of_swap(self, request_id, event):
        """Called as `tell`, and when the transfer has ended."""
        assert request_id == self.request_id
        if event == "leaving" and hash(request_id) % 17 == 0:
            raise Objection
        self.storm.note(f"told {event}")

    def strategy(self):
        draw = self.draw
        return draw.choice(
            [
                None,
                Reject(),
                Wait(),
                Wait(draw.random() / 50),
                Reduce(8) | Wait(0.01),
                Wait(0.002) | Evict("lru"),
                Evict("priority") | Wait(0.01),
                Wait(0.001) | Evict(lambda ids: draw.choice([None, *ids])),
                Swap(draw.choice(self.storm.stores)),
                Reduce(8) | Wait(0.002) | Swap(draw.choice(self.storm.stores), "priority") | Evict(),
                Swap(draw.choice(self.storm.stores), lambda ids: draw.choice([None, *ids])) | Wait(0.01),
            ]
        )

    def growth_strategy(self):
        store = self.draw.choice(self.storm.stores)
        return self.draw.choice(
            [Reject(), Wait(0.005), Evict(), Wait(0.001) | Evict("priority"), Swap(store) | Wait(0.002)]
        )

    def values(self, tokens):
        """K for so many tokens of its own: no two of a storm's are alike for a long time."""
        own = [FIRST_OWN + next(self.storm.numbers) % (SALTED - FIRST_OWN) for _ in range(tokens)]
        return np.array(own, np.float32) + (self.shift if self.is_named else 0)

    def named(self, values):
        """As a prompt, or as what is appended: ids, or a count."""
        return (values - self.shift).astype(int).tolist() if self.is_named else len(values)

    def grow(self, more):
        """They have been appended."""
        self.held = np.concatenate([self.held, more])
        self.write()
        self.storm.note("appends")

    def write(self):
        """What has not been written."""
        self.write_to(self.request_id, self.held[self.written :], self.written)
        self.written = len(self.held)

    def write_to(self, request_id, values, start):
        if len(values):
            planes = np.broadcast_to(values[None, :, None], (1, len(values), WIDTH))
            self.storm.cache.write(request_id, 0, planes.copy(), -planes, start=start)

    def compare(self):
        self.compare_with(self.request_id, self.held)

    def compare_with(self, request_id, values):
        cache = self.storm.cache
        with cache.hold():
            k, v = cache.get_kv_views(request_id, 0)
            assert k.shape == (1, len(values), WIDTH), (k.shape, len(values))
            assert (k == values[None, :, None]).all() and (v == -values[None, :, None]).all()
        self.storm.note("comparisons")

    # ---- what may become of a live sequence

    def cut(self):
        kept = self.draw.randint(0, len(self.held))
        if self.storm.cache.truncate(self.request_id, kept):
            self.held, self.written = self.held[:kept], min(self.written, kept)
            self.storm.note("cuts")

    def lower(self):
        limit = max(len(self.held), self.storm.cache.limit(self.request_id) - self.draw.randint(0, 4), 1)
        self.storm.cache.set_limit(self.request_id, limit)

    def branch(self):
        cache, twin = self.storm.cache, (*self.request_id, next(self.storm.numbers))
        if not cache.fork(self.request_id, twin):
            return
        try:
            self.compare_with(twin, self.held)
            if cache.append_tokens(twin, 2):
                more = self.values(2)
                self.write_to(twin, more, len(self.held))
                self.compare_with(twin, np.concatenate([self.held, more]))
            self.compare()
            self.storm.note("forks")
        finally:
            assert cache.free_for(twin)

    def leave(self):
        """Of its own accord: it finds out at its next call."""
        self.storm.cache.suspend(self.request_id, self.draw.choice(self.storm.stores))
        self.storm.note("suspended by their owners")

    ACTS = (compare, compare, cut, lower, branch, leave)

    # ---- the way back, which a thread and a task walk alike

    def recall(self, answer):
        """What a resume has come to. Whether it is here, with all its K and V; None: try once more."""
        if not answer:
            self.storm.note(f"stayed away: {answer.reason}")
            return None
        if not answer.ok:
            self.storm.note(f"came back {answer.reason}")
            return None
        self.storm.note("came back")
        return True

    def mend(self, answer):
        """Room without K and V, but for what was cached: the rest is written next."""
        self.written = answer.tokens
        self.storm.note("computed again")


class Client:
    """A thread's."""

    def __init__(self, storm, number):
        self.storm, self.number = storm, number
        self.draw = Random(f"{storm.seed} {number}")

    def run(self):
        while not self.storm.over:
            self.visit(Visit(self.storm, self.draw, self.number))

    def visit(self, visit):
        storm, queue = self.storm, self.storm.queue
        try:
            storm.note("requests")
            with queue.allocate(
                visit.request_id, visit.prompt, strategy=visit.strategy(), **visit.options
            ) as lease:
                if lease:
                    visit.written = lease.cached_tokens
                    self.live(visit)
        except UnknownSequence:
            assert visit.evicted  # its owner had been told
        except CacheFull:
            storm.note("no room for a copy")
        except Objection:
            storm.note("objections")
        if self.draw.random() < 0.1:
            waiting = list(queue._ids)
            if waiting and queue.cancel(self.draw.choice(waiting)):
                storm.note("cancelled by others")

    def live(self, visit):
        left = self.draw.randint(0, 8)
        while left >= 0:
            try:
                visit.write()
                if left:
                    self.step(visit)
                else:
                    visit.compare()
                left -= 1
            except Suspended:
                if not self.come_back(visit):
                    return

    def step(self, visit):
        if self.draw.random() < 0.5:
            self.draw.choice(Visit.ACTS)(visit)
            return
        more = visit.values(self.draw.randint(1, 3))
        if self.storm.queue.append(visit.request_id, visit.named(more), strategy=visit.growth_strategy()):
            visit.grow(more)

    def come_back(self, visit):
        queue = self.storm.queue
        for _ in range(6):
            answer = queue.resume(visit.request_id, strategy=visit.growth_strategy())
            if visit.recall(answer):
                return True
        answer = queue.resume(visit.request_id, recompute=True, strategy=Wait(0.05))
        if answer and answer.ok:
            visit.mend(answer)
        return bool(answer)


class AsyncClient:
    """A task's: as `Client`, with an await wherever there can be one, at each of which it may be cancelled."""

    def __init__(self, storm, number):
        self.storm = storm
        self.draw = Random(f"{storm.seed} {number}")
        self.visit = Visit(storm, self.draw, number)

    async def run(self):
        storm, visit = self.storm, self.visit
        try:
            pending = storm.queue.allocate_async(
                visit.request_id, visit.prompt, strategy=visit.strategy(), **visit.options
            )
            storm.note("requests")
            async with pending as lease:
                if lease:
                    visit.written = lease.cached_tokens
                    await self.live()
        except UnknownSequence:
            assert visit.evicted
        except CacheFull:
            storm.note("no room for a copy")
        except Objection:
            storm.note("objections")

    async def live(self):
        visit = self.visit
        left = self.draw.randint(0, 6)
        while left >= 0:
            try:
                visit.write()
                if left:
                    await self.step()
                else:
                    visit.compare()
                left -= 1
            except Suspended:
                if not await self.come_back():
                    return

    async def step(self):
        visit, queue = self.visit, self.storm.queue
        await asyncio.sleep(self.draw.choice([0, 0, self.draw.random() / 500]))
        if self.draw.random() < 0.5:
            self.draw.choice(Visit.ACTS)(visit)
            return
        more = visit.values(2)
        if await queue.append_async(visit.request_id, visit.named(more), strategy=visit.growth_strategy()):
            visit.grow(more)

    async def come_back(self):
        visit, queue = self.visit, self.storm.queue
        for _ in range(6):
            answer = await queue.resume_async(visit.request_id, strategy=visit.growth_strategy())
            if visit.recall(answer):
                return True
        answer = await queue.resume_async(visit.request_id, recompute=True, strategy=Wait(0.05))
        if answer and answer.ok:
            visit.mend(answer)
        return bool(answer)


def main():
    """Weathers the storms one after another, and tells what has happened; the exit code is 1 after a fault."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="in all")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    faulthandler.enable(sys.__stderr__)
    logging.getLogger("kvcache").addHandler(logging.NullHandler())
    sys.setswitchinterval(1e-4)
    faults, happened = [], Counter()
    threading.excepthook = lambda told: faults.append(repr(told.exc_value))
    sys.unraisablehook = lambda told: faults.append(f"{told.err_msg} {told.exc_value!r} in {told.object!r}")
    chunks.CHUNK_BYTES = CHUNK
    for number, options in enumerate(WEATHERS):
        with tempfile.TemporaryDirectory() as folder:
            storm = Storm(f"{chosen.seed} {number}", chosen.seconds / len(WEATHERS), options, folder)
            storm.run()
        happened.update(storm.happened)
        faults += storm.faults
        if faults:
            break
    print(*faults, sep="\n", file=sys.stderr)
    print(json.dumps({"faults": len(faults), **happened}))
    return bool(faults)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KVCacheError:
        traceback.print_exc()
        sys.exit(1)
