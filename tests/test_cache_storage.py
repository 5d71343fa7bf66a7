"""Steps neither copy nor move the arena's arrays, on any backend, and threads that admit do not disturb a step."""

import threading

import numpy as np
import pytest

import kvcache.cache
from kvcache import KVCache
from kvcache.arena import MlxArena

mx = pytest.importorskip("mlx.core")

HEADS, WIDTH, LAYERS = 2, 8, 2


def arrays(cache):
    return [np.asarray(memoryview(plane)) for planes in cache.arena.planes for plane in planes.values()]


def addresses(cache):
    return [array.__array_interface__["data"][0] for array in arrays(cache)]


def rows(backend, count, value):
    array = np.broadcast_to(np.arange(count, dtype="float32")[:, None, None] + value, (count, HEADS, WIDTH))
    return mx.array(array) if backend == "mlx" else np.ascontiguousarray(array)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_a_thousand_steps_of_32_sequences_leave_the_arrays_where_they_were(backend, placement):
    with KVCache(LAYERS, HEADS, WIDTH, 32 * 1024, backend=backend, placement=placement) as cache:
        names = list(range(32))
        for name in names:
            assert cache.allocate_for(name, 1, max_tokens=1024)
        before, batch = addresses(cache), cache.batch(names)
        for step in range(1000):
            assert batch.append().all()
            for layer in range(LAYERS):
                k = rows(backend, 32, step + 100 * layer)
                batch.write(layer, k, -k)
        assert addresses(cache) == before
        assert cache.stats().arena_copies == 0
        for name in names:
            for layer in range(LAYERS):
                k, v = (np.array(view) for view in cache.get_kv_views(name, layer))
                want = np.arange(1000, dtype="float32")[None, :, None] + name + 100 * layer
                assert (k[:, 1:] == want).all()
                assert (v[:, 1:] == -want).all()
        cache.check()


def test_numpy_views_share_the_arenas_memory(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 5, max_tokens=16)
    for layer in range(2):
        for view, plane in zip(cache.get_views("a", layer), cache.arena.planes[layer].values(), strict=True):
            assert np.shares_memory(view, plane)


def test_peak_mlx_memory_grows_by_no_more_than_attention_needs():
    with KVCache(LAYERS, HEADS, WIDTH, 32 * 1024, backend="mlx") as cache:
        names = list(range(32))
        for name in names:
            cache.allocate_for(name, 900, max_tokens=1024)
        batch, query = cache.batch(names), mx.ones((1, HEADS, 1, WIDTH))
        mx.eval(query)
        mx.reset_peak_memory()
        base = cache.stats().mlx_active_bytes
        for _ in range(100):
            batch.append()
            for layer in range(LAYERS):
                k = rows("mlx", 32, 1.0)
                batch.write(layer, k, k)
                views = [cache.get_kv_views(name, layer) for name in names]
                out = [
                    mx.fast.scaled_dot_product_attention(query, k[None], v[None], scale=1.0) for k, v in views
                ]
                mx.eval(out)
        one_view = HEADS * 1024 * WIDTH * 4
        assert cache.stats().mlx_peak_bytes - base < 8 * one_view < cache.spec.arena_bytes / 8
        assert cache.stats().arena_copies == 0
        cache.check()


def test_a_lost_donation_shows_in_the_stats(monkeypatch):
    def by_graph(spec, backend, stream):
        return MlxArena(spec, stream, writes="graph")

    monkeypatch.setattr(kvcache.cache, "make_arena", by_graph)
    with KVCache(LAYERS, HEADS, WIDTH, 256, backend="mlx") as cache:
        cache.allocate_for("a", 20, max_tokens=64)
        batch = cache.batch(["a"])
        for _ in range(3):
            batch.append()
            batch.write(0, rows("mlx", 1, 1.0), rows("mlx", 1, 2.0))
        assert cache.stats().arena_copies == 0
        kept = cache.get_k_view("a", 0)
        mx.eval(kept)
        batch.append()
        batch.write(0, rows("mlx", 1, 3.0), rows("mlx", 1, 4.0))
        mx.synchronize()
        del kept
        assert cache.stats().arena_copies == 1
        cache.check()


class Neighbour(threading.Thread):
    """Admits, grows and ends sequences beside the engine, so that the engine's own ones have to move."""

    def __init__(self, cache):
        super().__init__(daemon=True)
        self.cache, self.stop, self.error = cache, threading.Event(), None

    def run(self):
        number = 0
        try:
            while not self.stop.is_set():
                name = ("beside", number)
                if self.cache.allocate_for(name, 1 + number * 7 % 60, max_tokens=100):
                    self.cache.append_tokens(name, number % 17)
                    self.cache.free_for(("beside", number - 2))
                number += 1
        except BaseException as error:
            self.error = error
            raise


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_a_step_reads_its_own_tokens_while_another_thread_admits(backend, placement):
    names = list(range(4))
    with KVCache(LAYERS, HEADS, WIDTH, 1600, backend=backend, placement=placement, overcommit=4.0) as cache:
        for name in names:
            cache.allocate_for(name, 1, max_tokens=200)
        batch, beside, written = cache.batch(names), Neighbour(cache), {name: [] for name in names}
        beside.start()
        try:
            for step in range(190):
                got = batch.append()
                with cache.hold():
                    k = rows(backend, 4, step)
                    sums = []
                    for layer in range(LAYERS):
                        batch.write(layer, k, -k)
                        sums += [view.sum() for name in names for view in cache.get_kv_views(name, layer)]
                    if backend == "mlx":
                        mx.eval(sums)
                for name in names:
                    written[name] += [step + name] if got[name] else []
                want = [HEADS * WIDTH * sum(written[name]) for name in names]
                assert [float(each) for each in sums] == [
                    sign * each for _ in range(LAYERS) for each in want for sign in (1, -1)
                ]
        finally:
            beside.stop.set()
            beside.join(30)
        assert beside.error is None
        if placement == "contiguous":
            assert cache.stats().moves > 0
        cache.check()
