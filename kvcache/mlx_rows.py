"""Sequences of a `KVCache` as mlx-lm's cache of a batch, one row per token. Needs mlx, but not mlx-lm."""

import itertools

import mlx.core as mx

from .errors import KVCacheError
from .mlx_sequence import causal_mask, num_layers_of


class UnsupportedModel(KVCacheError, TypeError):
    """The model does something with its cache that this package cannot serve; the message says what."""


class BatchCache:
    """Many sequences as mlx-lm's cache, one row per new token, no padding.

    Before each step, `append` gives the members room. Then the model is called with ids of shape ``(rows,
    1)``, one row per granted token in batch order, and ``cache=batch.layers``, inside `routed_attention`.
    Each layer writes all rows in one scatter, and each sequence attends over its own zero-copy view.

    Parameters
    ----------
    cache : KVCache
        Of ``backend="mlx"``, with as many layers as the model.
    request_ids : iterable
        Live sequences whose K and V are written up to their last token.

    Attributes
    ----------
    batch : DecodeBatch
        The members. Change membership here (`add`, `remove`, `reorder`), not there.
    request_ids : list
        The members' ids, in batch order.
    layers : list of RowCache
        What the model takes as ``cache``, one per layer.

    Examples
    --------
    One step, each member's last token in, its next one out::

        rows.append()
        with routed_attention(), cache.hold():
            logits = model(tokens[:, None], cache=rows.layers)
            mx.eval(logits)

    Notes
    -----
    A model that computes on K, V or the mask between its cache and its attention (gemma2, deepseek_v3 and
    others) raises `UnsupportedModel`. Serve it one sequence at a time, by `prompt_cache`.
    """

    def __init__(self, cache, request_ids=()):
        num_layers = num_layers_of(cache)
        self.cache = cache
        self.request_ids = list(request_ids)
        self.batch = cache.batch(self.request_ids)
        self.layers = [RowCache(self, layer) for layer in range(num_layers)]

    def add(self, request_id):
        """Make a live sequence the last member."""
        self.batch.add(request_id)
        self.request_ids.append(request_id)

    def remove(self, request_id):
        """Take a member out, freed or not; the others keep their order."""
        self.batch.remove(request_id)
        self.request_ids.remove(request_id)

    def reorder(self, indices):
        """Keep the members at these places, in this order; see `DecodeBatch.reorder`."""
        self.batch.reorder(indices)
        self.request_ids = [self.request_ids[index] for index in indices]

    def append(self, tokens=None, counts=1):
        """Room for the next step, see `DecodeBatch.append`; members refused have no row in it.

        Returns
        -------
        numpy.ndarray of bool
            Who got all of their tokens.
        """
        return self.batch.append(tokens, counts)

    def attend(self, layer, queries, scale, window, sinks):
        """Attention of all rows ``(rows, heads, 1, head_dim)``, each member's over its own view."""
        splits = self.batch.splits.tolist()
        if queries.shape[0] != splits[-1] or queries.shape[2] != 1:
            rows, _, tokens, _ = queries.shape
            raise ValueError(f"the model has {rows} rows of {tokens} tokens, the step {splits[-1]} rows of 1")
        outputs = []
        for request_id, (start, stop) in zip(self.request_ids, itertools.pairwise(splits), strict=True):
            if start == stop:
                continue
            k, v = self.cache.get_kv_views(request_id, layer)
            outputs.append(_attend_one(queries[start:stop], k, v, scale, window, sinks))
        return mx.concatenate(outputs)


def _attend_one(queries, k, v, scale, window, sinks):
    """Attention of one sequence's rows, ``(n, heads, 1, head_dim)``, over its views."""
    n, tokens = queries.shape[0], k.shape[1]
    mask = None if n == 1 else "causal"  # MLX aligns it at the last token
    if window is not None and tokens > window:
        if n == 1:
            k, v = k[:, -window:], v[:, -window:]
        else:
            mask = causal_mask(n, tokens, window)
    output = mx.fast.scaled_dot_product_attention(
        queries.transpose(2, 1, 0, 3), k[None], v[None], scale=scale, mask=mask, sinks=sinks
    )
    return output.transpose(2, 1, 0, 3)


class RowCache:
    """One layer of a `BatchCache`."""

    def __init__(self, rows, layer):
        self._rows = rows
        self._layer = layer

    @property
    def offset(self):
        """Each row's position in its sequence, an int32 array: what RoPE wants."""
        return self._rows.batch.device_positions

    def update_and_fetch(self, keys, values):
        """Write ``(rows, num_kv_heads, 1, head_dim)``; what it returns only `routed_attention` can read."""
        self._rows.batch.write(self._layer, keys[:, :, 0], values[:, :, 0])
        return self.keys_and_values()

    def keys_and_values(self):
        """K and V of the layer, for `routed_attention`."""
        return RowKeys(self._rows, self._layer), Opaque("V")

    def make_mask(self, N, return_array=False, window_size=None):  # noqa: N803 (mlx-lm's name)
        """The window, for `routed_attention`."""
        return RowMask(window_size)

    @property
    def state(self):
        """Nothing: K and V are evaluated with the attention that reads them."""
        return ()

    def is_trimmable(self):
        """Whether mlx-lm may trim: no, `DecodeBatch.truncate` does it for each member."""
        return False


class Opaque:
    """Stands for an array in a batch without padding; computing on it is an error, never a wrong number."""

    def __init__(self, what):
        self._what = what

    def _refuse(self, *_):
        raise UnsupportedModel(
            f"this model computes on {self._what} between its cache and its attention, and a batch without "
            "padding has no one array for that: serve it one sequence at a time, with prompt_cache"
        )

    def __getattr__(self, name):
        self._refuse()

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __matmul__ = __rmatmul__ = __and__ = __rand__ = __or__ = __ror__ = __invert__ = __neg__ = _refuse


class RowKeys(Opaque):
    """K of a layer of a `BatchCache`: leads the attention back to it."""

    def __init__(self, rows, layer):
        super().__init__("K")
        self.rows = rows
        self.layer = layer


class RowMask(Opaque):
    """The mask of a layer of a `BatchCache`: causal, and perhaps windowed."""

    def __init__(self, window):
        super().__init__("the mask")
        self.window = window
