"""Where runs of blocks go, and what moves to make room for them. Decides; changes nothing until `settle`."""

from libc.stdint cimport int32_t, int64_t

from kvcache._space cimport space_t

# `most`: used tokens that the plan may move. False: there is no such plan, and the plan is empty; with INT64_MAX
# there is one whenever so many blocks are free.
cdef bint place_in_gap(space_t *space, int64_t length, int64_t growth) noexcept nogil
cdef bint place_by_sliding(space_t *space, int64_t length, int64_t growth, int64_t most) noexcept nogil
cdef bint place_growth(space_t *space, int32_t who, int64_t more, int64_t most) noexcept nogil
