"""Sequences: who holds which blocks, what is promised, who waits. Every call is one decision under one lock."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t

from kvcache._lock cimport kv_lock_t
from kvcache._moves cimport move_f, move_t, span_t
from kvcache._placement cimport hot_t, seq_t, space_t

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

ctypedef struct holder_t:
    uintptr_t thread
    int64_t depth

ctypedef struct extent_t:
    int32_t start
    int32_t length

ctypedef struct spans_t:
    span_t *items           # [count] of [capacity]
    int64_t count
    int64_t capacity

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
    int64_t num_marks       # written prefixes that a sequence has (one per layer)
    int32_t *marks          # [places * num_marks] tokens written, from the first on
    extent_t *limbo         # blocks freed under a hold; theirs again when the last one ends
    int64_t num_limbo
    int64_t limbo_capacity
    int64_t limbo_blocks
    holder_t *holders       # threads that hold
    int64_t num_holders
    int64_t holder_capacity
    int64_t waiting         # calls that wait for the last hold to end
    spans_t spans           # of the write in hand
    int64_t wanted          # blocks that the last copy on write needed, and how many were unclaimed
    int64_t unclaimed
    handle_t *deferred      # freed by a finalizer while this thread ran Python under the lock
    int64_t num_deferred
    int64_t deferred_capacity
    uint64_t changes        # calls that have changed anything
    int64_t peak_used
    int64_t moves
    int64_t moved_tokens
    int64_t copied_tokens
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
    return seq.start * size + position

cdef inline int64_t used_blocks(const pool_t *pool) noexcept nogil:
    return pool.space.blocks.num_blocks - pool.space.blocks.free_blocks

cdef int pool_init(pool_t *pool, int64_t num_blocks, int64_t block_size, bint paged, int64_t budget,
                   int64_t num_marks) noexcept nogil
cdef void pool_destroy(pool_t *pool) noexcept nogil
cdef void pool_unlock(pool_t *pool) noexcept nogil
cdef inline int64_t ceil_div(int64_t value, int64_t divisor) noexcept nogil:
    return (value + divisor - 1) // divisor

cdef int defer_free(pool_t *pool, handle_t handle) noexcept nogil

# For whoever holds the lock. `patient` says that moves are allowed: without it, BUSY instead of a move.
cdef status_t admit(pool_t *pool, int64_t tokens, int64_t limit, bint patient, handle_t *handle) noexcept nogil
cdef status_t append(pool_t *pool, int32_t who, int64_t count, bint patient) noexcept nogil
cdef status_t retire(pool_t *pool, handle_t handle) noexcept nogil
cdef status_t cut(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef status_t change_limit(pool_t *pool, int32_t who, int64_t limit) noexcept nogil
cdef status_t split(pool_t *pool, handle_t parent, bint patient, handle_t *child) noexcept nogil
cdef status_t own_blocks(pool_t *pool, int32_t who, int64_t first, int64_t last, bint patient) noexcept nogil
cdef void ungrow(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef void raise_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil
cdef void mark_written(pool_t *pool, int32_t who, int64_t mark, int64_t start, int64_t count) noexcept nogil
cdef int64_t committed_tokens(const pool_t *pool, int32_t who) noexcept nogil
cdef bint tail_is_shared(const pool_t *pool, int32_t who) noexcept nogil
cdef bint is_shared(const pool_t *pool, int32_t who) noexcept nogil
cdef void end_of_holds(pool_t *pool) noexcept nogil
