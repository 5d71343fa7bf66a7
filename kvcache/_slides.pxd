"""Slides: however many runs it takes, packed together to gather the free blocks between them."""

from libc.stdint cimport int32_t, int64_t

from kvcache._space cimport space_t

cdef void slide_for_newcomer(space_t *space, int64_t length) noexcept nogil
cdef void slide_for_growth(space_t *space, int32_t who, int64_t more) noexcept nogil
cdef int64_t pack_left(space_t *space, int64_t low, int64_t high, int64_t to) noexcept nogil
cdef int64_t pack_right(space_t *space, int64_t low, int64_t high, int64_t to) noexcept nogil
