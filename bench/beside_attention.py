"""What moves cost beside attention: real bytes in an arena that a queue keeps full, step by step.

A second cache without storage is fed the same calls; what the calls of the first take longer is the bytes. Attention
is timed in a sample of the steps, over all live sequences in all layers, in MLX and in NumPy.
"""

import math
from dataclasses import dataclass, field
from time import perf_counter

import mlx.core as mx
import numpy as np
from traffic import BLOCK, Rows, blocks_of, chat

from kvcache import KVCache

CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # of two float32 attentions that add up in different orders


class Clocked:
    """A cache and the batch of all that live in it, with a clock around the calls that may move."""

    def __init__(self, cache):
        self.cache, self.batch, self.seconds = cache, cache.batch(), 0.0

    def admit(self, number, prompt, limit):
        began = perf_counter()
        granted = self.cache.allocate_for(number, prompt, max_tokens=limit) is not None
        self.seconds += perf_counter() - began
        if granted:
            self.batch.add(number)
        return granted

    def append(self):
        began = perf_counter()
        got = self.batch.append()
        self.seconds += perf_counter() - began
        return got

    def free(self, number):
        self.batch.remove(number)
        self.cache.free_for(number)


class Saturated:
    """A server whose queue is never empty. It does not know how long a sequence will be.

    Requests are admitted in order while blocks held are at most ``1 - keep_free`` of all. A sequence that is refused
    a token waits for the next step, and the youngest goes back to the queue.
    """

    def __init__(self, shape, tokens, keep_free, seed):
        self.tokens, self.num_blocks = tokens, tokens // BLOCK
        self.most_blocks = math.floor((1 - keep_free) * self.num_blocks)
        self.layers = range(shape.layers)
        self.rows = Rows(shape, tokens)
        self.queue, self.returned = chat(tokens // 4, seed), []
        self.head = next(self.queue)
        self.left = {}  # number -> tokens that it still generates; in the order of admission
        full = (shape.layers, shape.kv_heads, shape.head_dim, tokens, BLOCK)
        self.real = Clocked(KVCache(*full, backend="mlx", overcommit=math.inf))
        self.books = Clocked(KVCache(1, 1, 1, tokens, BLOCK, backend="none", overcommit=math.inf))

    def step(self):
        """Admissions, a token for everybody, and the ends; both caches agree on all of it."""
        for number in [number for number, left in self.left.items() if left == 0]:
            self.free(number)
        while blocks_of(self.head[1]) + self.held <= self.most_blocks and self.admit(*self.head):
            self.head = self.returned.pop() if self.returned else next(self.queue)
        got = self.real.append()
        assert np.array_equal(got, self.books.append())
        assert np.array_equal(self.real.batch.starts, self.books.batch.starts)
        members, positions = np.array(list(self.left)), self.real.batch.lengths - 1
        keys, values = self.rows.tokens(members, positions)
        for layer in self.layers:
            self.real.batch.write(layer, keys, values)
        for number in members[got].tolist():
            self.left[number] -= 1
        if not got.all():
            self.preempt(int(members[-1]))

    @property
    def held(self):
        return self.num_blocks - self.real.cache.free_blocks

    def admit(self, number, prompt, output):
        granted = self.real.admit(number, prompt, self.tokens)
        assert granted == self.books.admit(number, prompt, self.tokens)
        if granted:
            self.left[number] = output
            for layer in self.layers:
                self.real.cache.write(number, layer, *self.rows.span(number, 0, prompt))
        return granted

    def free(self, number):
        del self.left[number]
        self.real.free(number)
        self.books.free(number)

    def preempt(self, number):
        self.returned.append(self.head)
        self.head = (number, self.real.cache.used_tokens(number), self.left[number])
        self.free(number)

    def verify(self):
        """Every token of everybody is what was written, in all layers.

        Raises
        ------
        AssertionError
        """
        for number in self.left:
            expected = self.rows.span(number, 0, self.real.cache.used_tokens(number))
            for layer in self.layers:
                for view, written in zip(self.real.cache.get_kv_views(number, layer), expected, strict=True):
                    assert np.array_equal(np.asarray(view), written), (number, layer)


class Attention:
    """One query of every live sequence in every layer, on views of the arena."""

    def __init__(self, cache, shape):
        self.cache, self.shape = cache, shape
        self.scale = shape.head_dim**-0.5
        self.planes = [
            [np.asarray(memoryview(plane)) for plane in layer.values()] for layer in cache.arena.planes
        ]

    def queries(self, count):
        queries = np.random.default_rng(count).standard_normal(
            (count, self.shape.query_heads, self.shape.head_dim), np.float32
        )
        on_device = [mx.array(query[None, :, None]) for query in queries]
        mx.eval(on_device)
        return queries, on_device

    def in_mlx(self, numbers, queries):
        outputs = [
            mx.fast.scaled_dot_product_attention(query, keys[None], values[None], scale=self.scale)
            for layer in range(self.shape.layers)
            for number, query in zip(numbers, queries, strict=True)
            for keys, values in [self.cache.get_kv_views(number, layer)]
        ]
        mx.eval(outputs)
        return outputs

    def in_numpy(self, spans, queries):
        return [
            self.of_one(query, keys[:, start:stop], values[:, start:stop])
            for keys, values in self.planes
            for (start, stop), query in zip(spans, queries, strict=True)
        ]

    def of_one(self, query, keys, values):
        grouped = query.reshape(self.shape.kv_heads, -1, self.shape.head_dim) * np.float32(self.scale)
        scores = grouped @ keys.swapaxes(1, 2)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return (weights @ values / weights.sum(axis=-1, keepdims=True)).reshape(query.shape)


@dataclass
class Sample:
    """Seconds of attention in the steps in which it was computed."""

    mlx: list = field(default_factory=list)
    numpy: list = field(default_factory=list)

    def take(self, server, attention, check):
        batch = server.real.batch
        spans = [
            (int(start), int(start + length))
            for start, length in zip(batch.starts, batch.lengths, strict=True)
        ]
        queries, on_device = attention.queries(len(spans))
        began = perf_counter()
        theirs = attention.in_mlx(list(batch), on_device)
        between = perf_counter()
        ours = attention.in_numpy(spans, queries)
        self.numpy.append(perf_counter() - between)
        self.mlx.append(between - began)
        if check:
            server.verify()
            for one, other in zip(theirs, ours, strict=True):
                assert np.allclose(np.asarray(one)[0, :, 0], other, **CLOSE)


def measure(shape, tokens, keep_free, steps, every, seed=0, tell=None):
    """Serve until the arena has been full for a while, then `steps` steps more.

    Parameters
    ----------
    shape : Shape
    tokens : int
        Of the arena.
    keep_free : float
    steps, every : int
        Attention is computed in one step in `every`.
    tell : callable, optional
        Called with each step's number.

    Returns
    -------
    dict
        Counts, shares, and milliseconds a step.
    """
    server = Saturated(shape, tokens, keep_free, seed)
    for _ in range(steps // 2):
        server.step()
    attention, sample = Attention(server.real.cache, shape), Sample()
    before = server.real.cache.stats()
    server.real.seconds = server.books.seconds = 0.0
    attended = sequences = 0
    for step in range(steps):
        server.step()
        attended += int(server.real.batch.lengths.sum())
        sequences += len(server.left)
        if step % every == 0:
            sample.take(server, attention, check=step in (0, every))
        if tell:
            tell(step)
    after = server.real.cache.stats()
    server.verify()
    server.real.cache.check()
    return {
        "keep_free": keep_free,
        "tokens": tokens,
        "layers": shape.layers,
        "steps": steps,
        "sampled_steps": len(sample.mlx),
        "mean_sequences": sequences / steps,
        "utilization": attended / steps / tokens,
        "moves": after.moves - before.moves,
        "moved_bytes": after.moved_bytes - before.moved_bytes,
        "moved_over_attended": (after.moved_tokens - before.moved_tokens) / attended,
        **times(server, sample, steps),
    }


def times(server, sample, steps):
    """Milliseconds a step, and what share of attention moves are."""
    calls, books = server.real.seconds / steps * 1e3, server.books.seconds / steps * 1e3
    in_mlx, in_numpy = (float(np.mean(each)) * 1e3 for each in (sample.mlx, sample.numpy))
    return {
        "calls_ms": calls,
        "books_ms": books,
        "moves_ms": calls - books,
        "mlx_attention_ms": in_mlx,
        "numpy_attention_ms": in_numpy,
        "moves_over_mlx_attention": (calls - books) / in_mlx,
        "moves_over_numpy_attention": (calls - books) / in_numpy,
    }
