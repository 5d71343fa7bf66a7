"""Sequences: blocks held and promised, growth, cuts, forks.

Every change computes what it needs, refuses if that is not there, has the arena move the bytes, and only then writes
the books; so a refusal, or an arena that fails, leaves everything as it was.
"""

from libc.math cimport NAN
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport realloc
from libc.string cimport memcpy

from kvcache._blocks cimport NOWHERE, block_is_free, mark_free, take_block, take_lowest
from kvcache._evict cimport evict_some, keep_quota, keep_quotas, make_clean, reserve_splits
from kvcache._index cimport move_blocks
from kvcache._lock cimport kv_unlock
from kvcache._moves cimport move_t
from kvcache._policy cimport read_clock
from kvcache._placement cimport place_by_sliding, place_growth, place_in_gap
from kvcache._pool cimport (
    BELOW_USED,
    BUSY,
    HELD,
    NO_MEMORY,
    NO_ROOM,
    NO_RUN,
    OK,
    PAST_LIMIT,
    STALE,
    ceil_div,
    committed_tokens,
    enter,
    extent_t,
    find_room,
    free_blocks,
    handle_t,
    is_live,
    keep_content,
    keeps,
    leave,
    may_move,
    move_bytes,
    next_place,
    note_peak,
    over_budget,
    place_of,
    pool_t,
    refresh,
    refuse,
    release_mine,
    reserve_for_holds,
    reserve_table,
    slot_of,
    status_t,
    tail_is_kept,
)
from kvcache._reuse cimport cuts_pin, disown, index_more, index_twin, leave_runs, share_names, unindex, worth_keeping
from kvcache._scatter cimport (
    copy_to_runs,
    drop_runs,
    extend_last,
    join_runs,
    plan_heal,
    planned_start,
    reserve_runs,
    room_after_last,
    scatter,
    take_planned,
)
from kvcache._sharing cimport (
    breaks_in,
    change_holders,
    copies_of,
    drop_blocks,
    is_writer,
    over_budget_after_cut,
    own_blocks,
    share_blocks,
    tail_is_shared,
)
from kvcache._sight cimport longest_free
from kvcache._space cimport (
    growth_of,
    held,
    hot_t,
    plan_reserve,
    plan_t,
    room_after,
    run_tokens,
    seq_t,
    settle,
)

cdef enum:
    CHEAP = 256            # used tokens that are moved before more than is needed is evicted, or the run's own
    ROOM_TO_GROW = 8       # blocks that cached ones make free beside a newcomer that may ask for them
    EVICTED_TO_GROW = 64   # cached blocks that at most make way, for each that a sequence grows by


cdef void do_deferred(pool_t *pool) noexcept nogil:
    """What finalizers asked for while this thread ran Python under the lock."""
    while pool.deferred_releases:
        pool.deferred_releases -= 1
        release_mine(pool)
        keep_quotas(pool)
    while pool.num_deferred:
        pool.num_deferred -= 1
        retire(pool, pool.deferred[pool.num_deferred], NAN)


cdef void pool_unlock(pool_t *pool) noexcept nogil:
    do_deferred(pool)
    kv_unlock(&pool.lock)


cdef int defer_free(pool_t *pool, handle_t handle) noexcept nogil:
    """Called by a finalizer while this very thread runs Python under the lock: the free comes before the unlock."""
    cdef void *deferred
    if pool.num_deferred == pool.deferred_capacity:
        deferred = realloc(pool.deferred, (2 * pool.deferred_capacity + 8) * sizeof(handle_t))
        if deferred == NULL:
            return -1
        pool.deferred = <handle_t *>deferred
        pool.deferred_capacity = 2 * pool.deferred_capacity + 8
    pool.deferred[pool.num_deferred] = handle
    pool.num_deferred += 1
    return 0


