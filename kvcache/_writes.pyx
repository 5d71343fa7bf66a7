"""Writes: from positions of sequences to spans of slots, blocks of one's own first. Called under the lock."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport realloc

from kvcache._copy cimport Copier, Sources, copier_write
from kvcache._lock cimport kv_lock_runs_python
from kvcache._moves cimport span_t
from kvcache._pool cimport MOVE_FAILED, NO_MEMORY, NO_ROOM, OK, ceil_div, pool_t, slot_of, spans_t, status_t
from kvcache._reuse cimport cuts_pin
from kvcache._sharing cimport own_blocks, unwish_copies, wish_copies, wish_t
from kvcache._space cimport held, seq_t


cdef void wish_write(pool_t *pool, int32_t who, int64_t start, int64_t count, wish_t *wish) noexcept nogil:
    """Paged: what `wish_copies` does, for the blocks beneath positions [start, start + count)."""
    wish_copies(pool, who, start // pool.space.block_size, ceil_div(start + count, pool.space.block_size), wish)


cdef void unwish_write(pool_t *pool, int32_t who, int64_t start, int64_t count) noexcept nogil:
    unwish_copies(pool, who, start // pool.space.block_size, ceil_div(start + count, pool.space.block_size))


cdef status_t own_and_span(pool_t *pool, spans_t *spans, int32_t who, int64_t start, int64_t count,
                           int64_t row) noexcept nogil:
    """Copies shared blocks beneath positions [start, start + count), then enters their slots for rows from `row` on."""
    cdef int64_t size = pool.space.block_size
    cdef int64_t first = start // size, last = ceil_div(start + count, size)
    cdef int64_t position = start, end, slot
    cdef int32_t run = who
    cdef status_t status = own_blocks(pool, who, first, last, True) if pool.paged else OK
    if not pool.paged and cuts_pin(pool, who, first):
        pool.wanted, pool.unclaimed = held(&pool.space.seqs[who]), 0
        return NO_ROOM
    if status != OK:
        return status
    if reserve_spans(spans, last - first):
        return NO_MEMORY
    while position < start + count:  # a run is one span, a block of a table is one
        if pool.paged:
            end, slot = (position // size + 1) * size, slot_of(pool, who, position)
        else:
            while position >= run_end(pool, run):
                run = pool.space.seqs[run].next_run
            end, slot = run_end(pool, run), slot_in_run(pool, run, position)
        end = min(end, start + count)
        enter_span(spans, row + position - start, slot, end - position)
        position = end
    return OK


cdef inline int64_t run_end(const pool_t *pool, int32_t run) noexcept nogil:
    """The first position of a sequence beyond this run of it."""
    cdef const seq_t *seq = &pool.space.seqs[run]
    return (seq.before + seq.blocks) * pool.space.block_size


cdef inline int64_t slot_in_run(const pool_t *pool, int32_t run, int64_t position) noexcept nogil:
    cdef const seq_t *seq = &pool.space.seqs[run]
    return (seq.start - seq.before) * pool.space.block_size + position


cdef int reserve_spans(spans_t *spans, int64_t more) noexcept nogil:
    cdef void *items
    cdef int64_t capacity = spans.count + more
    if capacity <= spans.capacity:
        return 0
    capacity = max(capacity, 2 * spans.capacity)
    items = realloc(spans.items, capacity * sizeof(span_t))
    if items == NULL:
        return -1
    spans.items = <span_t *>items
    spans.capacity = capacity
    return 0


cdef void enter_span(spans_t *spans, int64_t row, int64_t slot, int64_t count) noexcept nogil:
    cdef span_t *last
    if spans.count:
        last = &spans.items[spans.count - 1]
        if last.slot + last.count == slot and last.row + last.count == row:
            last.count += count
            return
    spans.items[spans.count] = span_t(row=row, slot=slot, count=count)
    spans.count += 1


cdef status_t write_spans(pool_t *pool, const spans_t *spans, Copier copier, Sources sources,
                          int64_t layer) noexcept nogil:
    """Has the arena write what has been entered."""
    cdef int failed
    kv_lock_runs_python(&pool.lock, True)  # the arena may have to
    failed = copier_write(<void *>copier, <void *>sources, layer, spans.items, spans.count)
    kv_lock_runs_python(&pool.lock, False)
    return MOVE_FAILED if failed else OK
