"""The tests are tested: storage that moves or writes wrongly is caught by comparing contents.

The random walks that the cache passes are run on arenas with one fault each. A fault that no walk notices
would mean that the walks prove less than they seem to.
"""

import pytest
from hands import HandArena, Hands
from pair import WrongContents
from walk import crowded_walk, machine

import kvcache.cache


class AMoveLeftOut(Hands):
    """The last move of a list is forgotten where there are several."""

    def move(self, moves):
        super().move(moves[:-1] if len(moves) > 1 else moves)


class EveryMoveLeftOut(Hands):
    def move(self, moves):
        pass


class MovesInTheWrongOrder(Hands):
    def move(self, moves):
        super().move(moves[::-1])


class MovesToTheRightBeforeTheLeft(Hands):
    """Ascending by source, whatever the direction: right-movers run over each other."""

    def move(self, moves):
        super().move(sorted(moves))


class OverlapCopiedForward(Hands):
    """Block by block from the front: a run that moves right over itself repeats its beginning."""

    def move_one(self, layer, index, source, destination, blocks):
        for block in range(blocks):
            super().move_one(layer, index, source + block, destination + block, 1)


class VForgotten(Hands):
    def move_one(self, layer, index, source, destination, blocks):
        if index == 0:
            super().move_one(layer, index, source, destination, blocks)


class ALayerForgotten(Hands):
    def move_one(self, layer, index, source, destination, blocks):
        if layer != 1:
            super().move_one(layer, index, source, destination, blocks)


class AHeadForgotten(Hands):
    def move_one(self, layer, index, source, destination, blocks):
        plane, size = self.planes[layer][index], self.block_size
        kept = plane[1:, destination * size : (destination + blocks) * size].copy()
        super().move_one(layer, index, source, destination, blocks)
        plane[1:, destination * size : (destination + blocks) * size] = kept


class TheLastBlockForgotten(Hands):
    def move_one(self, layer, index, source, destination, blocks):
        super().move_one(layer, index, source, destination, blocks - 1)


class WrittenOneTokenOff(Hands):
    def write_one(self, layer, index, array, row, slot, count):
        tokens = self.planes[layer][index].shape[1]
        super().write_one(layer, index, array, row, min(slot + 1, tokens - count), count)


class VNotWritten(Hands):
    def write_one(self, layer, index, array, row, slot, count):
        if index == 0:
            super().write_one(layer, index, array, row, slot, count)


class ASharedBlockWrittenInPlace(Hands):
    """What is meant for a copy goes to the block that it was copied from, which others read."""

    def __init__(self, planes, block_size):
        super().__init__(planes, block_size)
        self.origin = {}

    def move(self, moves):
        self.origin.update((destination, source) for source, destination, blocks in moves if blocks == 1)

    def write_one(self, layer, index, array, row, slot, count):
        for offset in range(count):
            block, token = divmod(slot + offset, self.block_size)
            home = self.origin.get(block, block) * self.block_size + token
            super().write_one(layer, index, array, row + offset, home, 1)


class TheCopyOfASharedBlockLeftEmpty(Hands):
    def move(self, moves):
        super().move([move for move in moves if move[2] > 1])


CONTIGUOUS = [
    AMoveLeftOut,
    EveryMoveLeftOut,
    MovesInTheWrongOrder,
    MovesToTheRightBeforeTheLeft,
    OverlapCopiedForward,
    VForgotten,
    ALayerForgotten,
    AHeadForgotten,
    TheLastBlockForgotten,
    WrittenOneTokenOff,
    VNotWritten,
]
PAGED = [
    EveryMoveLeftOut,
    VForgotten,
    ALayerForgotten,
    ASharedBlockWrittenInPlace,
    TheCopyOfASharedBlockLeftEmpty,
    WrittenOneTokenOff,
]


def walk_until_caught(monkeypatch, placement, hands, walks=40):
    """Random walks over caches whose arenas have such hands."""
    monkeypatch.setattr(kvcache.cache, "make_arena", lambda spec, *options: HandArena(spec, hands))
    for seed in range(walks):
        crowded_walk(machine(placement, "numpy", ("float32",))(), seed)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_hands_without_a_fault_pass(monkeypatch, placement):
    walk_until_caught(monkeypatch, placement, Hands, walks=2)


@pytest.mark.parametrize("mutant", CONTIGUOUS)
def test_a_fault_in_a_contiguous_arena_is_caught(monkeypatch, mutant):
    with pytest.raises(WrongContents):
        walk_until_caught(monkeypatch, "contiguous", mutant)


@pytest.mark.parametrize("mutant", PAGED)
def test_a_fault_in_a_paged_arena_is_caught(monkeypatch, mutant):
    with pytest.raises(WrongContents):
        walk_until_caught(monkeypatch, "paged", mutant)
