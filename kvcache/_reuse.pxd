"""What is known of a sequence's tokens, and what of it is found. For whoever holds the lock."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport pool_t, slot_of

cdef inline int64_t block_at(const pool_t *pool, int32_t who, int64_t index) noexcept nogil:
    """The sequence's block of this index, which it holds."""
    return slot_of(pool, who, index * pool.space.block_size) // pool.space.block_size

cdef bint may_name(const pool_t *pool, int32_t who, int64_t start, const int32_t *ids, int64_t count) noexcept nogil
cdef void begin_names(pool_t *pool) noexcept nogil
cdef void note_ids(pool_t *pool, int32_t who, int64_t start, const int32_t *ids, int64_t count) noexcept nogil
cdef void share_names(pool_t *pool, int32_t who) noexcept nogil
cdef void index_more(pool_t *pool, int32_t who) noexcept nogil
cdef void unindex(pool_t *pool, int32_t who, int64_t keep) noexcept nogil
cdef bint cuts_pin(const pool_t *pool, int32_t who, int64_t first) noexcept nogil
cdef void disown(pool_t *pool, int32_t who, int64_t start, int64_t count) noexcept nogil
cdef void index_twin(pool_t *pool, int32_t who, int32_t twin) noexcept nogil
cdef void leave_blocks(pool_t *pool, int32_t who, int64_t first) noexcept nogil
cdef int64_t worth_keeping(pool_t *pool, int32_t who) noexcept nogil
cdef void leave_runs(pool_t *pool, int32_t who, int64_t keep) noexcept nogil
