"""What an operator hears of through `logging`, and how often."""

import logging
import math
import types

import pytest
from crowd import Crowd

from kvcache import CacheClosed
from kvcache.admission import AllocationQueue, Wait
from kvcache.health import Watch
from kvcache.store_memory import MemoryStore


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="kvcache")
    return lambda: [(record.levelname, record.getMessage()) for record in caplog.records]


def scattered(cache, every):
    """Live sequences of a block each, all but one in `every` of them freed, from the first on."""
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(16):
        if number % every:
            cache.free_for(number)


def kinds(findings):
    return [finding.kind for finding in findings]


def test_a_healthy_cache_is_not_spoken_of(make_cache, told):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 20)
    assert cache.check_health() == () and told() == []


def test_high_fragmentation_in_paged_placement_is_a_warning(make_cache, told):
    cache = make_cache(placement="paged")
    scattered(cache, 2)
    assert kinds(cache.check_health()) == ["fragmentation"]
    ((level, message),) = told()
    assert level == "WARNING" and "0.88" in message and "1 of 8" in message


def test_fragmentation_above_what_is_acceptable_is_mentioned(make_cache, told):
    cache = make_cache(placement="paged")
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in (*range(4, 10), 12, 14):
        cache.free_for(number)
    assert cache.stats().fragmentation == 0.25
    cache.check_health()
    assert [level for level, _ in told()] == ["INFO"]


class Altering(MemoryStore):
    """A store in which a bit of what was put there turns over."""

    def get(self, keys, buffers, *, timeout):
        job = super().get(keys, buffers, timeout=timeout)
        buffers[0][len(buffers[0]) // 2] ^= 1
        return job


def test_chunks_that_came_back_altered_are_a_warning_once_each(make_cache, told):
    cache = make_cache()
    for name in ("a", "b"):
        cache.allocate_for(name, 20)
        assert cache.suspend(name, Altering(1 << 20, 1 << 16)).wait(30)
        assert cache.resume(name).wait(30)
        assert kinds(cache.check_health()) == ["corrupt_chunks"]
        assert cache.check_health() == ()
    ((level, message),) = told()
    assert level == "WARNING" and "1 chunk " in message


def test_gaps_between_runs_are_nothing_to_speak_of(make_cache, told):
    cache = make_cache()
    scattered(cache, 2)
    assert cache.check_health() == () and told() == []


def test_promises_above_nine_tenths_are_a_warning(make_cache, told):
    cache = make_cache()
    cache.allocate_for("a", 4, max_tokens=57)  # 15 of 16 blocks
    assert kinds(cache.check_health()) == ["promises"]
    assert "94%" in told()[0][1]


def test_promises_are_measured_by_what_may_be_promised(make_cache):
    cache = make_cache(overcommit=2.0)
    cache.allocate_for("a", 4, max_tokens=60)
    assert cache.check_health() == ()
    without = make_cache(overcommit=math.inf)
    without.allocate_for("a", 64)
    assert without.check_health() == ()


def test_a_copy_of_the_arena_is_told_once_for_each_that_is_new(make_cache, told):
    cache = make_cache()
    watch, now = watched()
    stats = cache.stats()
    fake = types.SimpleNamespace(placement="contiguous", overcommit=1.0, queues=())
    for copies, found in ((1, True), (1, False), (3, True)):
        fake.stats = lambda copies=copies: stats._replace(arena_copies=copies)
        assert bool(watch.look(fake)) is found
        now[0] += 100
    assert ["1 times" in told()[0][1], "3 times" in told()[1][1], len(told())] == [True, True, 2]


def watched(every=60.0):
    now = [0.0]
    return Watch(every, clock=lambda: now[0]), now


def test_the_same_is_not_told_again_for_a_while(make_cache, told):
    cache = make_cache()
    cache.allocate_for("a", 64)
    watch, now = watched()
    for second in (0.0, 1.0, 59.0, 60.0, 61.0):
        now[0] = second
        assert kinds(watch.look(cache)) == ["promises"]
    assert len(told()) == 2
    assert told()[1][1].endswith("(found 2 more times since it was last told)")


def test_kinds_do_not_silence_each_other(make_cache, told):
    cache = make_cache(placement="paged", overcommit=1.0)
    watch, _ = watched()
    cache.allocate_for("a", 4, max_tokens=64)
    watch.look(cache)
    cache.free_for("a")
    scattered(cache, 2)
    watch.look(cache)
    assert len(told()) == 2


def test_a_queue_whose_oldest_waiter_is_older_than_its_limit_is_a_warning(make_cache, told):
    cache = make_cache(1, 1, 4, 64, 4, overcommit=2.0)
    clients = Crowd(cache, Wait(), name="chat", warn_after=10.0)
    clients.ask("a", 64)
    clients.ask("b", 8)
    clients.pass_time(10.0)
    assert cache.check_health() == ()
    clients.pass_time(0.5)
    assert kinds(cache.check_health()) == ["queue"]
    ((level, message),) = told()
    assert level == "WARNING"
    for part in ("'chat'", "oldest of 1", "10.5 s", "more than 10 s", "0 blocks are free"):
        assert part in message
    clients.free("a")
    assert cache.check_health() == ()
    clients.close()


def test_one_that_has_waited_too_long_has_it_logged_where_nobody_looks(make_cache, told):
    cache = make_cache(1, 1, 4, 64, 4, overcommit=2.0)
    queue = AllocationQueue(cache, Wait(0.05), name="chat", warn_after=0.01)
    queue.allocate("a", 64)
    assert queue.allocate("b", 8).reason == "timeout"
    ((level, message),) = told()
    assert level == "WARNING" and "'chat'" in message and "oldest of 1" in message
    assert queue.allocate("c", 8).reason == "timeout"
    assert len(told()) == 1  # once a minute


def test_a_queue_that_never_warns_and_one_that_has_nobody_are_not_spoken_of(make_cache):
    cache = make_cache(1, 1, 4, 64, 4, overcommit=2.0)
    clients = Crowd(cache, Wait(), warn_after=None)
    AllocationQueue(cache, warn_after=1e-9)
    clients.ask("a", 64)
    clients.ask("b", 8)
    clients.pass_time(1e9)
    assert cache.check_health() == ()
    clients.close()


def test_queues_do_not_silence_each_other(make_cache, told):
    cache = make_cache(1, 1, 4, 64, 4, overcommit=2.0)
    crowds = [Crowd(cache, Wait(), name=name) for name in ("one", "two")]
    assert cache.allocate_for("a", 64)
    for clients in crowds:
        clients.ask(clients.queue.name, 8)
        clients.pass_time(31.0)
    watch, now = watched()
    for second in (0.0, 1.0, 60.0):
        now[0] = second
        assert [(each.kind, each.subject) for each in watch.look(cache)] == [
            ("queue", "one"),
            ("queue", "two"),
        ]
    assert ["'one'" in message for _, message in told()] == [True, False, True, False]
    assert [message.count("found 1 more") for _, message in told()] == [0, 0, 1, 1]
    cache.free_for("a")
    for clients in crowds:
        clients.settle()
    for clients in crowds:
        clients.close()


def test_a_closed_cache_says_so(make_cache):
    cache = make_cache()
    cache.close()
    with pytest.raises(CacheClosed):
        cache.check_health()
