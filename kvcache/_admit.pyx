"""Admission: what of a prompt is there already is shared, continued where it is, or copied; the rest gets blocks.

A refusal is decided by counting, before anything is evicted. What a prompt hits is never evicted for its own sake: it
is held, or counts as held, from before the first eviction on.
"""

from libc.stdint cimport int32_t, int64_t

from kvcache._blocks cimport NOWHERE
from kvcache._evict cimport make_clean, reserve_splits, shorten_run, uncache_run
from kvcache._index cimport (
    bit_of,
    cache_block,
    entry_at,
    forget_block,
    is_cached,
    is_pinned,
    join_entry,
    match_ids,
    uncache_block,
    was_evicted,
)
from kvcache._leaves cimport prefer, reserve_priorities
from kvcache._moves cimport move_t
from kvcache._placement cimport place_in_gap
from kvcache._policy cimport HIT, touch
from kvcache._pool cimport (
    HELD,
    BUSY,
    NO_MEMORY,
    NO_ROOM,
    NO_RUN,
    OK,
    ceil_div,
    enter,
    enter_at,
    find_room,
    free_blocks,
    keeps,
    leave,
    move_bytes,
    next_place,
    note_peak,
    over_budget,
    place_of,
    refresh,
    refuse,
    reserve_found,
    waiting_blocks,
)
from kvcache._reuse cimport block_at, note_ids
from kvcache._scatter cimport drop_runs, extend_last, planned_start, reserve_runs, scatter, take_planned
from kvcache._sequences cimport enter_moves, make_room, plan_run, raise_marks, take_blocks
from kvcache._sharing cimport breaks_in, change_holders
from kvcache._space cimport plan_reserve, plan_t, room_after, seq_t

cdef enum:
    MOST_COPIES = 8    # blocks of one content that are looked at for a run that can be continued


cdef int64_t most_hits(const pool_t *pool, const request_t *request) noexcept nogil:
    """Whole blocks of the prompt that may be there; the last token is always left to compute."""
    return (request.tokens - 1) // pool.space.block_size if request.ids != NULL and keeps(pool) else 0


cdef status_t admit(pool_t *pool, request_t *request, bint patient, handle_t *handle) noexcept nogil:
    cdef int64_t most = most_hits(pool, request), hits
    cdef int32_t parent
    cdef bint evicted = False
    cdef status_t status
    if reserve_found(pool, most) or (request.priority and keeps(pool) and reserve_priorities(&pool.index.leaves)):
        return NO_MEMORY
    pool.policy.now = request.when if request.when == request.when else <double>(pool.policy.calls + 1)
    hits = match_ids(&pool.index, request.salt, request.ids, most, pool.found) if most else 0
    if hits < most:
        parent = pool.found[hits - 1] if hits else -1 - request.salt
        evicted = was_evicted(&pool.index, parent, &request.ids[hits * pool.space.block_size])
    if pool.paged:
        status = admit_paged(pool, request, hits, handle)
    else:
        status = admit_run(pool, request, &hits, patient, handle)
    if status == BUSY or status == HELD:
        return status
    pool.policy.calls += 1
    if status == OK:
        begin(pool, place_of(handle[0]), request, hits, most)
        if request.ids != NULL:
            note_query(pool, request, hits, most, evicted)
    return status


cdef int64_t held_hits(pool_t *pool, const request_t *request) noexcept nogil:
    """Paged: how many blocks of the prompt are there, and held by others, so that they cost nothing."""
    cdef int64_t most = most_hits(pool, request), index, held = 0
    if not pool.paged or reserve_found(pool, most):
        return 0
    for index in range(match_ids(&pool.index, request.salt, request.ids, most, pool.found) if most else 0):
        held += not is_cached(&pool.index, pool.index.entries[pool.found[index]].block)
    return held


