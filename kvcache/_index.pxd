"""The index of prefixes: which block of tokens, after which other one, lies in which blocks of the arena.

An entry is one whole block of token ids after one other entry, or at the beginning of a prompt under a salt. One block
or several have its content. Blocks that nobody holds and that have an entry are cached: free memory that is found.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kvcache._journal cimport journal_t
from kvcache._leaves cimport leaves_t

cdef extern from "_hash.h" nogil:
    uint64_t kv_hash_ids(const int32_t *ids, int64_t count, const uint64_t *seed)
    uint64_t kv_hash_after(uint64_t content, int32_t parent, uint32_t generation, const uint64_t *seed)

ctypedef struct entry_t:
    int32_t parent         # the entry before it; first of a prompt: -1 - salt
    uint32_t ancestry      # the parent's generation when this was entered: another one since, and nothing leads here
    uint32_t generation    # odd while there is content
    int32_t next           # in its bucket, or while unused the next unused one: entry + 1, 0 for none
    int32_t before         # in its bucket: entry + 1, 0 for none
    int32_t kids           # entries after it that have blocks which may be evicted
    int32_t block          # the first of its blocks: one that is held, if any is
    int32_t cached         # of its blocks: cached ones, without the fresh

ctypedef struct index_t:
    int64_t num_blocks
    int64_t block_size
    int32_t *ids           # [num_blocks * block_size] beside the K/V: of a sequence as far as its tokens are known
    int32_t *entry_of      # [num_blocks] entry of the block's content + 1, 0 for none
    int32_t *next_copy     # [num_blocks] of blocks with one content: the next + 1, 0 for none; cached ones come last
    int32_t *last_copy     # [num_blocks] the one before + 1; of the first one: the last one of all, 0 if it is alone
    uint64_t *cached       # bit set: nobody holds the block, and it has an entry
    uint64_t *pinned       # bit set: a pin holds the block, beside others or alone
    int32_t *pins          # [entries] how often each is pinned
    uint32_t *gone         # [mask + 1] prints of entries that were evicted, by bucket; 0 for none
    uint64_t *fresh        # of the cached: let go under a hold that has not ended, so that it may not be given away yet
    entry_t *entries       # [num_blocks + 1] the last one is never used, so that each has one after it
    int32_t unused         # first unused entry + 1
    int32_t touched        # entries that have ever been used
    int32_t *buckets       # [mask + 1] first entry + 1
    uint64_t mask
    uint64_t hash_mask     # all ones, but where a test weakens the hash
    uint64_t seed[4]
    uint64_t fixed[4]      # the seed of hashes that decide what is evicted: the same in every process
    int64_t num_entries
    int64_t cached_blocks  # without the fresh ones
    int64_t fresh_blocks
    int64_t pinned_blocks
    journal_t *journal     # what happens, for whoever asks; NULL until somebody has
    leaves_t leaves        # what may be evicted, in order

cdef inline bint bit_of(const uint64_t *words, int64_t block) noexcept nogil:
    return (words[block >> 6] >> (block & 63)) & 1

cdef inline int32_t entry_at(const index_t *index, int64_t block) noexcept nogil:
    """The entry whose content a block has, -1 for none."""
    return index.entry_of[block] - 1

cdef inline bint is_cached(const index_t *index, int64_t block) noexcept nogil:
    return bit_of(index.cached, block)

cdef inline bint is_pinned(const index_t *index, int64_t block) noexcept nogil:
    return index.pinned_blocks != 0 and bit_of(index.pinned, block)

cdef inline int32_t parent_of(const index_t *index, int32_t entry) noexcept nogil:
    """The entry before, if it is still the one of then; else -1."""
    cdef const entry_t *seen = &index.entries[entry]
    if seen.parent >= 0 and index.entries[seen.parent].generation == seen.ancestry:
        return seen.parent
    return -1

cdef inline bint has_twin(const index_t *index, int64_t block) noexcept nogil:
    """Whether another block has the same content, after the same prefix."""
    return index.last_copy[block] != 0

cdef int index_init(index_t *index, int64_t num_blocks, int64_t block_size, const uint64_t *seed) noexcept nogil
cdef void index_destroy(index_t *index) noexcept nogil
cdef int32_t find_after(const index_t *index, int32_t parent, const int32_t *ids) noexcept nogil
cdef int64_t match_ids(const index_t *index, int32_t salt, const int32_t *ids, int64_t most,
                       int32_t *found) noexcept nogil
cdef int32_t enter_block(index_t *index, int32_t parent, int64_t block) noexcept nogil
cdef void join_entry(index_t *index, int32_t entry, int64_t block) noexcept nogil
cdef void forget_block(index_t *index, int64_t block) noexcept nogil
cdef void evict_block(index_t *index, int64_t block) noexcept nogil
cdef void cache_block(index_t *index, int64_t block, bint fresh) noexcept nogil
cdef void uncache_block(index_t *index, int64_t block) noexcept nogil
cdef void settle_block(index_t *index, int64_t block) noexcept nogil
cdef void move_blocks(index_t *index, int64_t source, int64_t destination, int64_t count) noexcept nogil
cdef void pin_block(index_t *index, int64_t block) noexcept nogil
cdef void unpin_block(index_t *index, int64_t block) noexcept nogil
cdef bint was_evicted(const index_t *index, int32_t parent, const int32_t *ids) noexcept nogil
cdef int64_t serial_of(const index_t *index, int32_t entry, uint32_t generation) noexcept nogil
cdef int32_t cached_copy(const index_t *index, int32_t entry) noexcept nogil
cdef str check_index(const index_t *index)
