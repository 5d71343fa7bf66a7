"""Blocks with several holders (paged placement): counted, copied before they are written, claimed until then."""

from libc.stdint cimport int32_t, int64_t

from kvcache._space cimport seq_t
from kvcache._pool cimport pool_t, status_t

ctypedef struct wish_t:     # copies that are about to be made
    int64_t copies          # blocks that they need
    int64_t unclaimed       # blocks that are no longer claimed afterwards

cdef inline bint is_writer(const pool_t *pool, int32_t who, int64_t tokens, int64_t limit) noexcept nogil:
    """Whether a sequence of so many tokens, with this limit, may append into its last block."""
    return tokens % pool.space.block_size != 0 and tokens < limit

cdef inline int64_t copies_of(int64_t refs, int64_t writers) noexcept nogil:
    """Every writer but the last holder needs a copy."""
    return min(writers, refs - 1) if refs > 1 else 0

cdef void change_holders(pool_t *pool, int64_t block, int32_t refs, int32_t writers) noexcept nogil
cdef void leave_block(pool_t *pool, int64_t block, bint writer) noexcept nogil
cdef void drop_blocks(pool_t *pool, int32_t who, int64_t first, bint writer) noexcept nogil
cdef int32_t breaks_in(const seq_t *seq, int64_t first, int64_t end) noexcept nogil
cdef bint tail_is_shared(const pool_t *pool, int32_t who) noexcept nogil
cdef bint is_shared(const pool_t *pool, int32_t who) noexcept nogil
cdef void wish_copies(pool_t *pool, int32_t who, int64_t first, int64_t last, wish_t *wish) noexcept nogil
cdef void unwish_copies(pool_t *pool, int32_t who, int64_t first, int64_t last) noexcept nogil
cdef status_t may_copy(pool_t *pool, const wish_t *wish) noexcept nogil
cdef status_t own_blocks(pool_t *pool, int32_t who, int64_t first, int64_t last, bint patient) noexcept nogil
cdef status_t share_blocks(pool_t *pool, int32_t who, int32_t twin, int64_t claim) noexcept nogil
cdef bint over_budget_after_cut(const pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
