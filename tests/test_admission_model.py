"""The queue against a slow, obvious twin: a list that is scanned, with the rules as the manual tells them."""

from dataclasses import dataclass, field

from crowd import Crowd
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvcache import KVCache
from kvcache.admission import TenantLimit, Wait

SIZE, BLOCKS, KEEP = 4, 16, 2
PATIENCE, MOST_OVERTAKEN = 10.0, 4
TENANTS = "stuvwxyz"
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
    granted: list = field(default_factory=list)
    refused: list = field(default_factory=list)

    def room_of(self, tenant):
        mine = [limit for _, limit, whose in self.live.values() if whose == tenant]
        if tenant not in LIMITED:
            return BLOCKS
        return LIMITED[tenant].tokens // SIZE - sum(mine) if len(mine) < LIMITED[tenant].sequences else -1

    def held_by(self, tenant):
        return sum(limit for _, limit, whose in self.live.values() if whose == tenant)

    def heads(self):
        first = {}
        for each in self.waiting:
            first.setdefault((each.priority, each.tenant), each)
        return list(first.values())

    def choose(self, now):
        free = BLOCKS - KEEP - sum(prompt for prompt, _, _ in self.live.values())
        unclaimed = BLOCKS - sum(limit for _, limit, _ in self.live.values())
        heads, closed = self.heads(), set()
        for each in self.waiting:
            old = each.overtaken >= MOST_OVERTAKEN or now - each.since >= PATIENCE
            if each not in heads or not old or each.tenant in closed:
                continue
            if each.total > self.room_of(each.tenant):
                closed.add(each.tenant)
            else:
                return each if each.total <= unclaimed and each.first <= free else None
        place = {(each.priority, each.tenant): index for index, each in enumerate(self.waiting[::-1])}
        fitting = [
            each
            for each in self.waiting
            if each.tenant not in closed
            and each.first <= free
            and each.total <= min(unclaimed, self.room_of(each.tenant))
        ]
        return min(
            fitting,
            key=lambda each: (-each.priority, self.held_by(each.tenant), -place[each.priority, each.tenant]),
            default=None,
        )

    def grant(self, now):
        while (chosen := self.choose(now)) is not None:
            index = self.waiting.index(chosen)
            del self.waiting[index]
            self.live[chosen.name] = chosen.first, chosen.total, chosen.tenant
            self.granted.append(chosen.name)
            earlier = self.waiting[:index]
            for each in self.heads():
                each.overtaken += each in earlier

    def expire(self, now):
        """One after the other: what was kept for the first may be what the second gets."""
        for each in [each for each in self.waiting if each.deadline <= now]:
            if each in self.waiting:
                self.refused.append(each.name)
                self.waiting.remove(each)
                self.grant(now)


class QueueAgainstTwin(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        cache = KVCache(1, 1, 4, SIZE * BLOCKS, SIZE, backend="none")
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

    @precondition(lambda self: self.twin.live)
    @rule(data=st.data())
    def free(self, data):
        name = data.draw(st.sampled_from(sorted(self.twin.live)))
        del self.twin.live[name]
        self.twin.grant(self.now)
        self.here.free(name)

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
        self.here.cancel(each.name)

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

    @invariant()
    def agrees(self):
        here, twin = self.here, self.twin
        assert here.granted() == twin.granted
        assert sorted(name for name, answer in here.told.items() if not answer) == sorted(twin.refused)
        assert sorted(each.request_id for each in here.queue._waiters) == sorted(e.name for e in twin.waiting)
        assert len(here.queue) == len(twin.waiting)
        assert set(here.cache) == set(twin.live)
        here.queue._waiters.check()
        here.cache.check()

    def teardown(self):
        self.here.close()
        self.here.cache.close()


TestQueueAgainstTwin = QueueAgainstTwin.TestCase
