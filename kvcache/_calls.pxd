"""Whole calls for native engines: from any thread, without the GIL."""

from libc.stdint cimport int32_t, int64_t

from kvcache._pins cimport pin_t
from kvcache._pool cimport handle_t, pool_t, request_t, status_t

cdef status_t pool_allocate(pool_t *pool, int64_t tokens, int64_t limit, handle_t *handle) noexcept nogil
cdef status_t pool_admit(pool_t *pool, request_t *request, handle_t *handle) noexcept nogil
cdef request_t counted(int64_t tokens, int64_t limit) noexcept nogil
cdef status_t admit_up_to(pool_t *pool, request_t *request, int64_t least, handle_t *handle) noexcept nogil
cdef status_t pool_pin(pool_t *pool, handle_t handle, int32_t salt, const int32_t *ids, int64_t count,
                       int64_t *blocks, pin_t *pin) noexcept nogil
cdef status_t pool_unpin(pool_t *pool, pin_t pin) noexcept nogil
cdef status_t pool_clear(pool_t *pool) noexcept nogil
cdef status_t pool_limit_salt(pool_t *pool, int32_t salt, int64_t blocks) noexcept nogil
cdef int64_t pool_probe(pool_t *pool, const request_t *request) noexcept nogil
cdef status_t pool_append(pool_t *pool, handle_t handle, int64_t count) noexcept nogil
cdef status_t pool_append_ids(pool_t *pool, handle_t handle, int64_t count, const int32_t *ids) noexcept nogil
cdef status_t pool_set_ids(pool_t *pool, handle_t handle, int64_t start, const int32_t *ids, int64_t count,
                           int64_t *there) noexcept nogil
cdef status_t pool_free_at(pool_t *pool, handle_t handle, double when) noexcept nogil
cdef status_t pool_fork_at(pool_t *pool, handle_t parent, handle_t *child, double when) noexcept nogil
cdef status_t pool_commit_at(pool_t *pool, handle_t handle, int64_t tokens, double when) noexcept nogil
cdef status_t pool_free(pool_t *pool, handle_t handle) noexcept nogil
cdef status_t pool_truncate(pool_t *pool, handle_t handle, int64_t tokens) noexcept nogil
cdef status_t pool_fork(pool_t *pool, handle_t parent, handle_t *child) noexcept nogil
cdef status_t pool_set_limit(pool_t *pool, handle_t handle, int64_t limit) noexcept nogil
cdef status_t pool_commit(pool_t *pool, handle_t handle, int64_t tokens) noexcept nogil
cdef status_t pool_slots(pool_t *pool, handle_t handle, int64_t start, int64_t count, int32_t *slots) noexcept nogil
cdef status_t pool_hold(pool_t *pool) noexcept nogil
cdef status_t hold_briefly(pool_t *pool) noexcept nogil
cdef status_t pool_release(pool_t *pool) noexcept nogil
cdef status_t pool_compact(pool_t *pool, int64_t most, int64_t *moved) noexcept nogil
cdef status_t pool_close(pool_t *pool) noexcept nogil
cdef status_t wait_for_holds(pool_t *pool) noexcept nogil
