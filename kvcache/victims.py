"""Room at the cost of others: victims are chosen, told, and ended or suspended, one after the other."""

from contextlib import suppress
from functools import partial

from kvcache.desk import Desk
from kvcache.errors import CacheHeld, KVCacheError, Suspended, UnknownSequence
from kvcache.strategies import INTACT, LEAVING, SUSPENDED, Swap
from kvcache.suspension import FREED


class Victims(Desk):
    """Nothing here is called under the lock, but for what `_victim_for` calls."""

    def _require_no_hold(self):
        """What is freed comes back only when all holds have ended, this thread's too."""
        holds = self._cache._holds_open()
        if holds:
            raise CacheHeld(holds=holds)

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
            victim = self._victim_for(waiter, stage)
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
        transfer = self._swap(waiter, victim, stage)
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

    def _swap(self, waiter, victim, stage):
        """The `Transfer` of the victim to the store, or of its owner's own; None where there is none (any more)."""
        tell = victim.on_swap or stage.notify
        leaves = False
        try:
            if tell is not None:
                tell(victim.request_id, LEAVING)
                if waiter.done:  # granted or given up meanwhile: nothing is needed
                    tell(victim.request_id, INTACT)
                    return None
            try:
                transfer = self._cache._carries().suspend(victim.request_id, stage.store, victim.allocation)
                leaves = True
            except UnknownSequence:  # freed by its owner since
                return None
            except Suspended:  # by its owner
                return self._cache._transfer_of(victim.request_id)
        finally:
            victim._leaving = leaves
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

    def _victim_for(self, waiter, stage):
        """The lease to take, marked as such; None where none may be taken, or all of them would not be enough."""
        choice = stage.victim
        with self._turn:
            self._settle_accounts(list(self._live))
            self._note_growth()
            if waiter.done or waiter in self._blocked:
                return None
            leases = [each for each in self._live.values() if self._may_leave(each, waiter)]
            if choice == "priority":
                leases = [each for each in leases if each.priority < waiter.priority]
                leases.sort(key=lambda lease: lease.priority)
            if isinstance(stage, Swap) and waiter.total > waiter.room:
                return None  # what is suspended is its tenant's still
            leases = self._of_use(waiter, leases)
            if not leases:
                return None
            if not callable(choice):
                leases[0]._leaving = True
                return leases[0]
        return self._chosen(choice, {each.request_id: each for each in leases})

    def _note_growth(self):
        """Who has grown since the last look, by whatever call, is taken last."""
        for request_id, lease in list(self._live.items()):
            with suppress(KVCacheError):  # freed since
                tokens = self._cache.used_tokens(request_id)
                if tokens != lease._tokens:
                    lease._tokens = tokens
                    self._live.move_to_end(request_id)

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
