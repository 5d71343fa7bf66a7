"""What a sequence has, what is written to it, and the sight of the cache as a whole."""

from libc.stdint cimport int32_t, int64_t

from kvcache._copy cimport Copier, Sources
from kvcache._door cimport Door
from kvcache._pool cimport status_t


cdef class Looks(Door):
    cdef status_t write_locked(self, int32_t who, Copier copier, Sources sources, int64_t layer,
                               int64_t start) noexcept nogil
