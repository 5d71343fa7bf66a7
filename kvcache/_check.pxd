"""Walks every structure of a pool."""

from kvcache._sequences cimport pool_t

cdef str check_pool(const pool_t *pool)
