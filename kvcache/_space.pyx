"""The space that runs lie in. A plan is collected move by move, and changes nothing until it is settled."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, realloc

from kvcache._blocks cimport gap_start, give_run, take_run
from kvcache._moves cimport move_t


cdef int plan_reserve(plan_t *plan, int64_t count) noexcept nogil:
    cdef void *who
    cdef void *moves
    if count <= plan.capacity:
        return 0
    who = realloc(plan.who, count * sizeof(int32_t))
    if who == NULL:
        return -1
    plan.who = <int32_t *>who
    moves = realloc(plan.moves, count * sizeof(move_t))
    if moves == NULL:
        return -1
    plan.moves = <move_t *>moves
    plan.capacity = count
    return 0


cdef void plan_destroy(plan_t *plan) noexcept nogil:
    free(plan.who)
    free(plan.moves)


cdef void plan_clear(plan_t *plan) noexcept nogil:
    plan.count = plan.tokens = 0


cdef void plan_move(space_t *space, int32_t who, int64_t to) noexcept nogil:
    cdef plan_t *plan = &space.plan
    cdef seq_t *seq = &space.seqs[who]
    if to == seq.start:
        return
    plan.who[plan.count] = who
    plan.moves[plan.count] = move_t(source=seq.start, destination=to, blocks=seq.blocks)
    plan.count += 1
    plan.tokens += run_tokens(space, who)


cdef void settle(space_t *space) noexcept nogil:
    """Enters the planned moves, whose bytes are in place, into the books."""
    cdef plan_t *plan = &space.plan
    cdef int64_t index, to, gap
    cdef int32_t who
    for index in range(plan.count):  # in the order in which they overwrite nothing, so each finds its place free
        who, to = plan.who[index], plan.moves[index].destination
        gap = give_run(&space.blocks, plan.moves[index].source, plan.moves[index].blocks)
        if not gap <= to < gap + space.blocks.cells[gap].length:
            gap = gap_start(&space.blocks, to)
        take_run(&space.blocks, gap, to, plan.moves[index].blocks)
        space.seqs[who].start = <int32_t>to
        own_run(space, who)
        rebase(space, space.seqs[who].head)


cdef void rebase(space_t *space, int32_t who) noexcept nogil:
    """After a run of the sequence has moved: where its next token goes, and that its tokens are elsewhere."""
    cdef const seq_t *last = &space.seqs[space.seqs[who].last_run]
    space.seqs[who].version += 1
    space.hot[who].base = <int32_t>((<int64_t>last.start - last.before) * space.block_size)


cdef void own_run(space_t *space, int32_t who) noexcept nogil:
    """Labels a run that is new, or new here."""
    cdef seq_t *seq = &space.seqs[who]
    cdef int64_t block
    for block in range(seq.start, end_of(seq) if space.traced else 0):
        space.blocks.cells[block].a = who
    own_ends(space, who)


cdef void own_ends(space_t *space, int32_t who) noexcept nogil:
    """Labels a run whose end has changed."""
    cdef seq_t *seq = &space.seqs[who]
    space.blocks.cells[seq.start].a = who
    space.blocks.cells[end_of(seq) - 1].a = who
