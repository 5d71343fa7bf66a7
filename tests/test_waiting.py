"""Who is next, against a slow twin that looks at everybody: needs, rooms and ages as no cache would have them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError
from kvcache.tallies import Tally
from kvcache.waiting import NEVER, RETURNING, Tenant, Waiters

PATIENCE = 10.0
TENANTS = "abcdefgh"
ROOMS = ((NEVER, NEVER), (NEVER, 2), (5, NEVER), (9, 3), (0, 0))


class Someone:
    """As much of a waiter as the lines know."""

    def __init__(self, number, tenant, level, total, first, since):
        self.number = self.request_id = number
        self.tenant, self.level, self.since = tenant, level, since
        self.total, self.first = total, first
        self.line = self.place = None
        self.overtaken = 0  # the twin's

    @property
    def room(self):
        return NEVER if self.level == RETURNING else self.tenant.room

    def fits(self, free, unclaimed):
        return self.total <= unclaimed and self.first <= free

    def __repr__(self):
        return f"{self.number} of {self.tenant.name} at {self.level}: {self.total}, {self.first}"


class Twin:
    def __init__(self, most_overtaken):
        self.most_overtaken = most_overtaken
        self.waiting = []  # in order of arrival

    def heads(self):
        first = {}
        for each in self.waiting:
            first.setdefault((each.level, each.tenant), each)
        return first

    def note_grant(self, waiter):
        for each in self.heads().values():
            each.overtaken += each.number < waiter.number

    def choose(self, free, unclaimed, now):
        heads, closed = self.heads(), set()
        for each in sorted(heads.values(), key=lambda head: head.number):
            is_old = now - each.since >= PATIENCE or each.overtaken >= self.most_overtaken
            if not is_old or each.tenant in closed:
                continue
            if each.total <= each.room:
                return each if each.fits(free, unclaimed) else None
            closed.add(each.tenant)
        fitting = [
            each
            for each in self.waiting
            if each.fits(free, min(unclaimed, each.room))
            and (each.tenant not in closed or each.level == RETURNING)
        ]
        return min(
            fitting,
            key=lambda e: (e.level, e.tenant.blocks, heads[e.level, e.tenant].number, e.number),
            default=None,
        )


class Walk:
    """Random steps that both take; each is asked whom to grant as often as anything happens."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        most_overtaken = self.chance.choice([0, 1, 2, 3, 1000])
        self.waiters, self.twin = Waiters(PATIENCE, most_overtaken), Twin(most_overtaken)
        self.tenants = [
            Tenant(name, Tally(name), *self.chance.choice(ROOMS))
            for name in TENANTS[: self.chance.choice([1, 2, 4, 8])]
        ]
        self.levels = self.chance.choice([[0], [0, RETURNING], [0, 0, 0, -1, -2, RETURNING]])
        self.patient = self.chance.choice([0.0, 0.1, 1.0])
        self.now, self.number = 0.0, 0

    def need(self):
        return self.chance.choice([0, 1, 1, 2, 2, 3, 4, 6])

    def pick(self):
        return self.chance.choice(self.twin.waiting)

    def step(self):
        steps = [self.come, self.choose, self.choose, self.end, self.change_a_limit, self.pass_time]
        if self.twin.waiting:
            steps += [self.leave, self.need_something_else, self.lead_and_be_granted]
        if len(self.twin.waiting) < 12:
            steps += [self.come]
        self.chance.choice(steps)()

    def come(self):
        self.number += 1
        tenant, level = self.chance.choice(self.tenants), self.chance.choice(self.levels)
        each = Someone(self.number, tenant, level, self.need(), self.need(), self.now)
        self.twin.waiting.append(each)
        self.waiters.add(each)

    def leave(self):
        each = self.pick()
        self.twin.waiting.remove(each)
        self.waiters.remove(each)

    def need_something_else(self):
        each = self.pick()
        each.total, each.first = self.need(), self.need()
        each.line.update(each)

    def lead_and_be_granted(self):
        each = self.pick()
        self.waiters.lead(each)
        assert self.waiters.count == len(self.twin.waiting)
        self.grant(each)

    def choose(self):
        free, unclaimed = self.chance.randrange(7), self.chance.randrange(7)
        found = self.waiters.choose(free, unclaimed, self.now)
        assert found is self.twin.choose(free, unclaimed, self.now)
        if found is not None:
            self.grant(found)

    def grant(self, each):
        self.twin.waiting.remove(each)
        self.waiters.remove(each)
        if each.level != RETURNING:
            each.tenant.blocks += each.total
            each.tenant.sequences += 1
        self.waiters.note_grant(each)
        self.twin.note_grant(each)

    def end(self):
        tenant = self.chance.choice(self.tenants)
        if tenant.sequences:
            tenant.blocks -= min(self.need(), tenant.blocks)
            tenant.sequences -= 1

    def change_a_limit(self):
        tenant = self.chance.choice(self.tenants)
        tenant.blocks = max(0, tenant.blocks + self.chance.randint(-3, 3))

    def pass_time(self):
        self.now += self.patient * self.chance.choice([1.0, 4.0, 11.0])

    def look(self):
        self.waiters.check()
        assert sorted(each.number for each in self.waiters) == [each.number for each in self.twin.waiting]
        assert self.waiters.oldest() == min([each.since for each in self.twin.waiting], default=None)

    def everybody_leaves(self):
        for each in self.twin.waiting:
            self.waiters.remove(each)
        self.waiters.check()
        assert not (self.waiters.lines or self.waiters.levels or self.waiters.young or self.waiters.kept_for)
        assert not any(tenant.lines or tenant.old or tenant.waiting for tenant in self.tenants)


