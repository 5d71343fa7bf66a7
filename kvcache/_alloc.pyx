"""The door of the native rooms: converts, checks, calls one function without the GIL, translates its status.

`Door` has what every call needs, `Looks` what reads and writes, `Prefixes` what is found again, `CacheCore` what
changes who holds which blocks.
"""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc

from kvcache._admit cimport admit
from kvcache._calls cimport (
    admit_up_to,
    hold_briefly,
    pool_commit_at,
    pool_fork_at,
    wait_for_holds,
)
from kvcache._door cimport new_record
from kvcache._foresight cimport growth_for, need_of, room_for, room_t, room_without
from kvcache._ids cimport Tokens, as_count, as_token, drop_ids, ids_t, is_count, read_ids
from kvcache._lock cimport kv_lock, kv_lock_is_mine, kv_lock_try
from kvcache._policy cimport read_clock
from kvcache._pool cimport committed_tokens, is_live, my_hold, place_of, refusals_t
from kvcache._reuse cimport note_ids
from kvcache._sequences cimport append, cut, pool_unlock, split

from kvcache.errors import KVCacheError, SequenceExists, UnknownSequence

cdef extern from *:
    bint unlikely(bint condition) nogil

globals()["Allocation"] = Allocation  # for Python too: a cimport gives it no name there


cdef handle_t handle_of(CacheCore cache, object request_id) except 0:
    """For native engines: the handle of a live sequence; `UnknownSequence` if there is none."""
    return cache.find(request_id).handle


cdef class Hold:
    """While it is open, nothing moves and nothing that is held is overwritten. Made by `KVCache.hold`."""

    cdef CacheCore cache
    cdef bint brief

    def __cinit__(self, CacheCore cache, bint brief=False):
        self.cache = cache
        self.brief = brief

    def __enter__(self):
        cdef status_t status
        self.cache.before_waiting()
        with nogil:
            status = hold_briefly(&self.cache.pool) if self.brief else pool_hold(&self.cache.pool)
        self.cache.answer(status, None)
        return self

    def __exit__(self, *exception):
        cdef status_t status
        if kv_lock_is_mine(&self.cache.pool.lock):  # a finalizer leaves it: done before this thread unlocks
            self.cache.pool.deferred_releases += 1
            self.cache.untold = self.cache.watchers is not None
            return
        with nogil:
            status = pool_release(&self.cache.pool)
        if status != OK:
            raise KVCacheError("this thread does not hold the cache: leave a hold in the thread that entered it")
        if self.cache.watchers is not None:
            self.cache.tell(self.cache)


