"""What a queue tells of itself, by a clock that is set by hand: who waits, for how long, what became of the others."""

import math
import threading

import pytest
from crowd import Crowd

from kvcache import KVCacheError, SequenceExists
from kvcache.admission import AllocationQueue, Evict, Reduce, Reject, TenantLimit, Wait
from kvcache.refusals import REASONS
from kvcache.tallies import MOST_CHARACTERS, MOST_TENANTS, OTHERS, WAIT_BOUNDS

BLOCKS = 16


@pytest.fixture
def crowd(make_cache):
    made = []

    def make(strategy=None, *, overcommit=1.0, **options):
        cache = make_cache(1, 1, 4, 4 * BLOCKS, 4, backend="none", overcommit=overcommit)
        made.append(Crowd(cache, Wait() if strategy is None else strategy, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def outcomes(queue, tenant=""):
    """What is not 0 of a tenant's newcomers."""
    told = queue.stats().tenants[tenant]
    return {
        name: count
        for name, count in {"granted": told.granted, "failed": told.failed, **told.refused}.items()
        if count
    }


# ---- who waits


def test_length_and_age_are_those_of_the_ones_who_wait(crowd):
    clients = crowd()
    clients.ask("a", 64)
    clients.pass_time(5)
    assert (clients.queue.stats().waiting, clients.queue.stats().oldest_age) == (0, 0.0)
    clients.ask("b", 8)
    clients.pass_time(2)
    clients.ask("c", 8, priority=1)
    clients.pass_time(1)
    told = clients.queue.stats()
    assert (told.waiting, told.oldest_age) == (2, 3.0)
    assert told.oldest_age == clients.queue.oldest_age
    clients.cancel("b")
    assert clients.queue.stats().oldest_age == 1.0


def test_tenants_are_told_apart(crowd):
    clients = crowd()
    clients.ask("a", 40, tenant="one")
    clients.ask("b", 40, tenant="two")
    clients.pass_time(2)
    clients.ask("c", 40, tenant="two")
    tenants = clients.queue.stats().tenants
    assert list(tenants) == ["", "one", "two"]
    assert [each.waiting for each in tenants.values()] == [0, 0, 2]
    assert [each.oldest_age for each in tenants.values()] == [0.0, 0.0, 2.0]
    assert [(each.sequences, each.blocks) for each in tenants.values()] == [(0, 0), (1, 10), (0, 0)]


def test_growth_waits_too_and_counts_for_its_sequences_tenant(crowd):
    clients = crowd(overcommit=2.0)
    clients.ask("a", 32, max_tokens=60, tenant="t")
    clients.ask("b", 32)
    assert clients.grow("a", 4) is None
    clients.pass_time(3)
    told = clients.queue.stats()
    assert (told.waiting, told.tenants["t"].waiting, told.tenants["t"].oldest_age) == (1, 1, 3.0)
    clients.free("b")
    assert clients.answer(("grow", "a")) is True
    told = clients.queue.stats()
    assert (told.waiting, told.tenants["t"].grown) == (0, 1)
    assert sum(told.tenants["t"].growth_refused.values()) == 0


def test_growth_that_does_not_wait_is_not_counted(crowd):
    clients = crowd()
    clients.ask("a", 4, max_tokens=8)
    assert clients.grow("a") is True
    assert not clients.grow("a", 40)  # past its limit: an end, not a lack
    told = clients.queue.stats().tenants[""]
    assert (told.grown, sum(told.growth_refused.values())) == (0, 0)


def test_growth_that_is_refused_is_counted_by_its_reason(crowd):
    clients = crowd(Reject(), overcommit=2.0)
    clients.ask("a", 32, max_tokens=60)
    clients.ask("b", 32)
    assert clients.grow("a", 4).reason == "arena_full"
    assert clients.queue.stats().tenants[""].growth_refused["arena_full"] == 1


def test_the_statistics_of_the_cache_tell_of_all_its_queues(crowd):
    clients = crowd()
    cache, now = clients.cache, clients.clock
    other = AllocationQueue(cache, Wait(), clock=lambda: 2 * now.now)
    before = cache.stats()
    assert (before.waiting_requests, before.oldest_wait) == (0, 0.0)
    clients.ask("a", 64)
    quiet = cache.stats()
    clients.ask("b", 8)
    second = clients.loop.create_task(other.allocate_async("c", 8))
    clients.settle()
    clients.pass_time(4)
    told = cache.stats()
    assert (told.waiting_requests, told.oldest_wait) == (2, 8.0)
    assert told == quiet  # nothing has changed that takes part
    second.cancel()
    clients.settle()
    other.close()
    assert cache.stats().waiting_requests == 1


# ---- what became of them


def test_every_newcomer_is_counted_once_whatever_becomes_of_it(crowd):
    limits = {"limited": TenantLimit(tokens=8)}
    clients = crowd(Reject(), overcommit=1.0, tenants=limits, keep_free=4)
    clients.ask("a", 20, max_tokens=40)
    clients.ask("full", 48)
    clients.ask("promised", 4, max_tokens=40)
    clients.ask("limited", 12, tenant="limited")
    clients.ask("late", 48, strategy=Wait(1))
    clients.ask("cancelled", 48, strategy=Wait())
    clients.ask("gone", 48, strategy=Wait())
    clients.queue.cancel("cancelled")
    clients.cancel("gone")
    clients.pass_time(1)
    clients.ask("short", 4, max_tokens=40, strategy=Reduce(8))
    assert outcomes(clients.queue) == {
        "granted": 2,
        "arena_full": 1,
        "promises": 1,
        "timeout": 1,
        "cancelled": 2,
    }
    assert outcomes(clients.queue, "limited") == {"never_fits": 1}
    assert set(clients.queue.stats().tenants[""].refused) == set(REASONS)


def test_a_cancelled_one_whose_task_is_cancelled_as_well_is_counted_once(crowd):
    clients = crowd()
    clients.ask("a", 64)
    clients.ask("b", 8)
    clients.queue.cancel("b")
    clients.tasks["b"].cancel()
    clients.settle()
    assert outcomes(clients.queue) == {"granted": 1, "cancelled": 1}


def test_closing_the_queue_counts_those_who_waited(crowd):
    clients = crowd()
    clients.ask("a", 64)
    clients.ask("b", 8)
    clients.queue.close()
    clients.settle()
    assert outcomes(clients.queue) == {"granted": 1, "cancelled": 1}
    assert clients.cache.queues == ()


def test_who_raises_when_its_turn_comes_has_failed(crowd):
    clients = crowd()
    clients.ask("a", 60)
    clients.tell("b", clients.queue.allocate_async("b", 8))
    clients.settle()
    clients.cache.allocate_for("b", 4)
    clients.free("a")
    assert isinstance(clients.tasks["b"].exception(), SequenceExists)
    assert outcomes(clients.queue) == {"granted": 1, "failed": 1}


def test_misuse_is_not_counted(crowd):
    clients = crowd()
    clients.ask("a", 8)
    with pytest.raises(SequenceExists):
        clients.queue.allocate("a", 8)
    with pytest.raises(ValueError):
        clients.queue.allocate("b", 0)
    clients.queue.close()
    with pytest.raises(KVCacheError, match="closed"):
        clients.queue.allocate("b", 8)
    assert outcomes(clients.queue) == {"granted": 1}


def test_victims_are_counted_for_their_tenant(crowd):
    clients = crowd(Evict())
    clients.ask("a", 40, tenant="idle")
    clients.ask("b", 40, tenant="busy")
    tenants = clients.queue.stats().tenants
    assert (tenants["idle"].evicted, tenants["busy"].evicted, tenants["busy"].granted) == (1, 0, 1)


def test_times_in_line_are_in_buckets_that_hold_all_that_were_granted(crowd):
    clients = crowd()
    clients.ask("a", 64)
    clients.ask("b", 64)
    clients.ask("c", 64)
    clients.pass_time(0.01)
    clients.free("a")
    clients.pass_time(1000)
    clients.free("b")
    told = clients.queue.stats()
    assert sum(told.waits) == told.tenants[""].granted == 3
    within = [bound >= 0.01 for bound in WAIT_BOUNDS].index(True)
    assert (told.waits[0], told.waits[within], told.waits[-1]) == (1, 1, 1)
    assert told.wait_sum == pytest.approx(0.01 + 1000.01)


# ---- bounds and names


def test_tenants_told_by_name_are_bounded(crowd):
    clients = crowd(Reject(), tenants={"known": TenantLimit(share=0.5)})
    for number in range(MOST_TENANTS + 50):
        assert clients.ask(number, 1, tenant=("t", number))
        clients.free(number)
    clients.ask("a", 1, tenant="known")
    tenants = clients.queue.stats().tenants
    assert len(tenants) == MOST_TENANTS + 3
    assert (tenants[OTHERS].granted, tenants["known"].granted, tenants["('t', 0)"].granted) == (50, 1, 1)


def test_long_names_are_cut_and_numbers_share_a_name_with_their_text(crowd):
    clients = crowd()
    clients.ask("a", 1, tenant="x" * 500)
    clients.ask("b", 1, tenant=7)
    clients.ask("c", 1, tenant="7")
    tenants = clients.queue.stats().tenants
    assert max(map(len, tenants)) == MOST_CHARACTERS
    assert (tenants["7"].granted, tenants["7"].sequences) == (2, 2)


def test_queues_of_a_cache_have_names_of_their_own(make_cache):
    cache = make_cache()
    first, second = AllocationQueue(cache), AllocationQueue(cache)
    named = AllocationQueue(cache, name="chat")
    assert [queue.name for queue in cache.queues] == ["default", "default-2", "chat"]
    with pytest.raises(ValueError, match="'chat'"):
        AllocationQueue(cache, name="chat")
    first.close()
    assert AllocationQueue(cache).name == "default"
    assert cache.queues[:2] == (second, named)
    for queue in cache.queues:
        queue.close()
    assert cache.queues == ()


@pytest.mark.parametrize("name", ["", 3, b"x"])
def test_a_name_is_a_string(make_cache, name):
    cache = make_cache()
    with pytest.raises(TypeError, match="name"):
        AllocationQueue(cache, name=name)
    assert cache.queues == ()


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_an_age_to_warn_of_is_above_zero(make_cache, limit):
    cache = make_cache()
    with pytest.raises(ValueError, match="warn_after"):
        AllocationQueue(cache, warn_after=limit)
    assert cache.queues == ()


def test_a_queue_that_could_not_be_made_is_not_listed(make_cache):
    cache = make_cache()
    with pytest.raises(TypeError, match="a strategy is"):
        AllocationQueue(cache, "wait")
    assert cache.queues == () and AllocationQueue(cache).name == "default"


def test_looking_does_not_wait_for_the_queue(make_cache):
    cache = make_cache()
    queue = AllocationQueue(cache)
    queue.allocate("a", 8)
    seen = []
    with queue._lock:
        thread = threading.Thread(target=lambda: seen.append((queue.stats(), cache.stats())))
        thread.start()
        thread.join(10)
    assert seen and seen[0][0].tenants[""].granted == 1
    cache.free_for("a")


# ---- counted once, and by whom


def refusals(cache):
    stats = cache.stats()
    return (
        stats.refused_arena_full,
        stats.refused_promises,
        stats.refused_growth,
        stats.refused_past_limit,
    )


@pytest.mark.parametrize("overcommit", [1.0, 2.0])
def test_what_the_queue_refuses_is_counted_by_the_queue_alone(make_cache, overcommit):
    cache = make_cache(1, 1, 4, 32, 4, backend="none", overcommit=overcommit)
    queue = AllocationQueue(cache, Reject())
    queue.allocate("a", 28, max_tokens=32)
    for _ in range(3):
        assert queue.allocate("b", 8).reason == "arena_full"
    cache.truncate("a", 4)
    if overcommit > 1:
        cache.allocate_for("d", 4, max_tokens=32)
    assert queue.allocate("c", 4, max_tokens=32).reason == "promises"
    told = queue.stats().tenants[""].refused
    assert (told["arena_full"], told["promises"], sum(told.values())) == (3, 1, 4)
    assert refusals(cache) == (0, 0, 0, 0)
    assert cache.allocate_for("c", 4, max_tokens=32) is None
    assert refusals(cache) == (0, 1, 0, 0)


def test_whoever_waits_is_counted_once_however_often_it_is_looked_at(crowd):
    clients = crowd(Wait(5), overcommit=2.0)
    clients.ask("a", 4, max_tokens=64), clients.ask("b", 56, max_tokens=56)
    assert clients.grow("a", 16) is None
    assert clients.ask("c", 16) is None
    for _ in range(20):
        clients.cache.allocate_for("x", 4), clients.cache.free_for("x")
    assert refusals(clients.cache) == (0, 0, 0, 0)
    clients.pass_time(5)
    told = clients.queue.stats().tenants[""]
    assert (told.growth_refused["timeout"], sum(told.growth_refused.values())) == (1, 1)
    assert (told.refused["timeout"], sum(told.refused.values())) == (1, 1)
    assert refusals(clients.cache) == (0, 0, 0, 0)


def test_growth_past_its_limit_is_counted_by_the_cache(crowd):
    clients = crowd(Wait(5), overcommit=2.0)
    clients.ask("a", 4, max_tokens=8), clients.ask("b", 56)
    assert clients.grow("a", 5).reason == clients.queue.append("a", 5).reason == "never_fits"
    assert refusals(clients.cache) == (0, 0, 0, 2)
    assert sum(clients.queue.stats().tenants[""].growth_refused.values()) == 0


def test_growth_whose_limit_is_lowered_while_it_waits_is_counted_by_the_queue(crowd):
    clients = crowd(Wait(5), overcommit=2.0)
    clients.ask("a", 4, max_tokens=16), clients.ask("b", 60)
    assert clients.grow("a", 8) is None
    clients.cache.set_limit("a", 8)
    assert clients.answer(("grow", "a")).reason == "never_fits"
    assert clients.queue.stats().tenants[""].growth_refused["never_fits"] == 1
    assert refusals(clients.cache) == (0, 0, 0, 0)


def test_a_return_that_is_refused_is_counted_by_the_queue(make_cache):
    cache = make_cache(1, 1, 4, 32, 4)
    queue = AllocationQueue(cache, Reject())
    queue.allocate("a", 16)
    assert cache.suspend("a").wait(30)
    cache.allocate_for("b", 32)
    assert not queue.resume("a")
    assert queue.stats().tenants[""].resume_refused["arena_full"] == 1
    assert refusals(cache) == (0, 0, 0, 0)
    assert cache.resume("a") is None
    assert refusals(cache) == (1, 0, 0, 0)
