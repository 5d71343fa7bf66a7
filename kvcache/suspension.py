"""Suspend and resume: K/V of a sequence go to a store, chunk by chunk, and come back byte for byte.

One thread per cache carries: it packs a chunk into staging memory under the cache's lock, seals it, and has the store
keep it while the next one is packed; on the way back it verifies before a byte reaches the arena. Nothing that it waits
for happens under the lock.
"""

import contextlib
import logging
import mmap
import os
import queue
import threading
import time
import weakref
from collections import deque

from kvcache.chunks import PAGE, ChunkLabel, chunk_tokens_of, envelope_bytes, identity_of, private_key
from kvcache.store import Outcome
from kvcache.store_memory import MemoryStore

LOG = logging.getLogger("kvcache")
JOB_SECONDS = 30.0  # that a store has for one chunk
NUM_STAGED = 4  # chunks that staging has room for, unless it is told otherwise

FULL, FAILED, LOST, FREED = "full", "failed", "lost", "freed"


class Transfer:
    """K/V of one sequence on their way to a store, or back.

    Attributes
    ----------
    request_id : hashable
    tokens : int
        Tokens whose K/V travel. Of `resume` with ``recompute=True``: leading tokens whose K/V are in place.
    ok : bool
        Whether all of them have arrived; False until then. A suspend that ends without leaves the sequence as it was, a
        resume that does leaves it suspended.
    travelled : bool
        False of a sequence that was to be brought back, and was here already.
    reason : str or None
        Why it ended without: ``"full"`` (no room in the store, or in staging, now), ``"failed"`` (the store did not do
        it, or not in time), ``"lost"`` (chunks are no longer there, or not as they were), ``"freed"`` (the sequence has
        been freed, or the cache closed).
    """

    def __init__(self, request_id, tokens):
        self.request_id = request_id
        self.tokens = tokens
        self.ok, self.travelled = False, True
        self.reason = None
        self._over = threading.Event()
        self._callbacks = []  # each is called once, by whoever takes it out

    def __repr__(self):
        state = "under way" if not self.done() else "ok" if self.ok else self.reason
        return f"Transfer({self.request_id!r}, tokens={self.tokens}, {state})"

    def done(self):
        """Whether it has ended, one way or the other."""
        return self._over.is_set()

    def wait(self, timeout=None):
        """As `done`, after at most `timeout` seconds (None: however long it takes)."""
        return self._over.wait(timeout)

    def add_done_callback(self, callback):
        """Have `callback` called with this transfer when it has ended: by the thread that carries, or at once.

        Parameters
        ----------
        callback : callable
            It must not wait for another transfer. What it raises is logged.

        Raises
        ------
        TypeError
            It cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {type(callback).__name__}")
        self._callbacks.append(callback)
        if self.done():
            self._call_back(Exception)

    def _end(self, reason=None):
        self.ok, self.reason = reason is None, reason
        self._over.set()
        self._call_back(BaseException)

    def _call_back(self, logged):
        while True:
            try:
                callback = self._callbacks.pop(0)
            except IndexError:  # none is left, or another thread has it
                return
            try:
                callback(self)
            except logged as error:  # the thread that carries has others to carry
                LOG.error("a callback of %r failed", self, exc_info=error)


def arrival(request_id, tokens):
    """The `Transfer` of a sequence that is here already."""
    transfer = Transfer(request_id, tokens)
    transfer.travelled = False
    transfer._end()
    return transfer


class Staging:
    """Memory that chunks are in while they are packed, kept and fetched: a few slots, each a whole number of pages.

    Parameters
    ----------
    slot_bytes, num_slots : int
    """

    def __init__(self, slot_bytes, num_slots):
        self.memory = memoryview(
            mmap.mmap(-1, slot_bytes * num_slots)
        )  # begins at a page, resident when touched
        self._slot_bytes = slot_bytes
        self._vacant = list(range(num_slots))
        self._lent = []  # (job, slot): the buffers of a job that its carrier has given up, and that is not done

    def take(self):
        """A slot, as a buffer, and its number; None where all are lent."""
        for job, slot in list(self._lent):
            if job.done():
                self._lent.remove((job, slot))
                self._vacant.append(slot)
        if not self._vacant:
            return None
        slot = self._vacant.pop()
        return slot, self.memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes]

    def give_back(self, slot, job=None):
        """The slot is free, once its `job` is done."""
        if job is None or job.done():
            self._vacant.append(slot)
        else:
            self._lent.append((job, slot))


class Pace:
    """So many bytes a second at most, None for as many as it takes."""

    def __init__(self, rate):
        self._rate = rate
        self._next = 0.0

    def wait(self, size, stop=time.sleep):
        """Return when `size` more bytes may be copied."""
        if self._rate is None:
            return
        now = time.monotonic()
        if self._next > now:
            stop(self._next - now)
        self._next = max(self._next, now) + size / self._rate


class Parcel:
    """What is kept of a suspended sequence outside the arena.

    Attributes
    ----------
    store : ChunkStore
    labels : list of ChunkLabel
        One per chunk, in order; they know their keys.
    """

    def __init__(self, store, labels):
        self.store = store
        self.labels = labels

    def delete(self):
        """Have the store forget it; nobody waits for that."""
        keys = [label.key for label in self.labels]
        _asked(lambda: self.store.delete(keys, timeout=JOB_SECONDS))


def _asked(call):
    """What a store answers, None where it raises: a store of somebody else's must not end the thread that carries."""
    try:
        return call()
    except BaseException:  # noqa: BLE001
        return None


