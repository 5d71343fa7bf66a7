"""The door of the native rooms: converts, checks, calls one function without the GIL, translates its status.

Nothing that could run Python happens under the allocator's lock, except in `check` and where an
arena has to, which say so to the lock; and nobody waits for the lock while holding the GIL.
"""

import sys

import cython
import numpy as np

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport INT64_MAX, int32_t, int64_t

from kvcache._blocks cimport draw_blocks, largest_free_run
from kvcache._calls cimport hold_briefly, pool_compact, wait_for_holds
from kvcache._check cimport check_pool
from kvcache._copy cimport copier_move
from kvcache._ids cimport as_count, as_token, as_tokens, is_count
from kvcache._lock cimport (
    kv_lock,
    kv_lock_is_mine,
    kv_lock_runs_python,
    kv_lock_try,
)
from kvcache._space cimport held
from kvcache._runs cimport block_map_text, fragmentation_of
from kvcache._pool cimport (
    ceil_div,
    committed_tokens,
    copy_table,
    held_blocks,
    is_live,
    my_hold,
    overwrites_held,
    NUM_LATENCIES,
    place_of,
    pool_destroy,
    pool_init,
    sight_t,
    slot_of,
    used_blocks,
)
from kvcache._sequences cimport (
    admit,
    append,
    defer_free,
    mark_written,
    pool_unlock,
    retire,
    split,
)
from kvcache._sharing cimport is_shared
from kvcache._sight cimport draw_owners, forget_peaks
from kvcache._writes cimport own_and_span, write_spans

from kvcache.errors import (
    CacheClosed,
    CacheFull,
    CacheHeld,
    KVCacheError,
    RequestTooLarge,
    SequenceExists,
    UnknownSequence,
)

cdef extern from *:
    """
    /* dict.get that never borrows: without a GIL another thread may let go of the value at any time. */
    static inline PyObject *kv_find_in(PyObject *dict, PyObject *key)
    {
    #if PY_VERSION_HEX >= 0x030D0000
        PyObject *value;
        if (PyDict_GetItemRef(dict, key, &value) < 0)
            return NULL;
    #else
        PyObject *value = PyDict_GetItemWithError(dict, key);
        if (!value && PyErr_Occurred())
            return NULL;
        Py_XINCREF(value);
    #endif
        return value ? value : Py_NewRef(Py_None);
    }
    """
    object find_in "kv_find_in" (dict where, object key)
    bint unlikely(bint condition) nogil


# ---- sequences

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


cdef handle_t handle_of(CacheCore cache, object request_id) except 0:
    """For native engines: the handle of a live sequence; `UnknownSequence` if there is none."""
    return cache.find(request_id).handle


cdef class Hold:
    """While it is open, nothing moves and nothing that is held is overwritten. Made by `KVCache.hold`."""

    cdef CacheCore cache
    cdef bint brief

    def __cinit__(self, CacheCore cache, bint brief=False):
        self.cache = cache
        self.brief = brief

    def __enter__(self):
        cdef status_t status
        self.cache.before_waiting()
        with nogil:
            status = hold_briefly(&self.cache.pool) if self.brief else pool_hold(&self.cache.pool)
        self.cache.answer(status, None)
        return self

    def __exit__(self, *exception):
        cdef status_t status
        if kv_lock_is_mine(&self.cache.pool.lock):  # a finalizer leaves it: done before this thread unlocks
            self.cache.pool.deferred_releases += 1
            self.cache.untold = self.cache.watchers is not None
            return
        with nogil:
            status = pool_release(&self.cache.pool)
        if status != OK:
            raise KVCacheError("this thread does not hold the cache: leave a hold in the thread that entered it")
        if self.cache.watchers is not None:
            self.cache.tell(self.cache)


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


