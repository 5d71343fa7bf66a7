"""How a thread or a task sleeps until the queue has an answer for it."""

import asyncio
import threading
from contextlib import suppress


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
