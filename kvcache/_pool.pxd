"""The pool: the one struct that everything hangs on, and what every decision needs of it."""

from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint32_t, uint64_t, uintptr_t

from kvcache._index cimport index_t
from kvcache._lock cimport kv_lock_t
from kvcache._moves cimport move_f, move_t, span_t
from kvcache._policy cimport policy_t
from kvcache._space cimport held, hot_t, seq_t, space_t

ctypedef uint64_t handle_t  # generation << 32 | place; 0 is never live

ctypedef enum status_t:
    OK = 0
    NO_ROOM = 1       # does not fit now: nothing changed
    PAST_LIMIT = 2    # would exceed the sequence's limit: nothing changed
    STALE = 3         # the handle is not of a live sequence
    HELD = 4          # must wait for the last hold to end, and this thread holds
    BUSY = 5          # not to be decided without waiting or moving: call again without the GIL
    MOVE_FAILED = 6   # the arena could not move: nothing changed, it keeps the exception
    NO_MEMORY = 7
    BELOW_USED = 8    # a limit below the used tokens, or a commit beyond them
    NOT_HELD = 9      # release without a hold of this thread
    GONE = 10         # a position that no longer exists
    CLOSED = 11
    BAD_COUNT = 12    # a count or limit that cannot be meant
    NO_RUN = 13       # no room for a run within the bound on moves: scattered instead, never returned by a call

ctypedef struct holder_t:
    uintptr_t thread
    int64_t depth
    bint brief              # only while bytes are copied

ctypedef struct extent_t:
    int32_t start
    int32_t length

ctypedef struct spans_t:
    span_t *items           # [count] of [capacity]
    int64_t count
    int64_t capacity

cdef enum:
    NUM_LATENCIES = 13      # up to 1 µs, 4 µs, ... 4**11 µs, and beyond

ctypedef struct peaks_t:    # the most at once
    int64_t used
    int64_t live
    int64_t claims

ctypedef struct refusals_t:
    int64_t arena_full      # admissions and forks for which too few blocks were free
    int64_t promises        # admissions, forks, limits and cuts whose blocks were free, but promised to others
    int64_t growth          # appends within the limit that found no block
    int64_t past_limit      # appends beyond it

ctypedef struct reuse_t:    # what came of prompts whose ids were given
    int64_t queries         # admitted
    int64_t query_tokens
    int64_t hit_tokens
    int64_t revived_tokens  # of these: in a run that was continued where it was
    int64_t cold            # queries that found less than there could be, by why: the block had never been there
    int64_t evicted         # it had been there
    int64_t salted          # nothing is known under this salt
    int64_t partial         # no whole block was left to look for
    int64_t disabled        # nothing is kept
    int64_t for_room        # blocks evicted since their memory was needed
    int64_t for_quota       # since their salt had too many
    int64_t doubles         # since another block has their content
    int64_t cleared         # since somebody said so

ctypedef struct sight_t:
    peaks_t peak            # since they were last forgotten; up to `frees`, what every admission touches
    int64_t admissions      # sequences that began, forks included
    int64_t frees           # sequences that ended
    peaks_t past            # the peaks before that
    refusals_t refused
    int64_t num_timed       # admissions that waited, moved or were asked for without the GIL; the others read no clock
    int64_t nanoseconds     # that these took
    int64_t latencies[NUM_LATENCIES]  # of these
    reuse_t reuse

ctypedef struct request_t:  # for whom admission is asked
    int64_t tokens          # of the prompt
    int64_t limit           # in total
    const int32_t *ids      # [tokens] of the prompt; NULL: only counted
    int32_t salt
    int64_t keep            # blocks that must stay free beside it
    int32_t priority
    double ttl              # how long the priority holds, in units of the clock; infinite: for ever
    double when             # the clock's time; not a number: calls are counted
    int64_t cached          # answer: leading tokens whose K/V are in place

