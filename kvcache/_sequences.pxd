"""Sequences, for whoever holds the lock. `patient` says that moves are allowed: without it, BUSY instead of one."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pool cimport handle_t, pool_t, status_t

cdef void do_deferred(pool_t *pool) noexcept nogil
cdef void pool_unlock(pool_t *pool) noexcept nogil
cdef int defer_free(pool_t *pool, handle_t handle) noexcept nogil
cdef status_t carry_out(pool_t *pool) noexcept nogil
cdef void enter_moves(pool_t *pool) noexcept nogil
cdef status_t plan_run(pool_t *pool, int64_t blocks, int64_t growth, bint patient) noexcept nogil
cdef status_t make_room(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil
cdef void take_blocks(pool_t *pool, int32_t who, int64_t count) noexcept nogil
cdef status_t append(pool_t *pool, int32_t who, int64_t count, bint patient) noexcept nogil
cdef status_t retire(pool_t *pool, handle_t handle, double when) noexcept nogil
cdef status_t cut(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef status_t change_limit(pool_t *pool, int32_t who, int64_t limit) noexcept nogil
cdef status_t split(pool_t *pool, handle_t parent, bint patient, handle_t *child) noexcept nogil
cdef void ungrow(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef void raise_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef void mark_written(pool_t *pool, int32_t who, int64_t mark, int64_t start, int64_t count) noexcept nogil
