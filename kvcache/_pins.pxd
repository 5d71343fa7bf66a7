"""Pins, quotas, and the end of everything that is cached. For whoever holds the lock."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport pool_t, status_t

cdef status_t pin_found(pool_t *pool, int64_t count, int32_t *last) noexcept nogil
cdef status_t pin_live(pool_t *pool, int32_t who, int64_t *count, int32_t *last) noexcept nogil
cdef status_t unpin(pool_t *pool, int32_t last) noexcept nogil
cdef status_t forget_everything(pool_t *pool) noexcept nogil
cdef status_t limit_salt(pool_t *pool, int32_t salt, int64_t blocks) noexcept nogil
