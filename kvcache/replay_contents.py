"""Real bytes in a replay: every token is marked with who wrote it and where it belongs, and read again at the end."""

import numpy as np

from kvcache.replay_figures import ReplayFault

EXACT = (1 << 24) - 1  # float32 tells whole numbers up to here apart


class Contents:
    """Writes and compares the K/V of a replayed cache: K is the sequence's number, V the position, in all layers.

    With prefixes K is made of the token's id, since what is found was written by others; then only what was not found
    is written.

    Parameters
    ----------
    cache : KVCache
        Of float32.
    tokens : dict, optional
        With prefixes: the ids of each live sequence, prompt and what follows.
    """

    def __init__(self, cache, tokens=None):
        self.verified_tokens = 0
        self._tokens = tokens
        self._cache = cache
        self._layers = range(cache.spec.num_layers)
        self._shape = cache.spec.num_kv_heads, cache.spec.head_dim

    def prefill(self, number, found=0):
        """Write a prompt, but for its first tokens, which were found."""
        self._write(number, np.arange(found, self._cache.used_tokens(number)))

    def last_tokens(self, numbers):
        """Write the newest token of each sequence, one after the other."""
        for number in numbers:
            self._write(number, np.arange(self._cache.used_tokens(number))[-1:])

    def _marks(self, number, positions):
        """K of a sequence at some positions."""
        if self._tokens is None:
            return np.full(len(positions), number, np.float32)
        return (self._tokens[number][positions] & EXACT).astype(np.float32)

    def _write(self, number, positions):
        heads, width = self._shape
        k = np.broadcast_to(self._marks(number, positions)[None, :, None], (heads, len(positions), width))
        v = np.broadcast_to(positions.astype(np.float32)[None, :, None], k.shape)
        for layer in self._layers:
            self._cache.write(number, layer, k, v)

    def step(self, batch, numbers):
        """Write the tokens of an append that everybody got."""
        shape = (len(batch), *self._shape)
        positions = batch.positions
        marks = [self._marks(*each)[0] for each in zip(numbers, positions[:, None], strict=True)]
        k = np.broadcast_to(np.array(marks)[:, None, None], shape)
        v = np.broadcast_to(positions.astype(np.float32)[:, None, None], shape)
        for layer in self._layers:
            batch.write(layer, k, v)

    def verify(self, number):
        """Read a whole sequence.

        Raises
        ------
        ReplayFault
            It is not what was written.
        """
        tokens = self._cache.used_tokens(number)
        marks = self._marks(number, np.arange(tokens))[None, :, None]
        positions = np.arange(tokens, dtype=np.float32)[None, :, None]
        for layer in self._layers:
            for view, expected in zip(
                self._cache.get_kv_views(number, layer), (marks, positions), strict=True
            ):
                wrong = np.flatnonzero((np.asarray(view) != expected).any(axis=(0, 2)))
                if len(wrong):
                    raise ReplayFault(
                        f"layer {layer} of request {number} is not what was written, "
                        f"from position {wrong[0]} of {tokens} on"
                    )
        self.verified_tokens += tokens
