"""Many threads on one cache with real storage: nothing is lost, nothing is mixed up, nobody waits for ever.

Every thread knows what must be in its own sequences and looks inside holds. Copies of sequences are handed
from thread to thread, so that in paged placement threads write beside blocks that they share.
"""

import collections
import faulthandler
import os
import random
import sys
import threading
import time

import numpy as np
import pytest
from hands import HandArena, Hands
from observation import dumped

import kvcache.cache
from kvcache import CacheFull, CacheHeld

SECONDS = float(os.environ.get("KVCACHE_TEST_SECONDS", "10"))
THREADS = 8
LAYERS, HEADS, WIDTH = 2, 2, 4


@pytest.fixture
def watchdog(capfd):
    """Ends the process, with the stack of every thread, when a test does not; threads take turns fast."""
    with capfd.disabled(), os.fdopen(os.dup(2), "w") as stderr:
        faulthandler.dump_traceback_later(SECONDS + 90, exit=True, file=stderr)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(interval)
        faulthandler.cancel_dump_traceback_later()


def planes(values, layer):
    """K and V for one value per token, `(heads, n, width)`; no two heads, layers or sides alike."""
    k = np.asarray(values, np.float32)[None, :, None] + np.arange(HEADS, dtype=np.float32)[:, None, None] / 4
    k = np.ascontiguousarray(np.broadcast_to(k + layer / 8, (HEADS, len(values), WIDTH)))
    return k, -k


class Worker(threading.Thread):
    """Lives on sequences of its own; `values[request_id]` has what was written at each position."""

    def __init__(self, cache, number, deadline, handed_on):
        super().__init__(daemon=True)
        self.cache, self.number, self.deadline, self.handed_on = cache, number, deadline, handed_on
        self.random = random.Random(number)
        self.values = {}
        self.done = collections.Counter()
        self.error = None

    def run(self):
        actions = [
            self.open,
            self.open,
            self.grow,
            self.grow,
            self.step,
            self.step,
            self.look,
            self.look,
            self.cut,
        ]
        actions += [
            self.end,
            self.copy_and_hand_on,
            self.take_over,
            self.rewrite,
            self.limit,
            self.pry,
            self.peek,
        ]
        try:
            while time.monotonic() < self.deadline:
                action = self.random.choice(actions)
                self.done[action.__name__] += bool(action())
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            self.error = error

    def pick(self):
        return self.random.choice(list(self.values)) if self.values else None

    def fresh(self, count):
        """Values that no other thread ever writes."""
        self.done["tokens"] += count
        first = self.number * 2**20 + self.done["tokens"] % 2**19
        return list(range(first, first + count))

    def write(self, request_id, start, values):
        for layer in range(LAYERS):
            self.cache.write(request_id, layer, *planes(values, layer), start=start)
        self.values[request_id][start : start + len(values)] = values

    def compare(self, request_id):
        wanted = self.values[request_id]
        for layer in range(LAYERS):
            k, v = self.cache.get_kv_views(request_id, layer)
            for view, plane in zip((k, v), planes(wanted, layer), strict=True):
                assert np.array_equal(view, plane), (
                    f"{request_id} has {view[0, :, 0]}, {plane[0, :, 0]} were written"
                )

    # ---- what it does; true when something was done

    def open(self):
        request_id = (self.number, self.done["tokens"], self.random.random())
        prompt = self.random.randint(1, 24)
        if len(self.values) > 12 or not self.cache.allocate_for(request_id, prompt, max_new_tokens=24):
            return False
        self.values[request_id] = [0] * prompt
        self.write(request_id, 0, self.fresh(prompt))
        return True

    def grow(self):
        request_id, count = self.pick(), self.random.randint(1, 6)
        if request_id is None or not self.cache.append_tokens(request_id, count):
            return False
        start = len(self.values[request_id])
        self.values[request_id] += [0] * count
        self.write(request_id, start, self.fresh(count))
        return True

    def step(self):
        """One decode step as engines do it: append for all, then write and read inside a hold."""
        members = self.random.sample(list(self.values), min(4, len(self.values)))
        batch = self.cache.batch(members)
        granted = batch.append()
        values = self.fresh(len(members))
        for request_id, value, grant in zip(members, values, granted, strict=True):
            self.values[request_id] += [value] if grant else []
        with self.cache.hold():
            for layer in range(LAYERS):
                batch.write(layer, *(plane.transpose(1, 0, 2) for plane in planes(values, layer)))
            assert batch.lengths.tolist() == [len(self.values[request_id]) for request_id in members]
            for request_id in members:
                self.compare(request_id)
        return granted.any()

    def look(self):
        with self.cache.hold():
            for request_id in self.values:
                self.compare(request_id)
        return bool(self.values)

    def cut(self):
        request_id = self.pick()
        if request_id is None:
            return False
        keep = self.random.randint(0, len(self.values[request_id]))
        if not self.cache.truncate(request_id, keep):
            return False
        del self.values[request_id][keep:]
        return True

    def end(self):
        request_id = self.pick()
        if request_id is None:
            return False
        assert self.cache.free_for(request_id) is True
        del self.values[request_id]
        return True

    def copy_and_hand_on(self):
        request_id = self.pick()
        copy = ("copy", self.number, self.random.random())
        if request_id is None or len(self.handed_on) > 16 or not self.cache.fork(request_id, copy):
            return False
        self.handed_on.append((copy, list(self.values[request_id])))
        return True

    def take_over(self):
        try:
            request_id, values = self.handed_on.popleft()
        except IndexError:
            return False
        self.values[request_id] = values
        return True

    def rewrite(self):
        """Overwrites tokens in the middle; in paged placement this may need copies that are not to be had."""
        request_id = self.pick()
        if request_id is None or not self.values[request_id]:
            return False
        start = self.random.randrange(len(self.values[request_id]))
        count = min(3, len(self.values[request_id]) - start)
        try:
            self.write(request_id, start, self.fresh(count))
        except CacheFull:  # for layer 0, and then nothing has been written; for layer 1 the copies are there
            return False
        return True

    def limit(self):
        request_id = self.pick()
        if request_id is None:
            return False
        return self.cache.set_limit(
            request_id, len(self.values[request_id]) + self.random.randint(0, 24) or 1
        )

    def pry(self):
        """Growth inside a hold: granted, refused, or told to wait; never moved under the views."""
        request_id = self.pick()
        if request_id is None:
            return False
        with self.cache.hold():
            table = self.cache.block_table(request_id).tolist()
            try:
                grown = self.cache.append_token(request_id)
            except CacheHeld:
                grown = False
            assert self.cache.block_table(request_id).tolist()[: len(table) - 1] == table[:-1]
        if grown:
            self.values[request_id].append(0)
            self.write(request_id, len(self.values[request_id]) - 1, self.fresh(1))
        return grown

    def peek(self):
        self.cache.check()
        stats = self.cache.stats()
        assert stats.used_blocks + stats.free_blocks == stats.total_blocks
        assert dumped(self.cache.dump_block_map)
        assert dumped(self.cache.dump_cache_stats)
        return len(list(self.cache)) >= 0


