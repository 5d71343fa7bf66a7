"""What a pool tells of itself: latencies of admission, and who holds each block."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport pool_t, sight_t

cdef enum:
    FREE_CELL = -1
    PINNED_CELL = -4         # held by a pin alone
    CACHED_CELL = -3         # nobody holds it, its content is found
    WAITING_CELL = -2        # let go under a hold that has not ended
    SHARED_CELL = 1 << 30    # beside one holder's place: the block has several

cdef int64_t now() noexcept nogil
cdef void note_latency(sight_t *sight, int64_t nanoseconds) noexcept nogil
cdef void forget_peaks(pool_t *pool) noexcept nogil
cdef int64_t longest_free(const pool_t *pool) noexcept nogil
cdef void draw_free(const pool_t *pool, char *cells) noexcept nogil
cdef void draw_owners(const pool_t *pool, int32_t *cells) noexcept nogil
