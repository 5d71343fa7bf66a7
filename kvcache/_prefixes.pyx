"""Prefixes: what is found again, named, pinned, cleared, and told."""

from typing import NamedTuple

import cython
import numpy as np

from libc.stdint cimport int32_t, int64_t
from libc.string cimport memcpy

from kvcache._admit cimport most_hits
from kvcache._calls cimport (
    counted,
    pool_clear,
    pool_limit_salt,
    pool_pin,
    pool_probe,
    pool_set_ids,
    pool_unpin,
)
from kvcache._door cimport Allocation, find_in
from kvcache._ids cimport as_count, drop_ids, ids_t, read_ids
from kvcache._index cimport match_ids
from kvcache._journal cimport journal_new, journal_t, record_t
from kvcache._lock cimport kv_lock_try
from kvcache._pins cimport pin_t
from kvcache._pool cimport BAD_COUNT, BELOW_USED, GONE, NO_ROOM, STALE, handle_t, keeps, request_t, status_t
from kvcache._sequences cimport pool_unlock

cdef enum:
    MOST_EVENTS = 1 << 16      # records, fewer where blocks are large: at most
    EVENT_BYTES = 1 << 24      # of token ids


class CacheEvent(NamedTuple):
    """One thing that happened to the prefixes of a cache.

    Attributes
    ----------
    kind : str
        ``"stored"``, ``"evicted"`` (nothing has the content any more) or ``"cleared"`` (nothing is left).
    block : int
        A number for this content after this prefix, never given twice; -1 of ``"cleared"``.
    parent : int
        That of the block before it; -1 for the first one of a prompt.
    tokens : tuple of int
        The ids of the block.
    salt : hashable
    dropped : int
        Records that were dropped before this one, since nobody had asked for them in time.
    """

    kind: str
    block: int
    parent: int
    tokens: tuple
    salt: object
    dropped: int


KINDS = ("stored", "evicted", "cleared")


