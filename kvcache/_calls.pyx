"""Whole calls: take the lock, decide, wait where a hold is in the way. From any thread, without the GIL."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport realloc

from kvcache._compact cimport pack
from kvcache._lock cimport kv_lock, kv_lock_wait, kv_lock_wake, kv_thread
from kvcache._pool cimport (
    BAD_COUNT,
    BELOW_USED,
    CLOSED,
    GONE,
    HELD,
    NO_MEMORY,
    NO_ROOM,
    OK,
    STALE,
    arena_tokens,
    ceil_div,
    handle_t,
    held_blocks,
    holder_t,
    is_live,
    my_hold,
    place_of,
    pool_t,
    release_mine,
    slot_of,
    status_t,
)
from kvcache._sequences cimport (
    admit,
    append,
    change_limit,
    cut,
    do_deferred,
    pool_unlock,
    raise_marks,
    retire,
    split,
)
from kvcache._sight cimport note_latency, now


# ---- holds

cdef status_t wait_for_holds(pool_t *pool) noexcept nogil:
    """Gives the lock up until nobody holds; then everything has to be looked at again. HELD: this thread holds."""
    if my_hold(pool) != NULL:
        return HELD
    do_deferred(pool)
    pool.waiting += 1
    while pool.num_holders:
        kv_lock_wait(&pool.lock)
    pool.waiting -= 1
    if pool.waiting == 0:
        kv_lock_wake(&pool.lock)  # those who want to hold have let us pass first
    return OK


cdef status_t pool_hold(pool_t *pool) noexcept nogil:
    return enter_hold(pool, False)


cdef status_t hold_briefly(pool_t *pool) noexcept nogil:
    """While bytes are copied: beside a hold that is open anyway, it does not queue up behind those who wait for it."""
    return enter_hold(pool, True)


cdef status_t enter_hold(pool_t *pool, bint brief) noexcept nogil:
    cdef holder_t *mine
    cdef void *holders
    cdef status_t status = OK
    kv_lock(&pool.lock)
    mine = my_hold(pool)
    if mine != NULL:
        mine.depth += 1
        if mine.brief and not brief:
            mine.brief = False
            pool.num_brief -= 1
    else:
        while pool.waiting and not (brief and pool.num_holders > pool.num_brief):
            kv_lock_wait(&pool.lock)
        if pool.num_holders == pool.holder_capacity:
            holders = realloc(pool.holders, (pool.holder_capacity + 8) * sizeof(holder_t))
            if holders == NULL:
                status = NO_MEMORY
            else:
                pool.holders = <holder_t *>holders
                pool.holder_capacity += 8
        if status == OK and pool.closed:
            status = CLOSED
        if status == OK:
            pool.holders[pool.num_holders] = holder_t(thread=kv_thread(), depth=1, brief=brief)
            pool.num_holders += 1
            pool.num_brief += brief
    pool_unlock(pool)
    return status


cdef status_t pool_release(pool_t *pool) noexcept nogil:
    cdef status_t status
    kv_lock(&pool.lock)
    status = release_mine(pool)
    pool_unlock(pool)
    return status


# ---- whole calls

cdef status_t pool_allocate(pool_t *pool, int64_t tokens, int64_t limit, handle_t *handle) noexcept nogil:
    cdef int64_t began
    cdef status_t status
    if not 1 <= tokens <= limit <= arena_tokens(pool):
        return BAD_COUNT
    began = now()
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = CLOSED if pool.closed else admit(pool, tokens, limit, True, handle)
        if status != HELD or wait_for_holds(pool) != OK:
            break
    if status == OK:
        note_latency(&pool.sight, now() - began)
    pool_unlock(pool)
    return status


cdef status_t admit_up_to(pool_t *pool, int64_t tokens, int64_t least, int64_t *limit, int64_t keep,
                          handle_t *handle) noexcept nogil:
    """Admission that lowers the limit to what may be promised, not below `least`, and leaves `keep` blocks free."""
    cdef int64_t size = pool.space.block_size
    cdef int64_t unclaimed = pool.budget - held_blocks(pool) - pool.claims
    if pool.closed:
        return CLOSED
    if unclaimed < ceil_div(limit[0], size):
        if unclaimed < ceil_div(least, size):
            return NO_ROOM
        limit[0] = min(limit[0], unclaimed * size)
    if ceil_div(tokens, size) > pool.space.blocks.free_blocks + pool.limbo_blocks - keep:
        return NO_ROOM
    pool.pause = 0
    return admit(pool, tokens, limit[0], True, handle)


cdef status_t pool_append(pool_t *pool, handle_t handle, int64_t count) noexcept nogil:
    cdef status_t status
    if count < 0:
        return BAD_COUNT
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = append(pool, place_of(handle), count, True) if is_live(pool, handle) else STALE
        if status != HELD or wait_for_holds(pool) != OK:
            break
    pool_unlock(pool)
    return status


cdef status_t pool_free(pool_t *pool, handle_t handle) noexcept nogil:
    cdef status_t status
    kv_lock(&pool.lock)
    status = retire(pool, handle)
    pool_unlock(pool)
    return status


cdef status_t pool_truncate(pool_t *pool, handle_t handle, int64_t tokens) noexcept nogil:
    cdef status_t status = STALE
    if tokens < 0:
        return BAD_COUNT
    kv_lock(&pool.lock)
    if is_live(pool, handle):
        status = GONE if tokens > pool.space.hot[place_of(handle)].tokens else cut(pool, place_of(handle), tokens)
    pool_unlock(pool)
    return status


cdef status_t pool_fork(pool_t *pool, handle_t parent, handle_t *child) noexcept nogil:
    cdef int64_t began = now()
    cdef status_t status
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = split(pool, parent, True, child) if is_live(pool, parent) else STALE
        if status != HELD or wait_for_holds(pool) != OK:
            break
    if status == OK:
        note_latency(&pool.sight, now() - began)
    pool_unlock(pool)
    return status


cdef status_t pool_set_limit(pool_t *pool, handle_t handle, int64_t limit) noexcept nogil:
    cdef status_t status = STALE
    if limit > arena_tokens(pool):
        return BAD_COUNT
    kv_lock(&pool.lock)
    if is_live(pool, handle):
        status = change_limit(pool, place_of(handle), limit)
    pool_unlock(pool)
    return status


cdef status_t pool_commit(pool_t *pool, handle_t handle, int64_t tokens) noexcept nogil:
    """The first `tokens` tokens, or all that there are if it is negative."""
    cdef status_t status = STALE
    kv_lock(&pool.lock)
    if is_live(pool, handle):
        if tokens < 0:
            tokens = pool.space.hot[place_of(handle)].tokens
        status = BELOW_USED if tokens > pool.space.hot[place_of(handle)].tokens else OK
        if status == OK:
            raise_marks(pool, place_of(handle), tokens)
    pool_unlock(pool)
    return status


cdef status_t pool_slots(pool_t *pool, handle_t handle, int64_t start, int64_t count, int32_t *slots) noexcept nogil:
    """Slots of positions [start, start + count); GONE if the sequence does not have them all."""
    cdef status_t status = STALE
    cdef int64_t index
    kv_lock(&pool.lock)
    if is_live(pool, handle):
        status = OK
        if start < 0 or count < 0 or count > pool.space.hot[place_of(handle)].tokens - start:
            status = GONE
        else:
            for index in range(count):
                slots[index] = <int32_t>slot_of(pool, place_of(handle), start + index)
    pool_unlock(pool)
    return status


cdef status_t pool_compact(pool_t *pool, int64_t most, int64_t *moved) noexcept nogil:
    """Packs the runs, moving at most `most` used tokens (negative: as many as it takes); tells how many it moved."""
    cdef int64_t before
    cdef status_t status = OK
    kv_lock(&pool.lock)
    while pool.num_holders and status == OK and not pool.paged:
        status = wait_for_holds(pool)
    if status == OK and pool.closed:
        status = CLOSED
    if status == OK:
        pool.pause = 0
        before = pool.moved_tokens
        status = pack(pool, most)
        moved[0] = pool.moved_tokens - before
        pool.changes += moved[0] > 0
    pool_unlock(pool)
    return status


cdef status_t pool_close(pool_t *pool) noexcept nogil:
    """Retires every sequence once nobody holds; what comes later finds the pool closed."""
    cdef int64_t who
    cdef status_t status = OK
    kv_lock(&pool.lock)
    while pool.num_holders and status == OK:
        status = wait_for_holds(pool)
    if status == OK:
        pool.closed = True
        pool.changes += 1
        for who in range(pool.places):
            if pool.space.hot[who].generation & 1:
                retire(pool, <handle_t>pool.space.hot[who].generation << 32 | <handle_t>who)
        pool.move, pool.arena = NULL, NULL
    pool_unlock(pool)
    return status
