"""One request that has not been answered yet: a new sequence, room for a live one, or the way back of a suspended one.

`waiting` orders them, `desk` grants them, `course` has them go through their strategies; what differs between the three
is here. Their methods are called under the queue's lock, but for `judge`.
"""

from contextlib import suppress
from dataclasses import replace
from operator import index

from kvcache._ids import Tokens
from kvcache.errors import KVCacheError, SequenceExists, Suspended, UnknownSequence
from kvcache.refusals import Fits, Refusal
from kvcache.strategies import Reduce
from kvcache.waiting import NEVER, RETURNING


class Waiter:
    """What all have; the fields change under the queue's lock only.

    Parameters
    ----------
    request_id : hashable
    sleeper : ThreadSleeper or TaskSleeper
    """

    __slots__ = (
        "deadline",  # when it is woken in any case, by the queue's clock; None: never
        "done",  # no longer waiting: `lease`, `error` or `reason` says why
        "error",
        "fault",  # what its own thread or task came across
        "first",  # blocks needed at once
        "lease",  # what has been granted: a Lease, True for growth, a Transfer back
        "least",  # the lowest limit that would do, in tokens
        "limit",
        "line",
        "number",  # in order of arrival
        "place",
        "priority",
        "reason",
        "request_id",
        "shared",  # blocks of its prompt that others hold, so that it needs fewer
        "since",
        "sleeper",
        "tally",  # where its outcome is counted
        "tenant",
        "tokens",
        "total",  # blocks needed up to `least`
    )
    is_new = False

    def __init__(self, request_id, sleeper):
        self.request_id = request_id
        self.sleeper = sleeper
        self.tally = self.tenant = self.line = self.lease = self.error = self.reason = self.deadline = None
        self.fault = None
        self.priority = self.total = self.first = self.place = self.number = 0
        self.tokens = self.limit = self.least = self.shared = 0
        self.since = 0.0
        self.done = False

    @property
    def level(self):
        """Of its line: lower ones go first."""
        return -self.priority

    @property
    def room(self):
        """Blocks that it may have for all that its tenant has."""
        return NEVER

    def room_without(self, leases):
        """What `room` would be without these sequences of its tenant."""
        return NEVER

    def look(self, desk):
        """Counts anew what it needs; whether that is something else than before."""
        return False

    def kept_free(self, desk):
        """Blocks that have to stay free beside it."""
        return 0

    def look_past(self, desk, records):
        """The cache's room for it as if these sequences had ended, and their parts in that."""
        return desk._cache._room_without(records)

    def look_again(self, desk):
        """Something has become of its id while it was in its line."""

    def undo(self, desk, lease):
        """Gives back what has been granted to a thread or task that will not take it."""

    def reply(self, room, reason, waited):
        """The `Refusal` of one that has left the queue; `reason` says more than the numbers, if given."""
        tenant = None if self.tenant is None else self.tenant.name
        verdict = room.judge(self.request_id, max(self.tokens, 1), self.limit, self.least, tenant=tenant)
        if isinstance(verdict, Fits):  # but what there is, is kept for somebody else
            numbers = (verdict.blocks_needed, verdict.blocks_free, verdict.blocks_unclaimed, 0, 0)
            verdict = Refusal("promises", self.request_id, self.tokens, self.limit, *numbers, tenant)
        return replace(verdict, tokens=self.tokens, reason=reason or verdict.reason, waited=waited)


