"""What keeps K/V outside the arena: immutable byte strings by name, and nothing known of models.

A store takes and gives chunks in staging memory that the cache lends it; what is in them the cache seals and verifies
itself, see `kvcache.chunks`. `kvcache.store_memory` and `kvcache.store_files` are two stores; a third needs only the
methods of `ChunkStore`.
"""

import re
from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol, runtime_checkable

_KEY = re.compile(r"[0-9a-f]{64}")


class Outcome(IntEnum):
    """What became of one key."""

    OK = 0
    MISS = 1  #: not there, or not of the size that was asked for
    FULL = 2  #: refused now: no room, or too much is under way
    FAILED = 3  #: unknown, timed out, cancelled, unreachable


@runtime_checkable
class Job(Protocol):
    """What a store has been asked for, and may still be busy with."""

    def done(self) -> bool:
        """Whether the buffers are the caller's again. Never blocks or raises."""

    def wait(self, timeout: float) -> bool:
        """As `done`, after at most `timeout` seconds. Never called under the cache's lock."""

    def outcomes(self) -> Sequence[Outcome]:
        """One per key, in order; what is not decided yet is `Outcome.FAILED`."""

    def cancel(self) -> None:
        """No longer wanted. The buffers stay lent until `done`."""


@runtime_checkable
class ChunkStore(Protocol):
    """Immutable byte strings by name.

    Any thread may call; there are no callbacks; no call blocks on I/O, and nothing raises for I/O. A key is 64
    hexadecimal digits in lower case, anything else a `ValueError`. It is visible whole or not at all; a batch is not
    atomic. A timeout, in seconds, is for the job, not for each key.
    """

    def register(self, memory: memoryview) -> None:
        """Tell where all buffers lie from now on: one slab that begins at a multiple of 4096."""

    def put(self, keys: Sequence[str], buffers: Sequence[memoryview], *, timeout: float) -> Job:
        """Keep what is in the buffers."""

    def get(self, keys: Sequence[str], buffers: Sequence[memoryview], *, timeout: float) -> Job:
        """Fill the buffers, each with exactly as many bytes as it has; where that is not to be had: `MISS`."""

    def contains(self, keys: Sequence[str], *, timeout: float) -> Job:
        """Whether the keys are there: a hint, no promise for `get`."""

    def delete(self, keys: Sequence[str], *, timeout: float) -> Job:
        """Forget the keys."""

    def close(self, timeout: float) -> None:
        """Give up what is under way after `timeout` seconds; later calls are `FAILED`."""


def checked_keys(keys):
    """`keys` as a list; `TypeError` or `ValueError` if one is not 64 hexadecimal digits in lower case."""
    keys = list(keys)
    for position, key in enumerate(keys):
        if not isinstance(key, str):
            raise TypeError(f"key {position} is a {type(key).__name__}, expected a str")
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {position} is {key[:70]!r}, expected 64 hexadecimal digits in lower case")
    return keys


def checked_buffers(keys, buffers, *, writable):
    """`buffers` as a list of memoryviews of bytes, one per key."""
    buffers = [memoryview(buffer).cast("B") for buffer in buffers]
    if len(buffers) != len(keys):
        raise ValueError(f"{len(keys)} keys and {len(buffers)} buffers")
    for position, buffer in enumerate(buffers):
        if writable and buffer.readonly:
            raise ValueError(f"buffer {position} is read-only")
    return buffers


class SettledJob:
    """A job that was over when it began.

    Parameters
    ----------
    outcomes : iterable of Outcome
    """

    def __init__(self, outcomes):
        self._outcomes = tuple(outcomes)

    def done(self):
        """True."""
        return True

    def wait(self, timeout):
        """True."""
        return True

    def outcomes(self):
        """One per key, in order."""
        return self._outcomes

    def cancel(self):
        """Nothing to give up."""
