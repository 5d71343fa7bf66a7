"""Whole calls: take the lock, decide, wait where a hold is in the way. From any thread, without the GIL."""

from libc.math cimport INFINITY, NAN
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport realloc

from kvcache._admit cimport admit, held_hits, most_hits
from kvcache._compact cimport pack
from kvcache._evict cimport keep_quotas, reserve_splits
from kvcache._index cimport match_ids
from kvcache._lock cimport kv_lock, kv_lock_wait, kv_lock_wake, kv_thread
from kvcache._pool cimport (
    BAD_COUNT,
    BELOW_USED,
    BUSY,
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
    keeps,
    my_hold,
    place_of,
    pool_t,
    release_mine,
    request_t,
    reserve_found,
    slot_of,
    status_t,
)
from kvcache._pins cimport forget_everything, limit_salt, pin_found, pin_live, pin_t, unpin
from kvcache._policy cimport read_clock
from kvcache._reuse cimport begin_names, may_name, note_ids
from kvcache._sequences cimport (
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
    keep_quotas(pool)
    pool_unlock(pool)
    return status


# ---- whole calls

cdef status_t pool_allocate(pool_t *pool, int64_t tokens, int64_t limit, handle_t *handle) noexcept nogil:
    """Admits a prompt that is only counted."""
    cdef request_t request = counted(tokens, limit)
    return pool_admit(pool, &request, handle)


cdef request_t counted(int64_t tokens, int64_t limit) noexcept nogil:
    """A request of so many tokens, whose ids are not known."""
    return request_t(tokens=tokens, limit=limit, ids=NULL, salt=0, keep=0, priority=0, ttl=INFINITY, when=NAN,
                     cached=0)


cdef status_t pool_admit(pool_t *pool, request_t *request, handle_t *handle) noexcept nogil:
    """Admits a prompt; `request.cached` tells how many of its tokens are in place."""
    cdef int64_t began
    cdef status_t status
    if not 1 <= request.tokens <= request.limit <= arena_tokens(pool):
        return BAD_COUNT
    began = now()
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = CLOSED if pool.closed else admit(pool, request, True, handle)
        if status != HELD or wait_for_holds(pool) != OK:
            break
    if status == OK:
        note_latency(&pool.sight, now() - began)
    pool_unlock(pool)
    return status


cdef status_t admit_up_to(pool_t *pool, request_t *request, int64_t least, handle_t *handle) noexcept nogil:
    """Admission that lowers the limit to what may be promised, not below `least`."""
    cdef int64_t size = pool.space.block_size, began
    cdef status_t status
    cdef int64_t unclaimed = pool.budget - held_blocks(pool) - pool.claims
    if pool.closed:
        return CLOSED
    if unclaimed < ceil_div(request.limit, size):
        unclaimed += held_hits(pool, request)
        if unclaimed < ceil_div(least, size):
            return NO_ROOM
        request.limit = min(request.limit, unclaimed * size)
    pool.pause = 0
    status = admit(pool, request, False, handle)
    if status != BUSY and status != HELD:
        return status
    began = now()  # it has to move others
    status = admit(pool, request, True, handle)
    if status == OK:
        note_latency(&pool.sight, now() - began)
    return status


cdef int64_t pool_probe(pool_t *pool, const request_t *request) noexcept nogil:
    """Tokens of a prompt that an admission would find in place."""
    cdef int64_t hits = 0
    if most_hits(pool, request):
        kv_lock(&pool.lock)
        hits = match_ids(&pool.index, request.salt, request.ids, most_hits(pool, request), NULL)
        pool_unlock(pool)
    return hits * pool.space.block_size


cdef status_t pool_pin(pool_t *pool, handle_t handle, int32_t salt, const int32_t *ids, int64_t count,
                       int64_t *blocks, pin_t *pin) noexcept nogil:
    """Pins what is entered of a live sequence, or of a prefix of ids; NO_ROOM where that is nothing, or too much."""
    cdef status_t status = NO_ROOM
    blocks[0] = count // pool.space.block_size
    if not keeps(pool):
        return NO_ROOM
    kv_lock(&pool.lock)
    if ids == NULL:
        status = pin_live(pool, place_of(handle), blocks, pin) if is_live(pool, handle) else STALE
    elif reserve_found(pool, blocks[0]):
        status = NO_MEMORY
    elif not pool.closed:
        blocks[0] = match_ids(&pool.index, salt, ids, blocks[0], pool.found)
        status = pin_found(pool, blocks[0], pin)
    keep_quotas(pool)  # an earlier pin may have moved
    pool_unlock(pool)
    return status


cdef status_t pool_unpin(pool_t *pool, pin_t pin) noexcept nogil:
    """Undoes a pin. STALE: it has been forgotten with everything else."""
    cdef status_t status
    kv_lock(&pool.lock)
    status = CLOSED if pool.closed else NO_MEMORY if reserve_splits(pool) else unpin(pool, pin)
    keep_quotas(pool)
    pool_unlock(pool)
    return status


cdef status_t pool_clear(pool_t *pool) noexcept nogil:
    """Forgets every prefix, and every pin."""
    cdef status_t status = OK
    kv_lock(&pool.lock)
    if keeps(pool):
        status = CLOSED if pool.closed else forget_everything(pool)
    pool_unlock(pool)
    return status


cdef status_t pool_limit_salt(pool_t *pool, int32_t salt, int64_t blocks) noexcept nogil:
    cdef status_t status = OK
    kv_lock(&pool.lock)
    if keeps(pool):
        status = CLOSED if pool.closed else limit_salt(pool, salt, blocks)
    pool_unlock(pool)
    return status


cdef status_t pool_append(pool_t *pool, handle_t handle, int64_t count) noexcept nogil:
    return pool_append_ids(pool, handle, count, NULL)


cdef status_t pool_append_ids(pool_t *pool, handle_t handle, int64_t count, const int32_t *ids) noexcept nogil:
    """Room for `count` tokens, which are these, unless it is NULL."""
    cdef status_t status
    if count < 0:
        return BAD_COUNT
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = append(pool, place_of(handle), count, True) if is_live(pool, handle) else STALE
        if status != HELD or wait_for_holds(pool) != OK:
            break
    if status == OK and ids != NULL:
        note_ids(pool, place_of(handle), pool.space.hot[place_of(handle)].tokens - count, ids, count)
    pool_unlock(pool)
    return status


cdef status_t pool_set_ids(pool_t *pool, handle_t handle, int64_t start, const int32_t *ids, int64_t count,
                           int64_t *there) noexcept nogil:
    """Names tokens from `start` on, or, if it is negative, the first ones that have no name; `there` is told start, and
    how many tokens there are.
    """
    cdef status_t status = STALE
    cdef int32_t who = place_of(handle)
    kv_lock(&pool.lock)
    begin_names(pool)
    if is_live(pool, handle):
        there[0] = pool.space.seqs[who].known if start < 0 else start
        there[1] = pool.space.hot[who].tokens
        if count > there[1] - there[0]:
            status = GONE
        elif there[0] > pool.space.seqs[who].known:
            there[1] = pool.space.seqs[who].known
            status = BELOW_USED
        elif not keeps(pool):
            status = OK
        elif not may_name(pool, who, there[0], ids, count):
            status = BAD_COUNT
        else:
            note_ids(pool, who, there[0], ids, count)
            status = OK
    pool_unlock(pool)
    return status


cdef status_t pool_free(pool_t *pool, handle_t handle) noexcept nogil:
    return pool_free_at(pool, handle, NAN)


cdef status_t pool_free_at(pool_t *pool, handle_t handle, double when) noexcept nogil:
    """Ends a sequence at that time of the clock."""
    cdef status_t status
    kv_lock(&pool.lock)
    status = retire(pool, handle, when)
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
    return pool_fork_at(pool, parent, child, NAN)


cdef status_t pool_fork_at(pool_t *pool, handle_t parent, handle_t *child, double when) noexcept nogil:
    cdef int64_t began = now()
    cdef status_t status
    kv_lock(&pool.lock)
    while True:
        pool.pause = 0
        status = split(pool, parent, True, child) if is_live(pool, parent) else STALE
        if status != HELD or wait_for_holds(pool) != OK:
            break
    read_clock(&pool.policy, when)
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
    return pool_commit_at(pool, handle, tokens, NAN)


cdef status_t pool_commit_at(pool_t *pool, handle_t handle, int64_t tokens, double when) noexcept nogil:
    cdef status_t status = STALE
    kv_lock(&pool.lock)
    if is_live(pool, handle):
        read_clock(&pool.policy, when)
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
                retire(pool, <handle_t>pool.space.hot[who].generation << 32 | <handle_t>who, NAN)
        pool.move, pool.arena = NULL, NULL
    pool_unlock(pool)
    return status
