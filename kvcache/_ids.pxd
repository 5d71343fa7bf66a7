"""Counts and token ids as callers give them."""

from cpython.buffer cimport Py_buffer
from libc.stdint cimport int32_t, int64_t

cdef enum:
    MOST = 4611686018427387904  # 2**62: more than any count that is not refused

ctypedef struct ids_t:       # token ids while a call reads them
    const int32_t *data     # NULL: only counted
    int64_t count
    int32_t *own            # converted, ours to free; or NULL
    bint lent               # `view` is of the caller's buffer
    Py_buffer view


cdef class Tokens:
    cdef int32_t *data
    cdef readonly Py_ssize_t size
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]


cdef int read_ids(object prompt, ids_t *ids) except -1
cdef void drop_ids(ids_t *ids) noexcept
cdef int64_t as_count(object value, str name, int64_t least) except? -1
cdef bint is_count(object value) except -1
cdef int32_t as_token(object value, int64_t position) except -1
cdef object as_tokens(object ids)
cdef object counts_array(object counts, int64_t size)
cdef int read_step(object tokens, int64_t asked, int64_t members, ids_t *ids) except -1
