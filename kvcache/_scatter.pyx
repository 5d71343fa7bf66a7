"""Sequences of several runs: how they come about under a bound on moves, and how they become one run again.

A further run has a place in the table of sequences, so that it has an owner like every run, and moves like one. The
places of a sequence's runs are chained; `head` leads back. Runs that come to lie side by side are joined at once.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._blocks cimport NOWHERE, gap_for, give_run, longest_gap, take_run
from kvcache._moves cimport move_t
from kvcache._placement cimport place_in_gap
from kvcache._pool cimport NO_MEMORY, add_places, give_back, move_bytes, pool_t, status_t, take_place, vacate
from kvcache._space cimport (
    end_of,
    gap_before,
    held,
    own_ends,
    own_run,
    plan_clear,
    plan_move,
    plan_reserve,
    plan_t,
    room_after,
    seq_t,
    space_t,
)


# ---- taking and giving

cdef int reserve_runs(pool_t *pool, int64_t blocks) noexcept nogil:
    """Vacant places for the runs that so many blocks may come to be, and one more."""
    cdef int64_t gaps = pool.space.live + pool.space.further + pool.cached_runs + pool.num_limbo + 1  # at most
    while pool.vacancies <= min(blocks, gaps):
        if add_places(pool):
            return -1
    return 0


cdef void take_planned(pool_t *pool, int32_t who, int64_t blocks) noexcept nogil:
    """The run that the plan in hand has placed, after the sequence's last one."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int32_t run = who
    if seq.blocks:
        run = take_place(pool)
        pool.space.seqs[run].head = who
        pool.space.seqs[run].before = <int32_t>held(seq)
        pool.space.seqs[seq.last_run].next_run = run
        seq.last_run = run
        seq.further += <int32_t>blocks
        seq.breaks += 1
        pool.space.further += 1
    take_run(&pool.space.blocks, pool.space.plan.gap, pool.space.plan.start, blocks)
    pool.space.seqs[run].start = <int32_t>pool.space.plan.start
    pool.space.seqs[run].blocks = <int32_t>blocks
    own_run(&pool.space, run)


cdef void scatter(pool_t *pool, int32_t who, int64_t blocks, int64_t growth) noexcept nogil:
    """Gives a sequence blocks right after its last one, then in as few gaps as it takes. Places have been reserved."""
    cdef plan_t *plan = &pool.space.plan
    cdef int64_t length = 0
    if pool.space.seqs[who].blocks:
        length = min(blocks, room_after_last(pool, who))
        extend_last(pool, who, length)
    blocks -= length
    while blocks:
        length = blocks
        if not place_in_gap(&pool.space, blocks, growth):
            plan.gap = plan.start = longest_gap(&pool.space.blocks)
            length = pool.space.blocks.cells[plan.gap].length
        take_planned(pool, who, length)
        blocks -= length
    pool.space.seqs[who].version += 1
    pool.spills += 1


cdef int64_t room_after_last(const pool_t *pool, int32_t who) noexcept nogil:
    return room_after(&pool.space, &pool.space.seqs[pool.space.seqs[who].last_run])


cdef void extend_last(pool_t *pool, int32_t who, int64_t more) noexcept nogil:
    """Takes blocks right after a sequence's last one, where so many are free."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef seq_t *last = &pool.space.seqs[seq.last_run]
    cdef int64_t end = last.start + last.blocks
    if more:
        take_run(&pool.space.blocks, end, end, more)
        last.blocks += <int32_t>more
        if seq.last_run != who:
            seq.further += <int32_t>more
        label_end(pool, seq.last_run, more)


cdef inline void label_end(pool_t *pool, int32_t run, int64_t more) noexcept nogil:
    """A run has `more` blocks at its end."""
    cdef int64_t end = end_of(&pool.space.seqs[run]), block
    for block in range(end - more, end if pool.space.traced else 0):
        pool.space.blocks.cells[block].a = run
    own_ends(&pool.space, run)


cdef inline void let_go(pool_t *pool, int64_t start, int64_t blocks, bint unseen) noexcept nogil:
    if blocks and unseen:
        give_run(&pool.space.blocks, start, blocks)
    elif blocks:
        give_back(pool, start, blocks)


cdef void drop_runs(pool_t *pool, int32_t who, int64_t keep, bint unseen) noexcept nogil:
    """Lets go of all blocks but the first `keep`; `unseen`: no hold can be of them. Room in limbo has been reserved."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef seq_t *last
    cdef int32_t run = who, after
    while keep > <int64_t>pool.space.seqs[run].before + pool.space.seqs[run].blocks:
        run = pool.space.seqs[run].next_run
    last = &pool.space.seqs[run]
    let_go(pool, last.start + keep - last.before, last.blocks - (keep - last.before), unseen)
    last.blocks = <int32_t>(keep - last.before)
    if last.blocks:
        own_ends(&pool.space, run)
    after = last.next_run
    last.next_run = NOWHERE
    seq.last_run = run
    seq.further = <int32_t>(keep - seq.blocks)
    while after != NOWHERE:
        run = after
        after = pool.space.seqs[run].next_run
        let_go(pool, pool.space.seqs[run].start, pool.space.seqs[run].blocks, unseen)
        drop_run(pool, who, run)


