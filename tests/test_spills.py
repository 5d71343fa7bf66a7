"""A bound on moves: what cannot be placed as one run within it is scattered, and becomes one run again."""

import threading
import time

import numpy as np
import pytest
from hands import HandArena, Hands
from observation import unchanged

import kvcache.cache
from kvcache import CacheHeld


def fill(cache, request_id, start=0, value=None):
    """Rows that say whose they are and where."""
    value = ord(request_id) if value is None else value
    count = cache.used_tokens(request_id) - start
    rows = (value + np.arange(start, start + count) / 256).astype(np.float32)
    rows = np.ascontiguousarray(np.broadcast_to(rows[None, :, None], (2, count, 4)))
    for layer in range(2):
        cache.write(request_id, layer, rows + layer, -rows, start=start)


def holds_its_own(cache, request_id, value=None):
    value = ord(request_id) if value is None else value
    wanted = (value + np.arange(cache.used_tokens(request_id)) / 256).astype(np.float32)
    for layer in range(2):
        k, v = cache.get_kv_views(request_id, layer)
        assert (k == wanted[None, :, None] + layer).all() and (v == -wanted[None, :, None]).all()


def grow(cache, request_id, tokens):
    before = cache.used_tokens(request_id)
    assert cache.append_tokens(request_id, tokens)
    fill(cache, request_id, before)


@pytest.fixture
def crowd(make_cache):
    """16 blocks of 4 tokens; `a` of 6 blocks and `b` of 5 side by side, 5 free ones behind them."""

    def make(bound, **options):
        cache = make_cache(max_move_tokens=bound, overcommit=float("inf"), **options)
        cache.allocate_for("a", 24, max_tokens=24)
        cache.allocate_for("b", 20, max_tokens=20)
        for name in "ab":
            fill(cache, name)
            cache.set_limit(name, 64)
        assert cache.block_table("a").tolist() == [0, 1, 2, 3, 4, 5]
        assert cache.block_table("b").tolist() == [6, 7, 8, 9, 10]
        return cache

    return make


# ---- scattered


def test_growth_that_no_move_within_the_bound_allows_goes_somewhere_else(crowd):
    cache = crowd(19)
    grow(cache, "a", 1)
    assert not cache.is_contiguous("a") and cache.is_contiguous("b")
    assert cache.block_table("a")[:6].tolist() == [0, 1, 2, 3, 4, 5] and cache.block_table("a")[6] > 10
    stats = cache.stats()
    assert (stats.moves, stats.moved_tokens, stats.spills, stats.heals) == (0, 0, 1, 0)
    holds_its_own(cache, "a")


def test_a_move_that_the_bound_just_allows_is_made(crowd):
    cache = crowd(20)
    grow(cache, "a", 1)
    assert cache.is_contiguous("a")
    stats = cache.stats()
    assert (stats.moves, stats.moved_tokens, stats.spills, stats.longest_pause_tokens) == (1, 20, 0, 20)
    assert stats.moved_bytes == 20 * cache.spec.bytes_per_token
    holds_its_own(cache, "a")
    holds_its_own(cache, "b")


def test_views_of_a_scattered_sequence_are_gathered_copies(crowd):
    cache = crowd(0)
    grow(cache, "a", 3)
    view = cache.get_k_view("a", 0)
    assert not any(np.shares_memory(view, plane) for plane in cache.arena.k)
    with pytest.raises(ValueError, match="scattered"):
        cache.get_k_view("a", 0, copy=False)
    assert np.shares_memory(cache.get_k_view("b", 0, copy=False), cache.arena.k[0])


def test_a_scattered_sequence_goes_on_growing_in_its_last_run(crowd):
    cache = crowd(0)
    for _ in range(20):
        grow(cache, "a", 1)
    table = cache.block_table("a").tolist()
    first = table[6]  # anywhere in the gap: what is before it comes last
    assert table[6:] == [*range(first, 16), *range(11, first)]
    assert cache.is_full and cache.stats().spills == (1 if first == 11 else 2)
    holds_its_own(cache, "a")
    assert cache.append_token("a") is False


def test_writes_reach_every_run_of_a_scattered_sequence(crowd):
    cache = crowd(0)
    grow(cache, "a", 9)
    fill(cache, "a", value=7)
    holds_its_own(cache, "a", value=7)
    holds_its_own(cache, "b")


def test_a_newcomer_that_fits_in_no_gap_is_scattered(make_cache):
    cache = make_cache(max_move_tokens=3)
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    grant = cache.allocate_for("a", 21)
    assert grant and not cache.is_contiguous("a")
    assert sorted(cache.block_table("a").tolist()) == sorted(set(cache.block_table("a").tolist()))
    fill(cache, "a")
    holds_its_own(cache, "a")
    assert cache.stats().spills == 1 and cache.stats().moves == 0