def run_to_the_end(workers):
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for worker in workers:
        if worker.error:
            raise worker.error


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_eight_threads_of_mixed_calls_keep_every_content(make_cache, watchdog, placement):
    cache = make_cache(LAYERS, HEADS, WIDTH, 640, 4, placement=placement)
    handed_on = collections.deque()
    deadline = time.monotonic() + SECONDS
    workers = [Worker(cache, number, deadline, handed_on) for number in range(THREADS)]
    run_to_the_end(workers)
    done = sum((worker.done for worker in workers), collections.Counter())
    assert all(
        done[name] for name in ("open", "grow", "step", "look", "cut", "end", "take_over", "pry", "limit")
    )
    assert (cache.stats().moves > 0) is (placement == "contiguous")
    for worker in workers:
        worker.look()
        for request_id in worker.values:
            assert cache.free_for(request_id)
    for request_id, _ in handed_on:
        assert cache.free_for(request_id)
    assert (len(cache), cache.total_allocated, cache.stats().claimed_blocks) == (0, 0, 0)


class SleepyHands(Hands):
    """Storage that gives the GIL up in the middle of moves and writes, as a device would."""

    def move(self, moves):
        time.sleep(0.0005)
        super().move(moves)
        time.sleep(0.0005)

    def write(self, arrays, layer, spans):
        time.sleep(0.0002)
        super().write(arrays, layer, spans)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_threads_wait_for_a_slow_arena_without_blocking_each_other(
    make_cache, watchdog, monkeypatch, placement
):
    monkeypatch.setattr(kvcache.cache, "make_arena", lambda spec, *options: HandArena(spec, SleepyHands))
    cache = make_cache(LAYERS, HEADS, WIDTH, 320, 4, placement=placement)
    workers = [
        Worker(cache, number, time.monotonic() + SECONDS / 5, collections.deque()) for number in range(4)
    ]
    run_to_the_end(workers)
    done = sum((worker.done for worker in workers), collections.Counter())
    assert done["open"] > 4
    assert done["step"] > 4


def test_a_close_while_others_call_ends_every_call_cleanly(make_cache, watchdog):
    from kvcache import CacheClosed, UnknownSequence

    for _ in range(20):
        cache = make_cache(1, 2, 4, 256, 4)
        started = threading.Barrier(4)
        errors = []

        def work(number, cache=cache, started=started, errors=errors):
            started.wait()
            try:
                for round_ in range(10_000):
                    cache.allocate_for((number, round_), 5, max_tokens=9)
                    cache.append_tokens((number, round_), 3)
                    cache.free_for((number, round_))
            except (CacheClosed, UnknownSequence):
                pass
            except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        time.sleep(0.003)
        cache.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert errors == []
