"""Sequences of several runs, in contiguous placement under a bound on moves. Called under the lock."""

from libc.stdint cimport int32_t, int64_t

from kvcache._space cimport plan_t, space_t
from kvcache._pool cimport pool_t, status_t

cdef int reserve_runs(pool_t *pool, int64_t blocks) noexcept nogil
cdef void take_planned(pool_t *pool, int32_t who, int64_t blocks) noexcept nogil
cdef void scatter(pool_t *pool, int32_t who, int64_t blocks, int64_t growth) noexcept nogil
cdef void extend_last(pool_t *pool, int32_t who, int64_t more) noexcept nogil
cdef int64_t room_after_last(const pool_t *pool, int32_t who) noexcept nogil
cdef void drop_runs(pool_t *pool, int32_t who, int64_t keep, bint unseen) noexcept nogil
cdef void join_runs(pool_t *pool, int32_t who) noexcept nogil
cdef bint plan_heal(space_t *space, int32_t who, int64_t more, int64_t most) noexcept nogil
cdef int64_t planned_start(const space_t *space, int32_t who) noexcept nogil
cdef status_t copy_to_runs(pool_t *pool, int32_t who, int32_t twin) noexcept nogil
