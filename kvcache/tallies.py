"""What a queue tells of itself: who waits and for how long, and what has become of those who came.

The counts change under the queue's lock and are read without it, so that looking never waits and never grants: two
counts of one look may be one request apart.
"""

from bisect import bisect_left
from typing import NamedTuple

from kvcache.refusals import REASONS

WAIT_BOUNDS = tuple(4**power / 1e3 for power in range(10))  # units of the clock: 1 ms to 262 s
MOST_TENANTS = 100  # that are told by name, beside those that have a limit of their own
MOST_CHARACTERS = 80  # of a tenant's name
OTHERS = "(others)"  # the tenants that came when so many had a name


class TenantStats(NamedTuple):
    """What a queue tells of one tenant.

    Attributes
    ----------
    waiting : int
        Requests that wait, growth included.
    oldest_age : float
        How long the first of them has waited, in units of the queue's clock; 0.0 where none does.
    sequences, blocks : int
        Live sequences that the queue has granted, and the blocks of their limits.
    granted : int
        Newcomers that were admitted.
    refused : dict of str to int
        Newcomers that were not, by the reason of their `Refusal`. ``"cancelled"`` also counts those whose task was
        cancelled, or whose thread was interrupted.
    failed : int
        Newcomers whose turn came and raised: their id lived already, or the cache was closed.
    grown : int
        Appends that the strategy helped to their room.
    growth_refused : dict of str to int
        Appends for which it could not, by reason. One past a limit that stood when it came is counted by the cache.
    evicted : int
        Sequences that were ended to make room.
    swapped, swaps_failed : int
        Sequences that were suspended to make room, and those whose store did not take them: they are as they were.
    resumed : int
        Suspended sequences that were given room to come back.
    resume_refused : dict of str to int
        Those that were not, by reason.
    """

    waiting: int
    oldest_age: float
    sequences: int
    blocks: int
    granted: int
    refused: dict
    failed: int
    grown: int
    growth_refused: dict
    evicted: int
    swapped: int
    swaps_failed: int
    resumed: int
    resume_refused: dict


class QueueStats(NamedTuple):
    """What `AllocationQueue.stats` returns.

    Attributes
    ----------
    name : str
        Of the queue.
    waiting : int
        Requests that wait, growth included.
    oldest_age : float
        How long the first of them has waited, in units of the queue's clock; 0.0 where none does.
    warn_after : float or None
        The age at which that is a finding of `KVCache.check_health`.
    tenants : dict of str to TenantStats
        By the tenant's name, its `repr` where that is no string; ``""`` is nobody's. Of tenants without a limit of
        their own the first hundred are told apart, all later ones are ``"(others)"``.
    waits : tuple of int
        Admissions by how long they waited in line: for each of `WAIT_BOUNDS` those within it and beyond the one
        before, then those beyond the last. Who was admitted at once is within the first.
    wait_sum : float
        How long they waited, together.
    """

    name: str
    waiting: int
    oldest_age: float
    warn_after: float | None
    tenants: dict
    waits: tuple
    wait_sum: float


class Tally:
    """The counts of one tenant, or of all that share a name."""

    __slots__ = (
        "evicted",
        "failed",
        "granted",
        "grown",
        "growth_refused",
        "name",
        "refused",
        "resume_refused",
        "resumed",
        "swapped",
        "swaps_failed",
    )

    def __init__(self, name):
        self.name = name
        self.granted = self.failed = self.grown = self.evicted = 0
        self.refused = dict.fromkeys(REASONS, 0)
        self.swapped = self.swaps_failed = self.resumed = 0
        self.growth_refused = dict.fromkeys(REASONS, 0)
        self.resume_refused = dict.fromkeys(REASONS, 0)


class Tallies:
    """The counts of a queue.

    Parameters
    ----------
    tenants : iterable of hashable
        Those that are told by name in any case.
    """

    def __init__(self, tenants):
        self.by_name = {}  # in order of arrival; never shrinks, or counters would run backwards
        self.most = MOST_TENANTS + 1
        self.waits = [0] * (len(WAIT_BOUNDS) + 1)  # of those that were in line
        self.wait_sum = 0.0
        for tenant in (None, *tenants):
            self.by_name.setdefault(shown(tenant), Tally(shown(tenant)))
        self.most += len(self.by_name) - 1

    def of(self, tenant):
        """Where to count what becomes of a tenant's requests."""
        name = shown(tenant)
        if name not in self.by_name and len(self.by_name) >= self.most:
            name = OTHERS
        tally = self.by_name.get(name)
        if tally is None:
            tally = self.by_name[name] = Tally(name)
        return tally

    def note_wait(self, waited):
        """Counts one that has been granted out of the line."""
        self.waits[bisect_left(WAIT_BOUNDS, waited)] += 1
        self.wait_sum += waited

    def told(self, queue, warn_after, waiters, accounts, now):
        """A `QueueStats`.

        Parameters
        ----------
        queue : str
            Its name.
        warn_after : float or None
        waiters : Waiters
        accounts : list of Tenant
        now : float
        """
        tallies = list(self.by_name.values())
        waiting, since, sequences, blocks = ({} for _ in range(4))
        for account in accounts:
            name = account.tally.name
            sequences[name] = sequences.get(name, 0) + account.sequences
            blocks[name] = blocks.get(name, 0) + account.blocks
        for name, count, first in waiters.by_tally():
            waiting[name] = waiting.get(name, 0) + count
            since[name] = min(since.get(name, first), first)
        tenants = {
            each.name: TenantStats(
                waiting.get(each.name, 0),
                max(0.0, now - since.get(each.name, now)),
                sequences.get(each.name, 0),
                blocks.get(each.name, 0),
                each.granted,
                dict(each.refused),
                each.failed,
                each.grown,
                dict(each.growth_refused),
                each.evicted,
                each.swapped,
                each.swaps_failed,
                each.resumed,
                dict(each.resume_refused),
            )
            for each in tallies
        }
        waits = list(self.waits)
        waits[0] += max(0, sum(each.granted for each in tallies) - sum(waits))
        return QueueStats(
            queue,
            sum(waiting.values()),
            max(0.0, now - min(since.values(), default=now)),
            warn_after,
            tenants,
            tuple(waits),
            self.wait_sum,
        )


def shown(tenant):
    """What a tenant is called."""
    if tenant is None:
        return ""
    text = tenant if type(tenant) is str else repr(tenant)
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
