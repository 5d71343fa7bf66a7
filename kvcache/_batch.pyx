"""A batch: one call a step for all members, and arrays that say where their new tokens go."""

import numpy as np

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memchr, memset

from kvcache._alloc cimport CacheCore
from kvcache._copy cimport Copier, Sources
from kvcache._ids cimport counts_array, drop_ids, ids_t, read_step
from kvcache._lock cimport kv_lock
from kvcache._members cimport data_of, ints_of
from kvcache._pool cimport (
    BAD_COUNT,
    BUSY,
    GONE,
    HELD,
    NO_ROOM,
    OK,
    PAST_LIMIT,
    STALE,
    ceil_div,
    free_blocks,
    handle_t,
    is_live,
    keeps,
    last_block,
    overwrites_held,
    place_of,
    pool_t,
    sight_t,
    status_t,
    tail_is_kept,
    waiting_blocks,
)
from kvcache._reuse cimport begin_names, may_name, note_ids
from kvcache._sequences cimport append, cut, mark_written, pool_unlock, ungrow
from kvcache._sharing cimport may_copy, tail_is_shared, wish_t
from kvcache._space cimport held, hot_t, seq_t
from kvcache._writes cimport own_and_span, unwish_write, wish_write, write_spans

from kvcache.errors import CacheFull

cdef enum:
    MOST_ASKED = 1 << 24   # tokens that a step of any arena may ask for


