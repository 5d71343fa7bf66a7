"""Blocks: a bitmap with a summary level says which are free, an index of gaps where a run of n is.

The index keeps each maximal run of free blocks (a gap) in a list of its length class; a bitmap of classes finds
the next list that is not empty. Lengths below 64 have a class each, so the list of length 1 is the free list of
single blocks. A gap's length stands at both its ends, so neighbours merge without a search.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef uint64_t ALL = 0xFFFFFFFFFFFFFFFF


cdef int blocks_init(blocks_t *blocks, int64_t num_blocks, bint with_gaps) noexcept nogil:
    cdef int64_t num_words = (num_blocks + 63) >> 6
    cdef int64_t num_summary = (num_words + 63) >> 6
    memset(blocks, 0, sizeof(blocks_t))
    blocks.words = <uint64_t *>calloc(num_words, sizeof(uint64_t))
    blocks.summary = <uint64_t *>calloc(num_summary, sizeof(uint64_t))
    if with_gaps:
        blocks.cells = <cell_t *>calloc(num_blocks, sizeof(cell_t))
    if blocks.words == NULL or blocks.summary == NULL or (with_gaps and blocks.cells == NULL):
        blocks_destroy(blocks)
        return -1
    blocks.num_blocks = num_blocks
    blocks.num_words = num_words
    memset(blocks.heads, 0xFF, sizeof(blocks.heads))  # NOWHERE
    if with_gaps:
        give_run(blocks, 0, num_blocks)
    else:
        mark_free(blocks, 0, num_blocks)
    return 0


cdef void blocks_destroy(blocks_t *blocks) noexcept nogil:
    free(blocks.words)
    free(blocks.summary)
    free(blocks.cells)
    memset(blocks, 0, sizeof(blocks_t))


# ---- the bitmap

cdef inline uint64_t bits_of_word(int64_t word, int64_t first, int64_t last) noexcept nogil:
    """Those bits of `word` that blocks [first, last] have in it."""
    cdef uint64_t bits = ALL
    if word == first >> 6:
        bits &= ALL << (first & 63)
    if word == last >> 6:
        bits &= ALL >> (63 - (last & 63))
    return bits


cdef void mark_free(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil:
    cdef int64_t word, last = start + length - 1
    for word in range(start >> 6, (last >> 6) + 1):
        blocks.words[word] |= bits_of_word(word, start, last)
        blocks.summary[word >> 6] |= <uint64_t>1 << (word & 63)
    if start >> 12 < blocks.lowest:
        blocks.lowest = start >> 12
    blocks.free_blocks += length


cdef void mark_used(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil:
    cdef int64_t word, last = start + length - 1
    for word in range(start >> 6, (last >> 6) + 1):
        blocks.words[word] &= ~bits_of_word(word, start, last)
        if blocks.words[word] == 0:
            blocks.summary[word >> 6] &= ~(<uint64_t>1 << (word & 63))
    blocks.free_blocks -= length


# ---- single blocks

cdef void take_lowest(blocks_t *blocks, int64_t count, int32_t *taken) noexcept nogil:
    """Takes the `count` lowest free blocks, in ascending order; the caller has seen that there are so many."""
    cdef int64_t word, n = 0, at = blocks.lowest
    cdef uint64_t bits
    cdef int32_t bit
    blocks.free_blocks -= count
    while n < count:
        while blocks.summary[at] == 0:
            at += 1
        word = (at << 6) + kv_ctz(blocks.summary[at])
        bits = blocks.words[word]
        if bits == ALL and count - n >= 64:
            for bit in range(64):
                taken[n + bit] = <int32_t>((word << 6) + bit)
            bits = 0
            n += 64
        while bits and n < count:
            taken[n] = <int32_t>((word << 6) + kv_ctz(bits))
            bits &= bits - 1
            n += 1
        blocks.words[word] = bits
        if bits == 0:
            blocks.summary[at] &= blocks.summary[at] - 1
    blocks.lowest = at


cdef void take_block(blocks_t *blocks, int64_t block) noexcept nogil:
    mark_used(blocks, block, 1)


# ---- the index of gaps

cdef inline int32_t class_of(int64_t length) noexcept nogil:
    cdef int32_t exponent
    if length < 64:
        return <int32_t>length
    exponent = 63 - kv_clz(<uint64_t>length)
    return 64 + ((exponent - 6) << 4) + <int32_t>((length >> (exponent - 4)) & 15)


cdef inline int32_t next_class(const blocks_t *blocks, int32_t wanted) noexcept nogil:
    """The first class at or above `wanted` that has a gap, NOWHERE if none has."""
    cdef int32_t word = wanted >> 6
    cdef uint64_t bits = blocks.classes[word] & (ALL << (wanted & 63))
    while bits == 0:
        word += 1
        if word == CLASS_WORDS:
            return NOWHERE
        bits = blocks.classes[word]
    return (word << 6) + kv_ctz(bits)


cdef inline void add_gap(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil:
    cdef int32_t kind = class_of(length)
    cdef int32_t head = blocks.heads[kind]
    cdef cell_t *cell = &blocks.cells[start]
    cell.length = <int32_t>length
    cell.a = head
    cell.b = NOWHERE
    blocks.cells[start + length - 1].length = <int32_t>length
    if head != NOWHERE:
        blocks.cells[head].b = <int32_t>start
    blocks.heads[kind] = <int32_t>start
    blocks.classes[kind >> 6] |= <uint64_t>1 << (kind & 63)


cdef inline void remove_gap(blocks_t *blocks, int64_t start) noexcept nogil:
    cdef cell_t *cell = &blocks.cells[start]
    cdef int32_t kind = class_of(cell.length)
    if cell.a != NOWHERE:
        blocks.cells[cell.a].b = cell.b
    if cell.b != NOWHERE:
        blocks.cells[cell.b].a = cell.a
        return
    blocks.heads[kind] = cell.a
    if cell.a == NOWHERE:
        blocks.classes[kind >> 6] &= ~(<uint64_t>1 << (kind & 63))


cdef int64_t gap_for(const blocks_t *blocks, int64_t length) noexcept nogil:
    """A gap of at least `length` blocks, of the smallest class that has one; NOWHERE if there is none."""
    cdef int32_t kind, gap
    if length > blocks.free_blocks:
        return NOWHERE
    kind = next_class(blocks, class_of(length))
    if kind == class_of(length) and length >= 64:  # a class of several lengths: not all of them need fit
        gap = blocks.heads[kind]
        while gap != NOWHERE:
            if blocks.cells[gap].length >= length:
                return gap
            gap = blocks.cells[gap].a
        kind = next_class(blocks, kind + 1)
    return blocks.heads[kind] if kind != NOWHERE else NOWHERE


cdef int64_t next_gap_for(const blocks_t *blocks, int64_t gap, int64_t length) noexcept nogil:
    """After `gap`, which gap_for or this has found for `length`: another one, of its class or the next; or NOWHERE."""
    cdef int32_t kind = class_of(blocks.cells[gap].length)
    gap = blocks.cells[gap].a
    while gap != NOWHERE and blocks.cells[gap].length < length:
        gap = blocks.cells[gap].a
    if gap == NOWHERE:
        kind = next_class(blocks, kind + 1)
        gap = blocks.heads[kind] if kind != NOWHERE else NOWHERE
    return gap


cdef int64_t gap_at(const blocks_t *blocks, int64_t block) noexcept nogil:
    """Length of the gap that begins at `block`, which is used or the first of its gap (or past the end): 0 for none."""
    if block >= blocks.num_blocks or not block_is_free(blocks, block):
        return 0
    return blocks.cells[block].length


cdef int64_t gap_start(const blocks_t *blocks, int64_t block) noexcept nogil:
    """The first block of the gap that the free block `block` lies in."""
    cdef int64_t word = block >> 6
    cdef uint64_t used = ~blocks.words[word] & (ALL >> (63 - (block & 63)))
    while used == 0:
        word -= 1
        if word < 0:
            return 0
        used = ~blocks.words[word]
    return (word << 6) + 64 - kv_clz(used)


cdef void take_run(blocks_t *blocks, int64_t gap, int64_t start, int64_t length) noexcept nogil:
    """Takes [start, start + length) out of the gap that begins at `gap`."""
    cdef int64_t end = gap + blocks.cells[gap].length
    remove_gap(blocks, gap)
    if start > gap:
        add_gap(blocks, gap, start - gap)
    if start + length < end:
        add_gap(blocks, start + length, end - start - length)
    mark_used(blocks, start, length)


cdef int64_t give_run(blocks_t *blocks, int64_t start, int64_t length) noexcept nogil:
    """Gives [start, start + length) back, merged with the gaps beside it; returns where that gap begins."""
    cdef int64_t first = start, end = start + length
    mark_free(blocks, start, length)
    if first > 0 and block_is_free(blocks, first - 1):
        first -= blocks.cells[first - 1].length
        remove_gap(blocks, first)
    if end < blocks.num_blocks and block_is_free(blocks, end):
        remove_gap(blocks, end)
        end += blocks.cells[end].length
    add_gap(blocks, first, end - first)
    return first


# ---- what dumps and checks want to know

cdef int64_t largest_free_run(const blocks_t *blocks) noexcept nogil:
    if blocks.free_blocks == 0:
        return 0
    if blocks.cells == NULL:
        return longest_run_of_bits(blocks, NULL)
    return blocks.cells[longest_gap(blocks)].length


cdef int64_t longest_gap(const blocks_t *blocks) noexcept nogil:
    """Where the longest gap begins; there is one."""
    cdef int32_t word = CLASS_WORDS - 1, gap, longest
    while blocks.classes[word] == 0:
        word -= 1
    gap = longest = blocks.heads[(word << 6) + 63 - kv_clz(blocks.classes[word])]
    while gap != NOWHERE and word:  # a class of word 0 is of one length
        if blocks.cells[gap].length > blocks.cells[longest].length:
            longest = gap
        gap = blocks.cells[gap].a
    return longest


cdef int64_t longest_run_of_bits(const blocks_t *blocks, const uint64_t *others) noexcept nogil:
    """Of blocks that are free, or, unless it is NULL, whose bit is set in `others`."""
    cdef int64_t word, inside, running = 0, longest = 0
    cdef uint64_t bits
    for word in range(blocks.num_words):
        bits = blocks.words[word] | (others[word] if others != NULL else 0)
        if bits == ALL:
            running += 64
            continue
        if running and bits & 1:
            running += kv_ctz(~bits)
        longest = max(longest, running)
        running = kv_clz(~bits)
        if kv_popcount(bits) > longest:
            inside = 0
            while bits:
                bits &= bits << 1
                inside += 1
            longest = max(longest, inside)
    return max(longest, running)


cdef int64_t next_free(const blocks_t *blocks, int64_t start) noexcept nogil:
    """The first free block at or after `start`, or num_blocks."""
    cdef int64_t word = start >> 6
    cdef uint64_t bits
    if start >= blocks.num_blocks:
        return blocks.num_blocks
    bits = blocks.words[word] & (ALL << (start & 63))
    while bits == 0:
        word += 1
        if word == blocks.num_words:
            return blocks.num_blocks
        bits = blocks.words[word]
    return (word << 6) + kv_ctz(bits)


cdef int64_t next_used(const blocks_t *blocks, int64_t start) noexcept nogil:
    """The first used block at or after `start`, or num_blocks."""
    cdef int64_t word = start >> 6
    cdef uint64_t bits = ~blocks.words[word] & (ALL << (start & 63))
    while bits == 0:
        word += 1
        if word == blocks.num_words:
            return blocks.num_blocks
        bits = ~blocks.words[word]
    return min((word << 6) + kv_ctz(bits), blocks.num_blocks)


cdef str check_blocks(const blocks_t *blocks):
    """The first thing that is wrong, None if nothing is."""
    cdef int64_t word, counted = 0
    cdef bint summarised
    for word in range(blocks.num_words):
        counted += kv_popcount(blocks.words[word])
        summarised = (blocks.summary[word >> 6] >> (word & 63)) & 1
        if summarised != (blocks.words[word] != 0):
            return f"summary says {summarised} of word {word} of the bitmap, which is {blocks.words[word]:#x}"
        if summarised and word >> 6 < blocks.lowest:
            return f"word {word} has free blocks, the search begins at word {blocks.lowest << 6}"
    if counted != blocks.free_blocks:
        return f"bitmap has {counted} free blocks, free_blocks says {blocks.free_blocks}"
    if blocks.num_blocks & 63 and blocks.words[blocks.num_words - 1] >> (blocks.num_blocks & 63):
        return f"bitmap has free blocks beyond the last one, {blocks.num_blocks - 1}"
    return check_gaps(blocks) if blocks.cells != NULL else None


cdef str check_gaps(const blocks_t *blocks):
    cdef int64_t start = next_free(blocks, 0), end, gaps = 0, listed = 0
    cdef int32_t kind, gap, before
    while start < blocks.num_blocks:
        end = next_used(blocks, start)
        if blocks.cells[start].length != end - start or blocks.cells[end - 1].length != end - start:
            return (f"gap [{start}, {end}) has {end - start} blocks, its ends say "
                    f"{blocks.cells[start].length} and {blocks.cells[end - 1].length}")
        gaps += 1
        start = next_free(blocks, end)
    for kind in range(NUM_CLASSES):
        if ((blocks.classes[kind >> 6] >> (kind & 63)) & 1) != (blocks.heads[kind] != NOWHERE):
            return f"class {kind} of gaps and its bit disagree"
        gap, before = blocks.heads[kind], NOWHERE
        while gap != NOWHERE:
            if not block_is_free(blocks, gap) or class_of(blocks.cells[gap].length) != kind:
                return f"class {kind} lists block {gap}, where no gap of that class begins"
            if blocks.cells[gap].b != before:
                return f"gap {gap} names {blocks.cells[gap].b} as the one before it, not {before}"
            listed += 1
            if listed > gaps:
                return f"index lists more than the {gaps} gaps there are"
            before, gap = gap, blocks.cells[gap].a
    return None if listed == gaps else f"index lists {listed} gaps, the bitmap has {gaps}"


cdef void draw_blocks(const blocks_t *blocks, char *cells) noexcept nogil:
    """One character a block, `.` free, `X` used; `cells` has room for all."""
    cdef int64_t block
    for block in range(blocks.num_blocks):
        cells[block] = c"." if block_is_free(blocks, block) else c"X"
