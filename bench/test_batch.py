"""One token for every member of a batch; slots, lengths and starts are read with it."""

import numpy as np
import pytest
from scenes import BLOCK, Turnover, books

STEPS = 512
TURNOVER_STEPS = 2048

step_of = pytest.mark.benchmark(group="a decode step")
full_step = pytest.mark.benchmark(group="a decode step at 95 % with turnover")


@step_of
@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@step_of
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("n", [1, 64, 256, 1024])
@pytest.mark.parametrize("blocks_begin", ["together", "spread"])
def test_append(measure, placement, n, blocks_begin):
    """`together`: all members need their next block in the same step; `spread`: a sixteenth in each."""
    cache = books(65_536, placement)
    prompts = np.array([64 + (7 * number % BLOCK if blocks_begin == "spread" else 0) for number in range(n)])
    ids = [f"request-{number}" for number in range(n)]
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert cache.allocate_for(request_id, int(prompt), max_tokens=700)
    batch = cache.batch(ids)
    result = []

    def begin_again():
        if batch.lengths[0] == prompts[0] + STEPS:
            assert batch.truncate(STEPS).all()

    def step():
        result[:] = batch.append(), batch.slots, batch.lengths, batch.starts

    def verify():
        got, slots, lengths, starts = result
        assert got.all() and (lengths - prompts == lengths[0] - prompts[0]).all()
        assert np.array_equal(slots % BLOCK, (lengths - 1) % BLOCK) and len(set(slots.tolist())) == n
        assert placement == "paged" or np.array_equal(slots, starts + lengths - 1)

    targets = {"median": 4_000} if n == 1024 else None
    measure(step, prepare=begin_again, verify=verify, rounds=STEPS, passes=4, targets=targets)
    cache.check()


@full_step
@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor_at_95_percent(measure, name):
    measure.empty(name)


class Passes:
    """The same scenario from its beginning, again and again; each must have done the same in the end."""

    def __init__(self, placement, limits):
        self.arguments = placement, limits == "known"
        self.scene = None
        self.ends = []

    def begin(self):
        if self.scene is None or self.scene.step == TURNOVER_STEPS:
            self.finish()
            self.scene = Turnover(*self.arguments)

    def turn_over(self):
        self.scene.turn_over()

    def decode(self):
        self.scene.decode()

    def check_step(self):
        self.scene.check_step()

    def finish(self):
        if self.scene is not None:
            self.scene.cache.check()
            self.ends.append(self.scene.cache.stats())
            assert self.ends[-1] == self.ends[0], "the passes were not the same"

    def note(self, measure):
        stats = self.ends[0]
        measure.note(
            occupied=stats.used_blocks / stats.total_blocks,
            moves_per_step=stats.moves / TURNOVER_STEPS,
            moved_of_attended=stats.moved_tokens / self.scene.attended,
        )


PLACEMENTS = pytest.mark.parametrize("placement", ["contiguous", "paged"])


@full_step
@PLACEMENTS
@pytest.mark.parametrize("limits", ["unknown", "known"])
def test_append_after_turnover(measure, placement, limits):
    passes = Passes(placement, limits)

    def prepare():
        passes.begin()
        passes.turn_over()

    measure(
        passes.decode,
        prepare=prepare,
        verify=passes.check_step,
        rounds=TURNOVER_STEPS,
        passes=3,
        targets={"median": 12_000, "p99": 30_000},
    )
    passes.finish()
    passes.note(measure)


@full_step
@PLACEMENTS
def test_turnover_itself(measure, placement):
    """Those that have ended, five of 1,024 on average, are taken out and freed; as many are admitted."""
    passes = Passes(placement, "unknown")

    def verify():
        passes.decode()
        passes.check_step()

    measure(passes.turn_over, prepare=passes.begin, verify=verify, rounds=TURNOVER_STEPS, passes=2)
    passes.finish()
