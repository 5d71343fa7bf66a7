"""Storage: the planes of every layer, allocated once, and views of them. It holds bytes and decides nothing.

Every arena has the same attributes and methods; :func:`make_arena` chooses one by the name of its backend.
"""

import math

import numpy as np

from kvcache._copy import Copier, Sources
from kvcache.memory import available_memory, ensure_available

ALIGNMENT = 64  # bytes: where NumPy planes start


def make_arena(spec, backend, stream=None):
    """The storage of a cache.

    Parameters
    ----------
    spec : KVCacheSpec
    backend : {"numpy", "mlx", "none"}
    stream : MLX stream or several, optional
        For ``"mlx"``: what host writes and moves wait for, see :class:`MlxArena`.

    Raises
    ------
    MemoryError
        The arena is larger than the memory that is available: ``bytes_needed``, ``bytes_available``.
        Nothing has been allocated.
    ImportError
        The backend or the dtype needs a package that is missing; the message names the extra.
    ValueError
        Unknown backend, or `stream` with one that has none.
    """
    if backend == "mlx":
        return MlxArena(spec, stream)
    if stream is not None:
        raise ValueError(f"stream= is for backend='mlx', got backend={backend!r}")
    if backend == "numpy":
        return NumpyArena(spec)
    if backend == "none":
        return NoArena(spec)
    raise ValueError(f"unknown backend {backend!r}: expected 'numpy', 'mlx' or 'none'")


class _Arena:
    """What the arenas share: names of planes and bookkeeping of what NumPy and MLX do alike.

    Attributes
    ----------
    planes : tuple of dict of str to array
        For each layer its planes by name, ``(heads, num_blocks * block_size, width)``; empty once closed.
    copier : Copier or None
        Moves and writes bytes, without the GIL.
    arena_copies : int
        Updates in which MLX copied a whole plane instead of writing in place.
    """

    arena_copies = 0
    copier = None
    planes = ()

    def __init__(self, spec):
        self._spec = spec

    @property
    def k(self):
        """The K plane of each layer: the one named ``k``, else the first."""
        return self._sides([layer.k_index for layer in self._spec.layers])

    @property
    def v(self):
        """The V plane of each layer: the one named ``v``, else the second; `None` where there is none."""
        return self._sides([layer.v_index for layer in self._spec.layers])

    def _sides(self, indices):
        layers = zip(indices, self.planes, strict=False)  # no planes once closed
        return [None if index is None else list(planes.values())[index] for index, planes in layers]

    def sources(self, layer, planes, rows_axis=1):
        """Rows to write into `layer`: one array per plane, checked, evaluated and kept alive.

        Parameters
        ----------
        layer : int
        planes : sequence of NumPy or MLX arrays
            Of exactly the planes' dtypes, ``(heads, rows, width)``, of any strides.
        rows_axis : {1, 0}
            0: ``(rows, heads, width)``.

        Raises
        ------
        IndexError, TypeError, ValueError
            No such layer; not an array; wrong number of planes, shape or dtype, naming got and wanted.
        """
        return Sources(self.copier, layer, planes, rows_axis)

    def note_stream(self):
        """Called with every write and view: keep what this thread's work runs on, to be waited for."""

    def device_array(self, array):
        """An int32 NumPy array as the backend's own kind of array."""
        return array

    def library_memory(self):
        """Bytes that the array library has in use, had at most, and keeps for reuse."""
        return (0, 0, 0)

    def warmup(self):
        """Make every page of the arena resident; no byte changes."""
        self.copier.warmup()

    def close(self):
        """Let go of the planes; what views still hold stays until they go. Again: nothing happens."""
        self.planes = ()
        if self.copier is not None:
            self.copier.close()


