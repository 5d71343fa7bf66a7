"""An arena that cannot move or write: its error comes through, nothing has changed, the next call works."""

import random

import numpy as np
import pytest
from hands import HandArena, Hands
from observation import observe
from pair import Pair
from walk import CacheMachine, crowded_walk

import kvcache.cache
from kvcache import KVCache


class BrokenError(Exception):
    """What a device might raise."""


class BreakableHands(Hands):
    """Hands that fail at the call after next `patience` ones; None: never."""

    patience = None

    def try_out(self):
        if self.patience == 0:
            raise BrokenError
        if self.patience is not None:
            self.patience -= 1

    def move(self, moves):
        self.try_out()
        super().move(moves)

    def write(self, arrays, layer, spans):
        self.try_out()
        super().write(arrays, layer, spans)


@pytest.fixture
def breakable(monkeypatch):
    monkeypatch.setattr(kvcache.cache, "make_arena", lambda spec, *options: HandArena(spec, BreakableHands))


@pytest.fixture(params=["contiguous", "paged"])
def cache(breakable, request):
    """A full pool but for every second block, in which any growth needs a move or a copy."""
    with KVCache(1, 2, 4, 40, 4, placement=request.param, overcommit=float("inf")) as cache:
        for number in range(10):
            cache.allocate_for(number, 3, max_tokens=40)
            cache.write(number, 0, *[np.full((2, 3, 4), number, np.float32)] * 2)
        for number in range(0, 10, 2):
            cache.free_for(number)
        cache.fork(1, "twin")
        cache.check()
        yield cache
        cache.arena.hands.patience = None
        cache.check()


def rows(count=1):
    return np.full((2, count, 4), 77, np.float32)


CALLS = {
    "append": lambda cache: [cache.append_tokens(number, 9) for number in (1, 3, 5)],
    "allocate": lambda cache: [cache.allocate_for(name, 8) for name in "xy"],
    "fork": lambda cache: [cache.fork(3, name) for name in "xyz"],
    "write": lambda cache: cache.write("twin", 0, rows(), rows(), start=1),
    "batch append": lambda cache: cache.batch(["twin", 3, 5]).append(counts=5),
}
NEEDS_NO_MOVE = {("paged", "allocate"), ("paged", "fork")}


@pytest.mark.parametrize("name", CALLS)
def test_a_failure_of_the_arena_comes_through_and_changes_nothing(cache, name):
    if (cache.placement, name) in NEEDS_NO_MOVE:
        CALLS[name](cache)
        return
    cache.arena.hands.patience = 0
    until_broken(cache, CALLS[name])
    cache.arena.hands.patience = None
    for newcomer in "xyz":
        cache.free_for(newcomer)
    CALLS[name](cache)


def until_broken(cache, call):
    """Calls go well until the arena is needed; the one that fails changes nothing."""
    with pytest.raises(BrokenError):
        call(Watched(cache))


class Watched:
    """Passes calls on, and sees to it that those that fail change nothing."""

    def __init__(self, target, cache=None):
        self.target, self.cache = target, cache or target

    def __getattr__(self, name):
        def call(*arguments, **named):
            before = observe(self.cache)
            try:
                answer = getattr(self.target, name)(*arguments, **named)
            except BrokenError:
                assert observe(self.cache) == before
                self.cache.check()
                raise
            return Watched(answer, self.cache) if name == "batch" else answer

        return call


def test_a_batch_that_fails_halfway_keeps_every_array_true(breakable):
    """Members that were moved before the failure stay where they are, and every batch knows it."""
    names = "abcdefghijkl"
    with KVCache(1, 2, 4, 64, 4, overcommit=float("inf")) as cache:
        for name in names:
            cache.allocate_for(name, 4, max_tokens=64)
            cache.write(name, 0, *[np.full((2, 4, 4), ord(name), np.float32)] * 2)
        batch, bystander = cache.batch(names[::3]), cache.batch(names)
        failures = 0
        for patience in range(6):
            cache.arena.hands.patience = patience
            try:
                batch.append()
            except BrokenError:
                failures += 1
                assert set(bystander.lengths.tolist()) == {4}
                assert bystander.starts.tolist() == [cache.block_table(name)[0] * 4 for name in names]
                assert batch.starts.tolist() == bystander.starts[::3].tolist()
                assert all(np.all(cache.get_k_view(name, 0) == ord(name)) for name in names)
                cache.check()
        assert failures > 1


@pytest.mark.parametrize("left_free", [1, 3])
def test_compact_that_fails_halfway_leaves_every_sequence_as_it_was_or_will_be(breakable, left_free):
    with KVCache(1, 2, 4, 64, 4, max_move_tokens=0, overcommit=float("inf")) as cache:
        for name, tokens in (("a", 4), ("b", 20), ("c", 4), ("d", 4)):
            cache.allocate_for(name, tokens, max_tokens=tokens)
        cache.free_for("c")
        cache.set_limit("a", 64)
        cache.append_tokens("a", 4 * (9 - left_free))
        for name in "abd":
            rows = np.full((2, cache.used_tokens(name), 4), ord(name), np.float32)
            cache.write(name, 0, rows, rows)
        assert cache.stats().free_blocks == left_free and not cache.is_contiguous("a")
        failures = 0
        for patience in range(9):
            cache.arena.hands.patience = patience
            try:
                cache.compact()
            except BrokenError:
                failures += 1
            cache.check()
            assert all(np.all(cache.get_k_view(name, 0) == ord(name)) for name in "abd")
        assert failures > 2 and cache.is_contiguous("a")


class HaltingPair(Pair):
    """Lets the arena fail in every call at some time first, and then does the call again."""

    chance = random.Random(5)
    failures = 0

    def perform(self, action):
        hands = self.cache.arena.hands
        before = self.lasting()
        hands.patience = self.chance.randint(0, 1)
        try:
            return action()
        except BrokenError:
            assert self.lasting() == before
            self.cache.check()
            HaltingPair.failures += 1
            self.exact_moves = False
        finally:
            hands.patience = None
        return action()

    def lasting(self):
        """What a failure leaves alone even if members have moved, or blocks been copied, by then."""
        seen = observe(self.cache)
        return {request_id: (*seen[request_id][:3], seen[request_id][5]) for request_id in self.cache}


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("seed", range(3))
def test_walks_through_failures_never_leave_the_oracle(breakable, placement, seed):
    class Halting(CacheMachine):
        pair_type = HaltingPair

    Halting.placement = placement
    HaltingPair.failures = 0
    crowded_walk(Halting(), seed)
    assert HaltingPair.failures > 20
