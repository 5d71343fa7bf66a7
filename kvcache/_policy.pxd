"""Which cached blocks are worth keeping: the score that an entry gets when it is inserted, hit or let go."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from kvcache._index cimport index_t
from kvcache._leaves cimport weigh
from kvcache._worth cimport worth_t

ctypedef enum order_t:
    LRU = 0
    LFU = 1
    FIFO = 2
    WORTH = 3
    FOREIGN = 4            # scores come from outside, once the lock has been given up

ctypedef enum event_t:
    INSERTED = 0
    HIT = 1
    LET_GO = 2             # its last holder has left it

ctypedef struct touch_t:   # what a foreign policy has still to be asked
    int32_t entry
    uint32_t generation
    event_t event
    int32_t depth
    int32_t length
    uint32_t hits

ctypedef struct policy_t:
    order_t order
    double now             # the cache's clock, as the call in hand read it
    int64_t calls          # that have read it
    uint32_t *hits         # [entries] LFU and FOREIGN: how often each has been hit
    worth_t *worth         # WORTH
    touch_t *touches       # FOREIGN: [num_touches] in order; what there is no memory for is not asked
    int64_t num_touches
    int64_t touch_capacity

cdef int policy_init(policy_t *policy, order_t order, int64_t entries) noexcept nogil
cdef void policy_destroy(policy_t *policy) noexcept nogil
cdef void read_clock(policy_t *policy, double when) noexcept nogil
cdef void score_anew(policy_t *policy, index_t *index, int32_t entry, event_t event, int64_t depth,
                     int64_t length) noexcept nogil
cdef void note_evicted(policy_t *policy, index_t *index, int32_t entry) noexcept nogil

cdef inline void touch(policy_t *policy, index_t *index, int32_t entry, event_t event, int64_t depth,
                       int64_t length) noexcept nogil:
    """Weighs an entry anew: `depth` blocks come before it in a prompt of `length` blocks."""
    if policy.order == LRU:
        weigh(&index.leaves, entry, policy.now)
    else:
        score_anew(policy, index, entry, event, depth, length)
