"""Where runs of blocks go, and what moves to make room for them. Decides; changes nothing until `settle`."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from kvcache._blocks cimport blocks_t
from kvcache._moves cimport move_t

# What appends touch: 16 bytes a sequence.
ctypedef struct hot_t:
    int32_t tokens         # used tokens
    int32_t soft           # tokens may grow to this without a look at anything else
    int32_t base           # slot of the next token is base + tokens, while tokens < soft
    uint32_t generation    # odd while the sequence lives

ctypedef struct seq_t:
    int32_t blocks         # held
    int32_t limit          # tokens
    int32_t start          # first block; meaningful while blocks > 0 and table is not in use
    int32_t *table         # paged: block ids in token order, [blocks] of [capacity]
    int32_t capacity       # entries that the table has room for
    int32_t breaks         # paged: places where the next block is not the one after
    uint32_t version       # changes when a token comes to another slot or is cut, and when the run begins or ends
    int32_t next_vacant    # while the sequence does not live: the next vacant place, NOWHERE for none

ctypedef struct plan_t:    # a placement that may need moves first; filled by the place_ functions
    int64_t start          # where the run that asked will begin
    int64_t gap            # first block of the gap that it will be taken from, once the moves are done
    int64_t tokens         # used tokens that move
    int64_t count          # moves
    int64_t capacity       # of the two arrays
    int32_t *who           # [count] sequences that move, in an order that overwrites nothing still to be moved
    move_t *moves          # [count] in the same order

ctypedef struct space_t:
    blocks_t blocks
    int64_t block_size
    hot_t *hot             # [places]
    seq_t *seqs            # [places]
    int64_t live           # sequences
    int64_t cursor         # where the next search for a window begins
    plan_t plan            # the one in hand

cdef int plan_reserve(plan_t *plan, int64_t count) noexcept nogil
cdef void plan_destroy(plan_t *plan) noexcept nogil

cdef int64_t room_after(const space_t *space, const seq_t *seq) noexcept nogil
cdef int64_t growth_of(const space_t *space, const seq_t *seq) noexcept nogil
cdef bint place_in_gap(space_t *space, int64_t length, int64_t growth) noexcept nogil
cdef void place_by_sliding(space_t *space, int64_t length, int64_t growth) noexcept nogil
cdef void place_growth(space_t *space, int32_t who, int64_t more) noexcept nogil
cdef void settle(space_t *space) noexcept nogil
cdef void own_run(space_t *space, int32_t who) noexcept nogil
