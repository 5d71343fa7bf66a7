"""The queue before a cache: strategies for what does not fit now, for threads and for tasks."""

import time
from collections.abc import Coroutine

from kvcache.desk import Desk, TenantLimit
from kvcache.errors import CacheHeld, UnknownSequence
from kvcache.refusals import Fits, Refusal
from kvcache.strategies import Chain, Evict, Reduce, Reject, Strategy, Wait
from kvcache.waiter import Lease, TaskSleeper, ThreadSleeper, Waiter

__all__ = [
    "AllocationQueue",
    "Chain",
    "Evict",
    "Fits",
    "Lease",
    "Pending",
    "Reduce",
    "Refusal",
    "Reject",
    "TenantLimit",
    "Wait",
]


def _stages_of(strategy):
    if not isinstance(strategy, Strategy):
        raise TypeError(f"a strategy is Reject(), Reduce(...), Wait(...) or Evict(...), not {strategy!r}")
    return strategy.stages


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


class AllocationQueue(Desk):
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
    clock : callable, optional
        By default `time.monotonic`. With one of your own, deadlines are looked at by `poke` and by frees only.

    Examples
    --------
    >>> from kvcache import KVCache
    >>> from kvcache.admission import AllocationQueue, Reduce, Wait
    >>> cache = KVCache(num_layers=1, num_kv_heads=1, head_dim=4, max_total_tokens=64)
    >>> queue = AllocationQueue(cache, Reduce(min_tokens=24) | Wait(timeout=0.01))
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
        clock=time.monotonic,
    ):
        super().__init__(cache, keep_free, patience, most_overtaken, tenants, tenant_limit, clock)
        self._stages = _stages_of(Reject() if strategy is None else strategy)

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
        on_evict=None,
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
        on_evict : callable, optional
            Called with the id before the sequence is evicted, by the thread that needs its memory.

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
        lease = self._at_once(request_id, prompt, max_tokens, max_new_tokens, tenant, priority, on_evict)
        if lease is not None:
            return lease
        waiter = self._newcomer(request_id, prompt, max_tokens, max_new_tokens, ThreadSleeper())
        waiter.priority, waiter.on_evict = priority, on_evict
        return self._drive(waiter, self._serve(waiter, tenant, self._stages_for(strategy)))

    def allocate_async(
        self,
        request_id,
        prompt,
        *,
        max_tokens=None,
        max_new_tokens=None,
        tenant=None,
        priority=0,
        on_evict=None,
        strategy=None,
    ):
        """As `allocate`, for tasks: ``await`` it for the lease, or enter it by ``async with``.

        A task that is cancelled, at whichever point, leaves the queue and holds nothing.
        """

        async def serve():
            lease = self._at_once(request_id, prompt, max_tokens, max_new_tokens, tenant, priority, on_evict)
            if lease is not None:
                return lease
            waiter = self._newcomer(request_id, prompt, max_tokens, max_new_tokens, TaskSleeper())
            waiter.priority, waiter.on_evict = priority, on_evict
            return await self._drive_async(waiter, self._serve(waiter, tenant, self._stages_for(strategy)))

        return Pending(serve())

    def append(self, request_id, tokens=1, *, strategy=None):
        """Room for more tokens of a live sequence: True, or the `Refusal` that is left when the strategy is at its end.

        Growth goes before newcomers. At the limit of the sequence it is refused at once: see `KVCache.set_limit`.
        """
        if (
            self._cache.append_token(request_id)
            if tokens == 1
            else self._cache.append_tokens(request_id, tokens)
        ):
            self.touch((request_id,))
            return True
        waiter = self._grower(request_id, tokens, ThreadSleeper())
        return (
            waiter
            if not isinstance(waiter, Waiter)
            else self._drive(waiter, self._serve(waiter, None, self._stages_for(strategy)))
        )

    def append_async(self, request_id, tokens=1, *, strategy=None):
        """As `append`, to be awaited."""

        async def serve():
            waiter = self._grower(request_id, tokens, TaskSleeper())
            if not isinstance(waiter, Waiter):
                return waiter
            return await self._drive_async(waiter, self._serve(waiter, None, self._stages_for(strategy)))

        return serve()

    def touch(self, request_ids):
        """Says that these have been appended to otherwise, a batch for instance: they are evicted last."""
        for request_id in request_ids:
            try:
                self._live.move_to_end(request_id)
            except KeyError:  # not of this queue, or just freed
                pass

    def explain(self, prompt, max_tokens=None, *, max_new_tokens=None, tenant=None):
        """`Fits`, or the `Refusal` that a newcomer would get now; those who wait are not looked at."""
        answer = self._cache.explain(prompt, max_tokens, max_new_tokens=max_new_tokens)
        if not answer and answer.reason == "never_fits":
            return answer
        with self._turn:
            account = self._account(tenant)
            verdict = self._verdict(account, None, answer.tokens, answer.max_tokens, None)
            self._drop_if_idle(account)
        return verdict

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
            self._grant()

    def cancel(self, request_id):
        """Ends a newcomer's wait: it is refused, ``"cancelled"``. False if it does not wait."""
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
        with self._turn:
            self._closed = True
            for waiter in list(self._waiters):
                self._finish(waiter, reason="cancelled")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    # ---- the course of one request

    def _at_once(self, request_id, prompt, max_tokens, max_new_tokens, tenant, priority, on_evict):
        """The lease, if nobody waits and it fits whole."""
        if self._closed:
            return None
        self._lock.acquire()
        try:
            if self._waiters.count:
                return None
            account = self._accounts.get(tenant)
            if account is None:
                account = self._account(tenant)
            if account.limited:
                return None
            allocation = self._cache._allocate_up_to(
                request_id, prompt, max_tokens, max_new_tokens, None, self._keep
            )
            return self._enter(allocation, account, priority, on_evict) if allocation else None
        finally:
            self._release()

    def _newcomer(self, request_id, prompt, max_tokens, max_new_tokens, sleeper):
        waiter = Waiter(request_id, sleeper)
        waiter.tokens, waiter.limit = self._cache._measured(prompt, max_tokens, max_new_tokens)
        waiter.prompt = prompt
        return waiter

    def _grower(self, request_id, tokens, sleeper):
        """A waiter for growth, or what there is to say at once."""
        cache, size = self._cache, self._size
        count = tokens if isinstance(tokens, int) else len(tokens)
        waiter = Waiter(request_id, sleeper)
        waiter.tokens, waiter.limit, waiter.count = count, cache.limit(request_id), count
        used = cache.used_tokens(request_id)
        waiter.first = max(-(-(used + count) // size) - cache.capacity(request_id) // size, 1)
        lease = self._live.get(request_id)
        waiter.priority = 0 if lease is None else lease.priority
        if used + count > waiter.limit:
            return self._refusal(waiter, "never_fits")
        return waiter

    def _serve(self, waiter, tenant, stages):
        """Goes through the strategies. Where it yields, it wants to sleep, for so many seconds or (None) until woken."""
        self._submit(waiter, tenant, stages)
        reason = waiter.reason
        for stage in stages:
            if waiter.done:
                break
            if isinstance(stage, Reduce):
                self._reduce(waiter, stage)
            elif isinstance(stage, Evict):
                self._make_room(waiter, stage)
            elif isinstance(stage, Wait):
                yield from self._wait(waiter, stage.timeout)
                reason = "timeout"
        while not waiter.done and self._blocked is waiter:  # nothing but a hold is in the way
            self._require_no_hold()
            yield None
        return self._answer(waiter, reason)

    def _wait(self, waiter, timeout):
        if timeout is not None:
            waiter.deadline = self._clock() + timeout
        while not waiter.done:
            remaining = None if timeout is None else waiter.deadline - self._clock()
            if remaining is not None and remaining <= 0:
                break
            self._require_no_hold()
            yield None if self._virtual else remaining
        waiter.deadline = None

    def _require_no_hold(self):
        """What is freed comes back only when all holds have ended, this thread's too."""
        holds = self._cache._holds_open()
        if holds:
            raise CacheHeld(holds=holds)

    def _reduce(self, waiter, stage):
        if waiter.count:
            return
        with self._turn:
            if not waiter.done:
                self._set_least(waiter, self._least_of(waiter, stage.min_tokens))
                waiter.line.update(waiter)
                self._grant()

    def _answer(self, waiter, reason):
        with self._turn:
            if not waiter.done:
                self._finish(waiter, reason=reason)
                self._grant()  # what was kept for it is there for others
            if waiter.lease is None and waiter.error is None:
                if waiter.tenant is not None:
                    self._drop_if_idle(waiter.tenant)
                return self._refusal(waiter, waiter.reason)
        if waiter.error is not None:
            raise waiter.error
        if waiter.count:
            self.touch((waiter.request_id,))
        return waiter.lease

    def _drive(self, waiter, course):
        try:
            while True:
                waiter.sleeper.sleep(next(course))
        except StopIteration as end:
            return end.value
        except BaseException:
            self._give_back(waiter)
            raise

    async def _drive_async(self, waiter, course):
        try:
            while True:
                try:
                    seconds = next(course)
                except StopIteration as end:
                    return end.value
                await waiter.sleeper.sleep(seconds)
        except BaseException:
            self._give_back(waiter)
            raise

    # ---- eviction

    def _make_room(self, waiter, stage):
        """Ends one victim after the other until the request has been granted, or nobody is left to end."""
        with self._turn:
            if not waiter.done:
                self._waiters.lead(waiter)
                self._grant()
        try:
            while not waiter.done:
                victim = self._victim_for(waiter, stage.victim)
                if victim is None:
                    return
                self._evict(victim, stage.notify)
                with self._turn:
                    self._grant()
        finally:
            with self._turn:
                if not waiter.done and not waiter.count:
                    self._waiters.follow(waiter)
                    self._grant()

    def _evict(self, victim, notify):
        try:
            tell = victim.on_evict or notify
            if tell is not None:
                tell(victim.request_id)
        except BaseException:
            victim._leaving = False
            raise
        victim.free()

    def _victim_for(self, waiter, choice):
        """The lease to end, marked as such; None where nobody may be ended, or all of them would not be enough."""
        with self._turn:
            self._settle_accounts(list(self._live))
            if waiter.done or self._blocked is waiter:
                return None
            leases = [
                each
                for each in self._live.values()
                if not each._leaving and each.request_id != waiter.request_id
            ]
            if choice == "priority":
                leases = [each for each in leases if each.priority < waiter.priority]
                leases.sort(key=lambda lease: lease.priority)
            if not leases or not self._is_enough(waiter, leases):
                return None
            if not callable(choice):
                leases[0]._leaving = True
                return leases[0]
        return self._chosen(choice, {each.request_id: each for each in leases})

    def _is_enough(self, waiter, leases):
        if waiter.count:
            return True
        _, unclaimed = self._cache._room()
        more = sum([each._blocks for each in leases])
        return waiter.total <= min(unclaimed + more, waiter.tenant.room)

    def _chosen(self, choose, leases):
        request_id = choose(list(leases))
        if request_id is None:
            return None
        victim = leases.get(request_id)
        if victim is None:
            raise UnknownSequence(request_id=request_id)
        with self._turn:
            if victim._leaving:
                return None
            victim._leaving = True
        return victim
