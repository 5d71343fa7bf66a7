"""Decoding out of one arena beside mlx-lm's own way: a buffer per sequence and layer, grown by concatenation.

A fixed number of sequences lives in every step; whoever ends is replaced by the next request. Both sides get the same
sequences, the same K and V and the same queries, in turns.
"""

import math
import statistics
from time import perf_counter

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache as PlainCache
from traffic import BLOCK, Rows, blocks_of, chat

from kvcache import KVCache
from kvcache._copy import address

LONGEST = 4096  # tokens of a sequence
KEEP_FREE = 0.05  # of the arena, in the fullest step; and for the count of moves also
KEEP_MORE_FREE = 0.10
SETTLE = 4  # steps before the clock counts


class Schedule:
    """Who lives in which step.

    Attributes
    ----------
    ends : list of list of int
        Numbers that leave before each step.
    enters : list of list of (int, int)
        (number, tokens of the prompt) that come before each step; the first are in the middle of their lives.
    fullest : int
        Blocks held in the fullest step.
    live_tokens : int
        Tokens in the fullest step.
    """

    def __init__(self, sequences, steps, longest=LONGEST, seed=0):
        requests, draw = chat(longest, seed), np.random.default_rng(seed)
        self.ends, self.enters, self.fullest, self.live_tokens = [], [], 0, 0
        tokens, left = {}, {}
        for step in range(steps):
            self.ends.append([number for number, more in left.items() if more == 0])
            for number in self.ends[-1]:
                del tokens[number], left[number]
            self.enters.append([])
            while len(left) < sequences:
                number, prompt, output = next(requests)
                age = int(draw.integers(output)) if step == 0 else 0
                tokens[number], left[number] = prompt + age, output - age
                self.enters[-1].append((number, tokens[number]))
            for number in left:
                tokens[number] += 1
                left[number] -= 1
            self.fullest = max(self.fullest, sum(map(blocks_of, tokens.values())))
            self.live_tokens = max(self.live_tokens, sum(tokens.values()))

    def arena_tokens(self, keep_free=KEEP_FREE):
        """Of an arena of which the fullest step leaves so much free."""
        return math.ceil(self.fullest / (1 - keep_free)) * BLOCK


def attended(query, keys, values):
    """The attention of one sequence, or, without a query, what it would read."""
    if query is None:
        return keys, values
    return mx.fast.scaled_dot_product_attention(query, keys, values, scale=query.shape[-1] ** -0.5)


class Ours:
    """All sequences in one arena, each a run of it."""

    def __init__(self, shape, schedule):
        self.layers = range(shape.layers)
        full = (shape.layers, shape.kv_heads, shape.head_dim, schedule.arena_tokens(), BLOCK)
        self.cache = KVCache(*full, backend="mlx", overcommit=math.inf)
        self.batch = self.cache.batch()

    def leave(self, number):
        self.batch.remove(number)
        self.cache.free_for(number)

    def enter(self, number, tokens):
        """Place a sequence, by moves if it must."""
        assert self.cache.allocate_for(number, tokens, max_tokens=self.cache.spec.max_total_tokens)
        self.batch.add(number)

    def prefill(self, number, keys, values):
        for layer in self.layers:
            self.cache.write(number, layer, keys, values)

    def step(self, keys, values, queries):
        assert self.batch.append().all()
        results = []
        for layer in self.layers:
            self.batch.write(layer, keys, values)
            for number, query in zip(self.batch, queries, strict=True):
                k, v = self.cache.get_kv_views(number, layer)
                results.append(attended(query, k[None], v[None]))
        mx.eval(results)
        return results

    @property
    def copied_bytes(self):
        return self.cache.stats().moved_bytes


