"""What there is, and what there would be, in blocks: for whoever decides beforehand.

A prompt shares, in paged placement, the blocks of its prefix that others hold. Those that are merely cached cost as
much as free ones, since they are free until then.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._admit cimport most_hits
from kvcache._index cimport entry_at, is_cached, is_pinned, match_ids
from kvcache._pool cimport (
    ceil_div,
    free_blocks,
    held_blocks,
    is_live,
    place_of,
    reserve_found,
    waiting_blocks,
)
from kvcache._reuse cimport block_at
from kvcache._sharing cimport copies_of, is_writer, tail_is_shared
from kvcache._space cimport growth_of, held, seq_t


cdef room_t room_for(pool_t *pool, const request_t *request) noexcept nogil:
    """For a prompt, or for anybody if it is NULL."""
    cdef room_t room
    room.there = free_blocks(pool) + waiting_blocks(pool)
    room.unclaimed = pool.budget - held_blocks(pool) - pool.claims
    room.shared = shared_hits(pool, request)
    return room


cdef int64_t shared_hits(pool_t *pool, const request_t *request) noexcept nogil:
    """How many blocks of the prompt are there, and held."""
    cdef int64_t index, shared = 0
    for index in range(find_hits(pool, request)):
        shared += has_holder(pool, pool.found[index])
    return shared


cdef int64_t find_hits(pool_t *pool, const request_t *request) noexcept nogil:
    """Paged: how many entries the prompt hits, which are found; contiguous placement copies them, none are shared."""
    cdef int64_t most = 0 if request == NULL or not pool.paged else most_hits(pool, request)
    if most == 0 or reserve_found(pool, most):
        return 0
    return match_ids(&pool.index, request.salt, request.ids, most, pool.found)


cdef bint has_holder(const pool_t *pool, int32_t entry) noexcept nogil:
    """Paged: whether any block with the content of an entry is held."""
    cdef int64_t block = pool.index.entries[entry].block
    while block >= 0:
        if not is_cached(&pool.index, block) and pool.refs[block] > 0:
            return True
        block = <int64_t>pool.index.next_copy[block] - 1
    return False


cdef room_t room_without(pool_t *pool, const handle_t *handles, int64_t count, const request_t *request,
                         int64_t *blocks, int64_t *claims) noexcept nogil:
    """The room as it would be if these sequences had ended. `blocks` and `claims` are told what each has a part in: of
    what would come free, a block that several of them share is a part of each, and one that the prompt needs of none.
    """
    cdef int64_t index, freed = 0, unclaimed = 0, hits
    cdef room_t room
    for index in range(count):
        blocks[index] = claims[index] = 0
        if is_live(pool, handles[index]):
            claims[index] = growth_of(&pool.space, &pool.space.seqs[place_of(handles[index])])
            if pool.paged:
                claims[index] += leave_shared(pool, place_of(handles[index]), &freed)
            unclaimed += claims[index]
    room = room_for(pool, request)
    hits = find_hits(pool, request)
    for index in range(count):
        if is_live(pool, handles[index]):
            blocks[index] = own_blocks_of(pool, place_of(handles[index]), hits)
            if not pool.paged:
                freed += blocks[index]
    for index in range(count if pool.paged else 0):
        if is_live(pool, handles[index]):
            join_shared(pool, place_of(handles[index]))
    room.there += freed
    room.unclaimed += freed + unclaimed
    return room


cdef int64_t leave_shared(pool_t *pool, int32_t who, int64_t *freed) noexcept nogil:
    """Until `join_shared` the sequence counts as having left its blocks; which copies are no longer claimed then."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    cdef int64_t index, copies = 0
    cdef int32_t block
    for index in range(seq.blocks):
        block = seq.table[index]
        copies += copies_of(pool.refs[block], pool.writers[block])
        pool.refs[block] -= 1
        pool.writers[block] -= writer and index == seq.blocks - 1
        copies -= copies_of(pool.refs[block], pool.writers[block])
        freed[0] += pool.refs[block] == 0
    return copies


cdef void join_shared(pool_t *pool, int32_t who) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    cdef int64_t index
    for index in range(seq.blocks):
        pool.refs[seq.table[index]] += 1
        pool.writers[seq.table[index]] += writer and index == seq.blocks - 1


cdef int64_t own_blocks_of(const pool_t *pool, int32_t who, int64_t hits) noexcept nogil:
    """Blocks of a sequence that nobody else holds, no pin either; paged: of one that has left them, without those of
    the hits that nobody holds then.
    """
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, count = 0
    cdef int32_t entry
    if pool.paged:
        for index in range(seq.blocks):
            if pool.refs[seq.table[index]] == 0:
                entry = entry_at(&pool.index, seq.table[index]) if index < hits else -1
                count += entry < 0 or entry != pool.found[index] or has_holder(pool, entry)
        return count
    for index in range(seq.indexed if pool.index.pinned_blocks else 0):
        count -= is_pinned(&pool.index, block_at(pool, who, index))
    return count + held(seq)


cdef int64_t need_of(const pool_t *pool, int32_t who, int64_t more) noexcept nogil:
    """Blocks that so many more tokens of a sequence take, the copy of a shared last one included."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t need = max(ceil_div(pool.space.hot[who].tokens + more, pool.space.block_size) - held(seq), <int64_t>0)
    return need + (more > 0 and pool.paged and tail_is_shared(pool, who))


cdef int64_t growth_for(const pool_t *pool, int32_t who) noexcept nogil:
    """How many more tokens of a sequence the blocks that are free have room for, its limit left aside."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t there = free_blocks(pool) + waiting_blocks(pool)
    cdef int64_t beside = held(seq) * pool.space.block_size - pool.space.hot[who].tokens
    if pool.paged and tail_is_shared(pool, who):
        return beside + (there - 1) * pool.space.block_size if there else 0
    return beside + there * pool.space.block_size
