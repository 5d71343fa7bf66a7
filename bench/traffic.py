"""Chat traffic with K and V for the benchmarks that move real bytes."""

from dataclasses import dataclass
from itertools import count

import numpy as np

from kvcache.workloads import WORKLOADS

BLOCK = 16
SPREAD = 97  # sequences that differ; later ones repeat them


@dataclass(frozen=True)
class Shape:
    """Of a model's attention; of Llama-3.2-1B's, unless said otherwise."""

    layers: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    query_heads: int = 32

    @property
    def token_bytes(self):
        """K and V of one token in all layers, float32."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 4


def blocks_of(tokens):
    return -(-tokens // BLOCK)


def chat(longest, seed):
    """Endless (number, prompt tokens, output tokens) of requests no longer than `longest`, as they come."""
    numbers = count()
    while True:
        trace = WORKLOADS["chat"].make("chat", seed, 4096)
        seed += 1
        for prompt, output in zip(trace.prompts.tolist(), trace.outputs.tolist(), strict=True):
            if prompt + output <= longest:
                yield next(numbers), prompt, output


class Rows:
    """K and V of any token of any sequence: windows of two random arrays, so that they can be had again.

    Parameters
    ----------
    shape : Shape
    longest : int
        Tokens of a sequence, at most.
    """

    def __init__(self, shape, longest):
        rng = np.random.default_rng(11)
        size = (shape.kv_heads, longest + SPREAD, shape.head_dim)
        self._keys, self._values = (rng.standard_normal(size, np.float32) for _ in range(2))

    def span(self, number, start, stop):
        """Positions [start, stop) of one sequence, ``(kv_heads, stop - start, head_dim)`` each."""
        first = number % SPREAD
        window = slice(first + start, first + stop)
        return self._keys[:, window], self._values[:, window]

    def tokens(self, numbers, positions):
        """A token of each sequence, ``(len(numbers), kv_heads, head_dim)`` each."""
        places = np.asarray(numbers) % SPREAD + positions
        return self._keys[:, places].swapaxes(0, 1), self._values[:, places].swapaxes(0, 1)
