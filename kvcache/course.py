"""The course of one request: at once, in the queue, through the strategies, and out of it again."""

from operator import index

from kvcache.desk import Desk
from kvcache.errors import CacheHeld, UnknownSequence
from kvcache.strategies import Evict, Reduce, Strategy, Wait
from kvcache.waiter import Waiter


def stages_of(strategy):
    """The single strategies, in order."""
    if not isinstance(strategy, Strategy):
        raise TypeError(f"a strategy is Reject(), Reduce(...), Wait(...) or Evict(...), not {strategy!r}")
    return strategy.stages


def count_of(tokens):
    """How many tokens: a count, or ids."""
    try:
        return index(tokens)
    except TypeError:
        return len(tokens)


class Courses(Desk):
    """What becomes of each request. Nothing here is called under the lock."""

    def _at_once(self, request_id, prompt, max_tokens, max_new_tokens, tenant, priority, on_evict):
        """The lease, if nobody waits and it fits whole."""
        if self._closed:
            return None
        if not self._take(False):
            self._lock.acquire()
        account = None
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
            if allocation:
                return self._enter(allocation, account, priority, on_evict)
            self._drop_if_idle(account)
            return None
        except BaseException:
            self._drop_if_idle(account)
            raise
        finally:
            self._release()

    def _newcomer(self, request_id, prompt, max_tokens, max_new_tokens, sleeper):
        waiter = Waiter(request_id, sleeper)
        waiter.tokens, waiter.limit = self._cache._measured(prompt, max_tokens, max_new_tokens)
        waiter.prompt = prompt
        return waiter

    def _grower(self, request_id, tokens, sleeper):
        cache, size = self._cache, self._size
        waiter = Waiter(request_id, sleeper)
        waiter.count = waiter.tokens = count_of(tokens)
        waiter.limit, waiter.least = cache.limit(request_id), cache.used_tokens(request_id) + waiter.count
        waiter.first = max(-(-waiter.least // size) - cache.capacity(request_id) // size, 1)
        lease = self._live.get(request_id)
        waiter.priority = 0 if lease is None else lease.priority
        return waiter

    def _is_at_limit(self, waiter):
        return waiter.least > waiter.limit

    def _serve(self, waiter, tenant, stages):
        """Goes through the strategies. Yields for how long it wants to sleep (None: until woken)."""
        self._submit(waiter, tenant, stages)
        reason = waiter.reason
        for stage in stages:
            if waiter.done:
                break
            if isinstance(stage, Reduce):
                self._reduce(waiter, stage)
            elif isinstance(stage, Evict):
                yield from self._make_room(waiter, stage)
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
                refusal = self._refusal(waiter, waiter.reason)
                if waiter.reason is None:  # said by the numbers only now
                    waiter.tally.refuse(waiter, refusal.reason)
                return refusal
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
        self._require_no_hold()
        with self._turn:
            if not waiter.done:
                self._waiters.lead(waiter)
                self._grant()
        while not waiter.done:
            if self._blocked is waiter:  # enough has been freed, and will be there when a hold has ended
                yield None
                continue
            victim = self._victim_for(waiter, stage.victim)
            if victim is not None:
                self._evict(victim, stage.notify)
            elif self._blocked is not waiter:
                break
            with self._turn:
                self._grant()
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
        if victim.free():
            with self._turn:
                victim._holder.tally.evicted += 1

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
