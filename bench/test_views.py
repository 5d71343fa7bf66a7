"""A view of a sequence's K or V, beside a plain slice of the same array."""

import importlib.util

import pytest

from kvcache import KVCache

pytestmark = pytest.mark.benchmark(group="a view")

LAYERS, HEADS, HEAD_DIM, TOKENS, LAYER, CALLS = 4, 8, 64, 500, 1, 500


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@pytest.mark.parametrize("call", ["get_k_view", "get_kv_views"])
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_view(measure, placement, backend, call):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"needs {backend}")
    cache = KVCache(LAYERS, HEADS, HEAD_DIM, 65_536, backend=backend, placement=placement)
    assert cache.allocate_for("before", 100) and cache.allocate_for("request", TOKENS, max_tokens=1000)
    plane = cache.arena.k[LAYER]
    view_of = getattr(cache, call)
    first = int(cache.block_table("request")[0]) * cache.spec.block_size
    views = []

    def take_views():
        views[:] = [view_of("request", LAYER) for _ in range(CALLS)]

    def take_slices():
        views[:] = [plane[:, first : first + TOKENS] for _ in range(CALLS)]

    def one_slice():
        return plane[:, first : first + TOKENS]

    def verify():
        last = views[-1][0] if call == "get_kv_views" else views[-1]
        assert len(views) == CALLS and last.shape == (HEADS, TOKENS, HEAD_DIM)
        assert addresses_agree(last, one_slice())
        views.clear()

    targets = {"median": 500} if backend == "numpy" and call == "get_k_view" else None
    measure(
        take_views,
        verify=verify,
        calls=CALLS,
        turns=CALLS,
        rounds=100,
        floor=("plain slice", take_slices),
        targets=targets,
    )
    cache.check()


def addresses_agree(one, other):
    import numpy as np

    one, other = np.asarray(one), np.asarray(other)
    return one.ctypes.data == other.ctypes.data and one.strides == other.strides
