"""Packs runs: all of them to the left, every sequence one run; or, with few tokens to move, where it helps most."""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport NOWHERE, block_is_free, largest_free_run, next_free
from kvcache._pool cimport NO_MEMORY, OK, add_places, pool_t, status_t, take_place
from kvcache._scatter cimport join_runs, plan_heal
from kvcache._sequences cimport carry_out
from kvcache._slides cimport pack_left, pack_right
from kvcache._space cimport end_of, own_run, plan_clear, plan_move, run_tokens, seq_t, space_t

ctypedef struct window_t:   # runs between two gaps, both included
    int64_t low             # first block of the first gap
    int64_t high            # end of the last gap
    int64_t room            # free blocks in all its gaps
    int64_t tokens          # used tokens between them


cdef status_t pack(pool_t *pool, int64_t most) noexcept nogil:
    """Moves at most `most` used tokens, or, if it is negative, as many as it takes for one gap at the end."""
    if pool.space.blocks.cells == NULL or pool.space.live == 0:
        return OK
    return pack_everything(pool) if most < 0 else pack_some(pool, most)


# ---- everything

cdef status_t pack_everything(pool_t *pool) noexcept nogil:
    cdef space_t *space = &pool.space
    cdef int64_t who = 0
    cdef status_t status
    plan_clear(&space.plan)
    pack_left(space, 0, space.blocks.num_blocks, 0)
    status = carry_out(pool)
    while status == OK and space.further and space.blocks.free_blocks and who < pool.places:
        if space.hot[who].generation & 1 and space.seqs[who].breaks:
            status = bring_next(pool, <int32_t>who)
        else:
            who += 1
    return status


cdef status_t bring_next(pool_t *pool, int32_t who) noexcept nogil:
    """Packed pool: the sequence's second run, or what of it fits into the free blocks, comes right after its first.

    It waits in the free blocks at the end while the runs between make room.
    """
    cdef space_t *space = &pool.space
    cdef int64_t spare = space.blocks.free_blocks
    cdef int64_t end, length, start
    cdef int32_t run = space.seqs[who].next_run
    cdef status_t status
    if space.seqs[run].blocks > spare and split_run(pool, run, spare):
        return NO_MEMORY
    end = end_of(&space.seqs[who])
    start, length = space.seqs[run].start, space.seqs[run].blocks
    plan_clear(&space.plan)
    plan_move(space, run, space.blocks.num_blocks - spare)
    if start > end:
        pack_right(space, end, start, start + length)
    else:
        pack_left(space, start + length, end, start)
    status = carry_out(pool)
    if status != OK:
        join_runs(pool, who)  # what has been split for this
        return status
    plan_clear(&space.plan)
    plan_move(space, run, end_of(&space.seqs[who]))
    return carry_out(pool)


cdef int split_run(pool_t *pool, int32_t run, int64_t blocks) noexcept nogil:
    """Makes a further run two: its first `blocks` blocks, and the rest."""
    cdef seq_t *first
    cdef seq_t *rest
    cdef int32_t after
    if pool.vacancies == 0 and add_places(pool):
        return -1
    after = take_place(pool)
    first, rest = &pool.space.seqs[run], &pool.space.seqs[after]
    rest.start = <int32_t>(first.start + blocks)
    rest.blocks = <int32_t>(first.blocks - blocks)
    rest.before = <int32_t>(first.before + blocks)
    rest.head, rest.next_run = first.head, first.next_run
    first.blocks = <int32_t>blocks
    first.next_run = after
    if rest.next_run == NOWHERE:
        pool.space.seqs[first.head].last_run = after
    pool.space.seqs[first.head].breaks += 1
    pool.space.further += 1
    own_run(&pool.space, run)
    own_run(&pool.space, after)
    return 0


# ---- what helps most

cdef status_t pack_some(pool_t *pool, int64_t most) noexcept nogil:
    """First scattered sequences become one run, then gaps come together while that makes the longest one longer."""
    cdef space_t *space = &pool.space
    cdef int64_t who, end = pool.moved_tokens + most
    cdef window_t window
    cdef status_t status = OK
    for who in range(pool.places):
        if (space.hot[who].generation & 1 and space.seqs[who].breaks
                and plan_heal(space, <int32_t>who, 0, end - pool.moved_tokens)):
            status = carry_out(pool)
            if status != OK:
                return status
    while status == OK:
        window = widest_window(space, end - pool.moved_tokens)
        if window.room <= largest_free_run(&space.blocks):
            return OK
        plan_clear(&space.plan)
        pack_left(space, window.low, window.high, window.low)
        status = carry_out(pool)
    return status


cdef window_t widest_window(const space_t *space, int64_t most) noexcept nogil:
    """The most room that one slide of at most `most` tokens brings together; of equals the cheapest."""
    cdef window_t best = window_t(low=0, high=0, room=0, tokens=INT64_MAX), seen
    cdef int64_t num_blocks = space.blocks.num_blocks, length
    seen.low = seen.high = next_free(&space.blocks, 0)
    seen.room = seen.tokens = 0
    while seen.high < num_blocks:
        length = space.blocks.cells[seen.high].length
        seen.high += length
        seen.room += length
        while seen.tokens > most:  # without its first gap, and the runs up to the next one
            seen.room -= space.blocks.cells[seen.low].length
            seen.low += space.blocks.cells[seen.low].length
            seen.tokens -= tokens_up_to_gap(space, &seen.low)
        if seen.room > best.room or (seen.room == best.room and seen.tokens < best.tokens):
            best = seen
        seen.tokens += tokens_up_to_gap(space, &seen.high)
    return best


cdef int64_t tokens_up_to_gap(const space_t *space, int64_t *block) noexcept nogil:
    """Used tokens of the runs from `block` on, which moves to the next gap or the end of the pool."""
    cdef int64_t tokens = 0
    cdef int32_t who
    while block[0] < space.blocks.num_blocks and not block_is_free(&space.blocks, block[0]):
        who = space.blocks.cells[block[0]].a
        tokens += run_tokens(space, who)
        block[0] += space.seqs[who].blocks
    return tokens