class Theirs:
    """mlx-lm's `KVCache`, one for each sequence and layer."""

    def __init__(self, shape):
        self.layers = range(shape.layers)
        self.caches = {}  # number -> a cache a layer, in the order of the batch

    def leave(self, number):
        del self.caches[number]

    def enter(self, number, tokens):
        self.caches[number] = [PlainCache() for _ in self.layers]

    def prefill(self, number, keys, values):
        for cache in self.caches[number]:
            mx.eval(cache.update_and_fetch(mx.array(keys[None]), mx.array(values[None])))

    def step(self, keys, values, queries):
        results = []
        for layer in self.layers:
            for place, (caches, query) in enumerate(zip(self.caches.values(), queries, strict=True)):
                new = keys[place, None, :, None], values[place, None, :, None]
                results.append(attended(query, *caches[layer].update_and_fetch(*new)))
        mx.eval(results)
        return results

    def buffers(self):
        """(address, bytes of the tokens in it) of every buffer."""
        each = [cache for caches in self.caches.values() for cache in caches]
        return [
            (address(buffer), buffer.nbytes // buffer.shape[2] * cache.offset)
            for cache in each
            for buffer in (cache.keys, cache.values)
        ]

    def due_bytes(self):
        """Bytes that growing copies in the next step, by the shapes: all tokens of each buffer that is full."""
        return sum(
            buffer.nbytes
            for caches in self.caches.values()
            for cache in caches
            for buffer in (cache.keys, cache.values)
            if cache.offset == buffer.shape[2]
        )


class Growth:
    """Bytes that mlx-lm's caches copy: as their shapes say, and as seen where buffers have come to lie elsewhere."""

    def __init__(self, theirs):
        self.theirs, self.computed, self.seen = theirs, 0, 0

    def before_step(self):
        self.computed += self.theirs.due_bytes()
        self.before = self.theirs.buffers()

    def after_step(self):
        pairs = zip(self.before, self.theirs.buffers(), strict=True)
        self.seen += sum(size for (old, size), (new, _) in pairs if old != new)


def turn_over(side, schedule, step, rows):
    """Ends and newcomers before a step; seconds of placing them, without writing their prompts."""
    seconds = 0.0
    for number in schedule.ends[step]:
        side.leave(number)
    for number, tokens in schedule.enters[step]:
        began = perf_counter()
        side.enter(number, tokens)
        seconds += perf_counter() - began
        side.prefill(number, *rows.span(number, 0, tokens))
    return seconds


class Race:
    """Both sides, step by step, in turns: who goes first changes with every step."""

    def __init__(self, shape, schedule):
        self.shape, self.schedule, self.rows = shape, schedule, Rows(shape, LONGEST)
        self.ours, self.theirs = Ours(shape, schedule), Theirs(shape)
        self.growth = Growth(self.theirs)
        self.seconds = {"update": ([], []), "attend": ([], [])}

    def step(self, number, attends, check):
        keys, values, queries = self.inputs(number, attends)
        spent, results = [0.0, 0.0], [None, None]
        sides = list(enumerate((self.ours, self.theirs)))
        for place, side in sides[:: -1 if number % 2 else 1]:
            spent[place] = turn_over(side, self.schedule, number, self.rows)
            if side is self.theirs:
                self.growth.before_step()
            began = perf_counter()
            results[place] = side.step(keys, values, queries)
            spent[place] += perf_counter() - began
        if check:
            self.compare(*results)
        results.clear()  # nobody holds a buffer: updates are in place
        self.growth.after_step()
        if number >= SETTLE:
            for seconds, took in zip(self.seconds["attend" if attends else "update"], spent, strict=True):
                seconds.append(took)

    def inputs(self, number, attends):
        """K, V and queries of a step, evaluated; a query is None where attention is left out."""
        gone, new = self.schedule.ends[number], self.schedule.enters[number]
        members = [each for each in self.theirs.caches if each not in set(gone)]
        lengths = [self.theirs.caches[each][0].offset for each in members] + [tokens for _, tokens in new]
        keys, values = map(mx.array, self.rows.tokens(members + [each for each, _ in new], lengths))
        queries = [None] * len(lengths)
        if attends:
            size = (1, self.shape.query_heads, 1, self.shape.head_dim)
            queries = [mx.random.normal(size) for _ in lengths]
        mx.eval(keys, values, [query for query in queries if query is not None])
        return keys, values, queries

    def compare(self, ours, theirs):
        """Attention alike within rounding; K and V alike to the last bit."""
        assert list(self.ours.batch) == list(self.theirs.caches)
        for mine, other in zip(ours, theirs, strict=True):
            if isinstance(mine, tuple):
                assert all(mx.array_equal(one, two) for one, two in zip(mine, other, strict=True))
            else:
                assert mx.allclose(mine, other, rtol=1e-3, atol=1e-5)


def race(shape, sequences, steps, attend_every, tell=None):
    """Both ways at so many live sequences.

    Parameters
    ----------
    shape : Shape
    sequences, steps : int
    attend_every : int
        Attention is computed too in one step in so many; the others update the caches only.
    tell : callable, optional
        Called with each step's number.

    Returns
    -------
    dict
        Bytes copied a generated token, and steps a second by the medians.
    """
    schedule = Schedule(sequences, steps)
    run = Race(shape, schedule)
    for step in range(steps):
        attends = step % attend_every == attend_every - 1
        run.step(step, attends, check=step < 2 or step in (attend_every - 1, 2 * attend_every - 1))
        if step == 0:  # everybody enters at once: no step of a server
            filling, run.growth = run.ours.copied_bytes, Growth(run.theirs)
        if tell:
            tell(step)
    run.ours.cache.check()
    generated, stats = sequences * (steps - 1), run.ours.cache.stats()
    return {
        "sequences": sequences,
        "layers": shape.layers,
        "steps": steps,
        "arena_tokens": schedule.arena_tokens(),
        "arena_copies": stats.arena_copies,
        "token_bytes": shape.token_bytes,
        "ours_copied_per_token": (stats.moved_bytes - filling) / generated,
        "ours_copied_per_token_more_free": moved_tokens(schedule, KEEP_MORE_FREE)
        * shape.token_bytes
        / generated,
        "theirs_copied_per_token": run.growth.seen / generated,
        "theirs_computed_per_token": run.growth.computed / generated,
        **rates(run.seconds),
    }


def rates(seconds):
    """Steps a second by the medians, and how many times as many ours are."""
    found = {}
    for what, both in seconds.items():
        for side, each in zip(("ours", "theirs"), both, strict=True):
            found[f"{side}_{what}_steps_per_second"] = 1 / statistics.median(each)
        found[f"{what}_ratio"] = statistics.median([b / a for a, b in zip(*both, strict=True)])
        found[f"{what}_ratio_of_sums"] = sum(both[1]) / sum(both[0])
    return found


def moved_tokens(schedule, keep_free):
    """What a cache without storage moves after the first step, to which the same happens in another arena."""
    tokens = schedule.arena_tokens(keep_free)
    cache = KVCache(1, 1, 1, tokens, BLOCK, backend="none", overcommit=math.inf)
    batch, filling = cache.batch(), None
    for ends, enters in zip(schedule.ends, schedule.enters, strict=True):
        for number in ends:
            batch.remove(number)
            cache.free_for(number)
        for number, prompt in enters:
            assert cache.allocate_for(number, prompt, max_tokens=cache.spec.max_total_tokens)
            batch.add(number)
        assert batch.append().all()
        filling = cache.stats().moved_tokens if filling is None else filling
    return cache.stats().moved_tokens - filling


def peak(side, shape, sequences, steps):
    """MLX's peak memory of one side, alone in its process: bytes, and those of the tokens in the fullest step."""
    schedule, rows = Schedule(sequences, steps), Rows(shape, LONGEST)
    mx.reset_peak_memory()
    running = Ours(shape, schedule) if side == "ours" else Theirs(shape)
    lengths = {}
    for step in range(steps):
        turn_over(running, schedule, step, rows)
        for number in schedule.ends[step]:
            del lengths[number]
        lengths.update(schedule.enters[step])
        keys, values = map(mx.array, rows.tokens(list(lengths), list(lengths.values())))
        running.step(keys, values, [None] * len(lengths))
        lengths = {number: tokens + 1 for number, tokens in lengths.items()}
    return {
        "peak_bytes": mx.get_peak_memory(),
        "kept_bytes": mx.get_cache_memory(),
        "live_bytes": schedule.live_tokens * shape.token_bytes,
    }
