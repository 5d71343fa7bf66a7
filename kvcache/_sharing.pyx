"""Blocks with several holders (paged placement): counted, copied before they are written, claimed until then."""

from libc.stdint cimport int32_t, int64_t

from kvcache._blocks cimport mark_free, take_lowest
from kvcache._evict cimport make_clean
from kvcache._index cimport entry_at, forget_block
from kvcache._moves cimport move_t
from kvcache._space cimport plan_reserve, seq_t
from kvcache._pool cimport (
    BUSY,
    HELD,
    MOVE_FAILED,
    NO_MEMORY,
    NO_ROOM,
    OK,
    ceil_div,
    committed_tokens,
    find_room,
    free_blocks,
    give_back,
    held_blocks,
    keep_content,
    keeps,
    move_bytes,
    my_hold,
    note_peak,
    over_budget,
    pool_t,
    refresh,
    reserve_for_holds,
    status_t,
)
from kvcache._reuse cimport cuts_pin, leave_blocks


cdef void change_holders(pool_t *pool, int64_t block, int32_t refs, int32_t writers) noexcept nogil:
    """Adds so many holders and writers; what this changes in outstanding copies is claimed or given back."""
    cdef int64_t before = copies_of(pool.refs[block], pool.writers[block])
    cdef int64_t after
    pool.refs[block] += refs
    pool.writers[block] += writers
    after = copies_of(pool.refs[block], pool.writers[block])
    pool.copies += after - before
    pool.claims += after - before


cdef void leave_block(pool_t *pool, int64_t block, bint writer) noexcept nogil:
    """One of several holders less. If the one that is left has been cut, and will write into it, nothing is found."""
    change_holders(pool, block, -1, -1 if writer else 0)
    if pool.refs[block] == 1 and pool.writers[block] and keeps(pool) and entry_at(&pool.index, block) >= 0:
        forget_block(&pool.index, block)


cdef void drop_block(pool_t *pool, int64_t block, int64_t tokens, bint writer) noexcept nogil:
    """One holder, of so many tokens in it, less; the last one gives the block back. Room for holds is reserved."""
    if pool.refs[block] > 1:
        leave_block(pool, block, writer)
        keep_content(pool, block, tokens)
        return
    pool.refs[block] = 0
    give_back(pool, block, 1)


cdef void drop_blocks(pool_t *pool, int32_t who, int64_t first, bint writer) noexcept nogil:
    """Drops a sequence's blocks from `first` on; neighbours that nobody else holds go together."""
    cdef const int32_t *table = pool.space.seqs[who].table
    cdef int64_t index = first, end = pool.space.seqs[who].blocks, run
    cdef int64_t size = pool.space.block_size, tokens = pool.space.hot[who].tokens
    if pool.space.traced:
        leave_blocks(pool, who, first)
    while index < end:
        if pool.refs[table[index]] != 1:
            if pool.refs[table[index]] > 1:  # others hold it; else it has just been cached
                drop_block(pool, table[index], min(size, tokens - index * size), writer and index == end - 1)
            index += 1
            continue
        run = index
        while index < end and pool.refs[table[index]] == 1 and table[index] - table[run] == index - run:
            pool.refs[table[index]] = 0
            index += 1
        give_back(pool, table[run], index - run)


cdef int32_t breaks_in(const seq_t *seq, int64_t first, int64_t end) noexcept nogil:
    """How many of table[first:end] are not right after the block before them."""
    cdef int32_t breaks = 0
    cdef int64_t index
    for index in range(max(first, <int64_t>1), end):
        breaks += seq.table[index] != seq.table[index - 1] + 1
    return breaks


cdef bint tail_is_shared(const pool_t *pool, int32_t who) noexcept nogil:
    """Paged: whether others hold a last block that is not full, so that it is copied before the next append."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    return (pool.space.hot[who].tokens < seq.blocks * pool.space.block_size
            and pool.refs[seq.table[seq.blocks - 1]] > 1)


cdef bint is_shared(const pool_t *pool, int32_t who) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index
    if pool.paged:
        for index in range(seq.blocks):
            if pool.refs[seq.table[index]] > 1:
                return True
        return False
    return cuts_pin(pool, who, 0)


# ---- a block of one's own

cdef void wish_copies(pool_t *pool, int32_t who, int64_t first, int64_t last, wish_t *wish) noexcept nogil:
    """Counts the copies that blocks [first, last) need. Until `unwish_copies` the sequence counts as having left them,
    so that whoever shares them with it and wishes next needs one copy less."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    cdef int64_t index
    cdef int32_t block
    for index in range(first, last):
        block = seq.table[index]
        wish.copies += pool.refs[block] > 1
        wish.unclaimed += copies_of(pool.refs[block], pool.writers[block])
        pool.refs[block] -= 1
        pool.writers[block] -= writer and index == seq.blocks - 1
        wish.unclaimed -= copies_of(pool.refs[block], pool.writers[block])


