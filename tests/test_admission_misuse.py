"""What a queue cannot be asked is refused at once, in a full arena as in an empty one, and nothing is left of it."""

import math

import numpy as np
import pytest
from crowd import Crowd

from kvcache import KVCacheError, RequestTooLarge, SequenceExists
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, Swap, TenantLimit, Wait

SIZE, BLOCKS = 4, 8


@pytest.fixture
def cache(make_cache):
    return make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none")


@pytest.fixture(params=["empty", "full", "in line", "limited"])
def here(request, cache):
    """Clients before an arena that is empty, or full, or before which somebody waits, or whose tenants have limits."""
    limits = {"tenant_limit": TenantLimit(share=1.0)} if request.param == "limited" else {}
    here = Crowd(cache, Wait(), **limits)
    if request.param in ("full", "in line"):
        cache.allocate_for("full", 32)
    if request.param == "in line":
        assert here.ask("first", 4) is None
    yield here
    here.close()


BAD_REQUESTS = [
    ({"priority": "x"}, TypeError, "priority must be an int, not str"),
    ({"priority": None}, TypeError, "priority must be an int, not NoneType"),
    ({"priority": 1.5}, TypeError, "priority must be an int, not float"),
    ({"priority": True}, TypeError, "priority must be an int, not bool"),
    ({"on_evict": 3}, TypeError, "on_evict must be callable, not int"),
    ({"on_swap": "told"}, TypeError, "on_swap must be callable, not str"),
    ({"salt": []}, TypeError, "unhashable"),
    ({"tenant": []}, TypeError, "unhashable"),
    ({"cache_priority": 1.5}, TypeError, "priority must be an int, not float"),
    ({"cache_priority": -(10**9) - 1}, ValueError, "priority must be at least -1000000000, not -1000000001"),
    ({"ttl": "long"}, TypeError, "ttl must be a number, not str"),
    ({"ttl": 0}, ValueError, "ttl must be more than 0, not 0"),
    ({"max_tokens": 3}, ValueError, "max_tokens is 3, the prompt alone has 4 tokens"),
    ({"max_tokens": 8, "max_new_tokens": 4}, TypeError, "give one of the two"),
    ({"max_tokens": 33}, RequestTooLarge, "the arena has 8"),
    ({"strategy": 5}, TypeError, "a strategy is"),
]


@pytest.mark.parametrize("options, error, text", BAD_REQUESTS)
def test_a_request_of_nonsense_is_refused_at_once(here, options, error, text):
    before = here.queue.stats().waiting
    with pytest.raises(error, match=text):
        here.ask("a", 4, **options)
    with pytest.raises(error, match=text):
        here.queue.allocate("a", 4, **options)
    assert here.queue.stats().waiting == before
    assert "a" not in here.cache and "a" not in here.queue
    told = here.queue.stats().tenants[""]
    assert (told.failed, sum(told.refused.values())) == (0, 0)


def test_an_id_that_is_none_is_refused_at_once(here):
    with pytest.raises(TypeError, match="unhashable"):
        here.ask([], 4)
    assert [] not in list(here.cache)


@pytest.mark.parametrize("value", [np.int64(3), 10**30])
def test_a_priority_may_be_any_int(cache, value):
    queue = AllocationQueue(cache)
    assert queue.allocate("a", 4, priority=value).priority == value


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"keep_free": 1.5}, TypeError, "keep_free must be an int, not float"),
        ({"keep_free": True}, TypeError, "keep_free must be an int, not bool"),
        ({"keep_free": -1}, ValueError, "keep_free must be at least 0, not -1"),
        ({"keep_free": 29}, ValueError, "keep_free=29 leaves newcomers nothing of an arena of 32 tokens"),
        ({"patience": "x"}, TypeError, "patience must be a number, not str"),
        ({"patience": -1}, ValueError, "patience must be at least 0, not -1"),
        ({"patience": math.nan}, ValueError, "patience must be at least 0, not nan"),
        ({"most_overtaken": 1.5}, TypeError, "most_overtaken must be an int, not float"),
        ({"most_overtaken": -1}, ValueError, "most_overtaken must be at least 0, not -1"),
        ({"tenants": {"a": 5}}, TypeError, "the limit of tenant 'a' must be a TenantLimit, not int"),
        ({"tenants": 5}, TypeError, "tenants must be a mapping, not int"),
        ({"tenant_limit": 5}, TypeError, "tenant_limit must be a TenantLimit, not int"),
        ({"clock": 5}, TypeError, "clock must be callable, not int"),
        ({"clock": None}, TypeError, "clock must be callable, not NoneType"),
        ({"warn_after": "x"}, TypeError, "warn_after must be a number, not str"),
        ({"warn_after": 0}, ValueError, "warn_after must be above 0, not 0"),
    ],
)
def test_a_queue_of_nonsense_is_not_made(cache, options, error, text):
    with pytest.raises(error, match=text):
        AllocationQueue(cache, **options)
    assert cache.queues == ()
    assert AllocationQueue(cache).name == "default"


