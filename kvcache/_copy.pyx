"""Copies bytes between the planes of an arena, and into them, without the GIL.

A :class:`Copier` holds one ``plane_t`` for every plane of every layer. The allocator calls
``copier_move`` through a ``move_f``, writes go through ``copier_write``, both under the allocator's lock
and without the GIL. Everything that can fail (waiting for a step in flight, numbers outside the arena)
comes before the first byte is written. Where the host may not touch the arena (MLX on a GPU), the same
calls take the GIL and hand the work to an object that expresses it as graph nodes.
"""

import sys

import numpy as np

cimport cython
from cpython.buffer cimport PyBUF_STRIDES, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int32_t, int64_t, uintptr_t
from libc.stdlib cimport calloc, free, llabs, malloc
from libc.string cimport memcpy, memmove

from kvcache._lock cimport kv_thread

from kvcache.errors import KVCacheError

cdef extern from *:
    """
    #include <unistd.h>

    static inline long kv_page_size(void) { return sysconf(_SC_PAGESIZE); }

    /* A store that keeps what is there, even while another thread writes the same byte: compilers leave a
       compare-exchange alone, but may turn a read and write back, or an atomic "or 0", into a read. */
    static inline void kv_touch(char *byte) {
        char seen = 0;
        while (!__atomic_compare_exchange_n(byte, &seen, seen, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
    """
    long kv_page_size() noexcept nogil
    void kv_touch(char *byte) noexcept nogil

cdef extern from "_stream.h" nogil:
    void kv_stream(char *to, const char *source, size_t size)
    void kv_stream_end()

cdef enum:
    CACHED_BYTES = 1 << 25  # a call that moves more finds nothing of it in the caches afterwards
    NEAR_BYTES = 1 << 21    # a target so near has just been read, and is in the nearer caches

cdef dict CODES = {
    "float32": (FLOAT32, 4),
    "float16": (FLOAT16, 2),
    "bfloat16": (BFLOAT16, 2),
    "uint32": (UINT32, 4),
    "uint8": (UINT8, 1),
}
cdef dict NUMPY_DTYPES = {name: np.dtype(name) for name in CODES if name != "bfloat16"}


# --- bytes


cdef bint joined(move_t *run, const move_t *move) noexcept nogil:
    """Whether `run` can do what `move` does after it, as one copy; then it has taken it over.

    Copied as one, everything is read before it is overwritten. That is the same as one after the other unless the
    first of the two writes what the second reads: never if they lie in the order in which they move.
    """
    cdef int64_t shift = move.destination - move.source, blocks = run.blocks + move.blocks
    if move.blocks == 0 or shift == 0:
        return True
    if run.blocks == 0:
        run[0] = move[0]
        return True
    if run.destination - run.source != shift:
        return False
    if move.source == run.source + run.blocks and (shift < 0 or shift >= blocks):
        run.blocks = blocks
        return True
    if move.source + move.blocks == run.source and (shift > 0 or -shift >= blocks):
        run[0] = move_t(source=move.source, destination=move.destination, blocks=blocks)
        return True
    return False


cdef void move_run(char *base, const move_t *run, int64_t block_bytes, bint streams) noexcept nogil:
    """Of one head, which begins at `base`."""
    cdef char *to = base + run.destination * block_bytes
    cdef const char *source = base + run.source * block_bytes
    if streams and llabs(run.destination - run.source) * block_bytes >= NEAR_BYTES:
        kv_stream(to, source, <size_t>(run.blocks * block_bytes))
    else:
        memmove(to, source, <size_t>(run.blocks * block_bytes))


cdef bint outgrows_caches(Copier self, const move_t *moves, int64_t count) noexcept nogil:
    cdef int64_t i, number, token_bytes = 0, blocks = 0
    for i in range(count):
        blocks += moves[i].blocks
    for number in range(self.first[self.num_layers]):
        token_bytes += self.planes[number].heads * self.planes[number].token_stride
    return blocks * self.block_size * token_bytes > CACHED_BYTES


