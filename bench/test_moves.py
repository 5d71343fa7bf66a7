"""Bytes that move: a run of a sequence, or all of an arena, beside a plain copy of as many bytes.

The planes together are far larger than the processor's caches, as those of a model are.
"""

import random

import numpy as np
import pytest
from scenes import BLOCK, blocks_of

from kvcache import KVCache
from kvcache.memory import available_memory

pytestmark = pytest.mark.benchmark(group="moving a run of 1,008 tokens")

LAYERS, HEADS, HEAD_DIM, BLOCKS = 16, 8, 128, 63
COMPACTIONS = 12


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@pytest.mark.parametrize("distance", ["far", "one_block"])
def test_move(measure, distance):
    cache = KVCache(LAYERS, HEADS, HEAD_DIM, 2 * (BLOCKS + 1) * 16)
    cache.warmup()
    steps = BLOCKS if distance == "far" else 1
    planes = [plane for layer in cache.arena.planes for plane in layer.values()]
    run, size = BLOCKS * 16, BLOCKS * 16 * HEADS * HEAD_DIM * 4 * len(planes)
    source, copy = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    rng = np.random.default_rng(1)
    content = rng.standard_normal((HEADS, run, HEAD_DIM), np.float32)

    def prepare():
        for number, plane in enumerate(planes):
            plane[:] = 0
            plane[:, :run] = content + number

    def move():
        cache.arena.copier.move([(0, steps, BLOCKS)])

    def verify():
        for number, plane in enumerate(planes):
            assert np.array_equal(plane[:, steps * 16 : steps * 16 + run], content + number)

    measure(move, prepare=prepare, verify=verify, rounds=8, floor=("memcpy", lambda: np.copyto(copy, source)))
    info = measure.benchmark.extra_info
    if info.get("least_ns"):
        measure.note(
            gigabytes_a_second=size / info["least_ns"], memcpy_gigabytes_a_second=size / info["floor_ns"]
        )


class Gappy:
    """An arena of 2 GiB, of Llama-3.2-1B's shape, in which a share of the sequences that filled it has ended."""

    LAYERS, HEADS, HEAD_DIM, TOKENS = 16, 8, 64, 32_768
    PROMPT = (16, 400)  # tokens

    def __init__(self, ended):
        self.cache = KVCache(self.LAYERS, self.HEADS, self.HEAD_DIM, self.TOKENS)
        self.planes = [plane for layer in self.cache.arena.planes for plane in layer.values()]
        draw = random.Random(5)
        self.prompts, left = [], self.TOKENS // BLOCK
        while left:
            self.prompts.append(min(draw.randint(*self.PROMPT), left * BLOCK))
            left -= blocks_of(self.prompts[-1])
        self.ended = draw.sample(range(len(self.prompts)), int(ended * len(self.prompts)))
        self.content = np.random.default_rng(5).standard_normal(self.planes[0].shape, np.float32)

    def fill(self):
        for number in list(self.cache):
            self.cache.free_for(number)
        for number, tokens in enumerate(self.prompts):
            assert self.cache.allocate_for(number, tokens)
        for number in self.ended:
            assert self.cache.free_for(number)
        for number, plane in enumerate(self.planes):
            np.add(self.content, number, out=plane)
        self.before = self.starts()

    def starts(self):
        return {number: int(self.cache.block_table(number)[0]) for number in self.cache}

    def moved_bytes(self):
        """As a cache without storage does it, to which the same happens."""
        books = KVCache(1, 1, 1, self.TOKENS, backend="none")
        for number, tokens in enumerate(self.prompts):
            books.allocate_for(number, tokens)
        for number in self.ended:
            books.free_for(number)
        return books.compact() * self.cache.spec.bytes_per_token

    def verify(self):
        """Everybody side by side, and every token where it now has to be."""
        after = self.starts()
        assert sum(blocks_of(self.prompts[number]) for number in after) == 1 + max(
            start + blocks_of(self.prompts[number]) - 1 for number, start in after.items()
        )
        for index, plane in enumerate(self.planes):
            for number, start in after.items():
                tokens, old, new = self.prompts[number], self.before[number] * BLOCK, start * BLOCK
                expected = self.content[:, old : old + tokens] + np.float32(index)
                assert np.array_equal(plane[:, new : new + tokens], expected)


@pytest.mark.benchmark(group="compacting an arena of 2 GiB")
@pytest.mark.parametrize("ended", ["half", "tenth"])
def test_compact(measure, ended):
    needed = 5 << 30  # the arena, and a plain copy of what moves
    if available_memory() < needed:
        pytest.skip(f"{needed >> 30} GiB are needed, {available_memory() / 2**30:.1f} are available")
    scene = Gappy({"half": 0.5, "tenth": 0.1}[ended])
    size = scene.moved_bytes()
    source, copy = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    measure(
        scene.cache.compact,
        prepare=scene.fill,
        verify=scene.verify,
        rounds=COMPACTIONS,
        floor=("memcpy", lambda: np.copyto(copy, source)),
    )
    assert scene.cache.stats().moved_bytes >= COMPACTIONS * size
    info = measure.benchmark.extra_info
    if "units" in info:
        measure.note(
            memcpy=(info["units"], 2), gigabytes=size / 1e9, gigabytes_a_second=size / info["least_ns"]
        )