def test_a_queue_may_be_endlessly_patient(cache):
    queue = AllocationQueue(cache, Wait(math.inf), patience=math.inf, warn_after=math.inf, keep_free=28)
    assert queue.allocate("a", 4)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: TenantLimit(tokens=1.5), TypeError, "tokens must be an int, not float"),
        (lambda: TenantLimit(tokens=0), ValueError, "tokens must be at least 1, not 0"),
        (lambda: TenantLimit(sequences=True), TypeError, "sequences must be an int, not bool"),
        (lambda: TenantLimit(share="x"), TypeError, "share must be a number, not str"),
        (lambda: TenantLimit(share=True), TypeError, "share must be a number, not bool"),
        (lambda: TenantLimit(share=1.01), ValueError, "share must be above 0 and at most 1, not 1.01"),
        (lambda: TenantLimit(share=math.nan), ValueError, "share must be above 0 and at most 1, not nan"),
        (lambda: Wait("5"), TypeError, "timeout must be a number, not str"),
        (lambda: Wait(True), TypeError, "timeout must be a number, not bool"),
        (lambda: Wait(math.nan), ValueError, "timeout must be at least 0, not nan"),
        (lambda: Wait(-1), ValueError, "timeout must be at least 0, not -1"),
        (lambda: Reduce(1.5), TypeError, "min_tokens must be an int, not float"),
        (lambda: Reduce(0), ValueError, "min_tokens must be at least 1, not 0"),
        (lambda: Evict("oldest"), ValueError, "victim must be one of lru, priority, or a callable"),
        (lambda: Evict(notify=5), TypeError, "notify must be callable, not int"),
        (lambda: Swap(notify=5), TypeError, "notify must be callable, not int"),
    ],
)
def test_a_strategy_of_nonsense_is_not_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_growth_with_a_strategy_of_nonsense_changes_nothing(cache):
    queue = AllocationQueue(cache, Reject())
    queue.allocate("a", 4, max_tokens=8)
    with pytest.raises(TypeError, match="a strategy is"):
        queue.append("a", strategy=5)
    assert cache.used_tokens("a") == 4


def test_an_innocent_asker_meets_no_priority_that_cannot_be_compared(cache):
    queue = AllocationQueue(cache, Evict("priority"))
    with pytest.raises(TypeError):
        queue.allocate("a", 32, priority="x")
    queue.allocate("a", 32, priority=np.int32(0))
    assert queue.allocate("b", 4, priority=1)
    assert list(cache) == ["b"]


# ---- what changes while somebody waits


def test_a_prompt_that_its_owner_changes_is_as_it_was_when_asked_for(make_cache):
    cache = make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none")
    here = Crowd(cache, Wait())
    cache.allocate_for("full", 32)
    prompt, array = [1, 2, 3, 4, 5], np.arange(5, dtype=np.int32)
    assert here.ask("a", prompt, max_tokens=8) is None
    assert here.ask("b", array, max_tokens=8) is None
    prompt[:] = range(40)
    array[:] = 9
    here.free("full")
    assert (here.answer("a").tokens, here.answer("b").tokens) == (5, 5)
    cache.commit("a"), cache.commit("b")
    assert (cache.probe([1, 2, 3, 4, 9]), cache.probe([0, 1, 2, 3, 9]), cache.probe([9] * 5)) == (4, 4, 0)
    here.close()


def test_ids_to_append_are_as_they_were_when_asked_for(make_cache):
    cache = make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=2.0)
    here = Crowd(cache, Wait())
    here.ask("a", [1, 2, 3, 4], max_tokens=16), here.ask("b", 28)
    more = [5, 6, 7, 8]
    assert here.grow("a", more) is None
    more.extend([9, 9, 9, 9, 9])
    here.free("b")
    assert here.answer(("grow", "a")) is True and cache.used_tokens("a") == 8
    cache.commit("a")
    assert cache.probe([1, 2, 3, 4, 5, 6, 7, 8, 0]) == 8
    here.close()


def test_ids_that_are_none_never_wait(here):
    for prompt in ([1, -1], [1.5], ["a"], np.zeros((2, 2), np.int32)):
        with pytest.raises((TypeError, ValueError)):
            here.ask("a", prompt)
    assert "a" not in here.queue


def test_misuse_in_a_closed_queue_is_told_as_elsewhere(cache):
    queue = AllocationQueue(cache, Wait())
    queue.close()
    with pytest.raises(TypeError):
        queue.allocate("a", 4, priority="x")
    with pytest.raises(KVCacheError):
        queue.allocate("a", 4)


def test_an_id_that_waits_is_taken(cache):
    here = Crowd(cache, Wait())
    cache.allocate_for("full", 32)
    assert here.ask("a", 4) is None
    with pytest.raises(SequenceExists):
        here.ask("a", 4)
    here.close()
