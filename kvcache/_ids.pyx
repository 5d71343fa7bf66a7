"""Counts and token ids as callers give them: what is one, and what is not."""

import numpy as np

from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from libc.stdint cimport INT32_MAX, int32_t, int64_t


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
        return ids
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


cdef int check_tokens(object tokens, int64_t asked, int64_t members) except -1:
    """Ids for every token asked for: flat, or a row for each member."""
    rows = None
    if getattr(tokens, "ndim", 1) == 2:
        rows = np.asarray(tokens).tolist()
    elif isinstance(tokens, (list, tuple)) and tokens and isinstance(tokens[0], (list, tuple)):
        rows = tokens
    if rows is None:
        flat = as_tokens(tokens)
    else:
        if len(rows) != members or any([len(row) * members != asked for row in rows]):
            raise ValueError(f"token ids of shape {np.shape(rows)} for {asked} tokens asked for by {members} members")
        flat = as_tokens([token for row in rows for token in row])
    if len(flat) != asked:
        raise ValueError(f"{len(flat)} token ids for {asked} tokens asked for")
    return 0
