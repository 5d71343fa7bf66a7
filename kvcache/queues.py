"""The queues before a cache, each under a name of its own."""

import itertools
import threading

NOBODY_WAITS = 0, 0.0


class Queues:
    """Those that are open.

    Attributes
    ----------
    open : tuple of AllocationQueue
        In order of their making. Read by anybody, replaced under a lock.
    """

    def __init__(self):
        self.open = ()
        self._lock = threading.Lock()

    def enrol(self, queue, name):
        """Takes a queue in under its name, or for None under one that is free; the name."""
        with self._lock:
            taken = {each.name for each in self.open}
            if name is None:
                names = ("default" if number == 1 else f"default-{number}" for number in itertools.count(1))
                name = next(each for each in names if each not in taken)
            elif not isinstance(name, str) or not name:
                raise TypeError(f"name must be a string that is not empty, not {name!r}")
            elif name in taken:
                raise ValueError(f"the cache has a queue named {name!r} already")
            queue.name = name
            self.open = (*self.open, queue)
        return name

    def strike(self, queue):
        """Lets a queue go, whose name is free again."""
        with self._lock:
            self.open = tuple(each for each in self.open if each is not queue)


def waiting_before(queues):
    """How many wait in these queues, and for how long the first of them has."""
    waiting, oldest = 0, 0.0
    for queue in queues:
        if count := len(queue):
            waiting += count
            oldest = max(oldest, queue.oldest_age)
    return waiting, oldest
