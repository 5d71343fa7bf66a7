"""The pool: places in the table, blocks that nobody holds, bytes that move."""

from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memmove, memset

from kvcache._blocks cimport NOWHERE, blocks_destroy, blocks_init, give_run, mark_free
from kvcache._index cimport entry_at, forget_block, index_destroy, index_init, settle_block
from kvcache._lock cimport kv_lock_destroy, kv_lock_init, kv_lock_runs_python, kv_lock_wake, kv_thread
from kvcache._moves cimport move_t
from kvcache._policy cimport policy_destroy
from kvcache._space cimport hot_t, plan_destroy, plan_reserve, seq_t


cdef int pool_init(pool_t *pool, int64_t num_blocks, int64_t block_size, bint paged, int64_t budget,
                   int64_t num_marks, const uint64_t *seed) noexcept nogil:
    """`seed` of the hash of prefixes; NULL: none are kept."""
    memset(pool, 0, sizeof(pool_t))
    pool.space.block_size = block_size
    pool.paged = paged
    pool.budget = budget
    pool.num_marks = num_marks
    pool.vacant = NOWHERE
    pool.most_moved = -1
    pool.first_double = pool.last_double = NOWHERE
    if kv_lock_init(&pool.lock) or blocks_init(&pool.space.blocks, num_blocks, not paged):
        return -1
    if seed != NULL and index_init(&pool.index, num_blocks, block_size, seed):
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
    free(pool.written)
    index_destroy(&pool.index)
    policy_destroy(&pool.policy)
    free(pool.found)
    free(pool.lately)
    free(pool.limbo)
    free(pool.kept)
    free(pool.spans.items)
    free(pool.holders)
    free(pool.deferred)
    kv_lock_destroy(&pool.lock)


cdef status_t move_bytes(pool_t *pool, const move_t *moves, int64_t count) noexcept nogil:
    """Has the arena move K/V; the token ids go with them."""
    cdef int failed = 0
    cdef int64_t index, width = pool.space.block_size
    if count and pool.move != NULL:
        kv_lock_runs_python(&pool.lock, True)  # the arena may have to
        failed = pool.move(pool.arena, moves, count)
        kv_lock_runs_python(&pool.lock, False)
    if failed:
        return MOVE_FAILED
    for index in range(count if pool.space.traced else 0):
        memmove(&pool.index.ids[moves[index].destination * width], &pool.index.ids[moves[index].source * width],
                moves[index].blocks * width * sizeof(int32_t))
    return OK


# ---- places in the table

cdef int add_places(pool_t *pool) noexcept nogil:
    """Doubles the table. What cannot be had leaves it as it was (some arrays larger than they need be)."""
    cdef int64_t places = max(pool.places * 2, <int64_t>16)
    cdef int64_t who
    cdef void *hot = realloc(pool.space.hot, places * sizeof(hot_t))
    cdef void *seqs
    cdef void *marks
    cdef void *written
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
    written = realloc(pool.written, max(places * pool.num_marks, <int64_t>1) * sizeof(extent_t))
    if written == NULL:
        return -1
    pool.written = <extent_t *>written
    if plan_reserve(&pool.space.plan, places + 1):  # every sequence may move, and a fork be copied
        return -1
    memset(&pool.space.hot[pool.places], 0, (places - pool.places) * sizeof(hot_t))
    memset(&pool.space.seqs[pool.places], 0, (places - pool.places) * sizeof(seq_t))
    for who in range(places - 1, pool.places - 1, -1):
        pool.space.seqs[who].next_vacant = pool.vacant
        pool.vacant = <int32_t>who
    pool.vacancies += places - pool.places
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


cdef int32_t take_place(pool_t *pool) noexcept nogil:
    """The next vacant place, there is one: with no block, and by itself."""
    cdef int32_t who = pool.vacant
    cdef seq_t *seq = &pool.space.seqs[who]
    pool.vacant = seq.next_vacant
    pool.vacancies -= 1
    seq.blocks = seq.breaks = seq.before = seq.further = 0
    seq.next_run = NOWHERE
    seq.head = seq.last_run = who
    return who


cdef void vacate(pool_t *pool, int32_t who) noexcept nogil:
    pool.space.seqs[who].next_vacant = pool.vacant
    pool.vacant = who
    pool.vacancies += 1


