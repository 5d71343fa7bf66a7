"""Windows: runs side by side that are laid out anew, or moved out, to make room.

Every search looks at a bounded number of runs. Of what it finds, the cheapest counts: the tokens that move, and what
the layout is expected to cost afterwards compared with the one before.
"""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport NOWHERE, block_is_free, gap_at, gap_for, gap_start, next_free, next_gap_for
from kvcache._prices cimport price_between, run_of, spot_in_gap, spot_t, usable_room
from kvcache._space cimport end_of, gap_before, owner_at, plan_move, room_after, run_tokens

cdef enum:           # what becomes of a run of a window
    UNASKED = 0
    LEAVES = 1
    STAYS = 2

cdef enum:
    MOST_LOOKED = 256   # runs that a search for a newcomer's window begins with
    MOST_FOUND = 16     # windows of those that are priced
    MOST_TRIED = 4      # gaps that are tried for a run that leaves a window


ctypedef struct runs_t:     # runs in the order in which they lie
    int64_t count
    int64_t first_room      # blocks free before the first
    int64_t largest         # gap between them
    int64_t starts[MOST_LOOKED]
    int64_t tokens[MOST_LOOKED]
    int64_t blocks[MOST_LOOKED]
    int64_t rooms[MOST_LOOKED]    # blocks free after each

ctypedef struct stretch_t:   # runs that could make way
    int64_t start            # of the first
    int64_t count
    int64_t tokens           # used, in all of them

ctypedef struct stretches_t:
    int64_t count
    stretch_t items[MOST_FOUND]


# ---- looking

cdef void look_around(const space_t *space, const rates_t *rates, int32_t who, row_t *row) noexcept nogil:
    """A run and its neighbours on either side."""
    cdef int32_t first = who, before
    cdef int64_t steps = 0, index
    while steps <= MOST_SIDE and first != NOWHERE:
        before = owner_at(space, space.seqs[first].start - gap_before(space, space.seqs[first].start) - 1)
        first = before
        steps += 1
    row.at = steps
    row.count = 0
    enter_run(space, first, row, False)
    if first == NOWHERE:
        row.rooms[0] = gap_at(&space.blocks, 0)
    while row.count < row.at + MOST_SIDE + 2 and (row.count == 1 or row.who[row.count - 1] != NOWHERE):
        enter_run(space, run_after(space, row), row, True)
    for index in range(row.count - 1):
        row.prices[index] = price_between(rates, &row.runs[index], &row.runs[index + 1], row.rooms[index])


cdef inline void enter_run(const space_t *space, int32_t who, row_t *row, bint right) noexcept nogil:
    row.who[row.count] = who
    row.runs[row.count] = run_of(space, who, right)
    row.rooms[row.count] = room_after(space, &space.seqs[who]) if who != NOWHERE else 0
    row.count += 1


cdef inline int32_t run_after(const space_t *space, const row_t *row) noexcept nogil:
    cdef int64_t last = row.count - 1
    cdef int64_t end = end_of(&space.seqs[row.who[last]]) if row.who[last] != NOWHERE else 0
    return owner_at(space, end + row.rooms[last])


# ---- laying out

