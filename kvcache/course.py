"""The course of one request: at once, in the queue, through the strategies, and out of it again."""

from functools import partial

from kvcache.desk import Desk
from kvcache.errors import CacheHeld, Suspended, UnknownSequence
from kvcache.strategies import INTACT, LEAVING, SUSPENDED, MakeRoom, Reduce, Strategy, Swap, Wait
from kvcache.suspension import FREED
from kvcache.waiter import Grower, Newcomer


def stages_of(strategy, cache):
    """The single strategies, in order."""
    if not isinstance(strategy, Strategy):
        known = "Reject(), Reduce(...), Wait(...), Evict(...) or Swap(...)"
        raise TypeError(f"a strategy is {known}, not {strategy!r}")
    if cache.backend == "none" and any(isinstance(each, Swap) for each in strategy.stages):
        raise ValueError("backend='none' has no storage to swap out: Swap needs a cache that has")
    return strategy.stages


class Courses(Desk):
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

    # ---- room at the cost of others

    def _make_room(self, waiter, stage):
        """Takes one victim after the other until the request has been granted, or nobody is left to take."""
        self._require_no_hold()
        with self._turn:
            if not waiter.done:
                self._waiters.lead(waiter)
                self._grant()
        while not waiter.done:
            if waiter in self._blocked:  # enough has been freed, and will be there when a hold has ended
                yield None
                continue
            victim = self._victim_for(waiter, stage.victim)
            if victim is not None:
                if not (yield from self._take_out(waiter, victim, stage)):
                    break
            elif waiter not in self._blocked:
                break
            with self._turn:
                self._grant()
        with self._turn:
            if not waiter.done and waiter.line is not None:
                self._waiters.follow(waiter)
                self._grant()

    def _take_out(self, waiter, victim, stage):
        """Whether it is of use to go on."""
        if not isinstance(stage, Swap):
            self._evict(victim, stage.notify)
            return True
        transfer = self._swap(victim, stage)
        if transfer is None:
            return True
        transfer.add_done_callback(lambda _: waiter.sleeper.wake())
        while not (transfer.done() or waiter.done):
            yield None
        return waiter.done or transfer.reason in (None, FREED)

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

    def _swap(self, victim, stage):
        """The `Transfer` of the victim to the store; None where it has been freed, or suspended, by others since."""
        tell = victim.on_swap or stage.notify
        try:
            if tell is not None:
                tell(victim.request_id, LEAVING)
            transfer = self._cache._carries().suspend(victim.request_id, stage.store, victim.allocation)
        except (UnknownSequence, Suspended):
            victim._leaving = False
            return None
        except BaseException:
            victim._leaving = False
            raise
        transfer.add_done_callback(partial(self._note_swap, victim, tell))
        return transfer

    def _note_swap(self, victim, tell, transfer):
        """Called when the transfer has ended, by the thread that carries."""
        victim._leaving = False
        with self._turn:
            tally = victim._holder.tally
            tally.swapped += transfer.ok
            tally.swaps_failed += not (transfer.ok or transfer.reason == FREED)
        if tell is not None and transfer.reason != FREED:
            tell(victim.request_id, SUSPENDED if transfer.ok else INTACT)

    def _victim_for(self, waiter, choice):
        """The lease to take, marked as such; None where none may be taken, or all of them would not be enough."""
        with self._turn:
            self._settle_accounts(list(self._live))
            if waiter.done or waiter in self._blocked:
                return None
            leases = [each for each in self._live.values() if self._may_leave(each, waiter)]
            if choice == "priority":
                leases = [each for each in leases if each.priority < waiter.priority]
                leases.sort(key=lambda lease: lease.priority)
            leases = self._of_use(waiter, leases)
            if not leases:
                return None
            if not callable(choice):
                leases[0]._leaving = True
                return leases[0]
        return self._chosen(choice, {each.request_id: each for each in leases})

    def _may_leave(self, lease, waiter):
        """What is suspended has no memory to give."""
        return not (
            lease._leaving or lease.request_id == waiter.request_id or self._cache._is_away(lease.allocation)
        )

    def _of_use(self, waiter, leases):
        """Of these, those whose end would help; nobody where all of them together would not be enough.

        Where the tenant's own limit is in the way, that is the tenant's own, until that is no longer so.
        """
        waiter.look(self)
        free, unclaimed = self._cache._room()
        records = [each.allocation for each in leases]
        more_free, more_unclaimed, shared, blocks, claims = waiter.look_past(self, records)
        own = [each for each in leases if each._holder is waiter.tenant]
        lost = waiter.shared - shared  # of its prompt: held by nobody else
        first = waiter.first + waiter.kept_free(self)
        if (
            first + lost > more_free
            or waiter.total + lost > more_unclaimed
            or waiter.total > waiter.room_without(own)
        ):
            return []
        if waiter.total > waiter.room:
            return own
        short, promised = first > free, waiter.total > unclaimed
        return [
            lease
            for lease, there, claimed in zip(leases, blocks, claims, strict=True)
            if (short and there) or (promised and there + claimed)
        ]

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