cdef void unwish_copies(pool_t *pool, int32_t who, int64_t first, int64_t last) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    cdef int64_t index
    for index in range(first, last):
        pool.refs[seq.table[index]] += 1
        pool.writers[seq.table[index]] += writer and index == seq.blocks - 1


cdef status_t may_copy(pool_t *pool, const wish_t *wish) noexcept nogil:
    """Whether so many copies can be made now, all of them."""
    if wish.copies == 0:
        return OK
    pool.wanted = wish.copies
    pool.unclaimed = min(free_blocks(pool),
                         pool.budget - held_blocks(pool) - pool.claims + wish.unclaimed)
    return NO_ROOM if over_budget(pool, wish.copies - wish.unclaimed) else find_room(pool, wish.copies)


cdef status_t own_blocks(pool_t *pool, int32_t who, int64_t first, int64_t last, bint patient) noexcept nogil:
    """Paged: copies those of a sequence's blocks [first, last) that others hold too."""
    cdef wish_t wish = wish_t(copies=0, unclaimed=0)
    cdef status_t status
    wish_copies(pool, who, first, last, &wish)
    unwish_copies(pool, who, first, last)
    status = may_copy(pool, &wish)
    if wish.copies == 0 or status != OK:
        return status
    if not patient:
        return BUSY
    if plan_reserve(&pool.space.plan, wish.copies) or reserve_for_holds(pool, wish.copies):
        return NO_MEMORY
    return copy_shared(pool, who, first, last, wish.copies)


cdef status_t copy_shared(pool_t *pool, int32_t who, int64_t first, int64_t last, int64_t shared) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size, tokens = pool.space.hot[who].tokens
    cdef int64_t index, copied = 0
    cdef bint writer = is_writer(pool, who, tokens, seq.limit)
    cdef int32_t *fresh = pool.space.plan.who
    cdef move_t *moves = pool.space.plan.moves
    make_clean(pool, shared)
    take_lowest(&pool.space.blocks, shared, fresh)
    for index in range(first, last):
        if pool.refs[seq.table[index]] > 1:
            moves[copied] = move_t(source=seq.table[index], destination=fresh[copied], blocks=1)
            copied += 1
    if move_bytes(pool, moves, shared) != OK:
        for index in range(shared):
            mark_free(&pool.space.blocks, fresh[index], 1)
        return MOVE_FAILED
    copied = 0
    for index in range(first, last):
        if pool.refs[seq.table[index]] > 1:
            drop_block(pool, seq.table[index], min(size, tokens - index * size), writer and index == seq.blocks - 1)
            seq.table[index] = fresh[copied]
            pool.refs[fresh[copied]] = 1
            pool.copied_tokens += min(size, tokens - index * size)
            copied += 1
    seq.breaks = breaks_in(seq, 0, seq.blocks)
    seq.version += 1
    refresh(pool, who)
    note_peak(pool)
    pool.changes += 1
    return OK


cdef status_t share_blocks(pool_t *pool, int32_t who, int32_t twin, int64_t claim) noexcept nogil:
    """Paged: the twin's table names the same blocks."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, tail, copies = 0
    cdef int32_t block
    cdef int32_t writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    if seq.blocks and writer:
        tail = seq.table[seq.blocks - 1]
        if pool.refs[tail] > 1:
            copies = copies_of(pool.refs[tail] + 1, pool.writers[tail] + 1)
            copies -= copies_of(pool.refs[tail], pool.writers[tail])
        else:
            copies = 1
    if over_budget(pool, claim + copies):
        return NO_ROOM
    if (pool.num_holders > (my_hold(pool) != NULL) and pool.move != NULL
            and committed_tokens(pool, who) < pool.space.hot[who].tokens):
        return HELD  # what another thread's step still writes would be written to a copy
    for index in range(seq.blocks):
        block = seq.table[index]
        if pool.refs[block] == 1:
            pool.writers[block] = writer if index == seq.blocks - 1 else 0
        change_holders(pool, block, 1, writer if index == seq.blocks - 1 else 0)
        pool.space.seqs[twin].table[index] = block
    return OK


cdef bint over_budget_after_cut(const pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t keep = ceil_div(tokens, pool.space.block_size)
    cdef int64_t index, more = 0, refs, writers
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    for index in range(keep, seq.blocks):
        refs, writers = pool.refs[seq.table[index]], pool.writers[seq.table[index]]
        if refs > 1:  # stays with others, and is claimed anew
            more += 1 - copies_of(refs, writers)
            more += copies_of(refs - 1, writers - (writer and index == seq.blocks - 1))
    if is_writer(pool, who, tokens, seq.limit):
        refs, writers = pool.refs[seq.table[keep - 1]], pool.writers[seq.table[keep - 1]]
        if refs > 1 and not (keep == seq.blocks and writer):
            more += copies_of(refs, writers + 1) - copies_of(refs, writers)
    return more > 0 and over_budget(pool, more)
