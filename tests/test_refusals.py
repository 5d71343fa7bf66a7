"""What refusals say in numbers: what was asked, what was there, what would have sufficed."""

import math

import pytest

from kvcache.admission import AllocationQueue, Reduce, TenantLimit

SIZE, BLOCKS = 4, 8


@pytest.fixture(params=[1.0, 2.0, math.inf])
def overcommit(request):
    return request.param


@pytest.fixture
def cache(make_cache, overcommit):
    return make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=overcommit)


def numbers(refused):
    return (
        refused.reason,
        refused.tokens,
        refused.max_tokens,
        refused.blocks_needed,
        refused.blocks_missing,
        refused.fitting_tokens,
    )


def test_a_limit_that_is_too_large_is_told_beside_the_prompt(cache):
    assert numbers(cache.explain(4, 33)) == ("never_fits", 4, 33, 9, 1, 32)
    assert numbers(cache.explain([1, 2, 3, 4], max_new_tokens=40)) == ("never_fits", 4, 44, 11, 3, 32)
    assert numbers(AllocationQueue(cache).explain(4, 33)) == ("never_fits", 4, 33, 9, 1, 32)
    assert cache.allocate_for("a", 4, max_tokens=32)


@pytest.mark.parametrize("limits", [{"max_tokens": 40}, {"max_new_tokens": 5}])
def test_a_prompt_that_is_too_large_is_told_with_its_limit(cache, limits):
    assert numbers(cache.explain(35, **limits)) == ("never_fits", 35, 40, 10, 2, 0)
    assert numbers(cache.explain(list(range(35)), **limits)) == ("never_fits", 35, 40, 10, 2, 0)
    with pytest.raises(TypeError):
        cache.explain(35, **dict.fromkeys(limits, "x"))


def test_a_large_limit_that_others_are_in_the_way_of_is_still_never(cache, overcommit):
    cache.allocate_for("a", 4, max_tokens=16)
    fitting = 16 if overcommit == 1.0 else 32
    assert numbers(cache.explain(4, 33)) == ("never_fits", 4, 33, 9, 1, fitting)


def test_no_more_is_told_to_be_unclaimed_than_there_is(cache, overcommit):
    queue = AllocationQueue(cache)
    cache.allocate_for("a", 28)
    there = 1 if overcommit == 1.0 else BLOCKS
    assert cache.explain(8).blocks_unclaimed == queue.explain(8).blocks_unclaimed == there
    assert queue.allocate("b", 8).blocks_unclaimed == there
    assert queue.explain(4).blocks_unclaimed == there


def test_the_queue_explains_never_as_it_refuses(cache):
    queue = AllocationQueue(cache, keep_free=8, tenants={"t": TenantLimit(tokens=8)})
    for prompt, limit, tenant in ((28, 28, None), (4, 12, "t"), (12, 12, "t")):
        refused = queue.allocate("a", prompt, max_tokens=limit, tenant=tenant)
        assert refused.reason == "never_fits"
        assert numbers(queue.explain(prompt, limit, tenant=tenant)) == numbers(refused)
    assert numbers(queue.explain(28)) == ("never_fits", 28, 28, 7, 1, 0)
    assert numbers(queue.explain(4, 12, tenant="t")) == ("never_fits", 4, 12, 3, 1, 8)
    assert queue.allocate("a", 4, max_tokens=12, tenant="t", strategy=Reduce(4)).max_tokens == 8


def test_blocks_are_not_what_a_tenant_with_enough_sequences_is_missing(cache):
    queue = AllocationQueue(cache, tenant_limit=TenantLimit(sequences=1))
    queue.allocate("a", 4, tenant="t")
    assert numbers(queue.allocate("b", 4, tenant="t")) == ("tenant_limit", 4, 4, 1, 0, 0)


def test_what_is_missing_beside_the_tenants_limit_is_told_as_well(cache):
    queue = AllocationQueue(cache, tenant_limit=TenantLimit(sequences=1))
    queue.allocate("a", 4, tenant="t")
    cache.allocate_for("other", 20)
    assert numbers(queue.allocate("b", 12, tenant="t"))[::4] == ("tenant_limit", 1)


def test_a_tenant_whose_sequence_was_given_more_has_no_room(cache):
    queue = AllocationQueue(cache, tenants={"t": TenantLimit(tokens=12)})
    queue.allocate("a", 8, tenant="t")
    assert cache.set_limit("a", 16)
    assert numbers(queue.allocate("b", 8, tenant="t")) == ("tenant_limit", 8, 8, 2, 3, 0)


def test_explain_does_not_look_at_holds(cache):
    cache.allocate_for("a", 32)
    with cache.hold():
        cache.free_for("a")
        assert cache.explain(4)
