"""Runs of blocks."""

from libc.stdint cimport int64_t

from kvcache._blocks cimport blocks_t
from kvcache._lock cimport kv_lock_t


cdef class BlockRun:
    cdef readonly int64_t start
    cdef readonly int64_t length
    cdef readonly int64_t generation


cdef class BlockAllocator:
    cdef blocks_t blocks
    cdef kv_lock_t lock
    cdef int64_t generation  # of the newest run

    cdef int take_lock(self) except -1
    cdef int require_live(self, BlockRun run) except -1
    cdef void label(self, int64_t start, int64_t length) noexcept nogil


cdef double fragmentation_of(int64_t longest, int64_t there) noexcept
cdef str block_map_text(bytearray cells, int64_t width, int64_t there, int64_t longest)
