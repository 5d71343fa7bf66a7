"""A trace of served requests, driven through a cache step by step: what `kvcache replay` runs.

In every step requests are admitted in order, as long as the head of the queue fits; every live sequence appends one
token; what is finished is freed. A refused append preempts the youngest sequence, which goes back to the head of the
queue. It is recomputed as vLLM does it: what it had generated becomes part of its prompt, and the rest of its output
follows. The token that was refused is appended in the same step, once there is room. A request without output is
prefilled and freed at once.

Admission leaves a share free: the head waits while used blocks and those of its prompt are more than
``(1 - keep_free)`` of all. Who was preempted has been admitted before, and may break that rule when nobody else lives.

With prefixes, prompts and outputs have tokens (`replay_prompts`), which the cache finds again: a prompt is committed
when it is admitted, what was generated when the sequence ends or is preempted. The rule of admission counts all blocks
of a prompt, found or not. Prompts alone, one after the other, are `replay_prefill`.

What is measured, and over which steps, is in `replay_figures`.
"""

import math
import time
from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np

from kvcache.cache import KVCache
from kvcache.options import PLACEMENTS
from kvcache.replay_baselines import Buddy, Reserve, RunCache
from kvcache.replay_contents import Contents
from kvcache.replay_figures import Meter, ReplayFault, Tally
from kvcache.replay_prefill import Prefill
from kvcache.replay_prompts import Prompts

BASELINES = {"buddy": Buddy, "reserve": Reserve}
ALL_PLACEMENTS = (*PLACEMENTS, *BASELINES)
SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}  # of the small model whose bytes are moved
WATCH_EVERY = 64  # steps