cdef void begin(pool_t *pool, int32_t who, request_t *request, int64_t hits, int64_t most) noexcept nogil:
    """A sequence that has its blocks: what is known of it, what was found, what it may still ask for."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size, index
    request.cached = hits * size
    pool.claims += ceil_div(request.limit, size) - ceil_div(request.tokens, size)
    seq.salt, seq.priority = request.salt, request.priority
    seq.expires = pool.policy.now + request.ttl
    if request.ids != NULL:
        seq.known, seq.indexed = <int32_t>(hits * size), <int32_t>hits
        for index in range(hits - 1, -1, -1):
            touch(&pool.policy, &pool.index, pool.found[index], HIT, index, most)
            if seq.priority:
                prefer(&pool.index.leaves, pool.found[index], seq.priority, seq.expires)
        raise_marks(pool, who, hits * size)
        note_ids(pool, who, hits * size, &request.ids[hits * size], request.tokens - hits * size)
    refresh(pool, who)
    note_peak(pool)
    pool.sight.admissions += 1
    pool.changes += 1


cdef void note_query(pool_t *pool, const request_t *request, int64_t hits, int64_t most, bint evicted) noexcept nogil:
    pool.sight.reuse.queries += 1
    pool.sight.reuse.query_tokens += request.tokens
    pool.sight.reuse.hit_tokens += hits * pool.space.block_size
    if not keeps(pool):
        pool.sight.reuse.disabled += 1
    elif most == 0:
        pool.sight.reuse.partial += 1
    elif hits < most and evicted:
        pool.sight.reuse.evicted += 1
    elif hits < most and hits == 0 and request.salt:
        pool.sight.reuse.salted += 1
    elif hits < most:
        pool.sight.reuse.cold += 1


# ---- paged: blocks have several holders

cdef status_t admit_paged(pool_t *pool, request_t *request, int64_t hits, handle_t *handle) noexcept nogil:
    cdef int64_t size = pool.space.block_size
    cdef int64_t blocks = ceil_div(request.tokens, size), claim = ceil_div(request.limit, size) - blocks
    cdef int64_t index, block, cached = 0, fresh = 0
    cdef status_t status
    for index in range(hits):
        block = pool.index.entries[pool.found[index]].block
        cached += is_cached(&pool.index, block)
        fresh += bit_of(pool.index.fresh, block)
    if over_budget(pool, blocks - hits + cached + claim):
        return refuse(pool, blocks - hits + cached)
    status = find_room(pool, blocks - hits + cached - fresh + request.keep)
    if status == HELD and blocks - hits + request.keep > free_blocks(pool) + waiting_blocks(pool) - cached:
        status = NO_ROOM
    if status != OK:
        return refuse(pool, blocks - hits + cached) if status == NO_ROOM else status
    if next_place(pool, blocks) == NOWHERE:
        return NO_MEMORY
    handle[0] = enter(pool, request.tokens, request.limit)
    share_hits(pool, place_of(handle[0]), hits)
    make_clean(pool, blocks - hits)
    take_blocks(pool, place_of(handle[0]), blocks - hits)
    return OK


cdef void share_hits(pool_t *pool, int32_t who, int64_t hits) noexcept nogil:
    """The table, which has room, begins with the blocks that were found."""
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index
    cdef int32_t block
    for index in range(hits):
        block = pool.index.entries[pool.found[index]].block
        seq.table[index] = block
        if is_cached(&pool.index, block):
            uncache_block(&pool.index, block)
            pool.refs[block] = 1
        else:
            if pool.refs[block] == 1:
                pool.writers[block] = 0  # it is full
            change_holders(pool, block, 1, 0)
    seq.blocks = <int32_t>hits
    seq.breaks = breaks_in(seq, 0, hits)


# ---- contiguous: a run is continued where it is, or copied

cdef status_t admit_run(pool_t *pool, request_t *request, int64_t *hits, bint patient,
                        handle_t *handle) noexcept nogil:
    cdef int64_t size = pool.space.block_size
    cdef int64_t blocks = ceil_div(request.tokens, size), claim = ceil_div(request.limit, size) - blocks
    cdef status_t status = find_room(pool, blocks + request.keep)
    cdef int32_t run = NOWHERE
    if over_budget(pool, blocks + claim) or status == NO_ROOM:
        return refuse(pool, blocks)
    if status != OK:
        return status
    if next_place(pool, 0) == NOWHERE or plan_reserve(&pool.space.plan, pool.places + 1 + hits[0]):
        return NO_MEMORY
    if hits[0]:
        run = run_of_hits(pool, hits[0], True)
        if run == NOWHERE:
            run = make_fit(pool, blocks, hits, patient)
    if run != NOWHERE:
        return revive(pool, request, run, blocks - hits[0], patient, handle)
    return admit_new(pool, request, hits[0], blocks, claim, patient, handle)


cdef int32_t run_of_hits(const pool_t *pool, int64_t hits, bint whole) noexcept nogil:
    """A cached run that begins with exactly what was found, and, if `whole`, has no more; NOWHERE for none."""
    cdef const seq_t *seq
    cdef int32_t head = pool.index.entries[pool.found[hits - 1]].block, run
    cdef int32_t block = pool.index.last_copy[head] - 1 if pool.index.last_copy[head] else head
    cdef int64_t seen = 0
    while is_cached(&pool.index, block) and seen < MOST_COPIES:
        run = pool.space.blocks.cells[block].a
        seq = &pool.space.seqs[run]
        if (seq.start + hits - 1 == block and is_cached(&pool.index, seq.start)
                and pool.index.entries[entry_at(&pool.index, seq.start)].parent < 0
                and (not whole or seq.blocks == hits) and not has_pin(pool, run)):
            return run
        if block == head:
            break
        block = pool.index.last_copy[block] - 1
        seen += 1
    return NOWHERE


cdef bint has_pin(const pool_t *pool, int32_t run) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[run]
    cdef int64_t index
    for index in range(seq.blocks if pool.index.pinned_blocks else 0):
        if is_pinned(&pool.index, seq.start + index):
            return True
    return False


cdef int32_t make_fit(pool_t *pool, int64_t blocks, int64_t *hits, bint patient) noexcept nogil:
    """Where there is no room for source and destination: a run that has been cut to what was found, to be continued,
    or NOWHERE, and fewer hits.
    """
    cdef const int32_t *source = &pool.found[pool.found_capacity]
    cdef int64_t sources = 0, index
    cdef int32_t run
    choose_sources(pool, hits[0])
    for index in range(hits[0]):
        sources += may_evict(pool, source[index])
    if blocks <= free_blocks(pool) - sources:
        return NOWHERE
    run = run_of_hits(pool, hits[0], False)
    if run != NOWHERE and not bit_of(pool.index.fresh, pool.space.seqs[run].start):
        cut_run(pool, run, hits[0])
        return run
    while hits[0] and blocks > free_blocks(pool) - sources:
        hits[0] -= 1
        sources -= may_evict(pool, source[hits[0]])
    return run_of_hits(pool, hits[0], True) if hits[0] else NOWHERE


cdef void cut_run(pool_t *pool, int32_t run, int64_t keep) noexcept nogil:
    """Evicts what a cached run has beyond its first `keep` blocks."""
    cdef int64_t start = pool.space.seqs[run].start, index
    for index in range(pool.space.seqs[run].blocks - 1, keep - 1, -1):
        forget_block(&pool.index, start + index)
        pool.sight.reuse.for_room += 1
    shorten_run(pool, run, keep)


cdef status_t revive(pool_t *pool, request_t *request, int32_t run, int64_t more, bint patient,
                     handle_t *handle) noexcept nogil:
    """A cached run that is the beginning of the prompt becomes the sequence's, where it is, with `more` blocks."""
    cdef seq_t *seq = &pool.space.seqs[run]
    cdef int64_t size = pool.space.block_size, index, blocks = seq.blocks
    cdef bint fresh = bit_of(pool.index.fresh, seq.start)
    cdef status_t status = OK
    if pool.index.pinned_blocks and reserve_splits(pool):
        return NO_MEMORY
    seq = &pool.space.seqs[run]
    for index in range(blocks):
        uncache_block(&pool.index, seq.start + index)
    seq.limit = <int32_t>request.limit  # what it may grow to counts where room is made
    if more and room_after(&pool.space, seq) >= more:
        extend_last(pool, run, more)
    elif more:
        status = make_room(pool, run, more, patient)
    seq = &pool.space.seqs[run]
    if status != OK:
        seq.limit = <int32_t>(blocks * size)
        for index in range(blocks - 1, -1, -1):
            cache_block(&pool.index, seq.start + index, fresh)
        return status
    uncache_run(pool, run)
    handle[0] = enter_at(pool, run, request.tokens, request.limit)
    pool.sight.reuse.revived_tokens += blocks * size
    return OK