def test_a_fork_of_a_scattered_sequence_has_its_contents(crowd):
    cache = crowd(0)
    grow(cache, "a", 3)
    cache.free_for("b")
    child = cache.fork("a", "c")
    assert child.tokens == child.cached_tokens == 27
    grow(cache, "a", 2)
    holds_its_own(cache, "c", ord("a"))


def test_a_fork_that_fits_in_no_gap_is_scattered(make_cache):
    cache = make_cache(max_move_tokens=0, overcommit=float("inf"))
    cache.allocate_for("a", 20)
    fill(cache, "a")
    for number in range(11):
        cache.allocate_for(number, 4)
    for number in range(0, 11, 2):
        cache.free_for(number)
    assert cache.fork("a", "b") and not cache.is_contiguous("b")
    holds_its_own(cache, "b", ord("a"))
    assert cache.stats().copied_tokens == 20


def test_a_cut_takes_further_runs_away(crowd):
    cache = crowd(0)
    grow(cache, "a", 9)
    free = cache.stats().free_blocks
    assert cache.truncate("a", 26) and cache.stats().free_blocks == free + 2
    holds_its_own(cache, "a")
    assert cache.truncate("a", 22) and cache.is_contiguous("a")
    assert cache.stats().heals == 0  # no move has done it
    holds_its_own(cache, "a")
    assert cache.truncate("a", 0) and cache.capacity("a") == 0


def test_a_sequence_of_very_many_runs_is_written_and_read_in_all_of_them(make_cache):
    cache = make_cache(1, 1, 1, 128_000, 1, max_move_tokens=0, overcommit=float("inf"))
    for number in range(128_000):
        cache.allocate_for(number, 1)
    for number in range(0, 128_000, 2):
        cache.free_for(number)
    rows = np.arange(32_000, dtype=np.float32).reshape(1, -1, 1)
    assert cache.allocate_for("a", 32_000)
    cache.write("a", 0, rows, rows)
    assert np.array_equal(cache.get_k_view("a", 0), rows)
    assert np.array_equal(cache.batch(["a"]).block_tables[0], cache.block_table("a"))


def test_freeing_a_scattered_sequence_gives_all_its_blocks_back(crowd):
    cache = crowd(0)
    grow(cache, "a", 9)
    cache.free_for("a")
    assert cache.stats().free_blocks == 11


def test_nothing_is_refused_while_the_total_fits(make_cache):
    cache = make_cache(max_move_tokens=0, overcommit=float("inf"))
    for name in "abcd":
        cache.allocate_for(name, 1, max_tokens=64)
    for step in range(15):
        for name in "abcd":
            assert cache.append_token(name), (step, name)
    for name in "abcd":
        fill(cache, name)
    for name in "abcd":
        holds_its_own(cache, name)


# ---- one run again


def test_a_scattered_sequence_becomes_one_run_when_its_neighbour_has_left(crowd):
    cache = crowd(8)
    grow(cache, "a", 5)
    cache.free_for("b")
    grow(cache, "a", 3)
    assert not cache.is_contiguous("a")  # it has looked at no block since
    grow(cache, "a", 1)
    assert cache.is_contiguous("a")
    stats = cache.stats()
    assert (stats.heals, stats.moved_tokens) == (1, 8)
    holds_its_own(cache, "a")


def test_a_short_first_run_joins_the_longer_one(make_cache):
    cache = make_cache(max_move_tokens=4, overcommit=float("inf"))
    cache.allocate_for("a", 4, max_tokens=4)
    for number, tokens in enumerate([8, 8, 4, 8, 8, 8, 8, 8]):
        cache.allocate_for(number, tokens)
    assert cache.is_full and cache.block_table(2).tolist() == [5]
    fill(cache, "a")
    cache.set_limit("a", 64)
    cache.free_for(2)
    grow(cache, "a", 4)
    assert cache.block_table("a").tolist() == [0, 5]
    cache.free_for(1)
    cache.free_for(3)
    grow(cache, "a", 4)
    assert cache.block_table("a").tolist() == [4, 5, 6]
    assert (cache.stats().moved_tokens, cache.stats().heals) == (4, 1)
    holds_its_own(cache, "a")


# ---- batches, threads, failures