cdef inline void drop_run(pool_t *pool, int32_t who, int32_t run) noexcept nogil:
    """A further run is no more."""
    pool.space.seqs[who].breaks -= 1
    pool.space.further -= 1
    vacate(pool, run)


# ---- one run again

cdef void join_runs(pool_t *pool, int32_t who) noexcept nogil:
    """Runs of the sequence that moves have brought side by side become one."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef seq_t *before
    cdef int32_t run = who, after = seq.next_run
    while after != NOWHERE:
        before = &pool.space.seqs[run]
        if before.start + before.blocks != pool.space.seqs[after].start:
            run = after
        else:
            if run == who:
                seq.further -= pool.space.seqs[after].blocks
            before.blocks += pool.space.seqs[after].blocks
            before.next_run = pool.space.seqs[after].next_run
            if before.next_run == NOWHERE:
                seq.last_run = run
            own_run(&pool.space, run)
            drop_run(pool, who, after)
        after = pool.space.seqs[run].next_run
    pool.heals += seq.breaks == 0


cdef bint plan_heal(space_t *space, int32_t who, int64_t more, int64_t most) noexcept nogil:
    """Plans to make a scattered sequence one run with `more` free blocks after it, moving at most `most` tokens."""
    cdef const seq_t *seq = &space.seqs[who]
    cdef const seq_t *last = &space.seqs[seq.last_run]
    cdef int64_t tokens = space.hot[who].tokens
    cdef int64_t behind = tokens - seq.blocks * space.block_size  # tokens in the further runs
    cdef int64_t ahead = last.before * space.block_size           # in all runs but the last
    cdef int64_t gap
    plan_clear(&space.plan)
    if behind <= min(most, ahead) and room_after(space, seq) >= seq.further + more:
        plan_runs(space, seq.next_run, NOWHERE, seq.start)
    elif ahead <= most and gap_before(space, last.start) >= last.before and room_after(space, last) >= more:
        plan_runs(space, who, seq.last_run, last.start - last.before)
    elif behind <= most and room_after(space, seq) >= seq.further + more:
        plan_runs(space, seq.next_run, NOWHERE, seq.start)
    elif tokens <= most:
        gap = gap_for(&space.blocks, held(seq) + more)
        if gap != NOWHERE:
            plan_runs(space, who, NOWHERE, gap)
    return space.plan.count > 0


cdef void plan_runs(space_t *space, int32_t run, int32_t end, int64_t start) noexcept nogil:
    """Moves the runs from `run` on, up to `end`, to where they are when their sequence begins at `start`."""
    while run != end:
        plan_move(space, run, start + space.seqs[run].before)
        run = space.seqs[run].next_run


# ---- copies

cdef int64_t planned_start(const space_t *space, int32_t who) noexcept nogil:
    """Where a run is once the plan in hand has been carried out."""
    cdef int64_t index
    for index in range(space.plan.count):
        if space.plan.who[index] == who:
            return space.plan.moves[index].destination
    return space.seqs[who].start


cdef status_t copy_to_runs(pool_t *pool, int32_t who, int32_t twin) noexcept nogil:
    """Copies the blocks of one sequence to those of another that holds as many, run by run."""
    cdef const seq_t *seqs = pool.space.seqs
    cdef int64_t count = 0, block = 0, length
    if plan_reserve(&pool.space.plan, seqs[who].breaks + seqs[twin].breaks + 2):
        return NO_MEMORY
    while twin != NOWHERE:
        length = min(seqs[who].before + seqs[who].blocks, seqs[twin].before + seqs[twin].blocks) - block
        pool.space.plan.moves[count] = move_t(source=seqs[who].start + block - seqs[who].before,
                                              destination=seqs[twin].start + block - seqs[twin].before, blocks=length)
        count += 1
        block += length
        if block == seqs[who].before + seqs[who].blocks:
            who = seqs[who].next_run
        if block == seqs[twin].before + seqs[twin].blocks:
            twin = seqs[twin].next_run
    return move_bytes(pool, pool.space.plan.moves, count)
