"""The index of prefixes: a hash table of entries, the blocks that have their content, and which of these are cached.

Everything costs as many steps as blocks are touched: the table has its size from the beginning, nothing is hashed
twice but what is removed. A hash only says where to look: an entry is found when what precedes it is the entry that was
found before, and its tokens are equal. An entry leaves the table in the moment in which its last block is given away;
entries that came after it name a generation that is no more, so nothing leads to them, and their turn comes.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from kvcache._journal cimport EVICTED, STORED, journal_destroy, write_down
from kvcache._leaves cimport (
    add_leaf,
    check_leaves,
    count_quota,
    forget_leaf,
    is_leaf,
    leaves_destroy,
    leaves_init,
    remove_leaf,
    replace_leaf,
)

cdef uint64_t ALL = 0xFFFFFFFFFFFFFFFF


cdef int index_init(index_t *index, int64_t num_blocks, int64_t block_size, const uint64_t *seed) noexcept nogil:
    """All pages of zeros: what is never used is never resident."""
    cdef int64_t buckets = 1, words = (num_blocks + 63) >> 6, lane
    memset(index, 0, sizeof(index_t))
    while 4 * buckets < 3 * num_blocks:
        buckets *= 2
    index.num_blocks, index.block_size = num_blocks, block_size
    index.mask, index.hash_mask = <uint64_t>buckets - 1, ALL
    memcpy(index.seed, seed, sizeof(index.seed))
    for lane in range(4):
        index.fixed[lane] = 0xA0761D6478BD642FULL * (2 * lane + 1)
    index.ids = <int32_t *>calloc(num_blocks * block_size, sizeof(int32_t))
    index.entry_of = <int32_t *>calloc(num_blocks, sizeof(int32_t))
    index.next_copy = <int32_t *>calloc(num_blocks, sizeof(int32_t))
    index.last_copy = <int32_t *>calloc(num_blocks, sizeof(int32_t))
    index.cached = <uint64_t *>calloc(words, sizeof(uint64_t))
    index.fresh = <uint64_t *>calloc(words, sizeof(uint64_t))
    index.entries = <entry_t *>calloc(num_blocks + 1, sizeof(entry_t))
    index.buckets = <int32_t *>calloc(buckets, sizeof(int32_t))
    index.pinned = <uint64_t *>calloc(words, sizeof(uint64_t))
    index.pins = <int32_t *>calloc(num_blocks, sizeof(int32_t))
    index.gone = <uint32_t *>calloc(buckets, sizeof(uint32_t))
    if (leaves_init(&index.leaves, num_blocks) or index.ids == NULL or index.entry_of == NULL
            or index.next_copy == NULL or index.last_copy == NULL or index.cached == NULL or index.fresh == NULL
            or index.entries == NULL or index.buckets == NULL or index.pinned == NULL or index.pins == NULL
            or index.gone == NULL):
        index_destroy(index)
        return -1
    return 0


cdef void index_destroy(index_t *index) noexcept nogil:
    free(index.ids)
    free(index.entry_of)
    free(index.next_copy)
    free(index.last_copy)
    free(index.cached)
    free(index.fresh)
    free(index.entries)
    free(index.buckets)
    free(index.pinned)
    free(index.pins)
    free(index.gone)
    journal_destroy(index.journal)
    leaves_destroy(&index.leaves)
    memset(index, 0, sizeof(index_t))


# ---- finding

cdef inline uint64_t bucket_of(const index_t *index, int32_t parent, const int32_t *ids) noexcept nogil:
    cdef uint64_t content = kv_hash_ids(ids, index.block_size, index.seed)
    cdef uint64_t hash = kv_hash_after(content, parent, index.entries[parent].generation if parent >= 0 else 0,
                                       index.seed)
    return hash & index.hash_mask & index.mask


cdef inline bint is_after(const index_t *index, int32_t entry, int32_t parent, const int32_t *ids) noexcept nogil:
    """Whether an entry, which has content, has these ids, and comes after `parent`."""
    cdef const entry_t *seen = &index.entries[entry]
    return (seen.parent == parent and (parent < 0 or seen.ancestry == index.entries[parent].generation)
            and memcmp(&index.ids[<int64_t>seen.block * index.block_size], ids,
                       index.block_size * sizeof(int32_t)) == 0)


cdef inline int32_t find_in(const index_t *index, uint64_t bucket, int32_t parent, const int32_t *ids) noexcept nogil:
    cdef int32_t entry = index.buckets[bucket] - 1
    while entry >= 0 and not is_after(index, entry, parent, ids):
        entry = index.entries[entry].next - 1
    return entry


cdef int32_t find_after(const index_t *index, int32_t parent, const int32_t *ids) noexcept nogil:
    """The entry of a block of ids after `parent`, or, after -1 - salt, at the beginning of a prompt; -1 for none."""
    return find_in(index, bucket_of(index, parent, ids), parent, ids)


cdef inline int32_t find_next(const index_t *index, int32_t entry, const int32_t *ids) noexcept nogil:
    """The same, and nothing is hashed where it was entered right after the one before it, as most of a prompt is."""
    if entry >= 0 and index.entries[entry + 1].generation & 1 and is_after(index, entry + 1, entry, ids):
        return entry + 1
    return find_after(index, entry, ids)


cdef int64_t match_ids(const index_t *index, int32_t salt, const int32_t *ids, int64_t most,
                       int32_t *found) noexcept nogil:
    """How many of the first `most` whole blocks are there; `found`, unless it is NULL, is told their entries."""
    cdef int32_t entry = -1 - salt
    cdef int64_t count
    for count in range(most):
        entry = find_next(index, entry, ids + count * index.block_size)
        if entry < 0:
            return count
        if found != NULL:
            found[count] = entry
    return most


# ---- entries

cdef int32_t enter_block(index_t *index, int32_t parent, int64_t block) noexcept nogil:
    """The ids at a block, which has no entry, are content after `parent`: its entry, a new one or that of its twins."""
    cdef const int32_t *ids = &index.ids[block * index.block_size]
    cdef uint64_t bucket = bucket_of(index, parent, ids)
    cdef int32_t entry = find_in(index, bucket, parent, ids)
    cdef int32_t salt = index.leaves.salt[parent] if parent >= 0 else -1 - parent
    cdef entry_t *new
    if entry >= 0:
        join_entry(index, entry, block)
        return entry
    entry = index.unused - 1
    if entry >= 0:
        index.unused = index.entries[entry].next
    else:
        entry = index.touched
        index.touched += 1
    new = &index.entries[entry]
    new.parent = parent
    new.ancestry = index.entries[parent].generation if parent >= 0 else 0
    new.generation += 1
    new.next, new.before = index.buckets[bucket], 0
    if new.next:
        index.entries[new.next - 1].before = entry + 1
    new.kids = new.cached = 0
    new.block = <int32_t>block
    index.buckets[bucket] = entry + 1
    index.entry_of[block] = entry + 1
    index.num_entries += 1
    if index.leaves.salt[entry] != salt:
        index.leaves.salt[entry] = salt
    if index.journal != NULL:
        write_down(index.journal, STORED, serial_of(index, entry, new.generation),
                   serial_of(index, parent, new.ancestry), salt, ids, index.block_size)
    return entry


cdef int64_t serial_of(const index_t *index, int32_t entry, uint32_t generation) noexcept nogil:
    """A number that no other entry has or had; -1 for what precedes a prompt."""
    return <int64_t>generation >> 1 << 32 | <int64_t>entry if entry >= 0 else -1


cdef void join_entry(index_t *index, int32_t entry, int64_t block) noexcept nogil:
    """One more block, which has no entry and is held, has this content."""
    index.entry_of[block] = entry + 1
    link_copy(index, entry, block, True)


cdef void link_copy(index_t *index, int32_t entry, int64_t block, bint first) noexcept nogil:
    """Lists a block first, or last, among those of one content; there is another one."""
    cdef int32_t head = index.entries[entry].block
    cdef int32_t tail = index.last_copy[head] - 1 if index.last_copy[head] else head
    if first:
        index.next_copy[block], index.last_copy[block] = head + 1, tail + 1
        index.last_copy[head] = <int32_t>block + 1
        index.entries[entry].block = <int32_t>block
    else:
        index.next_copy[block], index.last_copy[block] = 0, tail + 1
        index.next_copy[tail] = index.last_copy[head] = <int32_t>block + 1


cdef void unlink_copy(index_t *index, int32_t entry, int64_t block) noexcept nogil:
    """Takes a block out of the list, which has another one."""
    cdef int32_t head = index.entries[entry].block
    cdef int32_t after = index.next_copy[block], before = index.last_copy[block]
    if block == head:
        index.entries[entry].block = head = after - 1
        index.last_copy[head] = before if before != after else 0
    else:
        index.next_copy[before - 1] = after
        if after:
            index.last_copy[after - 1] = before
        else:
            index.last_copy[head] = before if before != head + 1 else 0
    index.next_copy[block] = index.last_copy[block] = 0


cdef inline void relink(index_t *index, int64_t block, bint first) noexcept nogil:
    cdef int32_t entry = entry_at(index, block)
    if has_twin(index, block):
        unlink_copy(index, entry, block)
        link_copy(index, entry, block, first)


cdef void forget_block(index_t *index, int64_t block) noexcept nogil:
    """A block, which has an entry, loses its content; with the last one goes the entry."""
    drop_block(index, block, False)


cdef void evict_block(index_t *index, int64_t block) noexcept nogil:
    """The same, since its memory is needed: until another one takes the place, it is remembered that it was there."""
    drop_block(index, block, True)


cdef inline void drop_block(index_t *index, int64_t block, bint evicted) noexcept nogil:
    cdef int32_t entry = entry_at(index, block)
    if is_cached(index, block):
        uncache_block(index, block)
    if has_twin(index, block):
        unlink_copy(index, entry, block)
    else:
        remove_entry(index, entry, evicted)
    index.entry_of[block] = 0


cdef void remove_entry(index_t *index, int32_t entry, bint evicted) noexcept nogil:
    cdef entry_t *gone = &index.entries[entry]
    cdef uint64_t hash = full_hash(index, gone.parent, gone.ancestry,
                                   &index.ids[<int64_t>gone.block * index.block_size])
    if evicted:
        index.gone[hash & index.mask] = print_of(hash)
    if gone.before:
        index.entries[gone.before - 1].next = gone.next
    else:
        index.buckets[hash & index.hash_mask & index.mask] = gone.next
    if gone.next:
        index.entries[gone.next - 1].before = gone.before
    forget_leaf(&index.leaves, entry)
    if index.journal != NULL:
        write_down(index.journal, EVICTED, serial_of(index, entry, gone.generation),
                   serial_of(index, gone.parent, gone.ancestry), index.leaves.salt[entry],
                   &index.ids[<int64_t>gone.block * index.block_size], index.block_size)
    gone.generation += 1
    gone.next = index.unused
    index.unused = entry + 1
    index.num_entries -= 1


# ---- blocks that nobody holds

cdef inline bint may_leave(const index_t *index, int32_t entry) noexcept nogil:
    """Whether a block of the entry may be evicted: it has a cached one, and nothing cached comes after it."""
    return index.entries[entry].kids == 0 and index.entries[entry].cached > 0


cdef int32_t cached_copy(const index_t *index, int32_t entry) noexcept nogil:
    """A cached block of the entry, not a fresh one; -1 for none."""
    cdef int32_t head = index.entries[entry].block
    cdef int32_t block = index.last_copy[head] - 1 if index.last_copy[head] else head
    while bit_of(index.fresh, block) and block != head:
        block = index.last_copy[block] - 1
    return block if is_cached(index, block) and not bit_of(index.fresh, block) else -1


cdef void add_kid(index_t *index, int32_t entry) noexcept nogil:
    """The entry has a cached block, which keeps what precedes it from being evicted."""
    cdef int32_t parent = parent_of(index, entry)
    if parent >= 0:
        index.entries[parent].kids += 1
        if is_leaf(&index.leaves, parent):
            remove_leaf(&index.leaves, parent)


cdef void remove_kid(index_t *index, int32_t entry) noexcept nogil:
    """The entry, which may be a leaf, has no cached block any more; the one before it may be a leaf in its stead."""
    cdef int32_t parent = parent_of(index, entry)
    cdef bint follows = False
    if parent >= 0:
        index.entries[parent].kids -= 1
        follows = may_leave(index, parent)
    if is_leaf(&index.leaves, entry):
        if follows:
            replace_leaf(&index.leaves, entry, parent)
        else:
            remove_leaf(&index.leaves, entry)
    elif follows:
        add_leaf(&index.leaves, parent)


cdef void cache_block(index_t *index, int64_t block, bint fresh) noexcept nogil:
    """Nobody holds the block, which has an entry, any more. Of several those that come later first."""
    cdef uint64_t bit = <uint64_t>1 << (block & 63)
    index.cached[block >> 6] |= bit
    relink(index, block, False)
    if fresh:
        index.fresh[block >> 6] |= bit
        index.fresh_blocks += 1
    else:
        count_cached(index, entry_at(index, block))


cdef inline void count_cached(index_t *index, int32_t entry) noexcept nogil:
    """One more block of the entry may be evicted, in its turn."""
    index.cached_blocks += 1
    count_quota(&index.leaves, entry, 1)
    index.entries[entry].cached += 1
    if index.entries[entry].cached == 1:
        add_kid(index, entry)
        if may_leave(index, entry):
            add_leaf(&index.leaves, entry)


cdef void uncache_block(index_t *index, int64_t block) noexcept nogil:
    """A cached block is held again, or given away. Of several those that come earlier first."""
    cdef int32_t entry = entry_at(index, block)
    cdef uint64_t bit = <uint64_t>1 << (block & 63)
    index.cached[block >> 6] &= ~bit
    relink(index, block, True)
    if index.fresh[block >> 6] & bit:
        index.fresh[block >> 6] &= ~bit
        index.fresh_blocks -= 1
        return
    index.cached_blocks -= 1
    count_quota(&index.leaves, entry, -1)
    index.entries[entry].cached -= 1
    if index.entries[entry].cached == 0:
        remove_kid(index, entry)


cdef void settle_block(index_t *index, int64_t block) noexcept nogil:
    """The hold under which a block was let go has ended; it may have been held again since."""
    cdef uint64_t bit = <uint64_t>1 << (block & 63)
    if index.fresh[block >> 6] & bit:
        index.fresh[block >> 6] &= ~bit
        index.fresh_blocks -= 1
        count_cached(index, entry_at(index, block))


# ---- pins

cdef void pin_block(index_t *index, int64_t block) noexcept nogil:
    """A pin holds a block, which is not cached then."""
    index.pinned[block >> 6] |= <uint64_t>1 << (block & 63)
    index.pinned_blocks += 1


cdef void unpin_block(index_t *index, int64_t block) noexcept nogil:
    index.pinned[block >> 6] &= ~(<uint64_t>1 << (block & 63))
    index.pinned_blocks -= 1


# ---- what was there

cdef inline uint32_t print_of(uint64_t hash) noexcept nogil:
    return <uint32_t>(hash >> 32) | 1


cdef inline uint64_t full_hash(const index_t *index, int32_t parent, uint32_t ancestry,
                               const int32_t *ids) noexcept nogil:
    return kv_hash_after(kv_hash_ids(ids, index.block_size, index.seed), parent, ancestry, index.seed)


cdef bint was_evicted(const index_t *index, int32_t parent, const int32_t *ids) noexcept nogil:
    """Whether a block that is not there once was, as far as that is remembered; one in four billion errs."""
    cdef uint64_t hash = full_hash(index, parent, index.entries[parent].generation if parent >= 0 else 0, ids)
    return index.gone[hash & index.mask] == print_of(hash)


# ---- moves

cdef void move_blocks(index_t *index, int64_t source, int64_t destination, int64_t count) noexcept nogil:
    """What is known of blocks goes with them, as the bytes have."""
    cdef int64_t index_, at
    for index_ in range(count):
        at = index_ if destination < source else count - 1 - index_
        if index.entry_of[source + at]:
            move_block(index, source + at, destination + at)


cdef inline void move_bit(uint64_t *words, int64_t block, int64_t to) noexcept nogil:
    if bit_of(words, block):
        words[block >> 6] &= ~(<uint64_t>1 << (block & 63))
        words[to >> 6] |= <uint64_t>1 << (to & 63)


cdef inline void move_block(index_t *index, int64_t block, int64_t to) noexcept nogil:
    cdef int32_t entry = entry_at(index, block), after = index.next_copy[block], before = index.last_copy[block]
    if before:  # it has a twin
        index.next_copy[to], index.last_copy[to] = after, before
        index.next_copy[block] = index.last_copy[block] = 0
        if index.entries[entry].block != block:
            index.next_copy[before - 1] = <int32_t>to + 1
        index.last_copy[after - 1 if after else index.entries[entry].block] = <int32_t>to + 1
    if index.entries[entry].block == block:
        index.entries[entry].block = <int32_t>to
    index.entry_of[to] = index.entry_of[block]
    index.entry_of[block] = 0
    move_bit(index.cached, block, to)
    move_bit(index.fresh, block, to)
    move_bit(index.pinned, block, to)


# ---- checks

cdef str check_index(const index_t *index):
    """The first thing that is wrong, None if nothing is."""
    cdef int64_t block, cached = 0, pinned = 0, fresh = 0, copies = 0, linked = 0, entries = 0
    cdef int32_t entry
    cdef str wrong
    for block in range(index.num_blocks):
        if bit_of(index.fresh, block) and not is_cached(index, block):
            return f"block {block} is freshly let go, and not cached"
        if (is_cached(index, block) or bit_of(index.pinned, block)) and entry_at(index, block) < 0:
            return f"block {block} is cached or pinned, and nothing says what it has"
        if bit_of(index.pinned, block) and (is_cached(index, block) or index.pins[entry_at(index, block)] == 0):
            return f"block {block} is pinned {index.pins[entry_at(index, block)]} times, or cached as well"
        pinned += bit_of(index.pinned, block)
        cached += is_cached(index, block) and not bit_of(index.fresh, block)
        fresh += bit_of(index.fresh, block)
        copies += entry_at(index, block) >= 0
    if cached != index.cached_blocks or fresh != index.fresh_blocks:
        return (f"{cached} blocks are cached and {fresh} freshly so, "
                f"the counts say {index.cached_blocks} and {index.fresh_blocks}")
    for entry in range(index.touched):
        if index.entries[entry].generation & 1:
            entries += 1
            pinned -= index.pins[entry] > 0
            wrong = check_entry(index, entry, &linked) or check_bucket(index, entry)
            if wrong is not None:
                return wrong
    if pinned:
        return f"{pinned} more blocks are pinned than entries"
    if entries != index.num_entries or copies != linked:
        return f"{entries} entries of {linked} blocks, the counts say {index.num_entries} and {copies}"
    wrong = check_kids(index)
    return check_leaves(&index.leaves) if wrong is None else wrong


cdef str check_entry(const index_t *index, int32_t entry, int64_t *linked):
    cdef const entry_t *seen = &index.entries[entry]
    cdef int64_t cached = 0, length = index.block_size * sizeof(int32_t)
    cdef const int32_t *ids = &index.ids[<int64_t>seen.block * index.block_size]
    cdef int32_t block = seen.block, before = index.last_copy[seen.block] - 1
    cdef bint all_cached = False
    if parent_of(index, entry) == seen.parent or seen.parent < 0:
        if find_after(index, seen.parent, ids) != entry:
            return f"entry {entry} of block {block} is not found by its tokens"
    while block >= 0:
        if index.entry_of[block] != entry + 1 or index.last_copy[block] != before + 1:
            return (f"block {block} is listed for entry {entry} after block {before}; it says entry "
                    f"{entry_at(index, block)} and block {index.last_copy[block] - 1}")
        if memcmp(&index.ids[<int64_t>block * index.block_size], ids, length) != 0:
            return f"block {block} has other tokens than entry {entry}, which names it"
        if all_cached and not is_cached(index, block):
            return f"block {block} is held, and listed after cached ones of entry {entry}"
        all_cached = is_cached(index, block)
        cached += is_cached(index, block) and not bit_of(index.fresh, block)
        linked[0] += 1
        before, block = block, index.next_copy[block] - 1
    if index.last_copy[seen.block] != (before + 1 if before != seen.block else 0):
        return (f"entry {entry} ends at block {before}, "
                f"its first block {seen.block} says {index.last_copy[seen.block] - 1}")
    if cached != seen.cached:
        return f"entry {entry} has {cached} cached blocks, its count says {seen.cached}"
    if may_leave(index, entry) != is_leaf(&index.leaves, entry):
        return f"entry {entry} with {seen.kids} kids is {'' if is_leaf(&index.leaves, entry) else 'not '}a leaf"
    return None


cdef str check_bucket(const index_t *index, int32_t entry):
    cdef int32_t after = index.entries[entry].next - 1, before = index.entries[entry].before - 1
    if after >= 0 and index.entries[after].before != entry + 1:
        return f"entry {after} comes after entry {entry} in a bucket, it says {index.entries[after].before - 1}"
    if before >= 0 and index.entries[before].next != entry + 1:
        return f"entry {before} comes before entry {entry} in a bucket, it says {index.entries[before].next - 1}"
    return None


cdef str check_kids(const index_t *index):
    cdef dict kids = {}
    cdef int32_t entry, parent
    for entry in range(index.touched):
        if index.entries[entry].generation & 1 and index.entries[entry].cached:
            parent = parent_of(index, entry)
            kids[parent] = kids.get(parent, 0) + 1
    for entry in range(index.touched):
        if index.entries[entry].generation & 1 and index.entries[entry].kids != kids.get(entry, 0):
            return (f"{kids.get(entry, 0)} entries after entry {entry} are cached, "
                    f"its count says {index.entries[entry].kids}")
    return None
