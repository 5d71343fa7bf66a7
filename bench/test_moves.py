"""Bytes that move: a run of a sequence in every layer and plane, beside a plain copy of as many bytes.

The planes together are far larger than the processor's caches, as those of a model are.
"""

import numpy as np
import pytest

from kvcache import KVCache

pytestmark = pytest.mark.benchmark(group="moving a run of 1,008 tokens")

LAYERS, HEADS, HEAD_DIM, BLOCKS = 16, 8, 128, 63


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
