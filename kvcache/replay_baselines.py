"""What a cache without moves would do with the same traffic. Only for comparison, and only in the replay.

A `RunCache` keeps every sequence in one run of blocks that is wider than what it holds, and answers the calls that a
replay makes of a `KVCache`. Where runs come from is up to its rule:

`Reserve`
    room for prompt and full output from the start, first fit, never moved: the guide's fixed mode.
`Buddy`
    powers of two that are split and merged. A sequence that outgrows its run gets one of twice the length: what it
    has and the other half beside it, if that is free, else one elsewhere. It is copied unless it already lies at
    the beginning of that.
"""

from typing import NamedTuple

import numpy as np

from kvcache._runs import BlockAllocator


class Run(NamedTuple):
    """Blocks ``[start, start + length)``."""

    start: int
    length: int


class RunStats(NamedTuple):
    """What a replay reads of `KVCache.stats`."""

    free_blocks: int
    fragmentation: float
    moves: int
    moved_tokens: int


class Reserve:
    """Runs as long as a request will ever need, from a `BlockAllocator`."""

    def __init__(self, num_blocks):
        self.widest = num_blocks
        self._allocator = BlockAllocator(num_blocks)

    @staticmethod
    def width(prompt_blocks, total_blocks):
        """Blocks that a request is given: all that it will ever need."""
        return total_blocks

    def allocate(self, blocks):
        """A run of so many blocks, or None where no gap is long enough."""
        return self._allocator.allocate(blocks)

    def grow(self, run):
        """None: nothing outgrows what it was given."""

    def free(self, run):
        """Give a run back."""
        self._allocator.free(run)

    @property
    def free_blocks(self):
        """Blocks in no run."""
        return self._allocator.free_blocks

    @property
    def largest_free_run(self):
        """Blocks of the longest gap."""
        return self._allocator.largest_free_run

    def check(self):
        """Walk the structure, and name what is wrong."""
        self._allocator.check()


class Buddy:
    """Runs of 1, 2, 4, ... blocks, each at a multiple of its length.

    A pool whose size is no power of two is the sum of several, largest first.
    """

    def __init__(self, num_blocks):
        self.widest = 1 << (num_blocks.bit_length() - 1)
        self._free = [
            set() for _ in range(num_blocks.bit_length())
        ]  # by order: starts of free runs of 2**order
        self.free_blocks = num_blocks
        start = 0
        for order in reversed(range(num_blocks.bit_length())):
            if num_blocks >> order & 1:
                self._free[order].add(start)
                start += 1 << order

    @staticmethod
    def width(prompt_blocks, total_blocks):
        """Blocks that a request is given: the power of two that holds its prompt."""
        return 1 << (prompt_blocks - 1).bit_length()

    def allocate(self, blocks):
        """A run of so many blocks, a power of two; None where no free run is as long."""
        order = blocks.bit_length() - 1
        fitting = next((each for each in range(order, len(self._free)) if self._free[each]), None)
        if fitting is None:
            return None
        start = min(self._free[fitting])
        self._free[fitting].remove(start)
        for half in reversed(range(order, fitting)):
            self._free[half].add(start + (1 << half))
        self.free_blocks -= blocks
        return Run(start, blocks)

    def grow(self, run):
        """A run of twice the length in place of this one, or None, and nothing has changed."""
        order, other_half = run.length.bit_length() - 1, run.start ^ run.length
        if other_half in self._free[order]:
            self._free[order].remove(other_half)
            self.free_blocks -= run.length
            return Run(min(run.start, other_half), 2 * run.length)
        wider = self.allocate(2 * run.length)
        if wider is not None:
            self.free(run)
        return wider

    def free(self, run):
        """Give a run back, and merge what can be merged."""
        start, order = run.start, run.length.bit_length() - 1
        self.free_blocks += run.length
        while (start ^ 1 << order) in self._free[order]:
            self._free[order].remove(start ^ 1 << order)
            start &= ~(1 << order)
            order += 1
        self._free[order].add(start)

    @property
    def largest_free_run(self):
        """Blocks of the longest free run that could be given out."""
        return max((1 << order for order, starts in enumerate(self._free) if starts), default=0)

    def check(self):
        """Walk the structure, and name what is wrong."""
        counted = sum(len(starts) << order for order, starts in enumerate(self._free))
        if counted != self.free_blocks:
            raise RuntimeError(f"free runs hold {counted} blocks, free_blocks says {self.free_blocks}")
        for order, starts in enumerate(self._free):
            for start in starts:
                if start & ((1 << order) - 1):
                    raise RuntimeError(f"a free run of {1 << order} blocks begins at {start}")
                if (start ^ 1 << order) in starts:
                    raise RuntimeError(f"free buddies of {1 << order} blocks at {start} were not merged")


