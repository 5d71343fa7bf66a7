"""Sequences whose K/V leave the arena and come back, and prefixes that are saved and loaded."""

from libc.stdint cimport int32_t, int64_t

from kvcache._alloc cimport CacheCore
from kvcache._door cimport Allocation
from kvcache._pool cimport handle_t, status_t


cdef class Journey:
    cdef readonly Allocation record
    cdef readonly int64_t tokens
    cdef readonly int64_t limit
    cdef readonly object ids       # int32 array of the leading tokens whose ids are known
    cdef bint asked                # somebody has found it on its way, and has to be told when it rests
    cdef readonly bint moving      # on its way out or back: one transfer at a time
    cdef readonly int64_t in_place  # leading tokens that the index had, where it came back without its chunks
    cdef public object chunks      # for whoever carries it: what has been put where
    cdef public object transfer    # for whoever carries it: the present or the last one
    cdef handle_t handle           # of the blocks that it has, which nobody else knows; 0 for none
    cdef int32_t salt
    cdef object marks              # int32 [num_marks]
    cdef object written            # int32 [2 * num_marks], as extent_t


cdef class TravelCore(CacheCore):
    cdef Journey journey_of(self, object request_id)
    cdef Journey departed(self, object request_id)
    cdef object entries_of(self, object request_ids)
    cdef bint is_away(self, Journey journey) except -1
    cdef int forget(self, Journey journey) except -1
    cdef int rest(self, Journey journey) except -1
    cdef int tell_of(self, Journey journey) except -1
    cdef int give_up(self, Journey journey, double when) except -1
    cdef int detach(self, Journey journey) except -1
    cdef void attach(self, Journey journey) noexcept nogil
    cdef int note_state(self, Journey journey) except -1
    cdef bint carry(self, Journey journey, int64_t first, int64_t tokens, int64_t start, int64_t end, object payload,
                    bint out) except -1
    cdef status_t admit_journey(self, Journey journey, const int32_t *ids, int64_t *cached) noexcept nogil