cdef void move_blocks(Copier self, const move_t *moves, int64_t count) noexcept nogil:
    """One pass over each plane, head after head; moves that continue each other are one copy."""
    cdef int64_t number, head, i, block_bytes
    cdef bint streams = outgrows_caches(self, moves, count)
    cdef plane_t *plane
    cdef char *base
    cdef move_t run
    for number in range(self.first[self.num_layers]):
        plane = &self.planes[number]
        block_bytes = self.block_size * plane.token_stride
        for head in range(plane.heads):
            base = plane.data + head * plane.head_stride
            i = 0
            while i < count:
                run = move_t(source=0, destination=0, blocks=0)
                while i < count and joined(&run, &moves[i]):
                    i += 1
                move_run(base, &run, block_bytes, streams)
    kv_stream_end()


cdef void copy_items(
    char *target, const char *item, int64_t stride, int64_t count, int32_t itemsize
) noexcept nogil:
    cdef int64_t i
    for i in range(count):
        memcpy(target + i * itemsize, item + i * stride, <size_t>itemsize)


cdef void pack_rows(
    char *target, const source_t *source, const char *row, int64_t count, int64_t width, int32_t itemsize
) noexcept nogil:
    """`count` rows of one head, from `row` on, to packed rows at `target`."""
    cdef int64_t i, row_bytes = width * itemsize
    if source.item_stride != itemsize:
        for i in range(count):
            copy_items(
                target + i * row_bytes, row + i * source.row_stride, source.item_stride, width, itemsize
            )
    elif source.row_stride == row_bytes or count == 1:
        memcpy(target, row, <size_t>(count * row_bytes))
    else:
        for i in range(count):
            memcpy(target + i * row_bytes, row + i * source.row_stride, <size_t>row_bytes)


cdef void write_rows(
    const plane_t *plane, const source_t *source, const span_t *spans, int64_t count
) noexcept nogil:
    cdef int64_t head, i
    cdef char *target
    cdef const char *rows
    for head in range(plane.heads):
        target = plane.data + head * plane.head_stride
        rows = source.data + head * source.head_stride
        for i in range(count):
            pack_rows(
                target + spans[i].slot * plane.token_stride,
                source,
                rows + spans[i].row * source.row_stride,
                spans[i].count,
                plane.width,
                plane.itemsize,
            )


cdef void read_blocks(
    const plane_t *plane, const int32_t *table, int64_t block_size, int64_t tokens, char *out
) noexcept nogil:
    """Tokens of the blocks in `table` to packed `out` (heads, tokens, width); neighbours in one copy."""
    cdef int64_t head, token, run, block, limit = (tokens + block_size - 1) // block_size
    cdef char *base
    for head in range(plane.heads):
        base = plane.data + head * plane.head_stride
        block = 0
        while block < limit:
            run = 1
            while block + run < limit and table[block + run] == <int64_t>table[block] + run:
                run += 1
            token = block * block_size
            memcpy(
                out + (head * tokens + token) * plane.token_stride,
                base + table[block] * block_size * plane.token_stride,
                <size_t>(min(run * block_size, tokens - token) * plane.token_stride),
            )
            block += run


cdef void touch(char *data, int64_t size, int64_t page) noexcept nogil:
    """Writes one byte of every page of [data, data + size) with what it holds."""
    cdef char *byte = data
    while byte < data + size:
        kv_touch(byte)
        byte += page - <int64_t>(<uintptr_t>byte % <uintptr_t>page)


# --- what the allocator and its writes call


cdef int copier_move(void *copier, const move_t *moves, int64_t count) noexcept nogil:
    return move(<Copier>copier, moves, count)


cdef int copier_write(
    void *copier, void *sources, int64_t layer, const span_t *spans, int64_t count
) noexcept nogil:
    return write(<Copier>copier, <Sources>sources, layer, spans, count)


cdef int move(Copier self, const move_t *moves, int64_t count) noexcept nogil:
    cdef int64_t i, last
    if self.closed:
        refuse_closed(self)
        return 1
    for i in range(count):
        if moves[i].blocks < 0:
            refuse_move(self, &moves[i])
            return 1
        last = self.num_blocks - moves[i].blocks
        if not (0 <= moves[i].source <= last and 0 <= moves[i].destination <= last):
            refuse_move(self, &moves[i])
            return 1
    if self.by_graph:
        return move_by_graph(self, moves, count)
    if count and self.waits and wait(self):
        return 1
    move_blocks(self, moves, count)
    return 0


