"""Sequences: blocks held and promised, growth, cuts, forks, holds.

Every change computes what it needs, refuses if that is not there, has the arena move the bytes, and only then writes
the books; so a refusal, or an arena that fails, leaves everything as it was.
"""

from libc.stdint cimport UINT32_MAX, int32_t, int64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memset

from kvcache._blocks cimport (
    NOWHERE,
    block_is_free,
    blocks_destroy,
    blocks_init,
    give_run,
    mark_free,
    take_block,
    take_lowest,
    take_run,
)
from kvcache._lock cimport (
    kv_lock_destroy,
    kv_lock_init,
    kv_lock_runs_python,
    kv_unlock,
)
from kvcache._moves cimport move_t
from kvcache._placement cimport (
    growth_of,
    hot_t,
    own_run,
    place_by_sliding,
    place_growth,
    place_in_gap,
    plan_destroy,
    plan_reserve,
    room_after,
    seq_t,
    settle,
)


# ---- the pool

cdef int pool_init(pool_t *pool, int64_t num_blocks, int64_t block_size, bint paged, int64_t budget,
                   int64_t num_marks) noexcept nogil:
    memset(pool, 0, sizeof(pool_t))
    pool.space.block_size = block_size
    pool.paged = paged
    pool.budget = budget
    pool.num_marks = num_marks
    pool.vacant = NOWHERE
    if kv_lock_init(&pool.lock) or blocks_init(&pool.space.blocks, num_blocks, not paged):
        return -1
    if paged:
        pool.refs = <int32_t *>calloc(num_blocks, sizeof(int32_t))
        pool.writers = <int32_t *>calloc(num_blocks, sizeof(int32_t))
        if pool.refs == NULL or pool.writers == NULL:
            return -1
    return add_places(pool)


cdef void pool_destroy(pool_t *pool) noexcept nogil:
    cdef int64_t who
    for who in range(pool.places):
        free(pool.space.seqs[who].table)
    blocks_destroy(&pool.space.blocks)
    plan_destroy(&pool.space.plan)
    free(pool.space.hot)
    free(pool.space.seqs)
    free(pool.refs)
    free(pool.writers)
    free(pool.marks)
    free(pool.limbo)
    free(pool.spans.items)
    free(pool.holders)
    free(pool.deferred)
    kv_lock_destroy(&pool.lock)


cdef void pool_unlock(pool_t *pool) noexcept nogil:
    while pool.num_deferred:
        pool.num_deferred -= 1
        retire(pool, pool.deferred[pool.num_deferred])
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


cdef inline int64_t held_blocks(const pool_t *pool) noexcept nogil:
    return used_blocks(pool) - pool.limbo_blocks


cdef inline bint over_budget(const pool_t *pool, int64_t more) noexcept nogil:
    """Whether `more` blocks, held or claimed, are more than may be promised."""
    return more > pool.budget - held_blocks(pool) - pool.claims


cdef inline status_t find_room(const pool_t *pool, int64_t blocks) noexcept nogil:
    cdef int64_t there = pool.space.blocks.free_blocks
    if blocks <= there:
        return OK
    return HELD if blocks <= there + pool.limbo_blocks else NO_ROOM


cdef inline void note_peak(pool_t *pool) noexcept nogil:
    pool.peak_used = max(pool.peak_used, used_blocks(pool))


cdef status_t plan_run(pool_t *pool, int64_t blocks, int64_t growth, bint patient) noexcept nogil:
    """Plans a new run, by moves if it must; so many blocks are free."""
    cdef status_t status = OK
    if not place_in_gap(&pool.space, blocks, growth):
        status = may_move(pool, patient)
        if status == OK:
            place_by_sliding(&pool.space, blocks, growth)
    return status


cdef status_t carry_out(pool_t *pool) noexcept nogil:
    """Has the plan in hand moved, bytes first, then books. Without moves: OK."""
    cdef status_t status = move_bytes(pool, pool.space.plan.moves, pool.space.plan.count)
    if status == OK:
        enter_moves(pool)
    return status


