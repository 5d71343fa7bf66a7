"""What may be evicted: binary heaps that know where each entry is, so that a new score costs its way and no search.

One has everything, one for each salt with a quota what is its, one the priorities that expire. Whatever a heap may come
to need is had when it is made, as pages of zeros that nobody has touched yet.
"""

from libc.math cimport INFINITY
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove, memset


cdef int leaves_init(leaves_t *leaves, int64_t capacity) noexcept nogil:
    memset(leaves, 0, sizeof(leaves_t))
    leaves.capacity = capacity
    leaves.heap.items = <int32_t *>calloc(capacity, sizeof(int32_t))
    leaves.heap.rank = <int32_t *>calloc(capacity, sizeof(int32_t))
    leaves.score = <double *>calloc(capacity, sizeof(double))
    leaves.salt = <int32_t *>calloc(capacity, sizeof(int32_t))
    if leaves.heap.items == NULL or leaves.heap.rank == NULL or leaves.score == NULL or leaves.salt == NULL:
        return -1
    return 0


cdef void leaves_destroy(leaves_t *leaves) noexcept nogil:
    cdef int64_t index
    for index in range(leaves.num_quotas):
        free(leaves.quotas[index].heap.items)
    free(leaves.quotas)
    free(leaves.quota_rank)
    free(leaves.heap.items)
    free(leaves.heap.rank)
    free(leaves.ageing.items)
    free(leaves.ageing.rank)
    free(leaves.score)
    free(leaves.priority)
    free(leaves.expires)
    free(leaves.salt)
    memset(leaves, 0, sizeof(leaves_t))


# ---- a heap

cdef inline bint precedes(const leaves_t *leaves, const heap_t *heap, int32_t one, int32_t other) noexcept nogil:
    """Whether `one` comes before `other` in a heap."""
    if heap == &leaves.ageing:
        return leaves.expires[one] < leaves.expires[other]
    if leaves.priority != NULL and leaves.priority[one] != leaves.priority[other]:
        return leaves.priority[one] < leaves.priority[other]
    return leaves.score[one] < leaves.score[other]


cdef inline void put(heap_t *heap, int64_t at, int32_t entry) noexcept nogil:
    heap.items[at] = entry
    heap.rank[entry] = <int32_t>(at + 1)


cdef int64_t rise(const leaves_t *leaves, heap_t *heap, int64_t at, int32_t entry) noexcept nogil:
    """Where the entry belongs, from `at` towards the first; those that it passes have moved."""
    cdef int64_t above
    while at > 0:
        above = (at - 1) >> 1
        if not precedes(leaves, heap, entry, heap.items[above]):
            break
        put(heap, at, heap.items[above])
        at = above
    return at


cdef int64_t sink(const leaves_t *leaves, heap_t *heap, int64_t at, int32_t entry) noexcept nogil:
    cdef int64_t below = 2 * at + 1
    while below < heap.count:
        if below + 1 < heap.count and precedes(leaves, heap, heap.items[below + 1], heap.items[below]):
            below += 1
        if not precedes(leaves, heap, heap.items[below], entry):
            break
        put(heap, at, heap.items[below])
        at = below
        below = 2 * at + 1
    return at


cdef void seat(const leaves_t *leaves, heap_t *heap, int64_t at, int32_t entry) noexcept nogil:
    """Puts the entry in order, at `at` or on its way up or down from there."""
    cdef int64_t up = rise(leaves, heap, at, entry)
    put(heap, sink(leaves, heap, at, entry) if up == at else up, entry)


cdef void add_to(const leaves_t *leaves, heap_t *heap, int32_t entry) noexcept nogil:
    heap.count += 1
    put(heap, rise(leaves, heap, heap.count - 1, entry), entry)


cdef void take_from(const leaves_t *leaves, heap_t *heap, int32_t entry) noexcept nogil:
    cdef int64_t at = heap.rank[entry] - 1
    cdef int32_t last = heap.items[heap.count - 1]
    heap.rank[entry] = 0
    heap.count -= 1
    if last != entry:
        seat(leaves, heap, at, last)