ctypedef struct pool_t:
    kv_lock_t lock
    space_t space
    bint paged
    bint closed
    int64_t budget          # blocks that may be held or claimed: overcommit * num_blocks
    int64_t claims          # blocks that live sequences may still ask for, copies included
    int64_t copies          # of these: outstanding copies of shared partial blocks
    int32_t *refs           # paged: [num_blocks] holders; meaningful only for blocks in use
    int32_t *writers        # paged: [num_blocks] holders that may append into it; meaningful while refs > 1
    int64_t places          # entries of space.hot and space.seqs
    int32_t vacant          # first vacant place, NOWHERE for none
    int64_t vacancies       # how many there are
    index_t index           # which tokens are where; all NULL: nothing is kept
    policy_t policy
    int32_t *found          # [2 * found_capacity] entries that a prompt hits, then the blocks to copy from
    int64_t found_capacity
    int64_t cached_runs     # contiguous: runs that nobody holds; each has a place in the two tables
    int32_t first_double    # of these: those that begin with what is elsewhere too, the oldest first; NOWHERE for none
    int32_t last_double
    extent_t *lately        # blocks that became cached under a hold
    int64_t num_lately
    int64_t lately_capacity
    int64_t num_marks       # written prefixes that a sequence has (one per layer)
    int32_t *marks          # [places * num_marks] tokens written, from the first on
    extent_t *written       # [places * num_marks] from the first token ever written to the last, for holds
    extent_t *limbo         # blocks freed under a hold; theirs again when the last one ends
    int64_t num_limbo
    int64_t limbo_capacity
    int64_t limbo_blocks
    extent_t *kept          # (block, tokens from its beginning): content of blocks still in use, let go under a hold
    int64_t num_kept        # until the last hold ends; then 0
    int64_t kept_capacity
    holder_t *holders       # threads that hold
    int64_t num_holders
    int64_t num_brief       # of these: brief ones
    int64_t holder_capacity
    int64_t waiting         # calls that wait for the last hold to end
    spans_t spans           # of the write in hand
    int64_t wanted          # blocks that the last copy on write needed, and how many were unclaimed
    int64_t unclaimed
    handle_t *deferred      # freed by a finalizer while this thread ran Python under the lock
    int64_t num_deferred
    int64_t deferred_capacity
    int64_t deferred_releases  # holds left by a finalizer, likewise
    uint64_t changes        # calls that have changed anything
    sight_t sight
    int64_t moves
    int64_t moved_tokens
    int64_t copied_tokens
    int64_t moved_cached    # tokens of cached runs that were moved
    int64_t most_moved      # used tokens that one call may move; negative: no bound
    int64_t pause           # used tokens that the call in hand has moved
    int64_t longest_pause   # the most that one call has moved
    int64_t spills          # times that a sequence was given blocks apart from its run
    int64_t heals           # times that a scattered sequence became one run by moves
    move_f move             # NULL: no storage
    void *arena

cdef inline int32_t place_of(handle_t handle) noexcept nogil:
    return <int32_t><uint32_t>handle

cdef inline bint is_live(const pool_t *pool, handle_t handle) noexcept nogil:
    cdef uint32_t place = <uint32_t>handle, generation = <uint32_t>(handle >> 32)
    return place < pool.places and generation & 1 and pool.space.hot[place].generation == generation

