"""Cached blocks: how they come to be, and how they make room. For whoever holds the lock."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport pool_t

cdef void make_clean(pool_t *pool, int64_t blocks) noexcept nogil
cdef bint evict_some(pool_t *pool, int64_t blocks) noexcept nogil
cdef void evict_leaf(pool_t *pool, int32_t entry) noexcept nogil
cdef void keep_quota(pool_t *pool, int32_t salt) noexcept nogil
cdef void keep_quotas(pool_t *pool) noexcept nogil
cdef void cache_run(pool_t *pool, int32_t run) noexcept nogil
cdef void uncache_run(pool_t *pool, int32_t run) noexcept nogil
cdef void shorten_run(pool_t *pool, int32_t run, int64_t blocks) noexcept nogil
cdef void drop_double(pool_t *pool, int32_t run) noexcept nogil
