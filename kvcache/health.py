"""What an operator should hear of, told to the logger ``kvcache``, each thing once a while."""

import logging
import threading
import time
from typing import NamedTuple

ACCEPTABLE_FRAGMENTATION = 0.2  # the guide's checklist
HIGH_FRAGMENTATION = 0.5  # the guide's warning
MOST_PROMISED = 0.9
REPEAT_SECONDS = 60.0

LOGGER = logging.getLogger("kvcache")


class Finding(NamedTuple):
    """Something that is not as it should be.

    Attributes
    ----------
    kind : str
        ``"fragmentation"``, ``"promises"``, ``"arena_copies"``, ``"corrupt_chunks"`` or ``"queue"``.
    level : int
        Of `logging`.
    message : str
    subject : str
        The name of the queue.
    """

    kind: str
    level: int
    message: str
    subject: str = ""

    @property
    def topic(self):
        """What is told once a while only."""
        return self.kind, self.subject


class Watch:
    """Looks at a cache when it is asked to, and tells the logger what it finds.

    Parameters
    ----------
    every : float
        Seconds that a kind of finding, of the same queue, is not told again.
    clock : callable
        Seconds, never backwards.
    """

    def __init__(self, every=REPEAT_SECONDS, clock=time.monotonic):
        self._every = every
        self._clock = clock
        self._lock = threading.Lock()
        self._told = {}  # topic -> when it was told last
        self._unsaid = {}  # topic -> how often it has been found since
        self._copies = self._corrupt = 0

    def look(self, cache):
        """What there is to find now; what has not been told for a while goes to the logger.

        Returns
        -------
        tuple of Finding
        """
        stats = cache.stats()
        with self._lock:
            copies, self._copies = self._copies, max(self._copies, stats.arena_copies)
            corrupt, self._corrupt = self._corrupt, max(self._corrupt, stats.corrupt_chunks)
            found = (
                *_findings(stats, cache.placement, cache.overcommit, copies, corrupt),
                *_waits(cache, stats),
            )
            due = [(finding, self._since(finding.topic)) for finding in found if self._is_due(finding.topic)]
        for finding, unsaid in due:
            again = f" (found {unsaid} more times since it was last told)" if unsaid else ""
            LOGGER.log(finding.level, "%s%s", finding.message, again)
        return found

    def _is_due(self, topic):
        now = self._clock()
        if topic in self._told and now - self._told[topic] < self._every:
            self._unsaid[topic] = self._unsaid.get(topic, 0) + 1
            return False
        self._told[topic] = now
        return True

    def _since(self, topic):
        return self._unsaid.pop(topic, 0)


def promised_part(stats, overcommit):
    """How much of what may be promised is held or claimed: 0 to 1, 0 where there is no bound."""
    return (stats.used_blocks - stats.waiting_blocks + stats.claimed_blocks) / (
        overcommit * stats.total_blocks
    )


def _findings(stats, placement, overcommit, copies, corrupt):
    """`copies` and `corrupt` are the arena copies and the corrupt chunks that are known already."""
    if placement == "paged" and stats.fragmentation > ACCEPTABLE_FRAGMENTATION:
        high = stats.fragmentation > HIGH_FRAGMENTATION
        yield Finding(
            "fragmentation",
            logging.WARNING if high else logging.INFO,
            f"fragmentation is {stats.fragmentation:.2f}: the longest run of free blocks has "
            f"{stats.largest_free_run} of {stats.free_blocks}; views of new sequences are gathered copies",
        )
    promised = promised_part(stats, overcommit)
    if promised > MOST_PROMISED:
        yield Finding(
            "promises",
            logging.WARNING,
            f"{promised:.0%} of what may be promised is: {stats.used_blocks} blocks used, "
            f"{stats.claimed_blocks} claimed of {stats.total_blocks}; newcomers will be refused",
        )
    if stats.arena_copies > copies:
        yield Finding(
            "arena_copies",
            logging.WARNING,
            f"MLX copied an array of the arena instead of writing in place, {stats.arena_copies} times so far: "
            "something else holds it, a view kept across steps as a rule",
        )
    more = stats.corrupt_chunks - corrupt
    if more > 0:
        yield Finding(
            "corrupt_chunks",
            logging.WARNING,
            f"{more} chunk{'' if more == 1 else 's'} came back from a store as something else than what was put there, "
            f"{stats.corrupt_chunks} so far: taken for lost, and deleted; the store's memory or disk needs a look",
        )


def _waits(cache, stats):
    """Queues whose first has waited too long. By their own clocks."""
    for queue in cache.queues:
        limit, age = queue.warn_after, queue.oldest_age
        if limit is not None and age > limit:
            yield Finding(
                "queue",
                logging.WARNING,
                f"the oldest of {len(queue)} requests in the queue {queue.name!r} has waited {age:.1f} s, more than "
                f"{limit:g} s: {stats.free_blocks} blocks are free, {stats.claimed_blocks} claimed",
                queue.name,
            )
