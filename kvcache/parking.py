"""A lock for Python code that many threads want at once."""

import threading
import time
from collections import deque

PATIENCE = 0.1  # seconds after which a thread that is woken in vain is given the lock


class ParkingLock:
    """A lock that is given to nobody who sleeps: it is free until a thread that runs takes it.

    `threading.Lock` may be handed to a thread that still has to wait for the interpreter. The one that runs then finds
    it taken and goes to sleep, and so does the next: a switch of threads for each time that somebody has it. Here a
    thread that finds it taken parks; a release wakes one that has parked, one at a time, and that one tries like
    everybody else once it runs. Who has tried in vain for a tenth of a second is handed it, so that nobody starves.

    Attributes
    ----------
    take : callable
        ``take(False)`` takes it if nobody has it: True or False, at once.
    """

    __slots__ = ("_heirs", "_lock", "_parked", "_waking", "take")

    def __init__(self):
        self._lock = threading.Lock()
        self.take = self._lock.acquire
        self._parked = deque()  # gates of threads, each shut until it is woken
        self._heirs = deque()  # gates of those to whom a release gives it
        self._waking = False  # one has been woken and has not run since

    def acquire(self):
        """Takes it, however long that takes."""
        if not self.take(False):
            self._park()

    def release(self):
        """Gives it up."""
        while True:
            if self._heirs:
                self._heirs.popleft().release()  # only an owner takes from there
                return
            self._lock.release()
            if not (self._heirs and self.take(False)):  # an heir that came in between
                break
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
        gate, patience = threading.Lock(), time.monotonic() + PATIENCE
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
            if time.monotonic() > patience:
                self._inherit(gate)
                return

    def _inherit(self, gate):
        """Waits until it is handed over."""
        self._heirs.append(gate)
        if self.take(False):
            self._heirs.remove(gate)
            return
        try:
            gate.acquire()
        except BaseException:  # a signal
            try:
                self._heirs.remove(gate)
            except ValueError:  # it has been handed over
                self.release()
            raise

    def _leave(self, gate):
        try:
            self._parked.remove(gate)
        except ValueError:  # it has been woken
            self._waking = False
