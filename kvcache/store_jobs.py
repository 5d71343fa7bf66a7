"""Work for a store that waits for something: jobs with a deadline, done by a few threads of its own."""

import errno
import queue
import threading
import time
import weakref

from kvcache.store import Outcome

FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class PoolJob:
    """A job whose keys are dealt with one by one, by whichever thread is free.

    Parameters
    ----------
    count : int
        Keys.
    timeout : float
        Seconds from now until what is not decided is given up.
    """

    def __init__(self, count, timeout):
        self._deadline = time.monotonic() + timeout
        self._outcomes = [Outcome.FAILED] * count
        self._left = count  # keys that some thread may still touch the buffer of
        self._settled = threading.Condition()
        self._cancelled = False

    def done(self):
        """Whether no thread touches the buffers any more."""
        return self._left == 0

    def wait(self, timeout):
        """As `done`, after at most `timeout` seconds."""
        with self._settled:
            return self._settled.wait_for(self.done, max(0.0, timeout))

    def outcomes(self):
        """One per key, in order."""
        with self._settled:
            return tuple(self._outcomes)

    def cancel(self):
        """Leave undone what is not done yet."""
        self._cancelled = True

    def is_over(self):
        """For the threads: whether to stop, because of the deadline or `cancel`."""
        return self._cancelled or time.monotonic() >= self._deadline

    def settle(self, position, outcome):
        """For the threads: this key is dealt with, its buffer let go."""
        with self._settled:
            self._outcomes[position] = outcome
            self._left -= 1
            if self._left == 0:
                self._settled.notify_all()


class WorkerPool:
    """A few threads that deal with the keys of jobs in the order in which they came.

    They do not keep the process alive, and end when the pool is closed or let go.

    Parameters
    ----------
    num_workers : int
    max_pending : int
        Keys that may wait or be under way; a job that would exceed it is refused as a whole.
    """

    def __init__(self, num_workers, max_pending):
        self._tasks = queue.SimpleQueue()
        self._count = _Count(max_pending)
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks, self._count), name="kvcache-store", daemon=True)
            for _ in range(num_workers)
        ]
        self._jobs = weakref.WeakSet()
        self._closing = threading.Lock()
        self._closed = False
        self._end = weakref.finalize(self, _send_home, self._tasks, num_workers)
        self._end.atexit = False
        for thread in self._threads:
            thread.start()

    def begin(self, actions, timeout):
        """A job of these actions; each is called with the job, in some thread, and returns an `Outcome`."""
        job = PoolJob(len(actions), timeout)
        with self._closing:
            refusal = Outcome.FAILED if self._closed else None
            if refusal is None and not self._count.add(len(actions)):
                refusal = Outcome.FULL
            if refusal is None:
                self._jobs.add(job)
                for position, action in enumerate(actions):
                    self._tasks.put((job, position, action))
        if refusal is not None:
            for position in range(len(actions)):
                job.settle(position, refusal)
        return job

    def close(self, timeout):
        """Take no more; give up after `timeout` seconds what is under way then."""
        deadline = time.monotonic() + timeout
        with self._closing:
            self._closed = True
            self._end()  # once: behind the last task each thread finds that it may go
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for job in list(self._jobs):
            job.cancel()


class _Count:
    """Keys that wait or are under way."""

    def __init__(self, most):
        self._most = most
        self._lock = threading.Lock()
        self._now = 0

    def add(self, count):
        with self._lock:
            if self._now + count > self._most:
                return False
            self._now += count
            return True

    def subtract(self):
        with self._lock:
            self._now -= 1


def _send_home(tasks, num_workers):
    for _ in range(num_workers):
        tasks.put(None)


def _work(tasks, count):
    while True:
        task = tasks.get()
        if task is None:
            return
        job, position, action = task
        outcome = Outcome.FAILED if job.is_over() else _outcome_of(action, job)
        count.subtract()
        job.settle(position, outcome)
        del task, job, action  # not kept while the next one is awaited


def _outcome_of(action, job):
    try:
        return action(job)
    except OSError as error:
        return Outcome.FULL if error.errno in FULL_DISK else Outcome.FAILED
    except Exception:  # noqa: BLE001 (a store answers, whatever goes wrong; the thread goes on)
        return Outcome.FAILED
