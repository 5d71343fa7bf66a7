"""The space that runs lie in: who is where, what is beside it, and the moves that are planned."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from kvcache._blocks cimport NOWHERE, block_is_free, blocks_t, gap_at
from kvcache._moves cimport move_t

# What appends touch: 16 bytes a sequence.
ctypedef struct hot_t:
    int32_t tokens         # used tokens
    int32_t soft           # tokens may grow to this without a look at anything else
    int32_t base           # slot of the next token is base + tokens, while tokens < soft
    uint32_t generation    # odd while the sequence lives

ctypedef struct seq_t:
    int32_t blocks         # held; of a scattered sequence in contiguous placement: in its first run
    int32_t limit          # tokens
    int32_t start          # first block of the run; meaningful while blocks > 0 and table is not in use
    int32_t *table         # paged: block ids in token order, [blocks] of [capacity]
    int32_t capacity       # entries that the table has room for
    int32_t breaks         # paged: places where the next block is not the one after; else further runs
    int32_t next_run       # contiguous, scattered: the place of the run after this one, NOWHERE for none
    int32_t last_run       # the place of the last run, of a further run meaningless
    int32_t head           # of a further run: the place of its sequence; else its own
    int32_t before         # blocks of the sequence before this run
    int32_t further        # blocks of its further runs, together
    uint32_t version       # changes when a token comes to another slot or is cut, and when the run begins or ends
    int32_t next_vacant    # while the sequence does not live: the next vacant place, NOWHERE for none
    int32_t known          # tokens whose ids are known, from the first on
    int32_t indexed        # leading blocks that have an entry in the index of prefixes
    int32_t salt           # what its prefixes are kept under
    int32_t priority       # of what is entered of it, until `expires` by the cache's clock
    double expires
    int32_t next_double    # of a cached run that begins with what is elsewhere too: the next one, NOWHERE for none
    int32_t last_double    # and the one before

ctypedef struct plan_t:    # a placement that may need moves first; filled by the place_ functions
    int64_t start          # where the run that asked will begin
    int64_t gap            # first block of the gap that it will be taken from, once the moves are done
    int64_t tokens         # used tokens that move
    int64_t count          # moves
    int64_t capacity       # of the two arrays
    int32_t *who           # [count] sequences that move, in an order that overwrites nothing still to be moved
    move_t *moves          # [count] in the same order

ctypedef struct space_t:
    blocks_t blocks
    int64_t block_size
    hot_t *hot             # [places]
    seq_t *seqs            # [places]
    int64_t live           # sequences
    int64_t further        # runs beyond the first of a sequence; each has a place in the two tables
    bint traced            # every block of a run names its owner, since the index of prefixes asks for it
    int64_t cursor         # where the next search for a window begins
    plan_t plan            # the one in hand

cdef inline int32_t owner_at(const space_t *space, int64_t block) noexcept nogil:
    """Whose run `block` is the first or last of; NOWHERE beyond the pool's ends and for nobody's run."""
    if block < 0 or block >= space.blocks.num_blocks:
        return NOWHERE
    return space.blocks.cells[block].a

cdef inline int64_t gap_before(const space_t *space, int64_t block) noexcept nogil:
    """Blocks of the gap that ends right before `block`."""
    if block == 0 or not block_is_free(&space.blocks, block - 1):
        return 0
    return space.blocks.cells[block - 1].length

cdef inline int64_t end_of(const seq_t *seq) noexcept nogil:
    return seq.start + seq.blocks

cdef inline int64_t room_after(const space_t *space, const seq_t *seq) noexcept nogil:
    return gap_at(&space.blocks, end_of(seq))

cdef inline int64_t held(const seq_t *seq) noexcept nogil:
    """Blocks of a sequence."""
    return seq.blocks + seq.further

cdef inline int64_t growth_of(const space_t *space, const seq_t *seq) noexcept nogil:
    """Blocks that the sequence may still ask for."""
    return (seq.limit + space.block_size - 1) // space.block_size - held(seq)

cdef inline bint run_grows(const space_t *space, int32_t who) noexcept nogil:
    """Whether a run is the last one of its sequence."""
    return space.seqs[space.seqs[who].head].last_run == who

cdef inline int64_t run_tokens(const space_t *space, int32_t who) noexcept nogil:
    """Used tokens in a run."""
    cdef const seq_t *seq = &space.seqs[who]
    if run_grows(space, who):
        return space.hot[seq.head].tokens - seq.before * space.block_size
    return seq.blocks * space.block_size

cdef inline int64_t run_growth(const space_t *space, int32_t who) noexcept nogil:
    """Blocks that may still be asked for right after a run."""
    return growth_of(space, &space.seqs[space.seqs[who].head]) if run_grows(space, who) else 0

cdef int plan_reserve(plan_t *plan, int64_t count) noexcept nogil
cdef void plan_destroy(plan_t *plan) noexcept nogil
cdef void plan_clear(plan_t *plan) noexcept nogil
cdef void plan_move(space_t *space, int32_t who, int64_t to) noexcept nogil
cdef void settle(space_t *space) noexcept nogil
cdef void own_run(space_t *space, int32_t who) noexcept nogil
cdef void own_ends(space_t *space, int32_t who) noexcept nogil
