"""Walks every structure of a pool and names the first thing that is wrong. Called under the lock."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from kvcache._blocks cimport NOWHERE, block_is_free, cell_t, check_blocks
from kvcache._index cimport check_index, entry_at, is_cached, is_pinned
from kvcache._reuse cimport block_at
from kvcache._space cimport growth_of, held, hot_t, seq_t
from kvcache._pool cimport NUM_LATENCIES, keeps, pool_t, sight_t, slot_of, used_blocks


cdef str check_pool(const pool_t *pool):
    """The first thing that is wrong, None if nothing is."""
    cdef int64_t num_blocks = pool.space.blocks.num_blocks
    cdef int32_t *holders
    cdef str wrong = check_blocks(&pool.space.blocks)
    if wrong is not None:
        return wrong
    holders = <int32_t *>calloc(2 * num_blocks, sizeof(int32_t))  # then as many writers
    if holders == NULL:
        raise MemoryError(f"checking {num_blocks} blocks needs {8 * num_blocks} bytes")
    try:
        wrong = check_sequences(pool, holders, holders + num_blocks)
        wrong = check_holders(pool, holders, holders + num_blocks) if wrong is None else wrong
        if wrong is None and keeps(pool):
            wrong = check_index(&pool.index) or check_names(pool) or check_cached(pool, holders)
        return check_sight(pool) if wrong is None else wrong
    finally:
        free(holders)


cdef str check_sequences(const pool_t *pool, int32_t *holders, int32_t *writers):
    cdef int64_t who, live = 0, vacant = 0, claims = pool.copies, further = 0
    cdef str wrong
    for who in range(pool.places):
        if pool.space.hot[who].generation & 1 == 0:
            continue
        live += 1
        claims += growth_of(&pool.space, &pool.space.seqs[who])
        further += 0 if pool.paged else pool.space.seqs[who].breaks
        wrong = check_lengths(pool, who) or check_run(pool, who, holders, writers)
        if wrong:
            return wrong
    if live != pool.space.live:
        return f"the table has {live} live sequences, the count says {pool.space.live}"
    if further != pool.space.further:
        return f"sequences have {further} further runs, the count says {pool.space.further}"
    if claims != pool.claims:
        return f"sequences and copies claim {claims} blocks, the sum says {pool.claims}"
    who = pool.vacant
    while who != NOWHERE and vacant <= pool.places:
        if pool.space.hot[who].generation & 1:
            return f"place {who} is listed as vacant and lives"
        vacant += 1
        who = pool.space.seqs[who].next_vacant
    if vacant != pool.vacancies:
        return f"{vacant} places are listed as vacant, the count says {pool.vacancies}"
    if vacant + live + further + pool.cached_runs > pool.places:
        return (f"{vacant} vacant places, {live} live, {further} of further and {pool.cached_runs} of cached runs, "
                f"the table has {pool.places}")
    return None


cdef str check_names(const pool_t *pool):
    """What is known of live sequences, and that it is entered."""
    cdef int64_t who, index
    cdef int32_t entry, before
    cdef const seq_t *seq
    for who in range(pool.places):
        seq = &pool.space.seqs[who]
        if pool.space.hot[who].generation & 1 == 0:
            continue
        if seq.known > pool.space.hot[who].tokens or seq.indexed * pool.space.block_size > seq.known:
            return (f"sequence {who} of {pool.space.hot[who].tokens} tokens knows {seq.known} of them, "
                    f"and has {seq.indexed} blocks entered")
        before = -1 - seq.salt
        for index in range(seq.indexed):
            entry = entry_at(&pool.index, block_at(pool, <int32_t>who, index))
            if entry < 0 or pool.index.entries[entry].parent != before:
                return f"block {index} of sequence {who} is entry {entry}, which does not follow entry {before}"
            before = entry
    return None


cdef str check_cached(const pool_t *pool, const int32_t *holders):
    """Blocks that nobody holds, in contiguous placement the runs that they are in."""
    cdef int64_t block, who, runs = 0, in_runs = 0, pinned = 0
    cdef const seq_t *run
    for block in range(pool.space.blocks.num_blocks):
        if is_cached(&pool.index, block) and (holders[block] or block_is_free(&pool.space.blocks, block)):
            return f"block {block} is cached, and held by {holders[block]} sequences or free"
        if entry_at(&pool.index, block) >= 0 and block_is_free(&pool.space.blocks, block):
            return f"block {block} is free, and entry {entry_at(&pool.index, block)} is said to be there"
    for who in range(0 if pool.paged else pool.places):
        run = &pool.space.seqs[who]
        if pool.space.hot[who].generation & 1 or run.head != who or run.blocks == 0:
            continue
        runs += 1
        in_runs += run.blocks
        for block in range(run.start, run.start + run.blocks):
            pinned += is_pinned(&pool.index, block)
            if not (is_cached(&pool.index, block) or is_pinned(&pool.index, block)):
                return f"block {block} of cached run {who} is not cached"
            if pool.space.blocks.cells[block].a != who:
                return f"block {block} of cached run {who} is labelled {pool.space.blocks.cells[block].a}"
            if block > run.start and (pool.index.entries[entry_at(&pool.index, block)].parent
                                      != entry_at(&pool.index, block - 1)):
                return f"block {block} of cached run {who} does not follow the block before it"
    if runs != pool.cached_runs:
        return f"{runs} runs are cached, the count says {pool.cached_runs}"
    if not pool.paged and in_runs - pinned != pool.index.cached_blocks + pool.index.fresh_blocks:
        return (f"cached runs have {in_runs} blocks, {pinned} of them pinned; "
                f"{pool.index.cached_blocks} and {pool.index.fresh_blocks} are cached")
    return None


cdef str check_sight(const pool_t *pool):
    cdef const sight_t *sight = &pool.sight
    cdef int64_t bucket, timed = 0
    if sight.admissions - sight.frees != pool.space.live:
        return f"{sight.admissions} sequences began and {sight.frees} ended, {pool.space.live} live"
    for bucket in range(NUM_LATENCIES):
        timed += sight.latencies[bucket]
    if timed != sight.num_timed or timed > sight.admissions:
        return f"{timed} latencies of {sight.admissions} admissions, the count says {sight.num_timed}"
    if sight.peak.used < used_blocks(pool) or sight.peak.live < pool.space.live or sight.peak.claims < pool.claims:
        return (f"the peaks are {sight.peak.used} blocks, {sight.peak.live} sequences and {sight.peak.claims} claims, "
                f"there are {used_blocks(pool)}, {pool.space.live} and {pool.claims}")
    return None


cdef str check_lengths(const pool_t *pool, int64_t who):
    cdef const hot_t *hot = &pool.space.hot[who]
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t mark, written
    if held(seq) != (hot.tokens + size - 1) // size:
        return f"sequence {who} of {hot.tokens} tokens holds {held(seq)} blocks of {size}"
    if hot.tokens < 0 or hot.tokens > seq.limit or hot.soft > min(<int64_t>seq.limit, held(seq) * size):
        return (f"sequence {who} has {hot.tokens} tokens and may have {hot.soft} without a look, "
                f"its limit is {seq.limit}, its blocks hold {held(seq) * size}")
    for mark in range(pool.num_marks):
        written = pool.marks[who * pool.num_marks + mark]
        if written > hot.tokens:
            return f"sequence {who}: {written} tokens written of {hot.tokens}, mark {mark}"
    return None


cdef str check_run(const pool_t *pool, int64_t who, int32_t *holders, int32_t *writers):
    cdef const hot_t *hot = &pool.space.hot[who]
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t index, breaks = 0, block = NOWHERE, before
    for index in range(held(seq)):
        before, block = block, slot_of(pool, <int32_t>who, index * size) // size
        breaks += index > 0 and block != before + 1
        if block < 0 or block >= pool.space.blocks.num_blocks or block_is_free(&pool.space.blocks, block):
            return f"sequence {who} holds block {block}, which is free or not in the pool"
        holders[block] += 1
    if seq.blocks == 0:
        return None
    if breaks != seq.breaks:
        return f"sequence {who} has {breaks} breaks in its blocks, the count says {seq.breaks}"
    if hot.base != (block - (held(seq) - 1)) * size:
        return f"sequence {who} would append at {hot.base} + {hot.tokens}, its last block is {block}"
    if hot.tokens % size and hot.tokens < seq.limit:
        writers[block] += 1
    return None if pool.paged else check_chain(pool, who)


cdef str check_chain(const pool_t *pool, int64_t who):
    """The runs of a sequence in contiguous placement, one after another."""
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef const seq_t *run
    cdef const cell_t *cells = pool.space.blocks.cells
    cdef int64_t place = who, last = who, blocks = 0, count = 0
    while place != NOWHERE:
        run = &pool.space.seqs[place]
        if run.head != who or run.before != blocks or run.blocks <= 0:
            return (f"run {count} of sequence {who} says that it has {run.blocks} blocks of sequence {run.head} "
                    f"and {run.before} before it, there are {blocks}")
        if cells[run.start].a != place or cells[run.start + run.blocks - 1].a != place:
            return (f"run of {run.blocks} blocks of sequence {who} at {run.start} is labelled "
                    f"{cells[run.start].a} and {cells[run.start + run.blocks - 1].a}, its place is {place}")
        blocks += run.blocks
        count += 1
        last, place = place, run.next_run
    if last != seq.last_run or blocks != held(seq) or count != seq.breaks + 1:
        return (f"sequence {who} has {count} runs with {blocks} blocks, the last at place {last}; "
                f"it says {seq.breaks + 1}, {held(seq)} and {seq.last_run}")
    return None


cdef str check_holders(const pool_t *pool, int32_t *holders, int32_t *writers):
    cdef int64_t block, index, taken = 0, limbo = 0, copies = 0
    cdef bint pinned
    for index in range(pool.num_limbo):
        limbo += pool.limbo[index].length
        for block in range(pool.limbo[index].start, pool.limbo[index].start + pool.limbo[index].length):
            if holders[block] or block_is_free(&pool.space.blocks, block):
                return f"block {block} was freed under a hold, and is held by {holders[block]} or free"
    for index in range(pool.num_kept):
        block = pool.kept[index].start
        if pool.num_holders == 0 or block_is_free(&pool.space.blocks, block):
            return f"content of block {block} is kept by {pool.num_holders} holds, the block is free or nobody holds"
    if limbo != pool.limbo_blocks:
        return f"{limbo} blocks wait for holds to end, the count says {pool.limbo_blocks}"
    for block in range(pool.space.blocks.num_blocks):
        pinned = is_pinned(&pool.index, block)
        if holders[block] == 0 and not pinned:
            continue
        taken += 1
        if holders[block] > 1 and not pool.paged:
            return f"block {block} is held by {holders[block]} sequences"
        if pool.paged and pool.refs[block] != holders[block] + pinned:
            return (f"block {block} is held by {holders[block]} sequences and {pinned} pins, "
                    f"its count says {pool.refs[block]}")
        if pool.paged and pool.refs[block] > 1:
            copies += min(writers[block], pool.refs[block] - 1)
            if pool.writers[block] != writers[block]:
                return f"block {block} has {writers[block]} writers, its count says {pool.writers[block]}"
    if taken + limbo + pool.index.fresh_blocks != used_blocks(pool):
        return (f"{taken} blocks are held, {limbo} and {pool.index.fresh_blocks} wait for holds to end, "
                f"{used_blocks(pool)} are not free")
    if copies != pool.copies:
        return f"{copies} copies of shared blocks are outstanding, the count says {pool.copies}"
    if taken + pool.claims > pool.budget:
        return f"{taken} blocks held and {pool.claims} claimed, {pool.budget} may be"
    return None