@dataclass(frozen=True)
class Settings:
    """How a trace is replayed.

    Attributes
    ----------
    pool_tokens, block_size : int
        The arena.
    placement : str
        ``"contiguous"`` or ``"paged"``; ``"buddy"`` or ``"reserve"`` for what a cache without moves would do.
    keep_free : float
        Share of the blocks that admission leaves free.
    arrivals : str
        ``"saturate"``: all requests wait from the start; ``"trace"``: they come at their own times.
    speed : float
        How many times faster than they did; for ``"trace"``.
    step_seconds : float
        How long a step takes; for ``"trace"``.
    max_requests : int, optional
        Of those that are not skipped, the first so many.
    max_share : float, optional
        Requests longer than this share of the pool, in the end, are skipped and counted.
    max_tokens_known : bool
        The cache is told how long each request will be, as its limit; otherwise that it may fill the arena.
    overcommit : float, optional
        Of the cache; by default 1 when lengths are known, so that limits are promises, otherwise unbounded.
    max_move_tokens : int, optional
        Of the cache.
    backend : str
        ``"none"``; or ``"numpy"`` or ``"mlx"``, to have real bytes written, moved and compared.
    prefix : bool
        Prompts have tokens, and their beginnings are found again; for a trace that tells which begin alike.
    policy : str
        Of the cache: what is evicted first; for ``prefix``.
    prefill_only : bool
        Prompts alone, one after the other, in the order of the file; for ``prefix``.
    """

    pool_tokens: int = 262144
    block_size: int = 16
    placement: str = "contiguous"
    keep_free: float = 0.1
    arrivals: str = "saturate"
    speed: float = 1.0
    step_seconds: float = 0.03
    max_requests: int | None = None
    max_share: float | None = None
    max_tokens_known: bool = False
    overcommit: float | None = None
    max_move_tokens: int | None = None
    backend: str = "none"
    prefix: bool = False
    policy: str = "lru"
    prefill_only: bool = False

    @property
    def num_blocks(self):
        """Blocks of the arena."""
        return -(-self.pool_tokens // self.block_size)

    @property
    def claims_bound(self):
        """Blocks held and promised, over all blocks, may be up to this."""
        if self.overcommit is not None:
            return self.overcommit
        return 1.0 if self.max_tokens_known else math.inf

    @property
    def most_blocks(self):
        """Blocks that may be held when a request is admitted."""
        return math.floor((1 - self.keep_free) * self.num_blocks + 1e-9)

    def open_pool(self):
        """An empty `KVCache`, or the baseline that stands in for one."""
        if self.placement in BASELINES:
            rule = BASELINES[self.placement](self.num_blocks)
            return RunCache(rule, self.num_blocks, self.block_size)
        shape = dict.fromkeys(SHAPE, 1) if self.backend == "none" else SHAPE
        return KVCache(
            **shape,
            max_total_tokens=self.pool_tokens,
            block_size=self.block_size,
            backend=self.backend,
            placement=self.placement,
            overcommit=self.claims_bound,
            max_move_tokens=self.max_move_tokens,
            prefix_cache=self.prefix,
            policy=self.policy,
        )


def replay(trace, settings, watch=None, film=None):
    """Drive a trace through a cache.

    Parameters
    ----------
    trace : Trace
    settings : Settings
    watch : callable, optional
        Called now and then with the `Replay` or `Prefill`, to show how far it is.
    film : Film, optional
        Takes a picture of the steps that are measured.

    Returns
    -------
    Figures or PrefillFigures

    Raises
    ------
    ReplayFault
        The cache told fewer moves than were seen, lost contents, or left everybody waiting.
    """
    if not settings.prefill_only:
        return Replay(trace, settings, watch, film).run()
    taken, skipped = chosen(trace, settings)
    real = settings.backend != "none"
    return Prefill(settings.open_pool(), trace, taken.tolist(), skipped, watch, real).run()


def chosen(trace, settings):
    """Which requests are replayed, as numbers in their order, and how many were skipped before the last of them."""
    share = math.inf if settings.max_share is None else settings.max_share
    longest = share * settings.num_blocks * settings.block_size
    order, lengths = np.arange(len(trace)), trace.prompts.astype(np.int64)
    if settings.prefill_only:
        order = np.argsort(trace.places)
    else:
        lengths += trace.outputs
    fitting = np.flatnonzero(lengths[order] <= longest)
    taken = fitting[: settings.max_requests]
    seen = len(trace) if len(taken) == len(fitting) else int(fitting[len(taken)])
    return order[taken], seen - len(taken)


class Replay:
    """A replay on its way; see `replay`. Requests are known by their number in the trace."""

    def __init__(self, trace, settings, watch=None, film=None):
        self.settings = settings
        self.pool = settings.open_pool()
        self.meter = Meter(self.pool, settings.prefix)
        self.tally = Tally(settings.num_blocks, settings.block_size)
        self.watch, self.film = watch, film
        self.tokens_of = Prompts(trace).tokens if settings.prefix else None
        self.tokens = {}  # number -> ids of prompt and output, of the live, with prefixes
        self.contents = None
        if settings.backend != "none":
            self.contents = Contents(self.pool, self.tokens if settings.prefix else None)
        self.prompts = trace.prompts.tolist()  # grows by what was generated, where one is preempted
        self.totals = (trace.prompts.astype(np.int64) + trace.outputs).tolist()
        taken, self.skipped = chosen(trace, settings)
        self.order = [number for number in taken.tolist() if self._can_ever_fit(number)]
        self.refused = len(taken) - len(self.order)
        self.times = None
        if settings.arrivals == "trace":
            self.times = (trace.arrivals[self.order] / settings.speed).tolist()
        self.clock = 0.0  # seconds
        self.admitted = 0  # of order
        self.returned = []  # preempted: the head of the queue is the last
        self.live = {}  # number -> step of its admission; in batch order
        self.ends = {}  # step -> numbers that have their last token then
        self.step = self.finished = self.preempted = 0
        self.figures = None  # once what is measured is over

    def _can_ever_fit(self, number):
        prompt, total = self.prompts[number], self.totals[number]
        widest = getattr(self.pool, "widest", self.settings.num_blocks)
        return self._width(prompt, total) <= self.settings.most_blocks and self._width(total, total) <= widest

    def _width(self, prompt, total):
        """Blocks that an admission takes."""
        if isinstance(self.pool, RunCache):
            return self.pool.width(prompt, total)
        return -(-prompt // self.settings.block_size)

    def run(self):
        """Until everybody has finished; gives the `Figures`."""
        began = time.perf_counter()
        with self.pool:
            while self.admitted < len(self.order) or self.returned or self.live:
                self._step()
                if self.watch is not None and self.step % WATCH_EVERY == 0:
                    self.watch(self)
            self.pool.check()
            if self.figures is None:
                self._end_measuring()
        return replace(
            self.figures,
            finished=self.finished,
            verified_tokens=0 if self.contents is None else self.contents.verified_tokens,
            wall_seconds=time.perf_counter() - began,
        )

    def _step(self):
        self.step += 1
        blocked = self._admit()
        drains = self.times is None and self.admitted == len(self.order) and not self.returned
        if self.live:
            blocked |= self._append()
            if self.figures is None:
                self.tally.step(self.meter, blocked, self.waiting)
                if self.film is not None:
                    self.film.shoot(self)
        if drains and self.figures is None:
            self._end_measuring()
        self._free(self.ends.pop(self.step, ()))
        self.clock += self.settings.step_seconds

    def _end_measuring(self):
        self.figures = self.tally.figures(
            self.meter,
            requests=len(self.order) + self.refused,
            skipped=self.skipped,
            refused=self.refused,
            preempted=self.preempted,
            finished=0,
            verified_tokens=0,
            wall_seconds=0.0,
        )

    # ---- the queue

    @property
    def waiting(self):
        """Requests in the queue."""
        arrived = len(self.order) if self.times is None else bisect_right(self.times, self.clock)
        return len(self.returned) + max(0, arrived - self.admitted)

    def _head(self):
        """The request that is next, or None when nobody waits."""
        if self.returned:
            return self.returned[-1]
        if self.admitted == len(self.order):
            return None
        if self.times is not None and self.times[self.admitted] > self.clock:
            if self.live:
                return None
            self.clock = self.times[self.admitted]  # nobody is there: time passes without steps
        return self.order[self.admitted]

    def _admit(self):
        """From the head, as long as it fits; whether it was kept waiting by fragmentation."""
        while (number := self._head()) is not None:
            width = self._width(self.prompts[number], self.totals[number])
            held = self.settings.num_blocks - self.pool.free_blocks
            alone_again = bool(self.returned) and not self.live
            if held + width > self.settings.most_blocks and not alone_again:
                return False
            if not self._enter(number):
                if not self.live:
                    raise ReplayFault(f"request {number} of {width} blocks is not admitted to an empty pool")
                return self._promises_nothing
            if self.returned:
                self.returned.pop()
            else:
                self.admitted += 1
        return False

    @property
    def _promises_nothing(self):
        """Whether a request that fits can be refused for nothing but where blocks lie."""
        return isinstance(self.pool, RunCache) or math.isinf(self.settings.claims_bound)

    def _enter(self, number):
        """Allocate for a request; whether it was granted."""
        prompt, total = self.prompts[number], self.totals[number]
        told = self.settings.max_tokens_known or isinstance(self.pool, RunCache)
        limit = total if told else self.settings.num_blocks * self.settings.block_size
        given = prompt
        if self.tokens_of is not None:
            self.tokens[number] = self.tokens_of(number, total)
            given = self.tokens[number][:prompt]
        if not self.meter.admit(number, given, limit):
            self.tokens.pop(number, None)
            return False
        self.live[number] = self.step
        if self.contents is not None:
            self.contents.prefill(number, self.meter.found_tokens)
        if self.tokens_of is not None:
            self.meter.commit(number, prompt)
        if total == prompt:
            self._free([number])
        else:
            self.ends.setdefault(self.step + total - prompt - 1, []).append(number)
        return True

    # ---- the live

    def _append(self):
        """A token for everybody who stays; whether fragmentation had somebody preempted."""
        got = self.meter.append(self._next_tokens(self.live))
        if got.all():
            self.meter.look()
            if self.contents is not None:
                self.contents.step(self.meter.batch, self.live)
            return False
        members = list(self.live)
        blocked = False
        for index in np.flatnonzero(~got):
            blocked |= self._make_room(members[index])
        self.meter.look()
        if self.contents is not None:
            self.contents.last_tokens(self.live)
        return blocked

    def _next_tokens(self, numbers):
        """The ids that they generate in this step; None where tokens are only counted."""
        if self.tokens_of is None:
            return None
        new = (
            self.tokens[number][self.prompts[number] + self.step - self.live[number]] for number in numbers
        )
        return np.fromiter(new, np.int32, len(numbers))

    def _make_room(self, number):
        """Preempt from the youngest on, until a member has its token or is gone itself."""
        blocked = False
        while number in self.live and not self.meter.append_one(number, self._next_tokens([number])):
            tokens, total = self.pool.used_tokens(number), self.totals[number]
            wanted = self._width(tokens + 1, total) - self._width(tokens, total)
            blocked |= wanted <= self.pool.free_blocks
            if len(self.live) == 1:
                raise ReplayFault(f"request {number}, alone in the pool, is refused token {tokens + 1}")
            self._preempt(next(reversed(self.live)))
        return blocked

    def _preempt(self, number):
        """What it has of this step is void: the step is not computed with it."""
        generated = self.step - self.live.pop(number)
        self.ends[self.step + self.totals[number] - self.prompts[number] - generated - 1].remove(number)
        self.prompts[number] += generated
        if self.tokens_of is not None:
            self.meter.commit(number, self.prompts[number])
        self.meter.free([number])
        self.tokens.pop(number, None)
        self.returned.append(number)
        self.preempted += 1

    def _free(self, numbers):
        if not numbers:
            return
        for number in numbers:
            if self.contents is not None:
                self.contents.verify(number)
            if self.tokens_of is not None:
                self.meter.commit(number, self.totals[number])
            del self.live[number]
            self.tokens.pop(number, None)
        self.meter.free(numbers)
        self.finished += len(numbers)
