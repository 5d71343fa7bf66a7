"""The cache: one arena, allocated once, and every live sequence a view of it.

The bookkeeping (who holds which blocks, what is promised, who waits) is native, in `_alloc.pyx` and the rooms below
it; the bytes are in `arena.py`. What is here brings the two together.
"""

import itertools
import math
import sys
import threading

from kvcache._batch import BatchCore
from kvcache._travel import TravelCore
from kvcache.arena import make_arena
from kvcache.block_map import image_of
from kvcache.errors import KVCacheError, RequestTooLarge, UnknownSequence
from kvcache.health import Watch
from kvcache.refusals import Refusal, Room
from kvcache.spec import KVCacheSpec
from kvcache.stats import CacheStats, stats_text

_MAKING = threading.Lock()
PLACEMENTS = ("contiguous", "paged")
NOBODY_WAITS = 0, 0.0
ORDERS = {"lru": 0, "priority": 0, "lfu": 1, "fifo": 2, "worth": 3}  # as in _policy.pxd
FOREIGN = 4
_new_stats = tuple.__new__  # of the namedtuple's fields, all of them


class KVCache(TravelCore):
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

    _status = None  # who serves it, if anybody does
    _carrier = None  # who carries K/V to stores, if anybody ever has

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
        spec = _spec_of(num_layers, num_kv_heads, head_dim, max_total_tokens, block_size, dtype)
        _check_options(placement, overcommit, prefix_cache, policy, clock)
        if max_move_tokens is not None and as_index(max_move_tokens, "max_move_tokens") < 0:
            raise ValueError(f"max_move_tokens must be at least 0, not {max_move_tokens}")
        _check_stores(spec, fingerprint, staging_bytes, store_rate)
        arena = make_arena(spec, backend, stream)
        super().__init__(
            spec.num_blocks,
            spec.block_size,
            paged=placement == "paged",
            overcommit=overcommit,
            num_marks=spec.num_layers,
            most_moved=None if max_move_tokens is None else min(as_index(max_move_tokens, ""), 2**62),
            copier=arena.copier,
            order=(ORDERS[policy] if isinstance(policy, str) else FOREIGN) if prefix_cache else None,
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
        self._queues = []  # read by anybody, changed under the lock below
        self._enrolment = threading.Lock()
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

    def explain(self, prompt, max_tokens=None, *, max_new_tokens=None):
        """What `allocate_for` would say now, and why.

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
        free, unclaimed = self._room()
        room = Room(self.spec.block_size, free, min(unclaimed, self.spec.num_blocks))
        try:
            tokens, limit = self._measured(prompt, max_tokens, max_new_tokens)
        except RequestTooLarge as error:
            too_many = error.blocks_needed - error.num_blocks
            there = (error.blocks_needed, room.free, room.unclaimed, too_many)
            return Refusal("never_fits", None, error.tokens, error.tokens, *there, fitting_tokens=0)
        return room.judge(None, tokens, limit)

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

    # ---- outside the arena

    def suspend(self, request_id, store=None):
        """Take K/V of a sequence out of the arena, to come back when `resume` is called.

        The id stays live, with its limit, salt and tokens; appends, views, writes, `fork` and `truncate` raise
        `Suspended` from now on, `free_for` ends it as always. It keeps its blocks until the transfer is ``ok``; then
        they are free, and nothing is promised to it. A transfer that fails leaves it as it was.

        Parameters
        ----------
        request_id : hashable
        store : kvcache.store.ChunkStore, optional
            Where to; by default host memory, at most as much as the arena has.

        Returns
        -------
        Transfer

        Raises
        ------
        UnknownSequence, Suspended
        ValueError
            The arena has no storage.
        """
        return self._carries().suspend(request_id, store)

    def resume(self, request_id, *, recompute=False):
        """Bring a suspended sequence back, into any free place, byte for byte.

        Parameters
        ----------
        request_id : hashable
        recompute : bool
            Give it blocks without K/V, at once, for the engine to compute them again: for a sequence whose chunks are
            lost. `Transfer.tokens` says how many leading ones are in place, since they are cached.

        Returns
        -------
        Transfer or None
            None when it does not fit now; nothing has changed then. The id is `Suspended` until the transfer is ``ok``;
            one that is not leaves it suspended.

        Raises
        ------
        UnknownSequence
        Suspended
            It is on its way already.
        ValueError
            It is not suspended.
        """
        return self._carries().resume(request_id, recompute)

    def save(self, path, request_ids=None):
        """Write what is cached to a file: prefixes that have been freed, and what live sequences have committed.

        Whole blocks whose token ids are known. The file is synced and renamed when it is whole; until then what was
        there is as it was. Other calls go on meanwhile; what they evict before its turn comes is left out.

        Parameters
        ----------
        path : path
        request_ids : iterable of hashable, optional
            Only prefixes of these live sequences.

        Returns
        -------
        int
            Tokens written.

        Raises
        ------
        ValueError
            The cache has no fingerprint or no storage, or there is more than one file tells of.
        TypeError
            A salt that is neither str nor bytes.
        UnknownSequence, OSError
        """
        from kvcache.saving import save_prefixes

        self._require_fingerprint("save")
        return save_prefixes(self, path, request_ids, self._carries().pace)

    def load(self, path):
        """Bring saved prefixes into the cache, as far as they fit into what is free.

        All of the file is verified before anything changes.

        Parameters
        ----------
        path : path

        Returns
        -------
        int
            Tokens of the file that can be found now.

        Raises
        ------
        CorruptCacheFile
            It is cut short, altered, or no such file.
        IncompatibleCacheFile
            It was made for another model, other planes, or blocks of another size.
        ValueError
            The cache has no fingerprint or no storage.
        OSError
        """
        from kvcache.saving import load_prefixes

        self._require_fingerprint("load")
        return load_prefixes(self, path, self._carries().pace)

    def _require_fingerprint(self, call):
        if self.fingerprint is None:
            raise ValueError(f"{call} needs to know the model: make the cache with fingerprint=")

    def _carries(self):
        self._require_open()
        if self.backend == "none":
            raise ValueError("backend='none' has no storage to save or suspend")
        if self._carrier is None:
            from kvcache.suspension import Carrier

            with _MAKING:
                if self._carrier is None:
                    self._carrier = Carrier(self, *self._stores)
        return self._carrier

    def _abandoned(self, journey):
        """A suspended sequence has been freed: nobody wants its chunks."""
        if journey.chunks is not None:
            journey.chunks.delete()

    # ---- batches

    def batch(self, request_ids=()):
        """A `DecodeBatch` of these live sequences, kept across steps."""
        return DecodeBatch(self, request_ids)

    # ---- sight

    @property
    def total_allocated(self):
        """Bytes that sequences hold, all layers, all planes."""
        return (self.spec.num_blocks - self.free_blocks) * self.spec.block_bytes

    @property
    def total_free(self):
        """Bytes that nobody holds."""
        return self.free_blocks * self.spec.block_bytes

    @property
    def free_tokens(self):
        """Tokens that fit into the free blocks."""
        return self.free_blocks * self.spec.block_size

    def stats(self):
        """Every number at once: a `CacheStats`, which stays as it is."""
        arena = self.arena
        figures = self._figures(*self._prices, arena.arena_copies, arena.library_memory())
        away = (0, 0) if self._carrier is None else (self._num_away(), self._carrier.corrupt_chunks)
        waiting = self._queued() if self._queues else NOBODY_WAITS
        return _new_stats(CacheStats, figures + away + waiting)

    def _queued(self):
        """How many wait before the cache, and for how long the first of them has."""
        waiting, oldest = 0, 0.0
        for queue in self._queues:
            if count := len(queue):
                waiting += count
                oldest = max(oldest, queue.oldest_age)
        return waiting, oldest

    def dump_cache_stats(self, file=None):
        """Write the configuration, the state and one line per sequence to `file` (standard output by default)."""
        rows = []
        for request_id in self:
            try:
                used, limit = self.used_tokens(request_id), self.limit(request_id)
                rows.append((request_id, used, limit, self.block_table(request_id)))
            except UnknownSequence:
                continue  # freed by another thread since
        print(stats_text(self.spec, self.stats(), rows), file=sys.stdout if file is None else file)

    def block_map_image(self, width=64, *, dark=False):
        """The blocks as a picture: a pixel a block, `width` to a row, in the order of the arena.

        Free blocks are white, or nearly black; cached ones, whose content may be found again, of a pale blue, or a
        dark one, and those that a pin alone holds of a stronger blue; each sequence has a colour; a block that several
        share has half its holder's brightness; grey ones are free when the last hold ends. Pixels of the last row that
        are no block are of a lighter grey, in a dark picture of a darker one.

        Parameters
        ----------
        width : int
        dark : bool

        Returns
        -------
        array of uint8, ``(rows, width, 3)``
        """
        if as_index(width, "width") < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        return image_of(self._owners(), as_index(width, "width"), bool(dark))

    @property
    def queues(self):
        """Every open `AllocationQueue` before this cache, in order of their making: a tuple."""
        return tuple(self._queues)

    def _enrol(self, queue, name):
        """Takes a queue in under its name, or one that is free."""
        with self._enrolment:
            taken = {each.name for each in self._queues}
            if name is None:
                names = ("default" if number == 1 else f"default-{number}" for number in itertools.count(1))
                name = next(each for each in names if each not in taken)
            elif not isinstance(name, str) or not name:
                raise TypeError(f"name must be a string that is not empty, not {name!r}")
            elif name in taken:
                raise ValueError(f"the cache has a queue named {name!r} already")
            queue.name = name
            self._queues.append(queue)
        return name

    def _strike(self, queue):
        """Lets a queue go, whose name is free again."""
        with self._enrolment:
            if queue in self._queues:
                self._queues.remove(queue)

    def check_health(self):
        """What an operator should hear of: a tuple of `Finding`, told to the logger ``kvcache`` once a minute each.

        High fragmentation in paged placement, promises above 90 %, arrays of the arena that MLX has copied, chunks that
        a store has given back altered, and a queue whose oldest waiter is older than its `warn_after`. Called by
        whoever exports metrics or the status, never by the calls that serve.
        """
        return self._health.look(self)

    def serve_status(self, host="127.0.0.1", port=0, *, pid_file=None, any_host=False):
        """Let `kvcache top` look at this cache: its state as JSON over HTTP, read-only, from a daemon thread.

        Parameters
        ----------
        host : str
            A loopback address, unless `any_host`: there is no password.
        port : int
            0 for any that is free.
        pid_file : path, optional
            Where to write process id and address; removed at the end.
        any_host : bool
            Whether other machines may ask.

        Returns
        -------
        StatusServer
            With `address`, and `close`; closing the cache closes it.

        Raises
        ------
        KVCacheError
            It is served already.
        OSError, ValueError
            It cannot listen there, or should not.
        """
        from kvcache.status import StatusServer

        self._require_open()
        if self._status is not None and not self._status.closed:
            raise KVCacheError(f"the status is served already, at {self._status.address}")
        self._status = StatusServer(self, host, port, pid_file, any_host)
        return self._status


class DecodeBatch(BatchCore):
    """Sequences that decode together: one append a step for all of them, one write a layer.

    Made by `KVCache.batch`. Reading any array brings it up to date first.
    """

    def write(self, layer, *planes):
        """Write the tokens of the last append in one layer, to where they are now.

        Parameters
        ----------
        layer : int
        *planes : array ``(B, heads, width)`` or ``(tokens, heads, width)``
            One per plane: a row per token asked for (those of refused members are skipped), or per token granted.

        Raises
        ------
        UnknownSequence
            A member has been freed.
        ValueError
            No step, wrong number, shape or dtype of planes, a token that has been cut off since.
        CacheFull
            A shared block would have to be copied first, and no block is unclaimed.
        """
        cache = self.cache
        cache._require_open()
        layer = cache._checked(layer)
        sources = cache.arena.sources(layer, planes, rows_axis=0)
        cache.arena.note_stream()
        self._write_rows(sources, layer)

    @property
    def device_slots(self):
        """Slots of the tokens granted, as an array of the arena's library; made at most once per generation."""
        return self._device_arrays()[1]

    @property
    def device_positions(self):
        """Positions of the tokens granted; as `device_slots`."""
        return self._device_arrays()[2]

    def _device_arrays(self):
        made = getattr(self, "_made", None)
        if made is None or made[0] != self.generation:
            generation, slots, positions = self._granted()
            on_device = self.cache.arena.device_array
            made = self._made = generation, on_device(slots), on_device(positions)
        return made


def _spec_of(first, num_kv_heads, head_dim, max_total_tokens, block_size, dtype):
    shape = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_total_tokens": max_total_tokens}
    options = {"block_size": block_size, "dtype": dtype}
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(first, KVCacheSpec):
        beside = [name for name, value in shape.items() if value is not None] + list(given)
        if beside:
            raise TypeError(f"a spec says it all: {', '.join(beside)} cannot be given beside it")
        return first
    missing = [name for name, value in shape.items() if value is None]
    if missing:
        raise TypeError(f"KVCache needs {', '.join(missing)}, or a KVCacheSpec alone")
    return KVCacheSpec(first, **shape, **given)


def _check_options(placement, overcommit, prefix_cache, policy, clock):
    if placement not in PLACEMENTS:
        raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, not {placement!r}")
    if isinstance(overcommit, (bool, str)) or not hasattr(overcommit, "__float__"):
        raise TypeError(f"overcommit must be a number, not {type(overcommit).__name__}")
    if math.isnan(overcommit) or overcommit < 1:
        raise ValueError(f"overcommit must be at least 1, not {overcommit}")
    if not isinstance(prefix_cache, bool):
        raise TypeError(f"prefix_cache must be a bool, not {type(prefix_cache).__name__}")
    if isinstance(policy, str) and policy not in ORDERS:
        raise ValueError(f"policy must be one of {', '.join(ORDERS)}, or an object, not {policy!r}")
    if not isinstance(policy, str) and not callable(getattr(policy, "score", None)):
        raise TypeError(f"a policy has a method score(block), {type(policy).__name__} has none")
    if clock is not None and not callable(clock):
        raise TypeError(f"clock must be callable, not {type(clock).__name__}")


def _check_stores(spec, fingerprint, staging_bytes, store_rate):
    if fingerprint is not None:
        from kvcache.cache_file import check_fingerprint

        check_fingerprint(fingerprint)
    if staging_bytes is not None:
        from kvcache.suspension import slot_bytes_of

        least = slot_bytes_of(spec)
        if as_index(staging_bytes, "staging_bytes") < least:
            raise ValueError(f"staging_bytes must be at least one chunk, {least} bytes, not {staging_bytes}")
    if store_rate is not None:
        if isinstance(store_rate, (bool, str)) or not hasattr(store_rate, "__float__"):
            raise TypeError(f"store_rate must be a number, not {type(store_rate).__name__}")
        if not store_rate > 0:
            raise ValueError(f"store_rate must be more than 0 bytes a second, not {store_rate}")


def as_index(value, name):
    """An int, whatever int type it came as."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    return value.__index__()
