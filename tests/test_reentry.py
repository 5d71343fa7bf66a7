"""Python that runs in the middle of calls: ids that call the cache, finalizers that free at any moment."""

import gc
import os

import numpy as np
import pytest
from hands import HandArena, Hands

import kvcache.cache
from kvcache import CacheHeld, KVCache, SequenceExists, UnknownSequence

# ---- ids that call the cache


class Nosy:
    """An id whose comparison and hash call the cache that it is kept in."""

    def __init__(self, cache, name, call):
        self.cache, self.name, self.call = cache, name, call
        self.busy = False

    def ask(self):
        if not self.busy:
            self.busy = True
            try:
                self.call(self.cache)
            finally:
                self.busy = False

    def __hash__(self):
        self.ask()
        return 7

    def __eq__(self, other):
        self.ask()
        return isinstance(other, Nosy) and self.name == other.name


NOSY_CALLS = {
    "read": lambda cache: (cache.stats(), len(cache), list(cache), cache.used_tokens("plain")),
    "check": lambda cache: cache.check(),
    "grow": lambda cache: cache.append_token("plain"),
    "allocate and free": lambda cache: (cache.allocate_for("other", 3), cache.free_for("other")),
    "move": lambda cache: (cache.truncate("plain", 1), cache.append_tokens("plain", 9)),
    "hold": lambda cache: cache.hold().__enter__().__exit__(None, None, None),
}


@pytest.mark.parametrize("call", NOSY_CALLS.values(), ids=NOSY_CALLS)
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_an_id_may_call_the_cache_when_it_is_hashed_or_compared(make_cache, placement, call):
    cache = make_cache(placement=placement)
    cache.allocate_for("plain", 2, max_tokens=24)
    ids = [Nosy(cache, name, call) for name in "abc"]
    for request_id in ids:
        assert cache.allocate_for(request_id, 3, max_tokens=6)
        cache.check()
    twin = Nosy(cache, "b", call)
    with pytest.raises(SequenceExists):
        cache.allocate_for(twin, 3)
    assert cache.append_token(twin) is True
    assert cache.used_tokens(ids[1]) == 4
    batch = cache.batch(ids)
    assert batch.append().tolist() == [True, True, True]
    batch.remove(twin)
    assert cache.fork(twin, Nosy(cache, "d", call))
    for name in "abcd":
        assert cache.free_for(Nosy(cache, name, call)) is True
        cache.check()
    assert list(cache) == ["plain"]


def test_an_id_that_admits_itself_while_it_is_compared_is_admitted_once(make_cache):
    cache = make_cache()

    class Sly(str):
        __slots__ = ()

        def __hash__(self):
            return 7

        def __eq__(self, other):
            if Sly.left:
                Sly.left -= 1
                cache.allocate_for(Plain("twin"), 3)
            return str(self) == str(other)

    class Plain(Sly):
        __hash__ = Sly.__hash__

    Sly.left = 0
    cache.allocate_for(Plain("first"), 3)
    Sly.left = 1
    with pytest.raises(SequenceExists):
        cache.allocate_for(Sly("twin"), 5)
    cache.check()
    assert len(cache) == 2
    assert cache.stats().used_blocks == 2


@pytest.mark.parametrize("method", ["__hash__", "__eq__"])
def test_an_id_that_raises_changes_nothing(make_cache, method):
    class Cross:
        armed = False

        def __hash__(self):
            if self.armed and method == "__hash__":
                raise RuntimeError("cross")
            return 7

        def __eq__(self, other):
            if type(other) is Cross and (self.armed or other.armed) and method == "__eq__":
                raise RuntimeError("cross")
            return self is other

    cache = make_cache()
    cache.allocate_for(Cross(), 3, max_tokens=12)
    cross = Cross()
    cross.armed = True
    before = cache.stats()
    for call in (
        lambda: cache.allocate_for(cross, 3),
        lambda: cache.append_token(cross),
        lambda: cache.free_for(cross),
        lambda: cache.get_k_view(cross, 0),
        lambda: cache.batch([cross]),
        lambda: cross in cache,
    ):
        with pytest.raises(RuntimeError, match="cross"):
            call()
        assert cache.stats() == before
        cache.check()


