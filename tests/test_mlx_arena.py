"""What MLX makes special: planes that must stay where they are, steps in flight, streams and threads."""

import threading

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from kvcache import mlx_graph  # noqa: E402
from kvcache._copy import address  # noqa: E402
from kvcache.arena import MlxArena  # noqa: E402
from kvcache.mlx_graph import Streams, content_after, in_safe_order, taken, usable_memory  # noqa: E402
from kvcache.spec import KVCacheSpec  # noqa: E402

SPEC = KVCacheSpec(2, 2, 8, 256, 4)
PATHS = ("host", "graph")


@pytest.fixture(params=PATHS)
def arena(request):
    made = MlxArena(SPEC, writes=request.param)
    yield made
    made.close()


@pytest.fixture
def graph():
    made = MlxArena(SPEC, writes="graph")
    yield made
    made.close()


@pytest.fixture
def host():
    made = MlxArena(SPEC, writes="host")
    yield made
    made.close()


def rows(value, count=3):
    return tuple(mx.full((2, count, 8), value + side / 2) for side in (0, 1))


def write(arena, layer, value, spans, count=3):
    arena.note_stream()
    arena.copier.write(arena.sources(layer, rows(value, count)), layer, spans)


def addresses(arena):
    return [address(plane) for planes in arena.planes for plane in planes.values()]


def values(array):
    return np.array(array)[0, :, 0].tolist()


def slow():
    """A lazy zero that takes a while."""
    matrix = mx.full((320, 320), 1e-3)
    for _ in range(6):
        matrix = matrix @ matrix
    return matrix[0, 0] * 0


# --- in place


def step(arena, number, members=16):
    """A decode step as engines make it: a scatter for each layer, then attention on views; left in flight."""
    slots = [(member, (8 * member + number) % 256, 1) for member in range(members)]
    seen = []
    for layer in range(2):
        write(arena, layer, float(number), slots, members)
        starts = [8 * member for member in range(members)]
        seen += [arena.view(layer, side, start, 4, False).sum() for start in starts for side in (0, 1)]
    total = mx.stack(seen).sum()
    mx.async_eval(total)
    return total


def test_steps_and_moves_leave_every_plane_where_it_was(arena):
    before, objects = addresses(arena), [*arena.k, *arena.v]
    for number in range(200):
        total = step(arena, number)
        if number % 10 == 9:
            arena.copier.move([(0, 20, 4), (20, 1, 4)])
    mx.eval(total)
    assert arena.arena_copies == 0
    assert addresses(arena) == before
    assert all(a is b for a, b in zip(objects, (*arena.k, *arena.v), strict=True))


def test_steps_take_no_memory_beyond_what_they_compute():
    spec = KVCacheSpec(2, 8, 64, 8192)  # 67 MB
    arena = MlxArena(spec, writes="graph")
    new = tuple(mx.ones((8, 32, 64)) for _ in range(2))
    mx.eval(new)
    for number in range(50):
        if number == 5:
            mx.synchronize()
            mx.reset_peak_memory()
            start = arena.library_memory()[0]
        arena.copier.write(arena.sources(0, new), 0, [(row, 100 * row + number, 1) for row in range(32)])
        mx.async_eval(arena.view(0, 0, 0, 100, False).sum())
    mx.synchronize()
    assert arena.library_memory()[1] - start < spec.arena_bytes / 16
    assert arena.arena_copies == 0


def test_a_view_kept_across_a_graph_write_costs_a_copy_that_is_counted(graph):
    view = graph.view(0, 0, 0, 4, False)
    mx.eval(view)
    write(graph, 0, 5.0, [(0, 0, 3)])
    assert graph.arena_copies == 1  # of K; nobody held V
    assert values(view) == [0.0] * 4  # the view still shows what it was taken from
    assert values(graph.k[0])[:4] == [5.0, 5.0, 5.0, 0.0]
    del view
    write(graph, 0, 6.0, [(0, 0, 3)])
    assert graph.arena_copies == 1


def test_a_view_kept_across_a_graph_move_costs_a_copy_that_is_counted(graph):
    view = graph.view(1, 1, 0, 4, False)
    mx.eval(view)
    graph.copier.move([(0, 5, 2)])
    assert graph.arena_copies == 1


def test_no_view_can_make_the_host_path_copy(host):
    view = host.view(0, 0, 0, 4, False)
    mx.eval(view)
    before = addresses(host)
    write(host, 0, 5.0, [(0, 0, 3)])
    host.copier.move([(0, 5, 2)])
    assert host.arena_copies == 0 and addresses(host) == before
    assert values(view) == [5.0, 5.0, 5.0, 0.0]  # zero-copy: it shows what is there now


