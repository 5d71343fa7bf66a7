"""Prefixes: what is found again, named, pinned, cleared, and told."""

from libc.stdint cimport int64_t

from kvcache._looks cimport Looks


cdef class Prefixes(Looks):
    cdef dict pins              # what has been pinned -> (pin_t, how many blocks) of each pin, the newest last

    cdef object last_pin(self, object key)
    cdef object pin_key(self, object request_id, object tokens, object salt)
    cdef list drain(self, bytearray records, bytearray ids, int64_t count)
