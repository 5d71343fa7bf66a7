"""What a replay measures: from outside, with a clock around every call of the cache and an eye on where sequences lie.

A figure per step is taken after the append and before finished sequences are freed. In a saturated replay the steps
up to and including the one in which the last request is admitted count; the rest only drains, and is seen in
`finished` and `wall_seconds` alone. With arrivals of their own, all steps count.
"""

from dataclasses import asdict, dataclass
from time import perf_counter_ns

import numpy as np


class ReplayFault(Exception):
    """The replay has caught the cache at something that it must not do."""


@dataclass(frozen=True)
class Figures:
    """What a replay came to; all of it but the first three and the last two over the steps that are measured."""

    requests: int  # finished and refused
    skipped: int  # longer than the share of the pool that was asked for
    finished: int
    refused: int  # can never fit
    preempted: int  # times that a sequence was
    steps: int
    mean_sequences: float  # live ones in a step
    utilization: float  # mean of live tokens over tokens of the pool
    zero_copy_fraction: float  # of all sequence-steps, those in which the sequence was one run
    moves: int
    moved_tokens: int  # as the cache tells
    moved_tokens_seen: int  # by watching where sequences start: what it must tell at least
    attended_tokens: int  # live tokens, summed over the steps
    moved_over_attended: float
    longest_pause_tokens: int  # the most that were moved in one admission, or in one step's appends
    spills: int  # sequences scattered by a bound on moves, and made one run again
    heals: int
    internal_waste: float  # mean share of the blocks held that no token is in
    fragmentation_mean: float
    blocked_by_fragmentation: int  # steps in which something was refused for which enough was free in total
    mean_waiting: float  # requests in the queue
    appended_tokens: int
    allocator_ns_per_token: (
        float  # in calls of cache and batch, admissions and frees included, over appended_tokens
    )
    prompt_tokens: int  # of prompts that were looked up, those of preempted requests once more
    cached_tokens: int  # of these, found
    prefix_hit_ratio: float  # cached over prompt tokens
    evicted_blocks: int
    copied_tokens: int  # from where they were found
    revived_tokens: int  # continued where they were found
    verified_tokens: int  # of finished sequences, whose bytes were compared
    wall_seconds: float  # from the first request to the last, reading the trace not included

    def as_dict(self):
        """Plain values, for JSON."""
        return asdict(self)


class Meter:
    """Makes the calls that change a cache, and keeps count.

    Parameters
    ----------
    pool : KVCache or RunCache
    prefix : bool
        Prompts and what is appended come as tokens.
    """

    def __init__(self, pool, prefix=False):
        self.pool = pool
        self.prefix = prefix
        self.prompt_tokens = self.cached_tokens = 0
        self.found_tokens = 0  # of the last prompt
        self.batch = pool.batch()
        self.stats = pool.stats()
        self.nanoseconds = 0
        self.longest_pause = 0
        self.moved_seen = 0
        self.starts = self.lengths = np.empty(0, np.int32)  # of the members, as last seen

    def admit(self, request_id, prompt, max_tokens):
        """Allocate, and join the batch; whether it was granted."""
        began = perf_counter_ns()
        granted = self.pool.allocate_for(request_id, prompt, max_tokens=max_tokens)
        if granted is not None:
            self.batch.add(request_id)
        self.nanoseconds += perf_counter_ns() - began
        if self.prefix and granted is not None:
            self.found_tokens = granted.cached_tokens
            self.prompt_tokens += len(prompt)
            self.cached_tokens += self.found_tokens
        self.look()
        return granted is not None

    def append(self, tokens=None):
        """A token for everybody, of these ids; who got it."""
        began = perf_counter_ns()
        got = self.batch.append(tokens) if self.prefix else self.batch.append()
        self.nanoseconds += perf_counter_ns() - began
        return got

    def append_one(self, request_id, tokens=None):
        """A token for one; whether it got it."""
        began = perf_counter_ns()
        got = (
            self.pool.append_tokens(request_id, tokens) if self.prefix else self.pool.append_token(request_id)
        )
        self.nanoseconds += perf_counter_ns() - began
        return got

    def free(self, request_ids):
        """Free members of the batch."""
        self.look()
        began = perf_counter_ns()
        for request_id in request_ids:
            self.pool.free_for(request_id)
            self.batch.remove(request_id)
        self.nanoseconds += perf_counter_ns() - began
        self.starts, self.lengths = self.batch.starts.copy(), self.batch.lengths.copy()

    def commit(self, request_id, num_tokens):
        """The first tokens of one are computed."""
        began = perf_counter_ns()
        self.pool.commit(request_id, num_tokens)
        self.nanoseconds += perf_counter_ns() - began

    def look(self):
        """See what has moved since the last look; members may have joined since, at the end, but none left.

        What is in another place than before was moved at least once, with at least what it held before.
        """
        told = self.stats.moved_tokens
        self.stats = self.pool.stats()
        self.longest_pause = max(self.longest_pause, self.stats.moved_tokens - told)
        before, known = self.starts, self.lengths
        self.starts, self.lengths = self.batch.starts.copy(), self.batch.lengths.copy()
        now = self.starts[: len(before)]
        if (now != before).any():
            moved = (now != before) & (now >= 0) & (before >= 0)
            self.moved_seen += int(known[moved].sum())
            if self.moved_seen > self.stats.moved_tokens:
                raise ReplayFault(
                    f"{self.moved_seen} tokens were seen to move, stats() tells {self.stats.moved_tokens}"
                )