def test_an_id_whose_repr_raises_is_still_named(make_cache):
    class Mute:
        def __repr__(self):
            raise RuntimeError("mute")

    cache = make_cache()
    mute = Mute()
    with pytest.raises(UnknownSequence) as caught:
        cache.used_tokens(mute)
    assert caught.value.request_id is mute
    assert "Mute" in str(caught.value)


def test_an_id_that_changes_its_mind_cannot_corrupt_the_cache(make_cache):
    class Fickle:
        def __init__(self, value):
            self.value = value

        def __hash__(self):
            return self.value

        def __eq__(self, other):
            return self is other

    cache = make_cache()
    fickle = Fickle(1)
    cache.allocate_for(fickle, 3)
    fickle.value = 2
    assert cache.free_for(fickle) is False
    cache.check()
    fickle.value = 1
    assert cache.free_for(fickle) is True
    assert cache.stats().used_blocks == 0


# ---- finalizers


class Owner:
    """Frees its sequence when it is collected, and then calls whatever else it is told to."""

    def __init__(self, cache, name, then=None):
        self.cache, self.name, self.then = cache, name, then
        self.itself = self  # only the garbage collector can end this

    def __del__(self):
        self.cache.free_for(self.name)
        if self.then is not None:
            self.then(self.cache)


class Rows(np.ndarray):
    """Rows whose attributes are looked up by Python code, which collects garbage on the way."""

    def __array_finalize__(self, parent):
        gc.collect()


@pytest.fixture
def eager_collector():
    """The garbage collector runs at nearly every allocation."""
    if os.environ.get("KVCACHE_TRACE") == "1":
        pytest.skip("line tracing runs Python, and so finalizers, under the lock at every line")
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # what is older than the test is left alone, so that a collection takes microseconds
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_finalizer_may_free_at_any_moment(make_cache, placement, eager_collector):
    cache = make_cache(1, 2, 4, 128, 4, placement=placement)
    cache.allocate_for("steady", 3, max_tokens=40)
    for round_ in range(300):
        name = ("owned", round_)
        if cache.allocate_for(name, 1 + round_ % 11, max_tokens=16):
            Owner(cache, name)
        cache.append_token("steady") or cache.truncate("steady", 3)
        cache.write("steady", 0, np.zeros((2, 2, 4), np.float32).view(Rows), np.zeros((2, 2, 4), np.float32))
        cache.batch(["steady"]).append([round_])
        str(cache.stats())
    gc.collect()
    assert list(cache) == ["steady"]
    cache.check()


def test_a_finalizer_may_do_more_than_free(make_cache, eager_collector):
    cache = make_cache(1, 2, 4, 128, 4)
    cache.allocate_for("steady", 3, max_tokens=40)

    def busy(cache):
        cache.stats()
        cache.allocate_for("brief", 9)
        cache.free_for("brief")
        cache.check()

    for round_ in range(100):
        if cache.allocate_for(("owned", round_), 1 + round_ % 11, max_tokens=16):
            Owner(cache, ("owned", round_), busy)
        cache.append_token("steady") or cache.truncate("steady", 3)
    gc.collect()
    assert list(cache) == ["steady"]


def test_a_finalizer_may_free_inside_a_hold(make_cache):
    cache = make_cache()
    cache.allocate_for("owned", 9)
    with cache.hold():
        Owner(cache, "owned")
        gc.collect()
        assert "owned" not in cache
        assert cache.stats().used_blocks == 3
    assert cache.stats().used_blocks == 0


def test_a_finalizer_may_free_after_the_cache_was_closed(make_cache):
    cache = make_cache()
    cache.allocate_for("owned", 9)
    Owner(cache, "owned")
    cache.close()
    gc.collect()
    assert cache.free_for("owned") is False


def test_a_finalizer_may_free_what_is_being_grown(make_cache):
    """A member is freed while its batch appends: the step goes on or names it, and nothing breaks."""
    cache = make_cache()
    for name in "abc":
        cache.allocate_for(name, 3, max_tokens=12)
    batch = cache.batch(["a", "b", "c"])

    class Counts(list):
        def __iter__(self):
            cache.free_for("b")
            return super().__iter__()

        def __getitem__(self, index):
            cache.free_for("b")
            return super().__getitem__(index)

    with pytest.raises(UnknownSequence) as caught:
        batch.append(counts=Counts([1, 1, 1]))
    assert caught.value.request_id == "b"
    cache.check()