class Newcomer(Waiter):
    """A sequence that is not there yet.

    Parameters
    ----------
    request_id, sleeper
    prompt : int or sequence of int
    sizes : tuple of int
        Tokens of the prompt, and the limit.
    kept : tuple
        Salt, priority and ttl of what is kept of the prompt, as of `KVCache.allocate_for`.
    owner : tuple
        Priority in the queue, `on_evict`, `on_swap`.
    """

    __slots__ = ("kept", "owner", "prompt")
    is_new = True

    def __init__(self, request_id, sleeper, prompt, sizes, kept, owner):
        super().__init__(request_id, sleeper)
        self.prompt, self.kept, self.owner = prompt, kept, owner
        self.tokens, self.limit = sizes
        self.priority = owner[0]

    @property
    def room(self):
        return self.tenant.room - self.shared

    def room_without(self, leases):
        account = self.tenant
        if account.sequences - len(leases) >= account.most_sequences:
            return -1
        return account.most_blocks - account.blocks + sum([each._blocks for each in leases]) - self.shared

    def look(self, desk):
        """What others hold of its prompt may have become more or less."""
        if not desk._shares or type(self.prompt) is not Tokens:
            return False
        *_, shared = desk._cache._look_ahead(self.prompt, None, None, self.kept[0])
        more = self.shared - shared
        self.shared, self.first, self.total = shared, self.first + more, self.total + more
        if more and self.line is not None:
            self.line.update(self)
        return more != 0

    def kept_free(self, desk):
        return desk._keep

    def look_past(self, desk, records):
        return desk._cache._room_without(records, self.prompt, self.kept[0])

    def come(self, desk, tenant, stages):
        """Takes its place, unless it can never be granted."""
        if self.request_id in desk._ids or self.request_id in desk._cache:
            raise SequenceExists(request_id=self.request_id)
        self.tenant = desk._account(tenant)
        self.tally = self.tenant.tally
        self.first = -(-self.tokens // desk._size)
        self.be_content(self.limit, desk._size)
        floors = [self.floor_of(each.min_tokens) for each in stages if isinstance(each, Reduce)]
        if self.is_hopeless(desk, min(floors, default=self.limit)):
            desk._drop_if_idle(self.tenant)
            self.tally.refused["never_fits"] += 1
            self.done, self.reason = True, "never_fits"
            return
        self.look(desk)
        desk._ids[self.request_id] = self
        desk._waiters.add(self)

    def floor_of(self, min_tokens):
        """The lowest limit that would do, with the prompt uncut."""
        return max(self.tokens, min(min_tokens, self.limit))

    def be_content(self, least, block_size):
        """With this limit, if more cannot be promised."""
        self.least = least
        self.total = -(-least // block_size) - self.shared

    def is_hopeless(self, desk, least):
        account = self.tenant
        return (
            -(-least // desk._size) > account.most_blocks
            or account.most_sequences == 0
            or self.first > desk._cache.spec.num_blocks - desk._keep
        )

    def attempt(self, desk):
        """Asks the cache. None: not now; False: a hold of another thread is in the way."""
        limit = min(self.limit, self.tenant.room * desk._size)
        if limit < self.least:
            return None
        granted = desk._cache._allocate_up_to(
            self.request_id, self.prompt, limit, None, self.least, desk._keep, *self.kept
        )
        if granted:
            return desk._enter(granted, self.tenant, self.owner)
        if granted is None:
            self.look(desk)
        return granted

    def note_grant(self, desk, waited):
        desk._tallies.note_wait(waited)

    def losses(self, tally):
        """Where it is counted if it is refused."""
        return tally.refused

    def undo(self, desk, lease):
        desk._cache._end(lease.allocation)

    def refusal(self, desk, reason, waited):
        _, _, *room = desk._cache._look_ahead(self.prompt, None, None, self.kept[0])
        return self.reply(desk._room_for(self.tenant, *room), reason, waited)


class Grower(Waiter):
    """More tokens of a live sequence: before all lines.

    Parameters
    ----------
    request_id, sleeper
    cache : KVCache
    more : int or sequence of int
        Tokens, or their ids.
    priority : int
        Of the sequence.
    """

    __slots__ = ("more", "record", "there")

    def __init__(self, request_id, sleeper, cache, more, priority):
        super().__init__(request_id, sleeper)
        try:
            self.more = self.tokens = index(more)
        except TypeError:
            self.more = Tokens(more)
            self.tokens = len(self.more)
        self.record = cache._record_of(request_id)
        self.priority = priority
        self.count(cache)

    def count(self, cache):
        """What it needs now: its sequence may have grown, been cut, or let go of by others, since it came."""
        used, self.limit, self.first, *self.there = cache._growth_of(self.record, min(self.tokens, NEVER))
        self.least = used + self.tokens

    @property
    def is_past_limit(self):
        return self.least > self.limit

    def look(self, desk):
        before = self.first
        with suppress(KVCacheError):  # freed since, or suspended: its attempt will tell
            self.count(desk._cache)
        return self.first != before

    def come(self, desk, tenant, stages):
        lease = desk._live.get(self.request_id)
        self.tally = desk._tallies.of(None) if lease is None else lease._holder.tally
        desk._waiters.lead(self)

    def attempt(self, desk):
        granted = desk._cache._append_now(self.request_id, self.more, self.record)
        if granted is None:
            return False
        if not granted:
            self.look(desk)
            if self.is_past_limit:  # which has been lowered, or used up by others
                desk._finish(self, reason="never_fits")
        return granted or None

    def note_grant(self, desk, waited):
        self.tally.grown += 1

    def losses(self, tally):
        return tally.growth_refused

    def undo(self, desk, lease):
        with suppress(KVCacheError):
            desk._cache._take_back(self.record, self.tokens)

    def refusal(self, desk, reason, waited):
        self.look(desk)
        most, free, unclaimed = self.there
        unclaimed = min(unclaimed, desk._cache.spec.num_blocks)
        missing = 0 if self.is_past_limit else max(self.first - free, 0)
        numbers = (self.first, free, unclaimed, missing, min(most, self.tokens))
        reason = reason or ("arena_full" if missing else "promises")
        tenant = None if self.tenant is None else self.tenant.name
        return Refusal(reason, self.request_id, self.tokens, self.limit, *numbers, tenant, waited)


class Returner(Waiter):
    """The way back of a suspended sequence: before all newcomers, on its tenant's account all the time.

    Parameters
    ----------
    request_id, sleeper
    recompute : bool
        As of `KVCache.resume`.
    """

    __slots__ = ("recompute",)
    level = RETURNING

    def __init__(self, request_id, sleeper, recompute):
        super().__init__(request_id, sleeper)
        self.recompute = recompute

    def come(self, desk, tenant, stages):
        cache, size = desk._cache, desk._size
        if self.request_id in desk._ids:
            raise Suspended(request_id=self.request_id)
        self.tokens, self.limit = cache.used_tokens(self.request_id), cache.limit(self.request_id)
        self.least = max(self.limit, 1)
        self.first = -(-max(self.tokens, 1) // size) - desk._keep  # the watermark is not kept from it
        lease = desk._live.get(self.request_id)
        self.priority = 0 if lease is None else lease.priority
        self.tenant = desk._account(None) if lease is None else lease._holder
        self.tally = self.tenant.tally
        desk._ids[self.request_id] = self
        desk._waiters.add(self)
        self.look_again(desk)

    def kept_free(self, desk):
        return desk._keep  # which `first` is less

    def look_again(self, desk):
        cache = desk._cache
        if self.request_id not in cache:
            desk._finish(self, error=UnknownSequence(request_id=self.request_id))
        elif not cache.is_suspended(self.request_id):  # back already
            desk._finish(self, lease=cache._bring_back(self.request_id, False))
        else:
            self.total = -(-self.least // desk._size)
            if cache._is_moving(self.request_id):  # still, or again, on its way out: there will be a note
                self.total = NEVER - 1
            self.line.update(self)

    def attempt(self, desk):
        try:
            return desk._cache._bring_back(self.request_id, self.recompute)
        except Suspended:
            self.look_again(desk)
            return None

    def note_grant(self, desk, waited):
        self.tally.resumed += self.lease.travelled

    def losses(self, tally):
        return tally.resume_refused

    def refusal(self, desk, reason, waited):
        return self.reply(desk._room_for(None, *desk._cache._room()), reason, waited)