cdef class Prefixes(Looks):
    """What `CacheCore` is made of third: prefixes by their tokens."""

    def __cinit__(self):
        self.pins = {}

    # -- looking, naming

    def probe(self, prompt, salt=None):
        """How many tokens of a prompt `allocate_for` would find in place now: a dry run that touches nothing.

        Parameters
        ----------
        prompt : sequence of int
            Token ids; of a count nothing is found.
        salt : hashable, optional

        Returns
        -------
        int
            Whole blocks, in tokens.
        """
        cdef ids_t ids
        cdef request_t request = counted(self.tokens_of(prompt, &ids), 0)
        cdef int64_t cached
        request.ids = ids.data
        try:
            request.salt = self.salt_of(salt)
            self.known()
            if kv_lock_try(&self.pool.lock):
                cached = match_ids(&self.pool.index, request.salt, ids.data, most_hits(&self.pool, &request), NULL)
                pool_unlock(&self.pool)
                return cached * self.pool.space.block_size
            self.before_waiting()
            with nogil:
                cached = pool_probe(&self.pool, &request)
            return cached
        finally:
            drop_ids(&ids)

    def set_tokens(self, request_id, tokens, start=None):
        """Names tokens that were appended before their ids were known, so that they can be found again.

        Parameters
        ----------
        request_id : hashable
        tokens : sequence of int
            Their ids.
        start : int, optional
            Position of the first; by default that of the first token that has no name yet.

        Raises
        ------
        UnknownSequence
        ValueError
            Positions that the sequence does not have, or beyond a token without a name, or that have another name.
        """
        cdef Allocation found = self.find(request_id)
        cdef int64_t first = -1 if start is None else as_count(start, "start", 0)
        cdef int64_t there[2]
        cdef handle_t handle = found.handle
        cdef status_t status
        cdef ids_t ids
        read_ids(tokens, &ids)
        try:
            self.before_waiting()
            with nogil:
                status = pool_set_ids(&self.pool, handle, first, ids.data, ids.count, there)
            if status == GONE:
                raise ValueError(f"{ids.count} ids from position {there[0]} on, the sequence has {there[1]} tokens")
            if status == BELOW_USED:
                raise ValueError(f"ids from position {there[0]} on, position {there[1]} has no name yet")
            if status == BAD_COUNT:
                raise ValueError(f"of the tokens from position {there[0]} on some have another id already")
        finally:
            drop_ids(&ids)
        self.answer(status, request_id)

    # -- keeping

    def pin(self, request_id=None, *, tokens=None, salt=None):
        """Keeps a prefix from now on, whoever ends: a system prompt. A pin is one more holder of its blocks.

        Parameters
        ----------
        request_id : hashable, optional
            A live sequence: what is committed of it, and whose ids are known.
        tokens : sequence of int, optional
            Or ids: as far as they are there.
        salt : hashable, optional
            Of `tokens`.

        Returns
        -------
        int
            How many tokens are pinned, whole blocks. 0, nothing has changed, where nothing is there, or where the
            blocks held, pinned and promised would be more than there may be.

        Raises
        ------
        UnknownSequence
        RequestTooLarge
            More tokens than the arena has.
        TypeError
            Neither a sequence nor tokens, or both.

        Notes
        -----
        In contiguous placement a live sequence whose blocks are pinned is not cut below what is pinned (`truncate`
        returns False), nor is that written again (`CacheFull`).
        """
        cdef int64_t blocks = 0
        cdef int32_t number = 0
        cdef pin_t pin = 0
        cdef handle_t handle = 0
        cdef status_t status
        cdef ids_t ids
        cdef Allocation found
        ids.data, ids.own, ids.lent, ids.count = NULL, NULL, False, 0
        key = self.pin_key(request_id, tokens, salt)
        if tokens is None:
            found = self.find(request_id)
            handle = found.handle
        else:
            number = self.salt_of(salt)
            read_ids(tokens, &ids)
        try:
            self.require_fitting("tokens to pin", ids.count, ids.count)
            self.before_waiting()
            with nogil:
                status = pool_pin(&self.pool, handle, number, ids.data, ids.count, &blocks, &pin)
        finally:
            drop_ids(&ids)
        if status == NO_ROOM:
            self.known()
            return 0
        self.answer(status, request_id)
        with cython.critical_section(self):
            self.pins.setdefault(key, []).append((pin, blocks))
        return blocks * self.pool.space.block_size

    def unpin(self, request_id=None, *, tokens=None, salt=None):
        """Undoes the last `pin` of the same arguments, also when the sequence has ended since.

        Returns
        -------
        int
            How many tokens that pin had; 0 if there is none.
        """
        cdef pin_t pin
        cdef status_t status = STALE
        key = self.pin_key(request_id, tokens, salt)
        self.known()
        self.before_waiting()
        while status == STALE:  # the cache has been cleared after that pin, and before it was noted here
            last = self.last_pin(key)
            if last is None:
                return 0
            pin, blocks = last
            with nogil:
                status = pool_unpin(&self.pool, pin)
        self.answer(status, None)
        if self.watchers is not None:
            self.tell(self)
        return blocks * self.pool.space.block_size

    cdef object last_pin(self, object key):
        """The pin noted last under a key, taken from there; None where there is none."""
        with cython.critical_section(self):  # what an empty list is taken for, nobody may append to meanwhile
            pins = find_in(self.pins, key)
            if not pins:
                return None
            last = (<list>pins).pop()
            if not pins:
                self.pins.pop(key, None)
        return last

    cdef object pin_key(self, object request_id, object tokens, object salt):
        cdef ids_t ids
        if (tokens is None) == (request_id is None):
            raise TypeError("pin or unpin a request_id, or tokens: one of the two")
        if tokens is None:
            if salt is not None:
                raise TypeError("a salt goes with tokens: a sequence has its own")
            return "sequence", request_id
        read_ids(tokens, &ids)
        try:
            return "tokens", type(salt), salt, (<const char *>ids.data)[: ids.count * sizeof(int32_t)]
        finally:
            drop_ids(&ids)

    def clear_prefix_cache(self):
        """Forgets every prefix and every pin. Live sequences read on; what they have is not found any more."""
        cdef status_t status
        self.known()
        self.before_waiting()
        with cython.critical_section(self):
            self.pins.clear()
        with nogil:
            status = pool_clear(&self.pool)
        self.answer(status, None)
        if self.watchers is not None:
            self.tell(self)

    def set_quota(self, salt, max_bytes):
        """Limits what may stay cached under a salt. Live sequences and pins are not counted.

        Parameters
        ----------
        salt : hashable
            Not None.
        max_bytes : int or None
            Whole blocks of all layers are counted; None lifts the limit.
        """
        cdef int64_t blocks = -1
        cdef int32_t number
        cdef status_t status
        if salt is None:
            raise ValueError("a quota is of a salt: what has none is limited by the arena alone")
        self.known()
        if max_bytes is not None:
            blocks = as_count(max_bytes, "max_bytes", 0) // self.block_bytes
        number = self.salt_of(salt)
        self.limited[(type(salt), salt)] = number
        self.before_waiting()
        with nogil:
            status = pool_limit_salt(&self.pool, number, blocks)
        self.answer(status, None)

    # -- telling

    def events(self):
        """What has happened to prefixes since this was last called: an iterator of `CacheEvent`, oldest first.

        The first call begins to record, and gives nothing. What is not asked for in time is dropped, the oldest first,
        and counted.
        """
        self.known()
        self.lock_pool()
        cdef journal_t *journal = self.pool.index.journal
        cdef int64_t width = self.pool.space.block_size
        if journal == NULL:
            if keeps(&self.pool):
                self.pool.index.journal = journal_new(max(min(<int64_t>MOST_EVENTS, EVENT_BYTES // (4 * width)), 64),
                                                      width)
            failed = keeps(&self.pool) and self.pool.index.journal == NULL
            pool_unlock(&self.pool)
            if failed:
                raise MemoryError("no memory for a record of events")
            return iter(())
        cdef int64_t count = journal.next - journal.first
        pool_unlock(&self.pool)
        cdef bytearray records = bytearray(count * sizeof(record_t)), ids = bytearray(4 * count * width)
        return iter(self.drain(records, ids, count))

    cdef list drain(self, bytearray records, bytearray ids, int64_t count):
        """Takes the oldest `count` records, if there still are so many, out of the ring."""
        cdef int64_t width = self.pool.space.block_size, index, at, dropped
        cdef char *into = records
        cdef char *tokens = ids
        cdef const record_t *record
        cdef journal_t *journal
        self.lock_pool()
        journal = self.pool.index.journal
        count = min(count, journal.next - journal.first)
        for index in range(count):
            at = (journal.first + index) % journal.capacity
            memcpy(into + index * sizeof(record_t), &journal.records[at], sizeof(record_t))
            memcpy(tokens + index * 4 * width, &journal.ids[at * width], 4 * width)
        journal.first += count
        dropped, journal.dropped = journal.dropped, 0
        pool_unlock(&self.pool)
        names = {number: key[1] for key, number in list(self.salts.items()) + list(self.limited.items())}
        named = np.frombuffer(ids, np.int32).reshape(-1, width)[:count].tolist()
        told = []
        for index in range(count):
            record = <const record_t *>(into + index * sizeof(record_t))
            kind = KINDS[record.kind]
            told.append(CacheEvent(kind, record.serial, record.parent, () if record.serial < 0 else tuple(named[index]),
                                   names.get(record.salt), 0 if index else dropped))
        return told
