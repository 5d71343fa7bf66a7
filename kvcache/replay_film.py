"""Pictures taken during a replay, evenly over all its steps, for who draws it afterwards."""

import numpy as np

from kvcache.block_map import CACHED, FREE

MOST_FRAMES = 1000  # at the end there are between half of it and all
MOST_ROWS = 800  # of the block map
CLOSE_STEPS = 300  # of the close-up
CLOSE_PART = 8  # it shows one in so many blocks, the first ones


class Film:
    """A frame every so many steps; when there are too many, every second one is dropped, and so on.

    Beside it a close-up is kept: a part of the arena in the steps after the newest power of two.

    Attributes
    ----------
    every : int
        Steps between two frames.
    steps, tokens, sequences, waiting, moved : list of int
        Of each frame: its step, live tokens, live sequences, requests in the queue, tokens moved until then.
    maps : list of array of int32
        Of each frame: who holds the block in the middle of each row, or `FREE` or `CACHED`.
    close_steps, close_maps : list
        The same of the close-up.
    close_tokens : int
        How much of the arena it shows.
    """

    def __init__(self):
        self.every = 1
        self.steps, self.tokens, self.sequences, self.waiting, self.moved = [], [], [], [], []
        self.maps = []
        self.close_steps, self.close_maps, self.close_tokens = [], [], 0

    def shoot(self, replay):
        """Take a frame of a `Replay`, if it is time."""
        step = replay.step
        if step & (step - 1) == 0:
            self.close_steps, self.close_maps = [], []
        if len(self.close_steps) < CLOSE_STEPS:
            self._shoot_closely(replay)
        if step % self.every == 0 and len(self.steps) == MOST_FRAMES:
            self._thin()
        if step % self.every == 0:
            self.steps.append(step)
            self.tokens.append(int(replay.meter.lengths.sum()))
            self.sequences.append(len(replay.live))
            self.waiting.append(replay.waiting)
            self.moved.append(replay.meter.stats.moved_tokens)
            self.maps.append(_rows(block_owners(replay)))

    def _shoot_closely(self, replay):
        blocks = max(1, replay.settings.num_blocks // CLOSE_PART)
        self.close_tokens = blocks * replay.settings.block_size
        self.close_steps.append(replay.step)
        self.close_maps.append(_rows(block_owners(replay)[:blocks]))

    def _thin(self):
        self.every *= 2
        kept = [index for index, step in enumerate(self.steps) if step % self.every == 0]
        for column in (self.steps, self.tokens, self.sequences, self.waiting, self.moved, self.maps):
            column[:] = [column[index] for index in kept]


def _rows(owners):
    """A look into the middle of each of at most so many equal parts."""
    rows = min(len(owners), MOST_ROWS)
    return owners[((np.arange(rows) + 0.5) * len(owners) / rows).astype(np.int64)]


def block_owners(replay):
    """Who holds each block, as numbers of requests, or `FREE` or `CACHED`."""
    block_size = replay.settings.block_size
    owners = np.full(replay.settings.num_blocks, FREE, np.int32)
    if getattr(replay.meter.stats, "cached_blocks", 0):  # baselines keep nothing
        owners[replay.pool._owners() == CACHED] = CACHED
    firsts = replay.meter.starts // block_size
    ends = firsts + -(-replay.meter.lengths // block_size)
    for number, first, end in zip(replay.live, firsts.tolist(), ends.tolist(), strict=True):
        if first >= 0:
            owners[first:end] = number
        else:
            owners[replay.pool.block_table(number)] = number
    return owners