cdef status_t plan_run(pool_t *pool, int64_t blocks, int64_t growth, bint patient) noexcept nogil:
    """Plans a new run, by moves if it must; so many blocks are free. NO_RUN: the bound on moves does not allow it.

    Cached blocks make room for it, and for some of what it will grow to. Where that leaves no gap that fits, more of
    them do, as long as moving is not cheap.
    """
    cdef int64_t step = max(blocks >> 2, <int64_t>1), most = 4 * blocks
    cdef int64_t cheap = min(may_move(pool), max(blocks * pool.space.block_size, <int64_t>CHEAP))
    cdef status_t status
    if pool.index.pinned_blocks and reserve_splits(pool):
        return NO_MEMORY
    if pool.num_holders and pool.index.cached_blocks:
        return plan_beneath_hold(pool, blocks, growth)
    make_clean(pool, min(blocks + min(growth, <int64_t>ROOM_TO_GROW), free_blocks(pool)))
    if place_in_gap(&pool.space, blocks, growth):
        return OK
    status = may_plan(pool, patient)
    while pool.index.cached_blocks and most > 0 and status != BUSY:
        if status == OK and place_by_sliding(&pool.space, blocks, growth, cheap):
            return OK
        evict_some(pool, step)
        if place_in_gap(&pool.space, blocks, growth):
            return OK
        most -= step
        step *= 2
    if status == OK and not place_by_sliding(&pool.space, blocks, growth, may_move(pool)):
        return NO_RUN
    return status


cdef status_t plan_beneath_hold(pool_t *pool, int64_t blocks, int64_t growth) noexcept nogil:
    """Nothing moves: as many cached blocks make room as it takes for a gap, and none if they cannot."""
    cdef bint placed = place_in_gap(&pool.space, blocks, growth)
    if not placed and longest_free(pool) < blocks:
        return HELD
    while not placed:
        evict_some(pool, 1)
        placed = place_in_gap(&pool.space, blocks, growth)
    return OK


cdef status_t may_plan(const pool_t *pool, bint patient) noexcept nogil:
    """Whether moves can be planned: not beneath a hold, and NO_RUN where the call in hand may not move any more."""
    if not patient:
        return BUSY
    if may_move(pool) == 0:
        return NO_RUN
    return HELD if pool.num_holders else OK


cdef status_t carry_out(pool_t *pool) noexcept nogil:
    """Has the plan in hand moved, bytes first, then books. Without moves: OK."""
    cdef status_t status = move_bytes(pool, pool.space.plan.moves, pool.space.plan.count)
    if status == OK:
        enter_moves(pool)
    return status


cdef void enter_moves(pool_t *pool) noexcept nogil:
    cdef plan_t *plan = &pool.space.plan
    cdef int64_t index
    cdef int32_t head, joined = NOWHERE
    for index in range(plan.count):
        note_move(pool, plan.who[index], &plan.moves[index])
    settle(&pool.space)
    pool.pause += plan.tokens
    pool.longest_pause = max(pool.longest_pause, pool.pause)
    for index in range(plan.count if pool.space.further else 0):
        head = pool.space.seqs[plan.who[index]].head  # also of a run that has just been joined to another
        if head != joined and pool.space.seqs[head].breaks:  # one chain is walked once, not for each of its runs
            join_runs(pool, head)
            joined = head


cdef inline void note_move(pool_t *pool, int32_t run, const move_t *move) noexcept nogil:
    if pool.space.traced:
        move_blocks(&pool.index, move.source, move.destination, move.blocks)
    if pool.space.hot[pool.space.seqs[run].head].generation & 1:
        pool.moves += 1
        pool.moved_tokens += run_tokens(&pool.space, run)
    else:
        pool.moved_cached += run_tokens(&pool.space, run)


cdef status_t make_run(pool_t *pool, int64_t blocks, int64_t growth, bint patient) noexcept nogil:
    """Makes room for a new run where the plan in hand says. NO_RUN: there are places for several runs instead."""
    cdef status_t status = plan_run(pool, blocks, growth, patient)
    if status == OK:
        return carry_out(pool)
    return NO_MEMORY if status == NO_RUN and reserve_runs(pool, blocks) else status


