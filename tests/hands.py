"""Storage whose bytes are moved by plain Python: the seam at which moves can be done wrong on purpose."""

import numpy as np

from kvcache._copy import Copier
from kvcache.arena import NumpyArena


class Hands:
    """Carries out moves and writes as a `Copier` does, one NumPy assignment each.

    Parameters
    ----------
    planes : list of list of numpy.ndarray
        Per layer, `(heads, tokens, width)`.
    block_size : int
    """

    def __init__(self, planes, block_size):
        self.planes, self.block_size = planes, block_size
        self.moved = []  # every list of moves that was carried out

    def move(self, moves):
        self.moved.append(list(moves))
        for layer in range(len(self.planes)):
            for index in range(len(self.planes[layer])):
                for move in moves:
                    self.move_one(layer, index, *move)

    def move_one(self, layer, index, source, destination, blocks):
        plane, size = self.planes[layer][index], self.block_size
        rows = plane[:, source * size : (source + blocks) * size].copy()
        plane[:, destination * size : (destination + blocks) * size] = rows

    def write(self, arrays, layer, spans):
        for index, array in enumerate(arrays):
            for span in spans:
                self.write_one(layer, index, array, *span)

    def write_one(self, layer, index, array, row, slot, count):
        self.planes[layer][index][:, slot : slot + count] = array[:, row : row + count]


class HandArena(NumpyArena):
    """A NumPy arena in which `Hands` do what native code does otherwise."""

    def __init__(self, spec, hands):
        super().__init__(spec)
        self.hands = hands([list(planes.values()) for planes in self.planes], spec.block_size)
        self.copier = Copier(self.planes, spec.block_size, None, self.hands)

    def gather(self, layer, index, block_table, tokens):
        size = self.hands.block_size
        slots = (np.asarray(block_table)[:, None] * size + np.arange(size)).ravel()[:tokens]
        return self.hands.planes[layer][index][:, slots]

    def copy_of(self, layer, index, slot, tokens):
        return self.hands.planes[layer][index][:, slot : slot + tokens].copy()
