"""Behaviours on which the best managers of K/V memory agree."""

import random
import threading

import numpy as np
import pytest
from observation import unchanged
from prompts import fill, leave, run, shows

from kvcache import BlockAllocator, BlockRun, InvalidFree, KVCache

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


def ids(count, first=0):
    return list(range(first, first + count))


# ---- prefixes


def test_paged_a_prompt_with_three_whole_blocks_in_common_shares_them_and_takes_one_of_its_own(make_cache):
    cache = make_cache(1, 1, 4, 160, 16, placement="paged")
    run(cache, "first", ids(55))
    assert cache.stats().used_blocks == 4
    second = ids(48) + ids(5, 900)
    assert run(cache, "second", second).cached_tokens == 48
    assert cache.stats().used_blocks == 5
    tables = [cache.block_table(name).tolist() for name in ("first", "second")]
    assert tables[0][:3] == tables[1][:3]
    assert tables[0][3] != tables[1][3]
    cache.free_for("first")
    assert cache.stats().used_blocks == 4
    shows(cache, "second", second)


def test_contiguous_a_prompt_with_three_whole_blocks_in_common_has_copies_of_them(make_cache):
    cache = make_cache(1, 1, 4, 160, 16, placement="contiguous")
    run(cache, "first", ids(55))
    second = ids(48) + ids(5, 900)
    assert run(cache, "second", second).cached_tokens == 48
    assert (cache.stats().used_blocks, cache.stats().copied_tokens) == (8, 48)
    shows(cache, "second", second)
    shows(cache, "first", ids(55))


