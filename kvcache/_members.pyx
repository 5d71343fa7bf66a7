"""The members of a batch, and the arrays that say where they and their new tokens are.

The arrays belong to the batch and stay the same objects while membership and order stand. They are brought up to
date when they are read: the pool counts its changes, and a batch that has not seen the last one looks again.

A batch is in one call at a time: a thread that comes meanwhile waits, since arrays are exchanged outside the lock.
"""

import numpy as np

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memmove, memset

from kvcache._alloc cimport Allocation, CacheCore
from kvcache._calls cimport wait_for_holds
from kvcache._ids cimport as_count
from kvcache._lock cimport (
    kv_lock,
    kv_lock_is_mine,
    kv_lock_wait,
    kv_lock_wake,
    kv_thread,
    kv_turn_give,
    kv_turn_is_idle,
    kv_turn_take,
    kv_turn_wants,
)
from kvcache._pool cimport HELD, OK, STALE, copy_table, is_live, my_hold, place_of, pool_t, slot_of, status_t
from kvcache._sequences cimport pool_unlock
from kvcache._space cimport held, hot_t

from kvcache.errors import CacheClosed, KVCacheError, SequenceExists, UnknownSequence

cdef enum:
    DEAD = 0xFFFFFFFF      # the version of a member that has been seen to be freed


cdef void *data_of(object array) except? NULL:
    """Where the bytes of a contiguous array begin; the caller keeps it alive."""
    cdef Py_buffer view
    PyObject_GetBuffer(array, &view, PyBUF_SIMPLE)
    cdef void *data = view.buf
    PyBuffer_Release(&view)
    return data


cdef void keep_ints(int32_t *into, const int32_t *before, int64_t kept, int64_t removed) noexcept nogil:
    """The first `kept` entries, after one of them was taken out (-1: none was)."""
    cdef int64_t head = kept if removed < 0 else removed
    if kept:  # else there may be no entries to point at
        memcpy(into, before, head * sizeof(int32_t))
        memcpy(&into[head], &before[head + 1], (kept - head) * sizeof(int32_t))