cdef inline void replace_in(const leaves_t *leaves, heap_t *heap, int32_t entry, int32_t successor) noexcept nogil:
    cdef int64_t at = heap.rank[entry] - 1
    heap.rank[entry] = 0
    seat(leaves, heap, at, successor)


cdef inline void reseat(const leaves_t *leaves, heap_t *heap, int32_t entry) noexcept nogil:
    if heap.rank[entry]:
        seat(leaves, heap, heap.rank[entry] - 1, entry)


# ---- leaves

cdef void add_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    add_to(leaves, &leaves.heap, entry)
    if quota != NULL:
        add_to(leaves, &quota.heap, entry)


cdef void remove_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    take_from(leaves, &leaves.heap, entry)
    if quota != NULL:
        take_from(leaves, &quota.heap, entry)


cdef void replace_leaf(leaves_t *leaves, int32_t entry, int32_t successor) noexcept nogil:
    """An entry of the same salt is a leaf in another one's stead, mostly at the same place."""
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    replace_in(leaves, &leaves.heap, entry, successor)
    if quota != NULL:
        replace_in(leaves, &quota.heap, entry, successor)


cdef void reseat_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    reseat(leaves, &leaves.heap, entry)
    if quota != NULL:
        reseat(leaves, &quota.heap, entry)


cdef void forget_leaf(leaves_t *leaves, int32_t entry) noexcept nogil:
    """An entry that is no leaf is no more."""
    if leaves.priority != NULL:
        leaves.priority[entry] = 0
        if leaves.ageing.rank[entry]:
            take_from(leaves, &leaves.ageing, entry)


# ---- priorities

cdef int reserve_priorities(leaves_t *leaves) noexcept nogil:
    """Whoever gives the first priority: all entries have one from now on, mostly 0."""
    if leaves.priority != NULL:
        return 0
    if leaves.expires == NULL:
        leaves.expires = <double *>calloc(leaves.capacity, sizeof(double))
    if leaves.ageing.items == NULL:
        leaves.ageing.items = <int32_t *>calloc(leaves.capacity, sizeof(int32_t))
    if leaves.ageing.rank == NULL:
        leaves.ageing.rank = <int32_t *>calloc(leaves.capacity, sizeof(int32_t))
    if leaves.expires == NULL or leaves.ageing.items == NULL or leaves.ageing.rank == NULL:
        return -1
    leaves.priority = <int32_t *>calloc(leaves.capacity, sizeof(int32_t))
    return 0 if leaves.priority != NULL else -1


cdef void prefer(leaves_t *leaves, int32_t entry, int32_t priority, double expires) noexcept nogil:
    """Gives an entry a priority until `expires`, unless it has a higher one; of equal ones the longer holds."""
    if leaves.priority == NULL or priority < leaves.priority[entry]:
        return
    if priority == leaves.priority[entry]:
        if priority == 0 or not leaves.ageing.rank[entry]:
            return  # it holds for ever
        expires = max(expires, leaves.expires[entry])
    if leaves.ageing.rank[entry]:
        take_from(leaves, &leaves.ageing, entry)
    leaves.priority[entry] = priority
    leaves.expires[entry] = expires
    if priority and expires < INFINITY:
        add_to(leaves, &leaves.ageing, entry)
    reseat_leaf(leaves, entry)


cdef void age(leaves_t *leaves, double now) noexcept nogil:
    """Priorities whose time is over are 0 again."""
    cdef int32_t entry
    while leaves.ageing.count and leaves.expires[leaves.ageing.items[0]] <= now:
        entry = leaves.ageing.items[0]
        take_from(leaves, &leaves.ageing, entry)
        leaves.priority[entry] = 0
        reseat_leaf(leaves, entry)


# ---- quotas

cdef int64_t quota_at(const leaves_t *leaves, int32_t salt) noexcept nogil:
    """Where the quota of a salt is, or would be."""
    cdef int64_t low = 0, high = leaves.num_quotas, middle
    while low < high:
        middle = (low + high) >> 1
        if leaves.quotas[middle].salt < salt:
            low = middle + 1
        else:
            high = middle
    return low


