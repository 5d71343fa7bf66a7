"""An append whose next block is taken: what to do about it is chosen, and entered in the books. No bytes are moved."""

import random

import pytest
from scenes import BLOCK, books

from kvcache import CacheHeld

pytestmark = pytest.mark.benchmark(group="an append that collides")

NUM_BLOCKS, SEQUENCES, COLLISIONS = 65_536, 256, 1024


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


class Crowd:
    """256 sequences that grow in a pool kept 95 % full; who has got all its tokens is replaced.

    Inside a hold nothing may move, so an append that would have to is refused there, and found.
    """

    def __init__(self, occupancy):
        self.random = random.Random(11)
        self.occupancy = occupancy
        self.cache = books(NUM_BLOCKS, "contiguous")
        self.left, self.names, self.collisions = {}, 0, 0
        self.turns = iter(())
        self.fill()

    def fill(self):
        while len(self.left) < SEQUENCES:
            missing = SEQUENCES - len(self.left)
            spare = self.occupancy * NUM_BLOCKS - (NUM_BLOCKS - self.cache.free_blocks)
            tokens = int(spare / missing * BLOCK * self.random.uniform(0.3, 1.7))
            tokens = max(BLOCK, min(tokens, int(spare) * BLOCK))
            name, self.names = f"request-{self.names}", self.names + 1
            assert self.cache.allocate_for(name, tokens, max_tokens=NUM_BLOCKS * BLOCK)
            self.left[name] = self.random.randint(50, 600)

    def find(self):
        """Grows everybody in turn up to the next append that has to move something; its id is `name`."""
        while True:
            for name in self.turns:
                try:
                    with self.cache.hold():
                        assert self.cache.append_token(name)
                except CacheHeld:
                    self.name, self.before = name, self.cache.used_tokens(name)
                    self.moves = self.cache.stats().moves
                    return
                self.count(name)
            self.fill()
            self.turns = iter(list(self.left))

    def count(self, name):
        self.left[name] -= 1
        if self.left[name] == 0:
            del self.left[name]
            self.cache.free_for(name)

    def append(self):
        self.cache.append_token(self.name)

    def verify(self):
        assert self.cache.used_tokens(self.name) == self.before + 1
        assert self.cache.stats().moves > self.moves
        self.collisions += 1
        self.count(self.name)


class Passes:
    """The crowd of the pass in hand; every pass begins with the same one."""

    def __init__(self, occupancy):
        self.occupancy = occupancy
        self.crowd = None
        self.ends = []

    def prepare(self):
        if self.crowd is None or self.crowd.collisions == COLLISIONS:
            self.finish()
            self.crowd = Crowd(self.occupancy)
        self.crowd.find()

    def append(self):
        self.crowd.append()

    def verify(self):
        self.crowd.verify()

    def finish(self):
        if self.crowd is not None:
            self.crowd.cache.check()
            self.ends.append(self.crowd.cache.stats())
            assert self.ends[-1] == self.ends[0], "the passes were not the same"


@pytest.mark.parametrize("occupancy", [0.9, 0.95])
def test_collision(measure, occupancy):
    passes = Passes(occupancy)
    measure(
        passes.append,
        prepare=passes.prepare,
        verify=passes.verify,
        rounds=COLLISIONS,
        passes=3,
        targets={"median": 1_000, "p99": 20_000},
    )
    passes.finish()
    measure.note(moved_tokens_each=passes.ends[0].moved_tokens / COLLISIONS)