def test_an_object_that_frees_itself_while_it_is_read_as_an_int_is_unknown(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 3, max_tokens=12)

    class Count:
        def __index__(self):
            cache.free_for("a")
            return 1

    for call in (cache.append_tokens, cache.truncate, cache.set_limit, cache.commit):
        if "a" not in cache:
            cache.allocate_for("a", 3, max_tokens=12)
        with pytest.raises((UnknownSequence, TypeError)):
            call("a", Count())
        cache.check()


# ---- in the middle of a move


class MeddlingHands(Hands):
    """Hands that let somebody else's Python run while they move, as a collection would."""

    meddle = None

    def move(self, moves):
        super().move(moves[:1])
        if self.meddle is not None:
            self.meddle()
        super().move(moves[1:])


@pytest.fixture
def comb(monkeypatch):
    """A contiguous cache of eight single blocks with a gap after each: whatever is larger needs moves."""
    monkeypatch.setattr(kvcache.cache, "make_arena", lambda spec, *options: HandArena(spec, MeddlingHands))
    with KVCache(1, 2, 4, 64, 4) as cache:
        for number in range(16):
            cache.allocate_for(number, 4)
            cache.write(number, 0, *[np.full((2, 4, 4), number, np.float32)] * 2)
        for number in range(0, 16, 2):
            cache.free_for(number)
        yield cache
        cache.check()


def test_a_free_in_the_middle_of_a_move_comes_true_after_it(comb):
    freed = []

    def meddle():
        for number in (3, 9):
            freed.append(comb.free_for(number))

    comb.arena.hands.meddle = meddle
    assert comb.allocate_for("large", 32)
    comb.arena.hands.meddle = None
    assert freed[:2] == [True, True]
    assert 3 not in comb
    assert comb.stats().used_blocks == 6 + 8
    comb.check()
    for number in (1, 5, 7, 11, 13, 15):
        assert np.all(comb.get_k_view(number, 0) == number)


def test_what_would_wait_for_a_move_of_its_own_thread_is_told_so(comb):
    told = []
    calls = [
        comb.stats,
        comb.check,
        lambda: comb.allocate_for("other", 1),
        lambda: comb.append_token(1),
        lambda: comb.truncate(1, 0),
        lambda: comb.fork(1, "fork"),
        lambda: comb.hold().__enter__(),
        lambda: comb.batch([1]).append(),
        lambda: comb.write(1, 0, *[np.zeros((2, 1, 4), np.float32)] * 2),
        comb.close,
    ]

    def meddle():
        for call in calls:
            with pytest.raises(CacheHeld):
                call()
            told.append(call)

    comb.arena.hands.meddle = meddle
    assert comb.allocate_for("large", 32)
    comb.arena.hands.meddle = None
    assert len(told) >= len(calls)
    for number in range(1, 16, 2):
        assert np.all(comb.get_k_view(number, 0) == number)


@pytest.mark.parametrize("change", ["add", "remove", "reorder"])
def test_a_batch_is_not_changed_in_the_middle_of_a_move(comb, change):
    batch = comb.batch([1, 3])
    argument = {"add": 5, "remove": 3, "reorder": [1, 0]}[change]
    told = []

    def meddle():
        told.append(pytest.raises(CacheHeld, getattr(batch, change), argument))

    comb.arena.hands.meddle = meddle
    assert comb.allocate_for("large", 32)
    comb.arena.hands.meddle = None
    assert told and list(batch) == [1, 3]
    assert batch.lengths.tolist() == [4, 4]
    assert batch.starts.tolist() == [comb.block_table(number)[0] * 4 for number in (1, 3)]


def test_a_finalizer_may_free_in_the_middle_of_any_move(comb, eager_collector):
    for round_ in range(50):
        name = ("owned", round_)
        if comb.allocate_for(name, 1 + round_ % 9, max_tokens=20):
            owner = Owner(comb, name)
            comb.arena.hands.meddle = gc.collect
            del owner
        if comb.allocate_for("large", 9 + 4 * (round_ % 5)):
            comb.free_for("large")
        comb.check()
    gc.collect()
    assert set(comb) == set(range(1, 16, 2))
    for number in comb:
        assert np.all(comb.get_k_view(number, 0) == number)
