"""What there is, and what there would be, in blocks. For whoever holds the lock; nothing changes."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport handle_t, pool_t, request_t

ctypedef struct room_t:
    int64_t there          # free, or free when the last hold has ended
    int64_t unclaimed      # that may still be promised
    int64_t shared         # of a prompt: that others hold already, so that they cost nothing

cdef room_t room_for(pool_t *pool, const request_t *request) noexcept nogil
cdef room_t room_without(pool_t *pool, const handle_t *handles, int64_t count, const request_t *request,
                         int64_t *blocks, int64_t *claims) noexcept nogil
cdef int64_t need_of(const pool_t *pool, int32_t who, int64_t more) noexcept nogil
cdef int64_t growth_for(const pool_t *pool, int32_t who) noexcept nogil