cdef int write(
    Copier self, Sources sources, int64_t layer, const span_t *spans, int64_t count
) noexcept nogil:
    cdef int64_t i, rows = sources.rows, tokens = self.num_blocks * self.block_size
    if self.closed:
        refuse_closed(self)
        return 1
    if <void *>sources.copier != <void *>self or sources.layer != layer:
        refuse_sources(self, sources, layer)
        return 1
    for i in range(count):
        if (
            spans[i].count < 0
            or not 0 <= spans[i].row <= rows - spans[i].count
            or not 0 <= spans[i].slot <= tokens - spans[i].count
        ):
            refuse_span(self, sources, &spans[i])
            return 1
    if self.by_graph:
        return write_by_graph(self, sources, layer, spans, count)
    if sources.overwrites and self.waits and wait(self):
        return 1
    for i in range(sources.count):
        write_rows(&self.planes[self.first[layer] + i], &sources.items[i], spans, count)
    return 0


cdef int keep_error(Copier self, object error) noexcept:
    """For this thread, whoever else fails meanwhile; 1, also where there is no memory to keep it."""
    try:
        self.errors[kv_thread()] = error
    except MemoryError:
        pass
    return 1


cdef void refuse_closed(Copier self) noexcept with gil:
    keep_error(self, ValueError("the arena is closed"))


cdef void refuse_move(Copier self, const move_t *bad) noexcept with gil:
    keep_error(self, ValueError(
        f"a move of {bad.blocks} blocks from {bad.source} to {bad.destination} leaves the arena, "
        f"which has {self.num_blocks}"
    ))


cdef void refuse_sources(Copier self, Sources sources, int64_t layer) noexcept with gil:
    keep_error(self, ValueError(
        f"sources of layer {sources.layer}, or of another arena, were given for layer {layer}"
    ))


cdef void refuse_span(Copier self, Sources sources, const span_t *bad) noexcept with gil:
    keep_error(self, ValueError(
        f"{bad.count} rows from {bad.row} of {sources.rows} do not fit into slots from {bad.slot} "
        f"of {self.num_blocks * self.block_size}"
    ))


cdef int wait(Copier self) noexcept with gil:
    try:
        self.wait()
    except BaseException as error:
        return keep_error(self, error)
    return 0


cdef int move_by_graph(Copier self, const move_t *moves, int64_t count) noexcept with gil:
    try:
        self.graph.move([(moves[i].source, moves[i].destination, moves[i].blocks) for i in range(count)])
    except BaseException as error:
        return keep_error(self, error)
    return 0


cdef int write_by_graph(
    Copier self, Sources sources, int64_t layer, const span_t *spans, int64_t count
) noexcept with gil:
    try:
        self.graph.write(
            sources.arrays, layer, [(spans[i].row, spans[i].slot, spans[i].count) for i in range(count)]
        )
    except BaseException as error:
        return keep_error(self, error)
    return 0


# --- Python's side


cdef bint is_mlx(object array):
    mx = sys.modules.get("mlx.core")
    return mx is not None and isinstance(array, mx.array)


cdef str dtype_name(object array):
    """Name of a NumPy or MLX array's dtype; of a byte-swapped one a string that no plane has."""
    dtype = array.dtype
    if isinstance(dtype, np.dtype):
        return dtype.name if dtype.isnative else dtype.str
    return str(dtype).rpartition(".")[2]


cdef bint has_dtype(object array, str want):
    """Whether a NumPy or MLX array is of the dtype named `want`, in the machine's byte order."""
    if isinstance(array, np.ndarray) and want in NUMPY_DTYPES:
        return array.dtype == NUMPY_DTYPES[want]
    return dtype_name(array) == want


cdef object exporter(object array, str dtype):
    """What exports the array's buffer: NumPy has no format for bfloat16, so its bits are lent as uint16."""
    return array.view(np.uint16) if dtype == "bfloat16" and isinstance(array, np.ndarray) else array


@cython.auto_pickle(False)
@cython.internal
cdef class Lent:
    """One exported buffer, given back when nobody points into it any more."""

    cdef Py_buffer view
    cdef bint held

    def __cinit__(self, exporting, bint writable):
        PyObject_GetBuffer(exporting, &self.view, PyBUF_STRIDES | (PyBUF_WRITABLE if writable else 0))
        self.held = True

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


def address(array):
    """Where the first byte of an array lies in host memory; a lazy MLX array is evaluated."""
    return <uintptr_t>Lent(exporter(array, dtype_name(array)), False).view.buf


