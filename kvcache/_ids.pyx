"""Counts and token ids as callers give them: what is one, and what is not."""

import cython
import numpy as np

from cpython.buffer cimport (
    PyBUF_C_CONTIGUOUS,
    PyBUF_FORMAT,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_CheckBuffer,
    PyObject_GetBuffer,
)
from cpython.object cimport PyObject
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.tuple cimport PyTuple_GET_ITEM
from libc.stdint cimport INT32_MAX, int32_t, int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy


cdef object ARRAY = np.ndarray


cdef int64_t as_count(object value, str name, int64_t least) except? -1:
    """An int of at least `least`; what is beyond 2**62 counts as 2**62."""
    cdef int overflow = 0
    cdef int64_t count
    if not PyLong_CheckExact(value):
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
        value = int(value.__index__())
    count = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow < 0 or (overflow == 0 and count < least):
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return <int64_t>MOST if overflow or count > <int64_t>MOST else count


cdef bint is_count(object value) except -1:
    """Whether this stands for a number of tokens, not for token ids."""
    if PyLong_CheckExact(value):
        return True
    if type(value) is ARRAY or type(value) is list or type(value) is Tokens:  # asking for attributes costs 0.15 µs
        return False
    if isinstance(value, (bool, np.bool_, float, np.floating, str, bytes, bytearray)):
        raise TypeError(f"a number of tokens or token ids expected, not {type(value).__name__}")
    return hasattr(value, "__index__") and not hasattr(value, "__len__")


cdef int32_t as_token(object value, int64_t position) except -1:
    cdef int overflow = 0
    cdef int64_t token
    if not PyLong_CheckExact(value):
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"token id at position {position} must be an int, not {type(value).__name__}")
        value = int(value.__index__())
    token = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or token < 0 or token > INT32_MAX:
        raise ValueError(f"token id at position {position} is {value}, ids are 0 to {INT32_MAX}")
    return <int32_t>token


cdef extern from *:
    """
    /* An int that fits and is compact, -1 for whatever else it is. */
    static inline int32_t kv_small_id(PyObject *item)
    {
        if (!PyLong_CheckExact(item))
            return -1;
    #if PY_VERSION_HEX >= 0x030C0000
        if (PyUnstable_Long_IsCompact((PyLongObject *)item)) {
            Py_ssize_t value = PyUnstable_Long_CompactValue((PyLongObject *)item);
            return value < 0 || value > INT32_MAX ? -1 : (int32_t)value;
        }
    #else
        switch (Py_SIZE(item)) {
        case 0: return 0;
        case 1: return (int32_t)((PyLongObject *)item)->ob_digit[0];
        }
    #endif
        return -1;
    }
    """
    int32_t kv_small_id(PyObject *item)

cdef const char *INT32 = "i"  # its buffer format


@cython.final
cdef class Tokens:
    """Token ids, converted once: what every call that takes ids reads in place.

    Parameters
    ----------
    ids : sequence of int or one-dimensional integer array
        0 to 2**31 - 1 each.

    Raises
    ------
    TypeError, ValueError
        Naming the position of what is no id.

    Examples
    --------
    >>> from kvcache import Tokens
    >>> prompt = Tokens([464, 3290, 318])
    >>> len(prompt), prompt[-1], list(prompt[:2])
    (3, 318, [464, 3290])
    """

    def __cinit__(self, ids):
        cdef ids_t read
        read_ids(ids, &read)
        self.data = <int32_t *>malloc(max(read.count, <int64_t>1) * sizeof(int32_t))
        if self.data == NULL:
            drop_ids(&read)
            raise MemoryError(f"no memory for {read.count} token ids")
        self.size = self.shape[0] = read.count
        self.strides[0] = sizeof(int32_t)
        memcpy(self.data, read.data, read.count * sizeof(int32_t))
        drop_ids(&read)

    def __dealloc__(self):
        free(self.data)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Tokens(np.asarray(self)[index])
        position = index.__index__()
        if not -self.size <= position < self.size:
            raise IndexError(f"token {index} of {self.size}")
        return self.data[<Py_ssize_t>(position % self.size)]

    def __eq__(self, other):
        if not isinstance(other, Tokens):
            return NotImplemented
        return (self.size == (<Tokens>other).size
                and memcmp(self.data, (<Tokens>other).data, self.size * sizeof(int32_t)) == 0)

    def __hash__(self):
        return hash(bytes(self))

    def __repr__(self):
        shown = ", ".join([str(self.data[at]) for at in range(min(self.size, 6))])
        return f"Tokens([{shown}{', ...' if self.size > 6 else ''}])"

    def __reduce__(self):
        return Tokens, (np.array(self),)

    def __getbuffer__(self, Py_buffer *view, int flags):
        if flags & PyBUF_WRITABLE:
            raise BufferError("token ids do not change")
        view.buf, view.obj, view.len = self.data, self, self.size * sizeof(int32_t)
        view.readonly, view.itemsize, view.ndim = 1, sizeof(int32_t), 1
        view.format = <char *>INT32 if flags & PyBUF_FORMAT else NULL
        view.shape, view.strides = self.shape, self.strides
        view.suboffsets = view.internal = NULL