cdef void enter_moves(pool_t *pool) noexcept nogil:
    settle(&pool.space)
    pool.moves += pool.space.plan.count
    pool.moved_tokens += pool.space.plan.tokens


cdef inline status_t may_move(const pool_t *pool, bint patient) noexcept nogil:
    if not patient:
        return BUSY
    return HELD if pool.num_holders else OK


cdef status_t move_bytes(pool_t *pool, const move_t *moves, int64_t count) noexcept nogil:
    cdef int failed
    if pool.move == NULL or count == 0:
        return OK
    kv_lock_runs_python(&pool.lock, True)  # the arena may have to
    failed = pool.move(pool.arena, moves, count)
    kv_lock_runs_python(&pool.lock, False)
    return MOVE_FAILED if failed else OK


# ---- places in the table

cdef int add_places(pool_t *pool) noexcept nogil:
    """Doubles the table. What cannot be had leaves it as it was (some arrays larger than they need be)."""
    cdef int64_t places = max(pool.places * 2, <int64_t>16)
    cdef int64_t who
    cdef void *hot = realloc(pool.space.hot, places * sizeof(hot_t))
    cdef void *seqs
    cdef void *marks
    if hot == NULL:
        return -1
    pool.space.hot = <hot_t *>hot
    seqs = realloc(pool.space.seqs, places * sizeof(seq_t))
    if seqs == NULL:
        return -1
    pool.space.seqs = <seq_t *>seqs
    marks = realloc(pool.marks, max(places * pool.num_marks, <int64_t>1) * sizeof(int32_t))
    if marks == NULL:
        return -1
    pool.marks = <int32_t *>marks
    if plan_reserve(&pool.space.plan, places + 1):  # every sequence may move, and a fork be copied
        return -1
    memset(&pool.space.hot[pool.places], 0, (places - pool.places) * sizeof(hot_t))
    memset(&pool.space.seqs[pool.places], 0, (places - pool.places) * sizeof(seq_t))
    for who in range(places - 1, pool.places - 1, -1):
        pool.space.seqs[who].next_vacant = pool.vacant
        pool.vacant = <int32_t>who
    pool.places = places
    return 0


cdef int32_t next_place(pool_t *pool, int64_t table) noexcept nogil:
    """A vacant place, still vacant, whose table has room for so many entries; NOWHERE without memory."""
    if pool.vacant == NOWHERE and add_places(pool):
        return NOWHERE
    if pool.paged and reserve_table(&pool.space.seqs[pool.vacant], table):
        return NOWHERE
    return pool.vacant


cdef int reserve_table(seq_t *seq, int64_t entries) noexcept nogil:
    cdef void *table
    if entries <= seq.capacity:
        return 0
    entries = max(entries, seq.capacity + (seq.capacity >> 1))
    table = realloc(seq.table, entries * sizeof(int32_t))
    if table == NULL:
        return -1
    seq.table = <int32_t *>table
    seq.capacity = <int32_t>entries
    return 0


cdef handle_t enter(pool_t *pool, int64_t tokens, int64_t limit) noexcept nogil:
    """Makes the next place live, with no block yet; its handle."""
    cdef int32_t who = pool.vacant
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    pool.vacant = seq.next_vacant
    hot.generation += 1
    hot.tokens = <int32_t>tokens
    seq.limit = <int32_t>limit
    seq.blocks = seq.breaks = 0
    memset(&pool.marks[who * pool.num_marks], 0, pool.num_marks * sizeof(int32_t))
    pool.space.live += 1
    return <handle_t>hot.generation << 32 | <handle_t>who


cdef void leave(pool_t *pool, int32_t who) noexcept nogil:
    pool.space.hot[who].generation += 1
    pool.space.live -= 1
    if pool.space.hot[who].generation >= UINT32_MAX - 1:
        return  # worn out: a handle that comes round again would be somebody else's
    pool.space.seqs[who].next_vacant = pool.vacant
    pool.vacant = who


