"""The queue against a slow, obvious twin: a list that is scanned, with the rules as the manual tells them."""

import math
import time
from dataclasses import dataclass, field

from crowd import Crowd
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcache import KVCache
from kvcache.admission import TenantLimit, Wait

SIZE, BLOCKS, KEEP = 4, 16, 2
PATIENCE, MOST_OVERTAKEN = 10.0, 4
TENANTS = "stuvwxyz"
SOON = 30.0
LIMITED = {"t": TenantLimit(tokens=24, sequences=3), "s": TenantLimit(tokens=40, sequences=1)}


def blocks_of(tokens):
    return -(-tokens // SIZE)


@dataclass
class Waiting:
    name: int
    prompt: int
    limit: int
    tenant: str
    priority: int
    since: float
    deadline: float
    overtaken: int = 0
    returns: bool = False

    @property
    def level(self):
        return math.inf if self.returns else self.priority

    @property
    def total(self):
        return blocks_of(self.limit)

    @property
    def first(self):
        return blocks_of(self.prompt)


@dataclass
class Twin:
    """Decides by looking at everybody, every time."""

    waiting: list = field(default_factory=list)  # in order of arrival
    live: dict = field(default_factory=dict)  # name -> (prompt blocks, limit blocks, tenant or None)
    away: dict = field(default_factory=dict)  # the same of those that are suspended
    granted: list = field(default_factory=list)
    refused: list = field(default_factory=list)

    def limits_of(self, tenant):
        return [limit for _, limit, whose in [*self.live.values(), *self.away.values()] if whose == tenant]

    def room_for(self, each):
        mine = self.limits_of(each.tenant)
        if each.returns or each.tenant not in LIMITED:
            return BLOCKS
        limit = LIMITED[each.tenant]
        return limit.tokens // SIZE - sum(mine) if len(mine) < limit.sequences else -1

    def held_by(self, tenant):
        return sum(self.limits_of(tenant))

    def heads(self):
        first = {}
        for each in self.waiting:
            first.setdefault((each.level, each.tenant), each)
        return list(first.values())

    def fits(self, each):
        free = BLOCKS - sum(prompt for prompt, _, _ in self.live.values()) - (0 if each.returns else KEEP)
        unclaimed = BLOCKS - sum(limit for _, limit, _ in self.live.values())
        return each.first <= free and each.total <= unclaimed

    def choose(self, now):
        heads, closed = self.heads(), set()
        for each in self.waiting:
            old = each.overtaken >= MOST_OVERTAKEN or now - each.since >= PATIENCE
            if each not in heads or not old or each.tenant in closed:
                continue
            if each.total > self.room_for(each):
                closed.add(each.tenant)
            else:
                return each if self.fits(each) else None
        place = {(each.level, each.tenant): index for index, each in enumerate(self.waiting[::-1])}
        fitting = [
            each
            for each in self.waiting
            if (each.returns or each.tenant not in closed)
            and self.fits(each)
            and each.total <= self.room_for(each)
        ]
        return min(
            fitting,
            key=lambda each: (-each.level, self.held_by(each.tenant), -place[each.level, each.tenant]),
            default=None,
        )

    def grant(self, now):
        while (chosen := self.choose(now)) is not None:
            index = self.waiting.index(chosen)
            del self.waiting[index]
            self.live[chosen.name] = chosen.first, chosen.total, chosen.tenant
            if chosen.returns:
                del self.away[chosen.name]
            else:
                self.granted.append(chosen.name)
            earlier = self.waiting[:index]
            for each in self.heads():
                each.overtaken += each in earlier

    def expire(self, now):
        """One after the other: what was kept for the first may be what the second gets."""
        for each in [each for each in self.waiting if each.deadline <= now]:
            if each in self.waiting:
                self.refused.append(("back", each.name) if each.returns else each.name)
                self.waiting.remove(each)
                self.grant(now)


class QueueAgainstTwin(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        cache = KVCache(1, 1, 4, SIZE * BLOCKS, SIZE)
        self.here = Crowd(
            cache,
            Wait(),
            keep_free=SIZE * KEEP,
            patience=PATIENCE,
            most_overtaken=MOST_OVERTAKEN,
            tenants=LIMITED,
        )
        self.twin = Twin()
        self.names = 0

    @property
    def now(self):
        return self.here.clock.now

    @rule(
        prompt=st.integers(1, 30),
        more=st.integers(0, 30),
        tenant=st.sampled_from(TENANTS),
        priority=st.sampled_from([0, 0, 0, 1, 2]),
        timeout=st.sampled_from([5.0, 20.0, 1000.0]),
    )
    def ask(self, prompt, more, tenant, priority, timeout):
        self.names += 1
        name, limit = self.names, prompt + more
        self.here.ask(
            name, prompt, max_tokens=limit, tenant=tenant, priority=priority, strategy=Wait(timeout)
        )
        each = Waiting(name, prompt, limit, tenant, priority, self.now, self.now + timeout)
        if tenant in LIMITED and each.total > LIMITED[tenant].tokens // SIZE:
            self.twin.refused.append(name)
            return
        self.twin.waiting.append(each)
        self.twin.grant(self.now)

    @property
    def returning(self):
        return {each.name for each in self.twin.waiting if each.returns}

    @precondition(lambda self: self.twin.live.keys() | self.twin.away.keys() - self.returning)
    @rule(data=st.data())
    def free(self, data):
        twin = self.twin
        name = data.draw(st.sampled_from(sorted(twin.live.keys() | twin.away.keys() - self.returning)))
        (twin.live if name in twin.live else twin.away).pop(name)
        twin.grant(self.now)
        self.here.free(name)

    @precondition(lambda self: any(tenant for _, _, tenant in self.twin.live.values()))
    @rule(data=st.data())
    def suspend(self, data):
        live = self.twin.live
        name = data.draw(st.sampled_from([name for name, (_, _, tenant) in live.items() if tenant]))
        self.twin.away[name] = live.pop(name)
        self.twin.grant(self.now)
        assert self.here.cache.suspend(name).wait(SOON)
        self.here.settle()

    @precondition(lambda self: self.twin.away.keys() - self.returning)
    @rule(data=st.data(), timeout=st.sampled_from([5.0, 20.0, 1000.0]))
    def resume(self, data, timeout):
        twin = self.twin
        name = data.draw(st.sampled_from(sorted(twin.away.keys() - self.returning)))
        first, total, tenant = twin.away[name]
        twin.refused = [each for each in twin.refused if each != ("back", name)]  # that was the last time
        self.here.told.pop(("back", name), None)
        self.here.start(("back", name), self.here.queue.resume_async(name, strategy=Wait(timeout)))
        sizes = first * SIZE, total * SIZE, tenant
        twin.waiting.append(Waiting(name, *sizes, 0, self.now, self.now + timeout, returns=True))
        twin.grant(self.now)

    @precondition(lambda self: self.twin.live)
    @rule(data=st.data())
    def lower_a_limit(self, data):
        name = data.draw(st.sampled_from(sorted(self.twin.live)))
        first, _, tenant = self.twin.live[name]
        assert self.here.cache.set_limit(name, self.here.cache.used_tokens(name))
        self.twin.live[name] = first, first, tenant
        self.twin.grant(self.now)
        self.here.settle()

    @precondition(lambda self: self.twin.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        each = data.draw(st.sampled_from(self.twin.waiting))
        self.twin.waiting.remove(each)
        self.twin.grant(self.now)
        self.here.cancel(("back", each.name) if each.returns else each.name)

    @rule(prompt=st.integers(1, 20))
    def go_past_the_queue(self, prompt):
        self.names += 1
        if self.here.cache.allocate_for(self.names, prompt):
            self.twin.live[self.names] = blocks_of(prompt), blocks_of(prompt), None

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]))
    def pass_time(self, seconds):
        self.here.pass_time(seconds)
        self.twin.grant(self.now)
        self.twin.expire(self.now)

    def wait_for_transfers(self):
        cache, end = self.here.cache, time.monotonic() + SOON
        while any(cache._is_moving(name) for name in cache) and time.monotonic() < end:
            time.sleep(0.0001)
        self.here.settle()

    @invariant()
    def agrees(self):
        here, twin = self.here, self.twin
        self.wait_for_transfers()
        assert [name for name in here.granted() if type(name) is int] == twin.granted
        refused = [name for name, answer in here.told.items() if not answer]
        assert sorted(refused, key=repr) == sorted(twin.refused, key=repr)
        assert {name for name in here.cache if here.cache.is_suspended(name)} == set(twin.away)
        assert sorted(each.request_id for each in here.queue._waiters) == sorted(e.name for e in twin.waiting)
        assert len(here.queue) == len(twin.waiting)
        assert set(here.cache) == twin.live.keys() | twin.away.keys()
        here.queue._waiters.check()
        here.cache.check()

    def teardown(self):
        self.here.close()
        self.here.cache.close()


TestQueueAgainstTwin = QueueAgainstTwin.TestCase