cdef class Members:
    """Members(cache, request_ids=())\n--\n

    What `BatchCore` is made of first: who is in it, and where they are.
    """

    def __init__(self, CacheCore cache not None, request_ids=()):
        if self.made or not kv_turn_take(&self.turn):
            raise KVCacheError("a batch is made once: __init__ has been called before")
        try:
            self.make(cache, request_ids)
        finally:
            self.end()

    cdef int make(self, CacheCore cache, object request_ids) except -1:
        cache.known()
        self.cache = cache
        self.ids = []
        self.known = {}
        self.size = 0
        for request_id in request_ids:
            self.join(self.newcomer(request_id))
        self.install(self.new_arrays(self.size), 0, -1)
        self.made = True
        return 0

    def __dealloc__(self):
        free(self.handles)
        free(self.versions)
        free(self.firsts)
        free(self.touched)

    # -- one call at a time

    cdef int begin(self) except -1:
        """Waits for the call of another thread; whoever begins ends."""
        cdef status_t status
        if not self.made:
            raise KVCacheError("DecodeBatch.__init__ has not been called")
        if not kv_turn_take(&self.turn):
            if self.turn.thread == kv_thread():
                raise KVCacheError("the batch is in a call of this very thread: the __eq__ or __hash__ of an id, "
                                   "or a finalizer, cannot use it")
            self.cache.before_waiting()
            with nogil:
                status = self.wait_for_turn()
            self.cache.answer(status, None)
        if self.cache.pool.closed:
            self.end()
            raise CacheClosed()
        return 0

    cdef void end(self) noexcept:
        if not kv_turn_give(&self.turn):
            return
        if kv_lock_is_mine(&self.cache.pool.lock):
            kv_lock_wake(&self.cache.pool.lock)
            return
        with nogil:
            kv_lock(&self.cache.pool.lock)
            kv_lock_wake(&self.cache.pool.lock)
            pool_unlock(&self.cache.pool)

    cdef status_t wait_for_turn(self) noexcept nogil:
        """HELD: the call that has the turn waits for this thread's hold to end."""
        cdef pool_t *pool = &self.cache.pool
        cdef status_t status = OK
        kv_lock(&pool.lock)
        kv_turn_wants(&self.turn, 1)
        while not kv_turn_take(&self.turn):
            if self.waits and my_hold(pool) != NULL:
                status = HELD
                break
            kv_lock_wait(&pool.lock)
        kv_turn_wants(&self.turn, -1)
        pool_unlock(pool)
        return status

    cdef status_t wait_outside(self) noexcept nogil:
        """Waits for holds to end, and lets whoever holds know that this call does."""
        cdef status_t status
        self.waits = True
        kv_lock_wake(&self.cache.pool.lock)
        status = wait_for_holds(&self.cache.pool)
        self.waits = False
        return status

    # -- membership

    cdef Allocation newcomer(self, object request_id):
        cdef Allocation record = self.cache.find(request_id)
        if request_id in self.known:
            raise SequenceExists(request_id=request_id)
        return record

    cdef int join(self, Allocation record) except -1:
        """Appends a member; the arrays are made anew by whoever calls."""
        self.reserve(self.size + 1)
        self.ids.append(record.request_id)
        try:
            self.known[record.request_id] = record
        except BaseException:
            self.ids.pop()
            raise
        self.handles[self.size] = record.handle
        self.size += 1
        return 0

    cdef int reserve(self, int64_t members) except -1:
        cdef int64_t capacity = max(members, 2 * self.capacity)
        if members <= self.capacity:
            return 0
        handles = realloc(self.handles, capacity * sizeof(handle_t))
        if handles != NULL:
            self.handles = <handle_t *>handles
        versions = realloc(self.versions, capacity * sizeof(uint32_t))
        if versions != NULL:
            self.versions = <uint32_t *>versions
        firsts = realloc(self.firsts, (capacity + 1) * sizeof(int64_t))
        if firsts != NULL:
            self.firsts = <int64_t *>firsts
        touched = realloc(self.touched, capacity * sizeof(int32_t))
        if touched != NULL:
            self.touched = <int32_t *>touched
        if handles == NULL or versions == NULL or firsts == NULL or touched == NULL:
            raise MemoryError(f"no memory for a batch of {members} members")
        self.capacity = capacity
        return 0

    def add(self, request_id):
        """Appends a live sequence at the end. Ends the step.

        Raises
        ------
        UnknownSequence, SequenceExists
            It does not live, or is a member already.
        """
        self.begin()
        try:
            self.cache.before_waiting()
            record = self.newcomer(request_id)
            arrays = self.new_arrays(self.size + 1)
            self.join(record)
            self.install(arrays, self.size - 1, -1)
        finally:
            self.end()

    def remove(self, request_id):
        """Takes a member out, also one that has been freed; the others keep their order. Ends the step.

        Raises
        ------
        UnknownSequence
            It is no member.
        """
        self.begin()
        try:
            self.cache.before_waiting()
            if request_id not in self.known:
                raise UnknownSequence(request_id=request_id)
            arrays = self.new_arrays(self.size - 1)
            self.drop(self.known.pop(request_id), arrays)
        finally:
            self.end()

    cdef int drop(self, Allocation record, object arrays) except -1:
        cdef int64_t index = 0
        while index < self.size and self.handles[index] != record.handle:
            index += 1
        if index == self.size:  # it has come back from where it was suspended, with another handle
            index = [each is record.request_id for each in self.ids].index(True)
        del self.ids[index]
        self.size -= 1
        memmove(&self.handles[index], &self.handles[index + 1], (self.size - index) * sizeof(handle_t))
        memmove(&self.versions[index], &self.versions[index + 1], (self.size - index) * sizeof(uint32_t))
        self.install(arrays, self.size, index)
        return 0

    def reorder(self, indices):
        """Keeps the members at `indices`, in that order. Ends the step.

        Raises
        ------
        IndexError, ValueError
            An index is out of range, or comes twice.
        """
        items = indices.tolist() if hasattr(indices, "tolist") else indices
        chosen = [as_count(item, "index", 0) for item in items]
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"an index comes twice in {chosen}")
        self.begin()
        try:
            self.cache.before_waiting()
            self.arrange(chosen)
        finally:
            self.end()

    cdef int arrange(self, list chosen) except -1:
        cdef int64_t index, position
        for index in chosen:
            if index >= self.size:
                raise IndexError(f"index {index} of {self.size} members")
        arrays = self.new_arrays(len(chosen))
        handles = [self.handles[index] for index in chosen]
        ids = [self.ids[index] for index in chosen]
        self.known = {request_id: self.known[request_id] for request_id in ids}
        self.ids = ids
        self.size = len(chosen)
        for position in range(self.size):
            self.handles[position] = handles[position]
        self.install(arrays, 0, -1)
        return 0

    def __len__(self):
        return self.size

    def __bool__(self):
        return True

    def __contains__(self, request_id):
        self.begin()
        try:
            return request_id in self.known
        finally:
            self.end()

    def __iter__(self):
        self.begin()
        try:
            return iter(list(self.ids))
        finally:
            self.end()

    cdef object new_arrays(self, int64_t size):
        """splits, lengths, starts, slots and positions for so many members."""
        return (np.zeros(size + 1, np.int32), np.empty(size, np.int32), np.empty(size, np.int32),
                np.empty(size, np.int32), np.empty(size, np.int32))

    cdef int install(self, object arrays, int64_t kept, int64_t removed) except -1:
        """With no step: of the first `kept` members it is known where they were, one was at `removed`."""
        cdef int32_t *lengths = self.length
        cdef int32_t *starts = self.start
        cdef int64_t index
        _alive = self.lengths_array, self.starts_array  # until they have been read
        self.splits_array, self.lengths_array, self.starts_array, self.own_slots, self.own_positions = arrays
        self.slots_array, self.positions_array = self.own_slots, self.own_positions
        self.split = ints_of(self.splits_array)
        self.length = ints_of(self.lengths_array)
        self.start = ints_of(self.starts_array)
        self.own_slot = self.slot = ints_of(self.own_slots)
        self.own_position = self.position = ints_of(self.own_positions)
        self.entries, self.uniform = self.size, True
        self.end_step()
        self.number += 1
        self.cache.lock_pool()
        keep_ints(self.length, lengths, kept, removed)
        keep_ints(self.start, starts, kept, removed)
        for index in range(kept, self.size):
            self.look(index)
        if kept == 0:
            self.seen, self.seen_moves = self.cache.pool.changes, self.cache.pool.moves
        pool_unlock(&self.cache.pool)
        return 0

    cdef void end_step(self) noexcept nogil:
        memset(self.slot, 0xFF, self.entries * sizeof(int32_t))  # -1
        memset(self.position, 0xFF, self.entries * sizeof(int32_t))
        memset(self.split, 0, (self.size + 1) * sizeof(int32_t))
        self.stepped = self.whole = False
        self.granted = 0

    cdef inline int64_t first_of(self, int64_t index) noexcept nogil:
        return index if self.uniform else self.firsts[index]

    cdef int64_t dead_member(self) noexcept nogil:
        cdef const hot_t *hots = self.cache.pool.space.hot
        cdef int64_t index
        for index in range(self.size):  # every one of them has lived
            if hots[<uint32_t>self.handles[index]].generation != <uint32_t>(self.handles[index] >> 32):
                return index
        return -1

    cdef int answer(self, status_t status) except -1:
        """Whatever a call of the whole batch met that is an error."""
        cdef int64_t index = -1
        if status == STALE:
            self.cache.lock_pool()
            index = self.dead_member()
            pool_unlock(&self.cache.pool)
        if index >= 0 and not self.cache.pool.closed and not self.cache.is_away_now(self.ids[index]):
            raise UnknownSequence(request_id=self.ids[index])  # freed, or come back: its id may live
        self.cache.answer(status, self.ids[index] if index >= 0 else None)
        return 0

    # -- keeping the arrays true

    cdef void look(self, int64_t index) noexcept nogil:
        """Brings one member's entries up to date."""
        cdef pool_t *pool = &self.cache.pool
        cdef int32_t who = place_of(self.handles[index])
        cdef bint live = is_live(pool, self.handles[index])
        cdef int32_t tokens = pool.space.hot[who].tokens if live else 0
        cdef int64_t entry, end = self.first_of(index + 1)
        self.length[index] = tokens
        self.start[index] = -1
        if tokens and pool.space.seqs[who].breaks == 0:
            self.start[index] = <int32_t>slot_of(pool, who, 0)
        if live:
            self.versions[index] = pool.space.seqs[who].version
        for entry in range(self.first_of(index), end):
            self.slot[entry] = -1
            if 0 <= self.position[entry] < tokens:
                self.slot[entry] = <int32_t>slot_of(pool, who, self.position[entry])

    cdef void refresh(self) noexcept nogil:
        """After other calls: whoever has moved, grown, been cut or freed makes a new generation."""
        cdef pool_t *pool = &self.cache.pool
        cdef int64_t index
        cdef int32_t who
        cdef bint changed = False
        if self.seen == pool.changes:
            return
        self.seen = pool.changes
        for index in range(self.size):
            who = place_of(self.handles[index])
            if is_live(pool, self.handles[index]):
                if (pool.space.hot[who].tokens == self.length[index]
                        and pool.space.seqs[who].version == self.versions[index]):
                    continue
            elif self.length[index] == 0 and self.start[index] == -1 and self.versions[index] == DEAD:
                continue
            self.look(index)
            if not is_live(pool, self.handles[index]):
                self.versions[index] = DEAD
            changed = True
        self.number += changed
        if changed and self.stepped:
            self.split_again()

    cdef void split_again(self) noexcept nogil:
        """Tokens of the step may have been cut off since."""
        cdef int64_t index, entry
        cdef int32_t there = 0
        for index in range(self.size):
            for entry in range(self.first_of(index), self.first_of(index + 1)):
                there += self.slot[entry] >= 0
            self.split[index + 1] = there
        self.whole = self.whole and there == self.size

    cdef object now(self, what_t what):
        """One of the arrays, or the generation, up to date."""
        if self.made and self.seen == self.cache.pool.changes and kv_turn_is_idle(&self.turn):
            return self.read(what)
        self.begin()
        try:
            self.catch_up()
            return self.read(what)
        finally:
            self.end()

    cdef object read(self, what_t what):
        if what == SLOTS:
            return self.slots_array
        if what == POSITIONS:
            return self.positions_array
        if what == SPLITS:
            return self.splits_array
        if what == LENGTHS:
            return self.lengths_array
        return self.starts_array if what == STARTS else self.number

    cdef int catch_up(self) except -1:
        if self.seen != self.cache.pool.changes:
            self.cache.lock_pool()
            self.refresh()
            pool_unlock(&self.cache.pool)
        return 0

    @property
    def slots(self):
        """Arena token index of each token asked for, int32, flat; -1 for a refused member's and outside a step."""
        return self.now(SLOTS)

    @property
    def positions(self):
        """Position in its sequence of each token asked for, int32, flat: what RoPE wants; -1 as `slots`."""
        return self.now(POSITIONS)

    @property
    def splits(self):
        """int32, one more than members: member i's new tokens are ``splits[i]:splits[i + 1]`` of those granted."""
        return self.now(SPLITS)

    @property
    def lengths(self):
        """Tokens of each member, int32, after the append."""
        return self.now(LENGTHS)

    @property
    def starts(self):
        """Arena token index of each member's first token, int32; -1 for a scattered or empty sequence."""
        return self.now(STARTS)

    @property
    def generation(self):
        """Differs as soon as any call has moved, grown, cut or freed a member."""
        return self.now(GENERATION)

    def _granted(self):
        """The generation, and slots and positions of the tokens granted in it: new arrays, from one state."""
        self.begin()
        try:
            self.catch_up()
            granted = self.slots_array >= 0
            return self.number, self.slots_array[granted], self.positions_array[granted]
        finally:
            self.end()

    @property
    def block_tables(self):
        """Block ids of each member, int32, a new array as wide as the longest, padded with -1."""
        self.begin()
        try:
            return self.tables()
        finally:
            self.end()

    cdef object tables(self):
        cdef pool_t *pool = &self.cache.pool
        cdef int32_t[:, ::1] rows
        cdef int64_t widest = 0, width = -1, index
        cdef int32_t who
        table = None
        while width != widest:  # a member may grow while the array is made
            width = widest
            table = np.full((self.size, width), -1, np.int32)
            rows = table
            self.cache.lock_pool()
            widest = 0
            for index in range(self.size):
                if is_live(pool, self.handles[index]):
                    widest = max(widest, held(&pool.space.seqs[place_of(self.handles[index])]))
            for index in range(self.size if widest == width else 0):
                who = place_of(self.handles[index])
                if width and is_live(pool, self.handles[index]):
                    copy_table(pool, who, held(&pool.space.seqs[who]), &rows[index, 0])
            pool_unlock(pool)
        return table
