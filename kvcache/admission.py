"""The queue before a cache: strategies for what does not fit now, for threads and for tasks."""

import time
from collections.abc import Coroutine
from contextlib import suppress

from kvcache.course import Courses, stages_of
from kvcache.desk import TenantLimit
from kvcache.lease import Lease
from kvcache.options import as_callable, as_index
from kvcache.refusals import Fits, Refusal
from kvcache.sleepers import TaskSleeper, ThreadSleeper
from kvcache.strategies import Chain, Evict, Reduce, Reject, Swap, Wait
from kvcache.tallies import QueueStats, TenantStats
from kvcache.waiter import Returner

__all__ = [
    "AllocationQueue",
    "Chain",
    "Evict",
    "Fits",
    "Lease",
    "Pending",
    "QueueStats",
    "Reduce",
    "Refusal",
    "Reject",
    "Swap",
    "TenantLimit",
    "TenantStats",
    "Wait",
]


class Pending(Coroutine):
    """An admission that is under way: await it, or enter it by ``async with``, which frees at the end."""

    __slots__ = ("_coroutine", "_lease")

    def __init__(self, coroutine):
        self._coroutine = coroutine
        self._lease = None

    def send(self, value):
        return self._coroutine.send(value)

    def throw(self, *error):
        return self._coroutine.throw(*error)

    def close(self):
        self._coroutine.close()

    def __await__(self):
        return self._coroutine.__await__()

    async def __aenter__(self):
        self._lease = await self._coroutine
        return self._lease

    async def __aexit__(self, *exception):
        if self._lease:
            self._lease.free()


def _checked(priority, on_evict, on_swap):
    """The priority as an int; raises `TypeError` for what an owner cannot say."""
    as_callable(on_evict, "on_evict")
    as_callable(on_swap, "on_swap")
    return as_index(priority, "priority")


