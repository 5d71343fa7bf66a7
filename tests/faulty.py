"""A store in memory that fails when it is told to."""

import threading

from kvcache.store import Outcome, SettledJob
from kvcache.store_memory import MemoryStore


class Faulty:
    """Does `fault` on the nth `call`, counted from 0: an outcome, or a function of the store, keys and buffers.

    While `gate` is shut, puts and gets do not return.
    """

    def __init__(self, call=None, nth=0, fault=None):
        self.call, self.nth, self.fault = call, nth, fault
        self.counts = {"put": 0, "get": 0}
        self.inner = MemoryStore(1 << 20, 1 << 16, evict=False)
        self.gate = threading.Event()
        self.gate.set()

    def _do(self, call, keys, buffers, timeout):
        self.gate.wait(timeout)
        number = self.counts[call]
        self.counts[call] += 1
        if call != self.call or number != self.nth:
            return getattr(self.inner, call)(keys, buffers, timeout=timeout)
        return (
            SettledJob([self.fault]) if isinstance(self.fault, Outcome) else self.fault(self, keys, buffers)
        )

    def put(self, keys, buffers, *, timeout):
        return self._do("put", keys, buffers, timeout)

    def get(self, keys, buffers, *, timeout):
        return self._do("get", keys, buffers, timeout)

    def register(self, memory):
        self.memory = memory

    def contains(self, keys, *, timeout):
        return self.inner.contains(keys, timeout=timeout)

    def delete(self, keys, *, timeout):
        return self.inner.delete(keys, timeout=timeout)

    def close(self, timeout):
        self.inner.close(timeout)
