"""A batch of sequences that decode together."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kvcache._alloc cimport Allocation, CacheCore
from kvcache._copy cimport Copier, Sources
from kvcache._lock cimport kv_turn_t
from kvcache._pool cimport handle_t, spans_t, status_t

ctypedef enum what_t:   # what callers read of a batch
    SLOTS, POSITIONS, SPLITS, LENGTHS, STARTS, GENERATION


cdef class BatchCore:
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
    cdef bint unseen                # others changed the pool since, as the step began
    cdef int64_t number             # the generation
    cdef spans_t spans              # where the rows of a write go
    cdef int64_t spans_number       # the generation, changes and rows that the spans are right for
    cdef uint64_t spans_seen
    cdef int64_t spans_rows
    cdef int64_t num_touched
    cdef bint all_live              # this step has found no freed member
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
    cdef object ask(self, object tokens, object counts)
    cdef object cut_back(self, object counts)
    cdef object now(self, what_t what)
    cdef object read(self, what_t what)
    cdef object tables(self)
    cdef void split_again(self) noexcept nogil
    cdef int put(self, Sources sources, int64_t layer) except -1
    cdef object take_step(self, const int32_t *counts, object result, object slots, object positions)
    cdef void end_step(self) noexcept nogil
    cdef int64_t first_of(self, int64_t index) noexcept nogil
    cdef int64_t dead_member(self) noexcept nogil
    cdef int answer(self, status_t status) except -1
    cdef status_t append_each(self, const int32_t *counts, unsigned char *got) noexcept nogil
    cdef bint gone(self) noexcept nogil
    cdef status_t append_one(self, int64_t index, int64_t count, unsigned char *got) noexcept nogil
    cdef void take_back(self, int64_t end, const int32_t *counts, const unsigned char *got) noexcept nogil
    cdef bint needs_held(self, const int32_t *counts) noexcept nogil
    cdef bint copies_leave_more(self, int32_t who) noexcept nogil
    cdef void fill(self, const int32_t *counts, const unsigned char *got) noexcept nogil
    cdef void fill_uniform(self) noexcept nogil
    cdef void look_again(self) noexcept nogil
    cdef void look(self, int64_t index) noexcept nogil
    cdef void refresh(self) noexcept nogil
    cdef int catch_up(self) except -1
    cdef status_t write_locked(self, Copier copier, Sources sources, int64_t layer) noexcept nogil
    cdef status_t may_own(self) noexcept nogil
    cdef (int64_t, int64_t) written_by(self, int64_t index) noexcept nogil
    cdef status_t find_spans(self, int64_t rows) noexcept nogil
    cdef status_t cut_each(self, const int32_t *counts, unsigned char *got) noexcept nogil
