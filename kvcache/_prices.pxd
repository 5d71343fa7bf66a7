"""What a layout will cost: everything is told in used tokens that moves have copied, or are expected to."""

from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport NOWHERE
from kvcache._space cimport run_grows, run_tokens, space_t

ctypedef struct run_t:   # what prices need to know of a run, wherever it will lie
    int64_t blocks
    int64_t tokens       # used
    int64_t slack        # tokens that its last block has room for
    int64_t ends         # tokens after which it has all that it may get

ctypedef struct rates_t:  # of the space as it is when a decision is due
    int64_t block_size
    int64_t free         # blocks
    double worth         # of one token in the way, before any room is left
    double crowd         # free blocks that one block of room stands against
    double hole          # tokens for a gap of one block; grows with the square
    int64_t share        # blocks of room that a run gets at most where several are laid out anew
    int64_t unit         # blocks: the step in which places within a gap are tried
    int64_t doubt        # tokens: how much cheaper a layout may turn out than what it moves

ctypedef struct spot_t:  # a place within a gap
    int64_t gap          # NOWHERE if there is none
    int64_t start
    int64_t price

cdef inline run_t edge(bint right) noexcept nogil:
    """The pool's end, as a neighbour: on the left it never grows, on the right nothing gets it out of the way."""
    return run_t(blocks=0, tokens=INT64_MAX, slack=0, ends=INT64_MAX if right else 0)

cdef inline run_t run_of(const space_t *space, int32_t who, bint right) noexcept nogil:
    cdef int64_t blocks, tokens, slack = INT64_MAX  # nothing comes after a run that is not its sequence's last
    cdef int32_t head
    if who == NOWHERE:
        return edge(right)
    blocks, tokens, head = space.seqs[who].blocks, run_tokens(space, who), space.seqs[who].head
    if run_grows(space, who):
        slack = blocks * space.block_size - tokens
    return run_t(blocks=blocks, tokens=tokens, slack=slack, ends=space.seqs[head].limit - space.hot[head].tokens)

# Tokens' worth of room after a run that it can use before it ends, or the one after it does.
cdef inline int64_t usable_room(const run_t *run, const run_t *after) noexcept nogil:
    return min(run.ends, after.ends) - run.slack

# What the next collision of a run and the one after it will move, the smaller of the two, if it comes before either
# has what it was promised: the more room, the later, and the likelier that one of them has ended.
cdef inline int64_t price_of_room(const rates_t *rates, const run_t *run, const run_t *after,
                                  int64_t room) noexcept nogil:
    if room * rates.block_size >= usable_room(run, after):
        return 0
    return <int64_t>(<double>min(run.tokens, after.tokens) * rates.worth / (<double>rates.free + rates.crowd * room))

# What a gap is worth to runs to come: one large gap is worth more than the same blocks in two.
cdef inline int64_t worth_of_gap(const rates_t *rates, int64_t blocks) noexcept nogil:
    return <int64_t>min(<double>blocks * <double>blocks * rates.hole, 1e15)

cdef inline int64_t price_between(const rates_t *rates, const run_t *run, const run_t *after,
                                  int64_t room) noexcept nogil:
    return price_of_room(rates, run, after, room) - worth_of_gap(rates, room)

cdef rates_t rates_of(const space_t *space) noexcept nogil
cdef spot_t spot_in_gap(const space_t *space, const rates_t *rates, int64_t gap, const run_t *run,
                        int64_t more) noexcept nogil
