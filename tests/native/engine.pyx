# cython: freethreading_compatible=True
"""A native engine: it cimports the allocator and works on it from OS threads of its own, without the GIL."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from kvcache._alloc cimport (
    BAD_COUNT,
    CacheCore,
    counted,
    handle_of,
    handle_t,
    pool_admit,
    pool_allocate,
    pool_append,
    pool_append_ids,
    pool_commit,
    pool_free,
    pool_hold,
    pool_probe,
    pool_release,
    pool_set_limit,
    pool_slots,
    pool_t,
    pool_truncate,
    request_t,
)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:  # opaque
        pass
    int pthread_create(pthread_t *thread, const void *attributes, void *(*start)(void *) noexcept nogil, void *argument)
    int pthread_join(pthread_t thread, void **result)

ctypedef struct job_t:
    pool_t *pool
    handle_t handle
    int64_t rounds
    int64_t done       # calls that said OK
    int64_t refused


cdef void *append_many(void *argument) noexcept nogil:
    cdef job_t *job = <job_t *>argument
    cdef int64_t _round
    for _round in range(job.rounds):
        if pool_append(job.pool, job.handle, 1) == 0:
            job.done += 1
        else:
            job.refused += 1
    return NULL


cdef void *live_and_die(void *argument) noexcept nogil:
    """Admits, holds, looks at slots, grows, cuts, frees."""
    cdef job_t *job = <job_t *>argument
    cdef int64_t number, tokens
    cdef handle_t handle
    cdef int32_t slots[64]
    for number in range(job.rounds):
        tokens = 1 + number % 23
        if pool_allocate(job.pool, tokens, tokens + 40, &handle):
            job.refused += 1
            continue
        pool_hold(job.pool)
        if pool_slots(job.pool, handle, 0, tokens, slots) == 0 and slots[tokens - 1] - slots[0] == tokens - 1:
            job.done += 1
        pool_release(job.pool)
        pool_append(job.pool, handle, 1 + number % 40)
        pool_truncate(job.pool, handle, number % 3)
        pool_free(job.pool, handle)
        if pool_append(job.pool, handle, 1) == 0:
            job.done = -1 << 40  # a stale handle was taken for a live one
    return NULL


cdef void *admit_ids(void *argument) noexcept nogil:
    """One prompt of ids again and again: admits it, commits it, names one token more, ends it."""
    cdef job_t *job = <job_t *>argument
    cdef int32_t ids[25]
    cdef request_t request
    cdef handle_t handle
    cdef int64_t number, _round
    for number in range(25):
        ids[number] = <int32_t>(number % 3)
    for _round in range(job.rounds):
        request = counted(24, 32)
        request.ids = ids
        if pool_admit(job.pool, &request, &handle):
            job.refused += 1
            continue
        pool_commit(job.pool, handle, -1)
        if pool_append_ids(job.pool, handle, 1, &ids[24]) == 0 and pool_probe(job.pool, &request) == 20:
            job.done += request.cached
        pool_free(job.pool, handle)
    return NULL


cdef run(CacheCore cache, list handles, int64_t rounds, void *(*work)(void *) noexcept nogil):
    cdef int64_t count = len(handles), index
    cdef job_t *jobs = <job_t *>calloc(count, sizeof(job_t))
    cdef pthread_t *threads = <pthread_t *>calloc(count, sizeof(pthread_t))
    for index in range(count):
        jobs[index].pool, jobs[index].handle, jobs[index].rounds = &cache.pool, handles[index], rounds
    with nogil:
        for index in range(count):
            pthread_create(&threads[index], NULL, work, &jobs[index])
        for index in range(count):
            pthread_join(threads[index], NULL)
    outcome = [(jobs[index].done, jobs[index].refused) for index in range(count)]
    free(jobs)
    free(threads)
    return outcome


def append_from_threads(CacheCore cache, request_ids, int64_t rounds):
    """One OS thread per sequence; [(granted, refused)] in order."""
    return run(cache, [handle_of(cache, request_id) for request_id in request_ids], rounds, append_many)


def live_and_die_in_threads(CacheCore cache, int64_t threads, int64_t rounds):
    """Sequences that only native code knows; [(looked at, refused)] per thread."""
    return run(cache, [0] * threads, rounds, live_and_die)


def admit_ids_in_threads(CacheCore cache, int64_t threads, int64_t rounds):
    """A prompt that all of them admit; [(tokens found, refused)] per thread."""
    return run(cache, [0] * threads, rounds, admit_ids)


def statuses_of_bad_counts(CacheCore cache, request_id):
    """What each call says to counts that cannot be meant."""
    cdef pool_t *pool = &cache.pool
    cdef handle_t handle = handle_of(cache, request_id), fresh = 0
    cdef int64_t huge = <int64_t>1 << 33
    return {
        "append": [pool_append(pool, handle, -3)],
        "truncate": [pool_truncate(pool, handle, -1)],
        "set_limit": [pool_set_limit(pool, handle, huge)],
        "allocate": [
            pool_allocate(pool, tokens, limit, &fresh)
            for tokens, limit in ((0, 8), (-8, 8), (8, 4), (5, huge), (huge, huge))
        ],
    }, BAD_COUNT
