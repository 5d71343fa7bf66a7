"""What `stats()` counts beside the state: peaks, refusals by cause, admissions and how long they took."""

import threading

import pytest

from kvcache import CacheClosed
from kvcache.admission import AllocationQueue
from kvcache.stats import LATENCY_BOUNDS

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


def refusals(cache):
    stats = cache.stats()
    return (
        stats.refused_arena_full,
        stats.refused_promises,
        stats.refused_growth,
        stats.refused_past_limit,
    )


# ---- peaks


@BOTH
def test_recent_peaks_begin_anew_and_those_since_the_start_stay(make_cache, placement):
    cache = make_cache(placement=placement)
    for name in "abc":
        cache.allocate_for(name, 8, max_tokens=16)
    for name in "ab":
        cache.free_for(name)
    cache.reset_peaks()
    cache.allocate_for("d", 4)
    stats = cache.stats()
    assert (stats.peak_used_blocks, stats.peak_sequences, stats.peak_claimed_blocks) == (6, 3, 6)
    recent = stats.recent_peak_used_blocks, stats.recent_peak_sequences, stats.recent_peak_claimed_blocks
    assert recent == (3, 2, 2)


@BOTH
def test_a_limit_that_is_raised_and_a_cut_raise_the_claims_peak(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 12)
    cache.set_limit("a", 20)
    assert cache.stats().peak_claimed_blocks == 2
    cache.truncate("a", 4)
    assert cache.stats().peak_claimed_blocks == 4


def test_peaks_of_a_closed_cache_are_not_reset(make_cache):
    cache = make_cache()
    cache.close()
    with pytest.raises(CacheClosed):
        cache.reset_peaks()


# ---- refusals


@BOTH
def test_refusals_are_counted_by_cause_and_once_each(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 32, max_tokens=48)
    assert cache.allocate_for("b", 36) is None  # 9 blocks, 8 are free
    assert refusals(cache) == (1, 0, 0, 0)
    assert cache.allocate_for("b", 20) is None  # 5 blocks, 4 are not promised
    assert refusals(cache) == (1, 1, 0, 0)
    assert cache.set_limit("a", 64) and not cache.append_tokens("a", 33)
    assert refusals(cache) == (1, 1, 0, 1)
    cache.check()


@BOTH
def test_growth_that_finds_no_block_is_a_cause_of_its_own(make_cache, placement):
    cache = make_cache(placement=placement, overcommit=2.0)
    cache.allocate_for("a", 32, max_tokens=64)
    cache.allocate_for("b", 32, max_tokens=64)
    assert not cache.append_token("a")
    assert refusals(cache) == (0, 0, 1, 0)
    batch = cache.batch(["a", "b"])
    assert not batch.append().any()
    assert refusals(cache) == (0, 0, 3, 0)


@BOTH
def test_a_fork_that_does_not_fit_is_a_refusal(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 8, max_tokens=64)
    assert cache.fork("a", "b") is None
    assert sum(refusals(cache)) == 1


def test_members_of_a_batch_past_their_limit_are_counted_once_each(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 4)
    cache.allocate_for("b", 3)
    batch = cache.batch(["a", "b"])
    assert batch.append().tolist() == [False, True]
    assert batch.append().tolist() == [False, False]
    assert refusals(cache) == (0, 0, 0, 3)


def test_a_step_that_is_taken_back_leaves_no_count(make_cache):
    cache = make_cache(placement="contiguous")
    cache.allocate_for("a", 4)
    cache.allocate_for("b", 4, max_tokens=12)
    batch = cache.batch(["a", "b"])
    cache.free_for("b")
    with pytest.raises(KeyError):
        batch.append()
    assert refusals(cache) == (0, 0, 0, 0)


@BOTH
def test_refusals_take_no_part_in_comparison(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 32)
    before = cache.stats()
    assert cache.allocate_for("b", 64) is None and not cache.append_token("a")
    after = cache.stats()
    assert after == before and hash(after) == hash(before)
    assert tuple(after) != tuple(before)


# ---- admissions


@BOTH
def test_admissions_and_frees_are_counted_forks_included(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 8)
    cache.fork("a", "b")
    cache.free_for("a")
    cache.free_for("a")
    stats = cache.stats()
    assert (stats.admissions, stats.frees, stats.num_sequences) == (2, 1, 1)


def test_who_is_admitted_at_once_is_within_the_first_bound(make_cache):
    cache = make_cache()
    for number in range(5):
        cache.allocate_for(number, 4)
    stats = cache.stats()
    assert stats.admission_latencies == (5,) + (0,) * len(LATENCY_BOUNDS)
    assert stats.admission_seconds == 0.0


@pytest.mark.parametrize("queued", [False, True])
def test_who_makes_others_move_is_timed(make_cache, queued):
    cache = make_cache()
    door = AllocationQueue(cache).allocate if queued else cache.allocate_for
    for number in range(16):
        door(number, 4)
    assert cache.stats().admission_seconds == 0.0
    for number in range(0, 16, 2):
        cache.free_for(number)
    assert door("large", 32)
    stats = cache.stats()
    assert stats.moves > 0 and stats.admission_seconds > 0
    assert sum(stats.admission_latencies) == stats.admissions == 17


def test_a_wait_for_a_hold_is_in_the_bucket_of_its_length(make_cache):
    cache = make_cache()
    held, admitted = threading.Event(), threading.Event()
    cache.allocate_for("a", 64)

    def hold():
        with cache.hold():
            cache.free_for("a")
            held.set()
            admitted.wait(0.05)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    assert cache.allocate_for("b", 64)
    admitted.set()
    thread.join()
    stats = cache.stats()
    assert stats.admission_seconds > 0.01
    slow = sum(
        count
        for count, bound in zip(stats.admission_latencies[1:], LATENCY_BOUNDS, strict=True)
        if bound > 0.002
    )
    assert slow == 1


def test_blocks_that_wait_for_a_hold_are_told(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 12)
    with cache.hold():
        cache.free_for("a")
        assert (cache.stats().used_blocks, cache.stats().waiting_blocks) == (3, 3)
    assert cache.stats().waiting_blocks == 0


def test_looking_from_another_thread_sees_whole_moments(make_cache):
    cache = make_cache()
    done = threading.Event()
    wrong = []

    def look():
        while not done.is_set():
            stats = cache.stats()
            if (
                stats.used_blocks + stats.free_blocks != stats.total_blocks
                or stats.admissions - stats.frees != stats.num_sequences
                or sum(stats.admission_latencies) != stats.admissions
                or stats.recent_peak_used_blocks < stats.used_blocks
            ):
                wrong.append(stats)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3000):
        for name in "abc":
            cache.allocate_for(name, 9, max_tokens=20)
        cache.append_token("b")
        for name in "abc":
            cache.free_for(name)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
