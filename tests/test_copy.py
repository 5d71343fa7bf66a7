"""The native copier by itself: its table of planes, what it lends and gives back, what it refuses."""

import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache._copy import Copier, DType, Sources, address


def planes(tokens=12, dtype=np.float32):
    return {"k": np.zeros((2, tokens, 4), dtype), "v": np.zeros((2, tokens, 3), dtype)}


@pytest.fixture
def layers():
    return [planes(), {"only": np.zeros((1, 12, 2), np.uint8)}]


@pytest.fixture
def copier(layers):
    return Copier(layers, 3)


def rows(count=2):
    return np.ones((2, count, 4), np.float32), np.full((2, count, 3), 2, np.float32)


def test_a_copier_knows_its_arena(copier):
    assert (copier.num_layers, copier.num_blocks, copier.block_size) == (2, 4, 3)


def test_dtype_codes_are_numbered_for_native_engines():
    assert [code.name for code in DType] == ["FLOAT32", "FLOAT16", "BFLOAT16", "UINT32", "UINT8"]
    assert list(map(int, DType)) == [1, 2, 3, 4, 5]


def test_the_address_of_an_array_is_where_its_first_element_lies():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert address(array) == array.ctypes.data
    assert address(array[1:, 2:]) == array.ctypes.data + 24


@pytest.mark.parametrize(
    "change",
    [lambda plane: plane[:, ::2], lambda plane: plane[:, :, ::-1], np.asfortranarray],
    ids=["every second token", "reversed", "Fortran order"],
)
def test_planes_that_are_not_contiguous_are_refused(change):
    with pytest.raises(ValueError, match="layer 1 is not C-contiguous"):
        Copier([planes(), {"k": change(planes()["k"])}], 3)


def test_planes_that_cannot_be_written_are_refused():
    frozen = planes()
    frozen["v"].flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        Copier([frozen], 3)


def test_a_move_changes_every_plane_of_every_layer(copier, layers):
    for plane in (plane for layer in layers for plane in layer.values()):
        plane[:, :3] = 7
    copier.move([(0, 2, 1), (2, 3, 1)])
    for plane in (plane for layer in layers for plane in layer.values()):
        assert (plane[:, [0, 1, 2, 6, 7, 8, 9, 10, 11]] == 7).all() and not plane[:, 3:6].any()


def test_a_write_changes_its_layer_only(copier, layers):
    copier.write(Sources(copier, 0, rows()), 0, [(1, 4, 1)])
    assert (layers[0]["k"][:, 4] == 1).all() and (layers[0]["v"][:, 4] == 2).all()
    assert layers[0]["k"].sum() == 8 and layers[0]["v"].sum() == 12 and not layers[1]["only"].any()


def test_what_moves_and_spans_are_made_of_is_checked(copier):
    for bad in ([(0, 1)], [(0, 1, None)], [None]):
        with pytest.raises((TypeError, ValueError)):
            copier.move(bad)
        with pytest.raises((TypeError, ValueError)):
            copier.write(Sources(copier, 0, rows()), 0, bad)
    with pytest.raises(TypeError):
        copier.write(None, 0, [])
    with pytest.raises(OverflowError):
        copier.move([(0, 1, 2**63)])


def test_a_wait_that_fails_is_raised_and_nothing_is_written(layers):
    def wait():
        raise KeyboardInterrupt

    copier = Copier(layers, 3, wait)
    layers[0]["k"][:, :3] = 7
    with pytest.raises(KeyboardInterrupt):
        copier.move([(0, 1, 1)])
    assert layers[0]["k"].sum() == 7 * 24
    copier.write(Sources(copier, 0, rows()), 0, [(0, 0, 1)])  # new slots: no wait
    sources = Sources(copier, 0, rows())
    sources.overwrites = True
    with pytest.raises(KeyboardInterrupt):
        copier.write(sources, 0, [(0, 6, 1)])
    assert not layers[0]["k"][:, 6].any()


