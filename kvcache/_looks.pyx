"""What a sequence has and where it lies, what is written to it, and the sight of the cache as a whole."""

import sys

import numpy as np

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int32_t, int64_t, uint64_t

from kvcache._calls cimport wait_for_holds
from kvcache._check cimport check_pool
from kvcache._copy cimport Copier, Sources
from kvcache._door cimport Allocation, Door
from kvcache._ids cimport as_count
from kvcache._lock cimport kv_lock, kv_lock_runs_python, kv_lock_try
from kvcache._pool cimport (
    GONE,
    HELD,
    NUM_LATENCIES,
    OK,
    STALE,
    copy_table,
    free_blocks,
    handle_t,
    held_blocks,
    is_live,
    my_hold,
    overwrites_held,
    place_of,
    pool_t,
    sight_t,
    slot_of,
    status_t,
    used_blocks,
    waiting_blocks,
)
from kvcache._runs cimport block_map_text, fragmentation_of
from kvcache._sequences cimport mark_written, pool_unlock
from kvcache._sharing cimport is_shared
from kvcache._sight cimport draw_free, draw_owners, forget_peaks, longest_free
from kvcache._space cimport held
from kvcache._writes cimport own_and_span, write_spans

from kvcache.errors import CacheFull, KVCacheError


cdef struct seen_t:  # of a pool, at one moment; in blocks, tokens and times
    sight_t sight
    int64_t live
    int64_t used
    int64_t there          # free, cached ones included
    int64_t longest
    int64_t cached
    int64_t pinned
    int64_t claims
    int64_t limbo          # free when the last hold ends
    int64_t moves
    int64_t moved
    int64_t moved_cached
    int64_t copied
    int64_t spills
    int64_t heals
    int64_t pause


cdef void see_and_unlock(pool_t *pool, seen_t *seen) noexcept nogil:
    seen.sight = pool.sight
    seen.live, seen.claims, seen.limbo = pool.space.live, pool.claims, waiting_blocks(pool)
    seen.used, seen.there, seen.longest = used_blocks(pool), free_blocks(pool), longest_free(pool)
    seen.cached, seen.pinned = pool.index.cached_blocks, pool.index.pinned_blocks
    seen.moves, seen.moved, seen.moved_cached = pool.moves, pool.moved_tokens, pool.moved_cached
    seen.copied, seen.spills, seen.heals, seen.pause = pool.copied_tokens, pool.spills, pool.heals, pool.longest_pause
    pool_unlock(pool)


