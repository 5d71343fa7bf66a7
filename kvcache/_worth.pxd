"""The odds that a cached block is needed again, learned from those that were."""

from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t

cdef enum:
    CLASSES = 16           # by the bit length of hits, and of depth

ctypedef struct history_t:  # of an entry
    uint64_t print         # of its tokens and all before them, whatever entry has them
    uint32_t last          # when it was touched last
    uint16_t hits          # touches before that one

ctypedef struct ghost_t:   # of an entry that was evicted
    uint32_t last
    uint16_t hits
    uint16_t tag           # of its print; 0 for no ghost

ctypedef struct worth_t:
    int64_t num_blocks
    int64_t num_ghosts
    history_t *histories   # [num_blocks] by entry
    ghost_t *ghosts        # [num_ghosts] by print
    int64_t inserted       # blocks: the time that is meant here
    int64_t halved         # when the counts were last halved
    double seen[CLASSES][CLASSES]      # touches, by class: hits, then depth
    double back[CLASSES][CLASSES]      # those after which the block was touched again
    double distance        # sum of inserted blocks between two touches of one block
    double returns         # of so many
    double bonus[CLASSES][CLASSES]     # what the odds are worth, in inserted blocks
    int64_t priced[CLASSES][CLASSES]   # the call that the bonus was computed in

cdef worth_t *worth_new(int64_t num_blocks) noexcept nogil
cdef void worth_destroy(worth_t *worth) noexcept nogil
cdef double worth_inserted(worth_t *worth, int32_t entry, uint64_t before, uint64_t content, int64_t depth,
                           int64_t call) noexcept nogil
cdef double worth_hit(worth_t *worth, int32_t entry, int64_t depth, int64_t call) noexcept nogil
cdef double worth_let_go(worth_t *worth, int32_t entry, int64_t depth, int64_t call) noexcept nogil
cdef void worth_evicted(worth_t *worth, int32_t entry) noexcept nogil
