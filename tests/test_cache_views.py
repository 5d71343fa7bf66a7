"""Views and writes: what is zero-copy, what is a copy, what is read-only, and who sees what."""

import importlib.util

import numpy as np
import pytest
from observation import to_numpy, unchanged
from pair import numpy_dtype as numpy_dtype_named

from kvcache import CacheFull, KVCacheSpec, LayerSpec, PlaneSpec

BOTH = pytest.mark.parametrize("placement", ["contiguous", "paged"])
STORES = ["numpy"] + (["mlx"] if importlib.util.find_spec("mlx") else [])
ON_EACH = pytest.mark.parametrize("backend", STORES)


def rows(value, count=1, heads=2, width=4, dtype=np.float32):
    """`count` rows whose values count up from `value`, the second head a half more."""
    base = value + np.arange(count)[None, :, None] + np.arange(heads)[:, None, None] / 2
    return (base * np.ones((heads, count, width))).astype(dtype)


def scattered(cache, request_id="a"):
    """A paged sequence whose blocks are no run: two others take turns with it."""
    cache.allocate_for(request_id, 4, max_tokens=16)
    cache.allocate_for("between", 4, max_tokens=8)
    cache.append_tokens(request_id, 4)
    assert not cache.is_contiguous(request_id)
    return request_id


# ---- shapes and sharing


