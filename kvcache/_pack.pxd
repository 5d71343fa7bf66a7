"""The payload of a chunk: K/V of some tokens of every plane, packed one plane after another."""

from libc.stdint cimport int64_t

from kvcache._copy cimport Copier
from kvcache._moves cimport span_t

# `spans` are runs of slots; their rows are tokens of the payload, which has `tokens`: all of them for a pack. Called
# without the GIL. Nonzero: the exception is in Copier.errors. An unpack in host memory that fails has written nothing.
cdef int copier_pack(
    void *copier, const span_t *spans, int64_t count, int64_t tokens, char *payload
) noexcept nogil
cdef int copier_unpack(
    void *copier, const span_t *spans, int64_t count, int64_t tokens, const char *payload
) noexcept nogil

cdef int64_t payload_bytes(Copier copier, int64_t tokens) noexcept nogil