cdef int read_ids(object prompt, ids_t *ids) except -1:
    """Token ids for as long as a call reads them, an int32 array in place; `drop_ids` afterwards, unless it raises."""
    ids.own, ids.lent, ids.data = NULL, False, NULL
    if type(prompt) is Tokens:
        ids.data, ids.count = (<Tokens>prompt).data, (<Tokens>prompt).size
        return 0
    if isinstance(prompt, (list, tuple)):
        return convert_ids(prompt, ids)
    if isinstance(prompt, (str, bytes, bytearray)):
        raise TypeError(f"token ids must be ints, not {type(prompt).__name__}")
    if isinstance(prompt, memoryview) and isinstance(prompt.obj, (bytes, bytearray)):
        raise TypeError(f"token ids must be ints, not a memoryview of {type(prompt.obj).__name__}")
    if not (PyObject_CheckBuffer(prompt) and borrow_ids(prompt, ids)):
        borrow_ids(as_tokens(prompt), ids)
    return 0


cdef bint borrow_ids(object array, ids_t *ids) except -1:
    """Reads a contiguous int32 array in place; False if it is something else."""
    try:
        PyObject_GetBuffer(array, &ids.view, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS)
    except (BufferError, ValueError, TypeError):
        return False
    ids.data, ids.count = <const int32_t *>ids.view.buf, ids.view.len // sizeof(int32_t)
    if (ids.view.ndim == 1 and ids.view.itemsize == sizeof(int32_t) and is_dense(&ids.view)
            and (ids.view.format[0] == c"i" or sizeof(long) == sizeof(int32_t) and ids.view.format[0] == c"l")):
        if not any_negative(ids.data, ids.count):
            ids.lent = True
            return True
    PyBuffer_Release(&ids.view)
    ids.data = NULL
    return False


cdef bint any_negative(const int32_t *ids, int64_t count) noexcept nogil:
    """In sixteen lanes, which a compiler takes several at a time."""
    cdef int32_t[16] lanes
    cdef int32_t signs = 0
    cdef int64_t position, lane, whole = count - count % 16
    for lane in range(16):
        lanes[lane] = 0
    for position in range(0, whole, 16):
        for lane in range(16):
            lanes[lane] |= ids[position + lane]
    for lane in range(16):
        signs |= lanes[lane]
    for position in range(whole, count):
        signs |= ids[position]
    return signs < 0


cdef inline bint is_dense(const Py_buffer *view) noexcept:
    """MLX gives out strided buffers also where none are asked for."""
    return view.strides == NULL or view.len <= view.itemsize or view.strides[0] == view.itemsize


