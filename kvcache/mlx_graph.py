"""MLX planes where the host may not touch them: moves and writes as graph nodes, and what they must wait for.

An MLX array is updated in place only if nothing else holds its buffer when the update is dispatched;
otherwise MLX silently copies the whole array. So an update waits for the step before it, is the only
holder of the array, and is given to ``async_eval`` at once (a lazy one could not be evaluated by another
thread). Where the plane lies elsewhere afterwards, a copy was made, and it is counted.

Assigning to an index of an MLX array keeps the Python object: the planes stay the same objects for ever.
"""

import threading

import mlx.core as mx
import numpy as np

from kvcache._copy import address
from kvcache.memory import available_memory

TEMPORARY_BYTES = 64 << 20  # moved rows that are held outside the arena at one time


class Streams:
    """The streams that steps run on: what to wait for before bytes beneath them change.

    Parameters
    ----------
    stream : mx.Stream, mx.ThreadLocalStream, an iterable of them, or None
        None: this thread's default stream. A ThreadLocalStream stands for another stream in every thread.
    """

    def __init__(self, stream=None):
        if stream is None:
            stream = mx.default_stream(mx.default_device())
        given = (stream,) if isinstance(stream, (mx.Stream, mx.ThreadLocalStream)) else tuple(stream)
        for each in given:
            if not isinstance(each, (mx.Stream, mx.ThreadLocalStream)):
                raise TypeError(f"stream takes MLX streams, got {type(each).__name__}")
        if not given:
            raise ValueError("stream names no stream")
        self.device = given[0].device
        self._named = [each for each in given if isinstance(each, mx.Stream)]
        self._local = [each for each in given if isinstance(each, mx.ThreadLocalStream)]
        self._latest = ()  # of the thread that noted last
        self._earlier = []  # noted by other threads since the last wait
        self.note()

    def note(self):
        """Keep the streams that this thread dispatches to now: its thread-local ones and its default one."""
        latest = (*map(_resolved, self._local), mx.default_stream(self.device))
        if latest != self._latest:
            self._earlier.extend(self._latest)
            self._latest = latest

    def wait(self):
        """Return when everything given to ``eval`` or ``async_eval`` on these streams so far is done."""
        earlier, waited = len(self._earlier), []
        for stream in (*self._named, *self._latest, *self._earlier[:earlier]):
            if stream not in waited:
                mx.synchronize(stream)
                waited.append(stream)
        del self._earlier[:earlier]


def _resolved(local):
    with mx.stream(local):
        return mx.default_stream(local.device)


