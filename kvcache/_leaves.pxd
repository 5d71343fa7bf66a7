"""What may be evicted, in the order in which it is: a heap of entries, the least worth keeping first."""

from libc.stdint cimport int32_t, int64_t

ctypedef struct leaves_t:
    int64_t capacity       # entries that there may be
    int32_t *items         # [count of capacity] the heap
    int32_t *rank          # [capacity] place in the heap + 1, 0 for what is not in it
    int64_t count
    double *score          # [capacity] of every entry, in the heap or not
    int32_t *priority      # [capacity] what outweighs every score; NULL until one is given

cdef inline bint is_leaf(const leaves_t *leaves, int32_t entry) noexcept nogil:
    return leaves.rank[entry] != 0

cdef int leaves_init(leaves_t *leaves, int64_t capacity) noexcept nogil
cdef void leaves_destroy(leaves_t *leaves) noexcept nogil
cdef void add_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef void remove_leaf(leaves_t *leaves, int32_t entry) noexcept nogil
cdef void weigh(leaves_t *leaves, int32_t entry, double score) noexcept nogil
cdef void prefer(leaves_t *leaves, int32_t entry, int32_t priority) noexcept nogil
cdef str check_leaves(const leaves_t *leaves)