cdef bint tail_is_shared(const pool_t *pool, int32_t who) noexcept nogil:
    """Paged: whether others hold a last block that is not full, so that it is copied before the next append."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    return (pool.space.hot[who].tokens < seq.blocks * pool.space.block_size
            and pool.refs[seq.table[seq.blocks - 1]] > 1)


cdef void refresh(pool_t *pool, int32_t who) noexcept nogil:
    """Sets what an append without a look reads: where the next token goes, and how many may follow."""
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t tail = seq.start + seq.blocks - 1
    if seq.blocks == 0:
        hot.base = hot.soft = 0
        return
    if pool.paged:
        tail = seq.table[seq.blocks - 1]
    hot.base = <int32_t>((tail - (seq.blocks - 1)) * size)
    if pool.paged and pool.refs[tail] > 1:
        hot.soft = hot.tokens  # the block is copied before anything is appended to it
    else:
        hot.soft = <int32_t>min(<int64_t>seq.limit, seq.blocks * size)


# ---- shared blocks (paged): copies that are still to come are claimed

cdef inline bint is_writer(const pool_t *pool, int32_t who, int64_t tokens, int64_t limit) noexcept nogil:
    """Whether a sequence of so many tokens, with this limit, may append into its last block."""
    return tokens % pool.space.block_size != 0 and tokens < limit


cdef inline int64_t copies_of(int64_t refs, int64_t writers) noexcept nogil:
    """Every writer but the last holder needs a copy."""
    return min(writers, refs - 1) if refs > 1 else 0


cdef void change_holders(pool_t *pool, int64_t block, int32_t refs, int32_t writers) noexcept nogil:
    """Adds so many holders and writers; what this changes in outstanding copies is claimed or given back."""
    cdef int64_t before = copies_of(pool.refs[block], pool.writers[block])
    cdef int64_t after
    pool.refs[block] += refs
    pool.writers[block] += writers
    after = copies_of(pool.refs[block], pool.writers[block])
    pool.copies += after - before
    pool.claims += after - before


cdef void drop_block(pool_t *pool, int64_t block, bint writer) noexcept nogil:
    """One holder less; the last one gives the block back."""
    if pool.refs[block] > 1:
        change_holders(pool, block, -1, -1 if writer else 0)
        return
    pool.refs[block] = 0
    give_back(pool, block, 1)


cdef void give_back(pool_t *pool, int64_t start, int64_t length) noexcept nogil:
    """Blocks that nobody holds: free now, or when the last hold ends (room for the entry has been reserved)."""
    if pool.num_holders:
        pool.limbo[pool.num_limbo] = extent_t(start=<int32_t>start, length=<int32_t>length)
        pool.num_limbo += 1
        pool.limbo_blocks += length
        if not pool.paged:  # nobody's run, for whoever looks for a neighbour
            pool.space.blocks.cells[start].a = NOWHERE
            pool.space.blocks.cells[start + length - 1].a = NOWHERE
    elif pool.paged:
        mark_free(&pool.space.blocks, start, length)
    else:
        give_run(&pool.space.blocks, start, length)


cdef void end_of_holds(pool_t *pool) noexcept nogil:
    """What was freed under the holds is free."""
    cdef int64_t index
    for index in range(pool.num_limbo):
        give_back(pool, pool.limbo[index].start, pool.limbo[index].length)
    if pool.num_limbo:
        pool.changes += 1
    pool.num_limbo = pool.limbo_blocks = 0


cdef int reserve_limbo(pool_t *pool, int64_t blocks) noexcept nogil:
    """Room for what giving back so many blocks enters, if anybody holds."""
    cdef int64_t entries = pool.num_limbo + (blocks if pool.paged else 1)
    cdef void *limbo
    if pool.num_holders == 0 or entries <= pool.limbo_capacity:
        return 0
    entries = max(entries, 2 * pool.limbo_capacity)
    limbo = realloc(pool.limbo, entries * sizeof(extent_t))
    if limbo == NULL:
        return -1
    pool.limbo = <extent_t *>limbo
    pool.limbo_capacity = entries
    return 0


cdef bint is_shared(const pool_t *pool, int32_t who) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index
    if pool.paged:
        for index in range(seq.blocks):
            if pool.refs[seq.table[index]] > 1:
                return True
    return False


# ---- admission

cdef status_t admit(pool_t *pool, int64_t tokens, int64_t limit, bint patient, handle_t *handle) noexcept nogil:
    cdef int64_t size = pool.space.block_size
    cdef int64_t blocks = ceil_div(tokens, size)
    cdef int64_t claim = ceil_div(limit, size) - blocks
    cdef status_t status
    cdef int32_t who
    if over_budget(pool, blocks + claim):
        return NO_ROOM
    status = find_room(pool, blocks)
    if status != OK:
        return status
    who = next_place(pool, blocks)
    if who == NOWHERE:
        return NO_MEMORY
    if not pool.paged:
        status = plan_run(pool, blocks, claim, patient)
        if status == OK:
            status = carry_out(pool)
        if status != OK:
            return status
    handle[0] = enter(pool, tokens, limit)
    if pool.paged:
        take_blocks(pool, who, blocks)
    else:
        take_new_run(pool, who, blocks)
    pool.claims += claim
    refresh(pool, who)
    note_peak(pool)
    pool.changes += 1
    return OK


cdef void take_new_run(pool_t *pool, int32_t who, int64_t blocks) noexcept nogil:
    """The run that the plan in hand has placed."""
    cdef seq_t *seq = &pool.space.seqs[who]
    take_run(&pool.space.blocks, pool.space.plan.gap, pool.space.plan.start, blocks)
    seq.start = <int32_t>pool.space.plan.start
    seq.blocks = <int32_t>blocks
    own_run(&pool.space, who)


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


cdef status_t retire(pool_t *pool, handle_t handle) noexcept nogil:
    cdef int32_t who = place_of(handle)
    cdef seq_t *seq
    if not is_live(pool, handle):
        return STALE
    seq = &pool.space.seqs[who]
    if reserve_limbo(pool, seq.blocks):
        return NO_MEMORY
    pool.claims -= growth_of(&pool.space, seq)
    drop_tail(pool, who, 0)
    leave(pool, who)
    pool.changes += 1
    return OK


cdef void drop_tail(pool_t *pool, int32_t who, int64_t keep) noexcept nogil:
    """Lets go of all blocks but the first `keep`; room in limbo has been reserved."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t blocks = seq.blocks
    cdef bint writer
    if keep == blocks:
        return
    if pool.paged:
        writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
        drop_blocks(pool, seq.table, keep, blocks, writer)
        seq.breaks = breaks_in(seq, 0, keep)
    else:
        give_back(pool, seq.start + keep, blocks - keep)
    seq.blocks = <int32_t>keep
    if keep and not pool.paged:
        own_run(&pool.space, who)