cdef void take_blocks(pool_t *pool, int32_t who, int64_t count) noexcept nogil:
    """Paged: appends blocks to the table, which has room; the ones right after the last as far as they are free."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int32_t *table = &seq.table[seq.blocks]
    cdef int64_t index = 0
    cdef int32_t block
    if seq.blocks:
        block = seq.table[seq.blocks - 1] + 1
        while index < count and block < pool.space.blocks.num_blocks and block_is_free(&pool.space.blocks, block):
            take_block(&pool.space.blocks, block)
            table[index] = block
            index += 1
            block += 1
    if index < count:
        take_lowest(&pool.space.blocks, count - index, &table[index])
    for index in range(count):
        pool.refs[table[index]] = 1
    seq.blocks += <int32_t>count
    seq.breaks += breaks_in(seq, seq.blocks - count, seq.blocks)


cdef status_t retire(pool_t *pool, handle_t handle, double when) noexcept nogil:
    """Ends a sequence, at that time of the clock; what is found of it stays as long as nobody needs the memory."""
    cdef int32_t who = place_of(handle)
    cdef seq_t *seq
    cdef int64_t keep
    if not is_live(pool, handle):
        return STALE
    seq = &pool.space.seqs[who]
    if reserve_for_holds(pool, held(seq)) or (pool.index.leaves.num_quotas and reserve_splits(pool)):
        return NO_MEMORY
    seq = &pool.space.seqs[who]
    read_clock(&pool.policy, when)
    pool.claims -= growth_of(&pool.space, seq)
    keep = worth_keeping(pool, who) if keeps(pool) and not pool.paged else 0
    drop_tail(pool, who, keep)
    if keep:
        leave_runs(pool, who, keep)
    else:
        leave(pool, who)
    keep_quota(pool, pool.space.seqs[who].salt)
    pool.sight.frees += 1
    pool.changes += 1
    return OK


cdef void drop_tail(pool_t *pool, int32_t who, int64_t keep) noexcept nogil:
    """Lets go of all blocks but the first `keep`; room in limbo has been reserved."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef bint writer
    if keep == held(seq):
        return
    if pool.paged:
        writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
        drop_blocks(pool, who, keep, writer)
        seq.breaks = breaks_in(seq, 0, keep)
        seq.blocks = <int32_t>keep
    else:
        drop_runs(pool, who, keep, False)


# ---- growth

cdef status_t append(pool_t *pool, int32_t who, int64_t count, bint patient) noexcept nogil:
    """`count` more tokens, all or none."""
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t need
    cdef status_t status = OK
    if count > seq.limit - hot.tokens:
        pool.sight.refused.past_limit += 1
        return PAST_LIMIT
    if count == 0:
        return OK
    if hot.tokens + count > hot.soft:
        need = ceil_div(hot.tokens + count, pool.space.block_size) - held(seq)
        if tail_is_kept(pool, who):
            return NO_ROOM if find_room(pool, need) == NO_ROOM else HELD
        status = grow_paged(pool, who, need, patient) if pool.paged else grow_run(pool, who, need, patient)
        if status != OK:
            pool.sight.refused.growth += status == NO_ROOM
            return status
        hot = &pool.space.hot[who]  # the table may have grown
    hot.tokens += <int32_t>count
    pool.changes += 1
    return OK


