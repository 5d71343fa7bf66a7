"""The cache: one arena, allocated once, and every live sequence a view of it.

The bookkeeping (who holds which blocks, what is promised, who waits) is native, in `_alloc.pyx` and the rooms below
it; the bytes are in `arena.py`. What is here brings the two together: construction, admission beforehand, views and
writes. What the cache shows of itself is in `sight.py`, what leaves the arena and comes back in `outside.py`.
"""

from kvcache._travel import TravelCore
from kvcache.arena import make_arena
from kvcache.decode_batch import DecodeBatch
from kvcache.errors import RequestTooLarge
from kvcache.health import Watch
from kvcache.options import PLACEMENTS, as_index, check_options, check_stores, order_of, spec_of
from kvcache.outside import Outside
from kvcache.queues import Queues
from kvcache.refusals import Room
from kvcache.sight import Sight

__all__ = ["PLACEMENTS", "DecodeBatch", "KVCache"]


class KVCache(Sight, Outside, TravelCore):
    """The K/V of many sequences in one preallocated arena.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim, max_total_tokens, block_size : int
        The shape; or a `KVCacheSpec` alone, for layers that differ.
    dtype : str
        ``"float32"`` (default), ``"float16"`` or ``"bfloat16"``.
    backend : {"numpy", "mlx", "none"}
        What the arena is made of. ``"none"`` keeps the books for an engine that owns its tensors.
    placement : {"contiguous", "paged"}
        Every sequence one run of blocks at all times, moved when it has to be, so that views never copy; or blocks
        where they come, shared by forks, never moved.
    overcommit : float
        Blocks held and claimed may be up to ``overcommit * num_blocks``. At 1.0 a granted limit is a promise.
    prefix_cache : bool
        Whether a prompt given as token ids may find what others left, and leaves something itself.
    policy : str or object
        Which cached blocks leave first: ``"lru"`` (default), ``"lfu"``, ``"fifo"``, ``"priority"``, ``"worth"``, or an
        object with a method ``score(block)``, which is given a `CachedBlock`: the least leaves first.
    clock : callable, optional
        What `ttl` and a policy mean by time: called once per `allocate_for`, `free_for`, `fork` and `commit`, never
        under the lock. By default these calls are counted.
    max_move_tokens : int, optional
        Used tokens that one call may move, for engines with a latency target; by default as many as it takes. What
        cannot be placed as one run within the bound is scattered (`is_contiguous` is False, views are gathered copies),
        nothing is refused, and it is made one run again when that is cheap. `compact` has a bound of its own.
    fingerprint : bytes, optional
        Names the model: weights, adapter, quantisation, RoPE. `save` and `load` need it.
    staging_bytes : int, optional
        Memory that K/V pass through on their way to a store and back: at least one chunk, by default four.
    store_rate : float, optional
        Bytes a second that go to stores and files and come back from them, so that steps that run meanwhile are not
        slowed down; by default as many as it takes.
    stream : MLX stream, or several, optional
        With MLX: what to wait for before bytes move; by default the constructing thread's default stream.

    Raises
    ------
    MemoryError
        The arena is larger than the memory there is. Nothing has been allocated.
    TypeError, ValueError
        Arguments that make no arena.

    Examples
    --------
    >>> cache = KVCache(num_layers=2, num_kv_heads=4, head_dim=8, max_total_tokens=256)
    >>> cache.allocate_for("user_123", 20, max_tokens=64).max_tokens
    64
    >>> cache.append_token("user_123"), cache.get_k_view("user_123", layer=0).shape
    (True, (4, 21, 8))
    >>> cache.free_for("user_123"), cache.free_for("user_123")
    (True, False)
    """

    def __init__(
        self,
        num_layers,
        num_kv_heads=None,
        head_dim=None,
        max_total_tokens=None,
        block_size=None,
        *,
        dtype=None,
        backend="numpy",
        placement="contiguous",
        overcommit=1.0,
        prefix_cache=True,
        policy="lru",
        max_move_tokens=None,
        clock=None,
        fingerprint=None,
        staging_bytes=None,
        store_rate=None,
        stream=None,
    ):
        spec = spec_of(num_layers, num_kv_heads, head_dim, max_total_tokens, block_size, dtype)
        check_options(placement, overcommit, prefix_cache, policy, clock, max_move_tokens)
        check_stores(spec, fingerprint, staging_bytes, store_rate)
        arena = make_arena(spec, backend, stream)
        super().__init__(
            spec.num_blocks,
            spec.block_size,
            paged=placement == "paged",
            overcommit=overcommit,
            num_marks=spec.num_layers,
            most_moved=None if max_move_tokens is None else min(as_index(max_move_tokens, ""), 2**62),
            copier=arena.copier,
            order=order_of(policy) if prefix_cache else None,
            scorer=None if isinstance(policy, str) else policy,
            clock=clock,
            block_bytes=spec.block_bytes,
        )
        self.spec = spec
        self.arena = arena
        self.backend = backend
        self.placement = placement
        self.overcommit = overcommit
        self.max_move_tokens = max_move_tokens
        self.fingerprint = fingerprint
        self._stores = staging_bytes, store_rate
        self._health = Watch()
        self._queues = Queues()
        self._layers = spec.layers
        self._prices = spec.block_bytes, spec.bytes_per_token
        in_place = backend == "numpy" and all(layer.v_index is not None for layer in spec.layers)
        self._k, self._v = (tuple(arena.k), tuple(arena.v)) if in_place else ((), ())

    def __repr__(self):
        return f"KVCache({self.spec!r}, backend={self.backend!r}, placement={self.placement!r})"

    def __enter__(self):
        self._require_open()
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """End every sequence and let the arena go.

        `free_for` then returns False, a second `close` does nothing, all else raises `CacheClosed`. Waits for holds
        of other threads; raises `CacheHeld` inside one of this thread's own.
        """
        super().close()
        if self._status is not None:
            self._status.close()
        if self._carrier is not None:
            self._carrier.close()
        self._k = self._v = ()
        self.arena.close()

    def warmup(self):
        """Make every page of the arena resident; its content stays as it is."""
        self._require_open()
        self.arena.warmup()

    # ---- admission beforehand

    def explain(self, prompt, max_tokens=None, *, max_new_tokens=None, salt=None):
        """What `allocate_for` would say now, and why.

        Holds are not looked at: inside one of this thread's own, `allocate_for` may raise `CacheHeld` for what fits.

        Returns
        -------
        Fits or Refusal
            True or False in a condition. A refusal names the reason, what there is and what would have sufficed; its
            reason is ``"never_fits"`` where `allocate_for` would raise `RequestTooLarge`.

        Raises
        ------
        TypeError, ValueError
            As `allocate_for`.
        """
        tokens, limit, *room = self._foresee(prompt, max_tokens, max_new_tokens, salt)
        return Room(self.spec.block_size, self.spec.num_blocks, *room).judge(None, tokens, limit)

    def _foresee(self, prompt, max_tokens, max_new_tokens, salt):
        """Tokens and limit of a request, also of one that is too large; then what a `Room` has of it."""
        try:
            return self._look_ahead(prompt, max_tokens, max_new_tokens, salt)
        except RequestTooLarge as error:
            if error.what == "max_tokens":
                tokens, _, *room = self._look_ahead(prompt, None, None, salt)
                return tokens, error.tokens, *room
            limit = error.tokens
            if max_tokens is not None:
                limit = as_index(max_tokens, "max_tokens")
            elif max_new_tokens is not None:
                limit += as_index(max_new_tokens, "max_new_tokens")
            return error.tokens, limit, *self._room()

    # ---- views and writes

    def get_k_view(self, request_id, layer, copy=None):
        """K of a sequence in one layer.

        Parameters
        ----------
        request_id : hashable
        layer : int
        copy : bool, optional
            None copies a scattered sequence only, False raises `ValueError` for one, True always copies.

        Returns
        -------
        array ``(num_kv_heads, used_tokens, head_dim)``
            Of NumPy: writable, unless a block in it is shared. It reads the arena in place and holds until the next
            call that changes the cache, or inside a hold.

        Raises
        ------
        UnknownSequence, IndexError, ValueError
        """
        view = None if copy else self._in_place(request_id, layer, self._k)
        return self._views(request_id, layer, (self._k_index(layer),), copy)[0] if view is None else view

    def get_v_view(self, request_id, layer, copy=None):
        """V of a sequence in one layer; as `get_k_view`. `ValueError` where the layer has one plane only."""
        view = None if copy else self._in_place(request_id, layer, self._v)
        return self._views(request_id, layer, (self._v_index(layer),), copy)[0] if view is None else view

    def get_kv_views(self, request_id, layer, copy=None):
        """K and V of a sequence in one layer, from one state; as `get_k_view`."""
        return self._views(request_id, layer, (self._k_index(layer), self._v_index(layer)), copy)

    def get_views(self, request_id, layer, copy=None):
        """Every plane of a sequence in one layer, in the layer's order, from one state; as `get_k_view`."""
        return self._views(request_id, layer, range(len(self._layers[self._checked(layer)].planes)), copy)

    def _views(self, request_id, layer, indices, copy):
        slot, tokens, shared = self._locate(request_id)
        self.arena.note_stream()
        if slot >= 0 and not copy:
            view = self.arena.view
            return tuple([view(layer, index, slot, tokens, not shared) for index in indices])
        if copy is not None and not copy:
            raise ValueError(
                f"{request_id!r} is scattered over several runs of blocks: a view of it is a copy"
            )
        with self._hold_briefly():  # the bytes stay where they are while they are copied
            return self._copies(request_id, layer, indices)

    def _copies(self, request_id, layer, indices):
        slot, tokens, _ = self._locate(request_id)
        if slot >= 0:
            return tuple([self.arena.copy_of(layer, index, slot, tokens) for index in indices])
        table, tokens = self._table(request_id)
        return tuple([self.arena.gather(layer, index, table, tokens) for index in indices])

    def write(self, request_id, layer, *planes, start=None):
        """Write K/V of consecutive tokens of a sequence.

        Parameters
        ----------
        request_id : hashable
        layer : int
        *planes : array ``(heads, n, width)``
            One per plane, in the layer's order, NumPy or MLX, of exactly the plane's dtype.
        start : int, optional
            Position of the first; by default ``used_tokens - n``.

        Raises
        ------
        UnknownSequence, IndexError
        ValueError
            Wrong number, shape or dtype of planes; positions that the sequence does not have.
        CacheFull
            A shared block would have to be copied first, and no block is unclaimed. Nothing has been written.
        """
        self._require_open()
        layer = self._checked(layer)
        sources = self.arena.sources(layer, planes, rows_axis=1)
        sources.overwrites = True
        self.arena.note_stream()
        self._write_rows(request_id, sources, layer, start)

    def _checked(self, layer):
        if type(layer) is not int:
            layer = as_index(layer, "layer")
        if not 0 <= layer < len(self._layers):
            raise IndexError(f"layer {layer} of {len(self._layers)}")
        return layer

    def _k_index(self, layer):
        return self._layers[self._checked(layer)].k_index

    def _v_index(self, layer):
        planes = self._layers[self._checked(layer)]
        if planes.v_index is None:
            raise ValueError(
                f"layer {layer} has one plane only, {planes.planes[0].name!r}: get_views gives it"
            )
        return planes.v_index

    # ---- batches

    def batch(self, request_ids=()):
        """A `DecodeBatch` of these live sequences, kept across steps."""
        return DecodeBatch(self, request_ids)
