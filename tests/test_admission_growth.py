"""Growth through the queue: what ends its wait, what its refusals say, and whose tokens are taken back."""

import math
import threading

import pytest
from crowd import Crowd
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCache, UnknownSequence
from kvcache.admission import AllocationQueue, Evict, Reject, Swap, Wait

SIZE, BLOCKS = 4, 8


@pytest.fixture
def crowd(make_cache):
    made = []

    def make(strategy=None, *, overcommit=2.0, placement="contiguous", **options):
        cache = make_cache(
            1, 1, 4, SIZE * BLOCKS, SIZE, backend="none", overcommit=overcommit, placement=placement
        )
        made.append(Crowd(cache, strategy or Wait(), **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


# ---- a limit that is lowered while it waits


def test_growth_whose_limit_is_lowered_meanwhile_is_told_so(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    here.pass_time(3)
    assert here.cache.set_limit("a", 11)
    refused = here.answer(("grow", "a"))
    assert (refused.reason, refused.tokens, refused.max_tokens, refused.waited) == ("never_fits", 8, 11, 3.0)
    assert here.queue.stats().tenants[""].growth_refused["never_fits"] == 1
    assert here.cache.used_tokens("a") == 4


def test_growth_that_still_fits_a_lowered_limit_waits_on(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    here.cache.set_limit("a", 12)
    assert here.answer(("grow", "a")) is None
    here.free("b")
    assert here.answer(("grow", "a")) is True


def test_newcomers_do_not_wait_behind_growth_that_can_never_be(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=32), here.ask("b", 16)
    assert here.grow("a", 16) is None
    assert here.ask("new", 12) is None  # it would fit, but growth goes first
    here.cache.set_limit("a", 16)
    assert here.answer(("grow", "a")).reason == "never_fits"
    assert here.answer("new")


def test_an_append_meanwhile_that_leaves_too_little_of_the_limit_ends_the_wait(crowd):
    here = crowd()
    here.ask("a", 3, max_tokens=12), here.ask("b", 28)
    assert here.grow("a", 9) is None
    assert here.cache.append_token("a")
    here.queue.poke()
    assert here.answer(("grow", "a")).reason == "never_fits"


# ---- what a refusal says


def numbers(refused):
    return (
        refused.reason,
        refused.tokens,
        refused.max_tokens,
        refused.blocks_needed,
        refused.blocks_free,
        refused.blocks_missing,
        refused.fitting_tokens,
    )


def test_a_full_arena_is_told_with_what_would_have_fitted(crowd):
    here = crowd(Reject())
    here.ask("a", 3, max_tokens=32), here.ask("b", 24)
    assert numbers(here.grow("a", 6)) == ("arena_full", 6, 32, 2, 1, 1, 5)
    assert here.grow("a", 5) is True


def test_the_copy_of_a_shared_block_is_counted(crowd):
    here = crowd(Reject(), placement="paged", overcommit=3.0)
    here.ask("a", 6, max_tokens=16), here.cache.fork("a", "twin"), here.ask("b", 24)
    assert numbers(here.grow("a", 1)) == ("arena_full", 1, 16, 1, 0, 1, 0)
    here.cache.truncate("b", 20)
    assert numbers(here.grow("a", 4)) == ("arena_full", 4, 16, 2, 1, 1, 2)
    assert here.grow("a", 2) is True


@pytest.mark.parametrize("by_task", [True, False])
def test_growth_past_its_limit_has_not_waited(crowd, by_task):
    here = crowd(Wait(5))
    here.ask("a", 3, max_tokens=16)
    here.pass_time(1000)
    refused = here.grow("a", 30) if by_task else here.queue.append("a", 30)
    assert numbers(refused) == ("never_fits", 30, 16, 8, 7, 0, 13)
    assert refused.waited == 0.0
    assert str(refused) == (
        "never_fits: 30 tokens, 16 at most, need 8 blocks, no wait can help; at most 13 tokens would have fitted"
    )
    assert here.grow("a", 13) is True


@given(
    st.sampled_from(["contiguous", "paged"]),
    st.lists(st.tuples(st.sampled_from(["ask", "fork", "grow", "cut"]), st.integers(0, 12)), max_size=10),
    st.integers(1, 40),
    st.sampled_from([1.0, 1.5, math.inf]),
)
def test_what_growth_is_told_is_exact(placement, steps, more, overcommit):
    cache = KVCache(1, 1, 2, SIZE * BLOCKS, SIZE, backend="none", placement=placement, overcommit=overcommit)
    queue = AllocationQueue(cache, Reject())
    cache.allocate_for("a", 5, max_tokens=30)
    for number, (step, amount) in enumerate(steps):
        name = list(cache)[amount % len(cache)]
        if step == "ask":
            cache.allocate_for(number, amount + 1, max_tokens=2 * amount + 1)
        elif step == "fork":
            cache.fork(name, number)
        elif step == "grow":
            cache.append_tokens(name, amount)
        else:
            cache.truncate(name, min(amount, cache.used_tokens(name)))
    used, limit, needed, fitting, free, unclaimed = cache._growth_of(cache._record_of("a"), more)
    assert (used, limit, (free, unclaimed)) == (cache.used_tokens("a"), cache.limit("a"), cache._room())
    answer = queue.append("a", more)
    if answer is True:
        assert fitting >= more and free - cache._room()[0] == needed
        return
    assert answer.fitting_tokens == min(fitting, more) < more
    assert answer.blocks_needed == needed
    assert (answer.reason == "never_fits") is (used + more > limit)
    assert (answer.reason == "arena_full") is (answer.blocks_missing > 0)
    assert not cache.append_tokens("a", answer.fitting_tokens + 1)
    assert cache.append_tokens("a", answer.fitting_tokens)
    cache.check()


# ---- holds


def test_all_growth_that_only_a_hold_is_in_the_way_of_waits_for_its_end(crowd):
    here = crowd(Reject(), overcommit=2.0)
    for name in "abc":
        here.ask(name, 4, max_tokens=12)
    entered, leave = threading.Event(), threading.Event()

    def step():
        with here.cache.hold():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=step)
    thread.start()
    assert entered.wait(30)
    try:
        assert [here.grow(name, 4) for name in "ab"] == [None, None]  # both would have to move
        assert here.grow("c", 4) is True
    finally:
        leave.set()
        thread.join(30)
    assert [here.answer(("grow", name)) for name in "ab"] == [True, True]


# ---- whose tokens are taken back


def test_growth_that_is_cancelled_after_its_grant_is_taken_back(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 4) is None
    here.cache.free_for("b")
    assert here.cache.used_tokens("a") == 8
    here.cancel(("grow", "a"))
    assert here.cache.used_tokens("a") == 4


def test_growth_that_is_cancelled_leaves_a_later_sequence_of_the_id_alone(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 4) is None
    here.cache.free_for("b"), here.cache.free_for("a")
    assert here.cache.allocate_for("a", 8, max_tokens=12)
    here.cancel(("grow", "a"))
    assert here.cache.used_tokens("a") == 8


def test_growth_never_goes_to_a_later_sequence_of_the_id(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    with here.queue._turn:  # nobody reads the notes until all of it has happened
        here.cache.free_for("b"), here.cache.free_for("a")
        assert here.cache.allocate_for("a", 8, max_tokens=16)
    with pytest.raises(UnknownSequence):
        here.answer(("grow", "a"))
    assert here.cache.used_tokens("a") == 8


def test_what_is_taken_back_wakes_others(crowd):
    here = crowd()
    here.ask("a", 4, max_tokens=16), here.ask("b", 28)
    assert here.grow("a", 8) is None
    assert here.ask("c", 24) is None
    here.cache.free_for("b")
    here.cancel(("grow", "a"))
    assert here.answer("c")


# ---- what its own strategy comes across


def objects(request_id, *event):
    raise LookupError(request_id)


def test_whoever_asks_has_failed_where_a_victims_owner_objects(crowd):
    here = crowd(Evict())
    here.ask("a", 32, on_evict=objects)
    with pytest.raises(LookupError):
        here.ask("b", 4)
    with pytest.raises(LookupError):
        here.queue.allocate("b", 4)
    told = here.queue.stats().tenants[""]
    assert (told.failed, sum(told.refused.values())) == (2, 0)
    assert list(here.cache) == ["a"]


def test_whoever_asks_has_failed_where_a_victims_owner_will_not_have_it_swapped_out(make_cache):
    cache = make_cache(1, 1, 4, SIZE * BLOCKS, SIZE)
    queue = AllocationQueue(cache, Swap())
    queue.allocate("a", 32, on_swap=objects)
    with pytest.raises(LookupError):
        queue.allocate("b", 4)
    told = queue.stats().tenants[""]
    assert (told.failed, sum(told.refused.values())) == (1, 0)
    assert not cache.is_suspended("a") and len(queue) == 0


def test_a_task_that_is_cancelled_has_not_failed(crowd):
    here = crowd()
    here.ask("a", 32)
    assert here.ask("b", 4) is None
    here.cancel("b")
    told = here.queue.stats().tenants[""]
    assert (told.failed, told.refused["cancelled"]) == (0, 1)