def test_assigning_to_a_plane_pulls_no_memory_from_beneath_the_host(host):
    before = address(host.k[0])
    host.k[0][:, 0:1] = 9.0  # no way to write: MLX puts the result elsewhere, the copier holds the buffer
    assert address(host.k[0]) != before
    write(host, 0, 5.0, [(0, 0, 3)])
    host.copier.move([(0, 5, 2)])
    assert values(host.copy_of(0, 0, 20, 4)) == [5.0, 5.0, 5.0, 0.0]


def test_a_write_over_a_whole_plane_stays_in_place(arena):
    before, whole = addresses(arena), rows(3.0, 256)
    arena.copier.write(arena.sources(1, whole), 1, [(0, 0, 256)])
    assert arena.arena_copies == 0 and addresses(arena) == before
    assert values(arena.v[1]) == [3.5] * 256


def test_a_lazy_view_from_before_a_graph_write_reads_the_old_rows(graph):
    lazy = graph.view(0, 0, 0, 3, False) * 1
    write(graph, 0, 4.0, [(0, 0, 3)])
    assert values(lazy) == [0.0] * 3


# --- steps in flight


@pytest.mark.parametrize("writes", PATHS)
def test_a_step_in_flight_reads_what_was_there_before_a_move(writes):
    arena = MlxArena(SPEC, writes=writes)
    write(arena, 0, 1.0, [(0, 0, 3)])
    for turn in range(5):
        result = arena.view(0, 0, 0, 3, False) + slow()
        arena.note_stream()
        mx.async_eval(result)
        write(arena, 0, 2.0 + turn, [(0, 40, 3)])  # new slots: no step in flight reads them
        arena.copier.move([(10, 0, 1)])
        assert values(result) == [1.0 + turn] * 3
        assert values(arena.view(0, 0, 0, 3, False)) == [2.0 + turn] * 3


def test_an_overwriting_host_write_waits_for_the_step_in_flight(host):
    write(host, 0, 1.0, [(0, 0, 3)])
    result = host.view(0, 0, 0, 3, False) + slow()
    mx.async_eval(result)
    sources = host.sources(0, rows(2.0))
    sources.overwrites = True
    host.copier.write(sources, 0, [(0, 0, 3)])
    assert values(result) == [1.0] * 3
    assert values(host.view(0, 0, 0, 3, False)) == [2.0] * 3


@pytest.fixture
def waits(monkeypatch):
    seen, real = [], mx.synchronize

    def synchronize(stream=None):
        seen.append(stream)
        real(stream)

    monkeypatch.setattr(mx, "synchronize", synchronize)
    return seen


def test_a_host_write_to_new_slots_waits_for_nothing(host, waits):
    write(host, 0, 1.0, [(0, 0, 3)])
    assert waits == []
    host.copier.move([])
    assert waits == []
    host.copier.move([(0, 1, 1)])
    assert waits == [mx.default_stream(mx.cpu)]


def test_graph_writes_wait_once_a_step(graph, waits):
    for number in range(3):
        del waits[:]
        total = step(graph, number, members=2)
        assert len(waits) == (number > 0)
    mx.eval(total)


def test_a_wait_that_fails_leaves_everything_as_it_was(arena, monkeypatch):
    write(arena, 0, 1.0, [(0, 0, 3)])
    before = [values(plane) for plane in (*arena.k, *arena.v)]

    def fail(stream=None):
        raise RuntimeError("[METAL] command buffer execution failed")

    sources = arena.sources(0, rows(2.0))
    sources.overwrites = True
    monkeypatch.setattr(mx, "synchronize", fail)
    for call in (lambda: arena.copier.move([(0, 5, 2)]), lambda: arena.copier.write(sources, 0, [(0, 0, 3)])):
        with pytest.raises(RuntimeError, match="command buffer"):
            call()
    monkeypatch.undo()
    assert [values(plane) for plane in (*arena.k, *arena.v)] == before
    arena.copier.move([(0, 5, 2)])
    assert values(arena.k[0])[20:24] == [1.0, 1.0, 1.0, 0.0]


def test_rows_that_fail_to_evaluate_leave_every_plane_as_it_was(graph, monkeypatch):
    real, before = mx.async_eval, [values(plane) for plane in graph.k]

    def fail(*arrays):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(mx, "async_eval", fail)
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        graph.copier.write(graph.sources(0, rows(2.0)), 0, [(0, 0, 3)])
    monkeypatch.setattr(mx, "async_eval", real)
    assert [values(plane) for plane in graph.k] == before
    write(graph, 0, 3.0, [(0, 0, 3)])
    assert values(graph.k[0])[:3] == [3.0] * 3


