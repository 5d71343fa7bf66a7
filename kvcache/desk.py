"""The desk behind the queue: who holds what, whom to grant next, and the lock around it.

Under the lock the next waiter is chosen and granted; sleeping, waking and callbacks happen outside. What frees memory
never waits for the lock: it leaves a note, and whoever has the lock reads the notes before it is done (`_note`,
`_release`). So no wake-up is lost between a refused attempt and a place in the line, and a finalizer that frees in the
middle of it all is safe.
"""

import time
from collections import OrderedDict, deque
from dataclasses import dataclass, replace

from kvcache.errors import CacheClosed, CacheHeld, KVCacheError, SequenceExists
from kvcache.parking import ParkingLock
from kvcache.refusals import Fits, Refusal, Room
from kvcache.strategies import Reduce
from kvcache.tallies import Tallies
from kvcache.waiter import Lease, Waiter
from kvcache.waiting import NEVER, Tenant, Waiters


@dataclass(frozen=True)
class TenantLimit:
    """What one tenant may have at a time; None: no limit.

    Parameters
    ----------
    tokens : int, optional
        Granted limits of all its sequences, in tokens, in whole blocks.
    sequences : int, optional
    share : float, optional
        Of the arena, above 0 and at most 1.
    """

    tokens: int | None = None
    sequences: int | None = None
    share: float | None = None

    def __post_init__(self):
        for name, least in (("tokens", 1), ("sequences", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")

    def most_blocks(self, spec):
        """In blocks of an arena."""
        most = NEVER if self.tokens is None else self.tokens // spec.block_size
        return most if self.share is None else min(most, int(self.share * spec.num_blocks + 1e-9))


class Turn:
    """The queue's lock, as a context manager that reads the notes before it gives it back."""

    __slots__ = ("desk",)

    def __init__(self, desk):
        self.desk = desk

    def __enter__(self):
        self.desk._lock.acquire()

    def __exit__(self, *exception):
        self.desk._release()


class Desk:
    """Accounts, lines and the lock of a queue.

    Its methods are called under the lock, but for `_note`, `_release`, `_submit`, `_give_back` and `_refusal`.
    """

    def __init__(
        self, cache, name, keep_free, patience, most_overtaken, tenants, tenant_limit, warn_after, clock
    ):
        if keep_free < 0 or patience < 0 or most_overtaken < 0:
            raise ValueError("keep_free, patience and most_overtaken must be at least 0")
        if warn_after is not None and not warn_after > 0:
            raise ValueError(f"warn_after must be above 0, not {warn_after}")
        self._cache = cache
        self._size = cache.spec.block_size
        self._keep = -(-keep_free // self._size)
        self._limits = dict(tenants or {})
        self._limit = tenant_limit
        self._tallies = Tallies(self._limits)
        self._warn_after = warn_after
        self._clock = clock
        self._virtual = clock is not time.monotonic
        self._lock = ParkingLock()
        self._take = self._lock.take
        self._notes = deque()  # ids that may have been freed, waiters given up, the cache: anything else
        self._accounts = {}  # tenant -> Tenant
        self._live = OrderedDict()  # request id -> Lease, least recently appended first
        self._ids = {}  # request id -> Waiter, newcomers only
        self._waiters = Waiters(patience, most_overtaken)
        self._number = 0
        self._woken = []  # to be woken once the lock is given back
        self._blocked = None  # the waiter whose grant a hold is in the way of
        self._closed = False
        self._turn = Turn(self)
        self._watcher = self._note
        self.name = cache._enrol(self, name)
        cache._watch(self._watcher)

    # ---- notes, and the lock

    def _note(self, about):
        """Called by whatever makes room; never waits."""
        self._notes.append(about)
        if self._take(False):
            self._release()

    def _release(self):
        """Reads the notes, grants what can be, gives the lock back, wakes; again if a note has come meanwhile."""
        while True:
            try:
                if self._notes:
                    self._read_notes()
                woken, self._woken = self._woken, []
            finally:
                self._lock.release()
            for waiter in woken:
                if not waiter.sleeper.wake():
                    self._notes.append(waiter)
            if not self._notes or not self._take(False):
                return

    def _read_notes(self):
        while self._notes:
            about = self._notes.popleft()
            if type(about) is Waiter:
                self._give_up(about)
            elif about is not self._cache:
                self._settle_accounts((about,))
        if self._waiters.count:
            self._grant()

    def _settle_accounts(self, request_ids):
        """Takes what has been freed off its tenant's account, and reads limits that have changed."""
        for request_id in request_ids:
            lease = self._live.get(request_id)
            if lease is None:
                continue
            if not self._cache._is_live(lease.allocation):
                self._forget(request_id)
                continue
            try:
                blocks = -(-self._cache.limit(request_id) // self._size)
            except KVCacheError:  # freed since; the note of that is on its way
                continue
            lease._holder.blocks += blocks - lease._blocks
            lease._blocks = blocks

    def _enter(self, allocation, account, priority, on_evict):
        request_id = allocation.request_id
        if request_id in self._live:  # freed, and the note of that has not been read
            self._forget(request_id)
        lease = Lease(self._cache, allocation, account, priority, on_evict)
        lease._blocks = blocks = -(-allocation.max_tokens // self._size)
        account.blocks += blocks
        account.sequences += 1
        account.tally.granted += 1
        self._live[request_id] = lease
        return lease

    def _forget(self, request_id):
        lease = self._live.pop(request_id)
        account = lease._holder
        account.blocks -= lease._blocks
        account.sequences -= 1
        if not account.sequences:
            self._drop_if_idle(account)

    def _account(self, tenant):
        account = self._accounts.get(tenant)
        if account is None:
            limit, tally = self._limits.get(tenant, self._limit), self._tallies.of(tenant)
            if limit is None:
                account = Tenant(tenant, tally)
            else:
                most = NEVER if limit.sequences is None else limit.sequences
                account = Tenant(tenant, tally, limit.most_blocks(self._cache.spec), most)
            self._accounts[tenant] = account
        return account

    def _drop_if_idle(self, account):
        if account is not None and account.name is not None and not account.sequences and not account.waiting:
            self._accounts.pop(account.name, None)

    # ---- granting

    def _submit(self, waiter, tenant, stages):
        """Gives a request its place, unless it can never be granted, and grants what can be."""
        with self._turn:
            if self._closed:
                raise KVCacheError("the queue is closed")
            self._number += 1
            waiter.number, waiter.since = self._number, self._clock()
            if waiter.count:
                lease = self._live.get(waiter.request_id)
                waiter.tally = self._tallies.of(None) if lease is None else lease._holder.tally
                self._waiters.lead(waiter)
                self._grant()
                return
            if waiter.request_id in self._ids or waiter.request_id in self._cache:
                raise SequenceExists(request_id=waiter.request_id)
            waiter.tenant = self._account(tenant)
            waiter.tally = waiter.tenant.tally
            waiter.first = -(-waiter.tokens // self._size)
            self._set_least(waiter, waiter.limit)
            lowest = min([self._least_of(waiter, each.min_tokens) for each in stages if isinstance(each, Reduce)],
                         default=waiter.limit)  # fmt: skip
            if self._is_hopeless(waiter, lowest):
                self._drop_if_idle(waiter.tenant)
                waiter.tally.refuse(waiter, "never_fits")
                waiter.done, waiter.reason = True, "never_fits"
                return
            self._ids[waiter.request_id] = waiter
            self._waiters.add(waiter)
            self._grant()

    def _least_of(self, waiter, min_tokens):
        return max(waiter.tokens, min(min_tokens, waiter.limit))

    def _set_least(self, waiter, least):
        waiter.least = least
        waiter.total = -(-least // self._size)

    def _is_hopeless(self, waiter, least):
        account = waiter.tenant
        return (
            -(-least // self._size) > account.most_blocks
            or account.most_sequences == 0
            or waiter.first > self._cache.spec.num_blocks - self._keep
        )

    def _grant(self):
        """Grants whom it can, and notes who is to be woken."""
        before, self._blocked = self._blocked, None
        try:
            if self._waiters.count and self._grant_front():
                self._grant_lines()
        except CacheClosed as error:
            for waiter in list(self._waiters):
                self._finish(waiter, error=error)
        if before is not None and before is not self._blocked and not before.done:
            self._woken.append(before)  # no longer a hold, but room is what it lacks

    def _grant_front(self):
        """True if nobody is left before the lines."""
        for waiter in list(self._waiters.front):
            if waiter.count or waiter.total <= waiter.tenant.room:
                self._attempt(waiter)
        return not self._waiters.front and self._blocked is None

    def _grant_lines(self):
        now, refused = self._clock(), None
        while self._waiters.count and self._blocked is None:
            room = free, unclaimed = self._cache._room()
            waiter = self._waiters.choose(free - self._keep, unclaimed, now)
            if waiter is None or room == refused:
                return
            if not self._attempt(waiter):
                refused = room  # somebody was faster: it keeps its place

    def _attempt(self, waiter):
        """Asks the cache. True: it no longer waits."""
        try:
            if waiter.count:
                granted = self._cache._append_now(waiter.request_id, waiter.count)
                held = granted is None
            else:
                limit = min(waiter.limit, waiter.tenant.room * self._size)
                granted = self._cache._allocate_up_to(
                    waiter.request_id, waiter.prompt, limit, None, waiter.least, self._keep
                )
                held = granted is False
        except CacheHeld:
            granted, held = None, True
        except Exception as error:  # noqa: BLE001 (it is raised where the request came from)
            self._finish(waiter, error=error)
            return True
        if held:
            self._blocked = waiter
        if not granted:
            return False
        line = waiter.line
        lease = (
            True if waiter.count else self._enter(granted, waiter.tenant, waiter.priority, waiter.on_evict)
        )
        self._finish(waiter, lease=lease)
        if line is not None:
            self._waiters.note_grant(waiter)
        return True

    def _finish(self, waiter, lease=None, error=None, reason=None):
        self._waiters.remove(waiter)
        if self._ids.get(waiter.request_id) is waiter:
            del self._ids[waiter.request_id]
        if lease is None:
            self._drop_if_idle(waiter.tenant)
            self._count_loss(waiter, error, reason)
        elif waiter.count:
            waiter.tally.grown += 1
        else:
            self._tallies.note_wait(self._clock() - waiter.since)
        waiter.lease, waiter.error, waiter.reason, waiter.done = lease, error, reason, True
        self._woken.append(waiter)

    def _count_loss(self, waiter, error, reason):
        if waiter.tally is None:  # never had a place: its id lived, or the queue was closed
            return
        if reason is not None:
            waiter.tally.refuse(waiter, reason)
        elif error is not None and not waiter.count:
            waiter.tally.failed += 1

    def _wake_late(self):
        """Has those look whose deadlines have passed, by a clock that nobody sleeps by."""
        now = self._clock()
        late = [each for each in self._waiters if each.deadline is not None and each.deadline <= now]
        self._woken += sorted(late, key=lambda each: each.number)

    # ---- leaving

    def _give_back(self, waiter):
        """Its thread or task has been interrupted: what it has been granted is freed, now or very soon. Never waits."""
        self._note(waiter)

    def _give_up(self, waiter):
        lease, waiter.lease = waiter.lease, None
        if not waiter.done:
            self._finish(waiter, reason="cancelled")
        elif isinstance(lease, Lease):
            self._cache._end(lease.allocation)
        elif lease:
            self._take_growth_back(waiter)

    def _take_growth_back(self, waiter):
        try:
            used = self._cache.used_tokens(waiter.request_id)
            self._cache.truncate(waiter.request_id, max(used - waiter.count, 0))
        except KVCacheError:  # freed since
            pass

    # ---- what is said of a refusal

    def _verdict(self, account, request_id, tokens, limit, least):
        free, unclaimed = self._cache._room()
        room = Room(self._size, free, unclaimed, self._keep, account.room if account.limited else None)
        return room.judge(request_id, tokens, limit, least, tenant=account.name)

    def _refusal(self, waiter, reason):
        """Why the request, which has left the queue, was not granted; `reason` says more than the numbers, if given."""
        if waiter.count:
            return self._refusal_of_growth(waiter, reason)
        verdict = self._verdict(waiter.tenant, waiter.request_id, waiter.tokens, waiter.limit, waiter.least)
        waited = self._clock() - waiter.since
        if isinstance(verdict, Fits):  # but what there is, is kept for somebody else
            names = (verdict.tokens, verdict.max_tokens, verdict.blocks_needed)
            room = (verdict.blocks_free, verdict.blocks_unclaimed)
            verdict = Refusal("promises", waiter.request_id, *names, *room, 0, 0, waiter.tenant.name)
        return replace(verdict, reason=reason or verdict.reason, waited=waited)

    def _refusal_of_growth(self, waiter, reason):
        free, unclaimed = self._cache._room()
        waited = self._clock() - waiter.since
        return Refusal(
            reason or "arena_full",
            waiter.request_id,
            waiter.tokens,
            waiter.limit,
            waiter.first,
            free,
            unclaimed,
            blocks_missing=max(waiter.first - free, 0),
            fitting_tokens=0,
            waited=waited,
        )