cdef quota_t *quota_of(const leaves_t *leaves, int32_t salt) noexcept nogil:
    """The quota of a salt, NULL if it has none."""
    cdef int64_t at
    if leaves.num_quotas == 0:
        return NULL
    at = quota_at(leaves, salt)
    return &leaves.quotas[at] if at < leaves.num_quotas and leaves.quotas[at].salt == salt else NULL


cdef int set_quota(leaves_t *leaves, int32_t salt, int64_t most) noexcept nogil:
    """Lets a salt have `most` cached blocks; a new quota knows nothing yet of what is there."""
    cdef quota_t *quota = quota_of(leaves, salt)
    cdef int64_t at = quota_at(leaves, salt)
    cdef void *grown
    cdef int32_t *items
    if quota != NULL:
        quota.most = most
        return 0
    if leaves.quota_rank == NULL:
        leaves.quota_rank = <int32_t *>calloc(leaves.capacity, sizeof(int32_t))
    items = <int32_t *>calloc(leaves.capacity, sizeof(int32_t))
    grown = realloc(leaves.quotas, (leaves.num_quotas + 1) * sizeof(quota_t))
    if grown != NULL:
        leaves.quotas = <quota_t *>grown
    if leaves.quota_rank == NULL or items == NULL or grown == NULL:
        free(items)
        return -1
    memmove(&leaves.quotas[at + 1], &leaves.quotas[at], (leaves.num_quotas - at) * sizeof(quota_t))
    quota = &leaves.quotas[at]
    quota.salt, quota.most, quota.cached = salt, most, 0
    quota.heap.items, quota.heap.rank, quota.heap.count = items, leaves.quota_rank, 0
    leaves.num_quotas += 1
    return 0


cdef void join_quota(leaves_t *leaves, int32_t entry) noexcept nogil:
    """A leaf that was there before its salt had a quota."""
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    if quota != NULL and leaves.heap.rank[entry] and not quota.heap.rank[entry]:
        add_to(leaves, &quota.heap, entry)


cdef void add_to_quota(leaves_t *leaves, int32_t entry, int64_t blocks) noexcept nogil:
    cdef quota_t *quota = quota_of(leaves, leaves.salt[entry])
    if quota != NULL:
        quota.cached += blocks


# ---- checks

cdef str check_leaves(const leaves_t *leaves):
    cdef int64_t index
    cdef int32_t entry
    cdef str wrong = check_heap(leaves, &leaves.heap, "leaf") or check_heap(leaves, &leaves.ageing, "priority")
    if wrong is not None:
        return wrong
    for index in range(leaves.num_quotas):
        wrong = check_heap(leaves, &leaves.quotas[index].heap, f"leaf of salt {leaves.quotas[index].salt}")
        if wrong is not None:
            return wrong
        if leaves.quotas[index].cached > leaves.quotas[index].most:
            return (f"{leaves.quotas[index].cached} blocks are cached under salt {leaves.quotas[index].salt}, "
                    f"{leaves.quotas[index].most} may be")
    for index in range(leaves.heap.count):
        entry = leaves.heap.items[index]
        if quota_of(leaves, leaves.salt[entry]) != NULL and not leaves.quota_rank[entry]:
            return f"entry {entry} is a leaf, and not one of its salt {leaves.salt[entry]}"
    return None


cdef str check_heap(const leaves_t *leaves, const heap_t *heap, str name):
    cdef int64_t at
    cdef int32_t entry
    for at in range(heap.count):
        entry = heap.items[at]
        if heap.rank[entry] != at + 1:
            return f"entry {entry} is {name} {at}, its rank says {heap.rank[entry] - 1}"
        if at and precedes(leaves, heap, entry, heap.items[(at - 1) >> 1]):
            return f"{name} {at} precedes {name} {(at - 1) >> 1}, which is before it"
    return None