cdef class Looks(Door):
    """What `CacheCore` is made of next: everything that is read, and bytes that are written where tokens are."""

    # -- what a sequence has

    def used_tokens(self, request_id):
        """Tokens of the sequence."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t tokens = self.pool.space.hot[who].tokens
        pool_unlock(&self.pool)
        return tokens

    def token_offset_in_block(self, request_id):
        """Where in its block the next token goes: ``used_tokens % block_size``."""
        return self.used_tokens(request_id) % self.pool.space.block_size

    def limit(self, request_id):
        """Tokens that the sequence may have in total."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t limit = self.pool.space.seqs[who].limit
        pool_unlock(&self.pool)
        return limit

    def capacity(self, request_id):
        """Tokens that the blocks held now have room for."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t blocks = held(&self.pool.space.seqs[who])
        pool_unlock(&self.pool)
        return blocks * self.pool.space.block_size

    def is_contiguous(self, request_id):
        """Whether the sequence's blocks are one run, so that its views copy nothing. An empty sequence is."""
        cdef int who = self.live(self.find(request_id))
        cdef bint scattered = self.pool.space.seqs[who].breaks > 0
        pool_unlock(&self.pool)
        return not scattered

    def block_table(self, request_id):
        """Block ids in token order, a new int32 array."""
        return self._table(request_id)[0]

    def _table(self, request_id):
        """Block table and used tokens, from one state."""
        cdef Allocation found = self.find(request_id)
        cdef int64_t room = self.capacity(request_id) // self.pool.space.block_size
        cdef int32_t[::1] out
        cdef int64_t blocks, tokens
        cdef int who
        while True:
            table = np.empty(room, np.int32)
            out = table
            who = self.live(found)
            blocks = held(&self.pool.space.seqs[who])
            tokens = self.pool.space.hot[who].tokens
            if room:
                copy_table(&self.pool, who, min(blocks, room), &out[0])
            pool_unlock(&self.pool)
            if blocks <= room:
                return table[:blocks], tokens
            room = blocks  # it grew meanwhile

    def _locate(self, request_id):
        """Where views look: (first slot, or -1 for a scattered sequence; used tokens; whether any block is shared)."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t slot = 0, tokens = self.pool.space.hot[who].tokens
        cdef bint shared = is_shared(&self.pool, who)
        if self.pool.space.seqs[who].breaks:
            slot = -1
        elif tokens:
            slot = slot_of(&self.pool, who, 0)
        pool_unlock(&self.pool)
        return slot, tokens, shared

    def _in_place(self, request_id, layer, tuple planes):
        """What `planes[layer]` has of a sequence that is one run with no shared block; None in every other case."""
        cdef int64_t slot, tokens
        cdef int who
        if type(layer) is not int or not 0 <= layer < len(planes):
            return None
        who = self.live(self.find(request_id))
        tokens = self.pool.space.hot[who].tokens
        slot = slot_of(&self.pool, who, 0) if tokens else 0
        if self.pool.space.seqs[who].breaks or is_shared(&self.pool, who):
            slot = -1
        pool_unlock(&self.pool)
        return planes[layer][:, slot : slot + tokens] if slot >= 0 else None

    # -- writing

    def _write_rows(self, request_id, Sources sources not None, int64_t layer, start):
        """Writes all rows of `sources` to consecutive positions of a sequence, by default its last ones."""
        cdef Allocation found = self.find(request_id)
        cdef int64_t first = -1 if start is None else as_count(start, "start", 0)
        cdef int64_t tokens = 0
        cdef handle_t handle = found.handle
        cdef status_t status
        cdef Copier copier = self.copier
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            while True:
                status = STALE
                if is_live(&self.pool, handle):
                    tokens = self.pool.space.hot[place_of(handle)].tokens
                    status = self.write_locked(place_of(handle), copier, sources, layer, first)
                if status != HELD or wait_for_holds(&self.pool) != OK:
                    break
            pool_unlock(&self.pool)
        if self.scorer is not None:
            self.ask_policy()
        if status == GONE:
            begin = tokens - sources.rows if start is None else start
            raise ValueError(f"{sources.rows} rows from position {begin} on, the sequence has {tokens} tokens")
        if not self.answer(status, request_id):
            raise CacheFull(blocks_needed=self.pool.wanted, blocks_available=self.pool.unclaimed)

    cdef status_t write_locked(self, int32_t who, Copier copier, Sources sources, int64_t layer,
                               int64_t start) noexcept nogil:
        cdef int64_t tokens = self.pool.space.hot[who].tokens
        cdef int64_t rows = sources.rows
        cdef status_t status
        if start < 0:
            start = tokens - rows
        if start < 0 or rows > tokens - start:
            return GONE
        if rows == 0:
            return OK
        if overwrites_held(&self.pool, who, layer, start, rows):
            return HELD
        self.pool.spans.count = 0
        status = own_and_span(&self.pool, &self.pool.spans, who, start, rows, 0)
        if status == OK:
            status = write_spans(&self.pool, &self.pool.spans, copier, sources, layer)
        if status == OK:
            mark_written(&self.pool, who, layer, start, rows)
        return status

    # -- the cache as a whole

    def __contains__(self, request_id):
        return request_id in self.known()

    def __len__(self):
        return len(self.known())

    def __iter__(self):
        return iter(list(self.known()))

    def __bool__(self):
        return True

    def _require_open(self):
        """Raises `CacheClosed` after `close`."""
        self.known()

    @property
    def num_allocated_sequences(self):
        """Live sequences."""
        return len(self.known())

    @property
    def closed(self):
        """Whether `close` has been called."""
        return self.pool.closed

    def _room(self):
        """Blocks that are free, or will be when the holds have ended, and blocks that may still be promised."""
        self.known()
        self.lock_pool()
        cdef int64_t there = free_blocks(&self.pool) + waiting_blocks(&self.pool)
        cdef int64_t unclaimed = self.pool.budget - held_blocks(&self.pool) - self.pool.claims
        pool_unlock(&self.pool)
        return there, unclaimed

    def _holds_open(self):
        """Holds that are open now, if one of them is this thread's; else 0."""
        self.lock_pool()
        cdef int64_t count = self.pool.num_holders if my_hold(&self.pool) != NULL else 0
        pool_unlock(&self.pool)
        return count

    def _figures(self, int64_t block_bytes, int64_t token_bytes, int64_t arena_copies, tuple memory not None):
        """The values of a `CacheStats`, those of the pool taken under the lock."""
        cdef seen_t seen
        self.known()
        if kv_lock_try(&self.pool.lock):
            see_and_unlock(&self.pool, &seen)
        else:
            self.before_waiting()
            with nogil:  # until it is unlocked: whoever wants the lock is not kept waiting for the GIL as well
                kv_lock(&self.pool.lock)
                see_and_unlock(&self.pool, &seen)
        cdef sight_t *sight = &seen.sight
        cdef int64_t used = seen.used, there = seen.there
        cdef int64_t bucket
        sight.latencies[0] += sight.admissions - sight.num_timed
        return (
            seen.live, used + there, used, there, seen.cached, seen.pinned, seen.claims,
            seen.longest, fragmentation_of(seen.longest, there),
            used * block_bytes, there * block_bytes, (used + there) * block_bytes,
            max(sight.past.used, sight.peak.used),
            seen.moves, seen.moved, seen.moved * token_bytes, seen.copied, seen.moved_cached,
            sight.reuse.revived_tokens,
            sight.reuse.for_room + sight.reuse.for_quota + sight.reuse.cleared,
            seen.spills, seen.heals, seen.pause, arena_copies,
            seen.limbo, max(sight.past.live, sight.peak.live), max(sight.past.claims, sight.peak.claims),
            sight.peak.used, sight.peak.live, sight.peak.claims, sight.admissions, sight.frees,
            sight.refused.arena_full, sight.refused.promises, sight.refused.growth, sight.refused.past_limit,
            sight.reuse.queries, sight.reuse.query_tokens, sight.reuse.hit_tokens, sight.reuse.cold,
            sight.reuse.evicted, sight.reuse.salted, sight.reuse.partial, sight.reuse.disabled,
            sight.reuse.for_room, sight.reuse.for_quota, sight.reuse.doubles, sight.reuse.cleared,
            tuple([sight.latencies[bucket] for bucket in range(NUM_LATENCIES)]), <double>sight.nanoseconds * 1e-9,
            memory[0], memory[1], memory[2],
        )

    def reset_peaks(self):
        """Begins the recent peaks of `stats()` anew, at what there is now; those since the start stay."""
        self.known()
        self.lock_pool()
        forget_peaks(&self.pool)
        pool_unlock(&self.pool)

    def _weaken_hash(self, int bits):
        """For tests, on an empty cache: a hash of so many bits."""
        self.pool.index.hash_mask = (<uint64_t>1 << bits) - 1

    def _owners(self):
        """Who holds each block, as an int32 array in the terms of `kvcache.block_map`."""
        self.known()
        owners = np.empty(self.pool.space.blocks.num_blocks, np.int32)
        cdef int32_t[::1] cells = owners
        self.lock_pool()
        draw_owners(&self.pool, &cells[0])
        pool_unlock(&self.pool)
        return owners

    @property
    def free_blocks(self):
        """Blocks that nobody holds."""
        self.known()
        return free_blocks(&self.pool)

    @property
    def fragmentation(self):
        """``1 - largest_free_run / free_blocks``; 0.0 when nothing is free."""
        self.known()
        self.lock_pool()
        cdef int64_t there = free_blocks(&self.pool)
        cdef int64_t longest = longest_free(&self.pool)
        pool_unlock(&self.pool)
        return fragmentation_of(longest, there)

    @property
    def is_full(self):
        """Whether no block is free."""
        return self.free_blocks == 0

    def dump_block_map(self, file=None, width=64):
        """Writes the numbers and a map of the blocks, `width` to a row, to `file` (standard output by default)."""
        cdef int64_t columns = as_count(width, "width", 1)
        self.known()
        cdef bytearray cells = bytearray(self.pool.space.blocks.num_blocks)
        self.lock_pool()
        cdef int64_t there = free_blocks(&self.pool)
        cdef int64_t longest = longest_free(&self.pool)
        draw_free(&self.pool, PyByteArray_AS_STRING(cells))
        pool_unlock(&self.pool)
        print(block_map_text(cells, columns, there, longest), file=sys.stdout if file is None else file)

    def check(self):
        """Walks every structure.

        Raises
        ------
        KVCacheError
            Naming the first thing that is wrong.
        """
        self.known()
        self.lock_pool()
        kv_lock_runs_python(&self.pool.lock, True)
        try:
            wrong = check_pool(&self.pool)
            away = None if self.away is None else dict(self.away)  # before the records: who is freed leaves them first
            records = list(self.ids.values())
            dead = [record for record in records if not is_live(&self.pool, (<Allocation>record).handle)]
        finally:
            kv_lock_runs_python(&self.pool.lock, False)
            pool_unlock(&self.pool)
        self.answer(OK, None)
        if away is not None:
            dead = [record for record in dead if record.request_id not in away]
        if wrong is None and dead:
            wrong = f"{dead[0].request_id!r} is known, its sequence does not live"
        if wrong is not None:
            raise KVCacheError(wrong)