cdef handle_t enter(pool_t *pool, int64_t tokens, int64_t limit) noexcept nogil:
    """Makes the next place live, with no block yet; its handle."""
    return enter_at(pool, take_place(pool), tokens, limit)


cdef handle_t enter_at(pool_t *pool, int32_t who, int64_t tokens, int64_t limit) noexcept nogil:
    """A place that is taken lives: with the blocks that it has."""
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    hot.generation += 1
    hot.tokens = <int32_t>tokens
    seq.limit = <int32_t>limit
    seq.known = seq.indexed = seq.salt = seq.priority = 0
    memset(&pool.marks[who * pool.num_marks], 0, pool.num_marks * sizeof(int32_t))
    memset(&pool.written[who * pool.num_marks], 0, pool.num_marks * sizeof(extent_t))
    pool.space.live += 1
    return <handle_t>hot.generation << 32 | <handle_t>who


cdef void leave(pool_t *pool, int32_t who) noexcept nogil:
    pool.space.hot[who].generation += 1
    pool.space.live -= 1
    end_run(pool, who)


cdef void end_run(pool_t *pool, int32_t who) noexcept nogil:
    """A place that does not live has no run any more."""
    pool.space.seqs[who].blocks = 0
    if pool.space.hot[who].generation >= UINT32_MAX - 1:
        return  # worn out: a handle that comes round again would be somebody else's
    vacate(pool, who)


cdef void refresh(pool_t *pool, int32_t who) noexcept nogil:
    """Sets what an append without a look reads: where the next token goes, and how many may follow."""
    cdef hot_t *hot = &pool.space.hot[who]
    cdef seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t tail
    if seq.blocks == 0:
        hot.base = hot.soft = 0
        return
    tail = last_block(pool, who)
    hot.base = <int32_t>((tail - (held(seq) - 1)) * size)
    if pool.paged and pool.refs[tail] > 1 or tail_is_kept(pool, who):
        hot.soft = hot.tokens  # the block is copied, or a hold waited for, before anything is appended to it
    else:
        hot.soft = <int32_t>min(<int64_t>seq.limit, held(seq) * size)
        if pool.space.traced and hot.tokens < hot.soft and entry_at(&pool.index, tail) >= 0:
            forget_block(&pool.index, tail)  # it has been cut, and what follows is written over what it had


cdef int64_t slot_in_runs(const pool_t *pool, int32_t who, int64_t position) noexcept nogil:
    """`slot_of` a scattered sequence in contiguous placement."""
    cdef int64_t size = pool.space.block_size
    cdef int64_t block = position // size
    while block >= <int64_t>pool.space.seqs[who].before + pool.space.seqs[who].blocks:
        who = pool.space.seqs[who].next_run
    return (pool.space.seqs[who].start + block - pool.space.seqs[who].before) * size + position % size


cdef void copy_table(const pool_t *pool, int32_t who, int64_t count, int32_t *table) noexcept nogil:
    """The first `count` blocks of a sequence, in token order."""
    cdef const seq_t *run = &pool.space.seqs[who]
    cdef int64_t index
    for index in range(count):
        if pool.paged:
            table[index] = run.table[index]
            continue
        if index == run.before + run.blocks:
            run = &pool.space.seqs[run.next_run]
        table[index] = <int32_t>(run.start + index - run.before)


cdef int64_t committed_tokens(const pool_t *pool, int32_t who) noexcept nogil:
    """The least of the written prefixes."""
    cdef const int32_t *marks = &pool.marks[who * pool.num_marks]
    cdef int32_t least = pool.space.hot[who].tokens
    cdef int64_t mark
    for mark in range(pool.num_marks):
        least = min(least, marks[mark])
    return least


# ---- blocks that nobody holds

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


cdef void note_lately(pool_t *pool, int64_t start, int64_t length) noexcept nogil:
    """Under a hold: blocks that have become cached; room for the entry has been reserved."""
    pool.lately[pool.num_lately] = extent_t(start=<int32_t>start, length=<int32_t>length)
    pool.num_lately += 1


