"""What may be evicted: a binary heap that knows where each entry is, so that a new score costs its way and no search."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset


cdef int leaves_init(leaves_t *leaves, int64_t capacity) noexcept nogil:
    memset(leaves, 0, sizeof(leaves_t))
    leaves.capacity = capacity
    leaves.items = <int32_t *>calloc(capacity, sizeof(int32_t))
    leaves.rank = <int32_t *>calloc(capacity, sizeof(int32_t))
    leaves.score = <double *>calloc(capacity, sizeof(double))
    return 0 if leaves.items != NULL and leaves.rank != NULL and leaves.score != NULL else -1


cdef void leaves_destroy(leaves_t *leaves) noexcept nogil:
    free(leaves.items)
    free(leaves.rank)
    free(leaves.score)
    free(leaves.priority)
    memset(leaves, 0, sizeof(leaves_t))


cdef inline bint leaves_first(const leaves_t *leaves, int32_t one, int32_t other) noexcept nogil:
    """Whether `one` is evicted before `other`."""
    if leaves.priority != NULL and leaves.priority[one] != leaves.priority[other]:
        return leaves.priority[one] < leaves.priority[other]
    return leaves.score[one] < leaves.score[other]


cdef inline void put(leaves_t *leaves, int64_t at, int32_t entry) noexcept nogil:
    leaves.items[at] = entry
    leaves.rank[entry] = <int32_t>(at + 1)


cdef int64_t rise(leaves_t *leaves, int64_t at, int32_t entry) noexcept nogil:
    """Where the entry belongs, from `at` towards the first; those that it passes have moved."""
    cdef int64_t above
    while at > 0:
        above = (at - 1) >> 1
        if not leaves_first(leaves, entry, leaves.items[above]):
            break
        put(leaves, at, leaves.items[above])
        at = above
    return at


cdef int64_t sink(leaves_t *leaves, int64_t at, int32_t entry) noexcept nogil:
    cdef int64_t below = 2 * at + 1
    while below < leaves.count:
        if below + 1 < leaves.count and leaves_first(leaves, leaves.items[below + 1], leaves.items[below]):
            below += 1
        if not leaves_first(leaves, leaves.items[below], entry):
            break
        put(leaves, at, leaves.items[below])
        at = below
        below = 2 * at + 1
    return at


cdef void seat(leaves_t *leaves, int64_t at, int32_t entry) noexcept nogil:
    """Puts the entry in order, at `at` or on its way up or down from there."""
    cdef int64_t up = rise(leaves, at, entry)
    put(leaves, sink(leaves, at, entry) if up == at else up, entry)


cdef void add_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    leaves.count += 1
    put(leaves, rise(leaves, leaves.count - 1, entry), entry)


cdef void remove_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    cdef int64_t at = leaves.rank[entry] - 1
    cdef int32_t last = leaves.items[leaves.count - 1]
    leaves.rank[entry] = 0
    leaves.count -= 1
    if last != entry:
        seat(leaves, at, last)


cdef void weigh(leaves_t *leaves, int32_t entry, double score) noexcept nogil:
    leaves.score[entry] = score
    if leaves.rank[entry]:
        seat(leaves, leaves.rank[entry] - 1, entry)


cdef void prefer(leaves_t *leaves, int32_t entry, int32_t priority) noexcept nogil:
    """Whoever calls has seen to it that there are priorities."""
    leaves.priority[entry] = priority
    if leaves.rank[entry]:
        seat(leaves, leaves.rank[entry] - 1, entry)


cdef str check_leaves(const leaves_t *leaves):
    cdef int64_t at
    cdef int32_t entry
    for at in range(leaves.count):
        entry = leaves.items[at]
        if leaves.rank[entry] != at + 1:
            return f"entry {entry} is leaf {at}, its rank says {leaves.rank[entry] - 1}"
        if at and leaves_first(leaves, entry, leaves.items[(at - 1) >> 1]):
            return f"leaf {at} is to be evicted before leaf {(at - 1) >> 1}, which precedes it"
    return None