cdef status_t admit_new(pool_t *pool, request_t *request, int64_t hits, int64_t blocks, int64_t claim,
                        bint patient, handle_t *handle) noexcept nogil:
    """A run of its own, into which what was found is copied after whatever else has to move."""
    cdef status_t status = OK
    cdef bint guarded = False
    if hits and not patient:
        return BUSY  # bytes are copied
    if pool.space.blocks.free_blocks < blocks or not place_in_gap(&pool.space, blocks, claim):
        if (hits or pool.index.pinned_blocks) and reserve_splits(pool):
            return NO_MEMORY
        guarded = hits > 0
        guard_sources(pool, hits)
        status = plan_run(pool, blocks, claim, patient)
    if status == OK:
        status = copy_hits(pool, request, hits, blocks, handle)
    elif status == NO_RUN:
        status = NO_MEMORY if reserve_runs(pool, blocks) else scatter_hits(pool, request, hits, blocks, claim, handle)
    if guarded:
        release_sources(pool, hits)
    if status == OK:
        for index in range(hits):
            enter_copy(pool, place_of(handle[0]), index)
        pool.copied_tokens += hits * pool.space.block_size
    return status


cdef inline bint may_evict(const pool_t *pool, int64_t block) noexcept nogil:
    return is_cached(&pool.index, block) and not bit_of(pool.index.fresh, block)