cdef bint in_layer(Copier copier, int64_t layer, const Py_buffer *view) noexcept:
    """Whether the buffer shares a byte with a plane of `layer`."""
    cdef int64_t number, axis, reach
    cdef char *low = <char *>view.buf
    cdef char *high = low + view.itemsize
    cdef plane_t *plane
    for axis in range(view.ndim):
        reach = (view.shape[axis] - 1) * view.strides[axis]
        if reach < 0:
            low += reach
        else:
            high += reach
    for number in range(copier.first[layer], copier.first[layer + 1]):
        plane = &copier.planes[number]
        if low < plane.data + plane.heads * plane.head_stride and plane.data < high:
            return True
    return False


cdef describe_layer(Copier self, int64_t layer):
    cdef plane_t *plane
    cdef Lent lent
    self.first[layer + 1] = self.first[layer]
    for array, dtype in zip(self.arrays[layer], self.dtypes[layer]):
        plane = &self.planes[self.first[layer + 1]]
        self.first[layer + 1] += 1
        plane.dtype, plane.itemsize = CODES[dtype]
        plane.heads, plane.tokens, plane.width = array.shape
        plane.token_stride = plane.width * plane.itemsize
        plane.head_stride = plane.tokens * plane.token_stride
        self.num_blocks = plane.tokens // self.block_size
        if self.by_graph:
            continue
        lent = Lent(exporter(array, dtype), True)
        if (
            lent.view.strides[2] != plane.itemsize
            or lent.view.strides[1] != plane.token_stride
            or lent.view.strides[0] != plane.head_stride
        ):
            raise ValueError(f"a plane of layer {layer} is not C-contiguous")
        plane.data = <char *>lent.view.buf


cdef plane_t *plane_at(Copier self, int64_t layer, int64_t index) except NULL:
    if self.closed or not 0 <= layer < self.num_layers:
        raise IndexError(f"layer {layer} of {0 if self.closed else self.num_layers}")
    if not 0 <= index < self.first[layer + 1] - self.first[layer]:
        raise IndexError(f"plane {index} of layer {layer}, which has {len(self.names[layer])}")
    return &self.planes[self.first[layer] + index]