class NumpyArena(_Arena):
    """Planes as NumPy arrays, zero-filled by the system as they are touched.

    Parameters
    ----------
    spec : KVCacheSpec
    """

    def __init__(self, spec):
        super().__init__(spec)
        dtypes = {plane.dtype: numpy_dtype(plane.dtype) for layer in spec.layers for plane in layer.planes}
        ensure_available(spec.arena_bytes, available_memory())
        self.planes = tuple(
            {plane.name: _zeros(_shape(spec, plane), dtypes[plane.dtype]) for plane in layer.planes}
            for layer in spec.layers
        )
        self._writable = [list(planes.values()) for planes in self.planes]
        self._readonly = [[_readonly(plane) for plane in planes] for planes in self._writable]
        self.copier = Copier(self.planes, spec.block_size)

    def view(self, layer, index, slot, tokens, writable):
        """Zero-copy ``(heads, tokens, width)`` of plane number `index` from arena token `slot` on."""
        return (self._writable if writable else self._readonly)[layer][index][:, slot : slot + tokens]

    def gather(self, layer, index, block_table, tokens):
        """A new array with the first `tokens` tokens of the blocks in `block_table` (int32)."""
        copy = self._empty(layer, index, tokens)
        self.copier.read(layer, index, block_table, tokens, copy)
        return copy

    def copy_of(self, layer, index, slot, tokens):
        """A new array with what :meth:`view` would show."""
        copy = self._empty(layer, index, tokens)
        self.copier.read_run(layer, index, slot, tokens, copy)
        return copy

    def close(self):
        """Let go of the planes; what views still hold stays until they go. Again: nothing happens."""
        super().close()
        self._writable = self._readonly = ()

    def _empty(self, layer, index, tokens):
        plane = self._writable[layer][index]
        return np.empty((plane.shape[0], tokens, plane.shape[2]), plane.dtype)


