"""Walks every structure of a pool and names the first thing that is wrong. Called under the lock."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from kvcache._blocks cimport NOWHERE, block_is_free, check_blocks
from kvcache._space cimport growth_of, hot_t, seq_t
from kvcache._pool cimport pool_t, slot_of, used_blocks


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
        return check_holders(pool, holders, holders + num_blocks) if wrong is None else wrong
    finally:
        free(holders)


cdef str check_sequences(const pool_t *pool, int32_t *holders, int32_t *writers):
    cdef int64_t who, live = 0, vacant = 0, claims = pool.copies
    cdef str wrong
    for who in range(pool.places):
        if pool.space.hot[who].generation & 1 == 0:
            continue
        live += 1
        claims += growth_of(&pool.space, &pool.space.seqs[who])
        wrong = check_lengths(pool, who) or check_run(pool, who, holders, writers)
        if wrong:
            return wrong
    if live != pool.space.live:
        return f"the table has {live} live sequences, the count says {pool.space.live}"
    if claims != pool.claims:
        return f"sequences and copies claim {claims} blocks, the sum says {pool.claims}"
    who = pool.vacant
    while who != NOWHERE and vacant <= pool.places:
        if pool.space.hot[who].generation & 1:
            return f"place {who} is listed as vacant and lives"
        vacant += 1
        who = pool.space.seqs[who].next_vacant
    if vacant + live > pool.places:
        return f"{vacant} vacant and {live} live places, the table has {pool.places}"
    return None


cdef str check_lengths(const pool_t *pool, int64_t who):
    cdef const hot_t *hot = &pool.space.hot[who]
    cdef const seq_t *seq = &pool.space.seqs[who]
    cdef int64_t size = pool.space.block_size
    cdef int64_t mark, written
    if seq.blocks != (hot.tokens + size - 1) // size:
        return f"sequence {who} of {hot.tokens} tokens holds {seq.blocks} blocks of {size}"
    if hot.tokens < 0 or hot.tokens > seq.limit or hot.soft > min(<int64_t>seq.limit, seq.blocks * size):
        return (f"sequence {who} has {hot.tokens} tokens and may have {hot.soft} without a look, "
                f"its limit is {seq.limit}, its blocks hold {seq.blocks * size}")
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
    for index in range(seq.blocks):
        before, block = block, slot_of(pool, <int32_t>who, index * size) // size
        breaks += index > 0 and block != before + 1
        if block < 0 or block >= pool.space.blocks.num_blocks or block_is_free(&pool.space.blocks, block):
            return f"sequence {who} holds block {block}, which is free or not in the pool"
        holders[block] += 1
    if seq.blocks == 0:
        return None
    if pool.paged and breaks != seq.breaks:
        return f"sequence {who} has {breaks} breaks in its table, the count says {seq.breaks}"
    if hot.base != (block - (seq.blocks - 1)) * size:
        return f"sequence {who} would append at {hot.base} + {hot.tokens}, its last block is {block}"
    if hot.tokens % size and hot.tokens < seq.limit:
        writers[block] += 1
    if not pool.paged and (pool.space.blocks.cells[seq.start].a != who or pool.space.blocks.cells[block].a != who):
        return (f"run of sequence {who} at [{seq.start}, {block}] is labelled "
                f"{pool.space.blocks.cells[seq.start].a} and {pool.space.blocks.cells[block].a}")
    return None


cdef str check_holders(const pool_t *pool, int32_t *holders, int32_t *writers):
    cdef int64_t block, index, held = 0, limbo = 0, copies = 0
    for index in range(pool.num_limbo):
        limbo += pool.limbo[index].length
        for block in range(pool.limbo[index].start, pool.limbo[index].start + pool.limbo[index].length):
            if holders[block] or block_is_free(&pool.space.blocks, block):
                return f"block {block} was freed under a hold, and is held by {holders[block]} or free"
    if limbo != pool.limbo_blocks:
        return f"{limbo} blocks wait for holds to end, the count says {pool.limbo_blocks}"
    for block in range(pool.space.blocks.num_blocks):
        if holders[block] == 0:
            continue
        held += 1
        if holders[block] > 1 and not pool.paged:
            return f"block {block} is held by {holders[block]} sequences"
        if pool.paged and pool.refs[block] != holders[block]:
            return f"block {block} is held by {holders[block]} sequences, its count says {pool.refs[block]}"
        if holders[block] > 1:
            copies += min(writers[block], holders[block] - 1)
            if pool.writers[block] != writers[block]:
                return f"block {block} has {writers[block]} writers, its count says {pool.writers[block]}"
    if held + limbo != used_blocks(pool):
        return f"{held} blocks are held and {limbo} wait for holds to end, {used_blocks(pool)} are not free"
    if copies != pool.copies:
        return f"{copies} copies of shared blocks are outstanding, the count says {pool.copies}"
    if held + pool.claims > pool.budget:
        return f"{held} blocks held and {pool.claims} claimed, {pool.budget} may be"
    return None
