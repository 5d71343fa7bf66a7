"""Prompts whose prefix others hold, in paged placement: they need fewer blocks, and everybody who decides knows it."""

import math

import pytest
from crowd import Crowd
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCache
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, TenantLimit, Wait

SIZE, BLOCKS = 4, 8
PREFIX = list(range(16))  # four whole blocks


@pytest.fixture
def cache(make_cache):
    return make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", placement="paged")


@pytest.fixture
def crowd(make_cache):
    made = []

    def make(strategy=None, *, overcommit=1.0, **options):
        cache = make_cache(
            1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=overcommit, placement="paged"
        )
        made.append(Crowd(cache, strategy or Wait(), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def share(cache, request_id="owner", tokens=16):
    """A live sequence whose prefix is found."""
    assert cache.allocate_for(request_id, PREFIX[:tokens])
    cache.commit(request_id)


# ---- beforehand


def test_explain_counts_what_others_hold(cache):
    share(cache)
    cache.allocate_for("other", 12)
    answer = cache.explain([*PREFIX, 99])
    assert answer and (answer.blocks_needed, answer.blocks_free, answer.blocks_unclaimed) == (1, 1, 1)
    assert not cache.explain(17)
    assert cache.allocate_for("new", [*PREFIX, 99])


def test_explain_knows_whose_prefixes_they_are(cache):
    assert cache.allocate_for("owner", PREFIX, salt="hers")
    cache.commit("owner")
    cache.allocate_for("other", 12)
    assert cache.explain([*PREFIX, 99], salt="hers")
    assert cache.explain([*PREFIX, 99]).reason == "arena_full"
    queue = AllocationQueue(cache)
    assert queue.explain([*PREFIX, 99], salt="hers")
    assert queue.explain([*PREFIX, 99], salt="his").reason == "arena_full"
    with pytest.raises(TypeError):
        cache.explain(PREFIX, salt=[])


def test_what_is_merely_cached_costs_what_free_blocks_cost(cache):
    share(cache)
    cache.free_for("owner")
    cache.allocate_for("other", 12)
    answer = cache.explain([*PREFIX, 99])
    assert answer and (answer.blocks_needed, answer.blocks_free) == (5, 5)
    cache.allocate_for("one more", 1)
    assert cache.explain([*PREFIX, 99]).blocks_missing == 1


def test_what_is_pinned_costs_nothing(cache):
    share(cache)
    cache.pin("owner"), cache.free_for("owner")
    cache.allocate_for("other", 12)
    assert cache.explain([*PREFIX, 99]).blocks_needed == 1


def test_contiguous_placement_copies_what_it_hits(make_cache):
    cache = make_cache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none")
    share(cache)
    assert cache.explain([*PREFIX, 99]).blocks_needed == 5
    assert cache.allocate_for("new", [*PREFIX, 99]) is None


def test_a_refusal_tells_what_would_have_fitted_with_what_is_shared(cache):
    share(cache)
    cache.allocate_for("other", 4)
    queue = AllocationQueue(cache)
    refused = queue.allocate("new", [*PREFIX, 99], max_tokens=32)
    assert (refused.reason, refused.blocks_needed, refused.blocks_missing) == ("promises", 4, 1)
    assert refused.fitting_tokens == 28
    assert queue.allocate("new", [*PREFIX, 99], max_tokens=32, strategy=Reduce(17)).max_tokens == 28


def test_the_tenant_pays_for_what_it_shares(cache):
    share(cache)
    queue = AllocationQueue(cache, tenants={"t": TenantLimit(tokens=24)})
    assert queue.allocate("a", [*PREFIX, 99], tenant="t")
    refused = queue.allocate("b", [*PREFIX, 98], tenant="t")
    assert (refused.reason, refused.blocks_needed, refused.blocks_missing) == ("tenant_limit", 1, 4)
    assert refused.fitting_tokens == 0


# ---- in the queue


def test_whoever_shares_a_prefix_is_granted_beside_one_that_waits(crowd):
    here = crowd()
    share(here.cache)
    here.cache.allocate_for("other", 12)
    assert here.ask("large", 32) is None
    assert here.ask("new", [*PREFIX, 99])


def test_a_waiter_is_granted_as_soon_as_its_own_blocks_are_free(crowd):
    here = crowd()
    share(here.cache)
    here.ask("other", 12), here.ask("small", 4)
    assert here.ask("new", [*PREFIX, 99]) is None
    here.free("small")
    assert here.answer("new").cached_tokens == 16


def test_one_whose_prefix_has_been_let_go_of_needs_more_and_is_not_forgotten(crowd):
    here = crowd()
    share(here.cache)
    here.ask("other", 16)
    assert (
        here.ask("new", [*PREFIX, *range(90, 98)], max_tokens=28) is None
    )  # 3 of its 7 blocks are not there
    here.free("owner")
    assert here.answer("new") is None  # 4 are free, and it needs 7
    here.free("other")
    assert here.answer("new").cached_tokens == 16
    here.cache.check()


def test_those_behind_one_that_needs_more_than_it_seemed_are_granted(crowd):
    here = crowd()
    share(here.cache)
    here.ask("other", 16)
    assert here.ask("new", [*PREFIX, 99], max_tokens=20, priority=1) is None
    assert here.ask("small", 4) is None
    here.free("owner")  # its blocks are cached: "new" needs five now, and four are free
    assert here.answer("new") is None
    assert here.answer("small")


def test_what_has_been_computed_since_helps_the_one_that_came_first(crowd):
    here = crowd()
    assert here.cache.allocate_for("owner", PREFIX)
    here.ask("other", 12), here.ask("small", 4)
    assert here.ask("new", [*PREFIX, 99]) is None
    here.cache.commit("owner")
    here.free("small")
    assert here.answer("new").cached_tokens == 16


def test_a_waiter_of_a_tenant_at_its_limit_lets_the_next_one_pass(crowd):
    here = crowd(tenants={"t": TenantLimit(tokens=24)}, patience=math.inf, most_overtaken=1000)
    share(here.cache)
    here.ask("mine", 8, tenant="t"), here.ask("other", 8)
    assert (
        here.ask("new", [*PREFIX, 99], tenant="t") is None
    )  # one block would do, but its tenant pays for five
    assert here.ask("small", 8, tenant="t") is None
    here.free("other")
    assert here.answer("new") is None and here.answer("small")
    here.free("mine")
    assert here.answer("new") is None
    here.free("small")
    assert here.answer("new")


def test_a_victim_whose_blocks_the_newcomer_needs_is_not_ended(crowd):
    gone = []
    here = crowd(Evict("lru", notify=gone.append))
    here.ask("owner", PREFIX)
    here.cache.commit("owner")
    here.ask("other", 16)
    assert here.ask("new", [*PREFIX, 99])
    assert gone == ["other"]


def test_nobody_is_ended_where_what_comes_free_is_what_is_shared(crowd):
    gone = []
    here = crowd(Evict("lru", notify=gone.append))
    here.ask("owner", PREFIX)
    here.cache.commit("owner")
    here.cache.allocate_for("outsider", 16)
    assert here.ask("new", [*PREFIX, 99]).reason == "arena_full"
    assert gone == []


# ---- against the truth

prompts = st.one_of(
    st.integers(1, 24),
    st.builds(
        lambda family, length, tail: [family * 100 + at for at in range(length)] + tail,
        st.integers(0, 2),
        st.integers(0, 20),
        st.lists(st.integers(900, 902), min_size=1, max_size=6),
    ),
)


@st.composite
def caches(draw):
    """A cache after a few calls."""
    cache = KVCache(
        1,
        1,
        2,
        SIZE * 12,
        SIZE,
        backend="none",
        placement=draw(st.sampled_from(["contiguous", "paged"])),
        overcommit=draw(st.sampled_from([1.0, 1.5, math.inf])),
    )
    for number in range(draw(st.integers(0, 14))):
        live = list(cache)
        step = draw(st.sampled_from(["ask", "ask", "fork", "grow", "cut", "pin", "free"]))
        name = draw(st.sampled_from(live)) if live else None
        if step == "ask" or not live:
            prompt = draw(prompts)
            tokens = prompt if isinstance(prompt, int) else len(prompt)
            granted = cache.allocate_for(number, prompt, max_tokens=min(tokens + draw(st.integers(0, 9)), 48))
            if granted and draw(st.integers(0, 3)):
                cache.commit(number)
        elif step == "fork":
            cache.fork(name, number)
        elif step == "grow":
            cache.append_tokens(name, draw(st.integers(1, 6)))
        elif step == "cut":
            cache.truncate(name, draw(st.integers(0, cache.used_tokens(name))))
        elif step == "pin":
            cache.pin(name)
        else:
            cache.free_for(name)
    return cache


@given(cache=caches(), prompt=prompts, more=st.integers(0, 24))
def test_explain_is_exact(cache, prompt, more):
    tokens = prompt if isinstance(prompt, int) else len(prompt)
    limit = min(tokens + more, 48)
    answer = cache.explain(prompt, limit)
    assert bool(answer) is bool(cache.allocate_for("new", prompt, max_tokens=limit))
    if answer:
        return
    granted = [most for most in range(tokens, limit + 1) if cache.explain(prompt, most)]
    assert answer.fitting_tokens == max(granted, default=0)
    for most in (answer.fitting_tokens + 1, answer.fitting_tokens):
        if tokens <= most <= limit:
            given = cache.allocate_for("new", prompt, max_tokens=most)
            assert bool(given) is (most <= answer.fitting_tokens)
    cache.check()


@given(
    cache=caches(),
    prompt=prompts,
    more=st.integers(0, 24),
    keep_free=st.sampled_from([0, 4, 12]),
    tokens_of_tenant=st.sampled_from([None, 12, 30]),
    sequences=st.sampled_from([None, 1]),
)
def test_explain_of_the_queue_is_exact(cache, prompt, more, keep_free, tokens_of_tenant, sequences):
    tenants = {"t": TenantLimit(tokens=tokens_of_tenant, sequences=sequences)}
    queue = AllocationQueue(cache, Reject(), keep_free=keep_free, tenants=tenants)
    queue.allocate("mine", 3, max_tokens=7, tenant="t")
    tokens = prompt if isinstance(prompt, int) else len(prompt)
    limit = min(tokens + more, 48)
    answer = queue.explain(prompt, limit, tenant="t")
    got = queue.allocate("new", prompt, max_tokens=limit, tenant="t")
    assert bool(answer) is bool(got)
    if got:
        return
    assert (answer.reason, answer.blocks_needed, answer.blocks_missing, answer.fitting_tokens) == (
        got.reason,
        got.blocks_needed,
        got.blocks_missing,
        got.fitting_tokens,
    )
    less = queue.allocate("new", prompt, max_tokens=limit, tenant="t", strategy=Reduce(1))
    assert (less.max_tokens if less else 0) == answer.fitting_tokens


def leave_nobody_who_fits(data, here):
    cache, asked = here.cache, {}
    for number in range(data.draw(st.integers(3, 12))):
        live = list(cache)
        step = data.draw(st.sampled_from(["ask", "ask", "free", "commit", "pin", "grow"]))
        name = data.draw(st.sampled_from(live)) if live else None
        if step == "ask" or not live:
            prompt, tenant = data.draw(prompts), data.draw(st.sampled_from([None, "t"]))
            tokens = prompt if isinstance(prompt, int) else len(prompt)
            limit = min(tokens + data.draw(st.integers(0, 8)), 40)
            asked[number] = prompt, max(limit, tokens), tenant
            here.ask(number, prompt, max_tokens=max(limit, tokens), tenant=tenant)
        elif step == "free":
            here.free(name)
        elif step == "commit":
            cache.commit(name)
        elif step == "pin":
            cache.pin(name)
        else:
            cache.append_tokens(name, 2)
        here.queue.poke()
        here.settle()
        waiting = [each for each in asked if each in here.queue]
        if waiting:
            prompt, limit, tenant = asked[waiting[0]]
            assert not here.queue.explain(prompt, limit, tenant=tenant)
        cache.check()
    cache.clear_prefix_cache()
    while len(cache):
        here.free(next(iter(cache)))
    assert len(here.queue) == 0


@given(data=st.data())
def test_nobody_who_came_first_and_fits_is_left_waiting(data):
    cache = KVCache(1, 1, 2, SIZE * 12, SIZE, backend="none", placement="paged")
    limits = {"t": TenantLimit(tokens=data.draw(st.sampled_from([28, 40])))}
    keep_free = data.draw(st.sampled_from([0, 8]))
    here = Crowd(cache, Wait(), keep_free=keep_free, tenants=limits, most_overtaken=3)
    try:
        leave_nobody_who_fits(data, here)
    finally:
        here.close()
