"""Pins, quotas, and the end of everything that is cached. For whoever holds the lock."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from kvcache._pool cimport pool_t, status_t

ctypedef uint64_t pin_t  # generation << 32 | entry, of the last one that is pinned: it is no pin once that is another

cdef status_t pin_found(pool_t *pool, int64_t count, pin_t *pin) noexcept nogil
cdef status_t pin_live(pool_t *pool, int32_t who, int64_t *count, pin_t *pin) noexcept nogil
cdef status_t unpin(pool_t *pool, pin_t pin) noexcept nogil
cdef status_t forget_everything(pool_t *pool) noexcept nogil
cdef status_t limit_salt(pool_t *pool, int32_t salt, int64_t blocks) noexcept nogil