class GraphPlanes:
    """Updates of the planes of one arena, one caller at a time.

    Parameters
    ----------
    layers : sequence of dict of str to mx.array
        Evaluated planes ``(heads, num_blocks * block_size, width)``; updated, never replaced.
    block_size : int
        Tokens in a block.
    streams : Streams
    """

    def __init__(self, layers, block_size, streams):
        self._layers = [list(planes.values()) for planes in layers]
        self._block_size = block_size
        self._streams = streams
        self._lock = threading.Lock()  # an update against whoever reads the planes in another thread
        self._used = set()  # layers that a step in flight may hold: written or viewed since the last wait
        self._pending = set()  # (layer, index) updated since the address was last looked at
        self._counts_copies = streams.device.type == mx.cpu or mx.metal.is_available()
        self._addresses = [[self._address(plane) for plane in planes] for planes in self._layers]
        self._copies = 0
        self._failure = None  # what ended a move halfway: the planes no longer hold what the allocator says

    def settle(self):
        """Wait for the updates so far; return how many of all copied a whole plane.

        Always 0 on CUDA, where asking for an address moves the plane to memory that the host shares.
        """
        with self._lock:
            for layer, index in list(self._pending):
                self._settle(layer, index)
            return self._copies

    def use(self, layer):
        """Note that a view of `layer` is handed out."""
        self._used.add(layer)

    def write(self, arrays, layer, spans):
        """Rows of `arrays`, ``(heads, rows, width)`` each, to slots; a span is ``(row, slot, count)``."""
        with self._lock:
            self._refuse_after_failure()
            if layer in self._used:
                self._wait()
            self._used.add(layer)
            planes = self._layers[layer]
            for index in range(len(planes)):
                self._settle(layer, index)
            rows, slots = _indices(spans, planes[0].shape[1])
            new = [_on_device(array)[:, rows] for array in arrays]
            mx.async_eval(new)  # what fails in these fails before a plane has changed
            self._streams.note()
            for index, plane in enumerate(planes):
                plane[:, slots] = new[index]
                self._pending.add((layer, index))
            mx.async_eval(planes)

    def move(self, moves):
        """Runs of blocks, ``(source, destination, blocks)``, as if copied one after another in every plane.

        What is read is evaluated outside the planes before anything is overwritten, TEMPORARY_BYTES at a
        time. A failure before the first overwriting leaves every plane as it was; after one that comes
        later, every call raises.
        """
        with self._lock:
            self._refuse_after_failure()
            self._wait()
            sources, destinations = content_after(moves)
            begun = False
            try:
                for batch in self._batches(sources, destinations):
                    rows = [taken(self._plane(key), self._slots(read)) for key, read, _ in batch]
                    mx.eval(rows)
                    begun = True
                    self._put(batch, rows)
            except BaseException as error:
                self._failure = error if begun else None
                raise

    def gather(self, layer, index, slots):
        """An evaluated copy of the tokens at `slots`, a slice or an int32 array."""
        with self._lock:
            self._refuse_after_failure()
            copy = taken(self._layers[layer][index], slots if isinstance(slots, slice) else mx.array(slots))
            mx.eval(copy)
            return copy

    def close(self):
        """Bring the count up to date, then let go of the planes."""
        self.settle()
        self._layers = []

    def _put(self, batch, rows):
        for (key, _, written), new in zip(batch, rows, strict=True):
            self._plane(key)[:, self._slots(written)] = new
        for key, _, _ in batch:
            self._pending.add(key)
            self._settle(*key)

    def _batches(self, sources, destinations):
        """Lists of (key, blocks to read, blocks to write): a batch is read whole, then written."""
        batch, size, orders = [], 0, {}
        for layer, planes in enumerate(self._layers):
            for index, plane in enumerate(planes):
                block_bytes = plane.nbytes // plane.shape[1] * self._block_size
                limit = max(1, TEMPORARY_BYTES // block_bytes)
                if limit not in orders:
                    orders[limit] = in_safe_order(sources, destinations, limit)
                for read, written in orders[limit]:
                    full = size + len(read) * block_bytes > TEMPORARY_BYTES
                    if batch and (full or batch[-1][0] == (layer, index)):
                        yield batch
                        batch, size = [], 0
                    batch.append(((layer, index), read, written))
                    size += len(read) * block_bytes
        if batch:
            yield batch

    def _plane(self, key):
        return self._layers[key[0]][key[1]]

    def _slots(self, blocks):
        if blocks[-1] - blocks[0] == len(blocks) - 1 and (np.diff(blocks) == 1).all():
            return slice(int(blocks[0]) * self._block_size, int(blocks[-1] + 1) * self._block_size)
        slots = blocks[:, None] * self._block_size + np.arange(self._block_size)
        return mx.array(slots.astype(np.int32).ravel())

    def _wait(self):
        self._streams.wait()
        self._used.clear()

    def _settle(self, layer, index):
        """Wait for the last update of a plane; count it if the plane now lies elsewhere."""
        if (layer, index) in self._pending:
            plane = self._layers[layer][index]
            mx.eval(plane)
            now = self._address(plane)
            self._copies += now != self._addresses[layer][index]
            self._addresses[layer][index] = now
            self._pending.discard((layer, index))

    def _address(self, plane):
        return address(plane) if self._counts_copies else 0

    def _refuse_after_failure(self):
        if self._failure is not None:
            raise RuntimeError("a move failed halfway, the arena's contents are lost") from self._failure


def usable_memory(device):
    """Bytes for arrays on `device`: on Metal the recommended working set, on the CPU what the machine has."""
    info = mx.device_info(device) if device.type != mx.cpu else {}
    size = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(size) if size else available_memory()


def taken(plane, slots):
    """A lazy copy of tokens of `plane`, which shares no memory with it once it has been evaluated.

    ``mx.contiguous`` of a slice copies, unless the slice is contiguous already.
    """
    if isinstance(slots, slice):
        if plane.shape[0] > 1 and slots.stop - slots.start < plane.shape[1]:
            return mx.contiguous(plane[:, slots])
        slots = mx.arange(slots.start, slots.stop, dtype=mx.int32)
    return mx.take(plane, slots, axis=1)


def content_after(moves):
    """Blocks to read and blocks to write, as int64 arrays, with the effect of `moves` done in list order."""
    ranges = [np.arange(start, start + blocks) for *ends, blocks in moves for start in ends]
    touched = np.unique(np.concatenate(ranges)) if ranges else np.empty(0, np.int64)
    content = touched.copy()
    for source, destination, blocks in moves:
        read, written = np.searchsorted(touched, (source, destination))
        content[written : written + blocks] = content[read : read + blocks].copy()
    changed = content != touched
    return content[changed], touched[changed]


def in_safe_order(sources, destinations, limit):
    """Pairs of arrays of at most `limit` blocks, so that no pair overwrites what a later one reads.

    Blocks that change places in a circle come last, in one pair, however many they are.
    """
    if len(destinations) <= limit:
        return [(sources, destinations)] if len(destinations) else []
    source_of = dict(zip(destinations.tolist(), sources.tolist(), strict=True))
    readers = dict.fromkeys(source_of, 0)
    for source in source_of.values():
        if source in readers:
            readers[source] += 1
    ready = [block for block, count in readers.items() if count == 0]
    for block in ready:  # grows while it is walked
        source = source_of[block]
        if source in readers:
            readers[source] -= 1
            if readers[source] == 0:
                ready.append(source)
    circles = [block for block, count in readers.items() if count]
    chunks = [ready[start : start + limit] for start in range(0, len(ready), limit)] + [circles]
    return [(np.array([source_of[block] for block in chunk]), np.array(chunk)) for chunk in chunks if chunk]


def _on_device(array):
    return array if isinstance(array, mx.array) else mx.array(np.array(array, order="C"))


def _indices(spans, tokens):
    """Rows to take and slots to put them in: slices for one span, int32 arrays for several.

    For a span over all of the `tokens` of a plane as well: MLX would make the rows themselves the new plane.
    """
    if len(spans) == 1 and spans[0][2] < tokens:
        row, slot, count = spans[0]
        return slice(row, row + count), slice(slot, slot + count)
    row, slot, count = np.array(spans, np.int64).reshape(-1, 3).T
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return tuple(mx.array((np.repeat(start, count) + within).astype(np.int32)) for start in (row, slot))