cdef void drop_blocks(pool_t *pool, const int32_t *table, int64_t first, int64_t end, bint writer) noexcept nogil:
    """Drops table[first:end]; neighbours that nobody else holds go together."""
    cdef int64_t index = first, run
    while index < end:
        if pool.refs[table[index]] > 1:
            drop_block(pool, table[index], writer and index == end - 1)
            index += 1
            continue
        run = index
        while index < end and pool.refs[table[index]] == 1 and table[index] - table[run] == index - run:
            pool.refs[table[index]] = 0
            index += 1
        give_back(pool, table[run], index - run)


cdef int32_t breaks_in(const seq_t *seq, int64_t first, int64_t end) noexcept nogil:
    """How many of table[first:end] are not right after the block before them."""
    cdef int32_t breaks = 0
    cdef int64_t index
    for index in range(max(first, <int64_t>1), end):
        breaks += seq.table[index] != seq.table[index - 1] + 1
    return breaks


# ---- growth

cdef status_t append(pool_t *pool, int32_t who, int64_t count, bint patient) noexcept nogil:
    """`count` more tokens, all or none."""
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t need
    cdef status_t status = OK
    if count > seq.limit - hot.tokens:
        return PAST_LIMIT
    if count == 0:
        return OK
    if hot.tokens + count > hot.soft:
        need = ceil_div(hot.tokens + count, pool.space.block_size) - seq.blocks
        status = grow_paged(pool, who, need, patient) if pool.paged else grow_run(pool, who, need, patient)
        if status != OK:
            return status
    hot.tokens += <int32_t>count
    pool.changes += 1
    return OK


