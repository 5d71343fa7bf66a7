"""Native byte copying between the planes of an arena, and from what a caller writes into them."""

from libc.stdint cimport int32_t, int64_t

from kvcache._moves cimport move_t, span_t

cpdef enum DType:
    FLOAT32 = 1
    FLOAT16 = 2
    BFLOAT16 = 3
    UINT32 = 4
    UINT8 = 5

cdef struct plane_t:      # one plane of one layer: (heads, tokens, width), last axis contiguous
    char *data            # first byte; NULL where only the device may touch it, and after close
    int32_t dtype         # DType
    int32_t itemsize      # bytes of one element
    int64_t heads
    int64_t tokens        # of the arena: num_blocks * block_size
    int64_t width         # elements of one token in one head
    int64_t token_stride  # bytes: width * itemsize
    int64_t head_stride   # bytes: tokens * token_stride

cdef struct source_t:     # rows to be written into one plane, in any layout
    char *data            # element 0 of row 0 of head 0
    int64_t head_stride   # bytes, may be negative or 0 like the others
    int64_t row_stride
    int64_t item_stride

cdef class Copier:
    cdef plane_t *planes            # [num_planes], layer after layer
    cdef int64_t *first             # [num_layers + 1]: layer l has planes[first[l]:first[l + 1]]
    cdef readonly int64_t num_layers
    cdef readonly int64_t num_blocks
    cdef readonly int64_t block_size
    cdef bint closed
    cdef bint by_graph              # graph is not None
    cdef bint waits                 # wait is not None
    cdef tuple names                # per layer a tuple of plane names
    cdef tuple dtypes               # per layer a tuple of dtype names
    cdef tuple arrays               # per layer a tuple of arrays: they own what planes points into
    cdef object wait                # called without arguments: returns when no step in flight reads planes
    cdef object graph               # move(moves) and write(arrays, layer, spans) as graph nodes
    cdef dict errors                # what the last failed call of each thread raised, until it takes it

    cdef object take_error(self)

cdef class Sources:
    cdef source_t *items            # [count]; empty where the arena moves bytes as graph nodes
    cdef Copier copier              # whose planes they were checked against
    cdef readonly int64_t rows
    cdef readonly int64_t layer
    cdef int64_t count              # planes
    cdef public bint overwrites     # slots that a step in flight may read: wait for it before writing
    cdef readonly tuple arrays      # keeps the inputs alive; (heads, rows, width) each
    cdef list lent                  # the buffers that items points into

# A move_f; `copier` is a Copier that the caller keeps alive. Nonzero: nothing has been written, and the
# exception is in Copier.errors.
cdef int copier_move(void *copier, const move_t *moves, int64_t count) noexcept nogil

# Rows of `sources` (a Sources made for `layer`) to slots of every plane of `layer`. Nonzero as above.
cdef int copier_write(
    void *copier, void *sources, int64_t layer, const span_t *spans, int64_t count
) noexcept nogil

# For the rooms that copy bytes themselves. Nonzero: the exception is in Copier.errors.
cdef int keep_error(Copier self, object error) noexcept
cdef int wait(Copier self) noexcept with gil