def failing_eval(monkeypatch, call):
    """Lets all calls of mx.eval through but one."""
    real, calls = mx.eval, []

    def evaluate(*arrays):
        calls.append(arrays)
        if len(calls) == call:
            raise RuntimeError("[malloc] Unable to allocate")
        real(*arrays)

    monkeypatch.setattr(mx, "eval", evaluate)


def test_a_move_that_cannot_be_read_moves_nothing(graph, monkeypatch):
    write(graph, 0, 1.0, [(0, 0, 3)])
    graph.copier.move([(0, 1, 1)])
    before = [values(plane) for plane in (*graph.k, *graph.v)]
    failing_eval(monkeypatch, 1)
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        graph.copier.move([(0, 9, 2)])
    monkeypatch.undo()
    assert [values(plane) for plane in (*graph.k, *graph.v)] == before
    graph.copier.move([(0, 9, 2)])
    assert values(graph.k[0])[36:39] == [1.0] * 3


def test_after_a_move_that_failed_halfway_the_arena_says_so(graph, monkeypatch):
    failing_eval(monkeypatch, 2)
    with pytest.raises(RuntimeError, match="Unable to allocate"):
        graph.copier.move([(0, 9, 2)])
    monkeypatch.undo()
    calls = (
        lambda: graph.copier.move([(0, 1, 1)]),
        lambda: write(graph, 0, 1.0, [(0, 0, 3)]),
        lambda: graph.copy_of(0, 0, 0, 1),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match="contents are lost") as caught:
            call()
        assert "Unable to allocate" in str(caught.value.__cause__)


# --- moves in pieces


def done_in_order(content, pairs):
    content = content.copy()
    for read, written in pairs:
        content[written] = content[read]
    return content


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "moves",
    [
        [(0, 3, 9)],
        [(3, 0, 9)],
        [(4, 6, 3), (2, 4, 2), (1, 0, 1)],
        [(0, 12, 3), (5, 0, 3), (12, 5, 3)],  # two runs change places
        [(0, 12, 1), (1, 0, 1), (2, 1, 1), (12, 2, 1), (1, 8, 2)],  # a circle, with readers
        [(0, 4, 4), (0, 8, 4)],
        [(2, 2, 3)],
        [],
    ],
    ids=str,
)
def test_moves_in_pieces_have_the_effect_of_the_list(moves, limit):
    expected = np.arange(16)
    for source, destination, blocks in moves:
        expected[destination : destination + blocks] = expected[source : source + blocks].copy()
    pairs = in_safe_order(*content_after(moves), limit)
    np.testing.assert_array_equal(done_in_order(np.arange(16), pairs), expected)
    circles = sum(len(written) > limit for _, written in pairs)
    assert circles <= 1 and (circles == 0 or len(pairs[-1][1]) > limit)


@pytest.mark.parametrize("temporary", [1, 128, 4096])
def test_temporaries_are_bounded(monkeypatch, temporary):
    monkeypatch.setattr(mlx_graph, "TEMPORARY_BYTES", temporary)
    graph = MlxArena(SPEC, writes="graph")
    content = np.random.default_rng(0).standard_normal((2, 2, 256, 8)).astype(np.float32)
    graph.copier.write(graph.sources(1, content), 1, [(0, 0, 256)])
    sizes, real = [], mx.eval

    def evaluate(arrays):
        sizes.append(sum(array.nbytes for array in arrays) if isinstance(arrays, list) else 0)
        real(arrays)

    monkeypatch.setattr(mx, "eval", evaluate)
    graph.copier.move([(0, 3, 60)])
    monkeypatch.undo()
    assert max(sizes) <= max(temporary, 4 * 2 * 8 * 4)  # at least a block fits
    expected = content.copy()
    expected[:, :, 12:252] = content[:, :, :240]
    np.testing.assert_array_equal([np.array(graph.k[1]), np.array(graph.v[1])], expected)
    assert graph.arena_copies == 0


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("slots", [slice(0, 16), slice(4, 9), slice(3, 4), mx.array([3, 1])], ids=str)
def test_what_is_taken_shares_no_memory(heads, slots):
    plane = mx.ones((heads, 16, 4))
    mx.eval(plane)
    copy = taken(plane, slots)
    mx.eval(copy)
    assert not address(plane) <= address(copy) < address(plane) + plane.nbytes


# --- streams and threads


def in_thread(call):
    result = []

    def run():
        try:
            result.append(call())
        except BaseException as error:  # noqa: BLE001 (raised again below)
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert result, "the thread hangs"
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def test_by_default_the_constructing_thread_is_waited_for(waits):
    streams = Streams()
    in_thread(streams.wait)
    assert waits == [mx.default_stream(mx.cpu)]


