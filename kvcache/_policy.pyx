"""Which cached blocks are worth keeping: the orders in which they leave, as scores of entries."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memset

from kvcache._index cimport entry_t, kv_hash_ids
from kvcache._leaves cimport weigh
from kvcache._worth cimport worth_destroy, worth_evicted, worth_hit, worth_inserted, worth_let_go, worth_new


cdef int policy_init(policy_t *policy, order_t order, int64_t entries) noexcept nogil:
    memset(policy, 0, sizeof(policy_t))
    policy.order = order
    if order == LFU or order == FOREIGN:
        policy.hits = <uint32_t *>calloc(entries, sizeof(uint32_t))
        return 0 if policy.hits != NULL else -1
    if order == WORTH:
        policy.worth = worth_new(entries)
        return 0 if policy.worth != NULL else -1
    return 0


cdef void policy_destroy(policy_t *policy) noexcept nogil:
    free(policy.hits)
    free(policy.touches)
    worth_destroy(policy.worth)
    memset(policy, 0, sizeof(policy_t))


cdef void read_clock(policy_t *policy, double when) noexcept nogil:
    """The time of a call: `when`, or, where it is not a number, how many calls there have been."""
    policy.calls += 1
    policy.now = when if when == when else <double>policy.calls


cdef void score_anew(policy_t *policy, index_t *index, int32_t entry, event_t event, int64_t depth,
                     int64_t length) noexcept nogil:
    """Of every order but that of the last touch."""
    if policy.order == WORTH:
        weigh(&index.leaves, entry, worth_of(policy, index, entry, event, depth))
    elif policy.order == FIFO:
        if event == INSERTED:
            weigh(&index.leaves, entry, <double>policy.calls)
    else:
        policy.hits[entry] = 0 if event == INSERTED else policy.hits[entry] + (event == HIT)
        if policy.order == LFU:
            weigh(&index.leaves, entry, policy.hits[entry] * <double>(<int64_t>1 << 36) + <double>policy.calls)
        else:
            ask_later(policy, index, entry, event, depth, length)


cdef inline double worth_of(policy_t *policy, const index_t *index, int32_t entry, event_t event,
                            int64_t depth) noexcept nogil:
    cdef const entry_t *seen = &index.entries[entry]
    cdef uint64_t before, content
    if event == HIT:
        return worth_hit(policy.worth, entry, depth, policy.calls)
    if event == LET_GO:
        return worth_let_go(policy.worth, entry, depth, policy.calls)
    before = policy.worth.histories[seen.parent].print if seen.parent >= 0 else <uint64_t>(-1 - seen.parent)
    content = kv_hash_ids(&index.ids[<int64_t>seen.block * index.block_size], index.block_size, index.fixed)
    return worth_inserted(policy.worth, entry, before, content, depth, policy.calls)


cdef void ask_later(policy_t *policy, const index_t *index, int32_t entry, event_t event, int64_t depth,
                    int64_t length) noexcept nogil:
    cdef void *grown
    if policy.num_touches == policy.touch_capacity:
        grown = realloc(policy.touches, (2 * policy.touch_capacity + 64) * sizeof(touch_t))
        if grown == NULL:
            return
        policy.touches = <touch_t *>grown
        policy.touch_capacity = 2 * policy.touch_capacity + 64
    policy.touches[policy.num_touches] = touch_t(
        entry=entry, generation=index.entries[entry].generation, event=event, depth=<int32_t>depth,
        length=<int32_t>length, hits=policy.hits[entry])
    policy.num_touches += 1


cdef void note_evicted(policy_t *policy, index_t *index, int32_t entry) noexcept nogil:
    """An entry is about to leave since its memory is needed."""
    if policy.order == WORTH:
        worth_evicted(policy.worth, entry)
