"""Packs K/V of some tokens into a chunk's payload, and back: for each layer, each plane, ``(heads, tokens, width)``.

In host memory whole runs are copied without the GIL. Where the host may not touch the arena, its graph planes are read
and written one by one, with the GIL.
"""

import sys

import numpy as np

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from kvcache._copy cimport Copier, keep_error, plane_t, wait
from kvcache._moves cimport span_t

cdef dict BITS = {1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


cdef int64_t payload_bytes(Copier copier, int64_t tokens) noexcept nogil:
    """Bytes that so many tokens have in all planes."""
    cdef int64_t number, size = 0
    for number in range(copier.first[copier.num_layers]):
        size += copier.planes[number].heads * copier.planes[number].token_stride
    return size * tokens


cdef int copier_pack(
    void *copier, const span_t *spans, int64_t count, int64_t tokens, char *payload
) noexcept nogil:
    return pack_spans(<Copier>copier, spans, count, tokens, payload)


cdef int copier_unpack(
    void *copier, const span_t *spans, int64_t count, int64_t tokens, const char *payload
) noexcept nogil:
    return unpack_spans(<Copier>copier, spans, count, tokens, payload)


cdef int pack_spans(
    Copier self, const span_t *spans, int64_t count, int64_t tokens, char *payload
) noexcept nogil:
    if refused(self, spans, count, tokens):
        return 1
    if self.by_graph:
        return pack_by_graph(self, spans, count, tokens, payload)
    copy_planes(self, spans, count, tokens, payload, True)
    return 0


cdef int unpack_spans(
    Copier self, const span_t *spans, int64_t count, int64_t tokens, const char *payload
) noexcept nogil:
    if refused(self, spans, count, tokens):
        return 1
    if self.by_graph:
        return unpack_by_graph(self, spans, count, tokens, payload)
    if self.waits and wait(self):
        return 1
    copy_planes(self, spans, count, tokens, <char *>payload, False)  # which is only read
    return 0


cdef bint refused(Copier self, const span_t *spans, int64_t count, int64_t tokens) noexcept nogil:
    """Whether the arena is closed, or the spans are no tokens of the chunk in slots that it has."""
    cdef int64_t i, slots = self.num_blocks * self.block_size
    if self.closed:
        say_closed(self)
        return True
    for i in range(count):
        if (
            spans[i].count < 0
            or not 0 <= spans[i].row <= tokens - spans[i].count
            or not 0 <= spans[i].slot <= slots - spans[i].count
        ):
            say_span(self, &spans[i], tokens, slots)
            return True
    return False


cdef void say_closed(Copier self) noexcept with gil:
    keep_error(self, ValueError("the arena is closed"))


cdef void say_span(Copier self, const span_t *bad, int64_t tokens, int64_t slots) noexcept with gil:
    keep_error(self, ValueError(
        f"{bad.count} tokens from {bad.row} on, of a chunk of {tokens}, do not lie in slots from {bad.slot} of {slots}"
    ))


cdef void copy_planes(Copier self, const span_t *spans, int64_t count, int64_t tokens, char *payload,
                      bint out) noexcept nogil:
    """From the arena to the payload (`out`), or back."""
    cdef int64_t number, head, i
    cdef size_t size
    cdef plane_t *plane
    cdef char *here
    cdef char *there
    for number in range(self.first[self.num_layers]):
        plane = &self.planes[number]
        for head in range(plane.heads):
            for i in range(count):
                size = <size_t>(spans[i].count * plane.token_stride)
                here = plane.data + head * plane.head_stride + spans[i].slot * plane.token_stride
                there = payload + spans[i].row * plane.token_stride
                if out:
                    memcpy(there, here, size)
                else:
                    memcpy(here, there, size)
            payload += tokens * plane.token_stride


# --- where the host may not touch the arena


cdef int pack_by_graph(
    Copier self, const span_t *spans, int64_t count, int64_t tokens, char *payload
) noexcept with gil:
    cdef int64_t layer, number, size
    cdef plane_t *plane
    mx = sys.modules["mlx.core"]
    try:
        slots = slots_of(spans, count, tokens)
        for layer in range(self.num_layers):
            for number in range(self.first[layer], self.first[layer + 1]):
                plane = &self.planes[number]
                size = plane.heads * tokens * plane.token_stride
                rows = self.graph.gather(layer, number - self.first[layer], slots)
                bits = np.asarray(memoryview(rows.view(getattr(mx, BITS[plane.itemsize].name))))
                packed = np.ascontiguousarray(bits)  # MLX may have it in another order
                memcpy(payload, <const char *>data_of(packed), <size_t>size)
                payload += size
    except BaseException as error:
        return keep_error(self, error)
    return 0


cdef uintptr_t data_of(object array) except? 0:
    """Where a C-contiguous NumPy array begins."""
    return array.ctypes.data


cdef int unpack_by_graph(
    Copier self, const span_t *spans, int64_t count, int64_t tokens, const char *payload
) noexcept with gil:
    cdef int64_t layer, number, size
    cdef plane_t *plane
    mx = sys.modules["mlx.core"]
    try:
        list_ = [(spans[i].row, spans[i].slot, spans[i].count) for i in range(count)]
        for layer in range(self.num_layers):
            arrays = []
            for number in range(self.first[layer], self.first[layer + 1]):
                plane = &self.planes[number]
                size = plane.heads * tokens * plane.token_stride
                bits = np.frombuffer(payload[:size], BITS[plane.itemsize])  # a copy, which the graph may keep
                payload += size
                rows = mx.array(bits.reshape(plane.heads, tokens, plane.width))
                arrays.append(rows.view(self.arrays[layer][number - self.first[layer]].dtype))
            self.graph.write(tuple(arrays), layer, list_)
    except BaseException as error:
        return keep_error(self, error)
    return 0


cdef object slots_of(const span_t *spans, int64_t count, int64_t tokens):
    """Slots of the tokens: a slice where they are one run, else an int32 array."""
    if count == 1:
        return slice(spans[0].slot, spans[0].slot + spans[0].count)
    slots = np.empty(tokens, np.int32)
    for i in range(count):
        slots[spans[i].row : spans[i].row + spans[i].count] = np.arange(spans[i].slot, spans[i].slot + spans[i].count)
    return slots


# --- Python's side


def pack(Copier copier not None, spans, payload):
    """Copy K/V at `spans`, ``(slot, count)`` each, into `payload`, a writable buffer of exactly the size.

    Raises
    ------
    ValueError
        A span leaves the arena, or `payload` is of another size. Nothing has been written then.
    """
    carry(copier, spans, payload, True)


def unpack(Copier copier not None, spans, payload):
    """Copy what `pack` gave to the slots at `spans`; as there."""
    carry(copier, spans, payload, False)


cdef int carry(Copier copier, object spans, object payload, bint out) except -1:
    cdef int64_t i, tokens = 0, count = len(spans)
    cdef Py_buffer view
    cdef int failed
    cdef span_t *list_ = <span_t *>malloc(max(1, count) * sizeof(span_t))
    if list_ == NULL:
        raise MemoryError(f"no memory for {count} spans")
    try:
        for i in range(count):
            slot, length = spans[i]
            list_[i] = span_t(row=tokens, slot=slot, count=length)
            tokens += <int64_t>length
        PyObject_GetBuffer(payload, &view, PyBUF_WRITABLE if out else 0)
        try:
            if view.len != payload_bytes(copier, tokens):
                raise ValueError(
                    f"the payload has {view.len} bytes, {tokens} tokens have {payload_bytes(copier, tokens)}"
                )
            with nogil:
                if out:
                    failed = copier_pack(<void *>copier, list_, count, tokens, <char *>view.buf)
                else:
                    failed = copier_unpack(<void *>copier, list_, count, tokens, <const char *>view.buf)
        finally:
            PyBuffer_Release(&view)
    finally:
        free(list_)
    if failed:
        raise copier.take_error()
    return 0
