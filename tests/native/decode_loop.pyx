# cython: freethreading_compatible=True
"""A native decode loop: room, slots and bytes, without the GIL. Shown in the manual."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from kvcache._alloc cimport (
    CacheCore,
    handle_of,
    handle_t,
    pool_append,
    pool_commit,
    pool_hold,
    pool_release,
    pool_slots,
    pool_t,
)
from kvcache._copy cimport FLOAT32, plane_t

ctypedef struct member_t:
    handle_t handle
    int64_t tokens   # K and V are in place


cdef void write_token(const plane_t *plane, int64_t slot, float value) noexcept nogil:
    """Fills one token of a plane, in every head; a model would put its K or V there."""
    cdef int64_t head, column
    cdef float *row
    for head in range(plane.heads):
        row = <float *>(plane.data + head * plane.head_stride + slot * plane.token_stride)
        for column in range(plane.width):
            row[column] = value


cdef int64_t decode_step(pool_t *pool, const plane_t *planes, int64_t num_planes, member_t *members,
                         int64_t count) noexcept nogil:
    """One token for everybody who may still grow; returns how many."""
    cdef int64_t index, plane, granted = 0
    cdef int32_t slot
    for index in range(count):            # may move sequences: before the hold
        if pool_append(pool, members[index].handle, 1) == 0:
            members[index].tokens += 1
            granted += 1
    pool_hold(pool)                       # slots stay right until it is released
    for index in range(count):
        if pool_slots(pool, members[index].handle, members[index].tokens - 1, 1, &slot) == 0:
            for plane in range(num_planes):
                write_token(&planes[plane], slot, <float>members[index].tokens)
            pool_commit(pool, members[index].handle, members[index].tokens)
    pool_release(pool)
    return granted


def decode(CacheCore cache not None, list request_ids not None, int64_t steps):
    """Decodes up to `steps` tokens of each sequence in a float32 cache; returns how many in all."""
    cdef pool_t *pool = &cache.pool
    cdef int64_t num_planes = 0, plane, _step, index, count = len(request_ids), total = 0
    cdef const plane_t *planes = NULL
    cdef member_t *members
    if cache.copier is None:
        raise ValueError("this loop writes K and V: make the cache with storage")
    planes, num_planes = cache.copier.planes, cache.copier.first[cache.copier.num_layers]
    for plane in range(num_planes):
        if planes[plane].data == NULL or planes[plane].dtype != FLOAT32:
            raise ValueError("this loop writes float32 planes in host memory")
    members = <member_t *>calloc(count, sizeof(member_t))
    if members == NULL:
        raise MemoryError()
    try:
        for index in range(count):
            members[index].handle = handle_of(cache, request_ids[index])
            members[index].tokens = cache.used_tokens(request_ids[index])
        with nogil:
            for _step in range(steps):
                total += decode_step(pool, planes, num_planes, members, count)
    finally:
        free(members)
    return total
