"""Placement: every sequence is one run of blocks, also in a nearly full pool, by moving little.

A newcomer goes into the gap that fits it and what it may grow by; half of what is spare stays before it, for its
left neighbour. When a run cannot grow in place, the cheapest of three is chosen, in used tokens moved per block of
room gained: the run moves to a gap, its right neighbour does, or a window of neighbours slides together. When a
newcomer fits in no gap, the cheapest window slides. Nothing here looks at single blocks: it steps from run to run.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t
from libc.stdlib cimport free, realloc

from kvcache._blocks cimport (
    NOWHERE,
    block_is_free,
    blocks_t,
    gap_at,
    gap_for,
    gap_start,
    give_run,
    take_run,
    next_free,
)
from kvcache._moves cimport move_t

cdef enum:
    MOST_SHARE = 64   # blocks of room that one neighbour gets at most
    MOST_SLACK = 8    # blocks of room beyond which more is worth nothing
    MOST_LOOKED = 256  # gaps that a search for a window looks at, unless it has found none


ctypedef struct reach_t:   # what a slide towards one side collects
    int64_t edge           # the outer end of the last gap reached
    int64_t gap            # blocks of that gap
    int64_t room           # free blocks collected
    int64_t tokens         # used tokens that would move


cdef int plan_reserve(plan_t *plan, int64_t count) noexcept nogil:
    cdef void *who
    cdef void *moves
    if count <= plan.capacity:
        return 0
    who = realloc(plan.who, count * sizeof(int32_t))
    if who == NULL:
        return -1
    plan.who = <int32_t *>who
    moves = realloc(plan.moves, count * sizeof(move_t))
    if moves == NULL:
        return -1
    plan.moves = <move_t *>moves
    plan.capacity = count
    return 0


cdef void plan_destroy(plan_t *plan) noexcept nogil:
    free(plan.who)
    free(plan.moves)


# ---- neighbours

cdef inline int32_t owner_at(const space_t *space, int64_t block) noexcept nogil:
    """Who holds `block`, the first or last of its run; NOWHERE beyond the pool's ends and for nobody's run."""
    if block < 0 or block >= space.blocks.num_blocks:
        return NOWHERE
    return space.blocks.cells[block].a


cdef int64_t gap_before(const space_t *space, int64_t block) noexcept nogil:
    """Blocks of the gap that ends right before `block`."""
    if block == 0 or not block_is_free(&space.blocks, block - 1):
        return 0
    return space.blocks.cells[block - 1].length


cdef int64_t room_after(const space_t *space, const seq_t *seq) noexcept nogil:
    return gap_at(&space.blocks, seq.start + seq.blocks)


cdef int64_t growth_of(const space_t *space, const seq_t *seq) noexcept nogil:
    """Blocks that the sequence may still ask for."""
    return (seq.limit + space.block_size - 1) // space.block_size - held(seq)


cdef inline int64_t run_growth(const space_t *space, int32_t who) noexcept nogil:
    """Blocks that may still be asked for right after a run."""
    cdef int32_t head = space.seqs[who].head
    return growth_of(space, &space.seqs[head]) if space.seqs[head].last_run == who else 0


cdef inline int64_t fair_share(const space_t *space, int64_t taken) noexcept nogil:
    return min((space.blocks.free_blocks - taken) // (space.live + 1), <int64_t>MOST_SHARE)


cdef int64_t room_before(const space_t *space, int64_t gap, int64_t spare, int64_t growth) noexcept nogil:
    """Of `spare` blocks, those left at the beginning of a gap for the run before it."""
    cdef int32_t neighbour
    cdef int64_t theirs
    if spare <= 0:
        return 0
    neighbour = owner_at(space, gap - 1)
    if neighbour == NOWHERE:
        return 0
    theirs = run_growth(space, neighbour)
    return min(min(theirs, fair_share(space, 0)), spare - min(growth, spare >> 1)) if theirs else 0


cdef inline int64_t roomy_gap_for(const space_t *space, int64_t length, int64_t growth) noexcept nogil:
    """A gap for `length` blocks and a fair share of what they may grow by, or for `length` alone."""
    cdef int64_t room = max(min(growth, fair_share(space, length)), <int64_t>0) if growth else 0
    cdef int64_t gap = gap_for(&space.blocks, length + room)
    if gap == NOWHERE and room:
        gap = gap_for(&space.blocks, length)
    return gap


# ---- a newcomer

cdef bint place_in_gap(space_t *space, int64_t length, int64_t growth) noexcept nogil:
    """Plans a run of `length` blocks where nothing has to move; False if there is no such place."""
    cdef plan_t *plan = &space.plan
    cdef int64_t gap = roomy_gap_for(space, length, growth)
    plan.count = plan.tokens = 0
    if gap == NOWHERE:
        return False
    plan.gap = gap
    plan.start = gap + room_before(space, gap, space.blocks.cells[gap].length - length, growth)
    return True


cdef int64_t next_gap(const space_t *space, int64_t block, int64_t *tokens) noexcept nogil:
    """The first gap at or after `block`, which begins a run or a gap; adds up the used tokens on the way."""
    cdef int32_t who
    while block < space.blocks.num_blocks and not block_is_free(&space.blocks, block):
        who = space.blocks.cells[block].a
        tokens[0] += run_tokens(space, who)
        block += space.seqs[who].blocks
    return block


cdef bint place_by_sliding(space_t *space, int64_t length, int64_t growth, int64_t most) noexcept nogil:
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
    slide_for_new(space, low, high, length, growth)
    return within(&space.plan, most)


cdef int64_t first_gap(const blocks_t *blocks, int64_t block) noexcept nogil:
    """The gap that `block` lies in, or the first one after it, or the first one of all; there is one."""
    block = next_free(blocks, block)
    if block >= blocks.num_blocks:
        block = next_free(blocks, 0)
    return gap_start(blocks, block)


cdef void slide_for_new(space_t *space, int64_t low, int64_t high, int64_t length, int64_t growth) noexcept nogil:
    cdef plan_t *plan = &space.plan
    cdef int64_t before, spare, to
    cdef int64_t room = high - low - blocks_of_runs(space, low, high)
    before = room_before(space, low, min(room - length, <int64_t>space.blocks.cells[low].length), growth)
    to = pack_left(space, low, high, low + before)
    spare = min((room - length - before) >> 1, fair_share(space, length))
    plan.gap = to
    plan.start = to + spare


cdef int64_t blocks_of_runs(const space_t *space, int64_t low, int64_t high) noexcept nogil:
    cdef int64_t total = 0, block = low
    cdef int32_t who
    while block < high:
        if block_is_free(&space.blocks, block):
            block += space.blocks.cells[block].length
            continue
        who = space.blocks.cells[block].a
        total += space.seqs[who].blocks
        block += space.seqs[who].blocks
    return total


# ---- slides: left-movers from the left end, right-movers from the right end

cdef void plan_move(space_t *space, int32_t who, int64_t to) noexcept nogil:
    cdef plan_t *plan = &space.plan
    cdef seq_t *seq = &space.seqs[who]
    if to == seq.start:
        return
    plan.who[plan.count] = who
    plan.moves[plan.count] = move_t(source=seq.start, destination=to, blocks=seq.blocks)
    plan.count += 1
    plan.tokens += run_tokens(space, who)


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


# ---- growth

cdef bint place_growth(space_t *space, int32_t who, int64_t more, int64_t most) noexcept nogil:
    """Plans moves that free `more` blocks right after a run; the caller has seen that so many are free."""
    cdef plan_t *plan = &space.plan
    cdef seq_t *seq = &space.seqs[who]
    cdef int64_t away = NOWHERE, aside = NOWHERE, room_away = 0, room_aside = 0
    cdef int32_t neighbour = owner_at(space, seq.start + seq.blocks + room_after(space, seq))
    cdef reach_t left, right
    cdef double cost, cheapest
    plan.count = plan.tokens = 0
    left, right = reach(space, who, more)
    cheapest = price(slide_tokens(&left, &right), left.room + right.room)
    away = move_away(space, who, more, &room_away)
    if away != NOWHERE and price(run_tokens(space, who), room_away) <= cheapest:
        cheapest = price(run_tokens(space, who), room_away)
    else:
        away = NOWHERE
    if neighbour != NOWHERE:
        aside = move_aside(space, who, neighbour, more, &room_aside)
    if aside != NOWHERE:
        cost = price(run_tokens(space, neighbour), room_aside)
        if cost < cheapest:
            plan_move(space, neighbour, aside)
            return within(plan, most)
    if away != NOWHERE:
        plan_move(space, who, away)
    else:
        slide_for_growth(space, who, more, &left, &right)
    return within(plan, most)


cdef inline bint within(plan_t *plan, int64_t most) noexcept nogil:
    if plan.tokens <= most:
        return True
    plan.count = plan.tokens = 0
    return False


cdef inline double price(int64_t tokens, int64_t room) noexcept nogil:
    return <double>tokens / <double>min(room, <int64_t>MOST_SLACK)


cdef inline int64_t slide_tokens(const reach_t *left, const reach_t *right) noexcept nogil:
    return left.tokens + right.tokens


cdef int64_t move_away(space_t *space, int32_t who, int64_t more, int64_t *room) noexcept nogil:
    """Where the run itself could go, with `more` blocks after it."""
    cdef seq_t *seq = &space.seqs[who]
    cdef int64_t growth = growth_of(space, seq) - more
    cdef int64_t gap = roomy_gap_for(space, seq.blocks + more, growth)
    cdef int64_t spare, before
    if gap == NOWHERE:
        return NOWHERE
    spare = space.blocks.cells[gap].length - seq.blocks - more
    before = room_before(space, gap, spare, growth)
    room[0] = more + spare - before
    return gap + before


cdef int64_t move_aside(space_t *space, int32_t who, int32_t neighbour, int64_t more, int64_t *room) noexcept nogil:
    """Where the right neighbour could go, so that its place and the gaps beside it hold `more` blocks."""
    cdef seq_t *seq = &space.seqs[who]
    cdef seq_t *other = &space.seqs[neighbour]
    cdef int64_t end = seq.start + seq.blocks
    cdef int64_t beyond = other.start + other.blocks
    cdef int64_t growth = run_growth(space, neighbour)
    cdef int64_t gap = roomy_gap_for(space, other.blocks, growth)
    cdef int64_t before
    if gap == NOWHERE or gap == end:
        return NOWHERE
    before = 0
    if gap == beyond:
        room[0] = gap - end
    else:
        before = room_before(space, gap, space.blocks.cells[gap].length - other.blocks, growth)
        room[0] = beyond - end + gap_at(&space.blocks, beyond)
    return gap + before if room[0] >= more else NOWHERE


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


cdef void slide_for_growth(space_t *space, int32_t who, int64_t more, const reach_t *left,
                           const reach_t *right) noexcept nogil:
    """Opens a hole right after the run; half of what is not needed stays at the outer gaps."""
    cdef seq_t *seq = &space.seqs[who]
    cdef int64_t end = seq.start + seq.blocks
    cdef int64_t kept = (left.room + right.room - more) >> 1
    cdef int64_t kept_left = min(kept, left.gap)
    if right.tokens:
        pack_right(space, end, right.edge, right.edge - min(kept - kept_left, right.gap))
    if left.room:
        pack_left(space, left.edge, end, left.edge + kept_left)


# ---- carrying a plan out in the books

cdef void own_run(space_t *space, int32_t who) noexcept nogil:
    cdef seq_t *seq = &space.seqs[who]
    space.blocks.cells[seq.start].a = who
    space.blocks.cells[seq.start + seq.blocks - 1].a = who


cdef void settle(space_t *space) noexcept nogil:
    """Enters the planned moves, whose bytes are in place, into the books."""
    cdef plan_t *plan = &space.plan
    cdef int64_t index, to
    cdef int32_t who
    for index in range(plan.count):
        give_run(&space.blocks, plan.moves[index].source, plan.moves[index].blocks)
    for index in range(plan.count):
        who, to = plan.who[index], plan.moves[index].destination
        take_run(&space.blocks, gap_start(&space.blocks, to), to, plan.moves[index].blocks)
        space.seqs[who].start = <int32_t>to
        own_run(space, who)
        rebase(space, space.seqs[who].head)


cdef void rebase(space_t *space, int32_t who) noexcept nogil:
    """After a run of the sequence has moved: where its next token goes, and that its tokens are elsewhere."""
    cdef const seq_t *last = &space.seqs[space.seqs[who].last_run]
    space.seqs[who].version += 1
    space.hot[who].base = <int32_t>((<int64_t>last.start - last.before) * space.block_size)
