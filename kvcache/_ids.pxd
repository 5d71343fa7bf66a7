"""Counts and token ids as callers give them."""

from libc.stdint cimport int32_t, int64_t

cdef enum:
    MOST = 4611686018427387904  # 2**62: more than any count that is not refused

cdef int64_t as_count(object value, str name, int64_t least) except? -1
cdef bint is_count(object value) except -1
cdef int32_t as_token(object value, int64_t position) except -1
cdef object as_tokens(object ids)
cdef object counts_array(object counts, int64_t size)
cdef int check_tokens(object tokens, int64_t asked, int64_t members) except -1