class AllocationQueue(Courses):
    """Admission to a cache, by a strategy, for threads and tasks.

    Parameters
    ----------
    cache : KVCache
    strategy : Strategy
        What to do with what does not fit now: `Reject()`, or several joined by ``|``.
    keep_free : int
        Tokens that stay free after a newcomer's prompt has been placed: room for growth, which goes first.
    patience : float
        Age, in units of the clock, at which a waiter is old: what there is, is then kept for it.
    most_overtaken : int
        Later ones that may be granted before the first of a line; then it counts as old as well.
    tenants : mapping, optional
        `TenantLimit` by tenant.
    tenant_limit : TenantLimit, optional
        Of every other tenant.
    name : str, optional
        What metrics and warnings call it, one of a kind for the cache; by default ``"default"``, then
        ``"default-2"`` and so on.
    warn_after : float or None
        Age of the oldest waiter, in units of the clock, at which `KVCache.check_health` warns of the queue.
    clock : callable, optional
        By default `time.monotonic`. With one of your own, deadlines are looked at by `poke` only.

    Examples
    --------
    >>> from kvcache import KVCache
    >>> from kvcache.admission import AllocationQueue, Reduce, Wait
    >>> cache = KVCache(num_layers=1, num_kv_heads=1, head_dim=4, max_total_tokens=64)
    >>> queue = AllocationQueue(cache, Reduce(min_tokens=16) | Wait(timeout=0.01))
    >>> with queue.allocate("a", 8, max_tokens=40) as first, queue.allocate("b", 8, max_tokens=40) as second:
    ...     first.max_tokens, second.max_tokens, queue.allocate("c", 8, max_tokens=40).reason
    (40, 16, 'timeout')
    """

    def __init__(
        self,
        cache,
        strategy=None,
        *,
        keep_free=0,
        patience=5.0,
        most_overtaken=64,
        tenants=None,
        tenant_limit=None,
        name=None,
        warn_after=30.0,
        clock=time.monotonic,
    ):
        self._stages = stages_of(Reject() if strategy is None else strategy, cache)
        super().__init__(
            cache, name, keep_free, patience, most_overtaken, tenants, tenant_limit, warn_after, clock
        )

    # ---- admission

    def allocate(
        self,
        request_id,
        prompt,
        *,
        max_tokens=None,
        max_new_tokens=None,
        tenant=None,
        priority=0,
        salt=None,
        cache_priority=0,
        ttl=None,
        on_evict=None,
        on_swap=None,
        strategy=None,
    ):
        """Admits a sequence, by the queue's strategy or another one, and waits for it if that says so.

        Parameters
        ----------
        request_id, prompt, max_tokens, max_new_tokens
            As of `KVCache.allocate_for`.
        tenant : hashable
        priority : int
            Higher ones are granted first, until somebody is old.
        salt, cache_priority, ttl
            What `KVCache.allocate_for` calls `salt`, `priority` and `ttl`: of the prefixes that are found and kept.
        on_evict : callable, optional
            Called with the id before the sequence is evicted, by the thread that needs its memory.
        on_swap : callable, optional
            Called with the id and ``"leaving"``, then ``"suspended"`` or ``"intact"``: see `Swap`.

        Returns
        -------
        Lease or Refusal
            True or False in a condition. Either is a context manager; a lease's frees the sequence.

        Raises
        ------
        RequestTooLarge, SequenceExists, TypeError, ValueError, CacheClosed
            As `KVCache.allocate_for`: nothing that cannot work ever waits.
        CacheHeld
            It would have to wait, and this thread has a hold open.
        """
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        if type(priority) is not int or on_evict is not None or on_swap is not None:
            priority = _checked(priority, on_evict, on_swap)
        kept, owner = (salt, cache_priority, ttl), (priority, on_evict, on_swap)
        lease = self._at_once(request_id, prompt, max_tokens, max_new_tokens, tenant, kept, owner)
        if lease is not None:
            return lease
        waiter = self._newcomer(request_id, prompt, max_tokens, max_new_tokens, ThreadSleeper(), kept, owner)
        return self._drive(waiter, self._serve(waiter, tenant, stages))

    def allocate_async(
        self,
        request_id,
        prompt,
        *,
        max_tokens=None,
        max_new_tokens=None,
        tenant=None,
        priority=0,
        salt=None,
        cache_priority=0,
        ttl=None,
        on_evict=None,
        on_swap=None,
        strategy=None,
    ):
        """As `allocate`, for tasks: ``await`` it for the lease, or enter it by ``async with``.

        A task that is cancelled, at whichever point, leaves the queue and holds nothing.
        """
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        if type(priority) is not int or on_evict is not None or on_swap is not None:
            priority = _checked(priority, on_evict, on_swap)
        kept, owner = (salt, cache_priority, ttl), (priority, on_evict, on_swap)

        async def serve():
            lease = self._at_once(request_id, prompt, max_tokens, max_new_tokens, tenant, kept, owner)
            if lease is not None:
                return lease
            waiter = self._newcomer(
                request_id, prompt, max_tokens, max_new_tokens, TaskSleeper(), kept, owner
            )
            return await self._drive_async(waiter, self._serve(waiter, tenant, stages))

        return Pending(serve())

    def append(self, request_id, tokens=1, *, strategy=None):
        """Room for more tokens of a live sequence, a count or ids: True, or the `Refusal` at the end of the strategy.

        Growth goes before newcomers. At the limit of the sequence it is refused at once: see `KVCache.set_limit`.
        """
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        if self._cache._append_now(request_id, tokens, None, True):
            self.touch((request_id,))
            return True
        waiter = self._grower(request_id, tokens, ThreadSleeper())
        if waiter.is_past_limit:
            return self._past_limit(waiter)
        return self._drive(waiter, self._grow(waiter, stages))

    async def append_async(self, request_id, tokens=1, *, strategy=None):
        """As `append`, for tasks."""
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        if self._cache._append_now(request_id, tokens):
            self.touch((request_id,))
            return True
        waiter = self._grower(request_id, tokens, TaskSleeper())
        if waiter.is_past_limit:
            return self._past_limit(waiter)
        return await self._drive_async(waiter, self._grow(waiter, stages))

    def resume(self, request_id, *, recompute=False, strategy=None):
        """Brings a suspended sequence back, when there is room for it by the strategy, and waits until it is here.

        Those who return have a priority above all newcomers', and pass each other where they fit.

        Parameters
        ----------
        request_id : hashable
            Suspended by `Swap` or by `KVCache.suspend`; one that is still on its way out is waited for. A sequence that
            is not suspended has arrived.
        recompute : bool
            As of `KVCache.resume`: room without K/V, for a sequence whose chunks are lost.
        strategy : Strategy, optional
            Instead of the queue's. `Reduce` has nothing to say here.

        Returns
        -------
        Transfer or Refusal
            The transfer has ended: ``ok``, or the id is suspended as before and `Transfer.reason` says why. Where there
            is no room the refusal, which is False in a condition.

        Raises
        ------
        UnknownSequence
            It does not live, or has been freed meanwhile.
        Suspended
            Another thread or task is bringing it back.
        CacheHeld, CacheClosed
        """
        waiter = Returner(request_id, ThreadSleeper(), recompute)
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        return self._drive(waiter, self._bring_back(waiter, stages))

    async def resume_async(self, request_id, *, recompute=False, strategy=None):
        """As `resume`, for tasks. One that is cancelled leaves the sequence suspended, or on its way back."""
        waiter = Returner(request_id, TaskSleeper(), recompute)
        stages = self._stages if strategy is None else stages_of(strategy, self._cache)
        return await self._drive_async(waiter, self._bring_back(waiter, stages))

    def touch(self, request_ids):
        """Says that these have been appended to otherwise, a batch for instance: they are evicted last."""
        with self._turn:
            for request_id in request_ids:
                with suppress(KeyError):  # not of this queue, or just freed
                    self._live.move_to_end(request_id)

    def explain(self, prompt, max_tokens=None, *, max_new_tokens=None, tenant=None, salt=None):
        """`Fits`, or the `Refusal` that a newcomer would get now; those who wait are not looked at."""
        tokens, limit, *room = self._cache._foresee(prompt, max_tokens, max_new_tokens, salt)
        with self._turn:
            account = self._account(tenant)
            room = self._room_for(account, *room)
            self._drop_if_idle(account)
        return room.judge(None, tokens, limit, tenant=tenant)

    # ---- sight

    def stats(self):
        """Who waits, for how long, and what has become of the others: a `QueueStats`. It never waits for the queue."""
        waiters, accounts = self._waiters, list(self._accounts.values())
        return self._tallies.told(self.name, self._warn_after, waiters, accounts, self._clock())

    @property
    def warn_after(self):
        """The age of the oldest waiter at which `KVCache.check_health` warns; None: never."""
        return self._warn_after

    @property
    def oldest_age(self):
        """How long the first of those who wait has waited, in units of the clock; 0.0 where nobody does."""
        since = self._waiters.oldest() if self._waiters.count else None
        return 0.0 if since is None else max(0.0, self._clock() - since)

    # ---- the queue as a whole

    def __len__(self):
        """How many wait."""
        return self._waiters.count

    def __bool__(self):
        return True

    def __contains__(self, request_id):
        """Whether it waits."""
        return request_id in self._ids

    def poke(self):
        """Looks again: after frees that the cache's own calls do not tell of, and for deadlines of an own clock."""
        with self._turn:
            self._settle_accounts(list(self._live))
            for request_id in list(self._ids):
                self._look_again(request_id)
            self._grant()
            if self._virtual:
                self._wake_late()

    def cancel(self, request_id):
        """Ends the wait of a newcomer or a returner: it is refused, ``"cancelled"``. False if it does not wait."""
        with self._turn:
            waiter = self._ids.get(request_id)
            if waiter is None:
                return False
            self._finish(waiter, reason="cancelled")
            self._grant()
            return True

    def close(self):
        """Refuses everybody who waits, and leaves the cache alone. What has been granted stays granted."""
        self._cache._unwatch(self._watcher)
        self._cache._strike(self)
        with self._turn:
            self._closed = True
            for waiter in list(self._waiters):
                self._finish(waiter, reason="cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()
