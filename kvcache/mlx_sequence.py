"""One sequence of a `KVCache` as mlx-lm's cache objects, one per layer. Needs mlx, but not mlx-lm."""

import itertools
import math
import weakref

import mlx.core as mx

from .errors import CacheFull


class LimitReached(CacheFull):
    """A model wrote past the limit of its sequence; nothing has been written.

    Attributes
    ----------
    request_id : hashable
    tokens, limit : int
        Tokens that the sequence would have had, and may have.
    blocks_needed, blocks_available : int
        As in `CacheFull`; `blocks_available` counts those that the limit allows.
    """

    def __init__(self, *, request_id, tokens, limit, blocks_needed, blocks_available):
        super().__init__(blocks_needed=blocks_needed, blocks_available=blocks_available)
        self.args = (
            f"sequence {request_id!r} may have {limit} tokens, the model would write {tokens}: "
            "admit it with a larger max_new_tokens, or raise its limit with set_limit",
        )
        self.request_id = request_id
        self.tokens = tokens
        self.limit = limit


def prompt_cache(cache, request_id, *, cached_tokens=0):
    """One sequence as mlx-lm's `prompt_cache`.

    Good for `mlx_lm.generate.generate_step`, `stream_generate` and `speculative_generate_step` as they are.
    The model writes into the arena, and attends over views of it.

    Parameters
    ----------
    cache : KVCache
        Of ``backend="mlx"``, with as many layers as the model; `cache_for` makes one.
    request_id : hashable
        A live sequence. Admit it with ``max_new_tokens`` of at least the ``max_tokens`` of the generation:
        mlx-lm computes one step more than it yields.
    cached_tokens : int
        Tokens whose K and V are in place: `Allocation.cached_tokens` of a prompt with a known prefix or of a
        fork. Give mlx-lm the rest of the prompt only; what is given again is computed again.

    Returns
    -------
    list of LayerCache
        One per layer. ``copy.deepcopy`` of the list forks the sequence.

    Raises
    ------
    UnknownSequence
        `request_id` is not live.
    ValueError
        The cache does not hold K and V in MLX arrays, or `cached_tokens` is more than the sequence has.

    Notes
    -----
    The sequence grows as the model writes, by tokens that are only counted. ``cache.set_tokens(request_id,
    answer)`` names them, so that a later prompt that repeats the answer finds it.

    mlx-lm's loops know nothing of `KVCache.hold`: while one of them runs, only its own thread may make calls
    that move K and V. Who shares a cache between threads builds each step inside a hold, as `Decoder` does.
    """
    num_layers = num_layers_of(cache)
    used = cache.used_tokens(request_id)
    if not 0 <= cached_tokens <= used:
        raise ValueError(f"cached_tokens is {cached_tokens}, the sequence has {used} tokens")
    sequence = Sequence(cache, request_id)
    return [LayerCache(sequence, layer, cached_tokens) for layer in range(num_layers)]


class Sequence:
    """What the layers of one prompt cache share: a sequence, by its id."""

    _copies = itertools.count(1)

    def __init__(self, cache, request_id):
        self.cache = cache
        self.request_id = request_id

    def __deepcopy__(self, memo):
        new_id = f"{self.request_id} (copy {next(self._copies)})"
        if self.cache.fork(self.request_id, new_id) is None:
            needed = math.ceil(self.cache.limit(self.request_id) / self.cache.spec.block_size)
            raise CacheFull(blocks_needed=needed, blocks_available=self._unclaimed())
        copied = Sequence(self.cache, new_id)
        # Whoever frees the copy by its id comes first; ids of copies are never used again.
        weakref.finalize(copied, self.cache.free_for, new_id).atexit = False
        return copied

    def grow_to(self, num_tokens):
        """Make room for tokens that the sequence does not have yet; `CacheFull` if it is refused."""
        missing = num_tokens - self.cache.used_tokens(self.request_id)
        if missing > 0 and not self.cache.append_tokens(self.request_id, missing):
            raise self.refusal(num_tokens)

    def refusal(self, num_tokens):
        """Why the sequence cannot grow to that many tokens."""
        size = self.cache.spec.block_size
        held = self.cache.capacity(self.request_id) // size
        needed = math.ceil(num_tokens / size) - held
        limit = self.cache.limit(self.request_id)
        if num_tokens <= limit:
            return CacheFull(blocks_needed=needed, blocks_available=self._unclaimed())
        return LimitReached(
            request_id=self.request_id,
            tokens=num_tokens,
            limit=limit,
            blocks_needed=needed,
            blocks_available=math.ceil(limit / size) - held,
        )

    def cut_to(self, num_tokens):
        """Forget what comes after that many tokens; `CacheFull` if it is refused."""
        if not self.cache.truncate(self.request_id, num_tokens):
            raise CacheFull(blocks_needed=1, blocks_available=self._unclaimed())

    def _unclaimed(self):
        stats = self.cache.stats()
        return max(0, stats.free_blocks - stats.claimed_blocks)