cdef class BatchCore(Members):
    """The bookkeeping of a batch; see `DecodeBatch`."""

    def __dealloc__(self):
        free(self.spans.items)

    # -- a step

    def append(self, tokens=None, counts=1):
        """Gives every member one token (or `counts`: an int, or one per member), in batch order; a member gets all of
        its count or none.

        Parameters
        ----------
        tokens : sequence of int, optional
            Ids, as many as asked for, flat (for an int count also of shape ``(B, count)``).
        counts : int or sequence of int

        Returns
        -------
        numpy.ndarray
            Of bool, one per member: who got its tokens.

        Raises
        ------
        UnknownSequence
            A member has been freed. Nothing has changed.
        CacheHeld
            It would have to wait for this very thread's hold to end. Nothing has changed.
        """
        self.begin()
        try:
            return self.ask(tokens, counts)
        finally:
            self.end()

    cdef object ask(self, object tokens, object counts):
        cdef const int32_t *each = NULL
        cdef int64_t asked = self.size
        cdef int64_t most = max(self.cache.arena_tokens, <int64_t>MOST_ASKED)
        slots = positions = None
        if type(counts) is not int or counts != 1:
            per_member = counts_array(counts, self.size)
            asked = int(per_member.sum(dtype=np.int64))
            if asked > most:
                raise ValueError(f"{asked} tokens in one step, at most {most} can be asked for")
            each = ints_of(per_member)
            slots, positions = np.empty(asked, np.int32), np.empty(asked, np.int32)
        if tokens is None:
            return self.take_step(each, NULL, np.empty(self.size, np.bool_), slots, positions)
        cdef ids_t ids
        read_step(tokens, asked, self.size, &ids)
        try:
            return self.take_step(each, ids.data, np.empty(self.size, np.bool_), slots, positions)
        finally:
            drop_ids(&ids)

    cdef object take_step(self, const int32_t *counts, const int32_t *ids, object result, object slots,
                          object positions):
        """Decides under the lock, then fills the arrays: a step that fails leaves those of the step before."""
        cdef CacheCore cache = self.cache
        cdef unsigned char *got = <unsigned char *>data_of(result)
        cdef int32_t *slot = self.own_slot
        cdef int32_t *position = self.own_position
        cdef int64_t entries = self.size
        cdef status_t status
        if counts != NULL:
            slot, position, entries = ints_of(slots), ints_of(positions), len(slots)
        cache.before_waiting()
        with nogil:
            kv_lock(&cache.pool.lock)
            while True:
                status = self.append_each(counts, got)
                if status != HELD or self.wait_outside() != OK:
                    break
            if status == OK:
                self.slot, self.position, self.entries, self.uniform = slot, position, entries, counts == NULL
                self.fill(counts, got)
                if ids != NULL and keeps(&cache.pool):
                    self.name_step(ids)
            pool_unlock(&cache.pool)
        if status != OK:
            self.answer(status)
        if counts != NULL:
            self.slots_array, self.positions_array = slots, positions
        else:
            self.slots_array, self.positions_array = self.own_slots, self.own_positions
        return result

    cdef status_t append_each(self, const int32_t *counts, unsigned char *got) noexcept nogil:
        """Every member's tokens, or, when the call cannot go on, none."""
        cdef pool_t *pool = &self.cache.pool
        cdef const handle_t *handles = self.handles
        cdef hot_t *hots = pool.space.hot
        cdef hot_t *hot
        cdef int64_t index, spills = pool.spills
        cdef sight_t sight = pool.sight
        cdef int64_t moves = pool.moves, copied = pool.copied_tokens
        cdef uint64_t changes = pool.changes
        cdef status_t status = OK
        memset(got, 1, self.size)
        pool.pause = 0
        self.num_touched = 0
        self.all_live = False
        self.unseen = self.seen != changes
        if pool.num_holders and self.needs_held(counts):
            return HELD
        for index in range(self.size):
            hot = &hots[<uint32_t>handles[index]]
            if hot.generation != <uint32_t>(handles[index] >> 32):
                status = STALE
            elif counts == NULL and hot.tokens < hot.soft:
                hot.tokens += 1
                continue
            else:
                status = self.append_one(index, 1 if counts == NULL else counts[index], got)
                hots = pool.space.hot
            if status != OK:
                self.take_back(index, counts, got)
                pool.sight.refused = sight.refused
                pool.spills = spills
                if (pool.moves == moves and pool.copied_tokens == copied
                        and pool.sight.reuse.for_room == sight.reuse.for_room
                        and pool.sight.reuse.doubles == sight.reuse.doubles):  # else others have to look again
                    pool.sight, pool.changes = sight, changes
                return status
        pool.changes += 1
        return OK

    cdef status_t append_one(self, int64_t index, int64_t count, unsigned char *got) noexcept nogil:
        cdef pool_t *pool = &self.cache.pool
        cdef const seq_t *seq
        cdef status_t status = append(pool, place_of(self.handles[index]), count, False)
        if status == BUSY:  # looked for before the first move, since a move is not taken back
            self.all_live = self.all_live or self.dead_member() < 0
            status = append(pool, place_of(self.handles[index]), count, True) if self.all_live else STALE
        seq = &pool.space.seqs[<uint32_t>self.handles[index]]
        if ((self.start[index] >= 0) != (seq.breaks == 0)  # not so for what only grew by the blocks after its last one
                or seq.version != self.versions[index]):
            self.touched[self.num_touched] = <int32_t>index
            self.num_touched += 1
        if status == NO_ROOM or status == PAST_LIMIT:
            got[index] = 0
            return OK
        return status

    cdef void take_back(self, int64_t end, const int32_t *counts, const unsigned char *got) noexcept nogil:
        """Undoes this call's appends of members [0, end)."""
        cdef int64_t index, count
        cdef int32_t who
        for index in range(end - 1, -1, -1):
            count = 1 if counts == NULL else counts[index]
            who = place_of(self.handles[index])
            if got[index] and count:
                ungrow(&self.cache.pool, who, self.cache.pool.space.hot[who].tokens - count)

    cdef bint needs_held(self, const int32_t *counts) noexcept nogil:
        """Whether a paged step comes to a member that only held blocks could serve, or to a block of its own whose
        content is held: seen before the first copy."""
        cdef pool_t *pool = &self.cache.pool
        cdef int64_t index, count, tokens, need, there = free_blocks(pool)
        cdef int32_t who
        cdef bint shared, needed = False
        for index in range(self.size if pool.paged else 0):
            who = place_of(self.handles[index])
            count = 1 if counts == NULL else counts[index]
            if count == 0 or not is_live(pool, self.handles[index]):
                continue
            tokens = pool.space.hot[who].tokens
            need = ceil_div(tokens + count, pool.space.block_size) - held(&pool.space.seqs[who])
            shared = tail_is_shared(pool, who)
            need += shared
            if tokens + count > pool.space.seqs[who].limit or need > there + waiting_blocks(pool):
                continue
            if need > there or tail_is_kept(pool, who) or self.copies_leave_more(who):
                needed = True
                break
            there -= need
            if shared:  # as if it had its copy: the last holder needs none
                pool.refs[last_block(pool, who)] -= 1
                self.touched[self.num_touched] = who
                self.num_touched += 1
        while self.num_touched:
            self.num_touched -= 1
            who = self.touched[self.num_touched]
            pool.refs[last_block(pool, who)] += 1
        return needed

    cdef bint copies_leave_more(self, int32_t who) noexcept nogil:
        """Whether a member before this one, whose copy leaves it the only holder of its last block, has more in it."""
        cdef pool_t *pool = &self.cache.pool
        cdef const seq_t *seq = &pool.space.seqs[who]
        cdef int64_t index
        if seq.blocks == 0 or pool.refs[seq.table[seq.blocks - 1]] > 1:
            return False
        for index in range(self.num_touched):
            if (last_block(pool, self.touched[index]) == seq.table[seq.blocks - 1]
                    and pool.space.hot[self.touched[index]].tokens > pool.space.hot[who].tokens):
                return True
        return False

    cdef void fill(self, const int32_t *counts, const unsigned char *got) noexcept nogil:
        """Writes the step into the arrays, after all its moves."""
        cdef int64_t index, entry = 0, end, count
        cdef int32_t tokens
        self.stepped = True
        self.number += 1
        self.seen = self.cache.pool.changes
        if counts == NULL and memchr(got, 0, self.size) == NULL:
            self.fill_uniform()
            return
        self.whole = False
        self.granted = 0
        for index in range(self.size):
            count = 1 if counts == NULL else counts[index]
            end = entry + count
            self.firsts[index], self.firsts[index + 1] = entry, end
            tokens = self.cache.pool.space.hot[place_of(self.handles[index])].tokens
            while entry < end:
                self.position[entry] = tokens - <int32_t>(end - entry) if got[index] else -1
                entry += 1
            self.granted += count if got[index] else 0
            self.split[index + 1] = <int32_t>self.granted
            self.look(index)

    cdef void fill_uniform(self) noexcept nogil:
        """Every member got one token."""
        cdef const hot_t *hots = self.cache.pool.space.hot
        cdef const handle_t *handles = self.handles
        cdef int32_t *length = self.length
        cdef int32_t *position = self.position
        cdef int32_t *slot = self.slot
        cdef int64_t index
        cdef int32_t tokens
        for index in range(self.size):
            tokens = hots[<uint32_t>handles[index]].tokens
            slot[index] = hots[<uint32_t>handles[index]].base + tokens - 1
            length[index] = tokens
            position[index] = tokens - 1
        if self.unseen or self.seen_moves != self.cache.pool.moves:
            self.look_again()
        for index in range(self.num_touched):
            self.look(self.touched[index])
        if not self.whole:
            for index in range(self.size + 1):
                self.split[index] = <int32_t>index
        self.granted = self.size
        self.whole = True

    cdef void look_again(self) noexcept nogil:
        """After moves and other calls: those whose tokens came to other slots."""
        cdef const hot_t *hots = self.cache.pool.space.hot
        cdef int64_t index
        for index in range(self.size if not self.cache.pool.paged else 0):
            if hots[<uint32_t>self.handles[index]].base != self.start[index]:  # so also where it is scattered
                self.look(index)
        for index in range(self.size if self.cache.pool.paged else 0):
            if self.cache.pool.space.seqs[<uint32_t>self.handles[index]].version != self.versions[index]:
                self.look(index)
        self.seen_moves = self.cache.pool.moves

    cdef void name_step(self, const int32_t *ids) noexcept nogil:
        """Says which tokens those of the step are; `ids` has one for each that was asked for."""
        cdef int64_t index, first, count
        cdef int32_t position
        for index in range(self.size):
            first = self.first_of(index)
            count = self.first_of(index + 1) - first
            position = self.position[first] if count else -1
            if position >= 0:
                note_ids(&self.cache.pool, place_of(self.handles[index]), position, &ids[first], count)

    def set_tokens(self, tokens):
        """Names the tokens of the last append, for an engine that appends before it has read them.

        Parameters
        ----------
        tokens : sequence of int
            Ids, as many as were asked for, flat; those of refused members are ignored, and those after a token that
            still has no name.

        Raises
        ------
        UnknownSequence
            A member has been freed.
        ValueError
            There is no step, a token of it has been cut off since, or has another name. Nothing has changed.
        """
        self.begin()
        try:
            self.name(tokens)
        finally:
            self.end()

    cdef int name(self, object tokens) except -1:
        cdef CacheCore cache = self.cache
        cdef status_t status
        cdef ids_t ids
        if not self.stepped:
            raise ValueError("nothing to name: the batch has had no append since it was made, changed or truncated")
        read_step(tokens, self.entries, max(self.size, <int64_t>1), &ids)
        try:
            cache.before_waiting()
            with nogil:
                kv_lock(&cache.pool.lock)
                status = self.may_name_step(ids.data)
                if status == OK and keeps(&cache.pool):
                    self.name_step(ids.data)
                pool_unlock(&cache.pool)
        finally:
            drop_ids(&ids)
        if status == GONE:
            raise ValueError("a token of this step has been cut off since: nothing has been named")
        if status == BAD_COUNT:
            raise ValueError("a token of this step has another id already: nothing has been named")
        self.answer(status)
        return 0

    cdef status_t may_name_step(self, const int32_t *ids) noexcept nogil:
        cdef pool_t *pool = &self.cache.pool
        cdef int64_t index, position, count
        self.refresh()
        if self.dead_member() >= 0:
            return STALE
        if self.gone():
            return GONE
        begin_names(pool)
        for index in range(self.size if keeps(pool) else 0):
            position, count = self.written_by(index)
            if not may_name(pool, place_of(self.handles[index]), position, &ids[self.first_of(index)], count):
                return BAD_COUNT
        return OK

    def truncate(self, counts):
        """Drops the last tokens of each member: `counts` is an int, or one per member. Ends the step.

        Returns
        -------
        numpy.ndarray
            Of bool, one per member: False where others hold what would be cut, and the new claim does not fit.

        Raises
        ------
        UnknownSequence, ValueError
            A member has been freed, or has fewer tokens than that. Nothing has changed.
        """
        self.begin()
        try:
            return self.cut_back(counts)
        finally:
            self.end()

    cdef object cut_back(self, object counts):
        cdef const int32_t *each
        cdef status_t status
        cdef CacheCore cache = self.cache
        per_member = counts_array(counts, self.size)
        each = ints_of(per_member)
        result = np.empty(self.size, np.bool_)
        cdef unsigned char *got = <unsigned char *>data_of(result)
        cache.before_waiting()
        with nogil:
            kv_lock(&cache.pool.lock)
            status = self.cut_each(each, got)
            if status == OK:
                self.end_step()
                self.number += 1
                self.refresh()
            pool_unlock(&cache.pool)
        if status == GONE:
            raise ValueError(f"cannot drop {per_member.tolist()} tokens of members that have "
                             f"{self.lengths_array.tolist()}")
        self.answer(status)
        if cache.watchers is not None:
            cache.tell(cache)
        return result

    cdef status_t cut_each(self, const int32_t *counts, unsigned char *got) noexcept nogil:
        cdef pool_t *pool = &self.cache.pool
        cdef int64_t index
        cdef int32_t who
        cdef status_t status
        for index in range(self.size):
            if not is_live(pool, self.handles[index]):
                return STALE
            if counts[index] > pool.space.hot[place_of(self.handles[index])].tokens:
                return GONE
        for index in range(self.size):
            who = place_of(self.handles[index])
            status = cut(pool, who, max(pool.space.hot[who].tokens - counts[index], 0))  # it may have come twice
            if status != OK and status != NO_ROOM:
                return status
            got[index] = status == OK
        return OK

    # -- writing a step

    def _write_rows(self, Sources sources not None, int64_t layer):
        """Writes rows, one per token asked for or one per token granted, to where the last append put them."""
        self.begin()
        try:
            self.put(sources, layer)
        finally:
            self.end()

    cdef int put(self, Sources sources, int64_t layer) except -1:
        cdef CacheCore cache = self.cache
        cdef Copier copier = cache.copier
        cdef status_t status
        if not self.stepped:
            raise ValueError("nothing to write: the batch has had no append since it was made, changed or truncated")
        if sources.rows != self.entries and sources.rows != self.granted:
            raise ValueError(f"{sources.rows} rows for a step of {self.entries} tokens, {self.granted} of them granted")
        cache.before_waiting()
        with nogil:
            kv_lock(&cache.pool.lock)
            while True:
                status = self.write_locked(copier, sources, layer)
                if status != HELD or self.wait_outside() != OK:
                    break
            pool_unlock(&cache.pool)
        if cache.scorer is not None:
            cache.ask_policy()
        if status == GONE:
            raise ValueError("a token of this step has been cut off since: nothing has been written")
        if status == NO_ROOM:
            raise CacheFull(blocks_needed=cache.pool.wanted, blocks_available=cache.pool.unclaimed)
        self.answer(status)
        return 0

    cdef status_t write_locked(self, Copier copier, Sources sources, int64_t layer) noexcept nogil:
        cdef pool_t *pool = &self.cache.pool
        cdef int64_t index, first, last
        cdef status_t status
        self.refresh()
        if self.dead_member() >= 0:
            return STALE
        if self.gone():
            return GONE
        for index in range(self.size):
            first, last = self.first_of(index), self.first_of(index + 1)
            if (first < last and self.position[first] >= 0
                    and overwrites_held(pool, place_of(self.handles[index]), layer, self.position[first],
                                        last - first)):
                return HELD
        if (self.spans_number != self.number or self.spans_seen != pool.changes
                or self.spans_rows != sources.rows):
            status = self.find_spans(sources.rows)
            if status != OK:
                return status
        status = write_spans(pool, &self.spans, copier, sources, layer)
        if status != OK:
            return status
        for index in range(self.size):
            first, last = self.first_of(index), self.first_of(index + 1)
            if first < last and self.position[first] >= 0:
                mark_written(pool, place_of(self.handles[index]), layer, self.position[first], last - first)
        return OK

    cdef bint gone(self) noexcept nogil:
        cdef int64_t entry
        for entry in range(self.entries):
            if self.position[entry] >= 0 and self.slot[entry] < 0:
                return True
        return False

    cdef status_t may_own(self) noexcept nogil:
        """Whether every shared block beneath the step can be copied: seen before the first copy."""
        cdef pool_t *pool = &self.cache.pool
        cdef wish_t wish = wish_t(copies=0, unclaimed=0)
        cdef int64_t index, position, count
        for index in range(self.size if pool.paged else 0):
            position, count = self.written_by(index)
            wish_write(pool, place_of(self.handles[index]), position, count, &wish)
        for index in range(self.size if pool.paged else 0):
            position, count = self.written_by(index)
            unwish_write(pool, place_of(self.handles[index]), position, count)
        return may_copy(pool, &wish)

    cdef (int64_t, int64_t) written_by(self, int64_t index) noexcept nogil:
        """First position of a member's tokens of the step, and how many were granted."""
        cdef int64_t first = self.first_of(index)
        cdef int64_t count = self.first_of(index + 1) - first
        if count and self.position[first] >= 0:
            return self.position[first], count
        return 0, 0

    cdef status_t find_spans(self, int64_t rows) noexcept nogil:
        cdef int64_t index, first, count, row = 0
        cdef status_t status = self.may_own()
        if status != OK:
            return status
        self.spans.count = 0
        self.spans_rows = -1
        for index in range(self.size):
            first = self.first_of(index)
            count = self.first_of(index + 1) - first
            if count and self.position[first] >= 0:
                status = own_and_span(&self.cache.pool, &self.spans, place_of(self.handles[index]),
                                      self.position[first], count, first if rows == self.entries else row)
                if status != OK:
                    return status
                row += count
        self.spans_rows, self.spans_seen, self.spans_number = rows, self.cache.pool.changes, self.number
        return OK
