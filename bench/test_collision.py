"""An append whose next block is taken, a newcomer that fits in no gap: what moves is chosen, and entered in the books.

No bytes are moved.
"""

import random

import pytest
from scenes import BLOCK, books

from kvcache import CacheHeld

pytestmark = pytest.mark.benchmark(group="a collision")

NUM_BLOCKS, SEQUENCES = 65_536, 256


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


class Doorway(Crowd):
    """The same crowd, and newcomers that fit in no gap: one for every few that leave."""

    def find(self):
        while True:
            for name in self.random.sample(list(self.left), 3):
                del self.left[name]
                self.cache.free_for(name)
            for name in list(self.left):
                self.cache.append_tokens(name, 4)
            while len(self.left) < SEQUENCES:
                if not self.enters():
                    return

    def enters(self):
        """Admits the next one if nothing has to move for it; else it is `name`, of `before` tokens."""
        spare = self.occupancy * NUM_BLOCKS - (NUM_BLOCKS - self.cache.free_blocks)
        share = spare / (SEQUENCES - len(self.left)) * BLOCK
        self.name, self.names = f"request-{self.names}", self.names + 1
        self.before = max(BLOCK, int(share * self.random.uniform(0.5, 1.0)))
        self.moves = self.cache.stats().moves
        try:
            with self.cache.hold():
                self.append()
        except CacheHeld:
            return False
        self.left[self.name] = 0
        return True

    def append(self):
        self.cache.allocate_for(self.name, self.before, max_tokens=NUM_BLOCKS * BLOCK)

    def verify(self):
        assert self.cache.used_tokens(self.name) == self.before
        assert self.cache.stats().moves > self.moves
        self.left[self.name] = 0
        self.collisions += 1


class Passes:
    """The crowd of the pass in hand; every pass begins with the same one."""

    def __init__(self, kind, occupancy, rounds):
        self.kind, self.occupancy, self.rounds = kind, occupancy, rounds
        self.crowd = None
        self.ends = []

    def prepare(self):
        if self.crowd is None or self.crowd.collisions == self.rounds:
            self.finish()
            self.crowd = self.kind(self.occupancy)
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


def measure_collisions(measure, kind, occupancy, rounds):
    passes = Passes(kind, occupancy, rounds)
    measure(
        passes.append,
        prepare=passes.prepare,
        verify=passes.verify,
        rounds=rounds,
        passes=3,
        targets={"p99": 20_000} if kind is Doorway else {"median": 1_000, "p99": 20_000},
    )
    passes.finish()
    measure.note(moved_tokens_each=passes.ends[0].moved_tokens / rounds)


@pytest.mark.parametrize("occupancy", [0.9, 0.95])
def test_growth(measure, occupancy):
    measure_collisions(measure, Crowd, occupancy, rounds=1024)


@pytest.mark.parametrize("occupancy", [0.9, 0.95])
def test_newcomer(measure, occupancy):
    measure_collisions(measure, Doorway, occupancy, rounds=256)
