"""What native engines may cimport: the pool of a cache, and whole calls on it without the GIL.

`CacheCore.pool` is valid for as long as the cache lives. Keep a reference to the cache; the pool keeps none.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._calls cimport (
    pool_allocate,
    pool_append,
    pool_close,
    pool_commit,
    pool_compact,
    pool_fork,
    pool_free,
    pool_hold,
    pool_release,
    pool_set_limit,
    pool_slots,
    pool_truncate,
)
from kvcache._copy cimport Copier, Sources, plane_t
from kvcache._runs cimport BlockAllocator, BlockRun
from kvcache._pool cimport (
    BAD_COUNT,
    BELOW_USED,
    BUSY,
    CLOSED,
    GONE,
    HELD,
    MOVE_FAILED,
    NO_MEMORY,
    NO_ROOM,
    NOT_HELD,
    OK,
    PAST_LIMIT,
    STALE,
    handle_t,
    pool_t,
    status_t,
)


cdef class Allocation:
    cdef readonly object request_id
    cdef readonly int64_t tokens
    cdef readonly int64_t max_tokens
    cdef readonly int64_t cached_tokens
    cdef handle_t handle
    cdef bint made


cdef class CacheCore:
    cdef pool_t pool
    cdef bint opened            # pool_init has been called
    cdef dict ids               # request id -> Allocation, in order of admission
    cdef Copier copier          # None: no storage
    cdef int64_t arena_tokens
    cdef tuple watchers         # None, or callables that are told of room, outside the lock
    cdef bint untold            # freed by a finalizer under the lock, and the watchers have not been told yet
    cdef object __weakref__

    cdef Allocation find(self, object request_id)
    cdef int before_waiting(self) except -1
    cdef int lock_pool(self) except -1
    cdef bint answer(self, status_t status, object request_id) except -1
    cdef int tell(self, object about) except -1
    cdef int replace_watchers(self, tuple watchers) except -1
    cdef int free_handle(self, handle_t handle) except -1
    cdef bint append_patiently(self, Allocation found, int64_t count) except -1
    cdef Allocation enter(self, Allocation record)
    cdef int64_t limit_for(self, int64_t tokens, object max_tokens, object max_new_tokens) except -1
    cdef int live(self, Allocation found) except -1
    cdef status_t write_locked(self, int32_t who, Copier copier, Sources sources, int64_t layer,
                               int64_t start) noexcept nogil
    cdef int64_t tokens_of(self, object prompt) except -1
    cdef dict known(self)
    cdef int require_fitting(self, str what, object tokens, int64_t count) except -1


cdef handle_t handle_of(CacheCore cache, object request_id) except 0
