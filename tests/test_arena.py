"""Every kind of storage against plain NumPy arrays: what is written, moved, viewed, copied, refused."""

import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache._copy import address
from kvcache.arena import MlxArena, NoArena, NumpyArena, make_arena
from kvcache.memory import available_memory, ensure_available
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec

BLOCK, BLOCKS = 4, 12
TOKENS = BLOCK * BLOCKS
LAYERS = (
    LayerSpec((PlaneSpec("k", 2, 8), PlaneSpec("v", 2, 6))),
    LayerSpec((PlaneSpec("latent", 1, 16, "bfloat16"),)),
    LayerSpec((PlaneSpec("c", 1, 10, "float16"), PlaneSpec("rope", 1, 4, "float16"))),
    LayerSpec(
        (
            PlaneSpec("v", 3, 2, "uint32"),
            PlaneSpec("v_scales", 3, 1, "bfloat16"),
            PlaneSpec("v_biases", 3, 1, "bfloat16"),
            PlaneSpec("k", 3, 2, "uint8"),
            PlaneSpec("k_scales", 3, 1, "float16"),
            PlaneSpec("k_biases", 3, 1, "float16"),
        )
    ),
)
SPEC = KVCacheSpec.from_layers(LAYERS, TOKENS, BLOCK)
STORAGES = ("numpy", "mlx host", "mlx graph")


def make(storage, spec=SPEC):
    if storage == "numpy":
        return NumpyArena(spec)
    return MlxArena(spec, writes=storage.removeprefix("mlx "))


@pytest.fixture(params=STORAGES)
def storage(request):
    if request.param != "numpy":
        pytest.importorskip("mlx.core")
    return request.param


@pytest.fixture
def arena(storage):
    made = make(storage)
    yield made
    made.close()


def unsigned(plane):
    return {4: np.uint32, 2: np.uint16, 1: np.uint8}[itemsize(plane)]


def itemsize(plane):
    return {"float32": 4, "float16": 2, "bfloat16": 2, "uint32": 4, "uint8": 1}[plane.dtype]


