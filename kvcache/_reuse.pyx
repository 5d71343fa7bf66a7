"""What is known of a sequence's tokens, and what of it is found.

Blocks enter the index as they are named and committed, leave it when they are cut or overwritten, and stay, cached,
when their last holder goes.
"""

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from kvcache._blocks cimport NOWHERE, mark_free
from kvcache._evict cimport cache_run
from kvcache._index cimport (
    cache_block,
    cached_copy,
    enter_block,
    entry_at,
    forget_block,
    has_twin,
    is_pinned,
    join_entry,
    parent_of,
)
from kvcache._leaves cimport prefer
from kvcache._policy cimport HIT, INSERTED, LET_GO, touch
from kvcache._pool cimport committed_tokens, keeps, note_lately, pool_t, slot_of
from kvcache._space cimport seq_t

cdef enum:
    UNNAMED = -1    # an id that nobody has said yet, in a block that two sequences may name


# ---- names

cdef bint may_name(const pool_t *pool, int32_t who, int64_t start, const int32_t *ids, int64_t count) noexcept nogil:
    """Whether tokens from `start` on may have these ids: those that have one already, or share a block, agree, and so
    do those of a block that is found by the names that one who has gone gave it.
    """
    cdef int64_t size = pool.space.block_size, index, slot
    cdef bint named
    for index in range(count):
        slot = slot_of(pool, who, start + index)
        named = pool.paged and pool.refs[slot // size] > 1 and pool.index.ids[slot] != UNNAMED
        if named or start + index < pool.space.seqs[who].known or entry_at(&pool.index, slot // size) >= 0:
            if pool.index.ids[slot] != ids[index]:
                return False
    return True


cdef void begin_names(pool_t *pool) noexcept nogil:
    """Before the first name of all: what several sequences share by then has none."""
    cdef int64_t size = pool.space.block_size, block, at
    if pool.space.traced or not keeps(pool):
        return
    pool.space.traced = True
    for block in range(pool.space.blocks.num_blocks if pool.paged else 0):
        for at in range(block * size, (block + 1) * size if pool.refs[block] > 1 else 0):
            pool.index.ids[at] = UNNAMED


cdef void note_ids(pool_t *pool, int32_t who, int64_t start, const int32_t *ids, int64_t count) noexcept nogil:
    """Says which tokens they are from `start` on. Known is an unbroken run from 0, so beyond a gap nothing is noted."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size, position = start, end = start + count, length
    if not keeps(pool) or start > seq.known or end <= seq.known:
        return
    begin_names(pool)
    while position < end:
        length = min(size - position % size, end - position)
        memcpy(&pool.index.ids[slot_of(pool, who, position)], &ids[position - start], length * sizeof(int32_t))
        position += length
    seq.known = <int32_t>end
    index_more(pool, who)


cdef void share_names(pool_t *pool, int32_t who) noexcept nogil:
    """Paged, before a fork: what nobody has named yet is said to be so, since two may name it."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t position
    for position in range(seq.known, pool.space.hot[who].tokens if keeps(pool) else 0):
        if entry_at(&pool.index, block_at(pool, who, position // pool.space.block_size)) < 0:
            pool.index.ids[slot_of(pool, who, position)] = UNNAMED


# ---- entries of a live sequence

cdef void index_more(pool_t *pool, int32_t who) noexcept nogil:
    """Enters the whole blocks whose tokens are known and committed."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t whole = min(<int64_t>seq.known, committed_tokens(pool, who)) // pool.space.block_size
    while seq.indexed < whole and index_next(pool, who, whole):
        seq.indexed += 1


cdef inline bint index_next(pool_t *pool, int32_t who, int64_t whole) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t block = block_at(pool, who, seq.indexed)
    cdef int32_t parent = -1 - seq.salt, entry = entry_at(&pool.index, block)
    if seq.indexed:
        parent = entry_at(&pool.index, block_at(pool, who, seq.indexed - 1))
        if parent < 0:
            return False
    if entry >= 0:  # it is shared, and the other holder came first
        return parent_of(&pool.index, entry) == parent or (parent < 0 and pool.index.entries[entry].parent == parent)
    entry = enter_block(&pool.index, parent, block)
    if not pool.paged:
        pool.space.blocks.cells[block].a = run_with(pool, who, seq.indexed)
    touch(&pool.policy, &pool.index, entry, HIT if has_twin(&pool.index, block) else INSERTED, seq.indexed, whole)
    if pool.paged and pool.index.entries[entry].cached:
        drop_cached_twin(pool, entry)
    if seq.priority:
        prefer(&pool.index.leaves, entry, seq.priority, seq.expires)
    return True


cdef void drop_cached_twin(pool_t *pool, int32_t entry) noexcept nogil:
    """Paged: a block that somebody holds has the content, so that the cached one is free."""
    cdef int64_t block = cached_copy(&pool.index, entry)
    forget_block(&pool.index, block)
    mark_free(&pool.space.blocks, block, 1)
    pool.sight.reuse.doubles += 1


cdef inline int32_t run_with(const pool_t *pool, int32_t who, int64_t index) noexcept nogil:
    """Contiguous: the place of the run that has this block of the sequence."""
    while index >= <int64_t>pool.space.seqs[who].before + pool.space.seqs[who].blocks:
        who = pool.space.seqs[who].next_run
    return who


cdef void unindex(pool_t *pool, int32_t who, int64_t keep) noexcept nogil:
    """Blocks from `keep` on are cut or overwritten: those that nobody else holds lose their content."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, block
    for index in range((seq.blocks if pool.paged else seq.indexed) - 1, keep - 1, -1):
        block = block_at(pool, who, index)
        if entry_at(&pool.index, block) >= 0 and not (pool.paged and pool.refs[block] > 1):
            forget_block(&pool.index, block)
    seq.indexed = min(seq.indexed, <int32_t>keep)


cdef bint cuts_pin(const pool_t *pool, int32_t who, int64_t first) noexcept nogil:
    """Contiguous: whether a pin holds one of a sequence's blocks from `first` on, so that they cannot be cut."""
    cdef int64_t index
    for index in range(first, pool.space.seqs[who].indexed if pool.index.pinned_blocks else 0):
        if is_pinned(&pool.index, block_at(pool, who, index)):
            return True
    return False


cdef void disown(pool_t *pool, int32_t who, int64_t start, int64_t count) noexcept nogil:
    """Positions from `start` on have been written: what others, who have gone, had entered there is overwritten."""
    cdef int64_t size = pool.space.block_size, index, block
    for index in range(max(start // size, <int64_t>pool.space.seqs[who].indexed), (start + count + size - 1) // size):
        block = block_at(pool, who, index)
        if entry_at(&pool.index, block) >= 0 and not (pool.paged and pool.refs[block] > 1):
            forget_block(&pool.index, block)


cdef void index_twin(pool_t *pool, int32_t who, int32_t twin) noexcept nogil:
    """A fork, whose blocks are copies or shared, knows what its parent knows."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef seq_t *other = &pool.space.seqs[twin]
    cdef int64_t index, block
    other.salt, other.known, other.indexed = seq.salt, seq.known, seq.indexed
    other.priority, other.expires = seq.priority, seq.expires
    for index in range(0 if pool.paged else seq.indexed):
        block = block_at(pool, twin, index)
        join_entry(&pool.index, entry_at(&pool.index, block_at(pool, who, index)), block)
        pool.space.blocks.cells[block].a = run_with(pool, twin, index)


# ---- blocks whose last holder goes

cdef void leave_blocks(pool_t *pool, int32_t who, int64_t first) noexcept nogil:
    """Paged: of the sequence's blocks from `first` on, those that it alone holds, and that are found, become cached.

    They have no holder then. What is elsewhere too is forgotten. Room for holds has been reserved.
    """
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef bint fresh = pool.num_holders > 0
    cdef int64_t index
    cdef int32_t block, entry
    for index in range(seq.blocks - 1, first - 1, -1):
        block = seq.table[index]
        entry = entry_at(&pool.index, block)
        if entry < 0 or pool.refs[block] > 1:
            continue
        touch(&pool.policy, &pool.index, entry, LET_GO, index, seq.blocks)
        if has_twin(&pool.index, block):
            forget_block(&pool.index, block)
            continue
        pool.refs[block] = 0
        cache_block(&pool.index, block, fresh)
        if fresh:
            note_lately(pool, block, 1)


cdef int64_t worth_keeping(pool_t *pool, int32_t who) noexcept nogil:
    """Contiguous: how many of a sequence's blocks stay as cached runs; the last ones, if elsewhere too, are forgotten.
    """
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t block
    while seq.indexed:
        block = block_at(pool, who, seq.indexed - 1)
        if not has_twin(&pool.index, block) or is_pinned(&pool.index, block):
            break
        touch(&pool.policy, &pool.index, entry_at(&pool.index, block), LET_GO, seq.indexed - 1, seq.blocks)
        forget_block(&pool.index, block)
        seq.indexed -= 1
    return seq.indexed


cdef void leave_runs(pool_t *pool, int32_t who, int64_t keep) noexcept nogil:
    """Contiguous: a sequence that has `keep` blocks, all of them found, ends; its runs stay as cached ones."""
    cdef bint fresh = pool.num_holders > 0
    cdef int64_t index, block
    cdef int32_t run = who, after
    for index in range(keep - 1, -1, -1):
        block = block_at(pool, who, index)
        touch(&pool.policy, &pool.index, entry_at(&pool.index, block), LET_GO, index, keep)
        if not is_pinned(&pool.index, block):
            cache_block(&pool.index, block, fresh)
    pool.space.hot[who].generation += 1
    pool.space.live -= 1
    while run != NOWHERE:
        after = pool.space.seqs[run].next_run
        pool.space.further -= run != who
        if fresh:
            note_lately(pool, pool.space.seqs[run].start, pool.space.seqs[run].blocks)
        cache_run(pool, run)
        run = after