@given(seed=st.integers(0, 2**32))
def test_whoever_is_next_is_the_twins_choice(seed):
    walk = Walk(seed)
    for number in range(400):
        walk.step()
        if number % 4 == 0:
            walk.look()
    walk.everybody_leaves()


def crowd(tenants, patience=PATIENCE, most_overtaken=1000, each=3):
    """So many tenants with a few in line each, in turns; everybody needs two blocks, one of them at once."""
    waiters = Waiters(patience, most_overtaken)
    tenants = [Tenant(number, Tally(str(number))) for number in range(tenants)]
    for number in range(each * len(tenants)):
        waiters.add(Someone(number, tenants[number % len(tenants)], number % 2, 2, 1, 0.0))
    return waiters, tenants


def grant(waiters, free=8, now=0.0):
    found = waiters.choose(free, free, now)
    waiters.remove(found)
    found.tenant.blocks += found.total
    waiters.note_grant(found)
    return found


def test_a_thousand_tenants_take_turns():
    waiters, _ = crowd(1000, each=4, most_overtaken=10_000)
    waiters.check()
    assert [grant(waiters).number for _ in range(2000)] == list(range(0, 4000, 2))
    waiters.check()


def test_the_first_old_one_of_a_thousand_tenants_is_next_whatever_they_hold():
    waiters, tenants = crowd(1000)
    for number in range(100):
        tenants[number].blocks += 50
    assert grant(waiters).number == 100
    assert [grant(waiters, now=PATIENCE).number for _ in range(5)] == [0, 1, 2, 3, 4]
    waiters.check()


def test_what_is_overtaken_is_counted_by_the_first_of_each_line():
    waiters, tenants = crowd(1000, most_overtaken=3)
    tenants[5].blocks, tenants[7].blocks = 1, 1
    ahead = [waiters.choose(8, 8, 0.0)]
    assert ahead[0].number == 0
    for number in (998, 996, 994):  # three that came later lead
        later = next(each for each in waiters if each.number == number)
        waiters.lead(later)
        waiters.remove(later)
        waiters.note_grant(later)
        waiters.check()
    assert [grant(waiters).number for _ in range(3)] == [0, 1, 2]


def test_one_that_has_become_the_first_of_its_line_goes_before_an_old_one_that_came_later():
    waiters = Waiters(PATIENCE, 1000)
    small, large = Tenant("small", Tally("small"), 2), Tenant("large", Tally("large"))
    for number, tenant, total in ((1, small, 3), (2, small, 1), (3, large, 5)):
        waiters.add(Someone(number, tenant, 0, total, 1, 0.0))
    assert waiters.choose(4, 4, PATIENCE) is None  # kept for 3: 1 is beyond what its tenant may have
    first = next(iter(waiters))
    waiters.remove(first)
    assert grant(waiters, 4, PATIENCE).number == 2
    waiters.check()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda waiters: setattr(waiters, "count", 7), "5 wait, the count says 7"),
        (lambda waiters: setattr(next(iter(waiters)), "total", 1), "total of those who wait is"),
        (lambda waiters: waiters.young.take(0), "young are"),
        (lambda waiters: waiters.kept_for.append((9, None)), "blocks are kept for"),
        (lambda waiters: waiters.by_rank[0].tree.take((0, 0)), "level 0 has"),
        (lambda waiters: waiters.lines.popitem(), "there are"),
        (lambda waiters: setattr(next(iter(waiters)).tenant, "waiting", 3), "1 of 0 wait in"),
        (lambda waiters: setattr(next(iter(waiters)).tenant, "_blocks", 3), "it is ((3, 0), 2, 1)"),
        (lambda waiters: setattr(next(iter(waiters)).tenant, "is_closed", True), "closed: True"),
        (lambda waiters: waiters.young.keys.reverse(), "is not in order"),
    ],
)
def test_check_names_what_is_wrong(damage, words):
    waiters, _ = crowd(5, each=1)
    waiters.choose(0, 0, 0.0)
    waiters.choose(8, 8, 0.0)
    damage(waiters)
    with pytest.raises(KVCacheError) as error:
        waiters.check()
    assert words in str(error.value)
