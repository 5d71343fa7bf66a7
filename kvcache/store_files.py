"""A store in a directory: one file a key, in 256 subdirectories, written to a temporary name and renamed.

Nothing is synced: after a power failure a file may be short or hold zeros. A short one is a `MISS`, and what is in
the others the cache verifies, as it does with every chunk.
"""

import contextlib
import itertools
import os
import re
import stat
import threading
import time
from functools import partial
from pathlib import Path

from kvcache.spec import whole_number
from kvcache.store import Outcome, checked_buffers, checked_keys
from kvcache.store_jobs import WorkerPool

PIECE = 1 << 20  # bytes of one read or write: between two of them the deadline is looked at
ABANDONED = 3600  # seconds after which a temporary file is taken for one that a crash has left

_FILE = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"[0-9a-f]{64}\.[0-9]+\.[0-9]+\.tmp")


class DirectoryStore:
    """A `kvcache.store.ChunkStore` in a directory.

    What an earlier process left there is found again. Several processes may use one directory; each keeps what it
    knows of within its own cap.

    Parameters
    ----------
    path : path
        Made if it is not there.
    max_bytes : int
        What the files may have together.
    evict : bool
        Whether the files that have been used least recently (at the start: written) are deleted to make room. If not,
        `put` says `FULL`: what has been put stays until it is deleted.
    num_workers : int
        Threads that read and write.
    max_pending : int
        Keys that may wait or be under way; a call that would exceed it is `FULL` as a whole.

    Raises
    ------
    OSError
        The directory cannot be made or read.
    """

    def __init__(self, path, max_bytes, *, evict=True, num_workers=2, max_pending=256):
        self.max_bytes = whole_number(max_bytes, "max_bytes")
        self.path = Path(path)
        self._evicts = bool(evict)
        self._pool_size = whole_number(num_workers, "num_workers"), whole_number(max_pending, "max_pending")
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self.path.mkdir(parents=True, exist_ok=True)
        self._files = _scanned(self.path)  # key -> bytes, the first to be deleted first
        self._bytes = sum(self._files.values())  # those of puts under way included
        self._pool = WorkerPool(*self._pool_size)

    def __len__(self):
        return len(self._files)

    @property
    def used_bytes(self):
        """Bytes of the files, and of those that are being written."""
        return self._bytes

    def register(self, memory):
        """Nothing to prepare: any buffer can be read and written."""

    def put(self, keys, buffers, *, timeout):
        """Write a file for each key."""
        keys = checked_keys(keys)
        buffers = checked_buffers(keys, buffers, writable=False)
        pairs = zip(keys, buffers, strict=True)
        return self._pool.begin([partial(self._put, key, buffer) for key, buffer in pairs], timeout)

    def get(self, keys, buffers, *, timeout):
        """Read the files; one of another size than its buffer is a `MISS`."""
        keys = checked_keys(keys)
        buffers = checked_buffers(keys, buffers, writable=True)
        pairs = zip(keys, buffers, strict=True)
        return self._pool.begin([partial(self._get, key, buffer) for key, buffer in pairs], timeout)

    def contains(self, keys, *, timeout):
        """Whether there are files of these names."""
        return self._pool.begin([partial(self._contains, key) for key in checked_keys(keys)], timeout)

    def delete(self, keys, *, timeout):
        """Delete the files; `MISS` for one that is not there."""
        return self._pool.begin([partial(self._delete, key) for key in checked_keys(keys)], timeout)

    def close(self, timeout):
        """Let what is under way finish for `timeout` seconds; later calls are `FAILED`. The files stay."""
        self._pool.close(timeout)

    def _name(self, key):
        return self.path / key[:2] / key

    # ---- in a thread of the pool

    def _put(self, key, buffer, job):
        if not self._make_room(buffer.nbytes):
            return Outcome.FULL
        kept = False
        name = self._name(key)
        temporary = name.with_name(f"{key}.{os.getpid()}.{next(self._numbers)}.tmp")
        try:
            name.parent.mkdir(exist_ok=True)
            if _write(temporary, buffer, job):
                os.replace(temporary, name)
                kept = True
        finally:
            if not kept:
                with contextlib.suppress(OSError):
                    temporary.unlink()
            with self._lock:
                if kept:
                    self._bytes -= self._files.pop(key, 0)
                    self._files[key] = buffer.nbytes
                else:
                    self._bytes -= buffer.nbytes
        return Outcome.OK if kept else Outcome.FAILED

    def _make_room(self, size):
        """Counts `size` bytes as used, if they can be had; deletes old files for them."""
        while True:
            with self._lock:
                if self._bytes + size <= self.max_bytes:
                    self._bytes += size
                    return True
                if size > self.max_bytes or not self._evicts or not self._files:
                    return False
                oldest = next(iter(self._files))
                there = self._files.pop(oldest)
            try:
                self._name(oldest).unlink(missing_ok=True)
            except OSError:  # it still takes its room; it is the last one to be tried again
                with self._lock:
                    self._files[oldest] = there
                return False
            with self._lock:
                self._bytes -= there

    def _get(self, key, buffer, job):
        try:
            descriptor = os.open(self._name(key), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            self._note(key, None)
            return Outcome.MISS
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size != buffer.nbytes:
                return Outcome.MISS
            self._note(key, found.st_size)
            return _read(descriptor, buffer, job)
        finally:
            os.close(descriptor)

    def _note(self, key, size):
        """The file has been used now, or is gone (None): another process may have written or deleted it."""
        with self._lock:
            self._bytes += (size or 0) - self._files.pop(key, 0)
            if size is not None:
                self._files[key] = size

    def _contains(self, key, job):
        return Outcome.OK if self._name(key).is_file() else Outcome.MISS

    def _delete(self, key, job):
        try:
            self._name(key).unlink()
        except FileNotFoundError:
            self._note(key, None)
            return Outcome.MISS
        self._note(key, None)
        return Outcome.OK


def _write(path, buffer, job):
    """Whether all of `buffer` is in the new file; False where the job ended first."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        done = 0
        while done < buffer.nbytes:
            if job.is_over():
                return False
            done += os.write(descriptor, buffer[done : done + PIECE])
    finally:
        os.close(descriptor)
    return not job.is_over()


def _read(descriptor, buffer, job):
    done = 0
    while done < buffer.nbytes:
        if job.is_over():
            return Outcome.FAILED
        count = os.readv(descriptor, [buffer[done : done + PIECE]])
        if count == 0:
            return Outcome.MISS
        done += count
    return Outcome.OK


def _scanned(path):
    """Bytes of the files by key, the oldest first; temporary files that a crash has left are deleted."""
    found = []
    for folder in (path / f"{number:02x}" for number in range(256)):
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            continue
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                _look_at(entry, folder.name, found)
    return {key: size for _, key, size in sorted(found)}


def _look_at(entry, prefix, found):
    status = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(status.st_mode):
        return
    if _FILE.fullmatch(entry.name) and entry.name.startswith(prefix):
        found.append((status.st_mtime_ns, entry.name, status.st_size))
    elif _TEMPORARY.fullmatch(entry.name) and time.time() - status.st_mtime > ABANDONED:
        os.unlink(entry.path)
