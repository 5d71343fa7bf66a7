"""The arena as a picture."""

import numpy as np
import pytest

from kvcache import CacheClosed
from kvcache.block_map import (
    BEYOND,
    CACHED,
    FREE,
    HELD_BACK,
    KEPT,
    PINNED,
    PINS,
    SHARED,
    WAITING,
    cells_of,
    colours_of,
    image_of,
)

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])
WHITE = (255, 255, 255)


def pixels(cache, **options):
    return [tuple(pixel) for pixel in cache.block_map_image(**options).reshape(-1, 3).tolist()]


@BOTH
def test_every_sequence_has_a_colour_where_its_blocks_are(make_cache, placement):
    cache = make_cache(placement=placement)
    for name, tokens in (("a", 9), ("b", 4), ("c", 17)):
        cache.allocate_for(name, tokens)
    cache.free_for("b")
    seen = pixels(cache, width=8)
    colours = {}
    for name in cache:
        (colours[name],) = {seen[block] for block in cache.block_table(name)}
    held = {block for name in cache for block in cache.block_table(name).tolist()}
    assert all(seen[block] == WHITE for block in set(range(16)) - held)
    assert len({*colours.values(), WHITE}) == 3


def test_the_picture_is_rows_of_pixels_and_fills_the_last_with_grey(make_cache):
    image = make_cache().block_map_image(width=10)
    assert image.shape == (2, 10, 3) and image.dtype == np.uint8
    assert (image[1, 6:] == image[1, 6]).all() and (image[1, 6] != image[1, 5]).all()


def test_in_the_dark_free_blocks_are_nearly_black(make_cache):
    assert make_cache().block_map_image(16, dark=True).max() < 32


@BOTH
def test_blocks_that_wait_for_a_hold_are_grey(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 12)
    with cache.hold():
        cache.free_for("a")
        assert pixels(cache)[:16].count(HELD_BACK) == 3
    assert HELD_BACK not in pixels(cache)[:16]


@BOTH
@pytest.mark.parametrize("dark", [False, True])
def test_cached_blocks_have_a_colour_of_their_own_until_they_are_taken(make_cache, placement, dark):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", list(range(13)))
    cache.commit("a")
    held = cache.block_table("a")
    cache.free_for("a")
    seen = pixels(cache, width=16, dark=dark)
    assert {block for block in range(16) if seen[block] == KEPT[dark]} == set(held[:3].tolist())
    cache.allocate_for("b", 64)
    assert KEPT[dark] not in pixels(cache, width=16, dark=dark)


@BOTH
@pytest.mark.parametrize("dark", [False, True])
def test_blocks_that_a_pin_alone_holds_have_a_colour_of_their_own(make_cache, placement, dark):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", list(range(13)))
    cache.commit("a")
    held = cache.block_table("a")
    assert cache.pin("a") == 12
    assert PINS[dark] not in pixels(cache, width=16, dark=dark)
    cache.free_for("a")
    seen = pixels(cache, width=16, dark=dark)
    assert {block for block in range(16) if seen[block] == PINS[dark]} == set(held[:3].tolist())
    assert cache.unpin("a") == 12
    assert pixels(cache, width=16, dark=dark).count(KEPT[dark]) == 3


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_that_no_sequence_holds_looks_like_anything_else(dark):
    image = image_of(np.array([FREE, CACHED, PINNED, WAITING], np.int32), 5, dark)[0].astype(int)
    assert tuple(image[4]) == BEYOND[dark]
    distances = [abs(image[i] - image[j]).max() for i in range(5) for j in range(i)]
    assert min(distances) >= 20
    sequences = colours_of(np.arange(500)).astype(int)
    for held in (sequences, sequences // 2):
        assert abs(image[:, None] - held).max(axis=2).min() >= 20


def test_shared_blocks_are_darker(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 8, max_tokens=16)
    before = pixels(cache)
    cache.fork("a", "b")
    after = pixels(cache)
    assert all(sum(after[block]) < sum(before[block]) for block in cache.block_table("a"))


def test_a_scattered_sequence_has_one_colour(make_cache):
    cache = make_cache(max_move_tokens=0)
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    cache.allocate_for("a", 16)
    assert not cache.is_contiguous("a")
    assert len({pixels(cache)[block] for block in cache.block_table("a")}) == 1


def test_a_sequence_that_is_moved_keeps_its_colour(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 8)
    cache.allocate_for("b", 8)
    before = pixels(cache)[cache.block_table("b")[0]]
    cache.free_for("a")
    cache.compact()
    assert pixels(cache)[cache.block_table("b")[0]] == before


def test_neighbours_differ_visibly():
    colours = colours_of(np.arange(500)).astype(int)
    assert (abs(np.diff(colours, axis=0)).max(axis=1) > 60).all()
    assert len(np.unique(colours, axis=0)) > 400


def test_a_width_that_is_none_is_refused(make_cache):
    cache = make_cache()
    for width, error in ((0, ValueError), (-1, ValueError), (True, TypeError), (1.5, TypeError)):
        with pytest.raises(error):
            cache.block_map_image(width)


def test_a_closed_cache_has_no_picture(make_cache):
    cache = make_cache()
    cache.close()
    with pytest.raises(CacheClosed):
        cache.block_map_image()


def test_many_blocks_are_told_in_few_cells():
    owners = np.array([FREE, FREE, 3, FREE, FREE, WAITING, 7 | SHARED, 9, 5], np.int32)
    per_cell, cells = cells_of(owners, 5)
    assert per_cell == 2 and cells.tolist() == [FREE, 3, FREE, 7 | SHARED, 5]


def test_a_cell_is_cached_where_nobody_holds_a_block_of_it():
    owners = np.array([CACHED, 3, FREE, CACHED, CACHED, WAITING, FREE, FREE, CACHED], np.int32)
    assert cells_of(owners, 5)[1].tolist() == [3, CACHED, CACHED, FREE, CACHED]


def test_a_cell_is_pinned_where_no_sequence_holds_a_block_of_it():
    owners = np.array([PINNED, 3, FREE, PINNED, CACHED, PINNED, WAITING, PINNED, PINNED], np.int32)
    assert cells_of(owners, 5)[1].tolist() == [3, PINNED, PINNED, PINNED, PINNED]
