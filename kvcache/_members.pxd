"""The members of a batch, and the arrays that say where they are."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kvcache._alloc cimport Allocation, CacheCore
from kvcache._lock cimport kv_turn_t
from kvcache._pool cimport handle_t, status_t

ctypedef enum what_t:   # what callers read of a batch
    SLOTS, POSITIONS, SPLITS, LENGTHS, STARTS, GENERATION


cdef class Members:
    cdef readonly CacheCore cache
    cdef bint made                  # __init__ is through
    cdef kv_turn_t turn             # of the thread whose call this batch is in
    cdef bint waits                 # that call waits for holds to end; changed under the pool's lock
    cdef list ids                   # of the members, in order
    cdef dict known                 # request id -> Allocation
    cdef int64_t size               # members
    cdef int64_t capacity           # that the next three have room for
    cdef handle_t *handles          # [size]
    cdef uint32_t *versions         # [size] of the sequences, when this batch last looked
    cdef int64_t *firsts            # [size + 1] entries of member i begin here; meaningful unless uniform
    cdef bint uniform               # one entry per member
    cdef bint stepped               # there is a step whose tokens can be written
    cdef bint whole                 # splits say that every member got its one token
    cdef int64_t entries            # of slots and positions: tokens asked for in the step
    cdef int64_t granted            # tokens granted
    cdef uint64_t seen              # pool.changes, when this batch last looked
    cdef int64_t seen_moves         # pool.moves, then
    cdef int64_t number             # the generation
    cdef int32_t *touched           # [size] members that took more than a look in the step
    cdef object slots_array         # the arrays that callers see, and where their entries are
    cdef object positions_array
    cdef object splits_array
    cdef object lengths_array
    cdef object starts_array
    cdef object own_slots           # one entry per member: kept while membership and order stand
    cdef object own_positions
    cdef int32_t *own_slot
    cdef int32_t *own_position
    cdef int32_t *slot
    cdef int32_t *position
    cdef int32_t *split
    cdef int32_t *length
    cdef int32_t *start

    cdef int make(self, CacheCore cache, object request_ids) except -1
    cdef int begin(self) except -1
    cdef void end(self) noexcept
    cdef status_t wait_for_turn(self) noexcept nogil
    cdef status_t wait_outside(self) noexcept nogil
    cdef Allocation newcomer(self, object request_id)
    cdef int join(self, Allocation record) except -1
    cdef int drop(self, Allocation record, object arrays) except -1
    cdef int arrange(self, list chosen) except -1
    cdef int reserve(self, int64_t members) except -1
    cdef object new_arrays(self, int64_t size)
    cdef int install(self, object arrays, int64_t kept, int64_t removed) except -1
    cdef object now(self, what_t what)
    cdef object read(self, what_t what)
    cdef object tables(self)
    cdef void split_again(self) noexcept nogil
    cdef void end_step(self) noexcept nogil
    cdef int64_t first_of(self, int64_t index) noexcept nogil
    cdef int64_t dead_member(self) noexcept nogil
    cdef int answer(self, status_t status) except -1
    cdef void look(self, int64_t index) noexcept nogil
    cdef void refresh(self) noexcept nogil
    cdef int catch_up(self) except -1


cdef void *data_of(object array) except? NULL

cdef inline int32_t *ints_of(object array) except? NULL:
    return <int32_t *>data_of(array)