def test_a_step_of_a_batch_moves_no_more_than_the_bound_in_all(make_cache):
    cache = make_cache(2, 2, 4, 512, 4, max_move_tokens=24, overcommit=float("inf"))
    names = "abcdefghijklmnop"
    for name in names:
        cache.allocate_for(name, 20, max_tokens=20)
    for name in names:
        fill(cache, name)
        cache.set_limit(name, 512)
    batch = cache.batch(names)
    for _ in range(10):
        before = cache.stats().moved_tokens
        assert batch.append().all()
        assert cache.stats().moved_tokens - before <= 24
        for name in names:
            fill(cache, name, cache.used_tokens(name) - 1)
        starts = [-1 if not cache.is_contiguous(n) else cache.block_table(n)[0] * 4 for n in names]
        assert batch.starts.tolist() == starts
        tables = [cache.block_table(name) for name in names]
        tokens = [cache.used_tokens(name) - 1 for name in names]
        assert batch.slots.tolist() == [t[n // 4] * 4 + n % 4 for t, n in zip(tables, tokens, strict=True)]
    for name in names:
        holds_its_own(cache, name)
    assert cache.stats().spills > 0 and cache.stats().longest_pause_tokens <= 24


def test_a_batch_writes_into_further_runs(crowd):
    cache = crowd(0)
    batch = cache.batch("ab")
    batch.append(counts=[6, 3])
    rows = np.arange(9, dtype=np.float32)[:, None, None] * np.ones((1, 2, 4), np.float32)
    for layer in range(2):
        batch.write(layer, rows, -rows)
    assert cache.get_k_view("a", 1)[0, 24:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert cache.get_v_view("b", 0)[1, 20:, 3].tolist() == [-6, -7, -8]


def test_under_a_hold_a_bound_of_nothing_waits_for_nothing(crowd):
    cache = crowd(0)
    with cache.hold():
        assert cache.append_token("a") and not cache.is_contiguous("a")


def test_under_a_hold_a_move_within_the_bound_waits(crowd):
    cache = crowd(100)
    with cache.hold(), unchanged(cache):
        pytest.raises(CacheHeld, cache.append_token, "a")


def test_each_of_the_calls_that_a_hold_kept_waiting_may_move_up_to_the_bound(make_cache):
    cache = make_cache(max_move_tokens=4, overcommit=float("inf"))
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    with cache.hold():
        calls = [threading.Thread(target=cache.allocate_for, args=(name, 8), daemon=True) for name in "abc"]
        for call in calls:
            call.start()
        time.sleep(0.2)
        assert not any(name in cache for name in "abc")
    for call in calls:
        call.join(20)
    assert all(cache.is_contiguous(name) for name in "abc")
    assert (cache.stats().moved_tokens, cache.stats().longest_pause_tokens) == (12, 4)


def test_every_run_of_a_scattered_sequence_waits_for_a_hold_to_end(make_cache):
    cache = make_cache(1, 1, 4, 16384, 4, backend="none", max_move_tokens=0, overcommit=float("inf"))
    for number in range(4096):
        cache.allocate_for(number, 4)
    for number in range(0, 4096, 2):
        cache.free_for(number)
    for name in "ab":
        assert cache.allocate_for(name, 4000) and not cache.is_contiguous(name)
    with cache.hold():
        assert cache.truncate("a", 4) and cache.free_for("b")
        assert cache.stats().free_blocks == 48
        cache.check()
    assert cache.stats().free_blocks == 2047


def test_an_arena_that_fails_while_runs_are_joined_leaves_them_as_they_were(monkeypatch, make_cache):
    class Broken(Hands):
        def move(self, moves):
            raise OSError("no memory for a temporary")

    monkeypatch.setattr(kvcache.cache, "make_arena", lambda spec, backend, stream: HandArena(spec, Broken))
    cache = make_cache(max_move_tokens=8, overcommit=float("inf"))
    cache.allocate_for("a", 24, max_tokens=24)
    cache.allocate_for("b", 20, max_tokens=20)
    cache.set_limit("a", 64)
    cache.append_tokens("a", 8)
    cache.free_for("b")
    with unchanged(cache), pytest.raises(OSError, match="temporary"):
        cache.append_token("a")
    with unchanged(cache), pytest.raises(OSError, match="temporary"):
        cache.compact()


@pytest.mark.parametrize("bound", [-1, -(2**70)])
def test_a_bound_below_zero_is_refused(make_cache, bound):
    with pytest.raises(ValueError, match="max_move_tokens must be at least 0"):
        make_cache(max_move_tokens=bound)


@pytest.mark.parametrize("bound", [True, 1.5, "8"])
def test_a_bound_that_is_no_int_is_refused(make_cache, bound):
    with pytest.raises(TypeError, match="max_move_tokens must be an int"):
        make_cache(max_move_tokens=bound)


def test_a_bound_beyond_every_arena_is_none_in_effect(make_cache):
    cache = make_cache(max_move_tokens=2**70)
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    assert cache.allocate_for("a", 32) and cache.is_contiguous("a")
