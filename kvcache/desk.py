"""The desk behind the queue: who holds what, whom to grant next, and the lock around it.

Under the lock the next waiter is chosen and granted; sleeping, waking and callbacks happen outside. What frees memory
never waits for the lock: it leaves a note, and whoever has the lock reads the notes before it is done (`_note`,
`_release`). So no wake-up is lost between a refused attempt and a place in the line, and a finalizer that frees in the
middle of it all is safe.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvcache.errors import CacheClosed, CacheHeld, KVCacheError
from kvcache.lease import Lease
from kvcache.options import as_count, as_number
from kvcache.parking import ParkingLock
from kvcache.refusals import Room
from kvcache.tallies import Tallies
from kvcache.waiter import Waiter
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
        for name in ("tokens", "sequences"):
            if getattr(self, name) is not None:
                as_count(getattr(self, name), name, 1)
        if self.share is not None and not 0 < as_number(self.share, "share") <= 1:
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
        self._cache = cache
        self._size = cache.spec.block_size
        self._keep = -(-as_count(keep_free, "keep_free") // self._size)
        if self._keep >= cache.spec.num_blocks:
            arena = cache.spec.num_blocks * self._size
            raise ValueError(f"keep_free={keep_free} leaves newcomers nothing of an arena of {arena} tokens")
        as_number(patience, "patience", 0)
        as_count(most_overtaken, "most_overtaken")
        if warn_after is not None and not as_number(warn_after, "warn_after") > 0:
            raise ValueError(f"warn_after must be above 0, not {warn_after}")
        if not callable(clock):
            raise TypeError(f"clock must be callable, not {type(clock).__name__}")
        self._shares = cache.placement == "paged"  # prompts hold what others hold
        if not isinstance(tenants, (Mapping, type(None))):
            raise TypeError(f"tenants must be a mapping, not {type(tenants).__name__}")
        self._limits = dict(tenants or {})
        self._limit = tenant_limit
        for tenant, limit in (*self._limits.items(), (None, tenant_limit)):
            if limit is not None and not isinstance(limit, TenantLimit):
                whose = "tenant_limit" if tenant is None else f"the limit of tenant {tenant!r}"
                raise TypeError(f"{whose} must be a TenantLimit, not {type(limit).__name__}")
        self._tallies = Tallies(self._limits)
        self._warn_after = warn_after
        self._clock = clock
        self._virtual = clock is not time.monotonic
        self._lock = ParkingLock()
        self._take = self._lock.take
        self._notes = deque()  # ids that may have been freed, waiters given up, the cache: anything else
        self._accounts = {}  # tenant -> Tenant
        self._live = OrderedDict()  # request id -> Lease, least recently appended first
        self._ids = {}  # request id -> Waiter, those in lines
        self._waiters = Waiters(patience, most_overtaken)
        self._number = 0
        self._woken = []  # to be woken once the lock is given back
        self._blocked = {}  # waiter -> None, those whose grant nothing but a hold is in the way of
        self._held = {}  # as they are found, until all have been asked for
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
            if isinstance(about, Waiter):
                self._give_up(about)
            elif about is not self._cache:
                self._settle_accounts((about,))
                self._look_again(about)
        if self._waiters.count:
            self._grant()

    def _look_again(self, request_id):
        """Has one in line see what has become of its id."""
        waiter = self._ids.get(request_id)
        if waiter is not None:
            try:
                waiter.look_again(self)
            except KVCacheError as error:  # gone in between
                self._finish(waiter, error=error)

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

    def _enter(self, allocation, account, owner):
        request_id = allocation.request_id
        if request_id in self._live:  # freed, and the note of that has not been read
            self._forget(request_id)
        lease = Lease(self._cache, allocation, account, *owner)
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
            waiter.come(self, tenant, stages)
            if not waiter.done:
                self._grant()

    def _grant(self):
        """Grants whom it can, and notes who is to be woken."""
        before, self._held = self._blocked, {}
        try:
            if self._waiters.count and self._grant_front():
                self._grant_lines()
        except CacheClosed as error:
            for waiter in list(self._waiters):
                self._finish(waiter, error=error)
        self._blocked = self._held  # at once: it is read without the lock
        for waiter in before:
            if not (waiter in self._blocked or waiter.done):
                self._woken.append(waiter)  # no longer a hold, but room is what it lacks

    def _grant_front(self):
        """True if nobody is left before the lines."""
        for waiter in list(self._waiters.front):
            if waiter.total <= waiter.room:
                self._attempt(waiter)
        return not (self._waiters.front or self._held)

    def _grant_lines(self):
        now, refused = self._clock(), None
        while self._waiters.count and not self._held:
            room = free, unclaimed = self._cache._room()
            waiter = self._waiters.choose(free - self._keep, unclaimed, now)
            if waiter is None and self._shares and self._look_at_first():
                continue
            if waiter is None or room == refused:
                return
            needs = waiter.first, waiter.total
            if not self._attempt(waiter) and needs == (waiter.first, waiter.total):
                refused = room  # somebody was faster: it keeps its place

    def _look_at_first(self):
        """Whether the one that came first needs something else by now: others may have computed what it begins with."""
        first = self._waiters.first()
        return first is not None and first.look(self)

    def _attempt(self, waiter):
        """Asks the cache. True: it no longer waits."""
        line = waiter.line
        try:
            granted = waiter.attempt(self)
        except CacheHeld:
            granted = False
        except Exception as error:  # noqa: BLE001 (it is raised where the request came from)
            self._finish(waiter, error=error)
            return True
        if not granted:
            if granted is not None:
                self._held[waiter] = None
            return waiter.done
        self._finish(waiter, lease=granted)
        if line is not None:
            self._waiters.note_grant(waiter)
        return True

    def _finish(self, waiter, lease=None, error=None, reason=None):
        self._waiters.remove(waiter)
        if self._ids.get(waiter.request_id) is waiter:
            del self._ids[waiter.request_id]
        waiter.lease, waiter.error, waiter.reason, waiter.done = lease, error, reason, True
        self._woken.append(waiter)
        if lease is None:
            self._drop_if_idle(waiter.tenant)
            self._count_loss(waiter, error, reason)
        else:
            waiter.note_grant(self, self._clock() - waiter.since)

    def _count_loss(self, waiter, error, reason):
        if waiter.tally is None:  # never had a place: its id lived, or the queue was closed
            return
        if reason is not None:
            waiter.losses(waiter.tally)[reason] += 1
        elif error is not None and waiter.is_new:
            waiter.tally.failed += 1

    def _wake_late(self):
        """Has those look whose deadlines have passed, by a clock that nobody sleeps by."""
        now = self._clock()
        late = [each for each in self._waiters if each.deadline is not None and each.deadline <= now]
        self._woken += sorted(late, key=lambda each: each.number)

    # ---- leaving

    def _give_back(self, waiter, error=None):
        """Its thread or task has failed, or was interrupted: what it has been granted is freed, now or very soon.

        Never waits.
        """
        waiter.fault = error
        self._note(waiter)

    def _give_up(self, waiter):
        lease, waiter.lease = waiter.lease, None
        if not waiter.done:
            self._finish(waiter, error=waiter.fault, reason=None if waiter.fault else "cancelled")
        elif lease:
            waiter.undo(self, lease)

    # ---- what there is

    def _room_for(self, account, free, unclaimed, shared=0):
        """For a newcomer of this tenant; for one that returns, None."""
        room = Room(self._size, self._cache.spec.num_blocks, free, unclaimed, shared)
        if account is None:
            return room
        most = account.most_blocks if account.most_blocks != NEVER else None
        return replace(
            room,
            keep=self._keep,
            tenant=None if most is None else most - account.blocks,
            most=most,
            crowded=account.sequences >= account.most_sequences,
        )

    def _refusal(self, waiter, reason):
        """Why the request, which has left the queue, was not granted; `reason` says more than the numbers, if given."""
        return waiter.refusal(self, reason, self._clock() - waiter.since)
