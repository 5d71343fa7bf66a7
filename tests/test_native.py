"""What native engines cimport works from OS threads that hold no GIL, and from several at once."""

import sys

import numpy as np
import pytest
from compiled import compiled

from kvcache import KVCache

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return compiled("engine", tmp_path_factory.mktemp("engine"))


@BOTH
def test_os_threads_append_to_their_sequences_without_the_gil(engine, placement):
    with KVCache(1, 1, 4, 64 * 400, block_size=4, backend="none", placement=placement) as cache:
        names = [f"r{number}" for number in range(8)]
        for name in names:
            cache.allocate_for(name, 3, max_tokens=3000)
        assert engine.append_from_threads(cache, names, 2997) == [(2997, 0)] * 8
        assert engine.append_from_threads(cache, names, 5) == [(0, 5)] * 8
        assert [cache.used_tokens(name) for name in names] == [3000] * 8
        cache.check()


def test_threads_without_the_gil_move_the_bytes_of_their_sequences(engine):
    with KVCache(2, 2, 4, 480, block_size=4, overcommit=8.0) as cache:
        names = [f"r{number}" for number in range(6)]
        rows = {}
        for number, name in enumerate(names):
            cache.allocate_for(name, 5, max_tokens=480)
            rows[name] = np.arange(number * 100, number * 100 + 40, dtype="float32").reshape(2, 5, 4)
            for layer in range(2):
                cache.write(name, layer, rows[name], -rows[name])
        outcome = engine.append_from_threads(cache, names, 95)
        for name, (granted, _) in zip(names, outcome, strict=True):
            assert cache.used_tokens(name) == 5 + granted
            for layer in range(2):
                k, v = cache.get_kv_views(name, layer)
                assert np.array_equal(k[:, :5], rows[name])
                assert np.array_equal(v[:, :5], -rows[name])
        assert cache.stats().moves > 0
        cache.check()


def test_native_threads_leave_no_block_behind_beside_a_python_thread(engine):
    with KVCache(1, 1, 4, 512, block_size=4, backend="none") as cache:
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        try:
            outcome = engine.live_and_die_in_threads(cache, 4, 3000)
        finally:
            sys.setswitchinterval(interval)
        assert all(done + refused == 3000 for done, refused in outcome)
        assert sum(done for done, _ in outcome) > 0
        assert cache.stats().free_blocks == 128
        cache.check()


@BOTH
def test_counts_that_cannot_be_meant_are_refused_before_anything_changes(engine, placement):
    with KVCache(
        1, 1, 4, 64, block_size=4, backend="none", placement=placement, overcommit=float("inf")
    ) as cache:
        cache.allocate_for("a", 5, max_tokens=20)
        before = cache.stats()
        found, bad_count = engine.statuses_of_bad_counts(cache, "a")
        assert all(set(statuses) == {bad_count} for statuses in found.values())
        assert (cache.used_tokens("a"), cache.limit("a"), cache.stats()) == (5, 20, before)
        cache.check()


@BOTH
def test_native_threads_admit_a_prompt_by_its_ids_and_find_it_again(engine, placement):
    with KVCache(1, 1, 4, 512, block_size=4, backend="none", placement=placement) as cache:
        prompt = [number % 3 for number in range(25)]
        assert cache.probe(prompt) == 0
        outcome = engine.admit_ids_in_threads(cache, 4, 500)
        assert all(found % 20 == 0 and found > 0 for found, _ in outcome)
        stats = cache.stats()
        assert stats.hit_tokens == sum(found for found, _ in outcome)
        assert (stats.used_blocks, stats.queries) == (0, 2000 - sum(refused for _, refused in outcome))
        assert cache.probe(prompt) == 24
        cache.check()
