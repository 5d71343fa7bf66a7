"""Whom a queue ends to make room: nobody in vain, and of a tenant at its limit its own sequences only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCache
from kvcache.admission import AllocationQueue, Evict, Reduce, Swap, TenantLimit

SIZE, BLOCKS = 4, 8


@pytest.fixture
def gone():
    return []


@pytest.fixture
def make_queue(make_cache, gone):
    def make(strategy=None, *, overcommit=1.0, placement="contiguous", **options):
        cache = make_cache(
            1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=overcommit, placement=placement
        )
        return cache, AllocationQueue(cache, strategy or Evict("lru", notify=gone.append), **options)

    return make


# ---- nobody in vain


def test_growth_ends_nobody_where_outsiders_have_the_memory(make_queue, gone):
    cache, queue = make_queue(overcommit=2.0)
    cache.allocate_for("outsider", 24)
    queue.allocate("a", 4, max_tokens=32)
    queue.allocate("b", 4, max_tokens=4)
    refused = queue.append("a", 20)
    assert (refused.reason, refused.blocks_needed, refused.blocks_free) == ("arena_full", 5, 0)
    assert gone == [] and list(cache) == ["outsider", "a", "b"]
    assert queue.append("a", 4) is True  # one block is what "b" has
    assert gone == ["b"]


def test_a_newcomer_ends_nobody_where_outsiders_have_the_memory(make_queue, gone):
    cache, queue = make_queue(overcommit=3.0)
    cache.allocate_for("outsider", 24)
    queue.allocate("a", 4, max_tokens=16), queue.allocate("b", 4, max_tokens=16)
    assert queue.allocate("new", 12).reason == "arena_full"
    assert gone == []
    assert queue.allocate("new", 8)
    assert gone == ["a", "b"]


def test_nobody_is_ended_whose_blocks_stay_with_a_fork(make_queue, gone):
    cache, queue = make_queue(placement="paged")
    queue.allocate("a", 16), cache.fork("a", "twin")
    assert queue.allocate("new", 20).reason == "arena_full"
    assert gone == []
    queue.allocate("b", 16)
    assert queue.allocate("new", 16)
    assert gone == ["b"]


def test_two_that_share_their_blocks_are_ended_where_that_is_enough(make_queue, gone):
    cache, queue = make_queue(placement="paged")
    prompt = list(range(17))
    queue.allocate("a", prompt), cache.commit("a")
    assert queue.allocate("b", prompt).cached_tokens == 16
    assert queue.allocate("new", 28)
    assert gone == ["a", "b"]


def test_the_copies_that_forks_may_need_come_free_with_a_victim(make_queue, gone):
    cache, queue = make_queue(placement="paged")
    queue.allocate("a", 6, max_tokens=8), cache.fork("a", "twin")
    cache.allocate_for("other", 16)
    assert cache.explain(8, 8).blocks_unclaimed == 1
    assert queue.allocate("new", 8)  # one unclaimed, and one for the copy that nobody needs any more
    assert gone == ["a"]
    cache.check()


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_nobody_is_ended_whose_prefix_is_pinned(make_queue, gone, placement):
    cache, queue = make_queue(placement=placement)
    queue.allocate("a", list(range(17)), max_tokens=20), cache.commit("a")
    assert cache.pin("a") == 16
    assert queue.allocate("new", 20).reason == "arena_full"
    assert gone == []
    assert queue.allocate("new", 16)  # the block that is not pinned, and three that were free
    assert gone == ["a"]


def test_nobody_is_ended_below_the_watermark(make_queue, gone):
    cache, queue = make_queue(overcommit=2.0, keep_free=8)
    cache.allocate_for("outsider", 16)
    queue.allocate("a", 4)
    assert queue.allocate("b", 12).reason == "watermark"
    assert gone == []
    assert queue.allocate("b", 8)
    assert gone == ["a"]


def test_the_watermark_is_not_for_growth(make_queue, gone):
    cache, queue = make_queue(overcommit=2.0, keep_free=8)
    queue.allocate("a", 4, max_tokens=32), queue.allocate("b", 16)
    cache.allocate_for("outsider", 12)
    assert queue.append("a", 16) is True
    assert gone == ["b"]


def test_the_copy_of_a_shared_block_counts_as_growth(make_queue, gone):
    cache, queue = make_queue(placement="paged", overcommit=3.0)
    queue.allocate("a", 6, max_tokens=32), cache.fork("a", "twin")
    cache.allocate_for("outsider", 20)
    queue.allocate("b", 4)
    assert queue.append("a", 4).blocks_needed == 2  # its own copy of the second block, and a third
    assert gone == []
    assert queue.append("a", 1) is True
    assert gone == ["b"]


def test_those_who_have_no_part_in_it_are_passed_over(make_queue, gone):
    cache, queue = make_queue(placement="paged", overcommit=2.0)
    queue.allocate("shared", 16), cache.fork("shared", "twin")
    queue.allocate("claims", 4, max_tokens=16), cache.truncate("claims", 0)
    queue.allocate("holds", 16)
    assert queue.allocate("new", 8)
    assert gone == ["holds"]


def test_claims_alone_are_enough_where_promises_are_what_is_missing(make_queue, gone):
    cache, queue = make_queue()
    queue.allocate("claims", 4, max_tokens=32)
    cache.truncate("claims", 0)
    assert queue.allocate("new", 8)
    assert gone == ["claims"]


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_callable_is_asked_only_where_it_can_help(make_queue, placement):
    asked = []

    def choose(request_ids):
        asked.append(request_ids)
        return request_ids[-1]

    cache, queue = make_queue(Evict(choose), placement=placement, overcommit=2.0)
    cache.allocate_for("outsider", 16)
    queue.allocate("a", 8), queue.allocate("b", 8)
    assert queue.allocate("new", 20).reason == "arena_full"
    assert asked == []
    assert queue.allocate("new", 16)
    assert asked == [["a", "b"], ["a"]]


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_nobody_is_swapped_out_in_vain(placement):
    with KVCache(1, 1, 4, SIZE * BLOCKS, SIZE, placement=placement, overcommit=3.0) as cache:
        queue = AllocationQueue(cache, Swap())
        cache.allocate_for("outsider", 24)
        queue.allocate("a", 4, max_tokens=16), queue.allocate("b", 4, max_tokens=16)
        assert queue.allocate("new", 12).reason == "arena_full"
        assert not cache.is_suspended("a") and not cache.is_suspended("b")
        assert queue.allocate("new", 8)
        assert cache.is_suspended("a") and cache.is_suspended("b")


# ---- a tenant at its limit


def test_a_tenant_at_its_number_of_sequences_ends_one_of_its_own(make_queue, gone):
    cache, queue = make_queue(tenant_limit=TenantLimit(sequences=1))
    queue.allocate("other", 4, tenant="u"), queue.allocate("a", 4, tenant="t")
    assert queue.allocate("b", 4, tenant="t")
    assert gone == ["a"] and list(cache) == ["other", "b"]


def test_a_tenant_at_its_tokens_ends_its_own_until_there_is_room(make_queue, gone):
    _, queue = make_queue(tenants={"t": TenantLimit(tokens=12)})
    queue.allocate("other", 4)
    for name in "abc":
        queue.allocate(name, 4, tenant="t")
    assert queue.allocate("d", 8, tenant="t")
    assert gone == ["a", "b"]


def test_others_are_ended_as_well_where_memory_is_missing_too(make_queue, gone):
    _, queue = make_queue(tenants={"t": TenantLimit(tokens=16)})
    queue.allocate("other", 20), queue.allocate("a", 12, tenant="t")
    assert queue.allocate("b", 16, tenant="t")
    assert gone == ["a", "other"]


def test_nobody_is_ended_where_the_tenants_own_are_not_enough(make_queue, gone):
    _, queue = make_queue(Evict("priority", notify=gone.append), tenants={"t": TenantLimit(tokens=16)})
    queue.allocate("other", 4), queue.allocate("low", 4, tenant="t")
    queue.allocate("high", 8, tenant="t", priority=2)
    assert queue.allocate("b", 12, tenant="t", priority=1).reason == "tenant_limit"
    assert gone == []
    assert queue.allocate("b", 8, tenant="t", priority=1)
    assert gone == ["low"]


def test_the_least_that_would_do_is_what_victims_are_counted_for(make_queue, gone):
    cache, queue = make_queue(Reduce(8) | Evict("lru", notify=gone.append))
    cache.allocate_for("outsider", 24)
    queue.allocate("a", 8)
    assert queue.allocate("b", 4, max_tokens=32).max_tokens == 8
    assert gone == ["a"]


# ---- against the truth


@given(data=st.data())
def test_what_would_come_free_is_what_comes_free(data):
    placement = data.draw(st.sampled_from(["contiguous", "paged"]))
    overcommit = data.draw(st.sampled_from([1.0, 2.0]))
    cache = KVCache(1, 1, 4, SIZE * 16, SIZE, backend="none", placement=placement, overcommit=overcommit)
    for number in range(data.draw(st.integers(1, 12))):
        live = list(cache)
        step = data.draw(st.sampled_from(["ask", "ask", "fork", "grow", "cut", "pin"]))
        if step == "ask" or not live:
            prompt = [
                *range(data.draw(st.integers(0, 12))),
                *data.draw(st.lists(st.integers(100, 102), max_size=6)),
                7,
            ]
            limit = len(prompt) + data.draw(st.integers(0, 9))
            if cache.allocate_for(number, prompt, max_tokens=limit) and data.draw(st.booleans()):
                cache.commit(number)
        elif step == "fork":
            cache.fork(data.draw(st.sampled_from(live)), number)
        elif step == "grow":
            cache.append_tokens(data.draw(st.sampled_from(live)), data.draw(st.integers(1, 6)))
        elif step == "cut":
            name = data.draw(st.sampled_from(live))
            cache.truncate(name, data.draw(st.integers(0, cache.used_tokens(name))))
        else:
            cache.pin(data.draw(st.sampled_from(live)))
    victims = [name for name in cache if data.draw(st.booleans())]
    before = cache.stats()
    free, unclaimed, _, blocks, claims = cache._room_without([cache._record_of(name) for name in victims])
    assert cache.stats() == before
    cache.check()
    for name in victims:
        there = cache._room()
        cache.free_for(name)
        if cache._room()[0] > there[0]:
            assert blocks[victims.index(name)] > 0
        if cache._room()[1] > there[1]:
            assert blocks[victims.index(name)] + claims[victims.index(name)] > 0
    assert cache._room() == (free, unclaimed)
    cache.check()


@given(data=st.data())
def test_nobody_is_ended_for_a_request_that_is_refused(data):
    placement = data.draw(st.sampled_from(["contiguous", "paged"]))
    overcommit = data.draw(st.sampled_from([1.0, 2.0]))
    cache = KVCache(1, 1, 4, SIZE * 12, SIZE, backend="none", placement=placement, overcommit=overcommit)
    gone = []
    evict = Evict(data.draw(st.sampled_from(["lru", "priority"])), notify=gone.append)
    limit = TenantLimit(
        tokens=data.draw(st.sampled_from([None, 16, 24])), sequences=data.draw(st.sampled_from([None, 2]))
    )
    queue = AllocationQueue(cache, keep_free=data.draw(st.sampled_from([0, 4, 8])), tenants={"t": limit})

    def prompt():
        family, length = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 20))
        return [family * 100 + at for at in range(length)] if data.draw(st.booleans()) else length

    def ask(name, **options):
        wanted, more = prompt(), data.draw(st.integers(0, 8))
        tenant, priority = data.draw(st.sampled_from([None, "t"])), data.draw(st.integers(0, 1))
        return queue.allocate(name, wanted, max_new_tokens=more, tenant=tenant, priority=priority, **options)

    for number in range(data.draw(st.integers(2, 10))):
        live = list(cache)
        step = data.draw(st.sampled_from(["ask", "ask", "ask", "outsider", "fork", "pin", "cut"]))
        if step == "ask" or not live:
            if ask(number):
                cache.commit(number)
        elif step == "outsider":
            cache.allocate_for(number, prompt())
        elif step == "fork":
            cache.fork(data.draw(st.sampled_from(live)), number)
        elif step == "pin":
            cache.pin(data.draw(st.sampled_from(live)))
        else:
            name = data.draw(st.sampled_from(live))
            cache.truncate(name, data.draw(st.integers(0, cache.used_tokens(name))))
    grower = data.draw(st.sampled_from([None, *cache]))
    if grower is None:
        answer = ask("new", strategy=evict)
    else:
        answer = queue.append(grower, data.draw(st.integers(1, 12)), strategy=evict)
    if not answer:
        assert gone == []
    cache.check()