cdef class CacheCore(Prefixes):
    """The bookkeeping of a cache: which sequence holds which blocks, and what it may still ask for."""

    # -- admission

    def allocate_for(self, request_id, prompt, *, max_tokens=None, max_new_tokens=None, salt=None, priority=0,
                     ttl=None):
        """Admits a sequence, or says that it does not fit now.

        Parameters
        ----------
        request_id : hashable
        prompt : int or sequence of int
            Tokens of the prompt, at least 1, or their ids (0 to 2**31 - 1): a list, or a one-dimensional array.
        max_tokens, max_new_tokens : int, optional
            The limit in total, or beyond the prompt. Blocks for the prompt are held from now on, the rest is taken
            as the sequence grows, and promised (see `overcommit`). By default the sequence may fill its last block.
        salt : hashable, optional
            Whose prefixes are looked up, and added to: a tenant, an adapter. Those of others are never found.
        priority : int
            Of what is kept of this prompt: cached blocks of a lower one leave first. 0 by default, may be negative.
        ttl : float, optional
            How long the priority holds, in units of the clock (by default calls of `allocate_for`, `free_for`, `fork`
            and `commit`); then it is 0.

        Returns
        -------
        Allocation or None
            None when it does not fit now; nothing has changed then.

        Raises
        ------
        RequestTooLarge
            It could not fit into the empty arena.
        SequenceExists
            A live sequence has this id.
        TypeError, ValueError
            Counts or ids that are none, a limit below the prompt, both limits, a salt that is not hashable.
        CacheHeld
            It would have to wait for this very thread's hold to end.
        """
        cdef ids_t ids
        cdef request_t request = counted(self.tokens_of(prompt, &ids), 0)
        cdef status_t status = BUSY
        cdef Allocation record
        request.ids = ids.data
        try:
            request.limit = self.limit_for(request.tokens, max_tokens, max_new_tokens)
            self.ask(&request, salt, priority, ttl)
            if request_id in self.ids:
                raise SequenceExists(request_id=request_id)
            record = new_record(request_id, request.tokens, request.limit)
            if kv_lock_try(&self.pool.lock):
                status = CLOSED if self.pool.closed else admit(&self.pool, &request, False, &record.handle)
                pool_unlock(&self.pool)
            if status == BUSY or status == HELD:
                self.before_waiting()
                with nogil:
                    status = pool_admit(&self.pool, &request, &record.handle)
        finally:
            drop_ids(&ids)
        record.cached_tokens = request.cached
        if unlikely(self.scorer is not None):
            self.ask_policy()
        if status == OK:
            return self.enter(record)
        return self.enter(record) if self.answer(status, request_id) else None

    def fork(self, request_id, new_id):
        """Admits a second sequence with the tokens, limit and committed prefix of a live one; either may append.

        Returns
        -------
        Allocation or None
            None when it does not fit now. In contiguous placement it needs a run of its own and K/V are copied; in
            paged placement blocks are shared until one of the two appends into the last one.

        Raises
        ------
        UnknownSequence, SequenceExists
        """
        cdef Allocation parent = self.find(request_id), record
        cdef status_t status = BUSY
        cdef handle_t child = 0
        cdef double when
        if new_id in self.ids:
            raise SequenceExists(request_id=new_id)
        record = new_record(new_id, 0, 0)
        when = self.read_clock()
        if kv_lock_try(&self.pool.lock):
            if is_live(&self.pool, parent.handle):
                status = split(&self.pool, parent.handle, False, &child)
                if status != BUSY and status != HELD:
                    read_clock(&self.pool.policy, when)
            else:
                status = STALE
            pool_unlock(&self.pool)
        if status == BUSY or status == HELD:
            self.before_waiting()
            with nogil:
                status = pool_fork_at(&self.pool, parent.handle, &child, when)
        if not self.answer(status, request_id):
            return None
        record.handle = child
        self.lock_pool()
        record.tokens = self.pool.space.hot[place_of(child)].tokens
        record.max_tokens = self.pool.space.seqs[place_of(child)].limit
        record.cached_tokens = committed_tokens(&self.pool, place_of(child))
        pool_unlock(&self.pool)
        return self.enter(record)

    def free_for(self, request_id):
        """Ends a sequence: True if it was live, False if unknown, so that a second free is safe."""
        cdef double when
        if not self.opened:
            return False
        found = self.ids.pop(request_id, None)
        if found is None:
            return False
        try:
            when = self.read_clock()
            if unlikely(self.away is not None):
                self.left(<Allocation>found, when)
            self.free_handle((<Allocation>found).handle, when)
        except BaseException:  # no memory, or a clock that fails: nothing has been given back
            self.ids.setdefault(request_id, found)
            raise
        if unlikely(self.scorer is not None):
            self.ask_policy()
        if unlikely(self.watchers is not None):
            self.tell(request_id)
        return True

    # -- for whoever grants on behalf of others: admission and growth that never wait for holds. A lack of room is not
    # counted here: whoever asks may ask again, and counts what comes of it in the end

    def _measured(self, prompt, max_tokens, max_new_tokens, salt=None, priority=0, ttl=None):
        """The prompt, its ids as they are now, its tokens and its limit; or the error that the request is."""
        cdef ids_t ids
        cdef request_t request = counted(0, 0)
        cdef int64_t tokens
        if not is_count(prompt) and type(prompt) is not Tokens:
            prompt = Tokens(prompt)
        tokens = self.tokens_of(prompt, &ids)
        drop_ids(&ids)
        self.ask_kept(&request, salt, priority, ttl)
        return prompt, tokens, self.limit_for(tokens, max_tokens, max_new_tokens)

    def _look_ahead(self, prompt, max_tokens, max_new_tokens, salt=None):
        """Tokens and limit of a request; blocks that are free, that may be promised, and that it shares with others."""
        cdef ids_t ids
        cdef request_t request = counted(self.tokens_of(prompt, &ids), 0)
        cdef room_t room
        request.ids = ids.data
        try:
            request.limit = self.limit_for(request.tokens, max_tokens, max_new_tokens)
            request.salt = self.salt_of(salt)
            self.known()
            self.lock_pool()
            room = room_for(&self.pool, &request)
            pool_unlock(&self.pool)
        finally:
            drop_ids(&ids)
        return request.tokens, request.limit, room.there, room.unclaimed, room.shared

    def _allocate_up_to(self, request_id, prompt, max_tokens, max_new_tokens, least, int64_t keep, salt=None,
                        priority=0, ttl=None):
        """Admission with the largest limit that can be promised now, at least `least` (None: the whole limit), and with
        `keep` blocks left free. None: does not fit now. False: it would have to wait for a hold of another thread.
        """
        cdef ids_t ids
        cdef request_t request = counted(self.tokens_of(prompt, &ids), 0)
        cdef int64_t floor
        cdef status_t status
        cdef bint mine = False
        cdef refusals_t refused
        cdef Allocation record
        request.ids, request.keep = ids.data, keep
        try:
            request.limit = self.limit_for(request.tokens, max_tokens, max_new_tokens)
            floor = request.limit
            if least is not None:
                floor = max(min(<int64_t>least, request.limit), request.tokens)
            self.ask(&request, salt, priority, ttl)
            if request_id in self.ids:
                raise SequenceExists(request_id=request_id)
            record = new_record(request_id, request.tokens, request.limit)
            self.lock_pool()
            with nogil:
                refused = self.pool.sight.refused
                status = admit_up_to(&self.pool, &request, floor, &record.handle)
                self.pool.sight.refused = refused
                mine = status == HELD and my_hold(&self.pool) != NULL
                pool_unlock(&self.pool)
        finally:
            drop_ids(&ids)
        if self.scorer is not None:
            self.ask_policy()
        if status == HELD and not mine:
            return False
        record.max_tokens, record.cached_tokens = request.limit, request.cached
        return self.enter(record) if self.answer(status, request_id) else None

    def _append_now(self, request_id, tokens, Allocation record=None, bint patient=False):
        """Growth, by a count or by ids; with a record, of this very sequence, and asked for before. True or False;
        None, unless `patient`, where it would have to wait for a hold of another thread.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef status_t status = BUSY
        cdef bint mine = False, counts = record is None
        cdef ids_t ids
        if record is not None and found is not record:
            raise UnknownSequence(request_id=request_id)
        ids.data, ids.own, ids.lent = NULL, NULL, False
        if is_count(tokens):
            ids.count = as_count(tokens, "tokens", 0)
        else:
            read_ids(tokens, &ids)
        try:
            if kv_lock_try(&self.pool.lock):
                status = self.append_quietly(handle, &ids, False)
                self.pool.sight.refused.past_limit += counts and status == PAST_LIMIT
                mine = status == HELD and my_hold(&self.pool) != NULL
                pool_unlock(&self.pool)
            if status == BUSY or (status == HELD and patient):
                self.before_waiting()
                with nogil:
                    kv_lock(&self.pool.lock)
                    while True:
                        status = self.append_quietly(handle, &ids, True)
                        if status != HELD or not patient or wait_for_holds(&self.pool) != OK:
                            break
                    self.pool.sight.refused.past_limit += counts and status == PAST_LIMIT
                    mine = status == HELD and my_hold(&self.pool) != NULL
                    pool_unlock(&self.pool)
        finally:
            drop_ids(&ids)
        if status == HELD and not mine:
            return None
        return self.answer(status, request_id)

    cdef status_t append_quietly(self, handle_t handle, const ids_t *ids, bint patient) noexcept nogil:
        cdef refusals_t refused = self.pool.sight.refused
        cdef int32_t who = place_of(handle)
        cdef status_t status
        self.pool.pause = 0
        if not is_live(&self.pool, handle):
            return STALE
        status = append(&self.pool, who, ids.count, patient)
        self.pool.sight.refused = refused
        if status == OK and ids.data != NULL:
            note_ids(&self.pool, who, self.pool.space.hot[who].tokens - ids.count, ids.data, ids.count)
        return status

    def _take_back(self, Allocation record not None, int64_t count):
        """Cuts the last tokens of the very sequence that was granted, as far as it has them; whether it lives."""
        cdef status_t status = STALE
        cdef int32_t who
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            if is_live(&self.pool, record.handle):
                who = place_of(record.handle)
                status = cut(&self.pool, who, max(self.pool.space.hot[who].tokens - count, <int64_t>0))
            pool_unlock(&self.pool)
        if status == STALE:
            return False
        if self.watchers is not None and status == OK:
            self.tell(record.request_id)
        return self.answer(status, record.request_id)

    def _record_of(self, request_id):
        """The record of a sequence that lives, by which it is told from a later one of its name."""
        return self.find(request_id)

    def _growth_of(self, Allocation record not None, int64_t more):
        """Of the very sequence that was granted: its tokens, its limit; blocks that so many more tokens take, the copy
        of a shared one included; how many there is room for; blocks that are free, and that may be promised.
        """
        cdef int who = self.live(record)
        cdef int64_t tokens = self.pool.space.hot[who].tokens, limit = self.pool.space.seqs[who].limit
        cdef int64_t blocks = need_of(&self.pool, who, more)
        cdef int64_t most = min(growth_for(&self.pool, who), limit - tokens)
        cdef room_t room = room_for(&self.pool, NULL)
        pool_unlock(&self.pool)
        return tokens, limit, blocks, most, room.there, room.unclaimed

    def _room_without(self, list records not None, prompt=1, salt=None):
        """Blocks that would be free, that might be promised, and that the prompt would share with others, if these
        sequences had ended; and for each the blocks and the claims that it has a part in: of what would come free, a
        block that several of them share is a part of each, and one that the prompt needs of none.
        """
        cdef ids_t ids
        cdef request_t request = counted(self.tokens_of(prompt, &ids), 0)
        cdef int64_t count = len(records), index
        cdef int64_t *parts = <int64_t *>malloc(max(count, <int64_t>1) * 2 * sizeof(int64_t))
        cdef handle_t *handles = <handle_t *>malloc(max(count, <int64_t>1) * sizeof(handle_t))
        cdef room_t room
        request.ids = ids.data
        try:
            if parts == NULL or handles == NULL:
                raise MemoryError(f"no memory to look at {count} sequences")
            request.salt = self.salt_of(salt)
            for index in range(count):
                handles[index] = (<Allocation?>records[index]).handle
            self.lock_pool()
            room = room_without(&self.pool, handles, count, &request, parts, &parts[count])
            pool_unlock(&self.pool)
            blocks = [parts[index] for index in range(count)]
            claims = [parts[index] for index in range(count, 2 * count)]
            return room.there, room.unclaimed, room.shared, blocks, claims
        finally:
            drop_ids(&ids)
            free(parts)
            free(handles)

    def _is_live(self, Allocation record not None):
        """Whether the very sequence that was granted lives, not another one of its name."""
        self.lock_pool()
        cdef bint live = is_live(&self.pool, record.handle)
        pool_unlock(&self.pool)
        return live

    def _end(self, Allocation record not None):
        """`free_for` of the very sequence that was granted."""
        if not self.knows(record):
            return False
        return self.free_for(record.request_id)

    # -- growth

    def append_token(self, request_id, token=None):
        """Room for one more token: True, or False when the sequence may not grow (its limit) or cannot now.

        `token` is its id, 0 to 2**31 - 1.
        """
        cdef Allocation found = self.find(request_id)
        cdef status_t status = BUSY
        cdef int32_t named = 0 if token is None else as_token(token, 0)
        cdef const int32_t *ids = NULL if token is None else &named
        if kv_lock_try(&self.pool.lock):
            if is_live(&self.pool, found.handle):
                status = append(&self.pool, place_of(found.handle), 1, False)
                if status == OK and ids != NULL:
                    note_ids(&self.pool, place_of(found.handle),
                             self.pool.space.hot[place_of(found.handle)].tokens - 1, ids, 1)
            else:
                status = STALE
            pool_unlock(&self.pool)
        if status == OK:
            return True
        if status == BUSY or status == HELD:
            return self.append_patiently(found, 1, ids)
        return self.answer(status, request_id)

    cdef bint append_patiently(self, Allocation found, int64_t count, const int32_t *ids) except -1:
        cdef status_t status
        cdef handle_t handle = found.handle
        self.before_waiting()
        with nogil:
            status = pool_append_ids(&self.pool, handle, count, ids)
        return self.answer(status, found.request_id)

    def append_tokens(self, request_id, tokens):
        """Room for several tokens, all or none: `tokens` is a count or token ids. No tokens at all: True."""
        cdef Allocation found = self.find(request_id)
        cdef ids_t ids
        if is_count(tokens):
            return self.append_patiently(found, as_count(tokens, "tokens", 0), NULL)
        read_ids(tokens, &ids)
        try:
            return self.append_patiently(found, ids.count, ids.data)
        finally:
            drop_ids(&ids)

    def truncate(self, request_id, num_tokens):
        """Keeps the first `num_tokens` tokens (0 allowed), gives back the blocks beyond.

        Returns
        -------
        bool
            False, nothing changed, when others hold a block that would be let go or cut, and the new claim does not
            fit.

        Raises
        ------
        ValueError
            `num_tokens` is negative or more than there are.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t tokens = as_count(num_tokens, "num_tokens", 0)
        cdef status_t status
        self.before_waiting()
        with nogil:
            status = pool_truncate(&self.pool, handle, tokens)
        if status == GONE:
            raise ValueError(f"cannot keep {num_tokens} tokens, the sequence has {self.used_tokens(request_id)}")
        if self.watchers is not None and status == OK:
            self.tell(request_id)
        return self.answer(status, request_id)

    def set_limit(self, request_id, max_tokens):
        """Changes a sequence's limit, up or down: False when what it may then claim does not fit.

        Raises
        ------
        ValueError
            Below the used tokens.
        RequestTooLarge
            More than the arena.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t limit = as_count(max_tokens, "max_tokens", 0)
        cdef status_t status
        self.require_fitting("max_tokens", max_tokens, limit)
        self.before_waiting()
        with nogil:
            status = pool_set_limit(&self.pool, handle, limit)
        if status == BELOW_USED:
            raise ValueError(f"max_tokens is {max_tokens}, the sequence has {self.used_tokens(request_id)} tokens")
        if self.watchers is not None and status == OK:
            self.tell(request_id)
        return self.answer(status, request_id)

    def commit(self, request_id, num_tokens=None):
        """Says that K/V of the first `num_tokens` tokens (by default all) are in place, however they came there.

        Raises
        ------
        ValueError
            Beyond the used tokens.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t tokens = -1 if num_tokens is None else as_count(num_tokens, "num_tokens", 0)  # -1: all
        cdef double when = self.read_clock()
        cdef status_t status
        self.before_waiting()
        with nogil:
            status = pool_commit_at(&self.pool, handle, tokens, when)
        if self.scorer is not None:
            self.ask_policy()
        if status == BELOW_USED:
            raise ValueError(f"cannot commit {num_tokens} tokens, the sequence has {self.used_tokens(request_id)}")
        self.answer(status, request_id)

    # -- the cache as a whole

    def compact(self, budget_tokens=None):
        """Moves runs together, before a large prompt or when there is nothing else to do.

        Parameters
        ----------
        budget_tokens : int, optional
            Used tokens that may be moved: scattered sequences become one run first, then gaps come together where that
            makes the longest free run longest. By default everything is packed: one free run, at the end.

        Returns
        -------
        int
            Used tokens moved. 0 in paged placement, where nothing moves.

        Raises
        ------
        CacheHeld
            It would have to wait for this very thread's hold to end.
        """
        cdef int64_t most = -1 if budget_tokens is None else as_count(budget_tokens, "budget_tokens", 0)
        cdef int64_t moved = 0
        cdef status_t status
        self.known()
        self.before_waiting()
        with nogil:
            status = pool_compact(&self.pool, most, &moved)
        self.answer(status, None)
        return moved

    def hold(self):
        """A context manager: inside, nothing moves and nothing that is held is overwritten.

        Holds are shared and nest; enter and leave in one thread. What is freed inside is reused only after the last
        hold ends. A call that has to move or reuse such blocks waits for that, or raises `CacheHeld` in a thread
        that holds.
        """
        self.known()
        return Hold(self)

    def _hold_briefly(self):
        """A hold for as long as bytes are copied: it waits for nobody who waits for another hold."""
        return Hold(self, True)

    def close(self):
        """Ends every sequence and lets the arena go. `free_for` then returns False, a second `close` does nothing, and
        everything else raises `CacheClosed`. Waits for holds of other threads.
        """
        cdef status_t status
        if not self.opened:
            return
        self.before_waiting()
        with nogil:
            status = pool_close(&self.pool)
        self.answer(status, None)
        self.ids.clear()  # emptied, not replaced: without a GIL others may be reading it
        if self.watchers is not None:
            self.tell(self)
