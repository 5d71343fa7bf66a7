"""What happened to prefixes: a ring of records that are copied where they happen, and read at leisure."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy


cdef journal_t *journal_new(int64_t capacity, int64_t width) noexcept nogil:
    cdef journal_t *journal = <journal_t *>calloc(1, sizeof(journal_t))
    if journal == NULL:
        return NULL
    journal.capacity, journal.width = capacity, width
    journal.records = <record_t *>calloc(capacity, sizeof(record_t))
    journal.ids = <int32_t *>calloc(capacity * width, sizeof(int32_t))
    if journal.records == NULL or journal.ids == NULL:
        journal_destroy(journal)
        return NULL
    return journal


cdef void journal_destroy(journal_t *journal) noexcept nogil:
    if journal != NULL:
        free(journal.records)
        free(journal.ids)
        free(journal)


cdef void write_down(journal_t *journal, happening_t kind, int64_t serial, int64_t parent, int32_t salt,
                     const int32_t *ids, int64_t count) noexcept nogil:
    cdef int64_t at = journal.next % journal.capacity
    if journal.next - journal.first == journal.capacity:
        journal.first += 1
        journal.dropped += 1
    journal.records[at] = record_t(kind=kind, salt=salt, serial=serial, parent=parent)
    if count:
        memcpy(&journal.ids[at * journal.width], ids, count * sizeof(int32_t))
    journal.next += 1
