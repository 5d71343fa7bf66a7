"""Cached blocks make room: first what is elsewhere too, then leaves, the least worth keeping first.

In contiguous placement they lie in cached runs, each with a place in the table of sequences, so that it is moved, and
has neighbours, like any run. Every block of such a run but the first is content right after the block before it, so a
leaf is the last block of its run, and the run becomes shorter.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._blocks cimport NOWHERE, give_run, mark_free
from kvcache._index cimport cached_copy, evict_block, forget_block, has_twin, is_cached
from kvcache._leaves cimport age, quota_of, quota_t
from kvcache._policy cimport note_evicted
from kvcache._pool cimport add_places, end_run, pool_t, take_place
from kvcache._space cimport end_of, own_ends, own_run, seq_t


cdef void make_clean(pool_t *pool, int64_t blocks) noexcept nogil:
    """Evicts until so many blocks have no content; the caller has seen that there are so many that nobody holds."""
    while pool.space.blocks.free_blocks < blocks:
        evict_one(pool)


cdef bint evict_some(pool_t *pool, int64_t blocks) noexcept nogil:
    """Evicts so many blocks, or all that there are; False if there is none."""
    cdef int64_t clean = pool.space.blocks.free_blocks
    if pool.index.cached_blocks == 0:
        return False
    while pool.index.cached_blocks and pool.space.blocks.free_blocks < clean + blocks:
        evict_one(pool)
    return True


cdef void evict_one(pool_t *pool) noexcept nogil:
    """One block, or the beginning of a run that is elsewhere too."""
    while pool.first_double != NOWHERE:
        if drop_beginning(pool, pool.first_double):
            return
    age(&pool.index.leaves, pool.policy.now)
    evict_leaf(pool, pool.index.leaves.heap.items[0])
    pool.sight.reuse.for_room += 1


cdef void evict_leaf(pool_t *pool, int32_t entry) noexcept nogil:
    """A cached block of an entry after which nothing is cached; what follows in its run is pinned, or copied from."""
    cdef int64_t block = cached_copy(&pool.index, entry)
    cdef int32_t run
    if not has_twin(&pool.index, block):
        note_evicted(&pool.policy, &pool.index, entry)
    evict_block(&pool.index, block)
    if pool.paged:
        mark_free(&pool.space.blocks, block, 1)
        return
    run = pool.space.blocks.cells[block].a
    if block + 1 < end_of(&pool.space.seqs[run]):
        split_run(pool, run, block + 1)
    shorten_run(pool, run, block - pool.space.seqs[run].start)


cdef void keep_quota(pool_t *pool, int32_t salt) noexcept nogil:
    """Evicts what is cached under a salt beyond its quota, the least worth keeping first."""
    cdef quota_t *quota = quota_of(&pool.index.leaves, salt)
    if quota == NULL or quota.cached <= quota.most:
        return
    age(&pool.index.leaves, pool.policy.now)
    while quota.cached > quota.most:
        evict_leaf(pool, quota.heap.items[0])
        pool.sight.reuse.for_quota += 1


cdef void keep_quotas(pool_t *pool) noexcept nogil:
    cdef int64_t index
    for index in range(pool.index.leaves.num_quotas):
        keep_quota(pool, pool.index.leaves.quotas[index].salt)


# ---- cached runs

cdef int reserve_splits(pool_t *pool) noexcept nogil:
    """Places for what cached runs may be split into where some of their blocks are not evicted."""
    while pool.vacancies <= pool.cached_runs + pool.index.pinned_blocks + 1:
        if add_places(pool):
            return -1
    return 0


cdef void split_run(pool_t *pool, int32_t run, int64_t at) noexcept nogil:
    """The blocks of a cached run from `at` on are a run of their own. Places have been reserved."""
    cdef int32_t rest = take_place(pool)
    cdef int64_t end = end_of(&pool.space.seqs[run])
    pool.space.seqs[rest].start, pool.space.seqs[rest].blocks = <int32_t>at, <int32_t>(end - at)
    own_run(&pool.space, rest)
    cache_run(pool, rest)
    pool.space.seqs[run].blocks -= <int32_t>(end - at)


cdef void cache_run(pool_t *pool, int32_t run) noexcept nogil:
    """A run that nobody holds any more, each of its blocks cached, is a run of its own."""
    cdef seq_t *seq = &pool.space.seqs[run]
    seq.head = seq.last_run = run
    seq.next_run = NOWHERE
    seq.before = seq.further = seq.breaks = 0
    seq.known = seq.indexed = 0
    fit_tokens(pool, run)
    pool.cached_runs += 1
    seq.next_double = seq.last_double = NOWHERE
    if has_twin(&pool.index, seq.start):
        seq.last_double = pool.last_double
        if pool.last_double != NOWHERE:
            pool.space.seqs[pool.last_double].next_double = run
        else:
            pool.first_double = run
        pool.last_double = run


cdef void uncache_run(pool_t *pool, int32_t run) noexcept nogil:
    """The run is held again, or no more."""
    drop_double(pool, run)
    pool.cached_runs -= 1


cdef void drop_double(pool_t *pool, int32_t run) noexcept nogil:
    """Takes a run out of the list of those whose beginning is elsewhere too, if it is in it."""
    cdef seq_t *seq = &pool.space.seqs[run]
    if seq.last_double != NOWHERE:
        pool.space.seqs[seq.last_double].next_double = seq.next_double
    elif pool.first_double == run:
        pool.first_double = seq.next_double
    else:
        return
    if seq.next_double != NOWHERE:
        pool.space.seqs[seq.next_double].last_double = seq.last_double
    else:
        pool.last_double = seq.last_double
    seq.next_double = seq.last_double = NOWHERE


cdef inline void fit_tokens(pool_t *pool, int32_t run) noexcept nogil:
    """A cached run is full, and does not grow."""
    cdef seq_t *seq = &pool.space.seqs[run]
    seq.limit = pool.space.hot[run].tokens = <int32_t>(seq.blocks * pool.space.block_size)
    pool.space.hot[run].soft = pool.space.hot[run].base = 0


cdef void shorten_run(pool_t *pool, int32_t run, int64_t blocks) noexcept nogil:
    """Keeps the first `blocks` blocks of a cached run; those beyond have lost their content."""
    cdef seq_t *seq = &pool.space.seqs[run]
    give_run(&pool.space.blocks, seq.start + blocks, seq.blocks - blocks)
    keep_blocks(pool, run, blocks)


cdef void keep_blocks(pool_t *pool, int32_t run, int64_t blocks) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[run]
    seq.blocks = <int32_t>blocks
    fit_tokens(pool, run)
    if blocks:
        own_ends(&pool.space, run)
    else:
        uncache_run(pool, run)
        end_run(pool, run)


cdef bint drop_beginning(pool_t *pool, int32_t run) noexcept nogil:
    """Gives back those first blocks of a cached run whose content is elsewhere too; False if there are none."""
    cdef seq_t *seq = &pool.space.seqs[run]
    cdef int64_t count = 0
    drop_double(pool, run)
    while count < seq.blocks and may_drop(pool, seq.start + count):
        count += 1
    if count:
        pool.sight.reuse.doubles += count
        drop_first(pool, run, count)
    return count > 0


cdef void drop_first(pool_t *pool, int32_t run, int64_t count) noexcept nogil:
    """Gives back the first `count` blocks of a cached run."""
    cdef seq_t *seq = &pool.space.seqs[run]
    cdef int64_t start = seq.start, index
    for index in range(count - 1, -1, -1):
        forget_block(&pool.index, start + index)
    give_run(&pool.space.blocks, start, count)
    seq.start += <int32_t>count
    keep_blocks(pool, run, seq.blocks - count)


cdef inline bint may_drop(const pool_t *pool, int64_t block) noexcept nogil:
    """Not while it is held, copied from, or let go under a hold that has not ended."""
    return (is_cached(&pool.index, block) and has_twin(&pool.index, block)
            and (pool.index.fresh[block >> 6] >> (block & 63)) & 1 == 0)
