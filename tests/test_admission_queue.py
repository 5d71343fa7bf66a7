"""The queue before a cache, by a clock that is set by hand: who is granted, when, and why not."""

import pickle

import numpy as np
import pytest
from crowd import Crowd

from kvcache import (
    CacheClosed,
    CacheHeld,
    KVCache,
    KVCacheError,
    RequestTooLarge,
    SequenceExists,
    UnknownSequence,
)
from kvcache.admission import AllocationQueue, Evict, Fits, Reduce, Refusal, Reject, TenantLimit, Wait

BLOCKS = 16  # of 4 tokens each, in the caches of `make_cache`


@pytest.fixture
def crowd(make_cache):
    made = []

    def make(strategy=None, *, overcommit=1.0, placement="contiguous", **options):
        cache = make_cache(1, 1, 4, 4 * BLOCKS, 4, backend="none", overcommit=overcommit, placement=placement)
        made.append(Crowd(cache, Wait() if strategy is None else strategy, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ---- leases and refusals


def test_a_lease_tells_what_was_granted_and_frees_at_the_end(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache)
    with queue.allocate("a", 5, max_tokens=9, tenant="t", priority=2) as lease:
        assert lease and "a" in cache
        assert (lease.request_id, lease.tokens, lease.max_tokens, lease.cached_tokens) == ("a", 5, 9, 0)
        assert (lease.tenant, lease.priority) == ("t", 2)
    assert "a" not in cache
    assert lease.free() is False


def test_a_lease_never_frees_a_later_sequence_of_the_same_id(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache)
    lease = queue.allocate("a", 5)
    cache.free_for("a")
    assert cache.allocate_for("a", 6)
    assert lease.free() is False
    assert cache.used_tokens("a") == 6


def test_a_refusal_is_false_and_a_context_that_does_nothing(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Reject())
    assert queue.allocate("a", 60)
    with queue.allocate("b", 8) as refused:
        assert not refused
        assert isinstance(refused, Refusal)
    assert list(cache) == ["a"]
    assert pickle.loads(pickle.dumps(refused)) == refused


def test_a_full_arena_is_told_in_numbers(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache)
    queue.allocate("a", 56)
    refused = queue.allocate("b", 9, max_tokens=14)
    assert (refused.reason, refused.request_id, refused.tokens, refused.max_tokens) == (
        "arena_full",
        "b",
        9,
        14,
    )
    assert (refused.blocks_needed, refused.blocks_free, refused.blocks_unclaimed) == (4, 2, 2)
    assert (refused.blocks_missing, refused.fitting_tokens) == (2, 0)
    assert str(refused) == (
        "arena_full: 9 tokens, 14 at most, need 4 blocks, 2 free, 2 of them unclaimed; "
        "at most 0 tokens would have fitted"
    )


def test_promises_are_the_reason_where_blocks_are_free_but_claimed(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache)
    queue.allocate("a", 4, max_tokens=48)
    refused = queue.allocate("b", 8, max_tokens=20)
    assert (refused.reason, refused.blocks_free, refused.blocks_unclaimed) == ("promises", 15, 4)
    assert (refused.blocks_missing, refused.fitting_tokens) == (1, 16)
    assert queue.allocate("b", 8, max_tokens=refused.fitting_tokens)


def test_what_can_never_fit_raises_at_once_and_is_never_queued(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Wait())
    for limits in ({}, {"max_tokens": 200}):
        with pytest.raises(RequestTooLarge):
            queue.allocate("a", 65 if not limits else 1, **limits)
    with pytest.raises(ValueError):
        queue.allocate("a", 0)
    assert len(queue) == 0


def test_misuse_raises_as_the_cache_does(crowd):
    here = crowd()
    assert here.ask("a", 64)
    with pytest.raises(SequenceExists):
        here.ask("a", 1)
    here.ask("b", 1)
    with pytest.raises(SequenceExists):
        here.ask("b", 1)
    with pytest.raises(TypeError):
        here.ask("c", 1, strategy="wait")
    with pytest.raises(TypeError):
        AllocationQueue(here.cache, Wait)
    for wrong in (lambda: Reduce(0), lambda: Wait(-1), lambda: Evict("oldest"), lambda: TenantLimit(share=0)):
        with pytest.raises(ValueError):
            wrong()


@pytest.mark.parametrize("prompt, limit", [(1, None), (40, None), (8, 64), (60, 61), (17, 20)])
def test_explain_says_what_allocate_for_would(make_cache, prompt, limit):
    cache = make_cache()
    cache.allocate_for("a", 10, max_tokens=30)
    answer = cache.explain(prompt, limit)
    assert isinstance(answer, Fits if answer else Refusal)
    assert bool(answer) is bool(cache.allocate_for("b", prompt, max_tokens=limit))


def test_explain_answers_never_fits_instead_of_raising(make_cache):
    cache = make_cache()
    answer = cache.explain(65)
    assert (answer.reason, answer.blocks_needed, answer.blocks_missing) == ("never_fits", 17, 1)
    assert not AllocationQueue(cache).explain(65)
    with pytest.raises(ValueError):
        cache.explain(0)


def test_explain_of_the_queue_knows_watermark_and_tenant(crowd):
    here = crowd(keep_free=16, tenants={"t": TenantLimit(tokens=8)})
    assert here.queue.explain(48)
    assert here.queue.explain(52).reason == "never_fits"
    assert here.queue.explain(12, tenant="t").reason == "never_fits"
    here.ask("a", 8, tenant="t")
    assert here.queue.explain(44).reason == "watermark"
    assert here.queue.explain(8, tenant="t").reason == "tenant_limit"


# ---- reduce


def test_reduce_grants_the_largest_limit_that_can_be_promised(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Reduce(min_tokens=10))
    queue.allocate("a", 30)
    lease = queue.allocate("b", 5, max_tokens=60)
    assert lease.max_tokens == cache.limit("b") == 32
    assert cache.append_tokens("b", 27)
    assert not cache.append_token("b")


def test_reduce_does_not_touch_what_fits_whole(make_cache):
    queue = AllocationQueue(make_cache(), Reduce(min_tokens=1))
    assert queue.allocate("a", 5, max_tokens=9).max_tokens == 9


def test_reduce_refuses_below_its_least(make_cache):
    queue = AllocationQueue(make_cache(), Reduce(min_tokens=10))
    queue.allocate("a", 56)
    refused = queue.allocate("b", 5, max_tokens=60)
    assert (refused.reason, refused.fitting_tokens, refused.blocks_needed) == ("promises", 8, 3)


def test_whoever_waits_after_a_reduce_is_content_with_less(crowd):
    here = crowd(Reduce(8) | Wait())
    assert here.ask("a", 60)
    assert here.ask("b", 4, max_tokens=40) is None
    assert here.ask("c", 4).tokens == 4
    here.free("c")
    assert here.answer("b") is None
    here.free("a")
    assert here.answer("b").max_tokens == 40


# ---- waiting


def test_a_free_wakes_whoever_fits_now_and_nobody_else(crowd):
    here = crowd()
    here.ask("a", 32), here.ask("b", 32)
    assert [here.ask(name, 20) for name in "cde"] == [None] * 3
    here.free("a")
    assert here.granted() == ["a", "b", "c"]
    assert len(here.queue) == 2


def test_first_come_first_served(crowd):
    here = crowd()
    here.ask("a", 64)
    for name in "bcdef":
        here.ask(name, 64)
    for name in "abcde":
        here.free(name)
    assert here.granted() == list("abcdef")


def test_a_newcomer_does_not_overtake_one_that_would_fit(crowd):
    here = crowd()
    here.ask("a", 32), here.ask("b", 32)
    here.ask("c", 32), here.ask("d", 32)
    here.free("a")
    assert here.answer("d") is None
    assert here.ask("e", 4) is None


def test_small_ones_pass_a_large_one_while_they_fit_beside_it(crowd):
    here = crowd()
    here.ask("a", 40)
    assert here.ask("large", 32) is None
    assert here.ask("small", 8)


def test_a_large_one_is_overtaken_so_many_times_and_no_more(crowd):
    here = crowd(most_overtaken=3)
    here.ask("a", 40)
    here.ask("large", 32)
    passed = [name for name in range(5) if here.ask(name, 4)]
    assert passed == [0, 1, 2]
    here.free(0, 1, 2)
    assert here.answer(3) is None
    here.free("a")
    assert here.granted()[-3:] == ["large", 3, 4]


def test_a_large_one_that_is_old_is_not_overtaken(crowd):
    here = crowd(patience=10)
    here.ask("a", 40)
    here.ask("large", 32)
    here.pass_time(9)
    assert here.ask("b", 4)
    here.pass_time(1)
    assert here.ask("c", 4) is None
    here.free("a", "b")
    assert here.granted()[-2:] == ["large", "c"]


def test_when_an_old_one_leaves_those_behind_it_are_granted(crowd):
    here = crowd(patience=1)
    here.ask("a", 40)
    here.ask("large", 32)
    here.pass_time(2)
    assert here.ask("b", 4) is None
    here.cancel("large")
    assert here.answer("b")


def test_when_an_old_one_times_out_those_behind_it_are_granted(crowd):
    here = crowd(patience=1)
    here.ask("a", 40)
    here.ask("large", 32, strategy=Wait(5))
    here.pass_time(2)
    assert here.ask("b", 4) is None
    here.pass_time(3)
    assert here.answer("large").reason == "timeout"
    assert here.answer("b")


def test_nobody_is_overtaken_by_one_that_came_before(crowd):
    here = crowd(most_overtaken=1)
    here.ask("a", 40), here.ask("b", 24)
    here.ask("first", 20, tenant="x")
    here.ask("large", 40, tenant="y")
    here.free("b")
    assert here.answer("first")
    assert here.ask("small", 4)  # this is the one overtaking
    here.free("small")
    assert here.ask("smaller", 1) is None


def test_a_higher_priority_goes_first_until_somebody_is_old(crowd):
    here = crowd(patience=10)
    here.ask("a", 64)
    here.ask("low", 64)
    here.ask("high", 64, priority=1)
    here.free("a")
    assert here.granted() == ["a", "high"]
    here.ask("higher", 64, priority=2)
    here.pass_time(10)
    here.ask("highest", 64, priority=3)
    here.free("high")
    assert here.granted() == ["a", "high", "low"]


def test_a_wait_ends_in_time_with_a_refusal(crowd):
    here = crowd(Wait(5))
    here.ask("a", 64)
    here.ask("b", 8)
    here.pass_time(4.9)
    assert here.answer("b") is None
    here.pass_time(0.1)
    refused = here.answer("b")
    assert (refused.reason, refused.waited, refused.blocks_missing) == ("timeout", 5.0, 2)
    assert len(here.queue) == 0


def test_no_time_at_all_is_a_refusal_at_once(crowd):
    here = crowd(Wait(0))
    here.ask("a", 64)
    assert here.ask("b", 8).reason == "timeout"


def test_cancel_refuses_whoever_waits(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("b", 8)
    assert "b" in here.queue
    assert here.queue.cancel("b") is True
    assert here.answer("b").reason == "cancelled"
    assert here.queue.cancel("b") is False


def test_a_raced_grant_keeps_its_place(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("b", 64), here.ask("c", 64)
    watcher = here.queue._watcher
    here.cache._unwatch(watcher)
    here.cache.free_for("a")
    assert here.cache.allocate_for("outsider", 8)
    here.cache._watch(watcher)
    here.queue.poke()
    assert here.answer("b") is None
    here.free("outsider")
    assert here.granted() == ["a", "b"]


class Raced(KVCache):
    """Somebody else is faster, once."""

    def _allocate_up_to(self, request_id, *rest):
        if self.racer is not None:
            racer, self.racer = self.racer, None
            assert self.allocate_for(*racer)
        return super()._allocate_up_to(request_id, *rest)


def test_when_one_loses_a_race_others_that_still_fit_are_granted():
    cache = Raced(1, 1, 4, 4 * BLOCKS, 4, backend="none")
    cache.racer = None
    here = Crowd(cache, Wait())
    here.ask("a", 64)
    here.ask("large", 64), here.ask("small", 32)
    cache.racer = ("outsider", 32)
    here.free("a")
    assert here.answer("large") is None
    assert here.answer("small")
    here.close()


def test_a_limit_that_is_lowered_wakes(crowd):
    here = crowd()
    here.ask("a", 8, max_tokens=64)
    here.ask("b", 8)
    assert here.cache.set_limit("a", 40)
    assert here.answer("b")
    assert here.queue._accounts[None].blocks == 12


@pytest.mark.parametrize("by_batch", [False, True])
def test_a_truncation_wakes_where_more_is_promised_than_there_is(crowd, by_batch):
    here = crowd(overcommit=2.0)
    here.ask("a", 64)
    here.ask("b", 8)
    if by_batch:
        assert here.cache.batch(["a"]).truncate(8).all()
    else:
        assert here.cache.truncate("a", 56)
    assert here.answer("b")


def test_closing_the_cache_ends_every_wait(make_cache):
    here = Crowd(make_cache(1, 1, 4, 64, 4, backend="none"), Wait())
    here.ask("a", 64)
    here.ask("b", 8)
    here.cache.close()
    with pytest.raises(CacheClosed):
        here.answer("b")
    assert len(here.queue) == 0
    here.loop.close()


def test_an_id_that_was_freed_unseen_and_came_again_is_counted_once(crowd):
    here = crowd()
    here.ask("a", 40, tenant="t")
    here.cache._unwatch(here.queue._watcher)
    here.free("a")
    here.cache._watch(here.queue._watcher)
    here.ask("a", 8, tenant="u")
    accounts = {name: (each.blocks, each.sequences) for name, each in here.queue._accounts.items()}
    assert accounts == {"u": (2, 1)}


def test_a_free_asks_the_cache_once_for_each_of_those_that_it_grants(crowd, monkeypatch):
    here = crowd()
    here.ask("a", 64)
    for number in range(10_000):
        here.tell(number, here.queue.allocate_async(number, 40 + number % 20))
    here.settle()
    assert len(here.queue) == 10_000
    asked, attempt = [], here.queue._attempt
    monkeypatch.setattr(
        here.queue, "_attempt", lambda waiter: asked.append(waiter.request_id) or attempt(waiter)
    )
    here.free("a")
    assert asked == [0]
    here.free(0)
    assert asked == [0, 1]
    here.cache.free_for(1)
    monkeypatch.undo()


def test_closing_the_queue_refuses_who_waits_and_who_comes(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("b", 8)
    here.queue.close()
    assert here.answer("b").reason == "cancelled"
    with pytest.raises(KVCacheError):
        here.ask("c", 1)
    assert "a" in here.cache


def test_several_queues_watch_one_cache(make_cache):
    cache = make_cache(1, 1, 4, 64, 4, backend="none")
    first, second = Crowd(cache, Wait()), Crowd(cache, Wait())
    first.ask("a", 64)
    assert second.ask("b", 64) is None
    first.free("a")
    assert second.answer("b")
    first.ask("c", 64)
    second.free("b")
    assert first.answer("c")
    first.close(), second.close()
    assert cache.allocate_for("d", 64)


def test_frees_that_nobody_tells_of_are_found_by_a_poke(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("b", 64)
    here.cache._unwatch(here.queue._watcher)
    here.free("a")
    assert here.answer("b") is None
    here.queue.poke()
    assert here.answer("b")
    here.cache._watch(here.queue._watcher)


# ---- holds


def test_memory_freed_under_a_hold_is_granted_when_the_hold_ends(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("b", 8)
    with here.cache.hold():
        here.free("a")
        assert here.answer("b") is None
    assert here.answer("b")


def test_waiting_inside_a_hold_of_ones_own_raises(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Wait())
    queue.allocate("a", 64)
    with cache.hold(), pytest.raises(CacheHeld):
        queue.allocate("b", 8)
    assert len(queue) == 0


def test_who_has_grown_in_a_batch_is_evicted_after_those_that_have_not(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Evict())
    for name in "abc":
        queue.allocate(name, 8, max_tokens=20)
    batch = cache.batch(["a", "b"])
    batch.append()
    assert queue.allocate("d", 8, max_tokens=20)
    assert list(cache) == ["a", "b", "d"]
    batch.append(counts=[0, 1])
    assert queue.allocate("e", 8, max_tokens=20)
    assert list(cache) == ["b", "d", "e"]
    cache.check()


def test_nobody_is_evicted_inside_a_hold_of_ones_own(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Evict())
    queue.allocate("a", 64)
    with cache.hold(), pytest.raises(CacheHeld):
        queue.allocate("b", 8)
    assert list(cache) == ["a"]
    assert queue.allocate("b", 8)


def test_growth_waits_for_the_room_of_somebody_else(crowd):
    here = crowd(overcommit=2.0)
    here.ask("a", 4, max_tokens=32), here.ask("b", 60)
    assert here.grow("a") is None
    here.free("b")
    assert here.answer(("grow", "a")) is True
    assert here.cache.used_tokens("a") == 5


def test_growth_goes_before_newcomers(crowd):
    here = crowd(overcommit=2.0)
    here.ask("a", 4, max_tokens=64), here.ask("b", 60)
    assert here.ask("c", 60) is None
    assert here.grow("a", 4) is None
    here.free("b")
    assert here.answer(("grow", "a")) is True
    assert here.answer("c") is None


def test_growth_past_the_limit_is_refused_at_once(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache, Wait())
    queue.allocate("a", 4, max_tokens=5)
    assert queue.append("a") is True
    assert queue.append("a").reason == "never_fits"
    with pytest.raises(UnknownSequence):
        queue.append("b")


@pytest.mark.parametrize("tokens", [2, [7, 8], np.int64(2), np.array([7, 8])])
def test_growth_is_by_a_count_or_by_ids(crowd, tokens):
    here = crowd(overcommit=2.0)
    here.ask("a", 4, max_tokens=32), here.ask("b", 60)
    assert here.grow("a", tokens) is None
    here.free("b")
    assert here.answer(("grow", "a")) is True
    assert here.queue.append("a", tokens) is True
    assert here.cache.used_tokens("a") == 8


def test_cancelled_growth_is_taken_back(crowd):
    here = crowd(overcommit=2.0)
    here.ask("a", 4, max_tokens=32), here.ask("b", 60)
    here.grow("a")
    here.cache.free_for("b")  # granted; the task has not run since
    assert here.cache.used_tokens("a") == 5
    here.cancel(("grow", "a"))
    assert here.cache.used_tokens("a") == 4


def test_a_watermark_keeps_blocks_for_growth(crowd):
    here = crowd(Reject(), overcommit=2.0, keep_free=16)
    assert here.ask("a", 40, max_tokens=56)
    refused = here.ask("b", 12)
    assert (refused.reason, refused.blocks_missing, refused.blocks_free) == ("watermark", 1, 6)
    assert here.ask("b", 8)
    assert here.queue.append("a", 16) is True
    assert here.ask("c", 52).reason == "never_fits"


# ---- tenants


def test_a_tenant_has_no_more_tokens_than_it_may(crowd):
    here = crowd(Reject(), tenants={"t": TenantLimit(tokens=24)})
    assert here.ask("a", 4, max_tokens=16, tenant="t")
    refused = here.ask("b", 4, max_tokens=12, tenant="t")
    assert (refused.reason, refused.tenant, refused.blocks_missing, refused.fitting_tokens) == (
        "tenant_limit",
        "t",
        1,
        8,
    )
    assert here.ask("b", 4, max_tokens=8, tenant="t")
    assert here.ask("c", 30, tenant="other")


def test_reduce_knows_the_limit_of_the_tenant(crowd):
    here = crowd(Reduce(4), tenants={"t": TenantLimit(tokens=24)})
    assert here.ask("a", 4, max_tokens=60, tenant="t").max_tokens == 24


def test_a_tenant_has_no_more_sequences_than_it_may(crowd):
    here = crowd(tenant_limit=TenantLimit(sequences=1))
    assert here.ask("a", 4, tenant="t")
    assert here.ask("b", 4, tenant="t") is None
    assert here.ask("c", 4, tenant="u")
    here.free("a")
    assert here.answer("b")


@pytest.mark.parametrize("size", [{"max_tokens": 12}, {"max_new_tokens": 7}])
def test_a_tenant_within_its_limit_is_granted_without_a_place_in_a_line(make_cache, monkeypatch, size):
    queue = AllocationQueue(make_cache(), Reject(), tenants={"t": TenantLimit(tokens=24, sequences=2)})
    with monkeypatch.context() as patch:
        patch.setattr(queue, "_submit", None)
        leases = [queue.allocate(name, 5, tenant="t", **size) for name in "ab"]
    assert [lease.max_tokens for lease in leases] == [12, 12]
    assert queue._accounts["t"].blocks == 6
    assert queue.allocate("c", 1, tenant="t").reason == "tenant_limit"


def test_a_limit_is_counted_in_whole_blocks_before_the_cache_is_asked(make_cache, monkeypatch):
    cache = make_cache()
    queue = AllocationQueue(cache, Reject(), tenants={"t": TenantLimit(tokens=24)})
    assert queue.allocate("a", 5, max_tokens=14, tenant="t")
    monkeypatch.setattr(cache, "_allocate_up_to", None)
    for size in ({"max_tokens": 9}, {"max_new_tokens": 4}):
        refusal = queue.allocate("b", 5, tenant="t", **size)
        assert (refusal.reason, refusal.blocks_needed, refusal.blocks_missing) == ("tenant_limit", 3, 1)
    assert "b" not in cache


def test_bad_sizes_of_a_tenant_with_a_limit_raise_and_leave_no_account(make_cache):
    queue = AllocationQueue(make_cache(), Wait(), tenant_limit=TenantLimit(sequences=1))
    with pytest.raises(RequestTooLarge):
        queue.allocate("a", 65, tenant="t")
    with pytest.raises(ValueError):
        queue.allocate("a", 8, max_tokens=4, tenant="t")
    assert "t" not in queue._accounts


def test_a_share_is_of_the_arena(crowd):
    here = crowd(Reject(), tenants={"t": TenantLimit(share=0.25)})
    assert here.ask("a", 16, tenant="t")
    assert here.ask("b", 1, tenant="t").reason == "tenant_limit"


def test_more_than_a_tenant_may_ever_have_is_refused_at_once(crowd):
    here = crowd(tenants={"t": TenantLimit(tokens=24)})
    assert here.ask("a", 25, tenant="t").reason == "never_fits"


def test_an_old_one_at_its_tenants_limit_keeps_nobody_else_waiting(crowd):
    here = crowd(patience=1, tenants={"t": TenantLimit(tokens=24)})
    here.ask("a", 16, tenant="t")
    assert here.ask("b", 16, tenant="t") is None
    here.pass_time(2)
    assert here.ask("c", 4, tenant="t") is None  # what the tenant has left is kept for the old one
    assert here.ask("d", 4, tenant="u")


def test_what_comes_free_goes_to_the_tenant_that_has_least(crowd):
    here = crowd(patience=100)
    here.ask("x", 32, tenant="x"), here.ask("y", 16, tenant="y"), here.ask("z", 16, tenant="z")
    for number in range(3):
        here.ask(("x", number), 8, tenant="x")
    for number in range(3):
        here.ask(("y", number), 8, tenant="y")
    here.free("x")  # x has nothing now, y has 4 blocks
    assert here.granted()[3:] == [("x", 0), ("x", 1), ("x", 2), ("y", 0)]  # x came first where both had 4


def test_tenants_that_wait_come_to_hold_the_same(crowd):
    here = crowd(patience=1000, most_overtaken=1000)
    here.ask("all", 64, tenant="old")
    for number in range(16):
        here.ask(("greedy", number), 4, tenant="greedy")
    for number in range(16):
        here.ask(("modest", number), 4, tenant="modest")
    here.free("all")
    held = [name[0] for name in here.granted()[1:]]
    assert (held.count("greedy"), held.count("modest")) == (8, 8)


def test_accounts_of_tenants_that_have_gone_are_dropped(crowd):
    here = crowd(Reject())
    for number in range(100):
        here.ask(number, 64, tenant=number)
        here.free(number)
    assert set(here.queue._accounts) <= {None}


# ---- eviction


def test_evict_ends_the_least_recently_appended(crowd):
    gone = []
    here = crowd(Evict("lru", notify=gone.append))
    for name in "abcd":
        here.ask(name, 12, max_tokens=16)
    assert here.queue.append("a")
    here.queue.touch(["b", "unknown"])
    assert here.ask("e", 16)
    assert gone == ["c"]
    assert sorted(here.cache) == ["a", "b", "d", "e"]


def test_evict_ends_one_at_a_time_until_it_fits(crowd):
    gone = []
    here = crowd(Evict(notify=gone.append))
    for name in "abcd":
        here.ask(name, 16)
    assert here.ask("e", 20)
    assert gone == ["a", "b"]


def test_the_owners_callback_comes_before_the_memory_goes(crowd):
    seen = []
    here = crowd(Evict(notify=lambda request_id: seen.append("nobody's")))
    here.ask(
        "a", 64, on_evict=lambda request_id: seen.append((request_id, here.cache.used_tokens(request_id)))
    )
    assert here.ask("b", 4)
    assert seen == [("a", 64)]


def test_a_callback_that_raises_frees_nothing_and_its_error_surfaces(crowd):
    def refuse(request_id):
        raise RuntimeError(f"{request_id} is busy")

    here = crowd(Evict(), most_overtaken=0)
    here.ask("a", 64, on_evict=refuse)
    with pytest.raises(RuntimeError, match="a is busy"):
        here.ask("b", 4)
    assert list(here.cache) == ["a"]
    assert len(here.queue) == 0
    with pytest.raises(RuntimeError, match="a is busy"):  # it can be asked again
        here.ask("b", 4)


def test_evict_by_priority_ends_lower_ones_only(crowd):
    gone = []
    here = crowd(Evict("priority", notify=gone.append))
    here.ask("low", 16, priority=0), here.ask("lowest", 16, priority=-1), here.ask("high", 32, priority=5)
    assert here.ask("b", 16, priority=1)
    assert gone == ["lowest"]
    assert here.ask("c", 48, priority=5).reason == "arena_full"
    assert gone == ["lowest"]


def test_evict_by_a_callable(crowd):
    asked = []

    def choose(request_ids):
        asked.append(request_ids)
        return "b" if "b" in request_ids else None

    here = crowd(Evict(choose))
    here.ask("a", 32), here.ask("b", 32)
    assert here.ask("c", 32)
    assert asked == [["a", "b"]]
    assert not here.ask("d", 32)
    with pytest.raises(UnknownSequence):
        here.ask("e", 32, strategy=Evict(lambda request_ids: "nobody"))


def test_nobody_is_evicted_where_that_would_not_be_enough(crowd):
    here = crowd(Evict())
    here.cache.allocate_for("not of the queue", 40)
    here.ask("a", 24)
    assert here.ask("b", 28).reason == "arena_full"
    assert "a" in here.cache


def test_growth_may_evict_but_never_itself(crowd):
    here = crowd(Evict(), overcommit=2.0)
    here.ask("a", 4, max_tokens=64), here.ask("b", 60)
    assert here.grow("a", 4) is True
    assert list(here.cache) == ["a"]
    here.ask("b", 56)
    assert here.queue.append("a") is True
    assert list(here.cache) == ["a"]
    assert here.queue.append("a", 55) is True


def test_a_chain_waits_first_and_evicts_then(crowd):
    here = crowd(Reduce(32) | Wait(5) | Evict())
    here.ask("a", 16), here.ask("b", 48)
    assert here.ask("c", 4, max_tokens=64) is None
    here.pass_time(5)
    assert here.answer("c").max_tokens == 64
    assert list(here.cache) == ["c"]


def test_whoever_evicts_is_served_before_those_who_only_wait(crowd):
    here = crowd()
    here.ask("a", 64)
    here.ask("waits", 64)
    assert here.ask("evicts", 64, strategy=Evict())
    assert here.answer("waits") is None
