"""What native engines may cimport: the pool of a cache, and whole calls on it without the GIL.

`CacheCore.pool` is valid for as long as the cache lives. Keep a reference to the cache; the pool keeps none.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._calls cimport (
    counted,
    pool_admit,
    pool_allocate,
    pool_append,
    pool_append_ids,
    pool_close,
    pool_commit,
    pool_compact,
    pool_fork,
    pool_free,
    pool_hold,
    pool_probe,
    pool_release,
    pool_set_ids,
    pool_set_limit,
    pool_slots,
    pool_truncate,
)
from kvcache._copy cimport Copier, Sources, plane_t
from kvcache._door cimport Allocation, Door
from kvcache._ids cimport ids_t
from kvcache._looks cimport Looks
from kvcache._prefixes cimport Prefixes
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
    request_t,
    status_t,
)
from kvcache._runs cimport BlockAllocator, BlockRun


cdef class CacheCore(Prefixes):
    cdef status_t append_quietly(self, handle_t handle, const ids_t *ids, bint patient) noexcept nogil
    cdef bint append_patiently(self, Allocation found, int64_t count, const int32_t *ids) except -1


cdef handle_t handle_of(CacheCore cache, object request_id) except 0
