"""Admission: what of a prompt is there already, and blocks for the rest. For whoever holds the lock."""

from libc.stdint cimport int64_t

from kvcache._pool cimport handle_t, pool_t, request_t, status_t

cdef int64_t most_hits(const pool_t *pool, const request_t *request) noexcept nogil
cdef int64_t held_hits(pool_t *pool, const request_t *request) noexcept nogil
cdef status_t admit(pool_t *pool, request_t *request, bint patient, handle_t *handle) noexcept nogil