@cython.auto_pickle(False)
cdef class Copier:
    """Copier(layers, block_size, wait=None, graph=None)\n--\n
    Native copying between the planes of one arena.

    Parameters
    ----------
    layers : sequence of dict of str to array
        For each layer its planes by name, each ``(heads, num_blocks * block_size, width)`` and
        C-contiguous: writable NumPy arrays, or evaluated MLX arrays.
    block_size : int
        Tokens in a block.
    wait : callable, optional
        Called with the GIL before bytes are moved or overwritten; returns when no step in flight reads the
        arena. What it raises ends the call, with nothing written.
    graph : object, optional
        ``move(moves)`` and ``write(arrays, layer, spans)`` take over where the host may not touch planes.
    """

    def __cinit__(self, layers, int64_t block_size, wait=None, graph=None):
        self.errors = {}
        self.num_layers = len(layers)
        self.block_size = block_size
        self.wait, self.waits = wait, wait is not None
        self.graph, self.by_graph = graph, graph is not None
        self.names = tuple([tuple(planes) for planes in layers])
        self.arrays = tuple([tuple(planes.values()) for planes in layers])
        self.dtypes = tuple([tuple([dtype_name(array) for array in planes]) for planes in self.arrays])
        self.planes = <plane_t *>calloc(max(1, sum([len(planes) for planes in layers])), sizeof(plane_t))
        self.first = <int64_t *>calloc(self.num_layers + 1, sizeof(int64_t))
        if self.planes == NULL or self.first == NULL:
            raise MemoryError(f"no memory for the plane table of {self.num_layers} layers")
        for layer in range(self.num_layers):
            describe_layer(self, layer)

    def __dealloc__(self):
        free(self.planes)
        free(self.first)

    cdef object take_error(self):
        """What this thread's last failed call raised."""
        error = self.errors.pop(kv_thread(), None)
        return KVCacheError("the arena could not move or write") if error is None else error

    def move(self, moves):
        """Copy runs of blocks, ``(source, destination, blocks)`` each, one after another in every plane.

        Raises
        ------
        ValueError
            A run leaves the arena. Nothing has been written, whatever is raised.
        """
        cdef int64_t i, count = len(moves)
        cdef int status
        cdef move_t *list_ = <move_t *>malloc(max(1, count) * sizeof(move_t))
        if list_ == NULL:
            raise MemoryError(f"no memory for {count} moves")
        try:
            for i in range(count):
                list_[i].source, list_[i].destination, list_[i].blocks = moves[i]
            with nogil:
                status = copier_move(<void *>self, list_, count)
        finally:
            free(list_)
        if status:
            raise self.take_error()

    def write(self, Sources sources not None, int64_t layer, spans):
        """Copy rows of `sources` into the planes of `layer`; a span is ``(row, slot, count)``.

        Raises
        ------
        ValueError
            A span leaves the arena or the rows, or `sources` is for another layer. Nothing has been
            written, whatever is raised.
        """
        cdef int64_t i, count = len(spans)
        cdef int status
        cdef span_t *list_ = <span_t *>malloc(max(1, count) * sizeof(span_t))
        if list_ == NULL:
            raise MemoryError(f"no memory for {count} spans")
        try:
            for i in range(count):
                list_[i].row, list_[i].slot, list_[i].count = spans[i]
            with nogil:
                status = copier_write(<void *>self, <void *>sources, layer, list_, count)
        finally:
            free(list_)
        if status:
            raise self.take_error()

    def read(self, int64_t layer, int64_t index, const int32_t[::1] block_table, int64_t tokens, out):
        """Copy the first `tokens` tokens of the blocks in `block_table` to `out`.

        `out` is C-contiguous, ``(heads, tokens, width)``, of the plane's dtype, and no part of the arena.
        """
        cdef plane_t *plane = plane_at(self, layer, index)
        cdef Lent lent = Lent(exporter(out, self.dtypes[layer][index]), True)
        cdef int64_t i, blocks
        if not 0 <= tokens <= plane.tokens:
            raise ValueError(f"{tokens} tokens of {plane.tokens}")
        blocks = (tokens + self.block_size - 1) // self.block_size
        if block_table.shape[0] < blocks:
            raise ValueError(f"{tokens} tokens need {blocks} blocks, the table has {block_table.shape[0]}")
        for i in range(blocks):
            if not 0 <= block_table[i] < self.num_blocks:
                raise ValueError(f"block {block_table[i]} of {self.num_blocks}")
        if plane.data == NULL or lent.view.len != plane.heads * tokens * plane.token_stride:
            raise ValueError(
                f"out has {lent.view.len} bytes, {plane.heads * tokens * plane.token_stride} are read"
            )
        if tokens:
            with nogil:
                read_blocks(plane, &block_table[0], self.block_size, tokens, <char *>lent.view.buf)

    def read_run(self, int64_t layer, int64_t index, int64_t slot, int64_t tokens, out):
        """Copy `tokens` tokens from `slot` on to `out`, as in :meth:`read`."""
        cdef plane_t *plane = plane_at(self, layer, index)
        cdef Lent lent = Lent(exporter(out, self.dtypes[layer][index]), True)
        cdef int64_t head, size
        cdef char *target = <char *>lent.view.buf
        if tokens < 0 or not 0 <= slot <= plane.tokens - tokens:
            raise ValueError(f"{tokens} tokens from {slot} of {plane.tokens}")
        size = tokens * plane.token_stride
        if plane.data == NULL or lent.view.len != plane.heads * size:
            raise ValueError(f"out has {lent.view.len} bytes, {plane.heads * size} are read")
        with nogil:
            for head in range(plane.heads):
                memcpy(
                    target + head * size,
                    plane.data + head * plane.head_stride + slot * plane.token_stride,
                    <size_t>size,
                )

    def warmup(self):
        """Make every page of every plane resident, without changing a byte, whoever else writes meanwhile."""
        cdef int64_t number, page = kv_page_size()
        cdef plane_t *plane
        with nogil:
            for number in range(self.first[self.num_layers]):
                plane = &self.planes[number]
                if plane.data != NULL:
                    touch(plane.data, plane.heads * plane.head_stride, page)

    def close(self):
        """Let go of the arrays; every later call is refused."""
        cdef int64_t number
        self.closed = True
        for number in range(self.first[self.num_layers]):
            self.planes[number].data = NULL
        self.arrays = ()
        self.wait = self.graph = None