cdef int convert_ids(object prompt, ids_t *ids) except -1:
    cdef tuple items = tuple(prompt)  # the caller's own list may change while an id is read as an int
    cdef int64_t position
    ids.count = len(items)
    ids.own = <int32_t *>malloc(max(ids.count, <int64_t>1) * sizeof(int32_t))
    if ids.own == NULL:
        raise MemoryError(f"no memory for {ids.count} token ids")
    try:
        for position in range(ids.count):
            ids.own[position] = kv_small_id(PyTuple_GET_ITEM(items, position))
            if ids.own[position] < 0:
                ids.own[position] = as_token(<object>PyTuple_GET_ITEM(items, position), position)
    except BaseException:
        free(ids.own)
        raise
    ids.data = ids.own
    return 0


cdef void drop_ids(ids_t *ids) noexcept:
    if ids.lent:
        PyBuffer_Release(&ids.view)
    free(ids.own)


cdef object as_tokens(object ids):
    """Token ids as a one-dimensional int32 array; the ids themselves where they are one already."""
    if isinstance(ids, (str, bytes, bytearray)):
        raise TypeError(f"token ids must be ints, not {type(ids).__name__}")
    if isinstance(ids, memoryview) and isinstance(ids.obj, (bytes, bytearray)):
        raise TypeError(f"token ids must be ints, not a memoryview of {type(ids.obj).__name__}")
    if isinstance(ids, (list, tuple)) or not hasattr(ids, "__array__") and not is_buffer(ids):
        return tokens_of_sequence(ids)
    return tokens_of_array(np.asarray(ids))


cdef bint is_buffer(object ids) except -1:
    try:
        memoryview(ids)
    except TypeError:
        return False
    return True


cdef object tokens_of_sequence(object ids):
    cdef int32_t[::1] out
    cdef int64_t position
    try:
        items = tuple(ids)  # the caller's own list may change while an id is read as an int
    except TypeError:
        raise TypeError(f"a number of tokens or token ids expected, not {type(ids).__name__}") from None
    tokens = np.empty(len(items), np.int32)
    out = tokens
    for position in range(len(tokens)):
        out[position] = as_token(items[position], position)
    return tokens


cdef object tokens_of_array(object ids):
    if ids.dtype.kind not in "iu":
        raise TypeError(f"token ids must be ints, not {ids.dtype}")
    if ids.ndim != 1:
        raise ValueError(f"token ids must be one-dimensional, not of shape {ids.shape}")
    if ids.dtype == np.int32 and len(ids) and int(ids.min()) >= 0:
        return np.ascontiguousarray(ids)
    wrong = (ids < 0) | (ids > INT32_MAX)
    if wrong.any():
        position = int(wrong.argmax())
        raise ValueError(f"token id at position {position} is {ids[position]}, ids are 0 to {INT32_MAX}")
    return ids.astype(np.int32)


cdef object counts_array(object counts, int64_t size):
    """One int32 count per member."""
    if isinstance(counts, (str, bytes)) or not hasattr(counts, "__len__"):
        return np.full(size, min(as_count(counts, "counts", 0), 2**31 - 1), np.int32)
    items = list(counts.tolist() if isinstance(counts, np.ndarray) else counts)  # ours: it does not change
    if len(items) != size:
        raise ValueError(f"{len(items)} counts for {size} members")
    return np.array([min(as_count(count, "counts", 0), 2**31 - 1) for count in items], np.int32)


cdef int read_step(object tokens, int64_t asked, int64_t members, ids_t *ids) except -1:
    """Ids for every token asked for, flat or a row for each member: as `read_ids`."""
    rows = None
    if getattr(tokens, "ndim", 1) == 2:
        rows = np.asarray(tokens).tolist()
    elif isinstance(tokens, (list, tuple)) and tokens and isinstance(tokens[0], (list, tuple)):
        rows = tokens
    if rows is not None:
        if len(rows) != members or any([len(row) * members != asked for row in rows]):
            raise ValueError(f"token ids of shape {np.shape(rows)} for {asked} tokens asked for by {members} members")
        tokens = [token for row in rows for token in row]
    read_ids(tokens, ids)
    if ids.count != asked:
        count = ids.count
        drop_ids(ids)
        raise ValueError(f"{count} token ids for {asked} tokens asked for")
    return 0
