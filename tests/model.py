"""The oracle: what a cache must answer, said as slowly and plainly as possible.

Tuples and dictionaries, no clever structure, nothing imported from the package. Every call works out what the
cache would look like afterwards, and lets that become true only if it may: `verdict` is all of admission.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum


class Verdict(Enum):
    GRANTED = "granted"
    REFUSED = "refused"  # not now: None or False
    HELD = "held"  # only the end of the holds makes it possible: CacheHeld for a thread that holds
    TOO_LARGE = "too large"  # never: RequestTooLarge


GRANTED, REFUSED, HELD, TOO_LARGE = Verdict


class Block:
    """One block. Its identity says who shares it; `place` is where the cache was last seen to keep it."""

    def __init__(self, place=None):
        self.place = place

    def __repr__(self):
        return f"<block at {self.place}>"


@dataclass(frozen=True)
class Sequence:
    """A live sequence. `rows[layer]` has one entry per position: a tuple of plane rows, None if unwritten."""

    serial: int
    tokens: int
    limit: int
    blocks: tuple[Block, ...]
    rows: tuple[tuple, ...]
    written: tuple[int, ...]  # per layer: the prefix that has been written or committed
    touched: tuple[tuple[int, int], ...]  # per layer: from the first position ever written up to the last

    @property
    def committed(self):
        return min(self.written)


def joined(span, first, end):
    """The positions from the first of either to the last."""
    if first == end or span[0] == span[1]:
        return span if first == end else (first, end)
    return min(span[0], first), max(span[1], end)


def overlap(span, first, end):
    return first < span[1] and span[0] < end and first < end


class Model:
    """A cache without storage, places or speed.

    Parameters
    ----------
    num_blocks, block_size : int
    placement : {"contiguous", "paged"}
    overcommit : float
    num_layers : int
    bound : int, optional
        Used tokens that one call may move; with a bound, sequences may be scattered.
    """

    def __init__(
        self, num_blocks, block_size, placement="contiguous", overcommit=1.0, num_layers=1, bound=None
    ):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.paged = placement == "paged"
        self.overcommit = overcommit
        self.num_layers = num_layers
        self.bound = bound
        self.sequences: dict[object, Sequence] = {}
        self.limbo: frozenset[Block] = frozenset()  # freed under a hold
        self.kept: frozenset[tuple[Block, int]] = (
            frozenset()
        )  # places in blocks still in use, let go under a hold
        self.holds = 0
        self.serial = 0
        self.peak_used_blocks = 0
        self.copied_tokens = 0

    # ---- arithmetic

    def blocks_for(self, tokens):
        return -(-tokens // self.block_size)

    def held_by(self, sequences):
        return {block for sequence in sequences.values() for block in sequence.blocks}

    def claims_of(self, sequences):
        """Blocks up to the limits, and one for each copy that a shared partial block will still need."""
        growth = sum(self.blocks_for(s.limit) - len(s.blocks) for s in sequences.values())
        return growth + sum(self.outstanding_copies(sequences, block) for block in self.held_by(sequences))

    def outstanding_copies(self, sequences, block):
        holders = [s for s in sequences.values() if block in s.blocks]
        return min(sum(1 for s in holders if self.may_append_into(s, block)), len(holders) - 1)

    def may_append_into(self, sequence, block):
        partial = sequence.tokens % self.block_size != 0
        return partial and sequence.blocks[-1] is block and sequence.tokens < sequence.limit

    @property
    def used_blocks(self):
        return len(self.held_by(self.sequences)) + len(self.limbo)

    @property
    def free_blocks(self):
        return self.num_blocks - self.used_blocks

    @property
    def claimed_blocks(self):
        return self.claims_of(self.sequences)

    def is_shared(self, block):
        return sum(1 for s in self.sequences.values() if block in s.blocks) > 1

    def limit_of(self, prompt, max_tokens=None, max_new_tokens=None):
        if max_new_tokens is not None:
            return prompt + max_new_tokens
        return max_tokens if max_tokens is not None else self.blocks_for(prompt) * self.block_size

    # ---- what may become true

    def verdict(self, after, without_moves=True):
        """Whether `after` may replace what there is; `without_moves`: it could if nothing may move."""
        new_blocks = len(self.held_by(after) - self.held_by(self.sequences))
        promised = len(self.held_by(after)) + self.claims_of(after)
        if promised > self.overcommit * self.num_blocks or new_blocks > self.free_blocks + len(self.limbo):
            return REFUSED
        if self.holds and (new_blocks > self.free_blocks or not without_moves):
            return HELD
        return GRANTED

    def become(self, after):
        if self.holds:
            self.limbo |= self.held_by(self.sequences) - self.held_by(after)
            self.kept |= self.let_go(after)
        self.sequences = after
        self.peak_used_blocks = max(self.peak_used_blocks, self.used_blocks)

    def let_go(self, after):
        """Places of tokens that no longer belong to the sequence that had them, in blocks still in use."""
        used, places = self.held_by(after), set()
        for request_id, before in self.sequences.items():
            now = after.get(request_id)
            same = now is not None and now.serial == before.serial
            for position in range(before.tokens):
                block = before.blocks[position // self.block_size]
                kept = same and position < now.tokens and now.blocks[position // self.block_size] is block
                if block in used and not kept:
                    places.add((block, position % self.block_size))
        return places

    def overwrites_kept(self, sequence, block, count):
        """Whether appending writes, in a last block of its own, where something is kept by a hold."""
        first = sequence.tokens % self.block_size
        places = range(first, min(first + count, self.block_size)) if first else ()
        return any((block, place) in self.kept for place in places)

    def attempt(self, after, without_moves=True):
        verdict = self.verdict(after, without_moves)
        if verdict is GRANTED:
            self.become(after)
        return verdict

    # ---- where things stand

    def taken_places(self):
        return {block.place for block in self.held_by(self.sequences) | self.limbo}

    def gaps(self):
        """Runs of free blocks as (start, length)."""
        taken, gaps, start = self.taken_places(), [], None
        for place in range(self.num_blocks + 1):
            free = place < self.num_blocks and place not in taken
            if free and start is None:
                start = place
            elif not free and start is not None:
                gaps.append((start, place - start))
                start = None
        return gaps

    @property
    def largest_free_run(self):
        return max((length for _, length in self.gaps()), default=0)

    @property
    def fragmentation(self):
        return 1 - self.largest_free_run / self.free_blocks if self.free_blocks else 0.0

    def has_gap(self, blocks):
        return self.paged or self.largest_free_run >= blocks

    def has_room_after(self, sequence, blocks):
        if self.paged or blocks == 0:
            return True
        if not sequence.blocks:
            return self.has_gap(blocks)
        after = sequence.blocks[-1].place + 1
        return any(start == after and length >= blocks for start, length in self.gaps())

    def settle(self, tables):
        """Takes note of where the cache says that blocks are; returns those that it has moved: (request_id, index).

        Parameters
        ----------
        tables : dict of request_id -> list of int
        """
        before = {request_id: [b.place for b in s.blocks] for request_id, s in self.sequences.items()}
        seen = {block.place: block for block in self.limbo}
        for request_id, sequence in self.sequences.items():
            table = tables[request_id]
            assert len(table) == len(sequence.blocks), (
                f"{request_id!r} holds {len(table)} blocks, {len(sequence.blocks)} expected"
            )
            assert all(0 <= place < self.num_blocks for place in table), (
                f"{request_id!r} holds {table} of {self.num_blocks}"
            )
            if not self.paged and self.bound is None:
                assert table == list(range(table[0], table[0] + len(table))) if table else True, (
                    f"{request_id!r} is not one run: {table}"
                )
            for block, place in zip(sequence.blocks, table, strict=True):
                assert seen.setdefault(place, block) is block, (
                    f"block {place} serves {request_id!r} and somebody else"
                )
        moved = []
        for request_id, sequence in self.sequences.items():
            for index, (old, new) in enumerate(zip(before[request_id], tables[request_id], strict=True)):
                if old not in (None, new):
                    moved.append((request_id, index))
            for block, place in zip(sequence.blocks, tables[request_id], strict=True):
                block.place = place
        assert not (moved and self.paged), f"paged blocks have moved: {moved}"
        assert not (moved and self.holds), f"moved under a hold: {moved}"
        return moved

    # ---- calls

    def allocate(self, request_id, prompt, max_tokens=None, max_new_tokens=None):
        limit = self.limit_of(prompt, max_tokens, max_new_tokens)
        if self.blocks_for(limit) > self.num_blocks:
            return TOO_LARGE
        blocks = tuple(Block() for _ in range(self.blocks_for(prompt)))
        rows = ((None,) * prompt,) * self.num_layers
        unwritten = (0,) * self.num_layers, ((0, 0),) * self.num_layers
        newcomer = Sequence(self.serial + 1, prompt, limit, blocks, rows, *unwritten)
        verdict = self.attempt({**self.sequences, request_id: newcomer}, self.has_gap(len(blocks)))
        self.serial += verdict is GRANTED
        return verdict

    def fork(self, request_id, new_id):
        parent = self.sequences[request_id]
        blocks = parent.blocks if self.paged else tuple(Block() for _ in parent.blocks)
        child = replace(parent, serial=self.serial + 1, blocks=blocks)
        verdict = self.attempt({**self.sequences, new_id: child}, self.has_gap(len(blocks)))
        if verdict is GRANTED:
            self.serial += 1
            self.copied_tokens += 0 if self.paged else parent.tokens
        return verdict

    def append(self, request_id, count=1):
        sequence = self.sequences[request_id]
        if count == 0:
            return GRANTED
        if sequence.tokens + count > sequence.limit:
            return REFUSED
        blocks = list(sequence.blocks)
        copied, waits = 0, False
        if sequence.tokens % self.block_size and self.is_shared(blocks[-1]):
            blocks[-1] = Block()
            copied = sequence.tokens % self.block_size
        elif blocks:
            waits = self.overwrites_kept(sequence, blocks[-1], count)
        more = self.blocks_for(sequence.tokens + count) - len(blocks)
        in_place = self.has_room_after(sequence, more)
        blocks += [Block() for _ in range(more)]
        rows = tuple(layer + (None,) * count for layer in sequence.rows)
        grown = replace(sequence, tokens=sequence.tokens + count, blocks=tuple(blocks), rows=rows)
        after = {**self.sequences, request_id: grown}
        if waits:
            return REFUSED if self.verdict(after) is REFUSED else HELD
        verdict = self.attempt(after, in_place)
        if verdict is GRANTED:
            self.copied_tokens += copied
            if self.holds and not self.paged and sequence.blocks:
                for place, block in enumerate(blocks, sequence.blocks[0].place):
                    block.place = place
        return verdict

    def truncate(self, request_id, tokens):
        sequence = self.sequences[request_id]
        cut = replace(
            sequence,
            tokens=tokens,
            blocks=sequence.blocks[: self.blocks_for(tokens)],
            rows=tuple(layer[:tokens] for layer in sequence.rows),
            written=tuple(min(mark, tokens) for mark in sequence.written),
            touched=tuple((min(first, tokens), min(end, tokens)) for first, end in sequence.touched),
        )
        return self.attempt({**self.sequences, request_id: cut})

    def set_limit(self, request_id, limit):
        if self.blocks_for(limit) > self.num_blocks:
            return TOO_LARGE
        return self.attempt({**self.sequences, request_id: replace(self.sequences[request_id], limit=limit)})

    def compact(self):
        return HELD if self.holds and not self.paged else GRANTED

    def free(self, request_id):
        self.become({other: s for other, s in self.sequences.items() if other != request_id})

    def commit(self, request_id, tokens=None):
        sequence = self.sequences[request_id]
        tokens = sequence.tokens if tokens is None else tokens
        written = tuple(max(mark, tokens) for mark in sequence.written)
        touched = tuple(joined(span, 0, tokens) for span in sequence.touched)
        self.sequences[request_id] = replace(sequence, written=written, touched=touched)

    def write(self, request_id, layer, rows, start=None):
        """Writes `rows`, one tuple of plane rows per token; a refusal stands for `CacheFull`."""
        sequence = self.sequences[request_id]
        start = sequence.tokens - len(rows) if start is None else start
        return self.write_many([(request_id, layer, start, rows)])

    def write_many(self, writes):
        """Writes all or nothing: entries are (request_id, layer, start, rows)."""
        if self.holds and any(
            overlap(self.sequences[request_id].touched[layer], start, start + len(rows))
            for request_id, layer, start, rows in writes
        ):
            return HELD
        after, copied = dict(self.sequences), 0
        for request_id, layer, start, rows in writes:
            after[request_id], copies = self.written(after, after[request_id], layer, start, rows)
            copied += copies
        verdict = self.attempt(after)
        self.copied_tokens += copied if verdict is GRANTED else 0
        return verdict

    def written(self, sequences, sequence, layer, start, rows):
        """The sequence after a write, which copies the shared blocks it touches; and the tokens copied."""
        end, size, copied = start + len(rows), self.block_size, 0
        blocks = list(sequence.blocks)
        for index in range(start // size, self.blocks_for(end)) if rows else ():
            if sum(1 for s in sequences.values() if blocks[index] in s.blocks) > 1:
                blocks[index] = Block()
                copied += min(size, sequence.tokens - index * size)
        before = sequence.rows[layer]
        layers = list(sequence.rows)
        layers[layer] = before[:start] + tuple(rows) + before[end:]
        marks = list(sequence.written)
        if start < sequence.committed:
            marks = [min(mark, start) for mark in marks]
        if start <= marks[layer]:
            marks[layer] = max(marks[layer], end)
        touched = list(sequence.touched)
        touched[layer] = joined(touched[layer], start, end)
        made = {"rows": tuple(layers), "written": tuple(marks), "touched": tuple(touched)}
        return replace(sequence, blocks=tuple(blocks), **made), copied

    def set_row(self, request_id, layer, position, row):
        """A row written through a view, of which the cache knows nothing."""
        sequence = self.sequences[request_id]
        rows = list(sequence.rows[layer])
        rows[position] = row
        layers = (*sequence.rows[:layer], tuple(rows), *sequence.rows[layer + 1 :])
        self.sequences[request_id] = replace(sequence, rows=layers)

    # ---- holds

    def hold(self):
        self.holds += 1

    def release(self):
        self.holds -= 1
        if not self.holds:
            self.limbo = self.kept = frozenset()

    @contextmanager
    def rehearsal(self):
        """Whatever is done inside is undone afterwards."""
        before = (
            self.sequences,
            self.limbo,
            self.kept,
            self.serial,
            self.peak_used_blocks,
            self.copied_tokens,
        )
        try:
            yield
        finally:
            (
                self.sequences,
                self.limbo,
                self.kept,
                self.serial,
                self.peak_used_blocks,
                self.copied_tokens,
            ) = before
