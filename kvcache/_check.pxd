"""Walks every structure of a pool."""

from kvcache._pool cimport pool_t

cdef str check_pool(const pool_t *pool)
