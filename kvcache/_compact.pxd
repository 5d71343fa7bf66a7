"""Packing the runs of a pool in contiguous placement. Called under the lock, when nobody holds."""

from libc.stdint cimport int64_t

from kvcache._pool cimport pool_t, status_t

cdef status_t pack(pool_t *pool, int64_t most) noexcept nogil
