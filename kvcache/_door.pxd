"""What every call into a cache needs."""

from libc.stdint cimport int32_t, int64_t

from kvcache._copy cimport Copier
from kvcache._ids cimport ids_t
from kvcache._pool cimport handle_t, pool_t, request_t, status_t


cdef extern from "_dict.h":
    object find_in "kv_find_in" (dict where, object key)


cdef class Allocation:
    cdef readonly object request_id
    cdef readonly int64_t tokens
    cdef readonly int64_t max_tokens
    cdef readonly int64_t cached_tokens
    cdef handle_t handle
    cdef bint made


cdef class Door:
    cdef pool_t pool
    cdef bint opened            # pool_init has been called
    cdef dict ids               # request id -> Allocation, in order of admission
    cdef Copier copier          # None: no storage
    cdef int64_t arena_tokens
    cdef tuple watchers         # None, or callables that are told of room, outside the lock
    cdef bint untold            # freed by a finalizer under the lock, and the watchers have not been told yet
    cdef object clock           # None: calls are counted
    cdef dict salts             # (type, value) -> number, the last used last; as many as may have anything cached
    cdef dict limited           # of those with a quota, for ever
    cdef int32_t last_salt
    cdef object scorer          # None, or the user's policy: asked once the lock has been given up
    cdef int64_t block_bytes
    cdef dict away              # request id -> Journey of a sequence that is suspended, or on its way; None: never yet
    cdef object __weakref__

    cdef Allocation find(self, object request_id)
    cdef bint knows(self, Allocation record) except -1
    cdef bint is_away_now(self, object request_id) except -1
    cdef bint is_here(self, object request_id) except -1
    cdef dict known(self)
    cdef Allocation enter(self, Allocation record)
    cdef int free_handle(self, handle_t handle, double when) except -1
    cdef int before_waiting(self) except -1
    cdef int lock_pool(self) except -1
    cdef int live(self, Allocation found) except -1
    cdef int left(self, Allocation record, double when) except -1
    cdef bint answer(self, status_t status, object request_id) except -1
    cdef int tell(self, object about) except -1
    cdef int replace_watchers(self, tuple watchers) except -1
    cdef int64_t tokens_of(self, object prompt, ids_t *ids) except -1
    cdef int ask_policy(self) except -1
    cdef double read_clock(self) except? -1
    cdef double calm_clock(self)
    cdef int32_t salt_of(self, object salt) except -1
    cdef int ask(self, request_t *request, object salt, object priority, object ttl) except -1
    cdef int ask_kept(self, request_t *request, object salt, object priority, object ttl) except -1
    cdef int64_t limit_for(self, int64_t tokens, object max_tokens, object max_new_tokens) except -1
    cdef int require_fitting(self, str what, object tokens, int64_t count) except -1


cdef Allocation new_record(object request_id, int64_t tokens, int64_t limit)