cdef check_source(Sources self, Copier copier, int64_t index, object array, int rows_axis):
    cdef plane_t *plane = &copier.planes[copier.first[self.layer] + index]
    cdef str want = copier.dtypes[self.layer][index]
    if not isinstance(array, np.ndarray) and not is_mlx(array):
        raise TypeError(
            f"plane {copier.names[self.layer][index]!r} takes a NumPy or MLX array, "
            f"got {type(array).__name__}"
        )
    shape = tuple(array.shape)
    rows = shape[rows_axis] if len(shape) == 3 else -1
    fits = len(shape) == 3 and shape[1 - rows_axis] == plane.heads and shape[2] == plane.width
    if not fits or self.rows not in (-1, rows) or not has_dtype(array, want):
        count = "n" if self.rows == -1 else self.rows
        axes = (plane.heads, count) if rows_axis else (count, plane.heads)
        raise ValueError(
            f"plane {copier.names[self.layer][index]!r} of layer {self.layer} takes {want} "
            f"({axes[0]}, {axes[1]}, {plane.width}), got {dtype_name(array)} {shape}"
        )
    self.rows = rows


cdef lend_source(Sources self, Copier copier, int64_t index, int rows_axis):
    cdef Lent lent = Lent(exporter(self.arrays[index], copier.dtypes[self.layer][index]), False)
    cdef source_t *item = &self.items[index]
    item.data = <char *>lent.view.buf
    item.head_stride = lent.view.strides[1 - rows_axis]
    item.row_stride = lent.view.strides[rows_axis]
    item.item_stride = lent.view.strides[2]
    if in_layer(copier, self.layer, &lent.view):
        self.lent.append(pack_source(self, &copier.planes[copier.first[self.layer] + index], item))
    else:
        self.lent.append(lent)


cdef bytearray pack_source(Sources self, const plane_t *plane, source_t *item):
    """A copy of rows that lie in the planes to be written, for `item` to point to."""
    cdef int64_t head, size = self.rows * plane.token_stride
    cdef bytearray packed = bytearray(plane.heads * size)
    cdef char *target = packed
    for head in range(plane.heads):
        pack_rows(
            target + head * size,
            item,
            item.data + head * item.head_stride,
            self.rows,
            plane.width,
            plane.itemsize,
        )
    item[0] = source_t(target, size, plane.token_stride, plane.itemsize)
    return packed


@cython.auto_pickle(False)
cdef class Sources:
    """Sources(copier, layer, planes, rows_axis=1)\n--\n
    The arrays of one write, checked against the planes of a layer, evaluated, and lent to the copier.

    Parameters
    ----------
    copier : Copier
    layer : int
    planes : sequence of NumPy or MLX arrays
        One for each plane, in the layer's order, of exactly the plane's dtype and of any strides.
    rows_axis : {0, 1}
        ``(rows, heads, width)`` or ``(heads, rows, width)``.

    Raises
    ------
    IndexError
        There is no such layer.
    TypeError
        Something that is neither a NumPy nor an MLX array.
    ValueError
        Wrong number of planes, shape or dtype.
    """

    def __cinit__(self, Copier copier not None, int64_t layer, planes, int rows_axis=1):
        if copier.closed or not 0 <= layer < copier.num_layers:
            raise IndexError(f"layer {layer} of {0 if copier.closed else copier.num_layers}")
        self.copier = copier
        self.layer = layer
        self.count = copier.first[layer + 1] - copier.first[layer]
        if len(planes) != self.count:
            raise ValueError(
                f"layer {layer} has {self.count} planes ({', '.join(copier.names[layer])}), "
                f"got {len(planes)}"
            )
        self.rows = -1
        for index, array in enumerate(planes):
            check_source(self, copier, index, array, rows_axis)
        if copier.by_graph:
            self.arrays = tuple([array.swapaxes(0, 1) for array in planes] if rows_axis == 0 else planes)
            return
        self.arrays = tuple(planes)
        lazy = [array for array in planes if is_mlx(array)]
        if lazy:
            sys.modules["mlx.core"].eval(lazy)
        self.items = <source_t *>calloc(max(1, self.count), sizeof(source_t))
        if self.items == NULL:
            raise MemoryError(f"no memory for {self.count} sources")
        self.lent = []
        for index in range(self.count):
            lend_source(self, copier, index, rows_axis)

    def __dealloc__(self):
        free(self.items)