class RunCache:
    """Sequences in runs of a rule, behind the calls of `KVCache` that a replay makes.

    Parameters
    ----------
    rule : Reserve or Buddy
    num_blocks, block_size : int
    """

    def __init__(self, rule, num_blocks, block_size):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.widest = rule.widest  # blocks of the longest run there can be
        self._rule = rule
        self._runs = {}  # request id -> its run
        self._places = {}  # request id -> its index in the two arrays
        self._vacant = []  # indices that nobody has
        self.tokens = np.zeros(0, np.int32)  # [places] held
        self.starts = np.zeros(0, np.int32)  # [places] first token of the run
        self.rooms = np.zeros(0, np.int32)  # [places] tokens that the run has room for
        self.moves = self.moved_tokens = 0

    def width(self, prompt, total):
        """Blocks that a prompt takes, of a request of so many tokens in the end."""
        return self._rule.width(self._blocks(prompt), self._blocks(total))

    def _blocks(self, tokens):
        return -(-tokens // self.block_size)

    def allocate_for(self, request_id, prompt, *, max_tokens):
        """True, or None when no run is long enough now."""
        run = self._rule.allocate(self.width(prompt, max_tokens))
        if run is None:
            return None
        if not self._vacant:
            self._widen()
        place = self._places[request_id] = self._vacant.pop()
        self.tokens[place] = prompt
        self._settle(request_id, run)
        return True

    def _widen(self):
        before = len(self.tokens)
        wider = np.zeros(max(16, before), np.int32)
        self.tokens, self.starts, self.rooms = (
            np.concatenate((column, wider)) for column in (self.tokens, self.starts, self.rooms)
        )
        self._vacant.extend(range(before, len(self.tokens)))

    def _settle(self, request_id, run):
        place = self._places[request_id]
        self._runs[request_id] = run
        self.starts[place] = run.start * self.block_size
        self.rooms[place] = run.length * self.block_size

    def append_token(self, request_id):
        """Room for one token more; False when there is none."""
        place, run = self._places[request_id], self._runs[request_id]
        if self.tokens[place] == self.rooms[place]:
            wider = self._rule.grow(run)
            if wider is None:
                return False
            if wider.start != run.start:
                self.moves += 1
                self.moved_tokens += int(self.tokens[place])
            self._settle(request_id, wider)
        self.tokens[place] += 1
        return True

    def free_for(self, request_id):
        """Give the run back."""
        self._vacant.append(self._places.pop(request_id))
        self._rule.free(self._runs.pop(request_id))
        return True

    def used_tokens(self, request_id):
        """Tokens that it holds."""
        return int(self.tokens[self._places[request_id]])

    def block_table(self, request_id):
        """Blocks that hold tokens, as `KVCache.block_table`."""
        start = self._runs[request_id].start
        return np.arange(start, start + self._blocks(self.used_tokens(request_id)), dtype=np.int32)

    def batch(self):
        """An empty batch."""
        return RunBatch(self, self._places)

    @property
    def free_blocks(self):
        """Blocks in no run."""
        return self._rule.free_blocks

    def stats(self):
        """A `RunStats`."""
        free, longest = self._rule.free_blocks, self._rule.largest_free_run
        return RunStats(free, 1 - longest / free if free else 0.0, self.moves, self.moved_tokens)

    def check(self):
        """Walk the structure, and name what is wrong."""
        self._rule.check()
        end = 0
        for request_id, run in sorted(self._runs.items(), key=lambda held: held[1].start):
            if run.start < end:
                raise RuntimeError(
                    f"the run of {request_id!r} begins at block {run.start}, one ends at {end}"
                )
            if self.used_tokens(request_id) > run.length * self.block_size:
                raise RuntimeError(f"{request_id!r} holds more tokens than its {run.length} blocks have")
            end = run.start + run.length
        held = sum(run.length for run in self._runs.values())
        if held + self.free_blocks != self.num_blocks:
            raise RuntimeError(f"{held} blocks held and {self.free_blocks} free, of {self.num_blocks}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        """Nothing to give back."""


class RunBatch:
    """Members of a `RunCache` that grow by a token each, as `DecodeBatch`."""

    def __init__(self, cache, places):
        self._cache = cache
        self._places_of = places
        self._ids = []
        self._places = np.empty(0, np.int64)

    def __len__(self):
        return len(self._ids)

    @property
    def lengths(self):
        """Tokens of each member."""
        return self._cache.tokens[self._places]

    @property
    def starts(self):
        """First token index of each member."""
        return self._cache.starts[self._places]

    def add(self, request_id):
        """A member more, at the end."""
        self._ids.append(request_id)
        self._places = np.append(self._places, self._places_of[request_id])

    def remove(self, request_id):
        """A member less, freed or not; the others keep their order."""
        index = self._ids.index(request_id)
        del self._ids[index]
        self._places = np.delete(self._places, index)

    def append(self):
        """One token for every member in batch order; a bool for each, who got it."""
        cache = self._cache
        got = cache.tokens[self._places] < cache.rooms[self._places]
        cache.tokens[self._places[got]] += 1
        for index in np.flatnonzero(~got):
            got[index] = cache.append_token(self._ids[index])
        return got
