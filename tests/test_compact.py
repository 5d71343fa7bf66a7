"""`compact`: everything side by side, or what a budget of tokens does best."""

import numpy as np
import pytest
from observation import unchanged
from test_spills import fill, grow, holds_its_own

from kvcache import CacheHeld


def comb(make_cache, lengths, **options):
    """Runs of so many blocks of 4 tokens with a free block after each, in an arena of 64."""
    cache = make_cache(2, 2, 4, 256, 4, overcommit=float("inf"), **options)
    for number, blocks in enumerate(lengths):
        cache.allocate_for(chr(97 + number), 4 * blocks, max_tokens=4 * blocks)
        cache.allocate_for(number, 4)
    for number in range(len(lengths)):
        fill(cache, chr(97 + number))
        cache.free_for(number)
    return cache


def test_everything_is_packed_to_the_left(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2])
    assert cache.compact() == (1 + 5 + 2) * 4
    assert [cache.block_table(name)[0] for name in "abcd"] == [0, 3, 4, 9]
    stats = cache.stats()
    assert (stats.fragmentation, stats.largest_free_run, stats.moves) == (0.0, 53, 3)
    for name in "abcd":
        holds_its_own(cache, name)


def test_a_packed_pool_is_left_alone(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2])
    cache.compact()
    with unchanged(cache):
        assert cache.compact() == 0
        assert cache.compact(1000) == 0


def test_an_empty_pool_and_a_full_one_have_nothing_to_move(make_cache):
    cache = make_cache()
    assert cache.compact() == 0
    cache.allocate_for("a", 64)
    assert cache.compact() == 0 == cache.compact(5)


def test_a_budget_brings_together_what_it_can_pay_for(make_cache):
    cache = comb(make_cache, [3, 1, 1, 1, 9, 2])
    cache.allocate_for("tail", 64 * 4 - 23 * 4)
    assert cache.stats().largest_free_run == 1
    assert cache.compact(11) == 8  # two runs of a block between three gaps
    assert cache.stats().largest_free_run == 3
    for name in "abcdef":
        holds_its_own(cache, name)


def test_a_budget_of_nothing_moves_nothing(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2])
    with unchanged(cache):
        assert cache.compact(0) == 0


def test_a_budget_is_spent_on_scattered_sequences_first(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2], max_move_tokens=0)
    cache.set_limit("a", 256)
    grow(cache, "a", 9)
    assert not cache.is_contiguous("a")
    moved = cache.compact(40)
    assert 0 < moved <= 40 and cache.is_contiguous("a")
    assert cache.stats().heals == 1
    for name in "abcd":
        holds_its_own(cache, name)


@pytest.mark.parametrize("left_free", [1, 2, 7])
def test_scattered_sequences_become_one_run_each_however_little_is_free(make_cache, left_free):
    cache = comb(make_cache, [2, 1, 3, 1, 2, 1, 4], max_move_tokens=0)
    for name in "abcdefg":
        cache.set_limit(name, 256)
    turn = 0
    while cache.stats().free_blocks > left_free:
        grow(cache, "abcdefg"[turn % 7], 5)
        turn += 1
    assert not all(cache.is_contiguous(name) for name in "abcdefg")
    cache.compact()
    assert all(cache.is_contiguous(name) for name in "abcdefg")
    assert cache.stats().fragmentation == 0.0
    for name in "abcdefg":
        holds_its_own(cache, name)


def test_a_sequence_of_many_runs_becomes_one(make_cache):
    cache = make_cache(1, 1, 1, 1000, 1, backend="none", max_move_tokens=0, overcommit=float("inf"))
    cache.allocate_for("a", 1, max_tokens=1000)
    for number in range(999):
        cache.allocate_for(number, 1)
    for number in range(0, 999, 2):
        cache.free_for(number)
    cache.append_tokens("a", cache.stats().free_blocks - 1)
    assert not cache.is_contiguous("a")
    cache.compact()
    assert cache.is_contiguous("a") and cache.stats().fragmentation == 0.0


def test_nothing_moves_in_paged_placement(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2], placement="paged")
    with unchanged(cache):
        assert cache.compact() == 0
    with cache.hold():
        assert cache.compact() == 0


def test_it_waits_for_holds(make_cache):
    cache = comb(make_cache, [3, 1])
    with cache.hold(), unchanged(cache):
        pytest.raises(CacheHeld, cache.compact)


def test_batches_follow(make_cache):
    cache = comb(make_cache, [3, 1, 5])
    batch = cache.batch("cab")
    before = batch.generation
    cache.compact()
    assert batch.generation != before
    assert batch.starts.tolist() == [16, 0, 12]


@pytest.mark.parametrize("budget", [-1, True, 1.5, "9"])
def test_a_budget_that_is_none_is_refused(make_cache, budget):
    cache = comb(make_cache, [3, 1])
    with unchanged(cache), pytest.raises((TypeError, ValueError), match="budget_tokens"):
        cache.compact(budget)


def test_an_enormous_budget_is_one(make_cache):
    cache = comb(make_cache, [3, 1, 5, 2])
    assert cache.compact(2**70) > 0
    assert np.all(np.diff([cache.block_table(name)[0] for name in "abcd"]) > 0)