def bits(array):
    """What an array holds, as unsigned ints, whatever its dtype and library."""
    if isinstance(array, np.ndarray):
        return array.view(f"u{array.itemsize}")
    import mlx.core as mx

    return np.array(array.view({4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[array.itemsize]))


def from_bits(array, plane, storage):
    """An array of the plane's dtype, of the storage's library, with these bits."""
    if storage == "numpy":
        if plane.dtype == "bfloat16":
            return array.view(pytest.importorskip("ml_dtypes").bfloat16)
        return array.view(plane.dtype)
    import mlx.core as mx

    return mx.array(array).view(getattr(mx, plane.dtype))


class Oracle:
    """The same planes, as bits, updated by the plainest NumPy there is."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)
        self.planes = [
            [np.zeros((plane.heads, TOKENS, plane.width), unsigned(plane)) for plane in layer.planes]
            for layer in LAYERS
        ]

    def rows(self, layer, count, rows_axis=1):
        arrays = []
        for plane in LAYERS[layer].planes:
            shape = (plane.heads, count, plane.width) if rows_axis else (count, plane.heads, plane.width)
            arrays.append(self.random.integers(0, 1 << 8 * itemsize(plane), shape).astype(unsigned(plane)))
        return arrays

    def write(self, layer, rows, spans):
        for plane, new in zip(self.planes[layer], rows, strict=True):
            for row, slot, count in spans:
                plane[:, slot : slot + count] = new[:, row : row + count]

    def move(self, moves):
        for plane in (plane for planes in self.planes for plane in planes):
            for source, destination, blocks in moves:
                run = plane[:, source * BLOCK : (source + blocks) * BLOCK].copy()
                plane[:, destination * BLOCK : (destination + blocks) * BLOCK] = run

    def fill(self, arena, storage):
        for layer in range(len(LAYERS)):
            rows = self.rows(layer, TOKENS)
            self.write(layer, rows, [(0, 0, TOKENS)])
            write(arena, storage, layer, rows, [(0, 0, TOKENS)])
        return self

    def agrees_with(self, arena):
        for mine, theirs in zip(self.planes, arena.planes, strict=True):
            for expected, plane in zip(mine, theirs.values(), strict=True):
                np.testing.assert_array_equal(bits(plane), expected)


def write(arena, storage, layer, rows, spans, rows_axis=1):
    arrays = [from_bits(new, plane, storage) for new, plane in zip(rows, LAYERS[layer].planes, strict=True)]
    arena.copier.write(arena.sources(layer, arrays, rows_axis), layer, spans)


@pytest.fixture
def oracle(arena, storage):
    """Agrees with the arena when the test ends, unless the arena has been closed."""
    oracle = Oracle().fill(arena, storage)
    yield oracle
    if arena.planes:
        oracle.agrees_with(arena)


@contextmanager
def nothing_changes(arena):
    before = [[bits(plane).copy() for plane in planes.values()] for planes in arena.planes]
    yield
    for planes, expected in zip(arena.planes, before, strict=True):
        for plane, old in zip(planes.values(), expected, strict=True):
            np.testing.assert_array_equal(bits(plane), old)


# --- planes


def test_planes_have_the_shapes_and_dtypes_of_the_spec_and_hold_zeros(arena):
    for layer, planes in zip(LAYERS, arena.planes, strict=True):
        assert list(planes) == [plane.name for plane in layer.planes]
        for plane, array in zip(layer.planes, planes.values(), strict=True):
            assert tuple(array.shape) == (plane.heads, TOKENS, plane.width)
            assert str(array.dtype).rpartition(".")[2] == plane.dtype
            assert not bits(array).any()


def test_k_and_v_are_the_planes_named_so_else_the_first_and_the_second(arena):
    first, latent, pair, packed = arena.planes
    assert arena.k[0] is first["k"] and arena.k[1] is latent["latent"]
    assert arena.k[3] is packed["k"] and arena.v[3] is packed["v"]
    assert arena.k[2] is pair["c"] and arena.v[2] is pair["rope"]
    assert arena.v[0] is first["v"] and arena.v[1] is None


def test_numpy_planes_start_on_64_byte_boundaries_and_are_contiguous():
    for planes in make("numpy").planes:
        for plane in planes.values():
            assert plane.ctypes.data % 64 == 0 and plane.flags.c_contiguous and plane.flags.writeable


def test_the_backend_chooses_the_arena():
    assert type(make_arena(SPEC, "numpy")) is NumpyArena
    assert type(make_arena(SPEC, "none")) is NoArena
    pytest.importorskip("mlx.core")
    assert type(make_arena(SPEC, "mlx")) is MlxArena


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="'torch'"):
        make_arena(SPEC, "torch")


def test_streams_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="backend='numpy'"):
        make_arena(SPEC, "numpy", stream=object())


def test_bfloat16_without_ml_dtypes_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match=r"kvcache\[bfloat16\]"):
        make("numpy")


def test_mlx_that_is_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(ImportError, match=r"kvcache\[mlx\]"):
        make("mlx host")


# --- memory


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_an_arena_larger_than_memory_is_refused_before_anything_is_touched(backend):
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    spec = KVCacheSpec(1024, 64, 256, 2**24)
    with pytest.raises(MemoryError, match=str(spec.arena_bytes)) as caught:
        make_arena(spec, backend)
    assert caught.value.bytes_needed == spec.arena_bytes
    assert 0 < caught.value.bytes_available < spec.arena_bytes
    assert str(caught.value.bytes_available) in str(caught.value)


def test_memory_for_exactly_what_is_there_is_granted():
    ensure_available(10, 10)
    with pytest.raises(MemoryError, match=r"11 bytes .* 10 "):
        ensure_available(11, 10)


def tree(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:  2000 kB\n"


def test_available_memory_is_what_the_machine_says(tmp_path):
    assert available_memory(tree(tmp_path, proc__meminfo=MEMINFO)) == 2000 * 1024


def test_available_memory_is_the_physical_one_where_nothing_is_said(tmp_path):
    assert available_memory(tmp_path) >= available_memory() > 0


def test_the_tightest_enclosing_control_group_limits_memory(tmp_path):
    root = tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/pod/one\n")
    group = root / "sys/fs/cgroup"
    limits = ((group / "pod", "900000", "500000", 1000), (group / "pod/one", "max", "9", 0))
    for folder, limit, used, inactive in limits:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(used + "\n")
        (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    assert available_memory(root) == 900000 - 500000 + 1000


def test_control_groups_of_version_1_limit_memory(tmp_path):
    root = tree(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="5:cpu:/x\n4:hugetlb,memory:/x\n")
    folder = root / "sys/fs/cgroup/memory/x"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("1000000\n")
    (folder / "memory.usage_in_bytes").write_text("1200000\n")
    (folder / "memory.stat").write_text("inactive_file 5\ntotal_inactive_file 300000\n")
    assert available_memory(root) == 100000
    (folder / "memory.stat").write_text("")
    assert available_memory(root) == 0


# --- views and copies


def test_a_view_shows_the_run_and_shares_its_memory(arena, oracle):
    for layer, planes in enumerate(arena.planes):
        for index, plane in enumerate(planes.values()):
            view = arena.view(layer, index, 5, 9, True)
            np.testing.assert_array_equal(bits(view), oracle.planes[layer][index][:, 5:14])
            offset = 5 * plane.shape[2] * plane.itemsize
            assert address(view) == address(plane) + offset


def test_a_numpy_view_is_writable_only_if_told_so():
    arena = make("numpy")
    assert np.shares_memory(arena.view(0, 0, 3, 7, True), arena.k[0])
    assert np.shares_memory(arena.view(0, 0, 3, 7, False), arena.k[0])
    assert arena.view(0, 0, 3, 7, True).flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        arena.view(0, 0, 3, 7, False)[:] = 1
    assert arena.k[0].flags.writeable


@pytest.mark.parametrize(("slot", "tokens"), [(0, TOKENS), (5, 9), (7, 1), (3, 0)])
def test_a_copy_keeps_what_it_was_taken_from(arena, oracle, storage, slot, tokens):
    copies = [
        [arena.copy_of(layer, index, slot, tokens) for index in range(len(planes))]
        for layer, planes in enumerate(arena.planes)
    ]
    expected = [[plane[:, slot : slot + tokens].copy() for plane in planes] for planes in oracle.planes]
    oracle.fill(arena, storage)  # other bits everywhere
    for mine, theirs in zip(copies, expected, strict=True):
        for copy, old in zip(mine, theirs, strict=True):
            assert tuple(copy.shape) == old.shape
            np.testing.assert_array_equal(bits(copy), old)


@pytest.mark.parametrize("tokens", [0, 1, BLOCK, 4 * BLOCK + 1, 5 * BLOCK])
def test_a_gathered_copy_has_the_tokens_in_table_order(arena, oracle, storage, tokens):
    table = np.array([7, 2, 3, 4, 0], np.int32)
    slots = (table[:, None] * BLOCK + np.arange(BLOCK)).ravel()[:tokens]
    copies = [arena.gather(layer, 0, table, tokens) for layer in range(len(LAYERS))]
    expected = [planes[0][:, slots] for planes in oracle.planes]
    oracle.fill(arena, storage)
    for copy, old in zip(copies, expected, strict=True):
        np.testing.assert_array_equal(bits(copy), old)


def test_what_a_copy_has_can_be_changed(arena, oracle, storage):
    if storage == "numpy":
        for copy in (arena.copy_of(0, 0, 0, 8), arena.gather(0, 0, np.arange(3, dtype=np.int32), 9)):
            copy[:] = 7


# --- moves

SOME_MOVES = st.lists(
    st.integers(1, BLOCKS).flatmap(
        lambda blocks: st.tuples(
            st.integers(0, BLOCKS - blocks), st.integers(0, BLOCKS - blocks), st.just(blocks)
        )
    ),
    max_size=5,
)


@pytest.mark.parametrize("storage", STORAGES)
@given(moves=SOME_MOVES)
def test_moves_are_done_in_list_order_in_every_plane(storage, moves):
    if storage != "numpy":
        pytest.importorskip("mlx.core")
    arena = make(storage)
    oracle = Oracle().fill(arena, storage)
    arena.copier.move(moves)
    oracle.move(moves)
    oracle.agrees_with(arena)


@pytest.mark.parametrize("moves", [[(0, 1, 11)], [(1, 0, 11)], [(3, 3, 4)], [(2, 2, 0)], []], ids=str)
def test_overlapping_and_empty_moves_are_moves(arena, oracle, moves):
    arena.copier.move(moves)
    oracle.move(moves)


def test_a_slide_to_both_sides_is_a_list_of_moves(arena, oracle):
    moves = [(4, 6, 3), (2, 4, 2), (1, 0, 1)]
    arena.copier.move(moves)
    oracle.move(moves)


@pytest.mark.parametrize(
    "bad", [(0, 11, 2), (11, 0, 2), (-1, 0, 1), (0, -1, 1), (0, 0, -1), (0, 2**62, 2**62), (0, 0, 13)]
)
def test_a_move_that_leaves_the_arena_moves_nothing(arena, oracle, bad):
    with pytest.raises(ValueError, match="leaves the arena, which has 12"):
        arena.copier.move([(0, 5, 2), bad])


# --- writes


@pytest.mark.parametrize("rows_axis", [0, 1])
@pytest.mark.parametrize(
    "spans", [[(0, 7, 6)], [(2, 40, 1), (0, 3, 2), (5, 11, 1), (3, 20, 2)], [(5, 47, 1)], []], ids=str
)
def test_rows_are_written_to_their_slots(arena, oracle, storage, rows_axis, spans):
    for layer in range(len(LAYERS)):
        rows = oracle.rows(layer, 6, rows_axis)
        write(arena, storage, layer, rows, spans, rows_axis)
        oracle.write(layer, rows if rows_axis else [new.swapaxes(0, 1) for new in rows], spans)


LAYOUTS = {
    "reversed rows": lambda a: a[:, ::-1],
    "every second row": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "reversed items": lambda a: a[:, :, ::-1],
    "items apart": lambda a: np.repeat(a, 3, axis=2)[:, :, ::3],
    "Fortran order": np.asfortranarray,
    "one row for all": lambda a: np.broadcast_to(a[:, :1], a.shape),
    "read-only": lambda a: (a.setflags(write=False), a)[1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numpy_rows_of_any_strides_are_accepted(arena, oracle, layout):
    for layer in range(len(LAYERS)):
        rows = [LAYOUTS[layout](new) for new in oracle.rows(layer, 6)]
        write(arena, "numpy", layer, rows, [(1, 9, 4), (0, 30, 1)])
        oracle.write(layer, rows, [(1, 9, 4), (0, 30, 1)])


def test_mlx_rows_of_any_strides_are_accepted(arena, oracle):
    mx = pytest.importorskip("mlx.core")
    packed = oracle.rows(0, 6)
    rows = [mx.array(new).view(mx.float32) for new in packed]
    for lazy in (
        [new.swapaxes(0, 2).swapaxes(0, 2) for new in rows],
        [mx.contiguous(new.swapaxes(0, 1)).swapaxes(0, 1) for new in rows],
        [mx.repeat(new, 2, axis=1)[:, ::2] for new in rows],
    ):
        arena.copier.write(arena.sources(0, lazy), 0, [(2, 5, 3)])
        oracle.write(0, packed, [(2, 5, 3)])


def test_either_library_may_be_the_source(arena, oracle, storage):
    pytest.importorskip("mlx.core")
    other = "mlx" if storage == "numpy" else "numpy"
    for layer in range(len(LAYERS)):
        rows = oracle.rows(layer, 5)
        write(arena, other, layer, rows, [(0, 12, 5)])
        oracle.write(layer, rows, [(0, 12, 5)])


def test_rows_that_lie_in_the_arena_are_read_before_they_are_overwritten(storage):
    spec = KVCacheSpec(1, 2, 8, TOKENS, BLOCK)
    arena = make(storage, spec)
    rows = [np.random.default_rng(side).standard_normal((2, TOKENS, 8)).astype(np.float32) for side in (0, 1)]
    arena.copier.write(arena.sources(0, rows), 0, [(0, 0, TOKENS)])
    swapped = (arena.view(0, 1, 0, 20, True), arena.view(0, 0, 0, 20, True))
    arena.copier.write(arena.sources(0, swapped), 0, [(0, 3, 20)])
    for plane, old, new in zip((arena.k[0], arena.v[0]), rows, rows[::-1], strict=True):
        np.testing.assert_array_equal(np.array(plane)[:, 3:23], new[:, :20])
        np.testing.assert_array_equal(np.array(plane)[:, 23:], old[:, 23:])


@pytest.mark.parametrize(
    "bad", [(0, 45, 4), (0, -1, 2), (4, 0, 3), (-1, 0, 2), (0, 0, -1), (0, 2**62, 1), (2**62, 0, 1)], ids=str
)
def test_a_span_that_leaves_arena_or_source_writes_nothing(arena, oracle, storage, bad):
    rows = oracle.rows(0, 6)
    with pytest.raises(ValueError, match=f"{bad[2]} rows from {bad[0]} of 6 .* from {bad[1]} of 48"):
        write(arena, storage, 0, rows, [(0, 0, 2), bad])


def wrong(arena, shape=(2, 3, 8), dtype=np.float32, v_shape=(2, 3, 6)):
    return arena.sources(0, (np.zeros(shape, dtype), np.zeros(v_shape, np.float32)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (3, 3, 8)}, r"'k' of layer 0 takes float32 \(2, n, 8\), got float32 \(3, 3, 8\)"),
        ({"shape": (2, 3, 7)}, r"\(2, n, 8\), got float32 \(2, 3, 7\)"),
        ({"shape": (2, 24)}, r"got float32 \(2, 24\)"),
        ({"shape": (1, 2, 3, 8)}, r"got float32 \(1, 2, 3, 8\)"),
        ({"v_shape": (2, 4, 6)}, r"'v' of layer 0 takes float32 \(2, 3, 6\), got float32 \(2, 4, 6\)"),
        ({"dtype": np.float64}, "takes float32 .*, got float64"),
        ({"dtype": np.float16}, "takes float32 .*, got float16"),
        ({"dtype": np.int32}, "takes float32 .*, got int32"),
        ({"dtype": ">f4"}, "takes float32 .*, got >f4"),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused_naming_got_and_wanted(arena, oracle, options, message):
    with pytest.raises(ValueError, match=message):
        wrong(arena, **options)


def test_a_wrong_shape_of_rows_first_is_told_in_that_order(arena):
    with pytest.raises(ValueError, match=r"\(n, 2, 8\), got float32 \(2, 3, 8\)"):
        arena.sources(0, (np.zeros((2, 3, 8), np.float32), np.zeros((2, 3, 6), np.float32)), 0)


def test_a_wrong_number_of_planes_names_them(arena):
    with pytest.raises(ValueError, match=r"layer 0 has 2 planes \(k, v\), got 1"):
        arena.sources(0, (np.zeros((2, 3, 8), np.float32),))


def test_what_is_no_array_is_refused(arena):
    with pytest.raises(TypeError, match="'k' takes a NumPy or MLX array, got list"):
        arena.sources(0, ([[1.0]], [[2.0]]))


@pytest.mark.parametrize("layer", [-1, 4, 2**40])
def test_a_layer_out_of_range_is_an_index_error(arena, layer):
    with pytest.raises(IndexError, match=f"layer {layer} of 4"):
        arena.sources(layer, ())


def test_sources_of_another_layer_or_arena_are_refused(arena, oracle, storage):
    sources = wrong(arena)
    with pytest.raises(ValueError, match="sources of layer 0"):
        arena.copier.write(sources, 1, [(0, 0, 3)])
    with nothing_changes(arena), pytest.raises(ValueError, match="or of another arena"):
        arena.copier.write(wrong(make(storage)), 0, [(0, 0, 3)])


def test_no_rows_are_written_nowhere(arena, oracle):
    arena.copier.write(wrong(arena, (2, 0, 8), v_shape=(2, 0, 6)), 0, [])
    assert wrong(arena, (2, 0, 8), v_shape=(2, 0, 6)).rows == 0


# --- a life


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident size is read from /proc")
def test_warmup_makes_every_page_resident():
    spec = KVCacheSpec(2, 8, 64, 16384)  # 134 MB
    arena = NumpyArena(spec)
    before = resident_bytes()
    arena.warmup()
    assert resident_bytes() - before > 0.95 * spec.arena_bytes


def test_warmup_changes_no_content(arena, oracle):
    arena.warmup()


def test_warmup_loses_no_byte_that_another_thread_writes_meanwhile():
    arena = NumpyArena(KVCacheSpec(1, 1, 4096, 8192, 4, dtype="float16", v_head_dim=1))
    plane = arena.k[0].view(np.uint8).reshape(-1)
    stop, lost = threading.Event(), []

    def count():
        pages = plane[-plane.ctypes.data % 4096 :: 4096]  # the bytes that warm-up rewrites
        for value in range(1, 1000):
            pages[:] = value % 256
            if (pages != value % 256).any():
                lost.append(value)
        stop.set()

    writer = threading.Thread(target=count)
    writer.start()
    while not stop.is_set():
        arena.warmup()
    writer.join()
    assert not lost


def test_a_closed_arena_lets_go_and_refuses(arena, storage):
    sources = wrong(arena)
    view = arena.view(0, 0, 0, 4, True)
    arena.close()
    arena.close()
    assert arena.planes == () and arena.k == [] and arena.v == []
    for call in (lambda: arena.copier.move([(0, 1, 1)]), lambda: arena.copier.write(sources, 0, [(0, 0, 1)])):
        with pytest.raises(ValueError, match="closed"):
            call()
    with pytest.raises(IndexError):
        wrong(arena)
    assert not bits(view).any()


def test_views_outlive_their_arena(storage):
    arena = make(storage)
    oracle = Oracle().fill(arena, storage)
    view = arena.view(0, 0, 4, 8, True)
    arena.close()
    del arena
    np.testing.assert_array_equal(bits(view), oracle.planes[0][0][:, 4:12])


def test_an_arena_without_storage_refuses_what_needs_bytes():
    arena = make_arena(SPEC, "none")
    for call in (
        lambda: arena.view(0, 0, 0, 1, True),
        lambda: arena.gather(0, 0, np.zeros(1, np.int32), 1),
        lambda: arena.copy_of(0, 0, 0, 1),
        lambda: arena.sources(0, ()),
    ):
        with pytest.raises(ValueError, match="no storage"):
            call()
    arena.warmup()
    arena.note_stream()
    assert arena.copier is None and arena.arena_copies == 0 and arena.library_memory() == (0, 0, 0)
    assert arena.k == arena.v == [None] * 4
    arena.close()


def test_device_arrays_belong_to_the_backend(arena, storage):
    array = np.arange(5, dtype=np.int32)
    on_device = arena.device_array(array)
    if storage == "numpy":
        assert on_device is array
    else:
        import mlx.core as mx

        assert isinstance(on_device, mx.array) and on_device.dtype == mx.int32
        assert on_device.tolist() == array.tolist()


def test_library_memory_counts_the_arena(arena, storage):
    active, peak, cached = arena.library_memory()
    if storage == "numpy":
        assert (active, peak, cached) == (0, 0, 0)
    else:
        assert peak >= active >= SPEC.arena_bytes and cached >= 0