cdef void choose_sources(pool_t *pool, int64_t hits) noexcept nogil:
    """Blocks to copy from: held ones where there are any, else cached ones, the last one first.

    So what is taken of a cached run has nothing before it that is not elsewhere too, and its end may be evicted.
    """
    cdef int32_t *source = &pool.found[pool.found_capacity]
    cdef int64_t index, head, block = 0
    for index in range(hits - 1, -1, -1):
        head = pool.index.entries[pool.found[index]].block
        if block > 0 and entry_at(&pool.index, block - 1) == pool.found[index] and (
                is_cached(&pool.index, head) or not is_cached(&pool.index, block - 1)):
            block -= 1
        else:
            block = head
        source[index] = <int32_t>block


cdef void guard_sources(pool_t *pool, int64_t hits) noexcept nogil:
    """Takes those that are cached out of what may be evicted; they are told by ~."""
    cdef int32_t *source = &pool.found[pool.found_capacity]
    cdef int64_t index
    for index in range(hits):
        if may_evict(pool, source[index]):
            uncache_block(&pool.index, source[index])
            source[index] = ~source[index]


cdef void release_sources(pool_t *pool, int64_t hits) noexcept nogil:
    cdef const int32_t *source = &pool.found[pool.found_capacity]
    cdef int64_t index
    for index in range(hits - 1, -1, -1):
        if source[index] < 0:
            cache_block(&pool.index, ~source[index], False)


cdef status_t copy_hits(pool_t *pool, request_t *request, int64_t hits, int64_t blocks,
                        handle_t *handle) noexcept nogil:
    """Carries the plan in hand out, and copies from where it leaves the sources."""
    cdef plan_t *plan = &pool.space.plan
    cdef int32_t *source = &pool.found[pool.found_capacity]
    cdef int64_t count = plan.count, index, block, to
    cdef int32_t run
    cdef status_t status
    for index in range(hits):
        block = ~source[index] if source[index] < 0 else source[index]
        run = pool.space.blocks.cells[block].a
        to = planned_start(&pool.space, run) + block - pool.space.seqs[run].start
        add_copy(plan, &count, plan.count, to, plan.start + index)
    status = move_bytes(pool, plan.moves, count)
    if status != OK:
        return status
    if plan.count:
        for index in range(hits):
            block = ~source[index] if source[index] < 0 else source[index]
            run = pool.space.blocks.cells[block].a
            to = planned_start(&pool.space, run) + block - pool.space.seqs[run].start
            source[index] = <int32_t>(~to if source[index] < 0 else to)
        enter_moves(pool)
    handle[0] = enter(pool, request.tokens, request.limit)
    take_planned(pool, place_of(handle[0]), blocks)
    return OK


cdef inline void add_copy(plan_t *plan, int64_t *count, int64_t first, int64_t source, int64_t to) noexcept nogil:
    """One more block to copy, after those from move `first` on."""
    cdef move_t *last = &plan.moves[count[0] - 1]
    if count[0] > first and last.source + last.blocks == source and last.destination + last.blocks == to:
        last.blocks += 1
        return
    plan.moves[count[0]] = move_t(source=source, destination=to, blocks=1)
    count[0] += 1


cdef status_t scatter_hits(pool_t *pool, request_t *request, int64_t hits, int64_t blocks, int64_t claim,
                           handle_t *handle) noexcept nogil:
    """No run within the bound on moves: blocks are first taken where they are free, then filled."""
    cdef const int32_t *source = &pool.found[pool.found_capacity]
    cdef plan_t *plan = &pool.space.plan
    cdef int64_t spills = pool.spills, count = 0, index
    cdef int32_t who
    cdef status_t status
    handle[0] = enter(pool, request.tokens, request.limit)
    who = place_of(handle[0])
    scatter(pool, who, blocks, claim)
    for index in range(hits):
        add_copy(plan, &count, 0, ~source[index] if source[index] < 0 else source[index], block_at(pool, who, index))
    status = move_bytes(pool, plan.moves, count)
    if status != OK:
        drop_runs(pool, who, 0, True)
        leave(pool, who)
        pool.spills = spills
    return status


cdef void enter_copy(pool_t *pool, int32_t who, int64_t index) noexcept nogil:
    """Block `index` of a sequence has the content of that hit."""
    cdef int64_t block = block_at(pool, who, index)
    cdef int32_t run = who
    while index >= <int64_t>pool.space.seqs[run].before + pool.space.seqs[run].blocks:
        run = pool.space.seqs[run].next_run
    join_entry(&pool.index, pool.found[index], block)
    pool.space.blocks.cells[block].a = run