class Recorder:
    """Stands where the graph is: keeps what it is asked for, or fails."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def move(self, moves):
        self.calls.append(("move", moves))
        if self.error:
            raise self.error

    def write(self, arrays, layer, spans):
        self.calls.append(("write", layer, spans, [array.shape for array in arrays]))
        if self.error:
            raise self.error


def test_where_the_host_may_not_write_the_graph_is_asked(layers):
    graph = Recorder()
    copier = Copier(layers, 3, None, graph)
    copier.move([(0, 1, 2), (3, 0, 1)])
    first = tuple(new.swapaxes(0, 1) for new in rows(5))
    copier.write(Sources(copier, 0, first, 0), 0, [(4, 7, 1), (0, 0, 2)])
    assert graph.calls == [
        ("move", [(0, 1, 2), (3, 0, 1)]),
        ("write", 0, [(4, 7, 1), (0, 0, 2)], [(2, 5, 4), (2, 5, 3)]),
    ]
    assert not layers[0]["k"].any()


def test_what_the_graph_raises_is_raised(layers):
    copier = Copier(layers, 3, None, Recorder(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        copier.move([(0, 1, 1)])
    with pytest.raises(OSError, match="gone"):
        copier.write(Sources(copier, 0, rows()), 0, [(0, 0, 1)])


def test_an_error_that_counts_as_false_is_raised_as_it_is(layers):
    class Empty(Exception):
        def __len__(self):
            return 0

    def wait():
        raise Empty

    copier = Copier(layers, 3, wait)
    with pytest.raises(Empty):
        copier.move([(0, 1, 1)])


def test_the_graph_is_not_asked_for_what_leaves_the_arena(layers):
    graph = Recorder()
    copier = Copier(layers, 3, None, graph)
    with pytest.raises(ValueError, match="leaves the arena"):
        copier.move([(0, 3, 2)])
    with pytest.raises(ValueError, match="do not fit"):
        copier.write(Sources(copier, 0, rows()), 0, [(0, 11, 2)])
    assert graph.calls == []


def test_sources_keep_their_rows_alive_and_let_them_go(copier):
    new = rows()
    before = [sys.getrefcount(array) for array in new]
    sources = Sources(copier, 0, new)
    assert (sources.rows, sources.layer, sources.overwrites) == (2, 0, False)
    assert all(a is b for a, b in zip(sources.arrays, new, strict=True))
    assert all(sys.getrefcount(array) > count for array, count in zip(new, before, strict=True))
    del sources
    assert [sys.getrefcount(array) for array in new] == before


def test_refused_sources_let_their_rows_go(copier):
    good, bad = rows()[0], np.zeros((2, 3, 3), np.float32)
    before = sys.getrefcount(good)
    with pytest.raises(ValueError, match=r"takes float32 \(2, 2, 3\), got float32 \(2, 3, 3\)"):
        Sources(copier, 0, (good, bad))
    assert sys.getrefcount(good) == before


# --- reading


def test_blocks_are_read_in_table_order(copier, layers):
    layers[1]["only"][0, :, 0] = np.arange(12)
    out = np.full((1, 7, 2), 9, np.uint8)
    copier.read(1, 0, np.array([2, 3, 0], np.int32), 7, out)
    assert out[0].tolist() == [[6, 0], [7, 0], [8, 0], [9, 0], [10, 0], [11, 0], [0, 0]]


def test_a_run_is_read(copier, layers):
    layers[1]["only"][0, :, 0] = np.arange(12)
    out = np.full((1, 4, 2), 9, np.uint8)
    copier.read_run(1, 0, 5, 4, out)
    assert out[0, :, 0].tolist() == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("layer", "index", "table", "tokens", "error"),
    [
        (2, 0, [0], 1, IndexError),
        (-1, 0, [0], 1, IndexError),
        (1, 1, [0], 1, IndexError),
        (1, -1, [0], 1, IndexError),
        (1, 0, [4], 1, ValueError),
        (1, 0, [-1], 1, ValueError),
        (1, 0, [0], 4, ValueError),
        (1, 0, [0], -1, ValueError),
        (1, 0, [0], 2, ValueError),  # out holds one token
    ],
)
def test_a_read_outside_the_arena_is_refused(copier, layer, index, table, tokens, error):
    out = np.full((1, 1, 2), 9, np.uint8)
    with pytest.raises(error):
        copier.read(layer, index, np.array(table, np.int32), tokens, out)
    assert (out == 9).all()


@pytest.mark.parametrize(("slot", "tokens"), [(-1, 1), (12, 1), (0, 2), (0, -1), (2**62, 1), (0, 2**62)])
def test_a_run_outside_the_arena_is_refused(copier, slot, tokens):
    out = np.full((1, 1, 2), 9, np.uint8)
    with pytest.raises(ValueError, match=r"tokens|bytes"):
        copier.read_run(1, 0, slot, tokens, out)
    assert (out == 9).all()


def test_what_cannot_be_written_is_no_place_to_read_to(copier):
    out = np.zeros((1, 1, 2), np.uint8)
    out.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        copier.read_run(1, 0, 0, 1, out)


def test_nothing_is_read_where_the_host_may_not(layers):
    copier = Copier(layers, 3, None, Recorder())
    with pytest.raises(ValueError, match="bytes"):
        copier.read_run(1, 0, 0, 1, np.zeros((1, 1, 2), np.uint8))
    copier.warmup()  # nothing to touch


def test_a_closed_copier_refuses_everything(copier):
    sources = Sources(copier, 0, rows())
    copier.close()
    copier.close()
    calls = (
        lambda: copier.move([]),
        lambda: copier.write(sources, 0, []),
        lambda: Sources(copier, 0, rows()),
        lambda: copier.read_run(1, 0, 0, 1, np.zeros((1, 1, 2), np.uint8)),
    )
    for call in calls:
        with pytest.raises((ValueError, IndexError)):
            call()
    copier.warmup()


# --- threads


def test_other_threads_run_while_bytes_are_copied():
    plane = np.zeros((1, 2**15, 256), np.float32)  # 32 MiB
    copier = Copier([{"k": plane}], 16)
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    copier.move([(0, 1024, 1024)] * 64)  # 1 GiB in one call
    end = time.perf_counter()
    stop.set()
    thread.join()
    assert sum(start < at < end for at in ticks) > 5


def test_each_thread_gets_the_error_of_its_own_call(layers):
    """Calls that fail at the same time do not exchange what they raise."""
    here = threading.local()
    both = threading.Barrier(2)

    def wait():
        both.wait()
        raise OSError(here.name)

    copier = Copier(layers, 3, wait)
    caught = {}

    def fail(name):
        here.name = name
        for _ in range(200):
            try:
                copier.move([(0, 1, 1)])
            except OSError as error:
                caught.setdefault(name, set()).add(str(error))

    threads = [threading.Thread(target=fail, args=(name,), daemon=True) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert caught == {"one": {"one"}, "two": {"two"}}


# --- moves that are carried out together


def carried_out(moves, content, block=3):
    """What moves make of an array (heads, tokens, width), done one after the other."""
    content = content.copy()
    for source, destination, blocks in moves:
        rows = content[:, source * block : (source + blocks) * block].copy()
        content[:, destination * block : (destination + blocks) * block] = rows
    return content


def numbered(blocks, block=3, heads=2, width=5):
    """Planes of which no two bytes in a row of 251 are alike."""
    size = heads * blocks * block * width
    return (np.arange(size) % 251).astype(np.uint8).reshape(heads, blocks * block, width)


def assert_moved(moves, blocks):
    plane = numbered(blocks)
    expected = carried_out(moves, plane)
    Copier([{"k": plane}], 3).move(moves)
    assert np.array_equal(plane, expected), moves


@pytest.mark.parametrize("shift", [-9, -7, -3, -1, 1, 3, 7, 9])
@pytest.mark.parametrize("lengths", [(1, 1), (3, 1), (1, 3), (2, 1, 4), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("upwards", [True, False])
def test_neighbours_that_move_alike_end_as_one_after_the_other(shift, lengths, upwards):
    """Also where the order is the wrong one, in which a move reads what the one before has written."""
    starts = 10 + np.cumsum([0, *lengths[:-1]])
    moves = [(int(start), int(start) + shift, length) for start, length in zip(starts, lengths, strict=True)]
    assert_moved(moves if upwards else moves[::-1], 40)


def test_a_slide_to_both_sides_keeps_everybody():
    right = [(20, 24, 3), (18, 22, 2), (15, 18, 3)]
    left = [(4, 1, 2), (6, 3, 1), (8, 4, 5)]
    assert_moved(right + left, 32)


def test_moves_of_nothing_and_to_where_they_are_do_not_come_between():
    assert_moved([(5, 5, 4), (4, 2, 0), (6, 3, 2), (0, 9, 0), (8, 8, 6), (8, 5, 2), (1, 1, 1)], 20)
    assert_moved([(5, 5, 4), (4, 2, 0)], 20)


@given(st.data())
def test_any_list_of_moves_has_the_effect_of_one_after_the_other(data):
    """Few shifts and many neighbours, so that moves often continue each other."""
    blocks = data.draw(st.integers(6, 24))
    shifts = data.draw(st.lists(st.integers(-blocks, blocks), min_size=1, max_size=2))
    moves, at = [], data.draw(st.integers(0, blocks))
    for _ in range(data.draw(st.integers(1, 12))):
        length, shift = data.draw(st.integers(0, 4)), data.draw(st.sampled_from(shifts))
        source = data.draw(st.sampled_from([at, at - length, data.draw(st.integers(0, blocks))]))
        if min(source, source + shift) >= 0 and max(source, source + shift) + length <= blocks:
            moves.append((source, source + shift, length))
            at = data.draw(st.sampled_from([source, source + length]))
    assert_moved(moves, blocks)


@pytest.mark.parametrize("shift", [-9, -5, -2, 2, 5, 9])
def test_more_than_the_caches_hold_arrives_whole(shift):
    """Runs that lie megabytes from their places, overlapping those and not, aligned to nothing."""
    plane = numbered(33, block=1, heads=2, width=823_333)
    moves = [(9, 9 + shift, 8), (17, 17 + shift, 7)][:: -1 if shift > 0 else 1]
    moves += [(0, 27, 4), (31, 2, 2)]
    assert sum(blocks for *_, blocks in moves) * 2 * 823_333 > 1 << 25
    expected = carried_out(moves, plane, block=1)
    Copier([{"k": plane}], 1).move(moves)
    assert np.array_equal(plane, expected)
