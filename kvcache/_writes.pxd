"""Writes: from positions of sequences to spans of slots, blocks of one's own first."""

from libc.stdint cimport int32_t, int64_t

from kvcache._copy cimport Copier, Sources
from kvcache._pool cimport pool_t, spans_t, status_t
from kvcache._sharing cimport wish_t

cdef void wish_write(pool_t *pool, int32_t who, int64_t start, int64_t count, wish_t *wish) noexcept nogil
cdef void unwish_write(pool_t *pool, int32_t who, int64_t start, int64_t count) noexcept nogil
cdef status_t own_and_span(pool_t *pool, spans_t *spans, int32_t who, int64_t start, int64_t count,
                           int64_t row) noexcept nogil
cdef status_t span_positions(pool_t *pool, spans_t *spans, int32_t who, int64_t start, int64_t count,
                             int64_t row) noexcept nogil
cdef status_t write_spans(pool_t *pool, const spans_t *spans, Copier copier, Sources sources,
                          int64_t layer) noexcept nogil
