"""A batch of sequences that decode together."""

from libc.stdint cimport int32_t, int64_t, uint64_t

from kvcache._copy cimport Copier, Sources
from kvcache._members cimport Members
from kvcache._pool cimport spans_t, status_t


cdef class BatchCore(Members):
    cdef bint unseen                # others changed the pool since, as the step began
    cdef spans_t spans              # where the rows of a write go
    cdef int64_t spans_number       # the generation, changes and rows that the spans are right for
    cdef uint64_t spans_seen
    cdef int64_t spans_rows
    cdef int64_t num_touched        # of `touched`
    cdef bint all_live              # this step has found no freed member

    cdef object ask(self, object tokens, object counts)
    cdef object cut_back(self, object counts)
    cdef int put(self, Sources sources, int64_t layer) except -1
    cdef object take_step(self, const int32_t *counts, const int32_t *ids, object result, object slots,
                          object positions)
    cdef void name_step(self, const int32_t *ids) noexcept nogil
    cdef int name(self, object tokens) except -1
    cdef status_t may_name_step(self, const int32_t *ids) noexcept nogil
    cdef status_t append_each(self, const int32_t *counts, unsigned char *got) noexcept nogil
    cdef bint gone(self) noexcept nogil
    cdef status_t append_one(self, int64_t index, int64_t count, unsigned char *got) noexcept nogil
    cdef void take_back(self, int64_t end, const int32_t *counts, const unsigned char *got) noexcept nogil
    cdef bint needs_held(self, const int32_t *counts) noexcept nogil
    cdef bint copies_leave_more(self, int32_t who) noexcept nogil
    cdef void fill(self, const int32_t *counts, const unsigned char *got) noexcept nogil
    cdef void fill_uniform(self) noexcept nogil
    cdef void look_again(self) noexcept nogil
    cdef status_t write_locked(self, Copier copier, Sources sources, int64_t layer) noexcept nogil
    cdef status_t may_own(self) noexcept nogil
    cdef (int64_t, int64_t) written_by(self, int64_t index) noexcept nogil
    cdef status_t find_spans(self, int64_t rows) noexcept nogil
    cdef status_t cut_each(self, const int32_t *counts, unsigned char *got) noexcept nogil
