"""The course of one request: at once, in the queue, through the strategies, and out of it again."""

from contextlib import suppress

from kvcache.errors import KVCacheError
from kvcache.strategies import MakeRoom, Reduce, Strategy, Swap, Wait
from kvcache.victims import Victims
from kvcache.waiter import Grower, Newcomer


def stages_of(strategy, cache):
    """The single strategies, in order."""
    if not isinstance(strategy, Strategy):
        known = "Reject(), Reduce(...), Wait(...), Evict(...) or Swap(...)"
        raise TypeError(f"a strategy is {known}, not {strategy!r}")
    if cache.backend == "none" and any(isinstance(each, Swap) for each in strategy.stages):
        raise ValueError("backend='none' has no storage to swap out: Swap needs a cache that has")
    return strategy.stages


class Courses(Victims):
    """What becomes of each request. Nothing here is called under the lock."""

    def _at_once(self, request_id, prompt, max_tokens, max_new_tokens, tenant, kept, owner):
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
                prompt, _, limit = self._cache._measured(prompt, max_tokens, max_new_tokens)
                if -(-limit // self._size) > account.room:
                    self._drop_if_idle(account)
                    return None
            allocation = self._cache._allocate_up_to(
                request_id, prompt, max_tokens, max_new_tokens, None, self._keep, *kept
            )
            if allocation:
                return self._enter(allocation, account, owner)
            self._drop_if_idle(account)
            return None
        except BaseException:
            self._drop_if_idle(account)
            raise
        finally:
            self._release()

    def _newcomer(self, request_id, prompt, max_tokens, max_new_tokens, sleeper, kept, owner):
        hash(request_id)
        prompt, *sizes = self._cache._measured(prompt, max_tokens, max_new_tokens, *kept)
        return Newcomer(request_id, sleeper, prompt, sizes, kept, owner)

    def _grower(self, request_id, tokens, sleeper):
        lease = self._live.get(request_id)
        priority = 0 if lease is None else lease.priority
        return Grower(request_id, sleeper, self._cache, tokens, priority)

    def _serve(self, waiter, tenant, stages):
        """Goes through the strategies. Yields for how long it wants to sleep (None: until woken)."""
        self._submit(waiter, tenant, stages)
        reason = waiter.reason
        for stage in stages:
            if waiter.done:
                break
            if isinstance(stage, Reduce):
                self._reduce(waiter, stage)
            elif isinstance(stage, MakeRoom):
                yield from self._make_room(waiter, stage)
            elif isinstance(stage, Wait):
                yield from self._wait(waiter, stage.timeout)
                reason = "timeout"
        while not waiter.done and waiter in self._blocked:  # nothing but a hold is in the way
            self._require_no_hold()
            yield None
        return self._answer(waiter, reason)

    def _past_limit(self, waiter):
        """The refusal of growth that no wait could help."""
        return waiter.refusal(self, "never_fits", 0.0)

    def _grow(self, waiter, stages):
        """As `_serve`, for a live sequence."""
        answer = yield from self._serve(waiter, None, stages)
        if answer:
            self.touch((waiter.request_id,))
        return answer

    def _bring_back(self, waiter, stages):
        """As `_serve`, for one that is suspended: it may still be on its way out, and in the end it is here."""
        yield from self._until_done(waiter, self._cache._transfer_of(waiter.request_id))
        answer = yield from self._serve(waiter, None, stages)
        if answer:
            yield from self._until_done(waiter, answer)
            self.touch((waiter.request_id,))
        return answer

    def _until_done(self, waiter, transfer):
        if transfer is None or transfer.done():
            return
        transfer.add_done_callback(lambda _: waiter.sleeper.wake())
        while not transfer.done():
            yield None

    def _wait(self, waiter, timeout):
        if timeout is not None:
            waiter.deadline = self._clock() + timeout
        warning = None if self._warn_after is None else waiter.since + self._warn_after
        while not waiter.done:
            now = self._clock()
            if waiter.deadline is not None and now >= waiter.deadline:
                break
            if warning is not None and now > warning:
                warning = self._warn()
            self._require_no_hold()
            next_look = min([each for each in (waiter.deadline, warning) if each is not None], default=None)
            yield None if self._virtual or next_look is None else next_look - now
        waiter.deadline = None

    def _warn(self):
        """Has the oldest ones' age logged, while they are here."""
        with suppress(KVCacheError):  # the cache has been closed: the wait is over anyway
            self._cache.check_health()

    def _reduce(self, waiter, stage):
        if not waiter.is_new:
            return
        with self._turn:
            if not waiter.done:
                waiter.be_content(waiter.floor_of(stage.min_tokens), self._size)
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
                    waiter.losses(waiter.tally)[refusal.reason] += 1
                return refusal
        if waiter.error is not None:
            raise waiter.error
        return waiter.lease

    def _drive(self, waiter, course):
        try:
            while True:
                waiter.sleeper.sleep(next(course))
        except StopIteration as end:
            return end.value
        except BaseException as error:
            self._give_back(waiter, error if isinstance(error, Exception) else None)
            raise

    async def _drive_async(self, waiter, course):
        try:
            while True:
                try:
                    seconds = next(course)
                except StopIteration as end:
                    return end.value
                await waiter.sleeper.sleep(seconds)
        except BaseException as error:
            self._give_back(waiter, error if isinstance(error, Exception) else None)
            raise
