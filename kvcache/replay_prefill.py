"""Prompts alone, one after the other: each is looked up, computed, and left to be found by the next.

Nothing is generated and nothing lives longer than its own prefill, so that what is found depends on the order of the
prompts, the room, and what is evicted, and on nothing else.
"""

from dataclasses import asdict, dataclass
from time import perf_counter, perf_counter_ns

from kvcache.replay_contents import Contents
from kvcache.replay_prompts import Prompts

WATCH_EVERY = 64  # requests


@dataclass(frozen=True)
class PrefillFigures:
    """What it came to."""

    requests: int  # finished and refused
    skipped: int  # longer than the share of the pool that was asked for
    finished: int
    refused: int  # of more blocks than there are
    prompt_tokens: int  # of those that finished
    cached_tokens: int  # of these, found
    prefix_hit_ratio: float  # cached over prompt tokens
    prefix_hit_ratio_last_half: float  # of the last half of the requests
    evicted_blocks: int
    copied_tokens: int  # from where they were found
    revived_tokens: int  # continued where they were found
    moves: int
    moved_tokens: int
    moved_cached_tokens: int
    verified_tokens: int  # whose bytes were compared
    allocator_ns_per_token: float  # in calls of the cache, over prompt tokens
    wall_seconds: float  # making the tokens included, reading the trace not

    def as_dict(self):
        """Plain values, for JSON."""
        return asdict(self)


class Prefill:
    """Prompts on their way.

    Parameters
    ----------
    pool : KVCache
    trace : Trace
    order : sequence of int
        Numbers of requests.
    skipped : int
        Requests that are left out.
    watch : callable, optional
        Called now and then with this, to show how far it is.
    real : bool
        The pool has bytes: they are written, and compared.

    Attributes
    ----------
    order : sequence of int
    finished, refused : int
        Of them, so far.
    """

    def __init__(self, pool, trace, order, skipped, watch=None, real=False):
        self.pool, self.prompts, self.lengths = pool, Prompts(trace), trace.prompts
        self.order, self.skipped, self.watch = order, skipped, watch
        self.tokens = {}  # number -> ids, of the prompt in hand
        self.contents = Contents(pool, self.tokens) if real else None
        self.finished = self.refused = self.nanoseconds = 0
        self.prompt_tokens, self.cached_tokens = [0, 0], [0, 0]  # of the first half, and of the last

    def run(self):
        """Until all have had their turn; gives the `PrefillFigures`."""
        began = perf_counter()
        with self.pool:
            widest = self.pool.spec.num_blocks * self.pool.spec.block_size
            for turn, number in enumerate(self.order):
                length = int(self.lengths[number])
                if length > widest:
                    self.refused += 1
                else:
                    self._prefill(number, length, turn >= len(self.order) // 2)
                if self.watch is not None and turn % WATCH_EVERY == 0:
                    self.watch(self)
            self.pool.check()
            stats = self.pool.stats()
        return self._figures(stats, perf_counter() - began)

    def _prefill(self, number, length, late):
        tokens = self.tokens[number] = self.prompts.tokens(number, length)
        began = perf_counter_ns()
        found = self.pool.allocate_for(number, tokens).cached_tokens
        computed = perf_counter_ns()
        if self.contents is not None:
            self.contents.prefill(number, found)
            self.contents.verify(number)
        self.nanoseconds += computed - began
        began = perf_counter_ns()
        self.pool.commit(number)
        self.pool.free_for(number)
        self.nanoseconds += perf_counter_ns() - began
        del self.tokens[number]
        self.prompt_tokens[late] += length
        self.cached_tokens[late] += found
        self.finished += 1

    def _figures(self, stats, seconds):
        prompted, found = sum(self.prompt_tokens), sum(self.cached_tokens)
        return PrefillFigures(
            requests=len(self.order),
            skipped=self.skipped,
            finished=self.finished,
            refused=self.refused,
            prompt_tokens=prompted,
            cached_tokens=found,
            prefix_hit_ratio=found / max(1, prompted),
            prefix_hit_ratio_last_half=self.cached_tokens[1] / max(1, self.prompt_tokens[1]),
            evicted_blocks=stats.evicted_blocks,
            copied_tokens=stats.copied_tokens,
            revived_tokens=stats.revived_tokens,
            moves=stats.moves,
            moved_tokens=stats.moved_tokens,
            moved_cached_tokens=stats.moved_cached_tokens,
            verified_tokens=0 if self.contents is None else self.contents.verified_tokens,
            allocator_ns_per_token=self.nanoseconds / max(1, prompted),
            wall_seconds=seconds,
        )