cdef class CacheCore:
    """The bookkeeping of a cache: which sequence holds which blocks, and what it may still ask for."""

    def __init__(self, num_blocks, block_size, *, paged, overcommit, num_marks, most_moved=None, copier=None):
        """`copier` moves the bytes (None: there are none); `num_marks` written prefixes are kept per sequence; one call
        moves at most `most_moved` used tokens (None: as many as it takes).
        """
        cdef double budget
        if self.opened:
            raise KVCacheError("a cache is made once: __init__ has been called before")
        budget = <double>overcommit * <double>num_blocks
        self.ids = {}
        self.arena_tokens = <int64_t>num_blocks * <int64_t>block_size
        if pool_init(&self.pool, num_blocks, block_size, paged,
                     INT64_MAX >> 1 if budget >= 4e18 else <int64_t>(budget + 1e-9), num_marks):
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

    # -- finding, waiting, answering

    cdef Allocation find(self, object request_id):
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        found = find_in(self.ids, request_id)
        if found is None:
            if self.pool.closed:
                raise CacheClosed()
            raise UnknownSequence(request_id=request_id)
        return <Allocation>found

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

    cdef Allocation enter(self, Allocation record):
        """Makes a sequence that has been admitted known by its id."""
        try:
            known = self.ids.setdefault(record.request_id, record)
        except BaseException:
            self.free_handle(record.handle)
            raise
        if known is not record:  # another thread, or the id's own __eq__, came first
            self.free_handle(record.handle)
            raise SequenceExists(request_id=record.request_id)
        if self.pool.closed:
            self.ids.clear()
            raise CacheClosed()
        return record

    cdef int free_handle(self, handle_t handle) except -1:
        cdef status_t status
        if kv_lock_try(&self.pool.lock):
            status = retire(&self.pool, handle)
            pool_unlock(&self.pool)
        elif kv_lock_is_mine(&self.pool.lock):
            status = NO_MEMORY if defer_free(&self.pool, handle) else OK
        else:
            with nogil:
                status = pool_free(&self.pool, handle)
        if status == NO_MEMORY:
            raise MemoryError("no memory to give blocks back under a hold")
        return 0

    # -- admission

    def allocate_for(self, request_id, prompt, *, max_tokens=None, max_new_tokens=None):
        """Admits a sequence, or says that it does not fit now.

        Parameters
        ----------
        request_id : hashable
        prompt : int or sequence of int
            Tokens of the prompt, at least 1, or their ids (0 to 2**31 - 1): a list, or a one-dimensional array.
        max_tokens, max_new_tokens : int, optional
            The limit in total, or beyond the prompt. Blocks for the prompt are held from now on, the rest is taken
            as the sequence grows, and promised (see `overcommit`). By default the sequence may fill its last block.

        Returns
        -------
        Allocation or None
            None when it does not fit now; nothing has changed then.

        Raises
        ------
        RequestTooLarge
            It could not fit into the empty arena.
        SequenceExists
            A live sequence has this id.
        TypeError, ValueError
            Counts or ids that are none, a limit below the prompt, both limits.
        CacheHeld
            It would have to wait for this very thread's hold to end.
        """
        cdef int64_t tokens, limit
        cdef status_t status = BUSY
        cdef Allocation record
        tokens = self.tokens_of(prompt)
        limit = self.limit_for(tokens, max_tokens, max_new_tokens)
        if request_id in self.ids:
            raise SequenceExists(request_id=request_id)
        record = new_record(request_id, tokens, limit)
        if kv_lock_try(&self.pool.lock):
            status = CLOSED if self.pool.closed else admit(&self.pool, tokens, limit, False, &record.handle)
            pool_unlock(&self.pool)
        if status == OK:
            return self.enter(record)
        if status == BUSY or status == HELD:
            self.before_waiting()
            with nogil:
                status = pool_allocate(&self.pool, tokens, limit, &record.handle)
        return self.enter(record) if self.answer(status, request_id) else None

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

    def fork(self, request_id, new_id):
        """Admits a second sequence with the tokens, limit and committed prefix of a live one; either may append.

        Returns
        -------
        Allocation or None
            None when it does not fit now. In contiguous placement it needs a run of its own and K/V are copied; in
            paged placement blocks are shared until one of the two appends into the last one.

        Raises
        ------
        UnknownSequence, SequenceExists
        """
        cdef Allocation parent = self.find(request_id), record
        cdef status_t status = BUSY
        cdef handle_t child = 0
        if new_id in self.ids:
            raise SequenceExists(request_id=new_id)
        record = new_record(new_id, 0, 0)
        if kv_lock_try(&self.pool.lock):
            if is_live(&self.pool, parent.handle):
                status = split(&self.pool, parent.handle, False, &child)
            else:
                status = STALE
            pool_unlock(&self.pool)
        if status == BUSY or status == HELD:
            self.before_waiting()
            with nogil:
                status = pool_fork(&self.pool, parent.handle, &child)
        if not self.answer(status, request_id):
            return None
        record.handle = child
        self.lock_pool()
        record.tokens = self.pool.space.hot[place_of(child)].tokens
        record.max_tokens = self.pool.space.seqs[place_of(child)].limit
        record.cached_tokens = committed_tokens(&self.pool, place_of(child))
        pool_unlock(&self.pool)
        return self.enter(record)

    def free_for(self, request_id):
        """Ends a sequence: True if it was live, False if unknown, so that a second free is safe."""
        if not self.opened:
            return False
        found = self.ids.pop(request_id, None)
        if found is None:
            return False
        try:
            self.free_handle((<Allocation>found).handle)
        except MemoryError:  # nothing has been given back
            self.ids.setdefault(request_id, found)
            raise
        if unlikely(self.watchers is not None):
            self.tell(request_id)
        return True

    # -- for whoever grants on behalf of others: admission and growth that never wait for holds

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

    def _measured(self, prompt, max_tokens, max_new_tokens):
        """Tokens and limit of a request, or the error that it is."""
        cdef int64_t tokens = self.tokens_of(prompt)
        return tokens, self.limit_for(tokens, max_tokens, max_new_tokens)

    cdef int64_t tokens_of(self, object prompt) except -1:
        cdef int64_t tokens
        if is_count(prompt):
            tokens = as_count(prompt, "prompt", 1)
        else:
            tokens = len(as_tokens(prompt))
            if tokens == 0:
                raise ValueError("a prompt needs at least 1 token, this one has none")
        self.require_fitting("prompt", prompt, tokens)
        return tokens

    def _allocate_up_to(self, request_id, prompt, max_tokens, max_new_tokens, least, int64_t keep):
        """Admission with the largest limit that can be promised now, at least `least` (None: the whole limit), and with
        `keep` blocks left free. None: does not fit now. False: it would have to wait for a hold of another thread.
        """
        cdef int64_t tokens = self.tokens_of(prompt)
        cdef int64_t limit = self.limit_for(tokens, max_tokens, max_new_tokens)
        cdef int64_t floor = limit if least is None else max(min(<int64_t>least, limit), tokens)
        cdef status_t status
        cdef bint mine = False
        cdef Allocation record
        if request_id in self.ids:
            raise SequenceExists(request_id=request_id)
        record = new_record(request_id, tokens, limit)
        self.lock_pool()
        with nogil:
            status = admit_up_to(&self.pool, tokens, floor, &limit, keep, &record.handle)
            mine = status == HELD and my_hold(&self.pool) != NULL
            pool_unlock(&self.pool)
        if status == HELD and not mine:
            return False
        record.max_tokens = limit
        return self.enter(record) if self.answer(status, request_id) else None

    def _append_now(self, request_id, int64_t count):
        """Growth that does not wait: True or False, None where it would have to wait for a hold of another thread."""
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef status_t status = STALE
        cdef bint mine = False
        self.lock_pool()
        with nogil:
            self.pool.pause = 0
            if is_live(&self.pool, handle):
                status = append(&self.pool, place_of(handle), count, True)
            mine = status == HELD and my_hold(&self.pool) != NULL
            pool_unlock(&self.pool)
        if status == HELD and not mine:
            return None
        return self.answer(status, request_id)

    def _room(self):
        """Blocks that are free, or will be when the holds have ended, and blocks that may still be promised."""
        self.known()
        self.lock_pool()
        cdef int64_t there = self.pool.space.blocks.free_blocks + self.pool.limbo_blocks
        cdef int64_t unclaimed = self.pool.budget - held_blocks(&self.pool) - self.pool.claims
        pool_unlock(&self.pool)
        return there, unclaimed

    def _holds_open(self):
        """Holds that are open now, if one of them is this thread's; else 0."""
        self.lock_pool()
        cdef int64_t count = self.pool.num_holders if my_hold(&self.pool) != NULL else 0
        pool_unlock(&self.pool)
        return count

    def _is_live(self, Allocation record not None):
        """Whether the very sequence that was granted lives, not another one of its name."""
        self.lock_pool()
        cdef bint live = is_live(&self.pool, record.handle)
        pool_unlock(&self.pool)
        return live

    def _end(self, Allocation record not None):
        """`free_for` of the very sequence that was granted."""
        if not self.opened or find_in(self.ids, record.request_id) is not record:
            return False
        return self.free_for(record.request_id)

    # -- growth

    def append_token(self, request_id, token=None):
        """Room for one more token: True, or False when the sequence may not grow (its limit) or cannot now.

        `token` is its id, 0 to 2**31 - 1.
        """
        cdef Allocation found = self.find(request_id)
        cdef status_t status = BUSY
        if token is not None:
            as_token(token, 0)
        if kv_lock_try(&self.pool.lock):
            if is_live(&self.pool, found.handle):
                status = append(&self.pool, place_of(found.handle), 1, False)
            else:
                status = STALE
            pool_unlock(&self.pool)
        if status == OK:
            return True
        if status == BUSY or status == HELD:
            return self.append_patiently(found, 1)
        return self.answer(status, request_id)

    cdef bint append_patiently(self, Allocation found, int64_t count) except -1:
        cdef status_t status
        cdef handle_t handle = found.handle
        self.before_waiting()
        with nogil:
            status = pool_append(&self.pool, handle, count)
        return self.answer(status, found.request_id)

    def append_tokens(self, request_id, tokens):
        """Room for several tokens, all or none: `tokens` is a count or token ids. No tokens at all: True."""
        cdef Allocation found = self.find(request_id)
        cdef int64_t count
        if is_count(tokens):
            count = as_count(tokens, "tokens", 0)
        else:
            count = len(as_tokens(tokens))
        return self.append_patiently(found, count)

    def truncate(self, request_id, num_tokens):
        """Keeps the first `num_tokens` tokens (0 allowed), gives back the blocks beyond.

        Returns
        -------
        bool
            False, nothing changed, when others hold a block that would be let go or cut, and the new claim does not
            fit.

        Raises
        ------
        ValueError
            `num_tokens` is negative or more than there are.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t tokens = as_count(num_tokens, "num_tokens", 0)
        cdef status_t status
        self.before_waiting()
        with nogil:
            status = pool_truncate(&self.pool, handle, tokens)
        if status == GONE:
            raise ValueError(f"cannot keep {num_tokens} tokens, the sequence has {self.used_tokens(request_id)}")
        if self.watchers is not None and status == OK:
            self.tell(request_id)
        return self.answer(status, request_id)

    def set_limit(self, request_id, max_tokens):
        """Changes a sequence's limit, up or down: False when what it may then claim does not fit.

        Raises
        ------
        ValueError
            Below the used tokens.
        RequestTooLarge
            More than the arena.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t limit = as_count(max_tokens, "max_tokens", 0)
        cdef status_t status
        self.require_fitting("max_tokens", max_tokens, limit)
        self.before_waiting()
        with nogil:
            status = pool_set_limit(&self.pool, handle, limit)
        if status == BELOW_USED:
            raise ValueError(f"max_tokens is {max_tokens}, the sequence has {self.used_tokens(request_id)} tokens")
        if self.watchers is not None and status == OK:
            self.tell(request_id)
        return self.answer(status, request_id)

    def commit(self, request_id, num_tokens=None):
        """Says that K/V of the first `num_tokens` tokens (by default all) are in place, however they came there.

        Raises
        ------
        ValueError
            Beyond the used tokens.
        """
        cdef Allocation found = self.find(request_id)
        cdef handle_t handle = found.handle
        cdef int64_t tokens = -1 if num_tokens is None else as_count(num_tokens, "num_tokens", 0)  # -1: all
        cdef status_t status
        self.before_waiting()
        with nogil:
            status = pool_commit(&self.pool, handle, tokens)
        if status == BELOW_USED:
            raise ValueError(f"cannot commit {num_tokens} tokens, the sequence has {self.used_tokens(request_id)}")
        self.answer(status, request_id)

    # -- what a sequence has

    cdef int live(self, Allocation found) except -1:
        """Locks the pool and returns the sequence's place in it; whoever calls unlocks."""
        self.lock_pool()
        if is_live(&self.pool, found.handle):
            return place_of(found.handle)
        pool_unlock(&self.pool)
        self.answer(STALE, found.request_id)

    def used_tokens(self, request_id):
        """Tokens of the sequence."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t tokens = self.pool.space.hot[who].tokens
        pool_unlock(&self.pool)
        return tokens

    def token_offset_in_block(self, request_id):
        """Where in its block the next token goes: ``used_tokens % block_size``."""
        return self.used_tokens(request_id) % self.pool.space.block_size

    def limit(self, request_id):
        """Tokens that the sequence may have in total."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t limit = self.pool.space.seqs[who].limit
        pool_unlock(&self.pool)
        return limit

    def capacity(self, request_id):
        """Tokens that the blocks held now have room for."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t blocks = held(&self.pool.space.seqs[who])
        pool_unlock(&self.pool)
        return blocks * self.pool.space.block_size

    def is_contiguous(self, request_id):
        """Whether the sequence's blocks are one run, so that its views copy nothing. An empty sequence is."""
        cdef int who = self.live(self.find(request_id))
        cdef bint scattered = self.pool.space.seqs[who].breaks > 0
        pool_unlock(&self.pool)
        return not scattered

    def block_table(self, request_id):
        """Block ids in token order, a new int32 array."""
        return self._table(request_id)[0]

    def _table(self, request_id):
        """Block table and used tokens, from one state."""
        cdef Allocation found = self.find(request_id)
        cdef int64_t room = self.capacity(request_id) // self.pool.space.block_size
        cdef int32_t[::1] out
        cdef int64_t blocks, tokens
        cdef int who
        while True:
            table = np.empty(room, np.int32)
            out = table
            who = self.live(found)
            blocks = held(&self.pool.space.seqs[who])
            tokens = self.pool.space.hot[who].tokens
            if room:
                copy_table(&self.pool, who, min(blocks, room), &out[0])
            pool_unlock(&self.pool)
            if blocks <= room:
                return table[:blocks], tokens
            room = blocks  # it grew meanwhile

    def _locate(self, request_id):
        """Where views look: (first slot, or -1 for a scattered sequence; used tokens; whether any block is shared)."""
        cdef int who = self.live(self.find(request_id))
        cdef int64_t slot = 0, tokens = self.pool.space.hot[who].tokens
        cdef bint shared = is_shared(&self.pool, who)
        if self.pool.space.seqs[who].breaks:
            slot = -1
        elif tokens:
            slot = slot_of(&self.pool, who, 0)
        pool_unlock(&self.pool)
        return slot, tokens, shared

    def _in_place(self, request_id, layer, tuple planes):
        """What `planes[layer]` has of a sequence that is one run with no shared block; None in every other case."""
        cdef int64_t slot, tokens
        cdef int who
        if type(layer) is not int or not 0 <= layer < len(planes):
            return None
        who = self.live(self.find(request_id))
        tokens = self.pool.space.hot[who].tokens
        slot = slot_of(&self.pool, who, 0) if tokens else 0
        if self.pool.space.seqs[who].breaks or is_shared(&self.pool, who):
            slot = -1
        pool_unlock(&self.pool)
        return planes[layer][:, slot : slot + tokens] if slot >= 0 else None

    def _write_rows(self, request_id, Sources sources not None, int64_t layer, start):
        """Writes all rows of `sources` to consecutive positions of a sequence, by default its last ones."""
        cdef Allocation found = self.find(request_id)
        cdef int64_t first = -1 if start is None else as_count(start, "start", 0)
        cdef int64_t tokens = 0
        cdef handle_t handle = found.handle
        cdef status_t status
        cdef Copier copier = self.copier
        self.before_waiting()
        with nogil:
            kv_lock(&self.pool.lock)
            while True:
                status = STALE
                if is_live(&self.pool, handle):
                    tokens = self.pool.space.hot[place_of(handle)].tokens
                    status = self.write_locked(place_of(handle), copier, sources, layer, first)
                if status != HELD or wait_for_holds(&self.pool) != OK:
                    break
            pool_unlock(&self.pool)
        if status == GONE:
            begin = tokens - sources.rows if start is None else start
            raise ValueError(f"{sources.rows} rows from position {begin} on, the sequence has {tokens} tokens")
        if not self.answer(status, request_id):
            raise CacheFull(blocks_needed=self.pool.wanted, blocks_available=self.pool.unclaimed)

    cdef status_t write_locked(self, int32_t who, Copier copier, Sources sources, int64_t layer,
                               int64_t start) noexcept nogil:
        cdef int64_t tokens = self.pool.space.hot[who].tokens
        cdef int64_t rows = sources.rows
        cdef status_t status
        if start < 0:
            start = tokens - rows
        if start < 0 or rows > tokens - start:
            return GONE
        if rows == 0:
            return OK
        if overwrites_held(&self.pool, who, layer, start, rows):
            return HELD
        self.pool.spans.count = 0
        status = own_and_span(&self.pool, &self.pool.spans, who, start, rows, 0)
        if status == OK:
            status = write_spans(&self.pool, &self.pool.spans, copier, sources, layer)
        if status == OK:
            mark_written(&self.pool, who, layer, start, rows)
        return status

    # -- the cache as a whole

    def __contains__(self, request_id):
        return request_id in self.known()

    def __len__(self):
        return len(self.known())

    def __iter__(self):
        return iter(list(self.known()))

    def __bool__(self):
        return True

    def _require_open(self):
        """Raises `CacheClosed` after `close`."""
        self.known()

    cdef dict known(self):
        if not self.opened:
            raise KVCacheError("KVCache.__init__ has not been called")
        if self.pool.closed:
            raise CacheClosed()
        return self.ids

    @property
    def num_allocated_sequences(self):
        """Live sequences."""
        return len(self.known())

    def compact(self, budget_tokens=None):
        """Moves runs together, before a large prompt or when there is nothing else to do.

        Parameters
        ----------
        budget_tokens : int, optional
            Used tokens that may be moved: scattered sequences become one run first, then gaps come together where that
            makes the longest free run longest. By default everything is packed: one free run, at the end.

        Returns
        -------
        int
            Used tokens moved. 0 in paged placement, where nothing moves.

        Raises
        ------
        CacheHeld
            It would have to wait for this very thread's hold to end.
        """
        cdef int64_t most = -1 if budget_tokens is None else as_count(budget_tokens, "budget_tokens", 0)
        cdef int64_t moved = 0
        cdef status_t status
        self.known()
        self.before_waiting()
        with nogil:
            status = pool_compact(&self.pool, most, &moved)
        self.answer(status, None)
        return moved

    def hold(self):
        """A context manager: inside, nothing moves and nothing that is held is overwritten.

        Holds are shared and nest; enter and leave in one thread. What is freed inside is reused only after the last
        hold ends. A call that has to move or reuse such blocks waits for that, or raises `CacheHeld` in a thread
        that holds.
        """
        self.known()
        return Hold(self)

    def _hold_briefly(self):
        """A hold for as long as bytes are copied: it waits for nobody who waits for another hold."""
        return Hold(self, True)

    def close(self):
        """Ends every sequence and lets the arena go. `free_for` then returns False, a second `close` does nothing, and
        everything else raises `CacheClosed`. Waits for holds of other threads.
        """
        cdef status_t status
        if not self.opened:
            return
        self.before_waiting()
        with nogil:
            status = pool_close(&self.pool)
        self.answer(status, None)
        self.ids.clear()  # emptied, not replaced: without a GIL others may be reading it
        if self.watchers is not None:
            self.tell(self)

    @property
    def closed(self):
        """Whether `close` has been called."""
        return self.pool.closed

    def _figures(self, int64_t block_bytes, int64_t token_bytes, int64_t arena_copies, tuple memory not None):
        """The values of a `CacheStats`, those of the pool taken under the lock."""
        self.known()
        self.lock_pool()
        cdef sight_t sight = self.pool.sight
        cdef int64_t live = self.pool.space.live, used = used_blocks(&self.pool)
        cdef int64_t there = self.pool.space.blocks.free_blocks
        cdef int64_t longest = largest_free_run(&self.pool.space.blocks)
        cdef int64_t claims = self.pool.claims, limbo = self.pool.limbo_blocks
        cdef int64_t moves = self.pool.moves, moved = self.pool.moved_tokens, copied = self.pool.copied_tokens
        cdef int64_t spills = self.pool.spills, heals = self.pool.heals, pause = self.pool.longest_pause
        pool_unlock(&self.pool)
        cdef int64_t bucket
        sight.latencies[0] += sight.admissions - sight.num_timed
        return (
            live, used + there, used, there, 0, claims, longest, fragmentation_of(longest, there),
            used * block_bytes, there * block_bytes, (used + there) * block_bytes,
            max(sight.past.used, sight.peak.used),
            moves, moved, moved * token_bytes, copied, spills, heals, pause, arena_copies,
            limbo, max(sight.past.live, sight.peak.live), max(sight.past.claims, sight.peak.claims),
            sight.peak.used, sight.peak.live, sight.peak.claims, sight.admissions, sight.frees,
            sight.refused.arena_full, sight.refused.promises, sight.refused.growth, sight.refused.past_limit,
            tuple([sight.latencies[bucket] for bucket in range(NUM_LATENCIES)]), <double>sight.nanoseconds * 1e-9,
            memory[0], memory[1], memory[2],
        )

    def reset_peaks(self):
        """Begins the recent peaks of `stats()` anew, at what there is now; those since the start stay."""
        self.known()
        self.lock_pool()
        forget_peaks(&self.pool)
        pool_unlock(&self.pool)

    def _owners(self):
        """Who holds each block, as an int32 array in the terms of `kvcache.block_map`."""
        self.known()
        owners = np.empty(self.pool.space.blocks.num_blocks, np.int32)
        cdef int32_t[::1] cells = owners
        self.lock_pool()
        draw_owners(&self.pool, &cells[0])
        pool_unlock(&self.pool)
        return owners

    @property
    def free_blocks(self):
        """Blocks that nobody holds."""
        self.known()
        return self.pool.space.blocks.free_blocks

    @property
    def fragmentation(self):
        """``1 - largest_free_run / free_blocks``; 0.0 when nothing is free."""
        self.known()
        self.lock_pool()
        cdef int64_t there = self.pool.space.blocks.free_blocks
        cdef int64_t longest = largest_free_run(&self.pool.space.blocks)
        pool_unlock(&self.pool)
        return fragmentation_of(longest, there)

    @property
    def is_full(self):
        """Whether no block is free."""
        return self.free_blocks == 0

    def dump_block_map(self, file=None, width=64):
        """Writes the numbers and a map of the blocks, `width` to a row, to `file` (standard output by default)."""
        cdef int64_t columns = as_count(width, "width", 1)
        self.known()
        cdef bytearray cells = bytearray(self.pool.space.blocks.num_blocks)
        self.lock_pool()
        cdef int64_t there = self.pool.space.blocks.free_blocks
        cdef int64_t longest = largest_free_run(&self.pool.space.blocks)
        draw_blocks(&self.pool.space.blocks, PyByteArray_AS_STRING(cells))
        pool_unlock(&self.pool)
        print(block_map_text(cells, columns, there, longest), file=sys.stdout if file is None else file)

    def check(self):
        """Walks every structure.

        Raises
        ------
        KVCacheError
            Naming the first thing that is wrong.
        """
        self.known()
        self.lock_pool()
        kv_lock_runs_python(&self.pool.lock, True)
        try:
            wrong = check_pool(&self.pool)
            records = list(self.ids.values())
            dead = [record for record in records if not is_live(&self.pool, (<Allocation>record).handle)]
        finally:
            kv_lock_runs_python(&self.pool.lock, False)
            pool_unlock(&self.pool)
        self.answer(OK, None)
        if wrong is None and dead:
            wrong = f"{dead[0].request_id!r} is known, its sequence does not live"
        if wrong is not None:
            raise KVCacheError(wrong)
