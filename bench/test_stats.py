"""Looking at a busy cache: 1,024 sequences in a pool of 65,536 blocks that has been lived in; and beside an engine."""

import io
import statistics
import threading
import time

import numpy as np
import pytest
from scenes import LivedIn

from kvcache import KVCache

pytestmark = pytest.mark.benchmark(group="looking")

CALLS = 100


@pytest.fixture(scope="module")
def pool():
    return LivedIn(65_536, "contiguous")


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


def test_stats(measure, pool):
    seen = []

    def look():
        seen[:] = [pool.cache.stats() for _ in range(CALLS)]

    def verify():
        assert seen[-1].num_sequences == len(pool.tokens) and seen[-1].used_blocks == pool.held

    measure(look, verify=verify, calls=CALLS, turns=CALLS)
    pool.cache.check()


def test_dump_cache_stats(measure, pool):
    """The guide's text, a line for each sequence."""
    texts = []

    def look():
        file = io.StringIO()
        pool.cache.dump_cache_stats(file)
        texts.append(file.getvalue())

    def verify():
        text = texts.pop()
        assert text.count("request-") == len(pool.tokens) and not texts

    measure(look, verify=verify, rounds=20)
    pool.cache.check()


MEMBERS, LAYERS = 64, 4
STEPS = {"without": 40, "with": 4}  # in a round
WIDTH = 1024  # of what stands for the model
EVERY = 0.001  # seconds


class Decoding:
    """An engine's loop: a token for each of 64 members, written in four layers under a hold, with or without a model.

    What stands for the model is a product of matrices for each layer, about a millisecond without the GIL.
    """

    def __init__(self, model):
        random = np.random.default_rng(0)
        self.weights = [random.standard_normal((WIDTH, WIDTH), np.float32) for _ in range(LAYERS)]
        self.states = random.standard_normal((MEMBERS, WIDTH), np.float32)
        self.model, self.num_steps = model == "with", STEPS[model]
        self.cache = KVCache(LAYERS, 4, 64, MEMBERS * 512, 16)
        for number in range(MEMBERS):
            assert self.cache.allocate_for(f"request-{number}", 250, max_tokens=512)
        self.batch = self.cache.batch(list(self.cache))
        self.rows = np.ones((MEMBERS, 4, 64), np.float32)

    def rewind(self):
        self.batch.truncate(self.batch.lengths - 250)

    def steps(self):
        cache, batch, rows = self.cache, self.batch, self.rows
        for _ in range(self.num_steps):
            batch.append()
            with cache.hold():
                for layer in range(LAYERS):
                    if self.model:
                        np.matmul(self.states, self.weights[layer])
                    batch.write(layer, rows, rows)


class Ticking:
    """A thread that wakes up a thousand times a second and calls something, or nothing."""

    def __init__(self):
        self.call, self.ticks, self.ended = None, 0, False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        due = time.perf_counter()
        while not self.ended:
            due = max(due + EVERY, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
            if self.call is not None:
                self.call()
            self.ticks += 1

    def close(self):
        self.ended = True
        self.thread.join()


@pytest.fixture
def ticking():
    made = Ticking()
    yield made
    made.close()


@pytest.mark.parametrize("model", STEPS)
def test_a_decode_loop_beside_stats_at_1_khz(measure, ticking, model):
    """Its floor is the same loop beside a thread that wakes up as often and does nothing."""
    engine = Decoding(model)
    calls = {name: [0, 0.0] for name in ("stats", "nothing")}  # ticks, and the seconds that they were in

    def beside(name, call):
        ticking.call = call
        engine.rewind()
        began, ticks = time.perf_counter(), ticking.ticks
        engine.steps()
        calls[name][0] += ticking.ticks - ticks
        calls[name][1] += time.perf_counter() - began

    def verify():
        assert engine.batch.lengths.tolist() == [250 + engine.num_steps] * MEMBERS

    measure(
        lambda: beside("stats", engine.cache.stats),
        verify=verify,
        calls=engine.num_steps,
        rounds=600,
        floor=("beside an idle thread", lambda: beside("nothing", None)),
    )
    if measure.benchmark.stats is not None:
        # of each side the rounds that were disturbed least: the ratio of two of them is noisier than a percent
        tenth = [statistics.quantiles(times, n=10)[0] for times in (round_times(measure), measure.own_floor)]
        measure.note(
            percent_more=(100 * (tenth[0] / tenth[1] - 1), 1),
            **{f"ticks_a_second_{name}": ticks / passed for name, (ticks, passed) in calls.items()},
        )
    assert all(ticks > 300 * passed for ticks, passed in calls.values())
    engine.cache.check()


def round_times(measure):
    """Nanoseconds of each round, as `own_floor` has them."""
    return [each * 1e9 for each in measure.benchmark.stats.stats.data]
