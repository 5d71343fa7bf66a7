"""The policy "worth": the block goes first that is most probably not needed any more.

A cached block either is never asked for again, or it is after about D more blocks have been inserted. When a share P
of its like came back, the log odds that it still will are, a blocks after its last touch, ln(P / (1 - P)) - a / D.
Times D, plus the time, that is a score which need not be computed again as time passes::

    score = t + D * ln(P / (1 - P))

Time t is the number of blocks ever inserted. P is learned for classes of blocks, by how often they have been hit and
how deep in a prompt they are (bit lengths of both), and so is D, over everything that came back. Evicted blocks are
remembered for a while, so that those which would have come back are counted. Where hits and depth tell nothing, all P
are equal, and the order is that of the last touch: it becomes least recently used by itself.
"""

from libc.math cimport log
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

cdef extern from "_hash.h" nogil:
    uint64_t kv_fold(uint64_t a, uint64_t b)

cdef enum:
    GHOSTS = 2             # remembered evictions, for each block of the cache
    TURNOVERS = 64         # of the cache, after which what was learned counts half


cdef worth_t *worth_new(int64_t num_blocks) noexcept nogil:
    cdef worth_t *worth = <worth_t *>calloc(1, sizeof(worth_t))
    if worth == NULL:
        return NULL
    worth.num_blocks, worth.num_ghosts = num_blocks, GHOSTS * num_blocks
    worth.histories = <history_t *>calloc(num_blocks, sizeof(history_t))
    worth.ghosts = <ghost_t *>calloc(worth.num_ghosts, sizeof(ghost_t))
    if worth.histories == NULL or worth.ghosts == NULL:
        worth_destroy(worth)
        return NULL
    return worth


cdef void worth_destroy(worth_t *worth) noexcept nogil:
    if worth != NULL:
        free(worth.histories)
        free(worth.ghosts)
        free(worth)


# ---- classes

cdef inline int32_t bit_length(int64_t number) noexcept nogil:
    cdef int32_t bits = 0
    while number and bits < CLASSES - 1:
        number >>= 1
        bits += 1
    return bits


cdef double bonus_of(worth_t *worth, int32_t hits, int32_t depth, int64_t call) noexcept nogil:
    """What the odds of a class are worth; the same throughout a call."""
    cdef double back = worth.back[hits][depth], seen = worth.seen[hits][depth], mean = 0
    if worth.priced[hits][depth] != call:
        worth.priced[hits][depth] = call
        if worth.returns > 0:
            mean = worth.distance / worth.returns
        worth.bonus[hits][depth] = mean * log((back + 1) / (max(seen - back, 0.0) + 1))
    return worth.bonus[hits][depth]


cdef double weighed(worth_t *worth, int32_t entry, int64_t depth, int64_t call) noexcept nogil:
    """A touch: the score of what the entry is now."""
    cdef history_t *history = &worth.histories[entry]
    cdef int32_t hits = bit_length(history.hits), deep = bit_length(depth)
    worth.seen[hits][deep] += 1
    history.last = <uint32_t>worth.inserted
    return worth.inserted + bonus_of(worth, hits, deep, call)


cdef void came_back(worth_t *worth, int32_t entry, int64_t depth) noexcept nogil:
    """The entry, as it was since its last touch, was needed again."""
    cdef history_t *history = &worth.histories[entry]
    worth.back[bit_length(history.hits)][bit_length(depth)] += 1
    worth.distance += <uint32_t>(<uint32_t>worth.inserted - history.last)
    worth.returns += 1
    if history.hits < 0xFFFF:
        history.hits += 1


cdef void halve(worth_t *worth) noexcept nogil:
    cdef int64_t hits, depth
    if worth.inserted - worth.halved <= TURNOVERS * worth.num_blocks:
        return
    worth.halved = worth.inserted
    worth.distance *= 0.5
    worth.returns *= 0.5
    for hits in range(CLASSES):
        for depth in range(CLASSES):
            worth.seen[hits][depth] *= 0.5
            worth.back[hits][depth] *= 0.5


# ---- what happens to an entry

cdef double worth_inserted(worth_t *worth, int32_t entry, uint64_t before, uint64_t content, int64_t depth,
                           int64_t call) noexcept nogil:
    """A new entry, of this content after what has the print `before`: its score."""
    cdef history_t *history = &worth.histories[entry]
    cdef ghost_t *ghost
    halve(worth)
    worth.inserted += 1
    history.print = kv_fold(before ^ 0x9E3779B97F4A7C15ULL, content | 1)
    history.hits = 0
    ghost = ghost_at(worth, history.print)
    if ghost.tag == tag_of(history.print):
        history.hits, history.last = ghost.hits, ghost.last
        ghost.tag = 0
        came_back(worth, entry, depth)
    return weighed(worth, entry, depth, call)


cdef double worth_hit(worth_t *worth, int32_t entry, int64_t depth, int64_t call) noexcept nogil:
    came_back(worth, entry, depth)
    return weighed(worth, entry, depth, call)


cdef double worth_let_go(worth_t *worth, int32_t entry, int64_t depth, int64_t call) noexcept nogil:
    """Idle begins when the last holder leaves: no touch, but the time counts from now on."""
    cdef history_t *history = &worth.histories[entry]
    history.last = <uint32_t>worth.inserted
    return worth.inserted + bonus_of(worth, bit_length(history.hits), bit_length(depth), call)


cdef void worth_evicted(worth_t *worth, int32_t entry) noexcept nogil:
    cdef const history_t *history = &worth.histories[entry]
    ghost_at(worth, history.print)[0] = ghost_t(last=history.last, hits=history.hits, tag=tag_of(history.print))


cdef inline ghost_t *ghost_at(const worth_t *worth, uint64_t print) noexcept nogil:
    return &worth.ghosts[((print >> 32) * <uint64_t>worth.num_ghosts) >> 32]


cdef inline uint16_t tag_of(uint64_t print) noexcept nogil:
    return <uint16_t>print | 1
