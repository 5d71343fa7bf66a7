"""What every call into a cache needs: its sequences by their ids, the lock, waiting, and answers as Python knows them.

Nothing that could run Python happens under the allocator's lock, except in `check` and where an
arena has to, which say so to the lock; and nobody waits for the lock while holding the GIL.
"""

import logging
import os
from typing import NamedTuple

import cython

from libc.math cimport NAN
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy

from kvcache._calls cimport pool_free_at
from kvcache._copy cimport copier_move
from kvcache._ids cimport as_count, drop_ids, is_count, read_ids
from kvcache._lock cimport kv_lock, kv_lock_is_mine, kv_lock_try
from kvcache._pool cimport (
    CLOSED,
    HELD,
    MOVE_FAILED,
    NO_MEMORY,
    NO_ROOM,
    OK,
    PAST_LIMIT,
    STALE,
    ceil_div,
    handle_t,
    is_live,
    place_of,
    pool_destroy,
    pool_init,
    status_t,
)
from kvcache._leaves cimport weigh
from kvcache._policy cimport LRU, policy_init, touch_t
from kvcache._sequences cimport defer_free, pool_unlock, retire

from kvcache.errors import (
    CacheClosed,
    CacheHeld,
    KVCacheError,
    RequestTooLarge,
    SequenceExists,
    Suspended,
    UnknownSequence,
)

cdef enum:
    MOST_PRIORITY = 1000000000

cdef uint64_t[4] SEED  # of this process: which prompts collide cannot be known from outside
cdef bytes entropy = os.urandom(sizeof(SEED))
memcpy(SEED, <const char *>entropy, sizeof(SEED))


# ---- what a policy of the user's is told

class CachedBlock(NamedTuple):
    """What has happened to a block that may be evicted one day, for a policy to say what it is worth.

    Attributes
    ----------
    event : str
        ``"inserted"``, ``"hit"``, or ``"released"`` when its last holder has gone.
    position : int
        Blocks before it in its prompt.
    length : int
        Whole blocks of the prompt that touched it.
    hits : int
        How often it has been hit.
    time : float
        The cache's clock.
    """

    event: str
    position: int
    length: int
    hits: int
    time: float


LOG = logging.getLogger("kvcache")
EVENTS = ("inserted", "hit", "released")


# ---- what has been granted

@cython.final
@cython.freelist(256)
cdef class Allocation:
    """Allocation(request_id, tokens, max_tokens, cached_tokens)\n--\n

    What has been granted: a record, which stays as it is whatever becomes of the sequence.

    Attributes
    ----------
    request_id : hashable
    tokens : int
        Tokens of the prompt; of a fork, the parent's used tokens.
    max_tokens : int
        The limit, in tokens in total.
    cached_tokens : int
        Leading tokens whose K/V are in place already; of a fork, what the parent had committed.
    """

    def __init__(self, request_id, tokens, max_tokens, cached_tokens):
        if self.made:
            raise TypeError("an Allocation does not change")
        self.made = True
        self.request_id = request_id
        self.tokens = tokens
        self.max_tokens = max_tokens
        self.cached_tokens = cached_tokens

    def _fields(self):
        return self.request_id, self.tokens, self.max_tokens, self.cached_tokens

    def __eq__(self, other):
        if not isinstance(other, Allocation):
            return NotImplemented
        return self._fields() == other._fields()

    def __hash__(self):
        return hash(self._fields())

    def __repr__(self):
        return (f"Allocation(request_id={self.request_id!r}, tokens={self.tokens}, max_tokens={self.max_tokens}, "
                f"cached_tokens={self.cached_tokens})")

    def __reduce__(self):
        return Allocation, self._fields()


cdef Allocation new_record(object request_id, int64_t tokens, int64_t limit):
    cdef Allocation record = Allocation.__new__(Allocation)
    record.made = True
    record.request_id = request_id
    record.tokens, record.max_tokens, record.cached_tokens = tokens, limit, 0
    return record


# ---- finding, locking, waiting, answering