class MlxArena(_Arena):
    """Planes as MLX arrays, evaluated at once.

    On the CPU the host writes and moves through an alias of MLX's memory: bytes are in place when a call
    returns, and no plane is ever copied. Moves, and writes to slots that a step in flight may read, wait
    for the noted streams first. Elsewhere the same is done by graph nodes, see :mod:`kvcache.mlx_graph`.

    Parameters
    ----------
    spec : KVCacheSpec
    stream : mx.Stream, mx.ThreadLocalStream or several, optional
        What steps run on; by default this thread's default stream. The default stream of a thread that
        writes or takes views is waited for as well.
    writes : {None, "host", "graph"}
        None: ``"host"`` where the streams are the CPU's, else ``"graph"``.
    """

    def __init__(self, spec, stream=None, writes=None):
        super().__init__(spec)
        try:
            import mlx.core as mx
        except ImportError as error:
            raise ImportError("backend='mlx' needs MLX: pip install 'kvcache[mlx]'") from error
        from kvcache.mlx_graph import GraphPlanes, Streams, usable_memory

        self._mx = mx
        self._streams = Streams(stream)
        device = self._streams.device
        if writes is None:
            writes = "host" if device.type == mx.cpu else "graph"
        if writes not in ("host", "graph"):
            raise ValueError(f"writes is {writes!r}, expected 'host', 'graph' or None")
        ensure_available(spec.arena_bytes, usable_memory(device))
        self.planes = tuple(
            {
                plane.name: mx.zeros(_shape(spec, plane), getattr(mx, plane.dtype), stream=device)
                for plane in layer.planes
            }
            for layer in spec.layers
        )
        mx.eval(self.planes)
        self._arrays = [list(planes.values()) for planes in self.planes]
        if writes == "graph":
            self._graph = GraphPlanes(self.planes, spec.block_size, self._streams)
            held = self.planes
        else:  # a second holder of each buffer: assigning to a plane cannot pull it from beneath the copier
            self._graph = None
            held = [{name: plane[...] for name, plane in planes.items()} for planes in self.planes]
        self.copier = Copier(held, spec.block_size, self._streams.wait, self._graph)

    @property
    def arena_copies(self):
        """Updates so far in which MLX copied a whole plane instead of writing in place."""
        return 0 if self._graph is None else self._graph.settle()

    def view(self, layer, index, slot, tokens, writable):
        """Lazy ``(heads, tokens, width)`` of plane number `index` from arena token `slot` on, zero-copy.

        `writable` means nothing: assigning to an MLX view rebinds it and leaves the arena alone.
        """
        if self._graph is not None:
            self._graph.use(layer)
        return self._arrays[layer][index][:, slot : slot + tokens]

    def gather(self, layer, index, block_table, tokens):
        """A new evaluated array with the first `tokens` tokens of the blocks in `block_table` (int32).

        In host memory the bytes are copied natively: whatever was written is in place, and steps in
        flight only read. (5,340 scattered tokens of 8 heads x 64: 1.1 ms, by ``mx.take`` 7.5 ms.)
        """
        if self._graph is not None:
            size = self.copier.block_size
            slots = (block_table[:, None] * size + np.arange(size, dtype=np.int32)).ravel()
            return self._graph.gather(layer, index, slots[:tokens])
        copy = self._zeros(layer, index, tokens)
        self.copier.read(layer, index, block_table, tokens, copy)
        return copy

    def copy_of(self, layer, index, slot, tokens):
        """A new evaluated array with what :meth:`view` would show."""
        if self._graph is not None:
            return self._graph.gather(layer, index, slice(slot, slot + tokens))
        copy = self._zeros(layer, index, tokens)
        self.copier.read_run(layer, index, slot, tokens, copy)
        return copy

    def note_stream(self):
        """Called with every write and view: keep what this thread's work runs on, to be waited for."""
        self._streams.note()

    def device_array(self, array):
        """An int32 NumPy array as an MLX array."""
        return self._mx.array(array)

    def library_memory(self):
        """Bytes that MLX has in use, had at most, and keeps for reuse, in the whole process."""
        return (self._mx.get_active_memory(), self._mx.get_peak_memory(), self._mx.get_cache_memory())

    def warmup(self):
        """Make every page of the arena resident; no byte changes."""
        if self._graph is None:
            self.copier.warmup()
        else:
            self._mx.eval(self.planes)

    def close(self):
        """Let go of the planes; what views still hold stays until they go. Again: nothing happens."""
        if self._graph is not None and self.planes:
            self._graph.close()
        super().close()
        self._arrays = ()

    def _zeros(self, layer, index, tokens):
        plane = self._arrays[layer][index]
        shape = (plane.shape[0], tokens, plane.shape[2])
        copy = self._mx.zeros(shape, plane.dtype, stream=self._streams.device)
        self._mx.eval(copy)
        return copy


class NoArena(_Arena):
    """No storage: bookkeeping for engines that own their tensors, and simulation.

    Parameters
    ----------
    spec : KVCacheSpec
    """

    @property
    def k(self):
        """`None` for each layer."""
        return [None] * len(self._spec.layers)

    v = k

    def view(self, layer, index, slot, tokens, writable):
        """Raise ValueError."""
        raise ValueError("backend='none' has no storage to view")

    def gather(self, layer, index, block_table, tokens):
        """Raise ValueError."""
        raise ValueError("backend='none' has no storage to gather from")

    def copy_of(self, layer, index, slot, tokens):
        """Raise ValueError."""
        raise ValueError("backend='none' has no storage to copy from")

    def sources(self, layer, planes, rows_axis=1):
        """Raise ValueError."""
        raise ValueError("backend='none' has no storage to write to")

    def warmup(self):
        """Nothing to touch."""


def numpy_dtype(name):
    """The NumPy dtype of a plane; bfloat16 comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError("bfloat16 in NumPy needs ml_dtypes: pip install 'kvcache[bfloat16]'") from error
    return np.dtype(ml_dtypes.bfloat16)


def _shape(spec, plane):
    return (plane.heads, spec.num_blocks * spec.block_size, plane.width)


def _zeros(shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _readonly(array):
    view = array.view()
    view.flags.writeable = False
    return view
