"""A store in host memory: fixed slots, or as much as each string has; the least recently used is given away first."""

import threading

import numpy as np

from kvcache.spec import whole_number
from kvcache.store import Outcome, SettledJob, checked_buffers, checked_keys


class MemoryStore:
    """A `kvcache.store.ChunkStore` in this process's memory.

    Memory is taken as it is needed, and never more than `max_bytes`. A call copies (without the GIL) and returns a job
    that is over.

    Parameters
    ----------
    max_bytes : int
    slot_bytes : int, optional
        There are ``max_bytes // slot_bytes`` slots, each for one key, kept for what comes next; a longer string than a
        slot is `FULL`. Without it each string takes what it has, and its memory is given back when it goes: for strings
        of many lengths.
    evict : bool
        Whether a full store gives away its least recently used key. If not, `put` says `FULL`: what has been put
        stays until it is deleted.
    """

    def __init__(self, max_bytes, slot_bytes=None, *, evict=True):
        self.max_bytes = whole_number(max_bytes, "max_bytes")
        self.slot_bytes = None if slot_bytes is None else whole_number(slot_bytes, "slot_bytes")
        self.num_slots = None if slot_bytes is None else self.max_bytes // self.slot_bytes
        if self.num_slots == 0:
            raise ValueError(f"max_bytes is {max_bytes}, one slot alone has {slot_bytes}")
        self._evicts = bool(evict)
        self._lock = threading.Lock()
        self._slots = {}  # key -> (slot, bytes in it), the least recently used first
        self._vacant = []  # slots that hold nothing, for whoever is next
        self._bytes_made = 0  # of the slots that there are, those in the hands of a put included
        self._closed = False

    def __len__(self):
        return len(self._slots)

    def register(self, memory):
        """Nothing to prepare: any buffer can be copied."""

    def put(self, keys, buffers, *, timeout):
        """Keep copies of the buffers."""
        keys = checked_keys(keys)
        buffers = checked_buffers(keys, buffers, writable=False)
        return SettledJob([self._put(key, buffer) for key, buffer in zip(keys, buffers, strict=True)])

    def get(self, keys, buffers, *, timeout):
        """Copy into the buffers."""
        keys = checked_keys(keys)
        buffers = checked_buffers(keys, buffers, writable=True)
        return SettledJob([self._get(key, buffer) for key, buffer in zip(keys, buffers, strict=True)])

    def contains(self, keys, *, timeout):
        """Whether the keys are there; asking is no use of them."""
        keys = checked_keys(keys)
        with self._lock:
            return SettledJob([self._known(key in self._slots) for key in keys])

    def delete(self, keys, *, timeout):
        """Forget the keys; `MISS` for one that is not there."""
        keys = checked_keys(keys)
        with self._lock:
            return SettledJob([self._known(self._forget(key)) for key in keys])

    def close(self, timeout):
        """Let the memory go."""
        with self._lock:
            self._closed = True
            self._slots, self._vacant, self._bytes_made = {}, [], 0

    def _known(self, known):
        if self._closed:
            return Outcome.FAILED
        return Outcome.OK if known else Outcome.MISS

    def _forget(self, key):
        slot = self._slots.pop(key, None)
        if slot is None:
            return False
        if self.slot_bytes is None:
            self._bytes_made -= slot[1]
        else:
            self._vacant.append(slot[0])
        return True

    def _put(self, key, buffer):
        size = buffer.nbytes if self.slot_bytes is None else self.slot_bytes
        if not buffer.nbytes <= size <= self.max_bytes:
            return Outcome.FULL
        with self._lock:
            if self._closed:
                return Outcome.FAILED
            slot = self._take_slot(size)
        if slot is None:
            return Outcome.FULL
        np.copyto(slot[: buffer.nbytes], np.frombuffer(buffer, np.uint8))  # nobody else knows the slot yet
        with self._lock:
            if self._closed:
                return Outcome.FAILED
            self._forget(key)
            self._slots[key] = slot, buffer.nbytes
        return Outcome.OK

    def _take_slot(self, size):
        while not self._vacant and self._bytes_made + size > self.max_bytes:
            if not (self._evicts and self._slots):
                return None
            self._forget(next(iter(self._slots)))
        if self._vacant:
            return self._vacant.pop()
        try:
            slot = np.empty(size, np.uint8)
        except MemoryError:
            return None
        self._bytes_made += size
        return slot

    def _get(self, key, buffer):
        with self._lock:  # also over the copy: the slot may be given away otherwise
            if self._closed:
                return Outcome.FAILED
            found = self._slots.get(key)
            if found is None or found[1] != buffer.nbytes:
                return Outcome.MISS
            self._slots[key] = self._slots.pop(key)
            np.copyto(np.frombuffer(buffer, np.uint8), found[0][: found[1]])
        return Outcome.OK