cdef void end_of_holds(pool_t *pool) noexcept nogil:
    """What was freed under the holds is free."""
    cdef int64_t index, block
    for index in range(pool.num_lately):
        for block in range(pool.lately[index].start, pool.lately[index].start + pool.lately[index].length):
            settle_block(&pool.index, block)
    pool.changes += pool.num_lately > 0
    pool.num_lately = 0
    for index in range(pool.num_limbo):
        give_back(pool, pool.limbo[index].start, pool.limbo[index].length)
    if pool.num_limbo:
        pool.changes += 1
    pool.num_limbo = pool.limbo_blocks = pool.num_kept = 0


cdef holder_t *my_hold(pool_t *pool) noexcept nogil:
    cdef uintptr_t me = kv_thread()
    cdef int64_t index
    for index in range(pool.num_holders):
        if pool.holders[index].thread == me:
            return &pool.holders[index]
    return NULL


cdef status_t release_mine(pool_t *pool) noexcept nogil:
    """Leaves one hold of this thread."""
    cdef holder_t *mine = my_hold(pool)
    if mine == NULL:
        return NOT_HELD
    mine.depth -= 1
    if mine.depth == 0:
        pool.num_holders -= 1
        pool.num_brief -= mine.brief
        mine[0] = pool.holders[pool.num_holders]
        if pool.num_holders == 0:
            end_of_holds(pool)
            kv_lock_wake(&pool.lock)
    return OK


cdef int reserve_for_holds(pool_t *pool, int64_t blocks) noexcept nogil:
    """Room for what letting go of so many blocks, or of a part of one more, enters if anybody holds."""
    if pool.num_holders == 0:
        return 0
    if reserve_extents(&pool.kept, &pool.kept_capacity, pool.num_kept + blocks + 1):
        return -1
    if not pool.paged:
        blocks = min(blocks, pool.space.further + 1)  # a run is one entry
    if keeps(pool) and reserve_lately(pool, blocks):
        return -1
    return reserve_limbo(pool, blocks)


cdef int reserve_found(pool_t *pool, int64_t blocks) noexcept nogil:
    """Room for the entries that so many blocks of a prompt hit."""
    cdef void *found
    if blocks <= pool.found_capacity:
        return 0
    blocks = max(blocks, 2 * pool.found_capacity)
    found = realloc(pool.found, 2 * blocks * sizeof(int32_t))
    if found == NULL:
        return -1
    pool.found = <int32_t *>found
    pool.found_capacity = blocks
    return 0


cdef int reserve_lately(pool_t *pool, int64_t entries) noexcept nogil:
    return reserve_extents(&pool.lately, &pool.lately_capacity, pool.num_lately + entries)


cdef int reserve_limbo(pool_t *pool, int64_t entries) noexcept nogil:
    return reserve_extents(&pool.limbo, &pool.limbo_capacity, pool.num_limbo + entries)


cdef int reserve_extents(extent_t **extents, int64_t *capacity, int64_t entries) noexcept nogil:
    cdef void *grown
    if entries <= capacity[0]:
        return 0
    entries = max(entries, 2 * capacity[0])
    grown = realloc(extents[0], entries * sizeof(extent_t))
    if grown == NULL:
        return -1
    extents[0] = <extent_t *>grown
    capacity[0] = entries
    return 0


cdef void keep_content(pool_t *pool, int64_t block, int64_t tokens) noexcept nogil:
    """Under a hold: the first `tokens` tokens of a block in use stay as they are until it ends; room is reserved."""
    if pool.num_holders:
        pool.kept[pool.num_kept] = extent_t(start=<int32_t>block, length=<int32_t>tokens)
        pool.num_kept += 1


cdef bint tail_is_kept(const pool_t *pool, int32_t who) noexcept nogil:
    """Whether the next token would overwrite, in a block of the sequence's own, what a hold keeps."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t index, tail, used
    if pool.num_kept == 0 or seq.blocks == 0:
        return False
    tail = last_block(pool, who)
    if pool.paged and pool.refs[tail] > 1:
        return False
    used = pool.space.hot[who].tokens - (held(seq) - 1) * pool.space.block_size
    for index in range(pool.num_kept):
        if pool.kept[index].start == tail and pool.kept[index].length > used:
            return True
    return False
