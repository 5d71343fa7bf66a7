"""Behaviours on which the best managers of K/V memory agree, as far as they need no prefix reuse."""

import random
import threading

import numpy as np
import pytest
from observation import unchanged

from kvcache import BlockAllocator, BlockRun, InvalidFree, KVCache

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])


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
    for run in (freed, BlockRun(live.start, 2), BlockRun(live.start + 1, 2), foreign):
        with pytest.raises(InvalidFree):
            pool.free(run)
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
