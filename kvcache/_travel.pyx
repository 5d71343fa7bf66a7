"""Sequences whose K/V leave the arena and come back, and prefixes that are saved and loaded.

A sequence on its way has a handle that nobody else knows: whoever has the old one (its id, a batch, a native engine)
finds that it does not live, while its blocks move about as they always do. Its id stays known.
"""

import cython
import logging

import numpy as np

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint32_t
from libc.string cimport memcpy

from kvcache._admit cimport admit
from kvcache._alloc cimport CacheCore
from kvcache._calls cimport counted, wait_for_holds
from kvcache._copy cimport Copier
from kvcache._door cimport Allocation, find_in
from kvcache._index cimport entry_at, entry_t, match_ids
from kvcache._lock cimport kv_lock, kv_lock_is_mine, kv_lock_runs_python
from kvcache._moves cimport span_t
from kvcache._pack cimport copier_pack, copier_unpack, payload_bytes
from kvcache._pool cimport (
    CLOSED,
    HELD,
    MOVE_FAILED,
    OK,
    STALE,
    extent_t,
    handle_t,
    is_live,
    keeps,
    my_hold,
    place_of,
    refusals_t,
    request_t,
    reuse_t,
    slot_of,
    status_t,
)
from kvcache._reuse cimport block_at, index_more, note_ids
from kvcache._sequences cimport change_limit, cut, pool_unlock, raise_marks, retire
from kvcache._writes cimport span_positions

from kvcache.errors import KVCacheError, Suspended, UnknownSequence

LOG = logging.getLogger("kvcache")


cdef class Journey:
    """A sequence that is suspended, or on its way out or back. Made by `_depart`."""


