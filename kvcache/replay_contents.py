"""Real bytes in a replay: every token is marked with who wrote it and where it belongs, and read again at the end."""

import numpy as np

from kvcache.replay_figures import ReplayFault


class Contents:
    """Writes and compares the K/V of a replayed cache: K is the sequence's number, V the position, in all layers.

    Parameters
    ----------
    cache : KVCache
        Of float32, which tells numbers up to 2**24 apart.
    """

    def __init__(self, cache):
        self.verified_tokens = 0
        self._cache = cache
        self._layers = range(cache.spec.num_layers)
        self._shape = cache.spec.num_kv_heads, cache.spec.head_dim

    def prefill(self, number):
        """Write the whole of a prompt."""
        self._write(number, np.arange(self._cache.used_tokens(number)))

    def last_tokens(self, numbers):
        """Write the newest token of each sequence, one after the other."""
        for number in numbers:
            self._write(number, np.arange(self._cache.used_tokens(number))[-1:])

    def _write(self, number, positions):
        heads, width = self._shape
        k = np.full((heads, len(positions), width), number, np.float32)
        v = np.broadcast_to(positions.astype(np.float32)[None, :, None], k.shape)
        for layer in self._layers:
            self._cache.write(number, layer, k, v)

    def step(self, batch, numbers):
        """Write the tokens of an append that everybody got."""
        shape = (len(batch), *self._shape)
        k = np.broadcast_to(np.fromiter(numbers, np.float32, len(batch))[:, None, None], shape)
        v = np.broadcast_to(batch.positions.astype(np.float32)[:, None, None], shape)
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
        positions = np.arange(tokens, dtype=np.float32)[None, :, None]
        for layer in self._layers:
            for view, expected in zip(
                self._cache.get_kv_views(number, layer), (number, positions), strict=True
            ):
                wrong = np.flatnonzero((np.asarray(view) != expected).any(axis=(0, 2)))
                if len(wrong):
                    raise ReplayFault(
                        f"layer {layer} of request {number} is not what was written, "
                        f"from position {wrong[0]} of {tokens} on"
                    )
        self.verified_tokens += tokens
