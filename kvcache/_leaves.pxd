"""What may be evicted, in the order in which it is: heaps of entries, the least worth keeping first."""

from libc.stdint cimport int32_t, int64_t

ctypedef struct heap_t:
    int32_t *items         # [count] entries, the first one first
    int32_t *rank          # [entries] place in the heap + 1, 0 for what is not in it; several heaps may share it
    int64_t count

ctypedef struct quota_t:   # what may be cached under one salt
    int32_t salt
    int64_t most           # blocks
    int64_t cached
    heap_t heap            # of the leaves that are its

ctypedef struct leaves_t:
    int64_t capacity       # entries that there may be
    heap_t heap            # of everything that may be evicted
    double *score          # [capacity] of every entry, in the heap or not
    int32_t *priority      # [capacity] what outweighs every score; NULL until one is given
    double *expires        # [capacity] when the priority is 0 again, by the cache's clock; NULL likewise
    heap_t ageing          # of entries whose priority expires, the next one first
    int32_t *salt          # [capacity] of every entry; 0: none
    quota_t *quotas        # [num_quotas] by salt, ascending
    int64_t num_quotas
    int32_t *quota_rank    # [capacity] of all their heaps; NULL until there is one

cdef inline bint is_leaf(const leaves_t *leaves, int32_t entry) noexcept nogil:
    return leaves.heap.rank[entry] != 0

cdef int leaves_init(leaves_t *leaves, int64_t capacity) noexcept nogil
cdef void leaves_destroy(leaves_t *leaves) noexcept nogil
cdef quota_t *quota_of(const leaves_t *leaves, int32_t salt) noexcept nogil
cdef int set_quota(leaves_t *leaves, int32_t salt, int64_t most) noexcept nogil
cdef void join_quota(leaves_t *leaves, int32_t entry) noexcept nogil
cdef void add_to_quota(leaves_t *leaves, int32_t entry, int64_t blocks) noexcept nogil
cdef void add_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef void remove_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef void replace_leaf(leaves_t *leaves, int32_t entry, int32_t successor) noexcept nogil
cdef void reseat_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef int reserve_priorities(leaves_t *leaves) noexcept nogil
cdef void prefer(leaves_t *leaves, int32_t entry, int32_t priority, double expires) noexcept nogil
cdef void age(leaves_t *leaves, double now) noexcept nogil
cdef void forget_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef str check_leaves(const leaves_t *leaves)

cdef inline void weigh(leaves_t *leaves, int32_t entry, double score) noexcept nogil:
    leaves.score[entry] = score
    if is_leaf(leaves, entry):
        reseat_leaf(leaves, entry)

cdef inline void count_quota(leaves_t *leaves, int32_t entry, int64_t blocks) noexcept nogil:
    """So many blocks more are cached under the salt of an entry."""
    if leaves.num_quotas:
        add_to_quota(leaves, entry, blocks)
