"""The least that a call from Python into native code costs, and that looking at token ids does."""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.string cimport memcmp

cdef extern from "_hash.h" nogil:
    uint64_t kv_hash_ids(const int32_t *ids, int64_t count, const uint64_t *seed)


cdef class Floor:

    def call(self, request_id):
        """Does nothing with one argument."""
        return None

    def hash_and_compare(self, const int32_t[::1] ids, const int32_t[::1] other, int64_t width, int64_t turns):
        """Hashes whole blocks of ids and compares them with the same ones elsewhere; how many are equal, in all."""
        cdef uint64_t[4] seed = [1, 2, 3, 4]
        cdef uint64_t hash = 0
        cdef int64_t at, equal = 0, length = len(ids)
        for _ in range(turns):
            for at in range(0, length - width + 1, width):
                hash ^= kv_hash_ids(&ids[at], width, seed)
                equal += memcmp(&ids[at], &other[at], width * sizeof(int32_t)) == 0
            seed[0] = hash
        return equal if hash != 1 else 0
