"""Pins, quotas, and the end of everything that is cached.

A pin is one more holder of every block of a prefix. One block of each entry is pinned; in contiguous placement it stays
where it is when its sequence ends, in a run that nobody continues, and moves like any other.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t

from kvcache._blocks cimport give_run, mark_free
from kvcache._evict cimport keep_quota, uncache_run
from kvcache._index cimport (
    bit_of,
    cache_block,
    entry_at,
    forget_block,
    is_cached,
    is_pinned,
    parent_of,
    pin_block,
    uncache_block,
    unpin_block,
)
from kvcache._journal cimport CLEARED, journal_t, write_down
from kvcache._leaves cimport count_quota, join_quota, quota_of, set_quota
from kvcache._policy cimport LET_GO, touch
from kvcache._pool cimport (
    NO_MEMORY,
    NO_ROOM,
    OK,
    STALE,
    end_run,
    give_back,
    note_lately,
    note_peak,
    over_budget,
    pool_t,
    reserve_found,
    reserve_lately,
    reserve_limbo,
    status_t,
)
from kvcache._reuse cimport block_at
from kvcache._sharing cimport change_holders, leave_block


# ---- pins

cdef status_t pin_live(pool_t *pool, int32_t who, int64_t *count, pin_t *pin) noexcept nogil:
    """Pins what of a live sequence is entered; `count` is told how many blocks."""
    cdef int64_t index
    count[0] = pool.space.seqs[who].indexed
    if reserve_found(pool, count[0]):
        return NO_MEMORY
    for index in range(count[0]):
        pool.found[index] = entry_at(&pool.index, block_at(pool, who, index))
    return pin_found(pool, count[0], pin)


cdef status_t pin_found(pool_t *pool, int64_t count, pin_t *pin) noexcept nogil:
    """Pins the first `count` entries that have been found; NO_ROOM where more would be held than may be."""
    cdef int32_t *block = &pool.found[pool.found_capacity]
    cdef int64_t index, old, more = 0
    choose_blocks(pool, count)
    for index in range(count):
        more += is_cached(&pool.index, block[index])
        if pool.index.pins[pool.found[index]]:
            old = pinned_block(pool, pool.found[index])
            more -= old != block[index] and not is_held(pool, old)
    if count == 0 or (more > 0 and over_budget(pool, more)):
        return NO_ROOM
    if pool.num_holders and reserve_lately(pool, count):
        return NO_MEMORY
    for index in range(count):
        old = pinned_block(pool, pool.found[index]) if pool.index.pins[pool.found[index]] else -1
        pool.index.pins[pool.found[index]] += 1
        if old != block[index]:
            hold_block(pool, block[index])
            block[index] = <int32_t>old
        else:
            block[index] = -1
    for index in range(count - 1, -1, -1):
        if block[index] >= 0:
            unpin_block(&pool.index, block[index])
            let_go_of(pool, block[index])
    pin[0] = <pin_t>pool.index.entries[pool.found[count - 1]].generation << 32 | <pin_t>pool.found[count - 1]
    note_peak(pool)
    pool.changes += 1
    return OK


cdef void choose_blocks(pool_t *pool, int64_t count) noexcept nogil:
    """Which block of each entry is pinned, told behind what was found; an earlier pin moves there.

    The last one first: so what is pinned of a run has nothing cached between it, and its beginning and its end, if
    they are not, may still be evicted.
    """
    cdef int32_t *chosen = &pool.found[pool.found_capacity]
    cdef int64_t index, block = 0
    for index in range(count - 1, -1, -1):
        if not pool.paged and block > 0 and entry_at(&pool.index, block - 1) == pool.found[index]:
            block -= 1
        elif pool.index.pins[pool.found[index]]:
            block = pinned_block(pool, pool.found[index])
        else:
            block = pool.index.entries[pool.found[index]].block
        chosen[index] = <int32_t>block


cdef inline bint is_held(const pool_t *pool, int64_t block) noexcept nogil:
    """Whether a live sequence holds a block that is pinned."""
    if pool.paged:
        return pool.refs[block] > 1
    return pool.space.hot[pool.space.seqs[pool.space.blocks.cells[block].a].head].generation & 1


cdef void hold_block(pool_t *pool, int64_t block) noexcept nogil:
    """The first pin of a block; of several those that come earlier first."""
    cdef bint alone = is_cached(&pool.index, block)
    if alone:
        uncache_block(&pool.index, block)
    pin_block(&pool.index, block)
    if pool.paged and alone:
        pool.refs[block] = 1
    elif pool.paged:
        if pool.refs[block] == 1:
            pool.writers[block] = 0  # it is full
        change_holders(pool, block, 1, 0)


cdef status_t unpin(pool_t *pool, pin_t pin) noexcept nogil:
    """Takes one pin from an entry and all before it. STALE: everything has been forgotten since."""
    cdef int32_t last = <int32_t><uint32_t>pin
    cdef int32_t entry = last, before
    cdef int64_t depth = 0
    if pool.index.entries[last].generation != pin >> 32:
        return STALE
    while entry >= 0:
        depth += 1
        entry = parent_of(&pool.index, entry)
    if pool.num_holders and reserve_lately(pool, depth):
        return NO_MEMORY
    entry = last
    while entry >= 0:
        depth -= 1
        before = parent_of(&pool.index, entry)
        pool.index.pins[entry] -= 1
        if pool.index.pins[entry] == 0:
            let_go(pool, entry, depth)
        entry = before
    pool.changes += 1
    return OK


cdef int64_t pinned_block(const pool_t *pool, int32_t entry) noexcept nogil:
    cdef int64_t block = pool.index.entries[entry].block
    while not is_pinned(&pool.index, block):
        block = pool.index.next_copy[block] - 1
    return block


cdef void let_go(pool_t *pool, int32_t entry, int64_t depth) noexcept nogil:
    """The last pin of an entry is gone; of several those that come later first. Room for holds has been reserved."""
    cdef int64_t block = pinned_block(pool, entry)
    touch(&pool.policy, &pool.index, entry, LET_GO, depth, depth + 1)
    unpin_block(&pool.index, block)
    let_go_of(pool, block)


cdef void let_go_of(pool_t *pool, int64_t block) noexcept nogil:
    """A block is pinned no longer: if no live sequence holds it, it is cached. Room for holds has been reserved."""
    cdef bint fresh = pool.num_holders > 0
    if held_beside(pool, block):
        return
    cache_block(&pool.index, block, fresh)
    if fresh:
        note_lately(pool, block, 1)


cdef bint held_beside(pool_t *pool, int64_t block) noexcept nogil:
    """Whether a live sequence holds a block that was pinned; in paged placement the pin is no holder then."""
    if not pool.paged:
        return is_held(pool, block)
    if pool.refs[block] > 1:
        leave_block(pool, block, False)
        return True
    pool.refs[block] = 0
    return False


# ---- quotas

cdef status_t limit_salt(pool_t *pool, int32_t salt, int64_t blocks) noexcept nogil:
    """Lets a salt have so many cached blocks; negative: as many as there are."""
    cdef bint new = quota_of(&pool.index.leaves, salt) == NULL
    cdef int32_t entry
    if blocks < 0:
        blocks = pool.index.num_blocks
    if set_quota(&pool.index.leaves, salt, blocks):
        return NO_MEMORY
    for entry in range(pool.index.touched if new else 0):
        if pool.index.entries[entry].generation & 1 and pool.index.leaves.salt[entry] == salt:
            count_quota(&pool.index.leaves, entry, pool.index.entries[entry].cached)
            join_quota(&pool.index.leaves, entry)
    keep_quota(pool, salt)
    pool.changes += 1
    return OK


# ---- the end

cdef status_t forget_everything(pool_t *pool) noexcept nogil:
    """Drops what is cached, the index and the pins; live sequences stay, and nothing more of them is kept."""
    cdef int64_t block, who, most = pool.index.pinned_blocks + pool.index.fresh_blocks
    cdef journal_t *journal = pool.index.journal
    if pool.num_holders and (reserve_lately(pool, most) or reserve_limbo(pool, most)):
        return NO_MEMORY
    for block in range(pool.index.num_blocks if pool.index.pinned_blocks else 0):
        if is_pinned(&pool.index, block):
            unpin_all(pool, block)
    pool.index.journal = NULL  # one record says it all
    for who in range(0 if pool.paged else pool.places):
        if pool.space.hot[who].generation & 1 == 0 and pool.space.seqs[who].head == who and pool.space.seqs[who].blocks:
            drop_run(pool, <int32_t>who)
    for block in range(pool.index.num_blocks):
        if entry_at(&pool.index, block) >= 0:
            drop_content(pool, block)
    for who in range(pool.places):
        pool.space.seqs[who].known = pool.space.seqs[who].indexed = 0
    pool.index.journal = journal
    if journal != NULL:
        write_down(journal, CLEARED, -1, -1, 0, NULL, 0)
    pool.num_lately = 0
    pool.changes += 1
    return OK


cdef void unpin_all(pool_t *pool, int64_t block) noexcept nogil:
    pool.index.pins[entry_at(&pool.index, block)] = 0
    unpin_block(&pool.index, block)
    let_go_of(pool, block)


cdef void drop_run(pool_t *pool, int32_t run) noexcept nogil:
    """A cached run is no more: its blocks are free, or, if some were let go under a hold, when that ends."""
    cdef int64_t start = pool.space.seqs[run].start, blocks = pool.space.seqs[run].blocks, index
    cdef bint fresh = False
    for index in range(blocks):
        fresh = fresh or bit_of(pool.index.fresh, start + index)
        forget_block(&pool.index, start + index)
    pool.sight.reuse.cleared += blocks
    uncache_run(pool, run)
    end_run(pool, run)
    if fresh:
        give_back(pool, start, blocks)
    else:
        give_run(&pool.space.blocks, start, blocks)


cdef void drop_content(pool_t *pool, int64_t block) noexcept nogil:
    """A block loses its content; in paged placement it is free if it was cached, or when the hold ends."""
    cdef bint cached = is_cached(&pool.index, block), fresh = bit_of(pool.index.fresh, block)
    forget_block(&pool.index, block)
    if cached:
        pool.sight.reuse.cleared += 1
    if fresh:
        give_back(pool, block, 1)
    elif cached:
        mark_free(&pool.space.blocks, block, 1)
