"""What a pool tells of itself: latencies of admission, and who holds each block."""

from libc.stdint cimport int32_t, int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kvcache._blocks cimport NOWHERE, block_is_free, draw_blocks, largest_free_run, longest_run_of_bits
from kvcache._index cimport bit_of, is_cached, is_pinned
from kvcache._pool cimport NUM_LATENCIES, note_peak, pool_t, sight_t
from kvcache._space cimport seq_t


cdef int64_t now() noexcept nogil:
    """Nanoseconds of the monotonic clock."""
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef void note_latency(sight_t *sight, int64_t nanoseconds) noexcept nogil:
    """Counts an admission that was timed, in the first bucket whose bound (1 µs, then four times the last) it keeps."""
    cdef int64_t bucket = 0, bound = 1000
    while bucket < NUM_LATENCIES - 1 and nanoseconds > bound:
        bucket += 1
        bound *= 4
    sight.latencies[bucket] += 1
    sight.num_timed += 1
    sight.nanoseconds += nanoseconds


cdef void forget_peaks(pool_t *pool) noexcept nogil:
    """The recent peaks begin anew, at what there is; those since the start stay."""
    pool.sight.past.used = max(pool.sight.past.used, pool.sight.peak.used)
    pool.sight.past.live = max(pool.sight.past.live, pool.sight.peak.live)
    pool.sight.past.claims = max(pool.sight.past.claims, pool.sight.peak.claims)
    pool.sight.peak.used = pool.sight.peak.live = pool.sight.peak.claims = 0
    note_peak(pool)


cdef int64_t longest_free(const pool_t *pool) noexcept nogil:
    """Blocks of the longest run of those that may be had: cached ones are free."""
    if pool.index.cached_blocks == 0:
        return largest_free_run(&pool.space.blocks)
    if pool.index.fresh_blocks == 0:
        return longest_run_of_bits(&pool.space.blocks, pool.index.cached)
    return longest_beside_fresh(pool)


cdef int64_t longest_beside_fresh(const pool_t *pool) noexcept nogil:
    """Under a hold: what it has kept from being free counts as used."""
    cdef int64_t block, running = 0, longest = 0
    for block in range(pool.space.blocks.num_blocks):
        if block_is_free(&pool.space.blocks, block) or (is_cached(&pool.index, block)
                                                        and not bit_of(pool.index.fresh, block)):
            running += 1
            longest = max(longest, running)
        else:
            running = 0
    return longest


cdef void draw_free(const pool_t *pool, char *cells) noexcept nogil:
    """A map of what is free and what is used."""
    cdef int64_t block
    draw_blocks(&pool.space.blocks, cells)
    for block in range(pool.space.blocks.num_blocks if pool.index.cached_blocks else 0):
        if is_cached(&pool.index, block) and not bit_of(pool.index.fresh, block):
            cells[block] = c"."


cdef void draw_owners(const pool_t *pool, int32_t *cells) noexcept nogil:
    """The place of each block's holder, or what else a cell says; `cells` has room for all."""
    cdef int64_t block
    cdef int32_t who
    for block in range(pool.space.blocks.num_blocks):
        cells[block] = FREE_CELL if block_is_free(&pool.space.blocks, block) else WAITING_CELL
        if pool.index.cached_blocks and is_cached(&pool.index, block) and not bit_of(pool.index.fresh, block):
            cells[block] = CACHED_CELL
        elif is_pinned(&pool.index, block):
            cells[block] = PINNED_CELL
    for who in range(<int32_t>pool.places):
        if pool.space.hot[who].generation & 1 and pool.paged:
            draw_table(pool, who, cells)
        elif pool.space.hot[who].generation & 1:
            draw_runs(pool, who, cells)


cdef void draw_table(const pool_t *pool, int32_t who, int32_t *cells) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index
    cdef int32_t block
    for index in range(seq.blocks):
        block = seq.table[index]
        cells[block] = who | SHARED_CELL if pool.refs[block] > 1 else who


cdef void draw_runs(const pool_t *pool, int32_t who, int32_t *cells) noexcept nogil:
    cdef const seq_t *seq
    cdef int32_t run = who
    cdef int64_t index
    while run != NOWHERE:
        seq = &pool.space.seqs[run]
        for index in range(seq.blocks):
            cells[seq.start + index] = who
        run = seq.next_run
