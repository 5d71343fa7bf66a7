"""What to do with a request that does not fit now. Strategies are values; `|` puts one after another."""

from dataclasses import dataclass
from typing import Any

from kvcache.options import as_callable, as_count, as_number


class Strategy:
    """One strategy, or several in order."""

    __slots__ = ()

    @property
    def stages(self):
        """The single strategies, in order."""
        return (self,)

    def __or__(self, other):
        return Chain(self.stages + other.stages) if isinstance(other, Strategy) else NotImplemented


@dataclass(frozen=True)
class Chain(Strategy):
    """Several strategies, tried in order; made by `|`."""

    stages: tuple = ()


@dataclass(frozen=True)
class Reject(Strategy):
    """Refuses at once, as `KVCache.allocate_for` does."""


@dataclass(frozen=True)
class Reduce(Strategy):
    """Takes the largest `max_tokens` that can be promised, if it is at least `min_tokens` (the prompt included).

    What comes later in a chain is content with that as well. The prompt itself is never cut.
    """

    min_tokens: int

    def __post_init__(self):
        as_count(self.min_tokens, "min_tokens", 1)


@dataclass(frozen=True)
class Wait(Strategy):
    """Waits its turn, at most `timeout` (None: for as long as it takes), in units of the queue's clock."""

    timeout: float | None = None

    def __post_init__(self):
        if self.timeout is not None:
            as_number(self.timeout, "timeout", 0)


VICTIMS = ("lru", "priority")


@dataclass(frozen=True)
class MakeRoom(Strategy):
    """What `Evict` and `Swap` have in common: a victim after the other, until the request fits."""

    def __post_init__(self):
        if not callable(self.victim) and self.victim not in VICTIMS:
            raise ValueError(
                f"victim must be one of {', '.join(VICTIMS)}, or a callable, not {self.victim!r}"
            )
        as_callable(self.notify, "notify")


@dataclass(frozen=True)
class Evict(MakeRoom):
    """Ends live sequences of the queue, one at a time, until the request fits.

    Parameters
    ----------
    victim : {"lru", "priority"} or callable
        The least recently appended; the one of the lowest priority, below the request's own; or what a callable
        chooses of a list of ids (None: nobody).
    notify : callable, optional
        Called with the victim's id before its memory goes, where its owner has given no `on_evict`. If it raises,
        nothing is freed and the request fails with that error.
    """

    victim: Any = "lru"
    notify: Any = None


LEAVING, SUSPENDED, INTACT = "leaving", "suspended", "intact"


@dataclass(frozen=True)
class Swap(MakeRoom):
    """Suspends live sequences of the queue, one at a time, until the request fits.

    `AllocationQueue.resume` has them back. A store that does not take a victim, since it is full or fails, ends this:
    what comes later in a chain is tried.

    Parameters
    ----------
    store : kvcache.store.ChunkStore, optional
        Where their K/V go; by default host memory, as of `KVCache.suspend`.
    victim : {"lru", "priority"} or callable
        As of `Evict`.
    notify : callable, optional
        Called with the victim's id and what becomes of it, where its owner has given no `on_swap`: ``"leaving"`` before
        anything happens, by the thread that needs the memory (if it raises, nothing does, and the request fails with
        that error); then, by the thread that carries, ``"suspended"`` (its K/V are in the store, its memory is free) or
        ``"intact"`` (the store did not take it: it lives on as it was). Of one freed meanwhile nothing more is told.
    """

    store: Any = None
    victim: Any = "lru"
    notify: Any = None

    def __post_init__(self):
        super().__post_init__()
        is_store = callable(getattr(self.store, "put", None)) and not isinstance(self.store, type)
        if self.store is not None and not is_store:
            raise TypeError(f"store must be a ChunkStore, not {self.store!r}")