@BOTH
@ON_EACH
def test_a_view_has_heads_tokens_and_width(make_cache, placement, backend):
    cache = make_cache(2, 3, 8, 64, 4, placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    for view in (
        cache.get_k_view("a", 1),
        cache.get_v_view("a", 0),
        *cache.get_kv_views("a", 1),
        *cache.get_views("a", 0),
    ):
        assert view.shape == (3, 6, 8)


@BOTH
def test_a_numpy_view_of_a_run_shares_the_arena(make_cache, placement):
    cache = make_cache(placement=placement)
    cache.allocate_for("a", 6)
    for layer in range(2):
        k, v = cache.get_kv_views("a", layer)
        assert np.shares_memory(k, cache.arena.k[layer]) and np.shares_memory(v, cache.arena.v[layer])
        assert not np.shares_memory(k, v)
        start = cache.block_table("a")[0] * 4
        assert np.shares_memory(k, cache.arena.k[layer][:, start : start + 6])


def test_a_view_sees_a_later_write(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    view = cache.get_k_view("a", 0)
    cache.write("a", 0, rows(3, 6), rows(4, 6))
    assert np.array_equal(view, rows(3, 6))


def test_a_write_through_a_view_is_seen_by_the_next(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    cache.get_v_view("a", 1)[:] = rows(9, 6)
    assert np.array_equal(cache.get_v_view("a", 1), rows(9, 6))
    assert not np.array_equal(cache.get_v_view("a", 0), rows(9, 6))


@BOTH
@ON_EACH
def test_k_and_v_do_not_mix(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(3, 6), rows(40, 6))
    assert np.array_equal(to_numpy(cache.get_k_view("a", 0)), rows(3, 6))
    assert np.array_equal(to_numpy(cache.get_v_view("a", 0)), rows(40, 6))


# ---- copies


@ON_EACH
def test_a_scattered_sequence_is_gathered(make_cache, backend):
    cache = make_cache(placement="paged", backend=backend)
    request_id = scattered(cache)
    cache.write(request_id, 0, rows(5, 8), rows(50, 8))
    assert np.array_equal(to_numpy(cache.get_k_view(request_id, 0)), rows(5, 8))
    assert np.array_equal(to_numpy(cache.get_v_view(request_id, 0)), rows(50, 8))


def test_a_gathered_copy_shares_nothing(make_cache):
    cache = make_cache(placement="paged")
    request_id = scattered(cache)
    assert not np.shares_memory(cache.get_k_view(request_id, 0), cache.arena.k[0])


@ON_EACH
def test_a_view_that_must_not_copy_refuses_to(make_cache, backend):
    cache = make_cache(placement="paged", backend=backend)
    request_id = scattered(cache)
    for get in (cache.get_k_view, cache.get_v_view, cache.get_kv_views, cache.get_views):
        with unchanged(cache), pytest.raises(ValueError):
            get(request_id, 0, copy=False)


@BOTH
@ON_EACH
def test_a_run_needs_no_copy(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(5, 6), rows(50, 6))
    assert np.array_equal(to_numpy(cache.get_k_view("a", 0, copy=False)), rows(5, 6))


@BOTH
@ON_EACH
def test_a_forced_copy_stands_still(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(5, 6), rows(50, 6))
    copies = cache.get_kv_views("a", 0, copy=True)
    cache.write("a", 0, rows(7, 6), rows(70, 6))
    assert np.array_equal(to_numpy(copies[0]), rows(5, 6))
    assert np.array_equal(to_numpy(copies[1]), rows(50, 6))


def test_a_forced_numpy_copy_is_the_callers(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    copy = cache.get_k_view("a", 0, copy=True)
    assert copy.flags.writeable and not np.shares_memory(copy, cache.arena.k[0])


@pytest.mark.parametrize("no", [False, 0, np.False_])
def test_any_false_forbids_a_copy(make_cache, no):
    cache = make_cache(placement="paged")
    request_id = scattered(cache)
    with unchanged(cache), pytest.raises((ValueError, TypeError)):
        cache.get_k_view(request_id, 0, copy=no)


# ---- read-only


def test_a_view_of_a_shared_block_is_read_only(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 6)
    assert cache.get_k_view("a", 0).flags.writeable
    cache.fork("a", "b")
    for request_id in ("a", "b"):
        for view in (
            cache.get_k_view(request_id, 0),
            *cache.get_kv_views(request_id, 1),
            *cache.get_views(request_id, 0),
        ):
            assert not view.flags.writeable
            with pytest.raises(ValueError):
                view[:] = 0
    cache.free_for("a")
    assert cache.get_k_view("b", 0).flags.writeable


def test_a_view_with_one_shared_block_is_read_only_as_a_whole(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 8, max_tokens=12)
    cache.fork("a", "b")
    cache.append_tokens("a", 4)
    if cache.is_contiguous("a"):
        assert not cache.get_k_view("a", 0).flags.writeable
    cache.free_for("b")
    assert cache.get_k_view("a", 0, copy=None).flags.writeable


def test_views_of_a_contiguous_fork_are_writable(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    cache.fork("a", "b")
    cache.get_k_view("b", 0)[:] = 7
    assert not np.any(cache.get_k_view("a", 0) == 7)


# ---- writes


@BOTH
@ON_EACH
def test_a_write_goes_to_the_end_by_default(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(1, 6), rows(10, 6))
    assert cache.write("a", 0, rows(80, 2), rows(90, 2)) is None
    k = to_numpy(cache.get_k_view("a", 0))
    assert np.array_equal(k[:, :4], rows(1, 4)) and np.array_equal(k[:, 4:], rows(80, 2))


@BOTH
@ON_EACH
def test_a_write_begins_where_it_is_told(make_cache, placement, backend):
    cache = make_cache(placement=placement, backend=backend)
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(1, 6), rows(10, 6))
    cache.write("a", 0, rows(80, 3), rows(90, 3), start=2)
    k, v = (to_numpy(view) for view in cache.get_kv_views("a", 0))
    assert np.array_equal(k, np.concatenate([rows(1, 2), rows(80, 3), rows(6, 1)], axis=1))
    assert np.array_equal(v, np.concatenate([rows(10, 2), rows(90, 3), rows(15, 1)], axis=1))


def test_a_write_touches_no_neighbour(make_cache):
    cache = make_cache()
    for number, request_id in enumerate("abc"):
        cache.allocate_for(request_id, 8)
        cache.write(request_id, 0, rows(100 * number, 8), rows(100 * number, 8))
    cache.write("b", 0, rows(500, 8), rows(500, 8))
    assert np.array_equal(cache.get_k_view("a", 0), rows(0, 8))
    assert np.array_equal(cache.get_k_view("c", 0), rows(200, 8))


@pytest.mark.parametrize(
    "start, count", [(0, 7), (6, 1), (5, 2), (-1, 1), (2**31, 1), (2**63, 1), (2**70, 1), (-(2**70), 1)]
)
def test_a_write_outside_the_used_tokens_is_an_error(make_cache, start, count):
    cache = make_cache()
    cache.allocate_for("a", 6)
    with unchanged(cache), pytest.raises(ValueError):
        cache.write("a", 0, rows(0, count), rows(0, count), start=start)


def test_more_rows_than_used_tokens_is_an_error(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    with unchanged(cache), pytest.raises(ValueError):
        cache.write("a", 0, rows(0, 7), rows(0, 7))


def test_a_write_to_a_shared_block_copies_it_first(make_cache):
    cache = make_cache(placement="paged")
    cache.allocate_for("a", 8)
    for layer in range(2):
        cache.write("a", layer, rows(1, 8), rows(10, 8))
    cache.fork("a", "b")
    cache.write("b", 0, rows(70, 1), rows(80, 1), start=2)
    assert np.array_equal(cache.get_k_view("a", 0), rows(1, 8))
    assert np.array_equal(cache.get_v_view("a", 0), rows(10, 8))
    k = to_numpy(cache.get_k_view("b", 0))
    assert np.array_equal(k, np.concatenate([rows(1, 2), rows(70, 1), rows(4, 5)], axis=1))
    assert np.array_equal(to_numpy(cache.get_k_view("b", 1)), rows(1, 8))
    assert (cache.stats().used_blocks, cache.stats().copied_tokens) == (3, 4)
    assert cache.block_table("a")[1] == cache.block_table("b")[1]


def test_a_write_that_finds_no_block_for_its_copy_writes_nothing(make_cache):
    cache = make_cache(1, 2, 4, 8, 4, placement="paged")
    cache.allocate_for("a", 8)
    cache.write("a", 0, rows(1, 8), rows(10, 8))
    cache.fork("a", "b")
    with unchanged(cache), pytest.raises(CacheFull) as caught:
        cache.write("b", 0, rows(70, 1), rows(80, 1), start=2)
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (1, 0)
    cache.free_for("a")
    cache.write("b", 0, rows(70, 1), rows(80, 1), start=2)


def test_a_write_over_several_shared_blocks_copies_all_or_none(make_cache):
    cache = make_cache(1, 2, 4, 12, 4, placement="paged")
    cache.allocate_for("a", 8)
    cache.write("a", 0, rows(1, 8), rows(10, 8))
    cache.fork("a", "b")
    with unchanged(cache), pytest.raises(CacheFull) as caught:
        cache.write("b", 0, rows(70, 8), rows(80, 8))
    assert (caught.value.blocks_needed, caught.value.blocks_available) == (2, 1)


def test_a_claimed_block_is_no_block_for_a_copy(make_cache):
    cache = make_cache(1, 2, 4, 12, 4, placement="paged")
    cache.allocate_for("a", 4)
    cache.fork("a", "b")
    cache.allocate_for("c", 1, max_tokens=8)
    with unchanged(cache), pytest.raises(CacheFull):
        cache.write("b", 0, rows(70, 4), rows(80, 4))


@ON_EACH
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_come_back_as_they_were_written(make_cache, backend, dtype):
    numpy_dtype = numpy_dtype_named(dtype)
    cache = make_cache(1, 2, 4, 64, 4, dtype=dtype, backend=backend)
    cache.allocate_for("a", 6)
    k, v = rows(1.5, 6, dtype=numpy_dtype), rows(-3, 6, dtype=numpy_dtype)
    cache.write("a", 0, k, v)
    for view, wanted in zip(cache.get_kv_views("a", 0), (k, v), strict=True):
        assert str(view.dtype).removeprefix("mlx.core.") == dtype
        assert np.array_equal(to_numpy(view), wanted.astype(to_numpy(view).dtype))


@ON_EACH
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_mlx_rows_can_be_written_into_either_arena(make_cache, backend, dtype):
    mx = pytest.importorskip("mlx.core")
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    cache = make_cache(1, 2, 4, 64, 4, dtype=dtype, backend=backend)
    cache.allocate_for("a", 6)
    k = mx.array(rows(2, 6)).astype(getattr(mx, dtype))
    cache.write("a", 0, k, k + 1)
    assert np.array_equal(to_numpy(cache.get_k_view("a", 0)).astype(np.float32), rows(2, 6))
    assert np.array_equal(to_numpy(cache.get_v_view("a", 0)).astype(np.float32), rows(3, 6))


@pytest.mark.parametrize("stride", ["transposed", "reversed", "every second", "broadcast", "fortran"])
def test_rows_need_not_be_contiguous(make_cache, stride):
    cache = make_cache()
    cache.allocate_for("a", 6)
    k = {
        "transposed": lambda: rows(1, 6).transpose(1, 0, 2).copy().transpose(1, 0, 2),
        "reversed": lambda: rows(1, 6)[::-1, ::-1, ::-1],
        "every second": lambda: rows(1, 12, width=8)[:, ::2, ::2],
        "broadcast": lambda: np.broadcast_to(np.float32(5), (2, 6, 4)),
        "fortran": lambda: np.asfortranarray(rows(1, 6)),
    }[stride]()
    assert not k.flags.c_contiguous
    cache.write("a", 0, k, k)
    assert np.array_equal(cache.get_k_view("a", 0), k)
    assert np.array_equal(cache.get_v_view("a", 0), k)


def test_rows_may_lie_in_the_arena_itself(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    cache.write("a", 0, rows(1, 6), rows(10, 6))
    k, v = cache.get_kv_views("a", 0)
    cache.write("a", 0, k[:, :5], v[:, :5], start=1)
    assert np.array_equal(k, np.concatenate([rows(1, 1), rows(1, 5)], axis=1))


def test_a_write_keeps_no_hold_on_its_rows(make_cache):
    cache = make_cache()
    cache.allocate_for("a", 6)
    k = rows(1, 6)
    cache.write("a", 0, k, k)
    k[:] = 99
    assert np.array_equal(cache.get_k_view("a", 0), rows(1, 6))


# ---- layers of many kinds


UNEVEN = KVCacheSpec.from_layers(
    [
        LayerSpec((PlaneSpec("k", 4, 8, "float32"), PlaneSpec("v", 2, 3, "float16"))),
        LayerSpec((PlaneSpec("latent", 1, 16, "float32"),)),
        LayerSpec(
            (
                PlaneSpec("v", 1, 2, "uint8"),
                PlaneSpec("k", 1, 4, "uint32"),
                PlaneSpec("k_scales", 1, 1, "float16"),
            )
        ),
        LayerSpec((PlaneSpec("c", 1, 512, "float32"), PlaneSpec("rope", 1, 64, "float32"))),
    ],
    64,
    4,
)


def test_views_come_in_the_order_of_the_planes(make_cache):
    cache = make_cache(UNEVEN)
    cache.allocate_for("a", 6)
    shapes = [[view.shape for view in cache.get_views("a", layer)] for layer in range(4)]
    assert shapes == [
        [(4, 6, 8), (2, 6, 3)],
        [(1, 6, 16)],
        [(1, 6, 2), (1, 6, 4), (1, 6, 1)],
        [(1, 6, 512), (1, 6, 64)],
    ]
    assert [view.dtype for view in cache.get_views("a", 2)] == [np.uint8, np.uint32, np.float16]


def test_k_and_v_are_found_by_name_and_else_by_order(make_cache):
    cache = make_cache(UNEVEN)
    cache.allocate_for("a", 6)
    assert cache.get_k_view("a", 2).dtype == np.uint32
    assert cache.get_v_view("a", 2).dtype == np.uint8
    assert cache.get_k_view("a", 3).shape == (1, 6, 512)
    assert cache.get_v_view("a", 3).shape == (1, 6, 64)
    assert cache.get_k_view("a", 1).shape == (1, 6, 16)
    assert [view.shape for view in cache.get_kv_views("a", 3)] == [(1, 6, 512), (1, 6, 64)]


def test_where_there_is_no_second_plane_there_is_no_v(make_cache):
    cache = make_cache(UNEVEN)
    cache.allocate_for("a", 6)
    for get in (cache.get_v_view, cache.get_kv_views):
        with unchanged(cache), pytest.raises(ValueError):
            get("a", 1)
    assert cache.arena.v[1] is None
    assert cache.arena.k[1].shape == (1, 64, 16)


def test_the_arena_has_its_planes_by_name(make_cache):
    cache = make_cache(UNEVEN)
    assert [list(planes) for planes in cache.arena.planes] == [
        ["k", "v"],
        ["latent"],
        ["v", "k", "k_scales"],
        ["c", "rope"],
    ]
    assert cache.arena.planes[2]["k_scales"].shape == (1, 64, 1)
    assert cache.arena.k[2] is cache.arena.planes[2]["k"]


def test_layers_that_differ_have_no_common_shape():
    assert (UNEVEN.num_kv_heads, UNEVEN.head_dim, UNEVEN.dtype) == (None, None, None)


def test_bookkeeping_without_storage_has_no_views_and_no_writes(make_cache):
    cache = make_cache(backend="none")
    cache.allocate_for("a", 6, max_tokens=64)
    for get in (cache.get_k_view, cache.get_v_view, cache.get_kv_views, cache.get_views):
        with unchanged(cache), pytest.raises(ValueError):
            get("a", 0)
    with unchanged(cache), pytest.raises(ValueError):
        cache.write("a", 0, rows(1, 6), rows(1, 6))
    assert cache.append_tokens("a", 58)
    assert cache.stats().arena_bytes == 64 * 2 * 2 * 2 * 4 * 4
