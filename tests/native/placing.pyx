# cython: freethreading_compatible=True
"""Asks the placement for plans that nobody carries out."""

from libc.stdint cimport int64_t

from kvcache._alloc cimport CacheCore, handle_of
from kvcache._placement cimport place_by_sliding, place_growth
from kvcache._pool cimport place_of
from kvcache._space cimport plan_t


cdef object moves_of(const plan_t *plan):
    """The moves, and the used tokens that they move."""
    cdef int64_t index
    return [(plan.moves[index].source, plan.moves[index].destination, plan.moves[index].blocks)
            for index in range(plan.count)], plan.tokens


def plan_growth(CacheCore cache, request_id, int64_t more, int64_t most):
    cdef bint found = place_growth(&cache.pool.space, place_of(handle_of(cache, request_id)), more, most)
    return found, *moves_of(&cache.pool.space.plan)


def plan_newcomer(CacheCore cache, int64_t length, int64_t growth, int64_t most):
    cdef bint found = place_by_sliding(&cache.pool.space, length, growth, most)
    return found, *moves_of(&cache.pool.space.plan)
