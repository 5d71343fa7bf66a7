"""What a layout will cost, and the best place for a run within a gap.

Floating point is used for single products and quotients only, and cut to whole tokens before anything is added: the
same calls give the same placement on every machine.
"""

from libc.stdint cimport INT64_MAX, int64_t

from kvcache._space cimport owner_at

cdef enum:
    SPOT_STEPS = 4     # doublings of the unit that are tried from either end of a gap
    CROWD = 20         # the larger, the sooner more room is worth little


cdef rates_t rates_of(const space_t *space) noexcept nogil:
    cdef int64_t free = space.blocks.free_blocks
    cdef int64_t used = max(space.blocks.num_blocks - free, <int64_t>1)
    cdef int64_t live = space.live + 1
    cdef rates_t rates
    rates.block_size = space.block_size
    rates.free = free
    rates.worth = 1.5 * <double>free
    rates.crowd = <double>(CROWD * live)
    rates.hole = <double>live / <double>free
    rates.share = max(2 * free // live, <int64_t>1)
    rates.unit = max(free // (8 * live), <int64_t>1)
    rates.doubt = used * space.block_size // (3 * live)
    return rates


cdef spot_t spot_in_gap(const space_t *space, const rates_t *rates, int64_t gap, const run_t *run,
                        int64_t more) noexcept nogil:
    """The best place for a run in a gap that has room for it and `more` blocks after it."""
    cdef int64_t length = space.blocks.cells[gap].length
    cdef int64_t spare = length - run.blocks - more
    cdef run_t left = run_of(space, owner_at(space, gap - 1), False)
    cdef run_t right = run_of(space, owner_at(space, gap + length), True)
    cdef spot_t best = spot_t(gap=gap, start=gap, price=INT64_MAX)
    cdef int64_t step
    try_spot(rates, &left, run, &right, 0, spare, &best)
    try_spot(rates, &left, run, &right, spare, spare, &best)
    for step in range(SPOT_STEPS):
        try_spot(rates, &left, run, &right, rates.unit << step, spare, &best)
        try_spot(rates, &left, run, &right, spare - (rates.unit << step), spare, &best)
    best.price -= price_between(rates, &left, &right, length)
    return best


cdef inline void try_spot(const rates_t *rates, const run_t *left, const run_t *run, const run_t *right,
                          int64_t before, int64_t spare, spot_t *best) noexcept nogil:
    cdef int64_t price
    if before < 0 or before > spare:
        return
    price = price_between(rates, left, run, before) + price_between(rates, run, right, spare - before)
    if price < best.price:
        best.price = price
        best.start = best.gap + before