# The one place where a position becomes a slot. The position is below `capacity`.
cdef inline int64_t slot_of(const pool_t *pool, int32_t who, int64_t position) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    if pool.paged:
        return seq.table[position // size] * size + position % size
    if seq.breaks:
        return slot_in_runs(pool, who, position)
    return seq.start * size + position

cdef int64_t slot_in_runs(const pool_t *pool, int32_t who, int64_t position) noexcept nogil

cdef inline int32_t last_block(const pool_t *pool, int32_t who) noexcept nogil:
    """Of a sequence that holds blocks: the one that its last token is in."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    if pool.paged:
        return seq.table[seq.blocks - 1]
    seq = &pool.space.seqs[seq.last_run]
    return seq.start + seq.blocks - 1

cdef inline bint keeps(const pool_t *pool) noexcept nogil:
    """Whether prefixes are kept at all."""
    return pool.index.entries != NULL

cdef inline int64_t free_blocks(const pool_t *pool) noexcept nogil:
    """Blocks that may be had now: those of nobody, and the cached ones."""
    return pool.space.blocks.free_blocks + pool.index.cached_blocks

cdef inline int64_t waiting_blocks(const pool_t *pool) noexcept nogil:
    """Blocks that may be had when the last hold ends."""
    return pool.limbo_blocks + pool.index.fresh_blocks

cdef inline int64_t used_blocks(const pool_t *pool) noexcept nogil:
    return pool.space.blocks.num_blocks - free_blocks(pool)

cdef inline int64_t ceil_div(int64_t value, int64_t divisor) noexcept nogil:
    return (value + divisor - 1) // divisor

cdef inline int64_t arena_tokens(const pool_t *pool) noexcept nogil:
    return pool.space.blocks.num_blocks * pool.space.block_size

cdef inline int64_t held_blocks(const pool_t *pool) noexcept nogil:
    return used_blocks(pool) - waiting_blocks(pool)

cdef inline bint over_budget(const pool_t *pool, int64_t more) noexcept nogil:
    """Whether `more` blocks, held or claimed, are more than may be promised."""
    return more > pool.budget - held_blocks(pool) - pool.claims

cdef inline status_t find_room(const pool_t *pool, int64_t blocks) noexcept nogil:
    cdef int64_t there = free_blocks(pool)
    if blocks <= there:
        return OK
    return HELD if blocks <= there + waiting_blocks(pool) else NO_ROOM

cdef inline int64_t may_move(const pool_t *pool) noexcept nogil:
    """Used tokens that the call in hand may still move."""
    return max(pool.most_moved - pool.pause, <int64_t>0) if pool.most_moved >= 0 else INT64_MAX

cdef inline bint overwrites_held(const pool_t *pool, int32_t who, int64_t mark, int64_t start,
                                 int64_t count) noexcept nogil:
    """Whether a write of positions [start, start + count) would overwrite what has been written, beneath a hold."""
    cdef const extent_t *written = &pool.written[who * pool.num_marks + mark]
    return pool.num_holders > 0 and start < written.start + written.length and start + count > written.start

cdef inline void note_peak(pool_t *pool) noexcept nogil:
    pool.sight.peak.used = max(pool.sight.peak.used, used_blocks(pool))
    pool.sight.peak.live = max(pool.sight.peak.live, pool.space.live)
    pool.sight.peak.claims = max(pool.sight.peak.claims, pool.claims)

cdef inline status_t refuse(pool_t *pool, int64_t blocks) noexcept nogil:
    """Counts a refusal of so many blocks by its cause."""
    if blocks > free_blocks(pool) + waiting_blocks(pool):
        pool.sight.refused.arena_full += 1
    else:
        pool.sight.refused.promises += 1
    return NO_ROOM

cdef int pool_init(pool_t *pool, int64_t num_blocks, int64_t block_size, bint paged, int64_t budget,
                   int64_t num_marks, const uint64_t *seed) noexcept nogil
cdef void pool_destroy(pool_t *pool) noexcept nogil
cdef status_t move_bytes(pool_t *pool, const move_t *moves, int64_t count) noexcept nogil
cdef int add_places(pool_t *pool) noexcept nogil
cdef int32_t next_place(pool_t *pool, int64_t table) noexcept nogil
cdef int reserve_table(seq_t *seq, int64_t entries) noexcept nogil
cdef int32_t take_place(pool_t *pool) noexcept nogil
cdef void vacate(pool_t *pool, int32_t who) noexcept nogil
cdef handle_t enter(pool_t *pool, int64_t tokens, int64_t limit) noexcept nogil
cdef handle_t enter_at(pool_t *pool, int32_t who, int64_t tokens, int64_t limit) noexcept nogil
cdef void end_run(pool_t *pool, int32_t who) noexcept nogil
cdef int reserve_found(pool_t *pool, int64_t blocks) noexcept nogil
cdef int reserve_lately(pool_t *pool, int64_t entries) noexcept nogil
cdef int reserve_limbo(pool_t *pool, int64_t entries) noexcept nogil
cdef void note_lately(pool_t *pool, int64_t start, int64_t length) noexcept nogil
cdef void leave(pool_t *pool, int32_t who) noexcept nogil
cdef void refresh(pool_t *pool, int32_t who) noexcept nogil
cdef void copy_table(const pool_t *pool, int32_t who, int64_t count, int32_t *table) noexcept nogil
cdef int64_t committed_tokens(const pool_t *pool, int32_t who) noexcept nogil
cdef void give_back(pool_t *pool, int64_t start, int64_t length) noexcept nogil
cdef void end_of_holds(pool_t *pool) noexcept nogil
cdef holder_t *my_hold(pool_t *pool) noexcept nogil
cdef status_t release_mine(pool_t *pool) noexcept nogil
cdef int reserve_for_holds(pool_t *pool, int64_t blocks) noexcept nogil
cdef void keep_content(pool_t *pool, int64_t block, int64_t tokens) noexcept nogil
cdef bint tail_is_kept(const pool_t *pool, int32_t who) noexcept nogil