class LayerCache:
    """One layer of one sequence, with the methods that mlx-lm asks of a cache. Made by `prompt_cache`.

    Attributes
    ----------
    offset : int
        Tokens written in this layer; fewer than `KVCache.used_tokens` while a prompt is being computed.

    Notes
    -----
    There is no ``to_quantized``, so mlx-lm leaves K and V as they are whatever ``kv_bits`` says.
    """

    def __init__(self, sequence, layer, offset=0):
        self.offset = offset
        self._sequence = sequence
        self._layer = layer
        self._awaited = None  # what mlx-lm's pipelines set as `keys`; `state` carries it until the next write

    @property
    def request_id(self):
        """Id of the sequence, of a deep copy too: ``cache.free_for(layer.request_id)`` frees it."""
        return self._sequence.request_id

    def update_and_fetch(self, keys, values):
        """Write K and V of new tokens at `offset`, and return those of all tokens so far.

        Parameters
        ----------
        keys, values : mlx.core.array
            ``(1, num_kv_heads, n, head_dim)``, of the cache's dtype.

        Returns
        -------
        tuple of mlx.core.array
            K and V, ``(1, num_kv_heads, offset + n, head_dim)``: views of the arena, valid until the sequence
            moves.

        Raises
        ------
        CacheFull
            The sequence would have to grow and may not (`LimitReached`) or cannot; nothing has been written.
        """
        self._write(keys, values, self.offset)
        return self.keys_and_values()

    def _write(self, keys, values, start):
        batch, _, n, _ = keys.shape
        if batch != 1:
            raise ValueError(f"a prompt cache holds 1 sequence, the model wrote {batch}: see BatchCache")
        self._sequence.grow_to(start + n)  # in the first layer; the others find the room made
        self._sequence.cache.write(self.request_id, self._layer, keys[0], values[0], start=start)
        self.offset = start + n
        self._awaited = None

    def keys_and_values(self):
        """K and V written so far, ``(1, num_kv_heads, offset, head_dim)``; views as in `update_and_fetch`."""
        planes = self._sequence.cache.get_kv_views(self.request_id, self._layer)
        return tuple(_first(plane, self.offset)[None] for plane in planes)

    @property
    def keys(self):
        """K written so far. An array that it is set to is kept for `state`, and evaluated with it."""
        return self.keys_and_values()[0] if self._awaited is None else self._awaited

    @keys.setter
    def keys(self, value):
        self._awaited = value

    @property
    def values(self):
        """V written so far."""
        return self.keys_and_values()[1]

    @property
    def state(self):
        """``(keys, values, offset)`` as of mlx-lm's own ``KVCache``; setting it writes K and V to the arena."""
        return self.keys, self.values, self.offset

    @state.setter
    def state(self, state):
        keys, values, offset = state
        if offset:
            self._write(keys[..., :offset, :], values[..., :offset, :], 0)
        self.offset = offset

    def make_mask(self, N, return_array=False, window_size=None):  # noqa: N803 (mlx-lm's name)
        """Build the mask of `N` new tokens over all, as mlx-lm's caches do."""
        if window_size is not None or (return_array and N > 1):
            return causal_mask(N, self.offset + N, window_size)
        return None if N == 1 else "causal"

    def is_trimmable(self):
        """Whether `trim` works: always."""
        return True

    def trim(self, n):
        """Forget the last `n` tokens written, or all; returns how many.

        Raises
        ------
        CacheFull
            The cut goes through a block that others hold, and there is no room for a copy.
        """
        n = max(0, min(n, self.offset))
        used = self._sequence.cache.used_tokens(self.request_id)
        # Each layer trims: the first one cuts. A prompt that is not written to its end yet keeps its room.
        if self.offset - n < used <= self.offset:
            self._sequence.cut_to(self.offset - n)
        self.offset -= n
        return n

    def size(self):
        """Tokens written."""
        return self.offset

    def empty(self):
        """Whether nothing has been written."""
        return self.offset == 0

    @property
    def nbytes(self):
        """Bytes of this layer in the blocks that the sequence holds."""
        cache = self._sequence.cache
        return cache.capacity(self.request_id) * cache.spec.layers[self._layer].bytes_per_token


def _first(plane, num_tokens):
    """The first tokens of a view; the view itself where it has no more: a slice costs a graph node."""
    return plane if plane.shape[1] == num_tokens else plane[:, :num_tokens]


def num_layers_of(cache):
    """Layers of a cache that mlx-lm can use; `ValueError` if it cannot."""
    for number, planes in enumerate(cache.arena.planes):
        if len(planes) != 2:
            raise ValueError(f"layer {number} has {len(planes)} planes, mlx-lm's models write K and V")
        for plane in planes.values():
            if not isinstance(plane, mx.array):
                raise ValueError(
                    f"layer {number} is in {type(plane).__name__}, mlx-lm's models need MLX arrays: "
                    "make the cache with backend='mlx'"
                )
    return len(cache.arena.planes)


def causal_mask(n, tokens, window):
    """Which of `tokens` the last `n` may see, of a window those up to themselves: bool, ``(n, tokens)``."""
    newest = mx.arange(tokens - n, tokens)[:, None]
    seen = mx.arange(tokens)[None]
    mask = seen <= newest
    return mask if window is None else mask & (seen > newest - window)
