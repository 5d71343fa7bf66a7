"""Windows: runs side by side that are laid out anew, or moved out, to make room."""

from libc.stdint cimport int32_t, int64_t

from kvcache._prices cimport rates_t, run_t
from kvcache._space cimport space_t

cdef enum:
    MOST_SIDE = 4              # runs that move on either side of one that grows
    MOST_WINDOW = 8            # runs that make way for a newcomer
    ROW = 2 * MOST_SIDE + 3    # runs of a row: no fewer than MOST_WINDOW + 2

ctypedef struct row_t:         # runs side by side; the first and the last stay, and may be the pool's ends
    int64_t count
    int64_t at                 # index of the one that grows; meaningless where none does
    int32_t who[ROW]
    run_t runs[ROW]
    int64_t rooms[ROW]         # blocks between each and the next one
    int64_t prices[ROW]        # of that room

ctypedef struct window_t:      # what is to be done about a stretch of the pool
    int64_t price              # INT64_MAX: nothing has been found
    int64_t low                # first block that may be laid out anew
    int64_t count              # runs that are laid out there
    int32_t who[ROW]           # NOWHERE: the newcomer
    int64_t rooms[ROW + 1]     # blocks before the first, and after each
    int64_t num_out            # runs that leave it first
    int32_t out[MOST_WINDOW]
    int64_t gaps[MOST_WINDOW]  # which they go to
    int64_t starts[MOST_WINDOW]

cdef void look_around(const space_t *space, const rates_t *rates, int32_t who, row_t *row) noexcept nogil
cdef void window_for_growth(const space_t *space, const rates_t *rates, const row_t *row, int64_t more, int64_t most,
                            window_t *best) noexcept nogil
cdef void window_for_newcomer(space_t *space, const rates_t *rates, const run_t *newcomer, int64_t most,
                              window_t *best) noexcept nogil
cdef void plan_window(space_t *space, const window_t *window, int64_t length) noexcept nogil