cdef status_t grow_run(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef status_t status = find_room(pool, more)
    if status != OK:
        return status
    if seq.blocks == 0:
        status = plan_run(pool, more, growth_of(&pool.space, seq) - more, patient)
        if status == OK:
            status = carry_out(pool)
        if status != OK:
            return status
        take_new_run(pool, who, more)
    else:
        if room_after(&pool.space, seq) < more:
            status = may_move(pool, patient)
            if status == OK:
                place_growth(&pool.space, who, more)
                status = carry_out(pool)
            if status != OK:
                return status
        take_run(&pool.space.blocks, seq.start + seq.blocks, seq.start + seq.blocks, more)
        seq.blocks += <int32_t>more
        own_run(&pool.space, who)
    pool.claims -= more
    refresh(pool, who)
    note_peak(pool)
    return OK


cdef status_t grow_paged(pool_t *pool, int32_t who, int64_t more, bint patient) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef bint copy = tail_is_shared(pool, who)
    cdef status_t status = find_room(pool, more + copy)
    if status != OK:
        return status
    if reserve_table(seq, seq.blocks + more):
        return NO_MEMORY
    if copy:
        status = own_blocks(pool, who, seq.blocks - 1, seq.blocks, patient)
        if status != OK:
            return status
    take_blocks(pool, who, more)
    pool.claims -= more
    refresh(pool, who)
    note_peak(pool)
    return OK


cdef status_t own_blocks(pool_t *pool, int32_t who, int64_t first, int64_t last, bint patient) noexcept nogil:
    """Paged: copies those of a sequence's blocks [first, last) that others hold too."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, shared = 0, given_back = 0
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    cdef int32_t block
    cdef status_t status
    if not pool.paged:
        return OK
    for index in range(first, last):
        block = seq.table[index]
        if pool.refs[block] > 1:
            shared += 1
            given_back += (copies_of(pool.refs[block], pool.writers[block])
                           - copies_of(pool.refs[block] - 1, pool.writers[block] - (writer and index == seq.blocks - 1)))
    if shared == 0:
        return OK
    pool.wanted = shared
    pool.unclaimed = min(pool.space.blocks.free_blocks, pool.budget - held_blocks(pool) - pool.claims + given_back)
    if over_budget(pool, shared - given_back):
        return NO_ROOM
    status = find_room(pool, shared)
    if status == OK and not patient:
        status = BUSY
    if status == OK and plan_reserve(&pool.space.plan, shared):
        status = NO_MEMORY
    return copy_shared(pool, who, first, last, shared) if status == OK else status


cdef status_t copy_shared(pool_t *pool, int32_t who, int64_t first, int64_t last, int64_t shared) noexcept nogil:
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size, tokens = pool.space.hot[who].tokens
    cdef int64_t index, copied = 0
    cdef bint writer = is_writer(pool, who, tokens, seq.limit)
    cdef int32_t *fresh = pool.space.plan.who
    cdef move_t *moves = pool.space.plan.moves
    take_lowest(&pool.space.blocks, shared, fresh)
    for index in range(first, last):
        if pool.refs[seq.table[index]] > 1:
            moves[copied] = move_t(source=seq.table[index], destination=fresh[copied], blocks=1)
            copied += 1
    if move_bytes(pool, moves, shared) != OK:
        for index in range(shared):
            mark_free(&pool.space.blocks, fresh[index], 1)
        return MOVE_FAILED
    copied = 0
    for index in range(first, last):
        if pool.refs[seq.table[index]] > 1:
            drop_block(pool, seq.table[index], writer and index == seq.blocks - 1)
            seq.table[index] = fresh[copied]
            pool.refs[fresh[copied]] = 1
            pool.copied_tokens += min(size, tokens - index * size)
            copied += 1
    seq.breaks = breaks_in(seq, 0, seq.blocks)
    seq.version += 1
    refresh(pool, who)
    note_peak(pool)
    pool.changes += 1
    return OK


cdef void ungrow(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    """Takes an append of this very call back: no view or slot of it has been given out."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t keep = ceil_div(tokens, pool.space.block_size)
    cdef int64_t dropped = seq.blocks - keep
    if dropped and pool.paged:
        for index in range(keep, seq.blocks):
            pool.refs[seq.table[index]] = 0
            mark_free(&pool.space.blocks, seq.table[index], 1)
        seq.breaks = breaks_in(seq, 0, keep)
        seq.blocks = <int32_t>keep
    elif dropped:
        give_run(&pool.space.blocks, seq.start + keep, dropped)
        seq.blocks = <int32_t>keep
        if keep:
            own_run(&pool.space, who)
    pool.claims += dropped
    pool.space.hot[who].tokens = <int32_t>tokens
    refresh(pool, who)


# ---- cuts and limits

cdef status_t cut(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    """Keeps the first `tokens` tokens; NO_ROOM when others hold what is let go and the new claim does not fit."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef hot_t *hot = &pool.space.hot[who]
    cdef int64_t keep = ceil_div(tokens, pool.space.block_size)
    cdef int64_t dropped = seq.blocks - keep
    cdef bint was, will
    if tokens == hot.tokens:
        return OK
    if reserve_limbo(pool, dropped):
        return NO_MEMORY
    if pool.paged:
        if over_budget_after_cut(pool, who, tokens):
            return NO_ROOM
        will = is_writer(pool, who, tokens, seq.limit) and pool.refs[seq.table[keep - 1]] > 1
        was = dropped == 0 and is_writer(pool, who, hot.tokens, seq.limit)
        drop_tail(pool, who, keep)
        if will and not was:
            change_holders(pool, seq.table[keep - 1], 0, 1)
    else:
        drop_tail(pool, who, keep)
    pool.claims += dropped
    seq.version += 1
    hot.tokens = <int32_t>tokens
    lower_marks(pool, who, tokens)
    refresh(pool, who)
    pool.changes += 1
    return OK


cdef bint over_budget_after_cut(const pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t keep = ceil_div(tokens, pool.space.block_size)
    cdef int64_t index, more = 0, refs, writers
    cdef bint writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    for index in range(keep, seq.blocks):
        refs, writers = pool.refs[seq.table[index]], pool.writers[seq.table[index]]
        if refs > 1:  # stays with others, and is claimed anew
            more += 1 - copies_of(refs, writers)
            more += copies_of(refs - 1, writers - (writer and index == seq.blocks - 1))
    if is_writer(pool, who, tokens, seq.limit):
        refs, writers = pool.refs[seq.table[keep - 1]], pool.writers[seq.table[keep - 1]]
        if refs > 1 and not (keep == seq.blocks and writer):
            more += copies_of(refs, writers + 1) - copies_of(refs, writers)
    return more > 0 and over_budget(pool, more)


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
        return NO_ROOM
    if writers:
        change_holders(pool, tail, 0, writers)
    pool.claims += more
    seq.limit = <int32_t>limit
    refresh(pool, who)
    pool.changes += 1
    return OK


# ---- what has been written

cdef int64_t committed_tokens(const pool_t *pool, int32_t who) noexcept nogil:
    """The least of the written prefixes."""
    cdef const int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int32_t least = pool.space.hot[who].tokens
    cdef int64_t mark
    for mark in range(pool.num_marks):
        least = min(least, marks[mark])
    return least


cdef void raise_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int64_t mark
    for mark in range(pool.num_marks):
        marks[mark] = max(marks[mark], <int32_t>tokens)


cdef void lower_marks(pool_t *pool, int32_t who, int64_t tokens) noexcept nogil:
    cdef int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int64_t mark
    for mark in range(pool.num_marks):
        marks[mark] = min(marks[mark], <int32_t>tokens)


cdef void mark_written(pool_t *pool, int32_t who, int64_t mark, int64_t start, int64_t count) noexcept nogil:
    """A write below what is committed lowers every prefix to there; one that begins in its own prefix extends it."""
    cdef int32_t *written = &pool.marks[who * pool.num_marks + mark]
    if start < written[0] and start < committed_tokens(pool, who):
        lower_marks(pool, who, start)
    if start <= written[0]:
        written[0] = max(written[0], <int32_t>(start + count))


# ---- forks

cdef status_t split(pool_t *pool, handle_t parent, bint patient, handle_t *child) noexcept nogil:
    """A second sequence with the same tokens, limit and written prefixes."""
    cdef int32_t who = place_of(parent), twin
    cdef int64_t claim = growth_of(&pool.space, &pool.space.seqs[who])
    cdef int64_t blocks = pool.space.seqs[who].blocks
    cdef status_t status
    twin = next_place(pool, blocks)
    if twin == NOWHERE:
        return NO_MEMORY
    if pool.paged:
        status = share_blocks(pool, who, twin, claim)
    else:
        status = copy_run(pool, who, twin, claim, patient)
    if status != OK:
        return status
    child[0] = enter(pool, pool.space.hot[who].tokens, pool.space.seqs[who].limit)
    pool.space.seqs[twin].blocks = <int32_t>blocks
    pool.space.seqs[twin].breaks = pool.space.seqs[who].breaks
    memcpy(&pool.marks[twin * pool.num_marks], &pool.marks[who * pool.num_marks], pool.num_marks * sizeof(int32_t))
    pool.claims += claim
    refresh(pool, who)
    refresh(pool, twin)
    note_peak(pool)
    pool.changes += 1
    return OK


cdef status_t share_blocks(pool_t *pool, int32_t who, int32_t twin, int64_t claim) noexcept nogil:
    """Paged: the twin's table names the same blocks."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, tail, copies = 0
    cdef int32_t block
    cdef int32_t writer = is_writer(pool, who, pool.space.hot[who].tokens, seq.limit)
    if seq.blocks and writer:
        tail = seq.table[seq.blocks - 1]
        if pool.refs[tail] > 1:
            copies = copies_of(pool.refs[tail] + 1, pool.writers[tail] + 1) - copies_of(pool.refs[tail], pool.writers[tail])
        else:
            copies = 1
    if over_budget(pool, claim + copies):
        return NO_ROOM
    for index in range(seq.blocks):
        block = seq.table[index]
        if pool.refs[block] == 1:
            pool.writers[block] = writer if index == seq.blocks - 1 else 0
        change_holders(pool, block, 1, writer if index == seq.blocks - 1 else 0)
        pool.space.seqs[twin].table[index] = block
    return OK


cdef status_t copy_run(pool_t *pool, int32_t who, int32_t twin, int64_t claim, bint patient) noexcept nogil:
    """Contiguous: the twin gets a run of its own, copied after whatever else had to move."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef move_t *moves = pool.space.plan.moves
    cdef int64_t count, index, source = seq.start
    cdef status_t status = find_room(pool, seq.blocks)
    if over_budget(pool, seq.blocks + claim):
        return NO_ROOM
    if status != OK or seq.blocks == 0:
        return status
    if not patient:
        return BUSY
    status = plan_run(pool, seq.blocks, claim, patient)
    if status != OK:
        return status
    count = pool.space.plan.count
    for index in range(count):
        if pool.space.plan.who[index] == who:
            source = moves[index].destination
    moves[count] = move_t(source=source, destination=pool.space.plan.start, blocks=seq.blocks)
    status = move_bytes(pool, moves, count + 1)
    if status != OK:
        return status
    enter_moves(pool)
    pool.copied_tokens += pool.space.hot[who].tokens
    take_new_run(pool, twin, seq.blocks)
    return OK
