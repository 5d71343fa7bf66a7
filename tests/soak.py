"""A storm over a queue and its cache: threads, tasks, evictions, forks, cuts, holds, and cancellations at any point.

    python -X dev -X faulthandler tests/soak.py --seconds 120

Every sequence's K and V are compared with what its client has written; at the end nothing may be left, and every
request has to be accounted for. If nothing finishes for 30 s, the stacks of all threads are printed, and it ends.
The last line is a JSON object of what has happened. `tests/test_soak.py` runs it for a few seconds.
"""

import argparse
import asyncio
import faulthandler
import itertools
import json
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from random import Random

import numpy as np

from kvcache import CacheFull, KVCache, KVCacheError, UnknownSequence
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, TenantLimit, Wait

BLOCKS, SIZE, WIDTH = 32, 4, 2
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


class Storm:
    """One cache, its queue, and everybody who wants something of it."""

    def __init__(self, seed, seconds, options):
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
        works += [lambda: self.hold(200), lambda: self.look(300)]
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

    def account(self):
        """Nothing is left, and whoever came was granted or refused, once."""
        queue, cache = self.queue, self.cache
        queue.poke()
        assert (len(queue), list(cache), cache.stats().waiting_requests) == (0, [], 0)
        assert not queue._live and not queue._ids and not queue._notes and not list(queue._waiters)
        assert all(each.blocks == each.sequences == each.waiting == 0 for each in queue._accounts.values())
        stats = cache.stats()
        assert (stats.used_blocks, stats.claimed_blocks, stats.waiting_blocks) == (0, 0, 0)
        assert (stats.free_blocks, stats.allocated_bytes) == (BLOCKS, 0)
        assert stats.admissions == stats.frees
        cache.check()
        told = queue.stats().tenants.values()
        for each in told:
            for outcome, count in {"granted": each.granted, "failed": each.failed, **each.refused}.items():
                self.happened[outcome] += count
            self.happened["evicted"] += each.evicted
            self.happened["grown after all"] += each.grown
            assert (each.waiting, each.sequences, each.blocks) == (0, 0, 0)
        answered = sum(each.granted + each.failed + sum(each.refused.values()) for each in told)
        assert answered == self.happened["requests"], (answered, self.happened["requests"])
        assert self.happened["evicted"] <= self.happened["owners told"]
        queue.close()
        cache.close()


class Visit:
    """One request of a client, and what its sequence has to hold."""

    def __init__(self, storm, draw, number):
        self.storm, self.draw = storm, draw
        self.request_id = (number, next(storm.numbers))
        self.evicted = False
        self.prompt = draw.randint(1, 40)
        self.tenant = draw.choice([None, "a", "b", "small"])
        self.options = {
            "max_new_tokens": draw.randint(0, 24),
            "tenant": self.tenant,
            "priority": draw.randint(0, 2),
            "on_evict": self.tell,
        }

    def tell(self, request_id):
        """Called by whoever needs the memory, from any thread."""
        assert request_id == self.request_id
        if hash(request_id) % 17 == 0:
            raise Objection
        self.evicted = True
        self.storm.note("owners told")

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
            ]
        )

    def values(self, tokens):
        """What a client writes for so many tokens: no two of a storm's are alike."""
        return np.array([next(self.storm.numbers) % 2**24 for _ in range(tokens)], np.float32)

    def write(self, request_id, values, start):
        planes = np.broadcast_to(values[None, :, None], (1, len(values), WIDTH))
        self.storm.cache.write(request_id, 0, planes.copy(), -planes, start=start)

    def compare(self, request_id, values):
        cache = self.storm.cache
        with cache.hold():
            k, v = cache.get_kv_views(request_id, 0)
            assert k.shape == (1, len(values), WIDTH), (k.shape, len(values))
            assert (k == values[None, :, None]).all() and (v == -values[None, :, None]).all()
        self.storm.note("comparisons")

    # ---- what may become of a live sequence: each is given what it holds, and returns what it holds then

    def look(self, values):
        self.compare(self.request_id, values)
        return values

    def cut(self, values):
        kept = self.draw.randint(0, len(values))
        if not self.storm.cache.truncate(self.request_id, kept):
            return values
        self.storm.note("cuts")
        return values[:kept]

    def lower(self, values):
        limit = max(len(values), self.storm.cache.limit(self.request_id) - self.draw.randint(0, 4), 1)
        self.storm.cache.set_limit(self.request_id, limit)
        return values

    def branch(self, values):
        cache, twin = self.storm.cache, (*self.request_id, next(self.storm.numbers))
        if not cache.fork(self.request_id, twin):
            return values
        try:
            self.compare(twin, values)
            if cache.append_tokens(twin, 2):
                more = self.values(2)
                self.write(twin, more, len(values))
                self.compare(twin, np.concatenate([values, more]))
            self.compare(self.request_id, values)
            self.storm.note("forks")
        finally:
            assert cache.free_for(twin)
        return values

    # another way to go, to a store and back for instance, is one more of these
    ACTS = (look, look, cut, lower, branch)


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
        values = visit.values(visit.prompt)
        visit.write(visit.request_id, values, 0)
        for _ in range(self.draw.randint(0, 8)):
            if self.draw.random() < 0.5:
                values = self.draw.choice(Visit.ACTS)(visit, values)
                continue
            count = self.draw.randint(1, 3)
            strategy = self.draw.choice([Reject(), Wait(0.005), Evict(), Wait(0.001) | Evict("priority")])
            if self.storm.queue.append(visit.request_id, count, strategy=strategy):
                more = visit.values(count)
                visit.write(visit.request_id, more, len(values))
                values = np.concatenate([values, more])
                self.storm.note("appends")
        visit.compare(visit.request_id, values)


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
                    await self.live()
        except UnknownSequence:
            assert visit.evicted
        except CacheFull:
            storm.note("no room for a copy")
        except Objection:
            storm.note("objections")

    async def live(self):
        visit, queue = self.visit, self.storm.queue
        values = visit.values(visit.prompt)
        visit.write(visit.request_id, values, 0)
        for _ in range(self.draw.randint(0, 6)):
            await asyncio.sleep(self.draw.choice([0, 0, self.draw.random() / 500]))
            if self.draw.random() < 0.5:
                values = self.draw.choice(Visit.ACTS)(visit, values)
                continue
            strategy = self.draw.choice([Reject(), Wait(0.005), Evict()])
            if await queue.append_async(visit.request_id, 2, strategy=strategy):
                more = visit.values(2)
                visit.write(visit.request_id, more, len(values))
                values = np.concatenate([values, more])
                self.storm.note("appends")
        visit.compare(visit.request_id, values)


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
    for number, options in enumerate(WEATHERS):
        storm = Storm(f"{chosen.seed} {number}", chosen.seconds / len(WEATHERS), options)
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
