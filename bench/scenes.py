"""The states that benchmarks begin in: pools that have been lived in, combs, batches that turn over.

Everything here is drawn with a fixed seed, so that every pass and every machine meets the same sequences.
"""

import math
import random

import numpy as np

from kvcache import KVCache

BLOCK = 16
PROMPT = (64, 2048)  # tokens


def books(num_blocks, placement, overcommit=math.inf, **options):
    """A cache without storage: what is measured is the bookkeeping alone."""
    options |= {"backend": "none", "placement": placement, "overcommit": overcommit}
    return KVCache(1, 1, 1, num_blocks * BLOCK, BLOCK, **options)


def blocks_of(tokens):
    return -(-tokens // BLOCK)


class Population:
    """Prompts by id, so many that they fill `occupancy` of a pool, and scripts in which they replace each other."""

    def __init__(self, num_blocks, occupancy=0.75, seed=0):
        self.random = random.Random(num_blocks + seed)
        self.least, self.most = int((occupancy - 0.04) * num_blocks), int((occupancy + 0.04) * num_blocks)
        self.tokens = {}  # id -> prompt
        self.names = 0
        used = 0
        while used < occupancy * num_blocks - 64:
            name, tokens = self.name(), self.random.randint(*PROMPT)
            self.tokens[name] = tokens
            used += blocks_of(tokens)

    @property
    def used(self):
        """Blocks."""
        return sum(map(blocks_of, self.tokens.values()))

    def name(self):
        self.names += 1
        name = f"request-{self.names}"
        hash(name)  # whoever calls has looked it up before
        return name

    def script(self, count):
        """`count` exchanges (victim, newcomer, tokens) that keep the occupancy; the caller makes them."""
        live, used, exchanges = list(self.tokens), self.used, []
        for _ in range(count):
            place = self.random.randrange(len(live))
            victim = live[place]
            used -= blocks_of(self.tokens.pop(victim))
            tokens = self.random.randint(*PROMPT)
            while not self.least <= used + blocks_of(tokens) <= self.most:
                tokens = self.random.randint(*PROMPT)
            newcomer = self.name()
            live[place], self.tokens[newcomer] = newcomer, tokens
            used += blocks_of(tokens)
            exchanges.append((victim, newcomer, tokens))
        return exchanges


class LivedIn(Population):
    """A pool in which every sequence has been replaced several times, in random order."""

    def __init__(self, num_blocks, placement, generations=4):
        super().__init__(num_blocks)
        self.cache = books(num_blocks, placement)
        for name, tokens in self.tokens.items():
            assert self.cache.allocate_for(name, tokens)
        for _ in range(generations):
            for victim, newcomer, tokens in self.script(len(self.tokens)):
                assert self.cache.free_for(victim)
                assert self.cache.allocate_for(newcomer, tokens)

    @property
    def held(self):
        """Blocks that the cache says are held."""
        return self.cache.spec.num_blocks - self.cache.free_blocks

    def check(self):
        assert len(self.cache) == len(self.tokens)
        assert self.held == self.used


def comb(num_blocks, placement):
    """Every second block is a live sequence's, every other one is free."""
    cache = books(num_blocks, placement)
    for number in range(num_blocks):
        assert cache.allocate_for(number, BLOCK)
    for number in range(0, num_blocks, 2):
        assert cache.free_for(number)
    return cache


class Turnover:
    """1,024 sequences decode in a pool kept 95 % full; in each step 0.5 % have ended and are replaced.

    With `known` limits a sequence ends at its limit, which the pool has been told; else it could go on.
    """

    MEMBERS = 1024
    NUM_BLOCKS = 65_536
    OCCUPANCY = 0.95
    LIFE = (100, 310)  # tokens that a sequence generates: 205 on average, so that 0.5 % end in each step
    ENDLESS = 100_000

    def __init__(self, placement, known):
        self.random = random.Random(7)
        self.cache = books(self.NUM_BLOCKS, placement)
        self.known = known
        self.step, self.names, self.attended, self.ends = 0, 0, 0, {}
        members = []
        for number in range(self.MEMBERS):
            life = self.random.randint(*self.LIFE)
            members.append(self.admit(self.MEMBERS - number, self.random.randint(1, life)))
        self.batch = self.cache.batch(members)
        self.lengths = np.array([self.cache.used_tokens(member) for member in members])

    def admit(self, missing, life):
        """One of `missing` newcomers that together fill the pool up again."""
        spare = self.OCCUPANCY * self.NUM_BLOCKS - (self.NUM_BLOCKS - self.cache.free_blocks)
        tokens = int(spare / missing * BLOCK * self.random.uniform(0.3, 1.7))
        tokens = min(max(tokens, PROMPT[0]), PROMPT[1])
        name, self.names = f"request-{self.names}", self.names + 1
        assert self.cache.allocate_for(name, tokens, max_tokens=tokens + life if self.known else self.ENDLESS)
        self.ends.setdefault(self.step + life, []).append(name)
        return name

    def leave(self):
        """Takes those out that have ended."""
        self.gone = self.ends.pop(self.step, [])
        for name in self.gone:
            self.batch.remove(name)
            self.cache.free_for(name)

    def enter(self):
        """Puts as many newcomers in."""
        for number in range(len(self.gone)):
            self.batch.add(self.admit(len(self.gone) - number, self.random.randint(*self.LIFE)))

    def turn_over(self):
        self.leave()
        self.enter()
        self.lengths = self.batch.lengths + 1  # a copy: what they have to be after the next append

    def decode(self):
        batch = self.batch
        self.got = batch.append()
        self.slots, self.after, self.starts = batch.slots, batch.lengths, batch.starts

    def check_step(self):
        assert self.got.all() and len(self.got) == self.MEMBERS
        assert np.array_equal(self.after, self.lengths)
        if self.cache.placement == "contiguous":
            assert np.array_equal(self.slots, self.starts + self.lengths - 1)
        else:
            assert np.array_equal(self.slots % BLOCK, (self.lengths - 1) % BLOCK)
        self.attended += int(self.lengths.sum())
        self.step += 1