class Tally:
    """Sums over the steps that are measured.

    Parameters
    ----------
    num_blocks, block_size : int
    """

    def __init__(self, num_blocks, block_size):
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._steps = self._sequences = self._runs = self._attended = 0
        self._waste = self._fragmentation = 0.0
        self._blocked = self._waiting = 0

    def step(self, meter, blocked, waiting):
        """Count a step, after its append."""
        tokens = int(meter.lengths.sum())
        held = (self._num_blocks - meter.stats.free_blocks) * self._block_size
        self._steps += 1
        self._sequences += len(meter.lengths)
        self._runs += int(np.count_nonzero(meter.starts >= 0))
        self._attended += tokens
        self._waste += max(0.0, 1 - tokens / held)  # what is shared is a token of each that has it
        self._fragmentation += meter.stats.fragmentation
        self._blocked += blocked
        self._waiting += waiting

    def figures(self, meter, **counts):
        """The figures as they stand.

        Parameters
        ----------
        meter : Meter
        **counts
            The fields of `Figures` that are not counted here.
        """
        steps, sequences = max(1, self._steps), max(1, self._sequences)
        stats = meter.stats
        return Figures(
            steps=self._steps,
            mean_sequences=self._sequences / steps,
            utilization=self._attended / steps / (self._num_blocks * self._block_size),
            zero_copy_fraction=self._runs / sequences,
            moves=stats.moves,
            moved_tokens=stats.moved_tokens,
            moved_tokens_seen=meter.moved_seen,
            attended_tokens=self._attended,
            moved_over_attended=stats.moved_tokens / max(1, self._attended),
            longest_pause_tokens=meter.longest_pause,
            spills=getattr(stats, "spills", 0),
            heals=getattr(stats, "heals", 0),
            internal_waste=self._waste / steps,
            fragmentation_mean=self._fragmentation / steps,
            blocked_by_fragmentation=self._blocked,
            mean_waiting=self._waiting / steps,
            appended_tokens=self._sequences,
            prompt_tokens=meter.prompt_tokens,
            cached_tokens=meter.cached_tokens,
            prefix_hit_ratio=meter.cached_tokens / max(1, meter.prompt_tokens),
            evicted_blocks=getattr(stats, "evicted_blocks", 0),
            copied_tokens=getattr(stats, "copied_tokens", 0),
            revived_tokens=getattr(stats, "revived_tokens", 0),
            allocator_ns_per_token=meter.nanoseconds / sequences,
            **counts,
        )