cdef status_t grow_run(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef status_t status = find_room(pool, more)
    if status != OK:
        return status
    if more == 0:  # the block has room, and the hold that kept it has ended
        refresh(pool, who)
        return OK
    if seq.blocks == 0:
        status = first_run(pool, who, more, patient)
    elif seq.breaks == 0 and room_after(&pool.space, seq) >= more:
        extend_last(pool, who, more)
    else:
        status = make_room(pool, who, more, patient)
    if status != OK:
        return status
    pool.claims -= more
    refresh(pool, who)
    note_peak(pool)
    return OK


cdef status_t first_run(pool_t *pool, int32_t who, int64_t blocks, bint patient) noexcept nogil:
    """Of a sequence that has been cut to nothing."""
    cdef int64_t growth = growth_of(&pool.space, &pool.space.seqs[who]) - blocks
    cdef status_t status = make_run(pool, blocks, growth, patient)
    if status == NO_RUN:
        scatter(pool, who, blocks, growth)
        return OK
    if status == OK:
        take_planned(pool, who, blocks)
        pool.space.seqs[who].version += 1
    return status


cdef status_t make_room(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil:
    """Blocks after the last one by moving what is cheapest, else, within the bound on moves, somewhere else."""
    cdef bint scattered = pool.space.seqs[who].breaks > 0
    cdef status_t status = may_plan(pool, patient)
    if status == BUSY or (status == HELD and not scattered):
        return status
    if pool.index.pinned_blocks and reserve_splits(pool):
        return NO_MEMORY
    make_clean(pool, more)
    if status == OK and plan_room(pool, who, more):
        status = carry_out(pool)
        if status != OK:
            return status
    if room_after_last(pool, who) >= more:
        extend_last(pool, who, more)
        return OK
    if reserve_runs(pool, more):
        return NO_MEMORY
    scatter(pool, who, more, growth_of(&pool.space, &pool.space.seqs[who]) - more)
    return OK


cdef bint plan_room(pool_t *pool, int32_t who, int64_t more) noexcept nogil:
    """Plans what is cheapest to move, evicting more cached blocks as long as nothing is cheap; False: nothing moves."""
    cdef int64_t step = more, most = EVICTED_TO_GROW * more
    cdef int64_t cheap = min(may_move(pool), max(<int64_t>pool.space.hot[who].tokens, <int64_t>CHEAP))
    while pool.index.cached_blocks and most > 0:
        if room_after_last(pool, who) >= more and pool.space.seqs[who].breaks == 0:
            return False
        if plan_moves(pool, who, more, cheap):
            return True
        evict_some(pool, step)
        most -= step
        step *= 2
    if room_after_last(pool, who) >= more and pool.space.seqs[who].breaks == 0:
        return False
    return plan_moves(pool, who, more, may_move(pool))


cdef inline bint plan_moves(pool_t *pool, int32_t who, int64_t more, int64_t most) noexcept nogil:
    if pool.space.seqs[who].breaks:
        return plan_heal(&pool.space, who, more, most)
    return place_growth(&pool.space, who, more, most)


cdef status_t grow_paged(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef bint copy = tail_is_shared(pool, who)
    cdef int32_t breaks = seq.breaks
    cdef status_t status = find_room(pool, more + copy)
    if status != OK:
        return status
    if reserve_table(seq, seq.blocks + more):
        return NO_MEMORY
    if copy:
        status = own_blocks(pool, who, seq.blocks - 1, seq.blocks, patient)
        if status != OK:
            return status
    make_clean(pool, more)
    take_blocks(pool, who, more)
    if seq.breaks != breaks or seq.blocks == more:  # it is no longer one run, or has its first block
        seq.version += 1
    pool.claims -= more
    refresh(pool, who)
    note_peak(pool)
    return OK


cdef void ungrow(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    """Takes an append of this very call back: no view or slot of it has been given out."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t keep = ceil_div(tokens, pool.space.block_size)
    cdef int64_t dropped = held(seq) - keep
    if dropped and pool.paged:
        for index in range(keep, seq.blocks):
            pool.refs[seq.table[index]] = 0
            mark_free(&pool.space.blocks, seq.table[index], 1)
        seq.breaks = breaks_in(seq, 0, keep)
        seq.blocks = <int32_t>keep
    elif dropped:
        drop_runs(pool, who, keep, True)
    pool.claims += dropped
    pool.space.hot[who].tokens = <int32_t>tokens
    refresh(pool, who)


# ---- cuts and limits

cdef status_t cut(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    """Keeps the first `tokens` tokens; NO_ROOM when others hold what is let go and the new claim does not fit."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef hot_t *hot = &pool.space.hot[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t keep = ceil_div(tokens, size)
    cdef int64_t dropped = held(seq) - keep
    cdef bint was, will
    if tokens == hot.tokens:
        return OK
    if reserve_for_holds(pool, dropped):
        return NO_MEMORY
    if pool.paged:
        if over_budget_after_cut(pool, who, tokens):
            return refuse(pool, 0)
        if pool.space.traced:
            unindex(pool, who, tokens // size)
        will = is_writer(pool, who, tokens, seq.limit) and pool.refs[seq.table[keep - 1]] > 1
        was = dropped == 0 and is_writer(pool, who, hot.tokens, seq.limit)
        drop_tail(pool, who, keep)
        if will and not was:
            change_holders(pool, seq.table[keep - 1], 0, 1)
    else:
        if cuts_pin(pool, who, tokens // size):
            return refuse(pool, 0)
        if pool.space.traced:
            unindex(pool, who, tokens // size)
        drop_tail(pool, who, keep)
    if tokens % size:
        keep_content(pool, slot_of(pool, who, tokens) // size,
                     min(<int64_t>hot.tokens, keep * size) - (keep - 1) * size)
    pool.claims += dropped
    seq.version += 1
    hot.tokens = <int32_t>tokens
    seq.known = min(seq.known, <int32_t>tokens)
    lower_marks(pool, who, tokens)
    forget_written(pool, who, tokens)
    refresh(pool, who)
    note_peak(pool)
    pool.changes += 1
    return OK


cdef status_t change_limit(pool_t *pool, int32_t who, int64_t limit) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t tokens = pool.space.hot[who].tokens
    cdef int64_t more = ceil_div(limit, size) - ceil_div(seq.limit, size)
    cdef int64_t tail = NOWHERE, copies = 0
    cdef int32_t writers = 0
    if limit < tokens:
        return BELOW_USED
    if pool.paged and seq.blocks and pool.refs[seq.table[seq.blocks - 1]] > 1:
        tail = seq.table[seq.blocks - 1]
        writers = is_writer(pool, who, tokens, limit) - is_writer(pool, who, tokens, seq.limit)
        copies = (copies_of(pool.refs[tail], pool.writers[tail] + writers)
                  - copies_of(pool.refs[tail], pool.writers[tail]))
    if more + copies > 0 and over_budget(pool, more + copies):
        return refuse(pool, 0)
    if writers:
        change_holders(pool, tail, 0, writers)
    pool.claims += more
    seq.limit = <int32_t>limit
    refresh(pool, who)
    note_peak(pool)
    pool.changes += 1
    return OK


# ---- what has been written

cdef void raise_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int64_t mark
    for mark in range(pool.num_marks):
        marks[mark] = max(marks[mark], <int32_t>tokens)
        note_written(pool, who, mark, 0, tokens)
    if pool.space.seqs[who].known:
        index_more(pool, who)


cdef void lower_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int64_t mark
    for mark in range(pool.num_marks):
        marks[mark] = min(marks[mark], <int32_t>tokens)


cdef void note_written(pool_t *pool, int32_t who, int64_t mark, int64_t start, int64_t count) noexcept nogil:
    """What a hold keeps from being overwritten, whatever becomes of the prefixes."""
    cdef extent_t *written = &pool.written[who * pool.num_marks + mark]
    cdef int64_t end = start + count
    if count == 0:
        return
    if written.length:
        end = max(end, <int64_t>written.start + written.length)
        start = min(start, <int64_t>written.start)
    written[0] = extent_t(start=<int32_t>start, length=<int32_t>(end - start))


cdef void forget_written(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    """Of what has been written only the first `tokens` tokens are left."""
    cdef extent_t *written = &pool.written[who * pool.num_marks]
    cdef int64_t mark
    for mark in range(pool.num_marks):
        written[mark].length = <int32_t>max(min(<int64_t>written[mark].length, tokens - written[mark].start),
                                            <int64_t>0)


cdef void mark_written(pool_t *pool, int32_t who, int64_t mark, int64_t start, int64_t count) noexcept nogil:
    """A write below what is committed lowers every prefix to there; one that begins in its own prefix extends it."""
    cdef int32_t *written = &pool.marks[who * pool.num_marks + mark]
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    if start < written[0] and start < committed_tokens(pool, who):
        lower_marks(pool, who, start)
        if pool.space.traced:
            unindex(pool, who, start // size)
    if pool.space.traced:
        disown(pool, who, start, count)
    if start <= written[0]:
        written[0] = max(written[0], <int32_t>(start + count))
    note_written(pool, who, mark, start, count)
    if seq.known >= (seq.indexed + 1) * size and written[0] >= (seq.indexed + 1) * size:
        index_more(pool, who)


# ---- forks

cdef status_t split(pool_t *pool, handle_t parent, bint patient, handle_t *child) noexcept nogil:
    """A second sequence with the same tokens, limit and written prefixes."""
    cdef int32_t who = place_of(parent), twin
    cdef int64_t claim = growth_of(&pool.space, &pool.space.seqs[who])
    cdef int64_t blocks = held(&pool.space.seqs[who])
    cdef status_t status
    if not pool.paged:
        return copy_run(pool, who, claim, patient, child)
    twin = next_place(pool, blocks)
    if twin == NOWHERE:
        return NO_MEMORY
    status = share_blocks(pool, who, twin, claim)
    if status != OK:
        return refuse(pool, 0) if status == NO_ROOM else status
    share_names(pool, who)
    enter_twin(pool, who, child)
    pool.space.seqs[twin].blocks = <int32_t>blocks
    pool.space.seqs[twin].breaks = pool.space.seqs[who].breaks
    finish_twin(pool, who, twin, claim)
    return OK


cdef void enter_twin(pool_t *pool, int32_t who, handle_t *child) noexcept nogil:
    """The next place lives: with the tokens, limit and written prefixes, and no block yet."""
    child[0] = enter(pool, pool.space.hot[who].tokens, pool.space.seqs[who].limit)
    memcpy(&pool.marks[place_of(child[0]) * pool.num_marks], &pool.marks[who * pool.num_marks],
           pool.num_marks * sizeof(int32_t))
    memcpy(&pool.written[place_of(child[0]) * pool.num_marks], &pool.written[who * pool.num_marks],
           pool.num_marks * sizeof(extent_t))


cdef void finish_twin(pool_t *pool, int32_t who, int32_t twin, int64_t claim) noexcept nogil:
    pool.claims += claim
    if keeps(pool):
        index_twin(pool, who, twin)
    refresh(pool, who)
    refresh(pool, twin)
    note_peak(pool)
    pool.sight.admissions += 1
    pool.changes += 1


cdef status_t copy_run(pool_t *pool, int32_t who, int64_t claim, bint patient, handle_t *child) noexcept nogil:
    """Contiguous: the twin gets a run of its own, copied after whatever else had to move."""
    cdef int64_t blocks = held(&pool.space.seqs[who])
    cdef status_t status = find_room(pool, blocks)
    if over_budget(pool, blocks + claim) or status == NO_ROOM:
        return refuse(pool, blocks)
    if status != OK:
        return status
    if blocks and not patient:
        return BUSY
    if next_place(pool, 0) == NOWHERE:
        return NO_MEMORY
    if blocks:
        status = plan_run(pool, blocks, claim, patient)
    if status == NO_RUN:
        status = fork_scattered(pool, who, claim, child)
    elif status == OK:
        status = fork_to_run(pool, who, blocks, child)
    if status != OK:
        return status
    pool.copied_tokens += pool.space.hot[who].tokens
    finish_twin(pool, who, place_of(child[0]), claim)
    return OK


cdef status_t fork_to_run(pool_t *pool, int32_t who, int64_t blocks, handle_t *child) noexcept nogil:
    """Copies every run of the parent, from where the plan in hand leaves it, to the run that the plan has placed."""
    cdef plan_t *plan = &pool.space.plan
    cdef int64_t count = plan.count
    cdef int32_t run = who
    cdef status_t status
    if blocks:
        if plan_reserve(plan, count + 1 + pool.space.seqs[who].breaks):
            return NO_MEMORY
        while run != NOWHERE:
            plan.moves[count] = move_t(source=planned_start(&pool.space, run), blocks=pool.space.seqs[run].blocks,
                                       destination=plan.start + pool.space.seqs[run].before)
            count += 1
            run = pool.space.seqs[run].next_run
        status = move_bytes(pool, plan.moves, count)
        if status != OK:
            return status
        enter_moves(pool)
    enter_twin(pool, who, child)
    if blocks:
        take_planned(pool, place_of(child[0]), blocks)
    return OK


cdef status_t fork_scattered(pool_t *pool, int32_t who, int64_t claim, handle_t *child) noexcept nogil:
    """No run for the twin within the bound on moves: its blocks are first taken where they are free, then filled."""
    cdef int64_t spills = pool.spills
    cdef int32_t twin
    cdef status_t status
    if reserve_runs(pool, held(&pool.space.seqs[who])):
        return NO_MEMORY
    enter_twin(pool, who, child)
    twin = place_of(child[0])
    scatter(pool, twin, held(&pool.space.seqs[who]), claim)
    status = copy_to_runs(pool, who, twin)
    if status != OK:
        drop_runs(pool, twin, 0, True)
        leave(pool, twin)
        pool.spills = spills
    return status