@BOTH
def test_the_same_64_tokens_again_leave_the_last_block_to_compute(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    leave(cache, ids(64))
    assert run(cache, "again", ids(64)).cached_tokens == 48


@BOTH
def test_one_block_of_tokens_twice_in_a_row_is_two_blocks(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    leave(cache, ids(16) * 2)
    assert cache.stats().cached_blocks == 2
    assert cache.probe(ids(16) * 3) == 32
    assert cache.probe(ids(16) + ids(16, 50)) == 16
    assert run(cache, "both", ids(16) * 2 + [1]).cached_tokens == 32


@BOTH
def test_b_after_a_is_not_found_where_a_comes_after_b(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    a, b = ids(16), ids(16, 100)
    leave(cache, a + b)
    assert cache.probe([*b, *a, 1]) == 0
    assert run(cache, "turned", [*b, *a, 1]).cached_tokens == 0
    assert run(cache, "straight", [*a, *b, 1]).cached_tokens == 32


@BOTH
def test_only_the_same_salt_is_served(make_cache, placement):
    cache = make_cache(1, 1, 4, 320, 16, placement=placement)
    leave(cache, ids(40), salt="ours")
    assert cache.probe(ids(40), salt="ours") == 32
    assert [cache.probe(ids(40), salt=salt) for salt in (None, "theirs", b"ours")] == [0, 0, 0]
    assert run(cache, "theirs", ids(40), salt="theirs").cached_tokens == 0
    assert run(cache, "nobody's", ids(40)).cached_tokens == 0
    assert run(cache, "ours", ids(40), salt="ours").cached_tokens == 32


def test_cached_blocks_that_a_hit_takes_are_not_free_for_the_rest_of_it(make_cache):
    cache = make_cache(1, 1, 4, 160, 16, placement="paged")
    six = ids(96)
    cache.allocate_for("crowd", 16 * 2)
    run(cache, "half", six[:48])
    leave(cache, six)
    assert (cache.stats().free_blocks, cache.stats().cached_blocks) == (5, 3)
    with unchanged(cache):
        assert cache.allocate_for("nine", six + ids(48, 500)) is None
    assert run(cache, "eight", six + ids(32, 500)).cached_tokens == 96
    assert cache.is_full


@BOTH
def test_a_cached_block_that_was_given_away_is_found_no_more(make_cache, placement):
    cache = make_cache(1, 1, 4, 32, 16, placement=placement)
    leave(cache, ids(32))
    assert cache.probe([*ids(16), 1]) == 16
    run(cache, "other", ids(32, 100))
    assert cache.probe([*ids(16), 1]) == 0
    cache.free_for("other")
    assert run(cache, "again", ids(32)).cached_tokens == 0
    shows(cache, "again", ids(32))


@BOTH
def test_a_prompt_evicts_what_it_does_not_need_never_what_it_hits(make_cache, placement):
    cache = make_cache(1, 1, 4, 48, 16, placement=placement)
    a, b = ids(16), ids(16, 100)
    leave(cache, a)
    leave(cache, b)
    assert run(cache, "both", a + b).cached_tokens == 16
    cache.allocate_for("third", 16)
    assert cache.probe([*b, 1]) == 0
    shows(cache, "both", a + b)


@BOTH
def test_clearing_leaves_live_sequences_alone_and_nothing_to_find(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    run(cache, "live", ids(40), max_new_tokens=20)
    leave(cache, ids(40, 100))
    cache.clear_prefix_cache()
    assert cache.stats().cached_blocks == 0
    assert [cache.probe(ids(40)), cache.probe(ids(40, 100))] == [0, 0]
    shows(cache, "live", ids(40))
    assert cache.append_tokens("live", ids(2, 40)) is True
    fill(cache, "live", ids(42), 40)
    shows(cache, "live", ids(42))
    assert run(cache, "new", ids(40)).cached_tokens == 0
    cache.free_for("live")


@BOTH
def test_rejected_drafts_leave_no_trace_in_the_index(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    run(cache, "live", ids(16), max_new_tokens=64)
    assert cache.append_tokens("live", ids(16, 16)) is True
    assert cache.probe([*ids(32), 1]) == 16  # not written
    fill(cache, "live", ids(32), 16)
    assert cache.probe([*ids(32), 1]) == 32
    assert cache.truncate("live", 20) is True
    assert cache.probe([*ids(32), 1]) == 16
    cache.free_for("live")
    assert cache.probe([*ids(32), 1]) == 16
    assert cache.stats().cached_blocks == 1


@BOTH
def test_the_lower_priority_leaves_first_and_after_its_time_falls_back(make_cache, placement):
    clock = [0.0]
    cache = make_cache(1, 1, 4, 64, 16, placement=placement, clock=lambda: clock[0])
    leave(cache, ids(16), priority=5, ttl=10.0)
    clock[0] = 1.0
    leave(cache, ids(16, 100))
    clock[0] = 2.0
    leave(cache, ids(16, 200), priority=1)

    def found():
        return [cache.probe([*ids(16, first), 1]) for first in (0, 100, 200)]

    cache.allocate_for("two", 32)
    assert found() == [16, 0, 16]
    clock[0] = 20.0  # the first one's time is over, and it is the oldest
    cache.free_for("two")
    cache.allocate_for("three", 48)
    assert found() == [0, 0, 16]
    cache.allocate_for("one", 16)
    assert found() == [0, 0, 0]


# ---- blocks


@BOTH
def test_16_tokens_and_4_look_ahead_tokens_are_two_blocks(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    cache.allocate_for("a", 16, max_tokens=64)
    assert cache.append_tokens("a", 4) is True
    assert cache.stats().used_blocks == 2
    assert cache.append_token("a") is True
    assert cache.stats().used_blocks == 2


@BOTH
def test_rejected_look_ahead_gives_its_block_back(make_cache, placement):
    cache = make_cache(1, 1, 4, 160, 16, placement=placement)
    cache.allocate_for("a", 16, max_tokens=64)
    batch = cache.batch(["a"])
    batch.append(counts=4)
    assert batch.truncate(4).tolist() == [True]
    assert (cache.used_tokens("a"), cache.stats().used_blocks) == (16, 1)


@BOTH
def test_nine_blocks_where_eight_are_free_are_refused(make_cache, placement):
    cache = make_cache(1, 1, 4, 16 * 17, 16, placement=placement)
    cache.allocate_for("a", 16 * 9)
    with unchanged(cache):
        assert cache.allocate_for("b", 16 * 9) is None
        assert cache.allocate_for("b", 16 * 8 + 1) is None
    assert cache.allocate_for("b", 16 * 8)


def test_no_blocks_at_all_are_an_error(make_cache, make_allocator):
    cache = make_cache()
    with unchanged(cache), pytest.raises(ValueError, match=r"."):
        cache.allocate_for("a", 0)
    with pytest.raises(ValueError, match=r"."):
        make_allocator(8).allocate(0)


def test_a_double_a_partial_and_a_foreign_free_are_errors(make_allocator):
    pool, other = make_allocator(8), make_allocator(8)
    freed, live, foreign = pool.allocate(2), pool.allocate(3), other.allocate(3)
    pool.free(freed)
    for wrong in (freed, BlockRun(live.start, 2), BlockRun(live.start + 1, 2), foreign):
        with pytest.raises(InvalidFree):
            pool.free(wrong)
        assert (pool.free_blocks, pool.used_blocks) == (5, 3)
        pool.check()
    pool.free(live)
    other.free(foreign)


def test_a_foreign_run_with_the_same_place_is_still_foreign(make_allocator):
    pool, other = make_allocator(8), make_allocator(8)
    mine, theirs = pool.allocate(8), other.allocate(8)
    assert (mine.start, mine.length) == (theirs.start, theirs.length)
    with pytest.raises(InvalidFree):
        pool.free(theirs)
    pool.free(mine)
    other.free(theirs)


# ---- eight threads, 500 rounds each


class Clerk(threading.Thread):
    """Opens, grows, cuts, copies and ends sequences of its own; remembers what should be in them."""

    def __init__(self, cache, number, rounds):
        super().__init__(daemon=True)
        self.cache, self.number, self.rounds = cache, number, rounds
        self.random = random.Random(number)
        self.lengths = {}
        self.error = None

    def run(self):
        try:
            for round_ in range(self.rounds):
                self.step(round_)
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            self.error = error

    def step(self, round_):
        action = self.random.choice(["open", "open", "grow", "grow", "cut", "copy", "end"])
        name = (self.number, round_)
        known = self.random.choice(list(self.lengths)) if self.lengths else None
        if action == "open":
            tokens = self.random.randint(1, 20)
            if self.cache.allocate_for(name, tokens, max_new_tokens=8):
                self.lengths[name] = tokens
        elif known is None:
            return
        elif action == "grow":
            self.lengths[known] += self.cache.append_token(known)
        elif action == "cut":
            keep = self.random.randint(0, self.lengths[known])
            if self.cache.truncate(known, keep):
                self.lengths[known] = keep
        elif action == "copy":
            if self.cache.fork(known, name):
                self.lengths[name] = self.lengths[known]
        else:
            assert self.cache.free_for(known) is True
            del self.lengths[known]
        assert all(self.cache.used_tokens(name) == tokens for name, tokens in self.lengths.items())


@BOTH
def test_eight_threads_of_mixed_calls_account_for_every_byte(make_cache, placement):
    cache = make_cache(1, 1, 4, 400, 4, placement=placement)
    clerks = [Clerk(cache, number, 500) for number in range(8)]
    for clerk in clerks:
        clerk.start()
    for clerk in clerks:
        clerk.join(120)
        assert not clerk.is_alive(), "stuck"
        if clerk.error:
            raise clerk.error
    cache.check()
    assert set(cache) == {name for clerk in clerks for name in clerk.lengths}
    for request_id in list(cache):
        cache.free_for(request_id)
    stats = cache.stats()
    assert (stats.used_blocks, stats.claimed_blocks, stats.num_sequences) == (0, 0, 0)
    assert (cache.total_allocated, cache.total_free) == (0, stats.arena_bytes)
    assert stats.largest_free_run == 100


def test_eight_threads_on_one_pool_of_runs_leak_nothing(make_allocator):
    allocator = make_allocator(200)
    errors = []

    def work(number):
        chance, runs = random.Random(number), []
        try:
            for _ in range(500):
                if runs and chance.random() < 0.5:
                    allocator.free(runs.pop(chance.randrange(len(runs))))
                elif run := allocator.allocate(chance.randint(1, 9)):
                    runs.append(allocator.extend(run, 1) or run)
            for run in runs:
                allocator.free(run)
        except BaseException as error:  # noqa: BLE001 (told to the thread that waits)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert errors == []
    assert (allocator.free_blocks, allocator.largest_free_run) == (200, 200)


# ---- a cancelled request


def request(cache):
    """One request from admission to its last token, yielding after each call that takes something."""
    assert cache.allocate_for("request", 5, max_tokens=14)
    yield
    for layer in range(2):
        cache.write("request", layer, *[np.ones((2, 5, 4), np.float32)] * 2)
        yield
    assert cache.fork("request", "beam")
    yield
    batch = cache.batch(["request", "beam"])
    for _ in range(9):
        batch.append()
        yield
        for layer in range(2):
            batch.write(layer, *[np.ones((2, 2, 4), np.float32)] * 2)
            yield
    batch.truncate(3)
    yield


@BOTH
def test_a_request_cancelled_at_any_point_gives_everything_back(placement):
    points = 0
    with KVCache(2, 2, 4, 64, 4, placement=placement) as whole:
        points = sum(1 for _ in request(whole))
    for point in range(1, points + 1):
        with KVCache(2, 2, 4, 64, 4, placement=placement) as cache:
            cache.allocate_for("bystander", 6)
            kept = cache.stats()
            steps = request(cache)
            for _ in range(point):
                next(steps)
            steps.close()
            for request_id in ("request", "beam"):
                cache.free_for(request_id)
            after = cache.stats()
            assert (after.used_blocks, after.claimed_blocks, after.free_blocks) == (
                kept.used_blocks,
                kept.claimed_blocks,
                kept.free_blocks,
            )
            assert list(cache) == ["bystander"]
            cache.check()


def test_a_cancelled_run_of_blocks_gives_everything_back():
    allocator = BlockAllocator(16)
    run = allocator.allocate(4)
    run = allocator.extend(run, 4) or run
    allocator.free(run)
    assert allocator.free_blocks == 16
    allocator.check()
