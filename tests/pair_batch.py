"""A decode batch and its oracle: members in order, and what the last append gave to each."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from model import GRANTED, HELD

from kvcache import CacheHeld, SequenceExists, UnknownSequence


@dataclass
class Member:
    """One member: `positions` are those of the last append, `asked` how many it wanted."""

    request_id: object
    serial: int
    asked: int = 0
    positions: list = field(default_factory=list)

    @property
    def was_refused(self):
        return self.asked > len(self.positions)


class BatchPair:
    def __init__(self, pair, ids):
        self.pair, self.model = pair, pair.model
        self.batch = pair.cache.batch(ids)
        self.members = [self.member(request_id) for request_id in ids]
        self.in_step = False
        self.told = None  # the state of the members when `generation` was last read

    def member(self, request_id):
        return Member(request_id, self.model.sequences[request_id].serial)

    def departed(self):
        """Ids of members that have been freed, even if the request_id lives again."""
        live = self.model.sequences
        return [
            m.request_id
            for m in self.members
            if m.request_id not in live or live[m.request_id].serial != m.serial
        ]

    def end_step(self):
        self.in_step = False
        for member in self.members:
            member.asked, member.positions = 0, []

    # ---- membership

    def add(self, request_id):
        if any(member.request_id == request_id for member in self.members):
            pytest.raises(SequenceExists, self.batch.add, request_id)
            return
        self.batch.add(request_id)
        self.members.append(self.member(request_id))
        self.end_step()

    def remove(self, request_id):
        self.batch.remove(request_id)
        self.members = [member for member in self.members if member.request_id != request_id]
        pytest.raises(UnknownSequence, self.batch.remove, request_id)
        self.end_step()

    def reorder(self, indices):
        self.batch.reorder(indices)
        self.members = [self.members[index] for index in indices]
        self.end_step()

    # ---- steps

    def counts_for(self, counts):
        if counts is None:
            return [1] * len(self.members)
        return [counts] * len(self.members) if isinstance(counts, int) else counts[: len(self.members)]

    def append(self, counts):
        arguments = {} if counts is None else {"counts": counts}
        if self.refuses_for_the_departed(lambda: self.batch.append(**arguments)):
            return
        wanted = self.counts_for(counts)
        verdicts = self.predict_append(wanted)
        if verdicts is None:
            return
        if HELD in verdicts:
            before = self.pair.cache.stats()
            pytest.raises(CacheHeld, self.batch.append, **arguments)
            assert self.pair.cache.stats() == before
            return
        first = [self.model.sequences[member.request_id].tokens for member in self.members]
        self.pair.exact_moves = False
        granted = self.pair.perform(lambda: self.batch.append(**arguments))
        for member, count in zip(self.members, wanted, strict=True):
            self.model.append(member.request_id, count)
        assert granted.dtype == np.bool_
        assert granted.tolist() == [verdict is GRANTED for verdict in verdicts]
        self.in_step = True
        for member, count, start, grant in zip(self.members, wanted, first, granted, strict=True):
            member.asked = count
            member.positions = list(range(start, start + count)) if grant else []

    def predict_append(self, wanted):
        """One verdict per member, or None where a hold makes it depend on a choice among gaps."""
        model, verdicts = self.model, []
        if (
            model.holds
            and not model.paged
            and any(
                count and not model.sequences[member.request_id].blocks
                for member, count in self.paired(wanted)
            )
        ):
            return None
        with model.rehearsal():
            for member, count in zip(self.members, wanted, strict=True):
                verdicts.append(model.append(member.request_id, count))
        return verdicts

    def refuses_for_the_departed(self, action):
        departed = self.departed()
        if not departed:
            return False
        held = (CacheHeld,) if self.model.holds else ()
        before = self.pair.cache.stats()
        with pytest.raises((UnknownSequence, *held)) as caught:
            action()
        assert isinstance(caught.value, held) or caught.value.request_id in departed
        assert self.pair.cache.stats() == before
        return True

    def truncate(self, counts):
        live = self.model.sequences
        if self.departed():
            self.refuses_for_the_departed(lambda: self.batch.truncate(0))
            return
        drops = [
            min(count, live[member.request_id].tokens)
            for member, count in zip(self.members, self.counts_for(counts), strict=True)
        ]
        verdicts = [
            self.model.truncate(m.request_id, live[m.request_id].tokens - drop)
            for m, drop in self.paired(drops)
        ]
        dropped = self.pair.perform(lambda: self.batch.truncate(drops))
        assert dropped.tolist() == [verdict is GRANTED for verdict in verdicts]
        self.end_step()

    def paired(self, values):
        return zip(self.members, values, strict=True)

    # ---- writing

    def write(self, layer, skip_refused):
        entries = self.entries(layer)
        given = [row for _, position, row in entries if not (skip_refused and position is None)]
        if not given:
            return
        planes = self.rows_as_planes(given)
        if self.refuses_for_the_departed(lambda: self.batch.write(layer, *planes)):
            return
        if not self.in_step or self.has_lost_positions():
            pytest.raises(ValueError, self.batch.write, layer, *planes)
            return
        writes = [
            (m.request_id, layer, position, [row]) for m, position, row in entries if position is not None
        ]
        verdict = self.model.write_many(writes)
        self.pair.carry_write(verdict, lambda: self.batch.write(layer, *planes))

    def entries(self, layer):
        """One (member, position, row) per token asked for; the position of a refused one is None."""
        self.pair.version += 1
        entries = []
        for member in self.members:
            for index in range(member.asked):
                position = None if member.was_refused else member.positions[index]
                entries.append((member, position, self.pair.new_row(member.serial, position or 0, layer)))
        return entries

    def rows_as_planes(self, rows):
        return self.pair.as_planes(rows, axis=0)

    def has_lost_positions(self):
        live = self.model.sequences
        return any(position >= live[m.request_id].tokens for m in self.members for position in m.positions)

    # ---- comparing

    def slot(self, member, position):
        size = self.model.block_size
        return self.model.sequences[member.request_id].blocks[position // size].place * size + position % size

    def compare(self):
        self.compare_generation()
        if self.departed():
            return
        live, batch = self.model.sequences, self.batch
        assert len(batch.lengths) == len(self.members)
        assert batch.lengths.tolist() == [live[m.request_id].tokens for m in self.members]
        assert batch.starts.tolist() == [self.start(m) for m in self.members]
        self.compare_tables()
        if not self.has_lost_positions():
            self.compare_step()
        for array in (
            batch.slots,
            batch.positions,
            batch.splits,
            batch.lengths,
            batch.starts,
            batch.block_tables,
        ):
            assert array.dtype == np.int32 and array.flags.c_contiguous

    def start(self, member):
        sequence = self.model.sequences[member.request_id]
        one_run = sequence.blocks and self.pair.is_one_run(sequence)
        return sequence.blocks[0].place * self.model.block_size if one_run else -1

    def compare_tables(self):
        tables = [[block.place for block in self.model.sequences[m.request_id].blocks] for m in self.members]
        widest = max((len(table) for table in tables), default=0)
        wanted = [table + [-1] * (widest - len(table)) for table in tables]
        assert self.batch.block_tables.shape == (len(tables), widest)
        assert self.batch.block_tables.tolist() == wanted

    def compare_step(self):
        slots, positions, splits = [], [], [0]
        for member in self.members:
            blank = [-1] * (member.asked - len(member.positions))
            slots += [self.slot(member, position) for position in member.positions] + blank
            positions += member.positions + blank
            splits.append(splits[-1] + len(member.positions))
        if not self.in_step:
            assert set(self.batch.slots.tolist()) <= {-1} and set(self.batch.positions.tolist()) <= {-1}
            assert self.batch.splits.tolist() == [0] * (len(self.members) + 1)
            return
        assert self.batch.slots.tolist() == slots
        assert self.batch.positions.tolist() == positions
        assert self.batch.splits.tolist() == splits

    def compare_generation(self):
        """It differs as soon as a member has moved, grown, been cut or freed."""
        live = self.model.sequences
        now = []
        for member in self.members:
            sequence = live.get(member.request_id)
            if sequence is None or sequence.serial != member.serial:
                now.append(None)
            else:
                now.append((member.serial, sequence.tokens, tuple(block.place for block in sequence.blocks)))
        generation = self.batch.generation
        if self.told is not None and self.told[1] != now:
            assert generation != self.told[0]
        self.told = (generation, now)