class Carrier:
    """Carries K/V between the arena of one cache and stores, one transfer after another, in a thread of its own.

    Parameters
    ----------
    cache : KVCache
        It is not kept alive by this.
    staging_bytes : int or None
    store_rate : float or None
        Bytes a second.
    """

    def __init__(self, cache, staging_bytes, store_rate):
        spec = cache.spec
        self._cache = weakref.ref(cache)
        self._identity = identity_of(spec, cache.fingerprint or b"")
        self._secret = os.urandom(16)
        self._chunk_tokens = chunk_tokens_of(spec)
        self._bytes_per_token = spec.bytes_per_token
        self._slot_bytes = slot_bytes_of(spec)
        self._num_slots = NUM_STAGED if staging_bytes is None else staging_bytes // self._slot_bytes
        self._most_kept = 2 * (spec.arena_bytes + spec.num_blocks * PAGE)  # in host memory, with envelopes
        self.pace = Pace(store_rate)
        self.corrupt_chunks = 0
        self._number = 0  # of the suspension before
        self._lock = threading.Lock()
        self._stores = []  # that know the staging memory
        self._staging = self._own = None
        self._tasks = queue.SimpleQueue()
        self._thread = None
        self._closed = False
        weakref.finalize(self, self._tasks.put, None).atexit = False  # lets the thread go

    def suspend(self, request_id, store, granted=None):
        """A `Transfer` of a live sequence, of this very grant if there is one, to `store` (None: to host memory)."""
        with self._lock:
            store = self._known(store)
        transfer = Transfer(request_id, 0)
        journey = self._cache()._depart(request_id, transfer, granted)
        transfer.tokens = journey.tokens
        with self._lock:
            self._number += 1
            number = self._number
        self._begin((self._send, journey, transfer, store, number))
        return transfer

    def resume(self, request_id, recompute, patient=True):
        """A `Transfer` back, None where it does not fit now; unless `patient`, False where it would wait for a hold."""
        journey = self._cache()._return(request_id, recompute, patient)
        if not journey:
            return journey
        transfer = journey.transfer = Transfer(request_id, journey.tokens)
        if recompute:
            transfer.tokens = journey.in_place
            journey.chunks.delete()
            transfer._end()
        else:
            self._begin((self._fetch, journey, transfer))
        return transfer

    def forget(self, parcel):
        """Have it deleted by the thread that carries: whoever frees may be a finalizer, in the middle of a store."""
        if self._closed:
            parcel.delete()
        else:
            self._tasks.put((parcel.delete,))

    def close(self, timeout=JOB_SECONDS):
        """End what is under way: with the arena gone it ends at the next chunk."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._tasks.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        if self._own is not None:
            self._own.close(timeout)

    def _known(self, store):
        """The store, which has been told of the staging memory."""
        if self._staging is None:
            self._staging = Staging(self._slot_bytes, self._num_slots)
        if store is None:
            if self._own is None:  # what is suspended is never given away: a full one says so
                self._own = MemoryStore(self._most_kept, evict=False)
            return self._own
        if not any(each is store for each in self._stores):
            store.register(self._staging.memory)
            self._stores.append(store)
        return store

    def _begin(self, task):
        with self._lock:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=_carry, args=(self._tasks,), name="kvcache-carrier", daemon=True
                    )
                    self._thread.start()
                self._tasks.put(task)
                return
        task[2]._end(FREED)

    # ---- in the thread

    def _labels(self, journey, number):
        ids = journey.ids
        for first in range(0, journey.tokens, self._chunk_tokens):
            count = min(self._chunk_tokens, journey.tokens - first)
            known = ids[first : first + count]
            key = private_key(self._secret, number, first)
            size = count * self._bytes_per_token
            yield ChunkLabel(self._identity, key, first, count, known if len(known) == count else None, size)

    def _send(self, journey, transfer, store, number):
        parcel = Parcel(store, [])
        reason, away = FAILED, False
        try:
            reason = self._put_all(journey, parcel, number)
        finally:
            cache = self._cache()
            journey.chunks = parcel
            try:
                away = cache is not None and cache._put_away(journey, reason is None)
            finally:
                if not away:
                    parcel.delete()
                    reason = reason or FREED
                transfer._end(reason)

    def _put_all(self, journey, parcel, number):
        """None, or why not all chunks of the sequence are in the store."""
        under_way = deque()  # (job, slot), the oldest first
        reason = None
        for label in self._labels(journey, number):
            reason, slot = self._slot_after(under_way)
            if reason is None:
                reason = self._put(journey, label, parcel, slot, under_way)
            if reason is not None:
                break
        while under_way:
            reason = self._ended(*under_way.popleft(), given_up=reason is not None) or reason
        return reason

    def _slot_after(self, under_way):
        """(None, a slot), if need be the one of the oldest job; or a reason."""
        slot = self._staging.take()
        while slot is None and under_way:
            reason = self._ended(*under_way.popleft())
            if reason is not None:
                return reason, None
            slot = self._staging.take()
        return (FULL, None) if slot is None else (None, slot)

    def _put(self, journey, label, parcel, slot, under_way):
        number, buffer = slot
        chunk = buffer[: label.chunk_bytes]
        self.pace.wait(len(chunk))
        packed, job = _asked(lambda: self._pack(journey, label, chunk)), None
        if packed:
            parcel.labels.append(label)
            job = _asked(lambda: parcel.store.put([label.key], [chunk], timeout=JOB_SECONDS))
        if job is None:
            self._staging.give_back(number)
            return FREED if packed is False else FAILED
        under_way.append((job, number))
        return None

    def _pack(self, journey, label, chunk):
        """Whether the chunk is in staging, sealed; False where its sequence has been freed."""
        cache = self._cache()
        place = label.first_token, label.num_tokens
        if cache is None or not cache._pack_chunk(journey, *place, label.payload_of(chunk)):
            return False
        label.seal(chunk)
        return True

    def _ended(self, job, slot, given_up=False):
        """None, or why the job did not do what it was asked for; its slot is given back."""
        if given_up:
            _asked(job.cancel)
        ended = _asked(lambda: job.wait(JOB_SECONDS))
        if not ended:
            _asked(job.cancel)
        outcome = _asked(lambda: job.outcomes()[0]) if ended else None
        self._staging.give_back(slot, job)
        if outcome == Outcome.OK:
            return None
        return {Outcome.FULL: FULL, Outcome.MISS: LOST}.get(outcome, FAILED)

    def _fetch(self, journey, transfer):
        parcel = journey.chunks
        reason, there = FAILED, False
        try:
            reason = self._get_all(journey, parcel)
        finally:
            cache = self._cache()
            try:
                there = cache is not None and cache._settle(journey, reason is None)
            finally:
                if reason is None or not there:
                    parcel.delete()
                transfer._end(reason if there else FREED)

    def _get_all(self, journey, parcel):
        """None, or why not all chunks are in the arena. One is fetched while the one before is unpacked."""
        under_way = deque()  # (job, slot, chunk, label)
        labels = deque(parcel.labels)
        reason = None
        while reason is None and (labels or under_way):
            while labels and len(under_way) < 2 and reason is None:
                slot = self._staging.take()
                if slot is None:
                    reason = None if under_way else FULL
                    break
                reason = self._get(parcel, labels.popleft(), slot, under_way)
            if reason is None:
                reason = self._unpack(journey, parcel, *under_way.popleft())
        for job, slot, _, _ in under_way:
            self._ended(job, slot, given_up=True)
        return reason

    def _get(self, parcel, label, slot, under_way):
        number, buffer = slot
        chunk = buffer[: label.chunk_bytes]
        self.pace.wait(len(chunk))
        job = _asked(lambda: parcel.store.get([label.key], [chunk], timeout=JOB_SECONDS))
        if job is None:
            self._staging.give_back(number)
            return FAILED
        under_way.append((job, number, chunk, label))
        return None

    def _unpack(self, journey, parcel, job, slot, chunk, label):
        """None, or why the chunk, which its job was asked for, is not in the arena; its slot is given back."""
        ended = _asked(lambda: job.wait(JOB_SECONDS))
        outcome = _asked(lambda: job.outcomes()[0]) if ended else None
        if outcome != Outcome.OK:
            _asked(job.cancel)
            reason = {Outcome.FULL: FULL, Outcome.MISS: LOST}.get(outcome, FAILED)
        else:
            there = _asked(lambda: self._verified(journey, parcel, chunk, label))
            reason = {True: None, False: LOST}.get(there, FAILED)
        self._staging.give_back(slot, job)
        return reason

    def _verified(self, journey, parcel, chunk, label):
        """Whether the chunk is what was put there; then it is in the arena, unless its sequence has been freed."""
        if not label.verify(chunk):
            self.corrupt_chunks += 1
            _asked(lambda: parcel.store.delete([label.key], timeout=JOB_SECONDS))
            return False
        cache = self._cache()
        place = label.first_token, label.num_tokens
        if cache is not None:
            cache._unpack_chunk(journey, *place, label.payload_of(chunk))
        return True


def slot_bytes_of(spec):
    """Bytes of a chunk in staging memory, in whole pages."""
    tokens = chunk_tokens_of(spec)
    return -(-(envelope_bytes(tokens) + tokens * spec.bytes_per_token) // PAGE) * PAGE


def _carry(tasks):
    while True:
        task = tasks.get()
        if task is None:
            return
        work, *arguments = task
        with contextlib.suppress(BaseException):  # the transfer has been told of it
            work(*arguments)
        del task, work, arguments  # a cache is not kept alive while the next one is awaited
