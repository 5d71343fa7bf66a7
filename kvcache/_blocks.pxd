"""Blocks: which are free, and where runs of free ones (gaps) are."""

from libc.stdint cimport int32_t, int64_t, uint64_t

cdef enum:
    NOWHERE = -1
    NUM_CLASSES = 464   # gap lengths 1..63 have a class each, then 16 classes per power of two up to 2**31
    CLASS_WORDS = 8

# One per block. Meaningful only at the first and last block of a gap or of a run in use.
ctypedef struct cell_t:
    int32_t length  # blocks of this gap, at both its ends
    int32_t a       # gap, first block: next gap of its class     in use, both ends: the owner's
    int32_t b       # gap, first block: previous gap of its class

ctypedef struct blocks_t:
    int64_t num_blocks
    int64_t free_blocks
    int64_t num_words
    uint64_t *words          # [num_words] bit set: the block is free; bits beyond num_blocks are clear
    uint64_t *summary        # [ceil(num_words / 64)] bit set: the word has a free block
    int64_t lowest           # no summary word before this one has a bit
    cell_t *cells            # [num_blocks] the index of gaps; NULL where blocks are taken one by one
    int32_t heads[NUM_CLASSES]           # first gap of each class, NOWHERE for none
    uint64_t classes[CLASS_WORDS]        # bit set: the class has a gap

cdef extern from *:
    """
    #define kv_ctz(x) __builtin_ctzll(x)
    #define kv_clz(x) __builtin_clzll(x)
    #define kv_popcount(x) __builtin_popcountll(x)
    """
    int kv_ctz(uint64_t word) noexcept nogil
    int kv_clz(uint64_t word) noexcept nogil
    int kv_popcount(uint64_t word) noexcept nogil

cdef inline bint block_is_free(const blocks_t *blocks, int64_t block) noexcept nogil:
    return (blocks.words[block >> 6] >> (block & 63)) & 1

cdef int blocks_init(blocks_t *blocks, int64_t num_blocks, bint with_gaps) noexcept nogil
cdef void blocks_destroy(blocks_t *blocks) noexcept nogil

# Runs: need the index of gaps.
cdef int64_t gap_for(const blocks_t *blocks, int64_t length) noexcept nogil
cdef int64_t longest_gap(const blocks_t *blocks) noexcept nogil
cdef int64_t next_gap_for(const blocks_t *blocks, int64_t gap, int64_t length) noexcept nogil
cdef int64_t gap_at(const blocks_t *blocks, int64_t block) noexcept nogil
cdef int64_t gap_start(const blocks_t *blocks, int64_t block) noexcept nogil
cdef void take_run(blocks_t *blocks, int64_t gap, int64_t start, int64_t length) noexcept nogil
cdef int64_t give_run(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil

# Single blocks: for pools without the index of gaps.
cdef void mark_free(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil
cdef void take_lowest(blocks_t *blocks, int64_t count, int32_t *taken) noexcept nogil
cdef void take_block(blocks_t *blocks, int64_t block) noexcept nogil

cdef int64_t largest_free_run(const blocks_t *blocks) noexcept nogil
cdef int64_t longest_run_of_bits(const blocks_t *blocks, const uint64_t *others) noexcept nogil
cdef int64_t next_free(const blocks_t *blocks, int64_t start) noexcept nogil
cdef str check_blocks(const blocks_t *blocks)
cdef void draw_blocks(const blocks_t *blocks, char *cells) noexcept nogil
