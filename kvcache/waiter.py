"""One request in the queue, and how its thread or task sleeps until it is granted."""

import asyncio
import threading
from contextlib import suppress


class Waiter:
    """A request that has not been answered yet; its fields change under the queue's lock only."""

    __slots__ = (
        "count",  # tokens to append; 0: a newcomer
        "deadline",  # when it is woken in any case, by the queue's clock; None: never
        "done",  # no longer waiting: `lease`, `error` or `reason` says why
        "error",
        "first",  # blocks needed at once
        "held",  # a hold is in its way, and nothing else
        "lease",  # what has been granted: a Lease, or True for growth
        "least",  # the lowest limit that would do, in tokens
        "limit",
        "line",
        "max_new_tokens",
        "max_tokens",
        "number",  # in order of arrival
        "on_evict",
        "overtaken",  # grants to later ones while it was the first of its line
        "place",
        "priority",
        "prompt",
        "reason",
        "request_id",
        "since",
        "sleeper",
        "tally",  # where its outcome is counted
        "tenant",
        "tokens",
        "total",  # blocks needed up to `least`
    )

    def __init__(self, request_id, sleeper):
        self.request_id = request_id
        self.sleeper = sleeper
        self.prompt = self.max_tokens = self.max_new_tokens = None
        self.tally = self.tenant = self.on_evict = self.line = self.lease = self.error = self.reason = (
            self.deadline
        ) = None
        self.count = self.overtaken = self.priority = self.total = self.first = self.place = 0
        self.tokens = self.limit = self.least = self.number = 0
        self.since = 0.0
        self.done = self.held = False


class ThreadSleeper:
    """A thread that waits; `wake` comes from any thread."""

    __slots__ = ("gate",)

    def __init__(self):
        self.gate = threading.Lock()
        self.gate.acquire()

    def sleep(self, seconds):
        self.gate.acquire(timeout=-1 if seconds is None else min(seconds, threading.TIMEOUT_MAX))

    def wake(self):
        with suppress(RuntimeError):  # woken before, and has not looked yet
            self.gate.release()
        return True


class TaskSleeper:
    """A task of an event loop that waits; `wake` comes from any thread, what it does happens in the loop's."""

    __slots__ = ("future", "loop", "thread")

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.thread = threading.get_ident()
        self.future = None

    async def sleep(self, seconds):
        self.future = self.loop.create_future()
        timer = None if seconds is None else self.loop.call_later(seconds, self.resolve)
        try:
            await self.future
        finally:
            self.future = None
            if timer is not None:
                timer.cancel()

    def resolve(self):
        if self.future is not None and not self.future.done():
            self.future.set_result(None)

    def wake(self):
        """False: its loop is closed, so that nobody will look."""
        if threading.get_ident() == self.thread and not self.loop.is_closed():
            self.resolve()
            return True
        try:
            self.loop.call_soon_threadsafe(self.resolve)
        except RuntimeError:
            return False
        return True


class Lease:
    """What has been granted. True in a condition; a context manager that frees.

    Attributes
    ----------
    allocation : Allocation
        The cache's record. `request_id`, `tokens`, `max_tokens` and `cached_tokens` are read from it.
    tenant : hashable
    priority : int
    """

    __slots__ = ("_blocks", "_cache", "_holder", "_leaving", "allocation", "on_evict", "priority")

    def __init__(self, cache, allocation, holder, priority, on_evict):
        self._cache = cache
        self.allocation = allocation
        self._holder = holder  # the tenant's account
        self.priority = priority
        self.on_evict = on_evict
        self._leaving = False  # chosen to be evicted

    @property
    def tenant(self):
        return self._holder.name

    @property
    def request_id(self):
        return self.allocation.request_id

    @property
    def tokens(self):
        return self.allocation.tokens

    @property
    def max_tokens(self):
        return self.allocation.max_tokens

    @property
    def cached_tokens(self):
        return self.allocation.cached_tokens

    def free(self):
        """Ends the sequence that was granted, if it still lives: never a later one of the same id."""
        return self._cache._end(self.allocation)

    def __repr__(self):
        return f"Lease({self.allocation!r}, tenant={self.tenant!r}, priority={self.priority})"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._cache._end(self.allocation)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        self._cache._end(self.allocation)
