"""Slides: however many runs it takes, packed together to gather the free blocks between them.

What windows do not find: they look at a bounded number of runs, these at as many as it takes to find room at all.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport block_is_free, blocks_t, gap_at, gap_start, next_free
from kvcache._space cimport end_of, gap_before, owner_at, plan_move, room_after, run_tokens, seq_t

cdef enum:
    MOST_LOOKED = 256  # gaps that a search looks at, unless it has found no room yet

ctypedef struct reach_t:   # what a slide towards one side collects
    int64_t edge           # the outer end of the last gap reached
    int64_t gap            # blocks of that gap
    int64_t room           # free blocks collected
    int64_t tokens         # used tokens that would move


# ---- a newcomer

cdef int64_t next_gap(const space_t *space, int64_t block, int64_t *tokens) noexcept nogil:
    """The first gap at or after `block`, which begins a run or a gap; adds up the used tokens on the way."""
    cdef int32_t who
    while block < space.blocks.num_blocks and not block_is_free(&space.blocks, block):
        who = space.blocks.cells[block].a
        tokens[0] += run_tokens(space, who)
        block += space.seqs[who].blocks
    return block


cdef void slide_for_newcomer(space_t *space, int64_t length) noexcept nogil:
    """Plans to slide the runs between two gaps together, where that moves the fewest tokens; so much is free.

    Looks at a bounded stretch of the pool, a different one each time, unless there is too little room in it.
    """
    cdef blocks_t *blocks = &space.blocks
    cdef int64_t tokens = 0, room, passed, fewest = INT64_MAX, low = 0, high = 0, looked = 0
    cdef int64_t left = first_gap(blocks, space.cursor)
    cdef int64_t right = left
    room = blocks.cells[right].length
    while fewest == INT64_MAX or looked < MOST_LOOKED:
        while room < length and right < blocks.num_blocks:
            right = next_gap(space, right + blocks.cells[right].length, &tokens)
            looked += 1
            if right < blocks.num_blocks:
                room += blocks.cells[right].length
        if room < length:
            if fewest < INT64_MAX or space.cursor == 0:
                break
            space.cursor = 0  # nothing up to the end of the pool: from its beginning
            left = right = first_gap(blocks, 0)
            room, tokens = blocks.cells[right].length, 0
            continue
        while room - blocks.cells[left].length >= length:  # the rest of the window suffices
            passed = 0
            room -= blocks.cells[left].length
            left = next_gap(space, left + blocks.cells[left].length, &passed)
            tokens -= passed
        if tokens < fewest:
            fewest, low, high = tokens, left, right + blocks.cells[right].length
        passed = 0
        room -= blocks.cells[left].length
        left = next_gap(space, left + blocks.cells[left].length, &passed)
        tokens -= passed
    space.cursor = 0 if right >= blocks.num_blocks else right
    space.plan.gap = space.plan.start = pack_left(space, low, high, low)


cdef int64_t first_gap(const blocks_t *blocks, int64_t block) noexcept nogil:
    """The gap that `block` lies in, or the first one after it, or the first one of all; there is one."""
    block = next_free(blocks, block)
    if block >= blocks.num_blocks:
        block = next_free(blocks, 0)
    return gap_start(blocks, block)


# ---- growth

cdef (reach_t, reach_t) reach(const space_t *space, int32_t who, int64_t more) noexcept nogil:
    """Extends a window around a run, gap by gap towards the cheaper side, until it holds `more` free blocks."""
    cdef const seq_t *seq = &space.seqs[who]
    cdef int64_t end = seq.start + seq.blocks
    cdef reach_t left = reach_t(edge=seq.start, gap=0, room=0, tokens=run_tokens(space, who))
    cdef reach_t right = reach_t(edge=end, gap=0, room=0, tokens=0)
    cdef reach_t further_left, further_right
    right.gap = right.room = room_after(space, seq)
    right.edge += right.gap
    further_left = reach_left(space, left)
    further_right = reach_right(space, right)
    while True:
        if further_left.gap and (further_right.gap == 0 or further_left.tokens <= further_right.tokens):
            left = further_left
            if left.room + right.room >= more:
                break
            further_left = reach_left(space, left)
        else:
            right = further_right
            if left.room + right.room >= more:
                break
            further_right = reach_right(space, right)
    if right.room >= more or left.room == 0:  # one side is enough
        left = reach_t(edge=seq.start, gap=0, room=0, tokens=0)
    elif left.room + room_after(space, seq) >= more:
        right = reach_t(edge=end + room_after(space, seq), gap=0, room=room_after(space, seq), tokens=0)
    return left, right


cdef reach_t reach_left(const space_t *space, reach_t side) noexcept nogil:
    """One gap further; `gap` is 0 where there is none."""
    cdef int32_t who
    side.gap = gap_before(space, side.edge)
    while side.gap == 0 and side.edge > 0:
        who = owner_at(space, side.edge - 1)
        side.tokens += run_tokens(space, who)
        side.edge -= space.seqs[who].blocks
        side.gap = gap_before(space, side.edge)
    side.edge -= side.gap
    side.room += side.gap
    return side


cdef reach_t reach_right(const space_t *space, reach_t side) noexcept nogil:
    cdef int32_t who
    side.gap = 0
    while side.gap == 0 and side.edge < space.blocks.num_blocks:
        who = owner_at(space, side.edge)
        side.tokens += run_tokens(space, who)
        side.edge += space.seqs[who].blocks
        side.gap = gap_at(&space.blocks, side.edge)
    side.edge += side.gap
    side.room += side.gap
    return side


cdef void slide_for_growth(space_t *space, int32_t who, int64_t more) noexcept nogil:
    """Opens a hole right after the run; half of what is not needed stays at the outer gaps."""
    cdef int64_t end = end_of(&space.seqs[who])
    cdef reach_t left, right
    cdef int64_t kept, kept_left
    left, right = reach(space, who, more)
    kept = (left.room + right.room - more) >> 1
    kept_left = min(kept, left.gap)
    if right.tokens:
        pack_right(space, end, right.edge, right.edge - min(kept - kept_left, right.gap))
    if left.room:
        pack_left(space, left.edge, end, left.edge + kept_left)


# ---- packing: left-movers from the left end, right-movers from the right end

cdef int64_t pack_left(space_t *space, int64_t low, int64_t high, int64_t to) noexcept nogil:
    """Plans the runs of [low, high) one after another from `to` on; returns where they end."""
    cdef int64_t block = low
    cdef int32_t who
    while block < high:
        if block_is_free(&space.blocks, block):
            block += space.blocks.cells[block].length
            continue
        who = space.blocks.cells[block].a
        plan_move(space, who, to)
        to += space.seqs[who].blocks
        block += space.seqs[who].blocks
    return to


cdef int64_t pack_right(space_t *space, int64_t low, int64_t high, int64_t to) noexcept nogil:
    """Plans the runs of [low, high) so that the last one ends at `to`; returns where they begin."""
    cdef int64_t block = high
    cdef int32_t who
    while block > low:
        if block_is_free(&space.blocks, block - 1):
            block -= space.blocks.cells[block - 1].length
            continue
        who = space.blocks.cells[block - 1].a
        block -= space.seqs[who].blocks
        to -= space.seqs[who].blocks
        plan_move(space, who, to)
    return to
