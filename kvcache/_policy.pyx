"""Which cached blocks are worth keeping: the orders in which they leave, as scores of entries."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from kvcache._leaves cimport weigh


cdef int policy_init(policy_t *policy, order_t order, int64_t entries) noexcept nogil:
    memset(policy, 0, sizeof(policy_t))
    policy.order = order
    if order == LFU:
        policy.hits = <uint32_t *>calloc(entries, sizeof(uint32_t))
    return -1 if order == LFU and policy.hits == NULL else 0


cdef void policy_destroy(policy_t *policy) noexcept nogil:
    free(policy.hits)
    memset(policy, 0, sizeof(policy_t))


cdef void read_clock(policy_t *policy, double when) noexcept nogil:
    """The time of a call: `when`, or, where it is not a number, how many calls there have been."""
    policy.calls += 1
    policy.now = when if when == when else <double>policy.calls


cdef void touch(policy_t *policy, index_t *index, int32_t entry, event_t event, int64_t depth,
                int64_t length) noexcept nogil:
    """Weighs an entry anew: `depth` blocks come before it in a prompt of `length` blocks."""
    if policy.order == LRU:
        weigh(&index.leaves, entry, policy.now)
    elif policy.order == FIFO:
        if event == INSERTED:
            weigh(&index.leaves, entry, <double>policy.calls)
    elif policy.order == LFU:
        policy.hits[entry] = 0 if event == INSERTED else policy.hits[entry] + (event == HIT)
        weigh(&index.leaves, entry, policy.hits[entry] * <double>(<int64_t>1 << 36) + <double>policy.calls)


cdef void note_evicted(policy_t *policy, index_t *index, int32_t entry) noexcept nogil:
    """An entry is about to leave since its memory is needed."""
    return