cdef class TravelCore(CacheCore):
    """What a cache is made of last: what leaves the arena, and comes back."""

    # -- what a suspended sequence still has

    cdef Journey journey_of(self, object request_id):
        """None for a sequence that has not been suspended, or that has been freed."""
        cdef Journey journey = None if self.away is None else <Journey>find_in(self.away, request_id)
        return journey if journey is not None and self.knows(journey.record) else None

    cdef Journey departed(self, object request_id):
        """The same, and None for one that is just about to leave."""
        cdef Journey journey = self.journey_of(request_id)
        return None if journey is None or journey.limit < 0 else journey

    def used_tokens(self, request_id):
        """Tokens of the sequence."""
        cdef Journey journey = self.departed(request_id)
        if journey is not None:
            return journey.tokens
        try:
            return CacheCore.used_tokens(self, request_id)
        except Suspended:  # it has left since
            return self.used_tokens(request_id)

    def limit(self, request_id):
        """Tokens that the sequence may have in total."""
        cdef Journey journey = self.departed(request_id)
        if journey is not None:
            return journey.limit
        try:
            return CacheCore.limit(self, request_id)
        except Suspended:  # it has left since
            return self.limit(request_id)

    def capacity(self, request_id):
        """Tokens that the blocks held now have room for; 0 for a suspended sequence."""
        cdef Journey journey = self.departed(request_id)
        if journey is not None:
            return 0
        try:
            return CacheCore.capacity(self, request_id)
        except Suspended:  # it has left since
            return self.capacity(request_id)

    def is_contiguous(self, request_id):
        """Whether the sequence's blocks are one run, so that its views copy nothing. An empty sequence is."""
        cdef Journey journey = self.departed(request_id)
        if journey is not None:
            return True
        try:
            return CacheCore.is_contiguous(self, request_id)
        except Suspended:  # it has left since
            return self.is_contiguous(request_id)

    def block_table(self, request_id):
        """Block ids in token order, a new int32 array; none for a suspended sequence."""
        cdef Journey journey = self.departed(request_id)
        if journey is not None:
            return np.empty(0, np.int32)
        try:
            return CacheCore.block_table(self, request_id)
        except Suspended:  # it has left since
            return self.block_table(request_id)

    def is_suspended(self, request_id):
        """Whether the sequence's K/V are elsewhere, or on their way out or back.

        Parameters
        ----------
        request_id : hashable

        Returns
        -------
        bool

        Raises
        ------
        UnknownSequence
        """
        return self._is_away(self.find(request_id))

    def _is_away(self, Allocation record not None):
        """Whether the very sequence that was granted is suspended or on its way."""
        cdef Journey journey = self.journey_of(record.request_id)
        return journey is not None and journey.record is record

    def _transfer_of(self, request_id):
        """What carries a sequence that is away, or has carried it last; None for one that is here."""
        cdef Journey journey = self.journey_of(request_id)
        return None if journey is None else journey.transfer

    def _is_moving(self, request_id):
        """Whether it is on its way out or back."""
        cdef Journey journey = self.journey_of(request_id)
        cdef bint moving = False
        if journey is not None:
            self.lock_pool()
            moving = journey.moving
            journey.asked = journey.asked or moving
            pool_unlock(&self.pool)
        return moving

    cdef int rest(self, Journey journey) except -1:
        """It is not on its way any more, and is where it was."""
        cdef bint asked
        self.lock_pool()
        asked, journey.asked, journey.moving = journey.asked, False, False
        pool_unlock(&self.pool)
        if asked:
            self.tell_of(journey)
        return 0

    cdef int tell_of(self, Journey journey) except -1:
        """Tells whoever watches; what they raise changes nothing of what has been done."""
        if self.watchers is not None:
            try:
                self.tell(journey.record.request_id)
            except Exception as error:
                LOG.error("a watcher of the cache failed", exc_info=error)
        return 0

    def _is_live(self, Allocation record not None):
        """Whether the very sequence that was granted lives, suspended or not."""
        if CacheCore._is_live(self, record):
            return True
        return self.away is not None and (self._is_away(record) or CacheCore._is_live(self, record))  # back since

    def _num_away(self):
        """Sequences that are suspended or on their way."""
        return 0 if self.away is None else len(self.away)

    # -- leaving

    def _depart(self, request_id, transfer=None, Allocation granted=None):
        """A live sequence, of this grant if there is one, sets out: its `Journey`. From now on its id is `Suspended`,
        its blocks are still held.
        """
        cdef Allocation record = self.find(request_id)
        cdef Journey there, journey = Journey.__new__(Journey)
        if granted is not None and granted is not record:
            raise UnknownSequence(request_id=request_id)
        journey.transfer = transfer
        journey.record, journey.moving, journey.limit = record, True, -1
        with cython.critical_section(self):
            if self.away is None:
                self.away = {}
            there = <Journey>self.away.setdefault(record.request_id, journey)
            if there is not journey and there.record is record:
                raise Suspended(request_id=request_id)
            self.away[record.request_id] = journey  # instead of that of a namesake that is just being freed
        try:  # known as away before it is: so a free that comes in between finds it here or there
            self.detach(journey)
            self.note_state(journey)
        except BaseException:
            with nogil:
                kv_lock(&self.pool.lock)
                self.attach(journey)
                pool_unlock(&self.pool)
            self.forget(journey)
            raise
        if not self.knows(record):  # freed in between, by who has found neither the old handle nor the new one
            self.give_up(journey, self.calm_clock())
            if self.watchers is not None:
                self.tell(request_id)
            raise UnknownSequence(request_id=request_id)
        return journey

    cdef int detach(self, Journey journey) except -1:
        cdef handle_t handle = journey.record.handle
        cdef int32_t who = place_of(handle)
        cdef bint worn = False
        self.lock_pool()
        if is_live(&self.pool, handle):
            worn = self.pool.space.hot[who].generation > UINT32_MAX - 8
            if not worn:
                self.pool.space.hot[who].generation += 2
                self.pool.space.seqs[who].version += 1
                self.pool.changes += 1
                journey.handle = handle + (<handle_t>2 << 32)
                journey.tokens = self.pool.space.hot[who].tokens
                journey.limit = self.pool.space.seqs[who].limit
                journey.salt = self.pool.space.seqs[who].salt
        pool_unlock(&self.pool)
        if worn:
            raise KVCacheError("the sequence's place has been used four billion times")
        if journey.handle == 0:
            self.forget(journey)
            self.answer(STALE, journey.record.request_id)
        return 0

    cdef void attach(self, Journey journey) noexcept nogil:
        """The old handle is the sequence's again. The pool is locked."""
        cdef int32_t who = place_of(journey.handle)
        if is_live(&self.pool, journey.handle):
            self.pool.space.hot[who].generation -= 2
            self.pool.space.seqs[who].version += 1
            self.pool.changes += 1
        journey.handle = 0

    cdef int note_state(self, Journey journey) except -1:
        """What is known of its tokens: nobody can change it any more."""
        cdef int64_t num_marks = self.pool.num_marks, position, known = 0
        cdef int32_t who = place_of(journey.handle)
        cdef int32_t[::1] marks = np.zeros(num_marks, np.int32), written = np.zeros(2 * num_marks, np.int32), ids
        self.lock_pool()  # the table of sequences may be where it is no longer
        if is_live(&self.pool, journey.handle):
            known = self.pool.space.seqs[who].known
        pool_unlock(&self.pool)
        ids = np.zeros(known, np.int32)
        self.lock_pool()
        if is_live(&self.pool, journey.handle):
            memcpy(&marks[0], &self.pool.marks[who * num_marks], num_marks * sizeof(int32_t))
            memcpy(&written[0], &self.pool.written[who * num_marks], num_marks * sizeof(extent_t))
            known = min(known, <int64_t>self.pool.space.seqs[who].known)  # cleared meanwhile: none
            for position in range(known):
                ids[position] = self.pool.index.ids[slot_of(&self.pool, who, position)]
        pool_unlock(&self.pool)
        journey.marks, journey.written, journey.ids = marks.base, written.base, ids.base[:known]
        return 0

    def _put_away(self, Journey journey not None, bint ok):
        """The end of the way out. Whether it is suspended now; if not, it lives on as it did, or has been freed."""
        cdef status_t status = STALE
        cdef double when = self.calm_clock()
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            if ok and is_live(&self.pool, journey.handle):
                status = retire(&self.pool, journey.handle, when)
                if status == OK:
                    journey.handle = 0
            if status != OK:
                self.attach(journey)
            pool_unlock(&self.pool)
        journey.moving = False
        if status != OK:
            self.forget(journey)
        self.tell_of(journey)
        return status == OK and self.is_away(journey)

    cdef bint is_away(self, Journey journey) except -1:
        """Not, if it has been freed: after `moving` has ended, whoever frees it has it abandoned."""
        return find_in(self.away, journey.record.request_id) is journey

    cdef int forget(self, Journey journey) except -1:
        with cython.critical_section(self):  # it may have gone already, and another one of its name have come
            if self.is_away(journey):
                self.away.pop(journey.record.request_id, None)
        return 0

    cdef int left(self, Allocation record, double when) except -1:
        """Freed while it was away: what it has is given back now, and what is kept of it elsewhere by its carrier."""
        cdef Journey journey = <Journey>find_in(self.away, record.request_id)
        if journey is None or journey.record is not record:
            return 0
        self.give_up(journey, when)
        if not journey.moving:
            self._abandoned(journey)
        return 0

    cdef int give_up(self, Journey journey, double when) except -1:
        """Gives back the blocks that it has, and forgets it. Where that raises, nothing has been done."""
        cdef handle_t handle
        cdef bint mine = kv_lock_is_mine(&self.pool.lock)  # a finalizer's, in the middle of a move
        if not mine:
            self.lock_pool()
        handle, journey.handle = journey.handle, 0
        if not mine:
            pool_unlock(&self.pool)
        if handle:
            try:
                self.free_handle(handle, when)
            except BaseException:
                journey.handle = handle
                raise
        self.forget(journey)
        return 0

    def _abandoned(self, journey):
        """A suspended sequence has been freed: its chunks are nobody's."""

    # -- coming back

    def _return(self, request_id, bint recompute, bint patient=True):
        """A suspended sequence sets out to come back: its `Journey`, or None when it does not fit now. False, unless
        `patient`: it would have to wait for a hold of another thread.
        """
        cdef Allocation record = self.find(request_id)
        cdef Journey journey = self.journey_of(request_id)
        cdef const int32_t[::1] known
        cdef const int32_t *ids = NULL
        cdef status_t status = STALE
        cdef int64_t cached = 0
        cdef bint mine = False
        cdef refusals_t refused
        if journey is None or journey.record is not record:
            self.live(record)
            pool_unlock(&self.pool)
            raise ValueError(f"the sequence with the id {request_id!r} is not suspended")
        self.lock_pool()
        if journey.moving:
            journey.asked = True
            pool_unlock(&self.pool)
            raise Suspended(request_id=request_id)
        journey.moving = True
        pool_unlock(&self.pool)
        known = journey.ids
        if recompute and 0 < journey.tokens == known.shape[0]:
            ids = &known[0]  # what of them is cached need not be computed
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            refused = self.pool.sight.refused
            while True:
                self.pool.pause = 0
                status = CLOSED if self.pool.closed else self.admit_journey(journey, ids, &cached)
                if status != HELD or not patient or wait_for_holds(&self.pool) != OK:
                    break
            if not patient:  # whoever asks again and again counts for itself
                self.pool.sight.refused = refused
            mine = status == HELD and my_hold(&self.pool) != NULL
            pool_unlock(&self.pool)
        if not self.knows(record):  # freed meanwhile
            if status == OK:
                self.free_handle(journey.handle, self.calm_clock())
            self._abandoned(journey)
            raise UnknownSequence(request_id=request_id)
        if status != OK:
            self.rest(journey)
            if status == HELD and not (patient or mine):
                return False
            self.answer(status, request_id)
            return None
        if recompute:
            journey.in_place = cached
            self._settle(journey, True, cached)
        return journey

    cdef status_t admit_journey(self, Journey journey, const int32_t *ids, int64_t *cached) noexcept nogil:
        """Blocks for its tokens; what the index has of the `ids` counts as in place, unless it is NULL."""
        cdef request_t request = counted(max(journey.tokens, <int64_t>1), max(journey.limit, <int64_t>1))
        cdef status_t status
        cdef handle_t handle = 0
        request.salt, request.ids = journey.salt, ids
        status = admit(&self.pool, &request, True, &handle)
        if status != OK:
            return status
        if journey.tokens == 0:
            cut(&self.pool, place_of(handle), 0)
        if journey.limit == 0:
            change_limit(&self.pool, place_of(handle), 0)
        journey.handle = handle
        cached[0] = request.cached
        return OK

    def _settle(self, Journey journey not None, bint ok, int64_t in_place=-1):
        """The end of the way back: it lives again, with `in_place` leading tokens (-1: as it was); or it is suspended
        as before. Whether it has not been freed meanwhile; if so, its chunks are nobody's.
        """
        cdef double when = self.calm_clock()
        cdef const int32_t[::1] ids = journey.ids, marks = journey.marks, written = journey.written
        cdef int64_t num_marks = self.pool.num_marks, first
        cdef bint there
        cdef handle_t handle
        self.lock_pool()
        handle = journey.handle
        first = place_of(handle) * num_marks
        there = is_live(&self.pool, handle)
        if there and ok:
            if in_place < 0:
                memcpy(&self.pool.marks[first], &marks[0], num_marks * sizeof(int32_t))
                memcpy(&self.pool.written[first], &written[0], num_marks * sizeof(extent_t))
            self.pool.space.seqs[place_of(handle)].salt = journey.salt
            if ids.shape[0]:
                note_ids(&self.pool, place_of(handle), 0, &ids[0], ids.shape[0])
            journey.record.handle = handle
        elif there:
            retire(&self.pool, handle, when)
        journey.handle = 0
        pool_unlock(&self.pool)
        journey.moving = False
        if ok or not there:
            self.forget(journey)
        if there:
            self.tell_of(journey)
        return there and (ok or self.is_away(journey))

    # -- bytes, one chunk at a time

    def _pack_chunk(self, Journey journey not None, int64_t first, int64_t count, payload):
        """Copies K/V of tokens [first, first + count) out. False: it has been freed."""
        return self.carry(journey, first, count, 0, count, payload, True)

    def _unpack_chunk(self, Journey journey not None, int64_t first, int64_t count, payload, int64_t start=0, end=None):
        """Copies K/V in: of a payload of `count` tokens those in [start, end). False: it has been freed."""
        return self.carry(journey, first, count, start, count if end is None else <int64_t>end, payload, False)

    cdef bint carry(self, Journey journey, int64_t first, int64_t tokens, int64_t start, int64_t end, object payload,
                    bint out) except -1:
        cdef Py_buffer view
        cdef status_t status = STALE
        cdef int32_t who
        cdef int failed = 0
        cdef Copier copier = self.copier
        if not (0 <= start <= end <= tokens and 0 <= first <= journey.tokens - end):
            raise ValueError(f"tokens {start} to {end} of {tokens}, from position {first} on, of {journey.tokens}")
        PyObject_GetBuffer(payload, &view, PyBUF_WRITABLE if out else PyBUF_SIMPLE)
        try:
            if view.len != payload_bytes(copier, tokens):
                raise ValueError(f"the payload has {view.len} bytes, {payload_bytes(copier, tokens)} are needed")
            self.before_waiting()
            with nogil:
                kv_lock(&self.pool.lock)
                if is_live(&self.pool, journey.handle) and not self.pool.closed:
                    who = place_of(journey.handle)
                    self.pool.spans.count = 0
                    status = span_positions(&self.pool, &self.pool.spans, who, first + start, end - start, start)
                    if status == OK:
                        kv_lock_runs_python(&self.pool.lock, True)  # the arena may have to
                        if out:
                            failed = copier_pack(<void *>copier, self.pool.spans.items, self.pool.spans.count, tokens,
                                                 <char *>view.buf)
                        else:
                            failed = copier_unpack(<void *>copier, self.pool.spans.items, self.pool.spans.count, tokens,
                                                   <const char *>view.buf)
                        kv_lock_runs_python(&self.pool.lock, False)
                        if failed:
                            status = MOVE_FAILED
                pool_unlock(&self.pool)
        finally:
            PyBuffer_Release(&view)
        if status == STALE:
            return False
        return self.answer(status, journey.record.request_id)

    # -- prefixes: what is in the index

    def _salts(self):
        """Salts by their numbers, which begin at 1; 0 is none."""
        return {0: None, **{number: salt for (_, salt), number in [*self.salts.items(), *self.limited.items()]}}

    def _entries(self, request_ids):
        """What is in the index, or what of it these sequences have: numbers of entries, of those before them
        (-1 - salt at the beginning of a prompt), their generations, and their token ids, a row each.

        Entries whose predecessor has gone are left out, but not those that come after them.
        """
        cdef int64_t size = self.pool.space.block_size, count = 0, room, at
        cdef int32_t[::1] numbers, parents
        cdef uint32_t[::1] generations
        cdef int32_t[:, ::1] ids
        cdef unsigned char[::1] wanted
        cdef entry_t *entry
        cdef int32_t parent
        self.known()
        chosen = None if request_ids is None else self.entries_of(request_ids)
        wanted = np.ones(1, np.uint8) if chosen is None else chosen
        while True:
            room = max(self.pool.index.num_entries, <int64_t>1)
            arrays = (np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.uint32),
                      np.empty((room, size), np.int32))
            numbers, parents, generations, ids = arrays
            self.lock_pool()
            count = 0
            for at in range(self.pool.index.touched if keeps(&self.pool) else 0):
                entry = &self.pool.index.entries[at]
                if not entry.generation & 1 or (chosen is not None and (at >= wanted.shape[0] or not wanted[at])):
                    continue
                parent = entry.parent
                if parent >= 0 and self.pool.index.entries[parent].generation != entry.ancestry:
                    continue
                if count < room:
                    numbers[count], parents[count], generations[count] = <int32_t>at, parent, entry.generation
                    memcpy(&ids[count, 0], &self.pool.index.ids[entry.block * size], size * sizeof(int32_t))
                count += 1
            pool_unlock(&self.pool)
            if count <= room:
                return tuple([array[:count] for array in arrays])

    cdef object entries_of(self, object request_ids):
        """Which entries the whole blocks of these sequences have."""
        cdef int64_t index
        cdef int32_t who, entry
        cdef unsigned char[::1] wanted
        chosen = np.zeros(self.pool.space.blocks.num_blocks, np.uint8)
        wanted = chosen
        for request_id in request_ids:
            who = self.live(self.find(request_id))
            for index in range(self.pool.space.seqs[who].indexed):
                entry = entry_at(&self.pool.index, block_at(&self.pool, who, index))
                if entry >= 0:
                    wanted[entry] = 1
            pool_unlock(&self.pool)
        return chosen

    def _pack_entries(self, const int32_t[::1] numbers, const uint32_t[::1] generations, payload):
        """Copies K/V of entries that follow each other out, as one chunk. False: one of them is no longer there."""
        cdef int64_t size = self.pool.space.block_size, count = numbers.shape[0], at
        cdef Py_buffer view
        cdef status_t status = OK
        cdef int failed = 0
        cdef Copier copier = self.copier
        cdef int64_t[:, ::1] rows = np.empty((max(count, <int64_t>1), 3), np.int64)
        cdef const entry_t *entry
        PyObject_GetBuffer(payload, &view, PyBUF_WRITABLE)
        try:
            if view.len != payload_bytes(copier, count * size):
                raise ValueError(f"the payload has {view.len} bytes, {payload_bytes(copier, count * size)} are needed")
            self.before_waiting()
            with nogil:
                kv_lock(&self.pool.lock)
                for at in range(count):
                    entry = &self.pool.index.entries[numbers[at]]
                    if self.pool.closed or entry.generation != generations[at]:
                        status = STALE
                        break
                    rows[at, 0], rows[at, 1], rows[at, 2] = at * size, entry.block * size, size
                if status == OK:
                    kv_lock_runs_python(&self.pool.lock, True)
                    failed = copier_pack(<void *>copier, <const span_t *>&rows[0, 0], count, count * size,
                                         <char *>view.buf)
                    kv_lock_runs_python(&self.pool.lock, False)
                pool_unlock(&self.pool)
        finally:
            PyBuffer_Release(&view)
        if failed:
            raise copier.take_error()
        return status == OK

    def _found(self, const int32_t[::1] ids, salt):
        """Leading tokens of these whole blocks that are in the index; of them the last may be one, too."""
        cdef int64_t size = self.pool.space.block_size, most = ids.shape[0] // size, hits = 0
        cdef int32_t number = self.salt_of(salt)
        self.known()
        if most and keeps(&self.pool):
            self.lock_pool()
            hits = match_ids(&self.pool.index, number, &ids[0], most, NULL)
            pool_unlock(&self.pool)
        return hits * size

    def _begin_prefix(self, const int32_t[::1] ids, salt):
        """Blocks for whole blocks of tokens whose K/V are to be brought: (journey, leading tokens that are in place),
        or None where they do not fit now. Nobody knows of it, and no statistics count it.
        """
        cdef Journey journey = Journey.__new__(Journey)
        cdef request_t request = counted(ids.shape[0], ids.shape[0])
        cdef reuse_t counts
        cdef status_t status
        journey.record, journey.tokens, journey.limit = Allocation(None, ids.shape[0], ids.shape[0], 0), ids.shape[0], 0
        request.ids, request.salt, request.when = &ids[0], self.salt_of(salt), self.read_clock()
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            while True:
                self.pool.pause = 0
                counts = self.pool.sight.reuse
                status = CLOSED if self.pool.closed else admit(&self.pool, &request, True, &journey.handle)
                uncount(&self.pool.sight.reuse, &counts)
                if status != HELD or wait_for_holds(&self.pool) != OK:
                    break
            pool_unlock(&self.pool)
        return (journey, request.cached) if self.answer(status, None) else None

    def _end_prefix(self, Journey journey not None, bint ok):
        """Its K/V are in place (`ok`), and stay cached; or they are not, and its blocks are given back."""
        cdef double when = self.read_clock()
        self.lock_pool()
        if is_live(&self.pool, journey.handle):
            if ok:
                raise_marks(&self.pool, place_of(journey.handle), journey.tokens)
                index_more(&self.pool, place_of(journey.handle))
            if retire(&self.pool, journey.handle, when) == OK:
                self.pool.sight.frees -= 1
                self.pool.sight.admissions -= 1
        journey.handle = 0
        pool_unlock(&self.pool)
        if self.watchers is not None:
            self.tell(self)


cdef void uncount(reuse_t *now, const reuse_t *before) noexcept nogil:
    """Takes back what an admission counts of its prompt; evictions stay."""
    now.queries, now.query_tokens, now.hit_tokens = before.queries, before.query_tokens, before.hit_tokens
    now.cold, now.evicted, now.salted = before.cold, before.evicted, before.salted
    now.partial, now.disabled = before.partial, before.disabled
