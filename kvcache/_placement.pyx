"""Placement: every sequence is one run of blocks, also in a nearly full pool, by moving little.

A newcomer goes into one of the smallest gaps that fit it, where it leaves room for its left neighbour and itself but
cuts no large gap in two. When a run cannot grow in place, the cheapest of three is chosen: it moves to a gap, its
right neighbour does, or a window of neighbours is laid out anew. When a newcomer fits in no gap, the cheapest window
is cleared: its largest runs move to gaps elsewhere, the others slide. Cheap is what moves few tokens now and is
expected to need few later (see _prices). Nothing here looks at single blocks: it steps from run to run.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport NOWHERE, gap_for, next_gap_for
from kvcache._prices cimport price_between, rates_of, rates_t, run_t, spot_in_gap, spot_t
from kvcache._slides cimport slide_for_growth, slide_for_newcomer
from kvcache._space cimport owner_at, plan_clear, plan_t, run_growth
from kvcache._windows cimport look_around, plan_window, row_t, window_for_growth, window_for_newcomer, window_t

cdef enum:
    PLENTY = 16       # free blocks per sequence from which on room is not priced, nor for one that will not grow
    MOST_SHARE = 64   # blocks of room that one neighbour gets at most
    MOST_TRIED = 4    # gaps that are tried


# ---- a newcomer

cdef bint place_in_gap(space_t *space, int64_t length, int64_t growth) noexcept nogil:
    """Plans a run of `length` blocks where nothing has to move; False if there is no such place."""
    cdef plan_t *plan = &space.plan
    cdef int64_t share = (space.blocks.free_blocks - length) // (space.live + 1)
    cdef int64_t gap
    cdef spot_t spot
    plan_clear(plan)
    if share >= PLENTY or growth == 0:
        return place_roomily(space, length, growth, min(share, <int64_t>MOST_SHARE))
    gap = gap_for(&space.blocks, length)
    if gap == NOWHERE:
        return False
    spot = best_spot(space, gap, length, growth)
    plan.gap = spot.gap
    plan.start = spot.start
    return True


cdef bint place_roomily(space_t *space, int64_t length, int64_t growth, int64_t share) noexcept nogil:
    """Into a gap that has a fair share of room as well, half of what is spare before the newcomer."""
    cdef plan_t *plan = &space.plan
    cdef int64_t room = max(min(growth, share), <int64_t>0)
    cdef int64_t gap = gap_for(&space.blocks, length + room)
    if gap == NOWHERE and room:
        gap = gap_for(&space.blocks, length)
    if gap == NOWHERE:
        return False
    plan.gap = gap
    plan.start = gap + room_before(space, gap, space.blocks.cells[gap].length - length, growth, share)
    return True


cdef int64_t room_before(const space_t *space, int64_t gap, int64_t spare, int64_t growth,
                         int64_t share) noexcept nogil:
    """Of `spare` blocks, those left at the beginning of a gap for the run before it."""
    cdef int32_t neighbour = owner_at(space, gap - 1)
    cdef int64_t theirs
    if neighbour == NOWHERE or spare <= 0:
        return 0
    theirs = run_growth(space, neighbour)
    return min(min(theirs, share), spare - min(growth, spare >> 1)) if theirs else 0


cdef spot_t best_spot(const space_t *space, int64_t gap, int64_t length, int64_t growth) noexcept nogil:
    """In `gap`, which fits, or one of the next larger ones."""
    cdef rates_t rates = rates_of(space)
    cdef run_t run = newcomer(space, length, growth)
    cdef spot_t spot, best = spot_in_gap(space, &rates, gap, &run, 0)
    for _ in range(1, MOST_TRIED):
        gap = next_gap_for(&space.blocks, gap, length)
        if gap == NOWHERE:
            break
        spot = spot_in_gap(space, &rates, gap, &run, 0)
        if spot.price < best.price:
            best = spot
    return best


cdef inline run_t newcomer(const space_t *space, int64_t length, int64_t growth) noexcept nogil:
    cdef int64_t slack = space.block_size >> 1  # on average: how full its last block is has not been said
    return run_t(blocks=length, tokens=length * space.block_size - slack, slack=slack,
                 ends=growth * space.block_size + slack)


cdef bint place_by_sliding(space_t *space, int64_t length, int64_t growth, int64_t most) noexcept nogil:
    """Plans a run of `length` blocks where something has to move; so many are free."""
    cdef rates_t rates = rates_of(space)
    cdef run_t run = newcomer(space, length, growth)
    cdef window_t window
    plan_clear(&space.plan)
    window.price = INT64_MAX
    window_for_newcomer(space, &rates, &run, most, &window)
    if window.price < INT64_MAX:
        plan_window(space, &window, length)
    else:
        slide_for_newcomer(space, length)
    return within(space, most)


cdef bint within(space_t *space, int64_t most) noexcept nogil:
    if space.plan.tokens <= most:
        return True
    plan_clear(&space.plan)
    return False


# ---- growth

cdef bint place_growth(space_t *space, int32_t who, int64_t more, int64_t most) noexcept nogil:
    """Plans moves that free `more` blocks right after a run; the caller has seen that so many are free."""
    cdef rates_t rates = rates_of(space)
    cdef row_t row
    cdef window_t window
    plan_clear(&space.plan)
    window.price = INT64_MAX
    look_around(space, &rates, who, &row)
    if row.runs[row.at].tokens <= most:
        move_away(space, &rates, &row, more, &window)
    if row.runs[row.at + 1].tokens <= most:
        move_aside(space, &rates, &row, more, &window)
    window_for_growth(space, &rates, &row, more, most, &window)
    if window.price < INT64_MAX:
        plan_window(space, &window, 0)
    else:
        slide_for_growth(space, who, more)
    return within(space, most)


cdef void move_away(const space_t *space, const rates_t *rates, const row_t *row, int64_t more,
                    window_t *best) noexcept nogil:
    """The run itself goes to a gap with `more` blocks after it."""
    cdef int64_t at = row.at
    cdef int64_t left = row.rooms[at - 1] + row.runs[at].blocks + row.rooms[at]
    cdef int64_t price = row.runs[at].tokens - row.prices[at - 1] - row.prices[at]
    price += price_between(rates, &row.runs[at - 1], &row.runs[at + 1], left)
    try_gaps(space, rates, row, at, more, price, best)


cdef void move_aside(const space_t *space, const rates_t *rates, const row_t *row, int64_t more,
                     window_t *best) noexcept nogil:
    """The right neighbour goes to a gap; its place and the gaps beside it have `more` blocks."""
    cdef int64_t at = row.at + 1, room, price
    if row.who[at] == NOWHERE:
        return
    room = row.rooms[at - 1] + row.runs[at].blocks + row.rooms[at] - more
    if room < 0:
        return
    price = row.runs[at].tokens - row.prices[at - 1] - row.prices[at]
    price += price_between(rates, &row.runs[at - 1], &row.runs[at + 1], room)
    try_gaps(space, rates, row, at, 0, price, best)


cdef void try_gaps(const space_t *space, const rates_t *rates, const row_t *row, int64_t at, int64_t more,
                   int64_t price, window_t *best) noexcept nogil:
    """For a run of the row to go to: some of the smallest gaps that fit it, but not those beside it."""
    cdef int64_t start = space.seqs[row.who[at]].start
    cdef int64_t length = row.runs[at].blocks + more
    cdef int64_t gap = gap_for(&space.blocks, length), tried = 0
    cdef spot_t spot
    while gap != NOWHERE and tried < MOST_TRIED:
        if gap != start - row.rooms[at - 1] and gap != start + row.runs[at].blocks:
            spot = spot_in_gap(space, rates, gap, &row.runs[at], more)
            tried += 1
            if price + spot.price < best.price:
                best.price = price + spot.price
                best.count = 0
                best.num_out = 1
                best.out[0] = row.who[at]
                best.starts[0] = spot.start
        gap = next_gap_for(&space.blocks, gap, length)
