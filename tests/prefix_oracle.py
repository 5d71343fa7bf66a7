"""The oracle of prefixes in paged placement: which blocks are there, who is served by them, and which leave first.

What `model.py` says of blocks and promises holds; here each block may have an entry besides: its tokens, after the
entry before it, or at the beginning of a prompt under a salt. Entries are in a list that is searched from its
beginning to its end; a hit is a comparison of tuples of tokens.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

from model import GRANTED, TOO_LARGE, Block, Model, Sequence


class Entry:
    """One whole block of tokens after `parent`: another entry, or a salt with its type."""

    def __init__(self, parent, ids):
        self.parent, self.ids = parent, ids
        self.blocks = []  # that have this content
        self.used = 0  # the call that has used it last

    def __repr__(self):
        before = self.parent.ids if isinstance(self.parent, Entry) else self.parent
        return f"<{self.ids} after {before} in {self.blocks}>"


@dataclass
class Names:
    """What is known of a sequence's tokens, and how many of its blocks have entered the index."""

    root: tuple  # type and value of the salt
    known: list = field(default_factory=list)
    indexed: int = 0

    def copy(self):
        return Names(self.root, list(self.known), self.indexed)


class Tied(Exception):
    """Two blocks may leave next, and nothing says which."""


class PrefixModel(Model):
    """A paged cache with prefixes, without holds, that evicts the least recently used."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.names: dict[object, Names] = {}
        self.entries: list[Entry] = []
        self.entry_of: dict[Block, Entry] = {}
        self.rows_of: dict[Block, tuple] = {}  # of blocks with an entry: per layer, rows
        self.said: dict[tuple[Block, int], int] = {}  # ids in blocks that several sequences may name
        self.cached: set[Block] = set()
        self.calls = 0  # that the clock counts
        self.evicted = self.doubles = self.queries = self.query_tokens = self.hit_tokens = 0
        self.rehearsing = False

    # ---- the index

    def find(self, parent, ids):
        return next((e for e in self.entries if e.parent is parent and e.ids == ids), None) or next(
            (e for e in self.entries if isinstance(parent, tuple) and e.parent == parent and e.ids == ids),
            None,
        )

    def match(self, root, ids):
        """The entries of the whole blocks of a prompt but that of its last token."""
        found, parent, size = [], root, self.block_size
        for first in range(0, (len(ids) - 1) // size * size, size):
            entry = self.find(parent, tuple(ids[first : first + size]))
            if entry is None:
                break
            found.append(entry)
            parent = entry
        return found

    def probe(self, prompt, salt=None):
        return len(self.match((type(salt), salt), prompt)) * self.block_size

    def prompts(self):
        """Salt and tokens of all that can be found, block by block."""
        reached = {}  # entry: salt, tokens
        waiting = list(self.entries)
        while any(self.reaches(entry, reached) for entry in waiting):
            waiting = [entry for entry in waiting if entry not in reached]
        return list(reached.values())

    def reaches(self, entry, reached):
        if isinstance(entry.parent, tuple):
            reached[entry] = entry.parent[1], list(entry.ids)
        elif entry.parent in reached and entry.parent in self.entries:
            salt, tokens = reached[entry.parent]
            reached[entry] = salt, tokens + list(entry.ids)
        return entry in reached

    def forget(self, block):
        """The block has other content from now on, or none."""
        entry = self.entry_of.pop(block, None)
        self.cached.discard(block)
        self.rows_of.pop(block, None)
        if entry is not None:
            entry.blocks.remove(block)
            if not entry.blocks:
                self.entries.remove(entry)

    def holders(self, block):
        return [s for s in self.sequences.values() if block in s.blocks]

    def enter_more(self, request_id):
        """The whole blocks whose tokens are known and committed have entries."""
        names, sequence, size = self.names[request_id], self.sequences[request_id], self.block_size
        while names.indexed < min(len(names.known), sequence.committed) // size:
            at = names.indexed
            block = sequence.blocks[at]
            parent = self.entry_of.get(sequence.blocks[at - 1]) if at else names.root
            if parent is None:
                return
            entry = self.entry_of.get(block)
            if entry is not None and not (entry.parent is parent or entry.parent == parent == names.root):
                return
            if entry is None:
                self.enter_block(parent, block, tuple(names.known[at * size : (at + 1) * size]))
                self.rows_of[block] = tuple(rows[at * size : (at + 1) * size] for rows in sequence.rows)
            names.indexed += 1

    def enter_block(self, parent, block, ids):
        entry = self.find(parent, ids)
        if entry is None:
            entry = Entry(parent, ids)
            self.entries.append(entry)
        entry.used = self.calls
        entry.blocks.insert(0, block)
        self.entry_of[block] = entry
        for other in [other for other in entry.blocks if other in self.cached]:
            self.forget(other)  # somebody holds the content now
            self.doubles += 1

    # ---- cached blocks

    def leaves(self):
        """Entries with a cached block, after which nothing cached comes."""
        cached = [e for e in self.entries if any(block in self.cached for block in e.blocks)]
        return [e for e in cached if not any(other.parent is e for other in cached)]

    def evict_one(self):
        leaves = self.leaves()
        first = min(leaves, key=lambda entry: entry.used)
        if sum(entry.used == first.used for entry in leaves) > 1:
            raise Tied
        self.forget(next(block for block in first.blocks if block in self.cached))
        self.evicted += 1

    def become(self, after):
        if self.rehearsing:
            super().become(after)
            return
        before, now = self.held_by(self.sequences), self.held_by(after)
        revived = now & self.cached
        self.cached -= revived
        while len(before | now | self.cached) > self.num_blocks:
            self.evict_one()
        super().become(after)
        for block in before - now - self.cached:
            self.forget(block)

    def clear_tails(self):
        """Whoever alone holds a block, and may write behind its end in it, does not leave it to be found."""
        for sequence in self.sequences.values():
            last = sequence.blocks[-1] if sequence.blocks else None
            if last and self.may_append_into(sequence, last) and len(self.holders(last)) == 1:
                self.forget(last)

    @contextmanager
    def rehearsal(self):
        self.rehearsing = True
        try:
            with super().rehearsal():
                yield
        finally:
            self.rehearsing = False

    # ---- calls

    def allocate(self, request_id, prompt, salt=None, **limits):
        ids = None if isinstance(prompt, int) else list(prompt)
        count, size = prompt if ids is None else len(ids), self.block_size
        limit = self.limit_of(count, **limits)
        if self.blocks_for(limit) > self.num_blocks:
            return TOO_LARGE
        self.calls += 1
        root = (type(salt), salt)
        hits = self.match(root, ids) if ids else []
        shared = [entry.blocks[0] for entry in hits]
        cached = len(hits) * size
        rows = tuple(
            sum((self.rows_of[block][layer] for block in shared), ()) + (None,) * (count - cached)
            for layer in range(self.num_layers)
        )
        blocks = (*shared, *(Block() for _ in range(self.blocks_for(count) - len(hits))))
        marks = ((cached,) * self.num_layers, ((0, cached),) * self.num_layers)
        newcomer = Sequence(self.serial + 1, count, limit, blocks, rows, *marks)
        verdict = self.attempt({**self.sequences, request_id: newcomer})
        if verdict is not GRANTED:
            return verdict
        self.serial += 1
        for entry in hits:
            entry.used = self.calls
        self.names[request_id] = Names(root, ids or [], len(hits))
        self.queries += ids is not None
        self.query_tokens += 0 if ids is None else count
        self.hit_tokens += cached
        return verdict

    def free(self, request_id):
        self.calls += 1
        sequence = self.sequences[request_id]
        del self.names[request_id]
        for block in reversed(sequence.blocks):
            entry = self.entry_of.get(block)
            if entry is None or self.is_shared(block):
                continue
            entry.used = self.calls
            if len(entry.blocks) == 1:
                self.cached.add(block)
        super().free(request_id)
        self.clear_tails()

    def fork(self, request_id, new_id):
        self.calls += 1
        verdict = super().fork(request_id, new_id)
        if verdict is GRANTED:
            names, sequence = self.names[request_id], self.sequences[request_id]
            self.names[new_id] = names.copy()
            for position in range(sequence.tokens):
                block = sequence.blocks[position // self.block_size]
                if block not in self.entry_of:
                    self.said.pop((block, position % self.block_size), None)
                if position < len(names.known):
                    self.said[block, position % self.block_size] = names.known[position]
        return verdict

    def append(self, request_id, count=1, ids=None):
        verdict = super().append(request_id, count)
        if verdict is GRANTED and not self.rehearsing:
            self.clear_tails()
            if ids is not None:
                self.note(request_id, self.sequences[request_id].tokens - count, ids)
        return verdict

    def note(self, request_id, start, ids):
        names, sequence = self.names[request_id], self.sequences[request_id]
        if start > len(names.known) or start + len(ids) <= len(names.known):
            return
        for position, token in enumerate(ids, start):
            block = sequence.blocks[position // self.block_size]
            if self.is_shared(block):
                self.said[block, position % self.block_size] = token
        names.known[start:] = ids
        self.enter_more(request_id)

    def may_name(self, request_id, start, ids):
        names, sequence = self.names[request_id], self.sequences[request_id]
        if start + len(ids) > sequence.tokens or start > len(names.known):
            return False
        for position, token in enumerate(ids, start):
            block = sequence.blocks[position // self.block_size]
            if position < len(names.known):
                said = names.known[position]
            elif block in self.entry_of:
                said = self.entry_of[block].ids[position % self.block_size]
            elif not self.is_shared(block):
                continue
            else:
                said = self.said.get((block, position % self.block_size), token)
            if said != token:
                return False
        return True

    def set_tokens(self, request_id, ids, start=None):
        start = len(self.names[request_id].known) if start is None else start
        if not self.may_name(request_id, start, ids):
            return False
        self.note(request_id, start, ids)
        return True

    def truncate(self, request_id, tokens):
        names, before = self.names[request_id], self.sequences[request_id]
        if tokens == before.tokens:
            return GRANTED
        verdict = super().truncate(request_id, tokens)
        if verdict is GRANTED:
            self.unindex(names, before, tokens // self.block_size)
            del names.known[tokens:]
            self.clear_tails()
        return verdict

    def unindex(self, names, sequence, keep):
        """Blocks that others hold keep what they have; those that nobody holds any more have lost it already."""
        for block in sequence.blocks[keep:]:
            if len(self.holders(block)) == 1 and self.holders(block)[0].serial == sequence.serial:
                self.forget(block)
        names.indexed = min(names.indexed, keep)

    def set_limit(self, request_id, limit):
        verdict = super().set_limit(request_id, limit)
        self.clear_tails()
        return verdict

    def commit(self, request_id, tokens=None):
        self.calls += 1
        super().commit(request_id, tokens)
        self.enter_more(request_id)

    def write_many(self, writes):
        before = dict(self.sequences)
        verdict = super().write_many(writes)
        if verdict is not GRANTED:
            return verdict
        size = self.block_size
        for request_id, _, start, rows in writes:
            names, sequence = self.names[request_id], self.sequences[request_id]
            if rows and start < before[request_id].committed:
                self.unindex(names, sequence, start // size)
            for block in sequence.blocks[
                max(start // size, names.indexed) : self.blocks_for(start + len(rows))
            ]:
                if rows and not self.is_shared(block):
                    self.forget(block)
            self.clear_tails()
            self.enter_more(request_id)
        return verdict