cdef class Door:
    """What `CacheCore` is made of first: the pool and its lock, the ids, and whoever watches."""

    def __init__(self, num_blocks, block_size, *, paged, overcommit, num_marks, most_moved=None, copier=None,
                 order=LRU, clock=None, block_bytes=1, scorer=None):
        """`copier` moves the bytes (None: there are none); `num_marks` written prefixes are kept per sequence; one call
        moves at most `most_moved` used tokens (None: as many as it takes). Cached prefixes leave in this `order`
        (None: none are kept), by this `clock` (None: calls are counted); `scorer` is a policy of the user's.
        """
        cdef double budget
        if self.opened:
            raise KVCacheError("a cache is made once: __init__ has been called before")
        budget = <double>overcommit * <double>num_blocks
        self.ids = {}
        self.salts, self.limited = {}, {}
        self.block_bytes = block_bytes
        self.clock, self.scorer = clock, scorer
        self.arena_tokens = <int64_t>num_blocks * <int64_t>block_size
        if pool_init(&self.pool, num_blocks, block_size, paged,
                     INT64_MAX >> 1 if budget >= 4e18 else <int64_t>(budget + 1e-9), num_marks,
                     NULL if order is None else SEED) or (
                         order is not None and policy_init(&self.pool.policy, order, num_blocks)):
            pool_destroy(&self.pool)
            raise MemoryError(f"no memory for the bookkeeping of {num_blocks} blocks")
        self.opened = True
        self.pool.most_moved = -1 if most_moved is None else <int64_t>most_moved
        if copier is not None:
            self.copier = copier
            self.pool.move, self.pool.arena = copier_move, <void *>self.copier

    def __dealloc__(self):
        if self.opened:
            pool_destroy(&self.pool)

    # -- sequences by their ids

    cdef Allocation find(self, object request_id):
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        found = find_in(self.ids, request_id)
        if found is None:
            if self.pool.closed:
                raise CacheClosed()
            raise UnknownSequence(request_id=request_id)
        return <Allocation>found

    cdef bint knows(self, Allocation record) except -1:
        """Whether its id is that of the very sequence that was granted, not of another one."""
        return self.opened and find_in(self.ids, record.request_id) is record

    cdef dict known(self):
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        if self.pool.closed:
            raise CacheClosed()
        return self.ids

    cdef Allocation enter(self, Allocation record):
        """Makes a sequence that has been admitted known by its id."""
        try:
            known = self.ids.setdefault(record.request_id, record)
        except BaseException:
            self.free_handle(record.handle, self.calm_clock())
            raise
        if known is not record:  # another thread, or the id's own __eq__, came first
            self.free_handle(record.handle, self.calm_clock())
            raise SequenceExists(request_id=record.request_id)
        if self.pool.closed:
            self.ids.clear()
            raise CacheClosed()
        return record

    cdef int free_handle(self, handle_t handle, double when) except -1:
        """Ends a sequence at that time of the clock; it raises before anything is given back."""
        cdef status_t status
        if kv_lock_try(&self.pool.lock):
            status = retire(&self.pool, handle, when)
            pool_unlock(&self.pool)
        elif kv_lock_is_mine(&self.pool.lock):
            status = NO_MEMORY if defer_free(&self.pool, handle) else OK
        else:
            with nogil:
                status = pool_free_at(&self.pool, handle, when)
        if status == NO_MEMORY:
            raise MemoryError("no memory to give blocks back under a hold")
        return 0

    cdef int left(self, Allocation record, double when) except -1:
        """Its id is known no more: whoever keeps something of it elsewhere lets go, or raises and has not."""
        return 0

    # -- the lock, and who waits for it

    cdef int before_waiting(self) except -1:
        """This thread must not wait for a lock that it has: a finalizer that runs in the middle of a move."""
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        if kv_lock_is_mine(&self.pool.lock):
            raise CacheHeld(holds=1)
        return 0

    cdef int lock_pool(self) except -1:
        if not (self.opened and kv_lock_try(&self.pool.lock)):
            self.before_waiting()
            with nogil:
                kv_lock(&self.pool.lock)
        return 0

    cdef int live(self, Allocation found) except -1:
        """Locks the pool and returns the sequence's place in it; whoever calls unlocks."""
        self.lock_pool()
        if is_live(&self.pool, found.handle):
            return place_of(found.handle)
        pool_unlock(&self.pool)
        self.answer(STALE, found.request_id)

    cdef bint is_away_now(self, object request_id) except -1:
        """Whether the sequence of this id is suspended, or on its way."""
        return self.away is not None and request_id in self.away

    cdef bint is_here(self, object request_id) except -1:
        """Whether the sequence of this id lives; then a handle of it that does not is of before it left."""
        found = find_in(self.ids, request_id)
        if found is None:
            return False
        self.lock_pool()
        here = is_live(&self.pool, (<Allocation>found).handle)
        pool_unlock(&self.pool)
        return here

    # -- answers, and whoever watches for room

    cdef bint answer(self, status_t status, object request_id) except -1:
        """True and False as they are returned, everything else as the error that it is."""
        if self.untold:
            self.untold = False
            self.tell(self)
        if status == OK:
            return True
        if status == NO_ROOM or status == PAST_LIMIT:
            return False
        if status == STALE:
            if self.pool.closed:
                raise CacheClosed()
            if self.is_away_now(request_id) or (self.away is not None and self.is_here(request_id)):
                raise Suspended(request_id=request_id)
            raise UnknownSequence(request_id=request_id)
        if status == HELD:
            raise CacheHeld(holds=self.pool.num_holders)
        if status == CLOSED:
            raise CacheClosed()
        if status == NO_MEMORY:
            raise MemoryError("no memory for the bookkeeping; nothing has changed")
        if status == MOVE_FAILED:
            raise self.copier.take_error()
        raise KVCacheError(f"unexpected status {status}")

    cdef int tell(self, object about) except -1:
        """Tells whoever watches that there may be room: `about` is a request id, or the cache for anything else."""
        if kv_lock_is_mine(&self.pool.lock):  # a finalizer's: told by the call that it interrupts
            self.untold = True
            return 0
        self.lock_pool()
        watchers = self.watchers  # without a GIL, `_watch` may let go of the tuple at any time
        pool_unlock(&self.pool)
        if watchers is not None:
            for watcher in <tuple>watchers:
                watcher(about)
        return 0

    def _watch(self, watcher):
        """Has `watcher` called, without a lock, with what may have made room: a request id, or the cache."""
        self.replace_watchers((self.watchers or ()) + (watcher,))

    def _unwatch(self, watcher):
        self.replace_watchers(tuple([each for each in self.watchers or () if each != watcher]) or None)

    cdef int replace_watchers(self, tuple watchers) except -1:
        self.lock_pool()
        watchers, self.watchers = self.watchers, watchers  # the old ones go after the unlock: that may run Python
        pool_unlock(&self.pool)
        return 0

    # -- a policy of the user's

    cdef int ask_policy(self) except -1:
        """Has the user's policy weigh what was touched since it was last asked. It runs without a lock, and may call
        the cache; what it raises is logged, and the block keeps its score.
        """
        cdef touch_t *touches = NULL
        cdef int64_t index, count
        cdef double now, score
        if kv_lock_is_mine(&self.pool.lock):
            return 0  # a finalizer's: the call that it interrupts asks
        self.lock_pool()
        count, touches, now = self.pool.policy.num_touches, self.pool.policy.touches, self.pool.policy.now
        self.pool.policy.touches = NULL
        self.pool.policy.num_touches = self.pool.policy.touch_capacity = 0
        pool_unlock(&self.pool)
        try:
            for index in range(count):
                touch = touches[index]
                try:
                    score = self.scorer.score(
                        CachedBlock(EVENTS[touch.event], touch.depth, touch.length, touch.hits, now))
                    if score != score:
                        raise ValueError(f"the policy says that a block is worth {score}: a number is needed")
                except Exception as error:
                    LOG.error("a cache policy failed; the block keeps its score", exc_info=error)
                    continue
                self.lock_pool()
                if (self.pool.index.entries != NULL
                        and self.pool.index.entries[touch.entry].generation == touch.generation):
                    weigh(&self.pool.index.leaves, touch.entry, score)
                pool_unlock(&self.pool)
        finally:
            free(touches)
        return 0

    # -- what is asked for

    cdef int64_t tokens_of(self, object prompt, ids_t *ids) except -1:
        """Tokens of a prompt, whose ids are read; whoever calls drops them, unless this raises."""
        ids.data, ids.own, ids.lent = NULL, NULL, False
        if is_count(prompt):
            ids.count = as_count(prompt, "prompt", 1)
            self.require_fitting("prompt", prompt, ids.count)
            return ids.count
        read_ids(prompt, ids)
        try:
            if ids.count == 0:
                raise ValueError("a prompt needs at least 1 token, this one has none")
            self.require_fitting("prompt", ids.count, ids.count)
        except BaseException:
            drop_ids(ids)
            raise
        return ids.count

    cdef double read_clock(self) except? -1:
        """The clock's time, not a number where calls are counted. Never under the lock: it is the user's."""
        return NAN if self.clock is None else <double>self.clock()

    cdef double calm_clock(self):
        """The clock's time; where it raises, calls are counted: what has begun must come to an end."""
        try:
            return self.read_clock()
        except Exception:
            return NAN

    cdef int32_t salt_of(self, object salt) except -1:
        """The number of a salt. Equal are those of one type and value."""
        cdef int64_t most = 2 * self.pool.space.blocks.num_blocks + 1024
        if salt is None:
            return 0
        key = (type(salt), salt)
        number = find_in(self.limited, key)
        if number is None:
            number = find_in(self.salts, key)
            if number is None:
                self.lock_pool()
                self.last_salt += 1
                number = self.last_salt
                pool_unlock(&self.pool)
                number = self.salts.setdefault(key, number)  # another thread may have come first
            elif 2 * len(self.salts) > most:  # some will soon be dropped: not one that is in use
                self.salts.pop(key, None)
                number = self.salts.setdefault(key, number)
        while len(self.salts) > most:  # more than there are blocks: the longest unused has nothing that is found
            try:
                self.salts.pop(next(iter(self.salts)), None)
            except (RuntimeError, StopIteration):  # without a GIL another thread may come between the two
                continue
        return number

    cdef int ask(self, request_t *request, object salt, object priority, object ttl) except -1:
        """What a request says beside its tokens, and the clock's time."""
        self.ask_kept(request, salt, priority, ttl)
        request.when = self.read_clock()
        return 0

    cdef int ask_kept(self, request_t *request, object salt, object priority, object ttl) except -1:
        request.salt = self.salt_of(salt)
        if type(priority) is not int or priority != 0:
            request.priority = <int32_t>min(as_count(priority, "priority", -MOST_PRIORITY), MOST_PRIORITY)
        if ttl is not None:
            if isinstance(ttl, bool) or not hasattr(ttl, "__float__"):
                raise TypeError(f"ttl must be a number, not {type(ttl).__name__}")
            request.ttl = <double>ttl
            if not request.ttl > 0:
                raise ValueError(f"ttl must be more than 0, not {ttl}")
        return 0

    cdef int64_t limit_for(self, int64_t tokens, object max_tokens, object max_new_tokens) except -1:
        cdef int64_t limit
        if max_tokens is None and max_new_tokens is None:
            return ceil_div(tokens, self.pool.space.block_size) * self.pool.space.block_size
        if max_new_tokens is None:
            limit = as_count(max_tokens, "max_tokens", 0)
            if limit < tokens:
                raise ValueError(f"max_tokens is {max_tokens}, the prompt alone has {tokens} tokens")
        elif max_tokens is None:
            limit = tokens + as_count(max_new_tokens, "max_new_tokens", 0)
            max_tokens = tokens + int(max_new_tokens)
        else:
            raise TypeError(f"max_tokens={max_tokens!r} and max_new_tokens={max_new_tokens!r}: give one of the two")
        self.require_fitting("max_tokens", max_tokens, limit)
        return limit

    cdef int require_fitting(self, str what, object tokens, int64_t count) except -1:
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        if count > self.arena_tokens:
            if self.pool.closed:
                raise CacheClosed()
            asked = int(tokens) if is_count(tokens) else count
            raise RequestTooLarge(what=what, tokens=asked, blocks_needed=-(-asked // self.pool.space.block_size),
                                  num_blocks=self.pool.space.blocks.num_blocks)
        return 0
