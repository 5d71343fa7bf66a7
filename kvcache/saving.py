"""Save and load: what is in the index goes to a file, and comes back into the index of another process."""

import numpy as np

from kvcache.cache_file import CacheFile, PlannedChunk, write_cache_file
from kvcache.chunks import chunk_tokens_of


def save_prefixes(cache, path, request_ids, pace):
    """Write what is in the index, or what of it these sequences have, to a file; tokens written."""
    plan, entries = _planned(cache, request_ids)

    def fill(number, buffer):
        pace.wait(len(buffer))
        return cache._pack_entries(*entries[number], buffer)

    return write_cache_file(path, cache.spec, cache.fingerprint, plan, fill)


def _planned(cache, request_ids):
    """Chunks of a file, and of each the numbers and generations of its entries."""
    numbers, parents, generations, ids = cache._entries(request_ids)
    salts = {-1 - number: salt for number, salt in cache._salts().items()}
    after = {}  # entry, or -1 - salt -> rows of those that come next
    for row, parent in enumerate(parents.tolist()):
        after.setdefault(parent, []).append(row)
    most = chunk_tokens_of(cache.spec) // cache.spec.block_size
    plan, entries = [], []
    roots = [
        root for root in sorted(after, reverse=True) if root in salts
    ]  # by a salt forgotten nothing is found
    waiting = [(-1, root, [row]) for root in roots for row in after[root]]
    for parent, root, rows in waiting:  # grows while it is walked: those before come before
        nexts = after.get(int(numbers[rows[-1]]), [])
        while len(nexts) == 1 and len(rows) < most:
            rows.append(nexts[0])
            nexts = after.get(int(numbers[rows[-1]]), [])
        waiting.extend((len(plan), root, [row]) for row in nexts)
        plan.append(PlannedChunk(ids[rows].ravel(), salts[root], parent))
        entries.append((numbers[rows], generations[rows]))
    return plan, entries


def load_prefixes(cache, path, pace):
    """Read a file, verify all of it, then enter what fits; how many of its tokens can be found then."""
    with CacheFile(path, cache.spec, cache.fingerprint) as file:
        prefixes = _Prefixes(file)  # all of it is verified: nothing changes if anything is wrong
        room = cache.free_tokens  # more would push out what has just been loaded
        for leaf in prefixes.leaves:
            if room <= 0:
                break
            room -= _load_one(cache, prefixes, leaf, room, pace)
        return prefixes.count_found(cache)


class _Prefixes:
    """The prefixes of a file, which has been found in order: a path of chunks for each that nothing continues."""

    def __init__(self, file):
        self.file = file
        self.buffer = memoryview(bytearray(file.buffer_bytes))
        self.chunks = file.chunks
        self.ids = [file.read(number, self.buffer)[0].astype(np.int32) for number in range(len(self.chunks))]
        continued = {chunk.parent for chunk in self.chunks}
        self.leaves = [number for number in range(len(self.chunks)) if number not in continued]

    def path_to(self, number):
        """Numbers of the chunks of a prefix, the first one first."""
        path = []
        while number >= 0:
            path.append(number)
            number = self.chunks[number].parent
        return path[::-1]

    def ids_to(self, path):
        """Token ids of all chunks of a path."""
        return np.concatenate([self.ids[number] for number in path])

    def count_found(self, cache):
        """Tokens of the file, each chunk's counted once, that are in the index."""
        total = 0
        seen = {}  # chunk -> tokens of it that have been found
        for leaf in self.leaves:
            path = self.path_to(leaf)
            there = cache._found(self.ids_to(path), self.chunks[leaf].salt)
            for number in path:
                chunk = self.chunks[number]
                found = min(max(there - chunk.first_token, 0), chunk.num_tokens)
                total += max(found - seen.get(number, 0), 0)
                seen[number] = max(found, seen.get(number, 0))
        return total


def _load_one(cache, prefixes, leaf, room, pace):
    """Bring one prefix into the index, as far as there is room; tokens that were not there before."""
    path = prefixes.path_to(leaf)
    ids = prefixes.ids_to(path)
    salt = prefixes.chunks[leaf].salt
    there = cache._found(ids, salt)
    size = cache.spec.block_size
    end = min(len(ids), there + room // size * size)
    if there >= end:
        return 0
    begun = cache._begin_prefix(ids[:end], salt)
    if begun is None:
        return 0
    journey, in_place = begun
    whole = False
    try:
        for number in path:
            chunk = prefixes.chunks[number]
            count = min(chunk.num_tokens, end - chunk.first_token)
            start = max(in_place - chunk.first_token, 0)
            if start >= count:
                continue
            pace.wait(chunk.size)
            _, planes = prefixes.file.read(
                number, prefixes.buffer
            )  # verified again: it may have changed since
            cache._unpack_chunk(journey, chunk.first_token, chunk.num_tokens, planes, start, count)
        whole = True
    finally:
        cache._end_prefix(journey, whole)
    return end - there
