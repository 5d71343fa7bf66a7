"""A lock for Python code that many threads want at once."""

import threading
from collections import deque


class ParkingLock:
    """A lock that is given to nobody who sleeps: it is free until a thread that runs takes it.

    `threading.Lock` may be handed to a thread that still has to wait for the interpreter. The one that runs then finds
    it taken and goes to sleep, and so does the next: a switch of threads for each time that somebody has it. Here a
    thread that finds it taken parks; a release wakes one that has parked, one at a time, and that one tries like
    everybody else once it runs.

    Attributes
    ----------
    take : callable
        ``take(False)`` takes it if nobody has it: True or False, at once.
    """

    __slots__ = ("_lock", "_parked", "_waking", "take")

    def __init__(self):
        self._lock = threading.Lock()
        self.take = self._lock.acquire
        self._parked = deque()  # gates of threads, each shut until it is woken
        self._waking = False  # one has been woken and has not run since

    def acquire(self):
        """Takes it, however long that takes."""
        if not self.take(False):
            self._park()

    def release(self):
        """Gives it up."""
        self._lock.release()
        if self._parked and not self._waking:
            self._wake()

    def locked(self):
        """Whether somebody has it."""
        return self._lock.locked()

    def __enter__(self):
        self.acquire()

    def __exit__(self, *exception):
        self.release()

    def _wake(self):
        self._waking = True
        try:
            gate = self._parked.popleft()
        except IndexError:  # it has helped itself
            self._waking = False
            return
        gate.release()

    def _park(self):
        gate = threading.Lock()
        gate.acquire()
        while True:
            self._parked.append(gate)
            if self.take(False):  # given up before it could see the gate
                self._leave(gate)
                return
            try:
                gate.acquire()
            except BaseException:  # a signal: whoever meant to wake this one wakes another
                self._leave(gate)
                if self._parked:
                    self._wake()
                raise
            self._waking = False
            if self.take(False):
                return

    def _leave(self, gate):
        try:
            self._parked.remove(gate)
        except ValueError:  # it has been woken
            self._waking = False