cdef int64_t share_out(const rates_t *rates, const run_t *runs, int64_t count, int64_t room,
                       int64_t *rooms) noexcept nogil:
    """Shares `room` blocks out after each of `count` runs, what is left after the last; the price of that."""
    cdef int64_t share = min(room // count, rates.share)
    cdef int64_t index, usable, price = 0
    for index in range(count):
        usable = max(usable_room(&runs[index], &runs[index + 1]), <int64_t>0)
        rooms[index] = share
        if share * rates.block_size > usable:
            rooms[index] = (usable + rates.block_size - 1) // rates.block_size
        room -= rooms[index]
    rooms[count - 1] += room
    for index in range(count):
        price += price_between(rates, &runs[index], &runs[index + 1], rooms[index])
    return price


cdef void plan_window(space_t *space, const window_t *window, int64_t length) noexcept nogil:
    """Runs leave first; then right-movers go from the right end, left-movers from the left."""
    cdef int64_t index, to = window.low
    cdef int64_t starts[ROW]
    for index in range(window.num_out):
        plan_move(space, window.out[index], window.starts[index])
    for index in range(window.count):
        to += window.rooms[index]
        starts[index] = to
        if window.who[index] == NOWHERE:
            space.plan.start = to
            space.plan.gap = to - window.rooms[index]
            to += length
        else:
            to += space.seqs[window.who[index]].blocks
    for index in range(window.count - 1, -1, -1):
        if window.who[index] != NOWHERE and starts[index] > space.seqs[window.who[index]].start:
            plan_move(space, window.who[index], starts[index])
    for index in range(window.count):
        if window.who[index] != NOWHERE and starts[index] < space.seqs[window.who[index]].start:
            plan_move(space, window.who[index], starts[index])


# ---- growth

cdef void window_for_growth(const space_t *space, const rates_t *rates, const row_t *row, int64_t more, int64_t most,
                            window_t *best) noexcept nogil:
    """The cheapest stretch around a run to lay out anew, with `more` blocks for it."""
    cdef int64_t low, high, room_left = 0, before_left = 0, tokens_left = 0, room, before, tokens
    for low in range(row.at + 1, 0, -1):
        if low <= row.at:
            tokens_left += row.runs[low].tokens
        room_left += row.rooms[low - 1]
        before_left += row.prices[low - 1]
        if tokens_left > most or tokens_left - rates.doubt > best.price:
            break
        room, before, tokens = room_left, before_left, tokens_left
        for high in range(max(low, row.at), row.count - 1):
            if high > row.at:
                tokens += row.runs[high].tokens
                room += row.rooms[high]
                before += row.prices[high]
            if tokens > most or tokens - rates.doubt > best.price:
                break
            if room >= more:
                try_layout(space, rates, row, low, high, room - more, tokens - before, more, best)


cdef void try_layout(const space_t *space, const rates_t *rates, const row_t *row, int64_t low, int64_t high,
                     int64_t room, int64_t price, int64_t more, window_t *best) noexcept nogil:
    cdef int64_t rooms[ROW]
    cdef int64_t index, count = high - low + 2
    price += share_out(rates, &row.runs[low - 1], count, room, rooms)
    if price >= best.price:
        return
    rooms[row.at - (low - 1)] += more
    best.price = price
    best.low = space.seqs[row.who[low]].start - row.rooms[low - 1]
    best.count = count - 1
    best.num_out = 0
    for index in range(count):
        best.rooms[index] = rooms[index]
    for index in range(count - 1):
        best.who[index] = row.who[low + index]


# ---- a newcomer

cdef void window_for_newcomer(space_t *space, const rates_t *rates, const run_t *newcomer, int64_t most,
                              window_t *best) noexcept nogil:
    """The cheapest stretch to clear for a newcomer, beginning with one of a bounded number of runs."""
    cdef stretches_t found
    cdef runs_t seen
    cdef row_t row
    cdef int64_t index
    found.count = 0
    walk_along(space, &seen)
    for index in range(seen.count):
        stretches_from(&seen, index, newcomer.blocks, most, &found)
    for index in range(found.count):
        if found.items[index].tokens - rates.doubt <= best.price:
            look_along(space, &found.items[index], &row)
            try_window(space, rates, &row, newcomer, found.items[index].tokens, best)


cdef void walk_along(space_t *space, runs_t *seen) noexcept nogil:
    """Looks at the next runs from where the last walk ended, round the pool's end, each once."""
    cdef int64_t at = first_run(space, next_free(&space.blocks, space.cursor)), index
    cdef int64_t end = at
    cdef int32_t who
    seen.largest = 0
    seen.count = 0
    while seen.count < MOST_LOOKED and (seen.count == 0 or at != end):
        index = seen.count
        who = owner_at(space, at)
        seen.starts[index] = at
        seen.tokens[index] = run_tokens(space, who)
        seen.blocks[index] = space.seqs[who].blocks
        at += space.seqs[who].blocks
        seen.rooms[index] = gap_at(&space.blocks, at)
        seen.largest = max(seen.largest, seen.rooms[index])
        at = first_run(space, at + seen.rooms[index])
        seen.count += 1
    seen.first_room = gap_before(space, end)
    space.cursor = at


cdef int64_t first_run(const space_t *space, int64_t block) noexcept nogil:
    """Where the run that covers `block`, or the first one after it, begins; round the pool's end if need be."""
    if block >= space.blocks.num_blocks:
        block = 0
    if block_is_free(&space.blocks, block):
        block = gap_start(&space.blocks, block)
        block += space.blocks.cells[block].length
    return block if block < space.blocks.num_blocks else gap_at(&space.blocks, 0)


cdef void stretches_from(const runs_t *seen, int64_t first, int64_t length, int64_t most,
                         stretches_t *found) noexcept nogil:
    """Enters those that begin with run `first`, and could make room for `length` blocks."""
    cdef int64_t index
    cdef int64_t tokens = 0, room = seen.rooms[first - 1] if first else seen.first_room
    if first and seen.starts[first] < seen.starts[first - 1]:
        room = seen.starts[first]  # the pool's first run
    for index in range(first, min(first + MOST_WINDOW, seen.count)):
        if seen.starts[index] < seen.starts[first]:  # round the pool's end
            return
        tokens += seen.tokens[index]
        if tokens > most or (found.count == MOST_FOUND and tokens >= found.items[MOST_FOUND - 1].tokens):
            return
        if seen.blocks[index] <= seen.largest:  # it may leave
            room += seen.blocks[index]
        room += seen.rooms[index]
        if room >= length:
            enter_stretch(found, seen.starts[first], index - first + 1, tokens)


cdef void enter_stretch(stretches_t *found, int64_t start, int64_t count, int64_t tokens) noexcept nogil:
    """Keeps the few that move the fewest tokens, those first."""
    cdef int64_t index = min(found.count, <int64_t>MOST_FOUND - 1)
    found.count = index + 1
    while index > 0 and found.items[index - 1].tokens > tokens:
        found.items[index] = found.items[index - 1]
        index -= 1
    found.items[index] = stretch_t(start=start, count=count, tokens=tokens)


cdef void look_along(const space_t *space, const stretch_t *stretch, row_t *row) noexcept nogil:
    row.count = 0
    enter_run(space, owner_at(space, stretch.start - gap_before(space, stretch.start) - 1), row, False)
    row.rooms[0] = gap_before(space, stretch.start)
    enter_run(space, owner_at(space, stretch.start), row, True)
    while row.count < stretch.count + 2:
        enter_run(space, run_after(space, row), row, True)


cdef void try_window(const space_t *space, const rates_t *rates, const row_t *row, const run_t *newcomer,
                     int64_t tokens, window_t *best) noexcept nogil:
    """Has the largest runs leave until what is left can be laid out with the newcomer."""
    cdef window_t window
    cdef char fates[ROW]
    cdef int64_t room = 0, index, low = space.seqs[row.who[1]].start - row.rooms[0]
    cdef int64_t high = end_of(&space.seqs[row.who[row.count - 2]]) + row.rooms[row.count - 2]
    window.num_out = 0
    window.low = low
    window.price = tokens
    for index in range(row.count - 1):
        room += row.rooms[index]
        fates[index] = UNASKED
        window.price -= price_between(rates, &row.runs[index], &row.runs[index + 1], row.rooms[index])
    while room < newcomer.blocks:
        index = largest_to_leave(row, fates)
        if index == 0 or window.price - rates.doubt > best.price:
            return
        if find_way_out(space, rates, row.who[index], &row.runs[index], low, high, &window):
            room += row.runs[index].blocks
            fates[index] = LEAVES
        else:
            fates[index] = STAYS
    lay_with_newcomer(rates, row, fates, newcomer, room - newcomer.blocks, &window, best)


cdef int64_t largest_to_leave(const row_t *row, const char *fates) noexcept nogil:
    """Of the runs that have not been asked yet, 0 if there is none."""
    cdef int64_t index, largest = 0
    for index in range(1, row.count - 1):
        if fates[index] == UNASKED and (largest == 0 or row.runs[index].blocks > row.runs[largest].blocks):
            largest = index
    return largest


cdef bint find_way_out(const space_t *space, const rates_t *rates, int32_t who, const run_t *run, int64_t low,
                       int64_t high, window_t *window) noexcept nogil:
    """A gap outside [low, high) that nobody of this window goes to yet."""
    cdef int64_t gap = gap_for(&space.blocks, run.blocks), tried = 0
    cdef spot_t spot, best
    best.price = INT64_MAX
    while gap != NOWHERE and tried < MOST_TRIED:
        if (gap < low or gap >= high) and not is_taken(window, gap):
            spot = spot_in_gap(space, rates, gap, run, 0)
            if spot.price < best.price:
                best = spot
            tried += 1
        gap = next_gap_for(&space.blocks, gap, run.blocks)
    if best.price == INT64_MAX:
        return False
    window.out[window.num_out] = who
    window.gaps[window.num_out] = best.gap
    window.starts[window.num_out] = best.start
    window.num_out += 1
    window.price += best.price
    return True


cdef inline bint is_taken(const window_t *window, int64_t gap) noexcept nogil:
    cdef int64_t index
    for index in range(window.num_out):
        if window.gaps[index] == gap:
            return True
    return False


cdef void lay_with_newcomer(const rates_t *rates, const row_t *row, const char *fates, const run_t *newcomer,
                            int64_t room, window_t *window, window_t *best) noexcept nogil:
    """The newcomer comes before or after those that stay, whichever is cheaper."""
    cdef run_t runs[ROW + 1]
    cdef int64_t index, last, before = window.price
    cdef bint comes_last
    for comes_last in range(2):
        window.count = 0
        runs[0] = row.runs[0]
        if not comes_last:
            add_member(window, runs, NOWHERE, newcomer)
        for index in range(1, row.count - 1):
            if fates[index] != LEAVES:
                add_member(window, runs, row.who[index], &row.runs[index])
        if comes_last:
            add_member(window, runs, NOWHERE, newcomer)
        last = window.count + 1
        runs[last] = row.runs[row.count - 1]
        window.price = before + share_out(rates, runs, last, room, window.rooms)
        if window.price < best.price:
            best[0] = window[0]


cdef inline void add_member(window_t *window, run_t *runs, int32_t who, const run_t *run) noexcept nogil:
    window.who[window.count] = who
    window.count += 1
    runs[window.count] = run[0]
