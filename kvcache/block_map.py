"""The blocks of an arena as a picture: who holds which."""

import struct
import zlib

import numpy as np

FREE = -1
WAITING = -2  # let go under a hold that has not ended
CACHED = -3  # free, but its content is found until somebody takes the block
PINNED = -4  # held by a pin alone
SHARED = 1 << 30  # beside the place of one holder: the block has several

GOLDEN = 0.6180339887498949  # hues a golden section of the circle apart: neighbours are far from each other
PLASTIC = 0.7548776662466927  # and paler or stronger by as even a sequence
GROUNDS = {False: (255, 255, 255), True: (18, 18, 20)}  # of free blocks, by whether the picture is dark
KEPT = {False: (208, 225, 245), True: (38, 54, 80)}  # of cached ones
PINS = {False: (150, 180, 225), True: (76, 108, 160)}  # of pinned ones: of the same blue, stronger
BEYOND = {False: (206, 206, 206), True: (60, 60, 62)}  # pixels of the last row that are no block
HELD_BACK = (128, 128, 128)


def colours_of(places):
    """An RGB colour for each place of the table, the same for as long as a sequence has it.

    Parameters
    ----------
    places : array of int

    Returns
    -------
    array of uint8, ``(len(places), 3)``
    """
    places = np.asarray(places)
    hue = places * GOLDEN % 1.0 * 6.0
    least = (0.05 + 0.45 * (places * PLASTIC % 1.0))[:, None]
    distance = np.abs((hue[:, None] - np.array([0.0, 2.0, 4.0]) + 3.0) % 6.0 - 3.0)
    return np.round(230 * np.clip(2.0 - distance, least, 1.0)).astype(np.uint8)


def image_of(owners, width, dark):
    """A pixel a block, `width` to a row.

    Parameters
    ----------
    owners : array of int32
        Of each block the place of its holder, `SHARED` beside it, or `FREE`, `CACHED`, `PINNED` or `WAITING`.
    width : int
    dark : bool

    Returns
    -------
    array of uint8, ``(rows, width, 3)``
    """
    rows = -(-owners.size // width)
    image = np.empty((rows * width, 3), np.uint8)
    image[owners.size :] = BEYOND[dark]
    pixels = image[: owners.size]
    pixels[owners == FREE] = GROUNDS[dark]
    pixels[owners == CACHED] = KEPT[dark]
    pixels[owners == PINNED] = PINS[dark]
    pixels[owners == WAITING] = HELD_BACK
    held = np.flatnonzero(owners >= 0)
    places = owners[held] & ~SHARED
    pixels[held] = colours_of(np.arange(places.max(initial=-1) + 1))[places]
    pixels[owners >= SHARED] //= 2
    return image.reshape(rows, width, 3)


def png_of(image, scale=1):
    """A picture as a PNG file's bytes.

    Parameters
    ----------
    image : array of uint8, ``(rows, columns, 3)``
    scale : int
        Pixels of the file to a pixel of the image, across and down.

    Returns
    -------
    bytes
    """
    pixels = np.asarray(image, np.uint8).repeat(scale, axis=0).repeat(scale, axis=1)
    rows, columns, _ = pixels.shape
    lines = np.zeros((rows, 1 + 3 * columns), np.uint8)  # each begins with its filter: none
    lines[:, 1:] = pixels.reshape(rows, 3 * columns)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def cells_of(owners, most):
    """The blocks in at most so many equal cells: of each the holder of one of its blocks, a shared one first.

    Where no sequence holds one, a cell is pinned if one of its blocks is, else cached if one is.

    Returns
    -------
    int, array of int32
        Blocks to a cell, and the cells, in the terms of `owners`.
    """
    per_cell = -(-owners.size // most)
    padded = np.full(-(-owners.size // per_cell) * per_cell, WAITING, np.int32)
    padded[: owners.size] = owners
    padded = padded.reshape(-1, per_cell)
    cells = padded.max(axis=1)
    for kept in (CACHED, PINNED):
        cells[(cells < 0) & (padded == kept).any(axis=1)] = kept
    return per_cell, cells