def test_named_streams_are_waited_for(waits):
    one, two = mx.new_stream(mx.cpu), mx.new_thread_unsafe_stream(mx.cpu)
    Streams([one, two]).wait()
    assert waits == [one, two, mx.default_stream(mx.cpu)]


def test_a_thread_local_stream_is_resolved_where_it_was_last_noted(waits):
    local = mx.new_thread_local_stream(mx.cpu)
    streams = Streams(local)

    def engine():
        streams.note()
        with mx.stream(local):
            return mx.default_stream(mx.cpu)

    concrete = in_thread(engine)
    streams.wait()
    assert concrete in waits
    with mx.stream(local):
        assert concrete != mx.default_stream(mx.cpu)


def test_what_other_threads_noted_before_is_waited_for_once(waits):
    streams = Streams()
    in_thread(streams.note)
    streams.note()
    streams.wait()
    assert len(waits) == 2
    del waits[:]
    streams.wait()
    assert len(waits) == 1


def test_a_wait_that_failed_forgets_no_stream(monkeypatch):
    streams = Streams()
    in_thread(streams.note)
    streams.note()
    seen = []

    def fail(stream):
        seen.append(stream)
        raise RuntimeError

    monkeypatch.setattr(mx, "synchronize", fail)
    with pytest.raises(RuntimeError):
        streams.wait()
    monkeypatch.setattr(mx, "synchronize", seen.append)
    streams.wait()
    assert len(set(map(str, seen))) == 2


@pytest.mark.parametrize(("stream", "error"), [("gpu", TypeError), ([mx.cpu], TypeError), ([], ValueError)])
def test_what_names_no_stream_is_refused(stream, error):
    with pytest.raises(error):
        Streams(stream)


@pytest.mark.parametrize("writes", PATHS)
def test_another_thread_moves_beneath_a_step_in_flight(writes):
    local = mx.new_thread_local_stream(mx.cpu)
    arena = MlxArena(SPEC, local, writes)
    stepped, moved, seen = threading.Event(), threading.Event(), []

    def engine():
        with mx.stream(local):
            write(arena, 0, 1.0, [(0, 0, 3)])
            result = arena.view(0, 0, 0, 3, False) + slow()
            mx.async_eval(result)
            del result  # only its total is kept: nothing holds the arena
            result = arena.view(0, 1, 0, 3, False) + slow()
            mx.async_eval(result)
        stepped.set()
        assert moved.wait(60)
        with mx.stream(local):
            seen.append(values(result))
            seen.append(values(arena.view(0, 0, 0, 3, False)))

    thread = threading.Thread(target=engine)
    thread.start()
    assert stepped.wait(60)
    arena.copier.move([(5, 0, 1)])  # block 5 holds zeros
    moved.set()
    thread.join(60)
    assert seen == [[1.5] * 3, [0.0] * 3]
    assert arena.arena_copies == 0


def test_what_one_thread_wrote_another_moves_and_copies_before_anybody_evaluated_it(arena):
    write(arena, 0, 2.0, [(0, 0, 3)])
    in_thread(lambda: arena.copier.move([(0, 9, 1)]))
    write(arena, 0, 3.0, [(0, 0, 3)])
    assert values(in_thread(lambda: arena.copy_of(0, 0, 36, 3))) == [2.0] * 3
    assert values(in_thread(lambda: arena.gather(0, 0, np.array([0], np.int32), 3))) == [3.0] * 3
    assert in_thread(lambda: arena.arena_copies) == 0


@pytest.mark.parametrize("writes", PATHS)
def test_threads_that_copy_and_count_see_whole_updates(writes):
    arena = MlxArena(SPEC, writes=writes)
    write(arena, 0, 1.0, [(0, 0, 3)])
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            arena.arena_copies  # noqa: B018
            if writes == "graph":
                seen = values(arena.copy_of(0, 0, 0, 3))
                if len(set(seen)) != 1:
                    torn.append(seen)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(60):
        write(arena, 0, float(number), [(0, 0, 3)])
    stop.set()
    thread.join(60)
    assert not thread.is_alive() and not torn
    assert values(arena.k[0])[:3] == [59.0] * 3


def test_an_unknown_way_to_write_is_refused():
    with pytest.raises(ValueError, match="'gpu', expected 'host'"):
        MlxArena(SPEC, writes="gpu")


def test_the_path_follows_the_device():
    assert MlxArena(SPEC)._graph is None  # these tests run on the CPU
    assert usable_memory(mx.default_device()) > 0
