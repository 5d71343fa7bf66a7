"""What happened to prefixes, for a router: the last records, oldest first, in bounded memory."""

from libc.stdint cimport int32_t, int64_t

ctypedef enum happening_t:
    STORED = 0
    EVICTED = 1
    CLEARED = 2

ctypedef struct record_t:
    happening_t kind
    int32_t salt
    int64_t serial         # of the entry, and of the one before it, -1 for none
    int64_t parent

ctypedef struct journal_t:
    int64_t capacity
    int64_t width          # token ids of a record
    int64_t first          # number of the oldest record that is there
    int64_t next           # number of the next one
    int64_t dropped        # records that nobody has read, and nobody will
    record_t *records      # [capacity], by number modulo capacity
    int32_t *ids           # [capacity * width]

cdef journal_t *journal_new(int64_t capacity, int64_t width) noexcept nogil
cdef void journal_destroy(journal_t *journal) noexcept nogil
cdef void write_down(journal_t *journal, happening_t kind, int64_t serial, int64_t parent, int32_t salt,
                     const int32_t *ids, int64_t count) noexcept nogil
