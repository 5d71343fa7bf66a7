"""A cache as a whole: warm-up, numbers, dumps, closing."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
from observation import dumped, unchanged

from kvcache import CacheClosed, KVCache, KVCacheSpec, LayerSpec, PlaneSpec

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


# ---- numbers


@BOTH
def test_a_new_cache_is_free(make_cache, placement):
    cache = make_cache(placement=placement)
    stats = cache.stats()
    assert (stats.num_sequences, stats.total_blocks, stats.used_blocks, stats.free_blocks) == (0, 16, 0, 16)
    assert (stats.cached_blocks, stats.claimed_blocks, stats.largest_free_run) == (0, 0, 16)
    assert (stats.fragmentation, stats.peak_used_blocks, stats.moves, stats.moved_tokens) == (0.0, 0, 0, 0)
    assert (stats.copied_tokens, stats.arena_copies) == (0, 0)
    assert cache.is_full is False


def test_bytes_used_and_free_sum_to_the_arena(make_cache):
    cache = make_cache()
    for prompt in (5, 1, 17):
        cache.allocate_for(prompt, prompt)
        assert cache.total_allocated + cache.total_free == cache.stats().arena_bytes
    assert cache.total_allocated == 8 * 4 * (2 * 2 * 2 * 4 * 4)
    assert cache.free_tokens == 8 * 4
    assert (cache.stats().allocated_bytes, cache.stats().free_bytes) == (
        cache.total_allocated,
        cache.total_free,
    )


def test_the_guides_example_adds_up():
    spec = KVCacheSpec(32, 32, 64, 32768, 16)
    assert spec.num_blocks == 2048
    assert spec.arena_bytes == 17_179_869_184
    assert spec.block_bytes == 32_768 * 4 * 2 * 32


def test_a_cache_without_storage_may_be_as_large_as_the_guides(make_cache):
    cache = make_cache(32, 32, 64, 32768, 16, backend="none")
    cache.allocate_for("a", 512)
    assert cache.total_allocated == 512 * 32 * 32 * 64 * 2 * 4


def test_fragmentation_is_what_the_largest_run_misses(make_cache):
    cache = make_cache(placement="paged")
    for number in range(16):
        cache.allocate_for(number, 4)
    assert cache.fragmentation == 0.0
    assert cache.is_full is True
    by_place = sorted(cache, key=lambda request_id: cache.block_table(request_id)[0])
    for request_id in (by_place[3], by_place[7], by_place[8]):
        cache.free_for(request_id)
    assert cache.stats().largest_free_run == 2
    assert cache.fragmentation == pytest.approx(1 - 2 / 3)


def test_the_peak_remembers(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 40)
    cache.free_for("a")
    cache.allocate_for("b", 8)
    assert (cache.stats().peak_used_blocks, cache.stats().used_blocks) == (10, 2)


def test_stats_are_equal_while_nothing_changes(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 40)
    before = cache.stats()
    assert cache.allocate_for("b", 40) is None
    assert cache.append_token("a") is False
    cache.get_k_view("a", 0)
    cache.used_tokens("a")
    cache.check()
    assert cache.stats() == before


def test_stats_differ_when_something_has_changed(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 4, max_tokens=12)
    before = cache.stats()
    cache.append_tokens("a", 4)
    assert cache.stats() != before


def test_stats_are_immutable_and_stand_still(make_cache):
    cache = make_cache()
    stats = cache.stats()
    with pytest.raises(AttributeError):
        stats.used_blocks = 7
    cache.allocate_for("a", 4)
    assert stats.used_blocks == 0


# ---- dumps


def test_the_dump_is_that_of_the_guide(make_cache):
    cache = make_cache(2, 3, 8, 64, 4)
    cache.allocate_for("req_001", 6, max_tokens=12)
    cache.allocate_for("req_002", 8)
    start = {request_id: cache.block_table(request_id)[0] for request_id in cache}
    megabytes = cache.stats().total_blocks * cache.stats().arena_bytes // 16 / 1024 / 1024
    used = cache.total_allocated / 1024 / 1024
    expected = [
        "=== KVCache Statistics ===",
        "Configuration:",
        "  Layers: 2, Heads: 3, HeadDim: 8",
        "  BlockSize: 4, TotalBlocks: 16",
        "Allocation State:",
        "  Allocated sequences: 2",
        f"  Total allocated: {used:.2f} MB",
        f"  Total free: {megabytes - used:.2f} MB",
        f"  Fragmentation: {cache.fragmentation:.2f}",
        "Sequences:",
        f"  req_001: 6/12 tokens, blocks [{start['req_001']}, +2]",
        f"  req_002: 8/8 tokens, blocks [{start['req_002']}, +2]",
    ]
    lines = dumped(cache.dump_cache_stats).splitlines()
    assert [line for line in lines if line in expected] == expected


def test_a_dump_of_layers_that_differ_says_mixed(make_cache):
    layers = [LayerSpec((PlaneSpec("k", 2, 8), PlaneSpec("v", 2, 8))), LayerSpec((PlaneSpec("c", 1, 5),))]
    cache = make_cache(KVCacheSpec.from_layers(layers, 64, 4))
    assert "  Layers: 2, Heads: mixed, HeadDim: mixed" in dumped(cache.dump_cache_stats).splitlines()


def test_a_dump_goes_to_standard_output_by_default(make_cache, capsys):
    cache = make_cache()
    cache.dump_cache_stats()
    assert capsys.readouterr().out == dumped(cache.dump_cache_stats)
    cache.dump_block_map()
    assert capsys.readouterr().out == dumped(cache.dump_block_map)


@BOTH
def test_the_block_map_draws_used_and_free(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 12)
    used = set(cache.block_table("a").tolist())
    lines = dumped(cache.dump_block_map, width=5).splitlines()
    assert lines[1:4] == [
        "  Total blocks: 16",
        "  Used: 3 Free: 13",
        f"  Fragmentation: {cache.fragmentation:.2f}",
    ]
    drawn = "".join("X" if block in used else "." for block in range(16))
    assert [line.strip() for line in lines[5:]] == [drawn[:5], drawn[5:10], drawn[10:15], drawn[15:]]


@pytest.mark.parametrize(
    ("width", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), (8.0, TypeError)]
)
def test_the_map_is_at_least_one_block_wide(make_cache, width, error):
    cache = make_cache()
    with pytest.raises(error):
        cache.dump_block_map(io.StringIO(), width=width)


def test_a_file_that_fails_leaves_the_cache_alone(make_cache):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError("disk full")

    cache = make_cache()
    cache.allocate_for("a", 4)
    with unchanged(cache):
        for dump in (cache.dump_block_map, cache.dump_cache_stats):
            with pytest.raises(OSError, match="disk full"):
                dump(Broken())


# ---- warm-up


@pytest.mark.parametrize("backend", ["numpy", "none"])
def test_warm_up_changes_nothing(make_cache, backend):
    cache = make_cache(backend=backend)
    cache.allocate_for("a", 6)
    if backend == "numpy":
        cache.write("a", 0, *[np.full((2, 6, 4), 3, np.float32)] * 2)
    with unchanged(cache):
        assert cache.warmup() is None


# ---- closing


def test_after_closing_free_is_a_no_op_and_close_too(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 4)
    assert cache.close() is None
    assert cache.close() is None
    assert cache.free_for("a") is False
    assert cache.free_for("never seen") is False


CALLS = {
    "allocate_for": lambda cache: cache.allocate_for("b", 1),
    "append_token": lambda cache: cache.append_token("a"),
    "append_tokens": lambda cache: cache.append_tokens("a", 1),
    "truncate": lambda cache: cache.truncate("a", 0),
    "fork": lambda cache: cache.fork("a", "b"),
    "set_limit": lambda cache: cache.set_limit("a", 8),
    "limit": lambda cache: cache.limit("a"),
    "commit": lambda cache: cache.commit("a"),
    "used_tokens": lambda cache: cache.used_tokens("a"),
    "capacity": lambda cache: cache.capacity("a"),
    "is_contiguous": lambda cache: cache.is_contiguous("a"),
    "block_table": lambda cache: cache.block_table("a"),
    "token_offset_in_block": lambda cache: cache.token_offset_in_block("a"),
    "write": lambda cache: cache.write("a", 0, *[np.zeros((2, 1, 4), np.float32)] * 2),
    "get_k_view": lambda cache: cache.get_k_view("a", 0),
    "get_v_view": lambda cache: cache.get_v_view("a", 0),
    "get_kv_views": lambda cache: cache.get_kv_views("a", 0),
    "get_views": lambda cache: cache.get_views("a", 0),
    "batch": lambda cache: cache.batch(["a"]),
    "hold": lambda cache: cache.hold().__enter__(),
    "warmup": lambda cache: cache.warmup(),
    "stats": lambda cache: cache.stats(),
    "check": lambda cache: cache.check(),
    "dump_cache_stats": lambda cache: cache.dump_cache_stats(io.StringIO()),
    "dump_block_map": lambda cache: cache.dump_block_map(io.StringIO()),
    "num_allocated_sequences": lambda cache: cache.num_allocated_sequences,
    "total_allocated": lambda cache: cache.total_allocated,
    "total_free": lambda cache: cache.total_free,
    "free_tokens": lambda cache: cache.free_tokens,
    "fragmentation": lambda cache: cache.fragmentation,
    "is_full": lambda cache: cache.is_full,
    "in": lambda cache: "a" in cache,
    "len": len,
    "iter": list,
}


@BOTH
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_after_closing_everything_else_says_so(make_cache, call, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 4)
    cache.close()
    with pytest.raises(CacheClosed):
        call(cache)


def test_a_batch_of_a_closed_cache_says_so(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 4, max_tokens=8)
    batch = cache.batch(["a"])
    cache.close()
    planes = [np.zeros((1, 2, 4), np.float32)] * 2
    for call in (
        batch.append,
        lambda: batch.truncate(1),
        lambda: batch.add("b"),
        lambda: batch.write(0, *planes),
    ):
        with pytest.raises(CacheClosed):
            call()


def test_a_cache_closes_as_a_context_manager():
    with KVCache(2, 2, 4, 64, 4) as cache:
        cache.allocate_for("a", 4)
        cache.check()
    with pytest.raises(CacheClosed):
        cache.check()


def test_a_cache_closes_when_its_body_raises():
    with pytest.raises(RuntimeError), KVCache(2, 2, 4, 64, 4) as cache:
        raise RuntimeError
    with pytest.raises(CacheClosed):
        cache.check()


def test_views_outlive_a_closed_cache():
    cache = KVCache(2, 2, 4, 64, 4)
    cache.allocate_for("a", 6)
    cache.write("a", 0, *[np.full((2, 6, 4), 5, np.float32)] * 2)
    view = cache.get_k_view("a", 0)
    cache.close()
    assert np.all(view == 5)


def test_a_closed_cache_lets_its_arena_go():
    cache = KVCache(1, 2, 4, 64, 4)
    plane = weakref.ref(cache.arena.k[0])
    cache.close()
    gc.collect()
    assert plane() is None


def test_a_dropped_cache_frees_its_arena():
    cache = KVCache(1, 2, 4, 64, 4)
    cache.allocate_for("a", 6)
    batch = cache.batch(["a"])
    plane = weakref.ref(cache.arena.k[0])
    del cache, batch
    gc.collect()
    assert plane() is None


def test_a_cache_is_not_copied_or_pickled(make_cache):
    cache = make_cache()
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError):
            duplicate(cache)


def test_sequences_give_everything_back_in_any_order(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 6, max_tokens=12)
    cache.fork("a", "b")
    cache.fork("b", "c")
    cache.append_token("c")
    for request_id in ("b", "a", "c"):
        cache.free_for(request_id)
        cache.check()
    stats = cache.stats()
    assert (stats.used_blocks, stats.claimed_blocks, stats.largest_free_run) == (0, 0, 16)
