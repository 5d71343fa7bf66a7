"""The arithmetic of an arena: blocks, bytes, layers that differ, and what is refused before anything exists."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest

from kvcache.spec import ITEMSIZE, KVCacheSpec, LayerSpec, PlaneSpec, itemsize

PLAIN = {"num_layers": 2, "num_kv_heads": 4, "head_dim": 8, "max_total_tokens": 64}


def plain(**changes):
    return KVCacheSpec(**{**PLAIN, **changes})


def layer(*widths, heads=1, dtype="float32", names="kvwxyz"):
    return LayerSpec(
        [PlaneSpec(name, heads, width, dtype) for name, width in zip(names, widths, strict=False)]
    )


def test_the_guides_example_comes_out_as_in_the_guide():
    spec = KVCacheSpec(32, 32, 64, 32768, 16)
    side = spec.layers[0].planes[0]
    assert spec.num_blocks == 2048
    assert side.heads * spec.block_size * side.width == 32_768
    assert spec.bytes_per_token == 32 * 2 * 32 * 64 * 4
    assert spec.block_bytes == 16 * spec.bytes_per_token
    assert spec.arena_bytes == 17_179_869_184


@pytest.mark.parametrize(
    ("tokens", "block_size", "blocks"), [(1, 16, 1), (16, 16, 1), (17, 16, 2), (5, 1, 5), (7, 64, 1)]
)
def test_the_arena_is_rounded_up_to_whole_blocks(tokens, block_size, blocks):
    spec = plain(max_total_tokens=tokens, block_size=block_size)
    assert (spec.num_blocks, spec.arena_tokens) == (blocks, blocks * block_size)
    assert spec.arena_bytes == spec.arena_tokens * spec.bytes_per_token
    assert spec.max_total_tokens == tokens


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_bytes_follow_the_dtype(dtype, size):
    assert plain(dtype=dtype).bytes_per_token == 2 * 2 * 4 * 8 * size


def test_itemsizes_are_those_of_numpy():
    for name in ITEMSIZE:
        if name != "bfloat16":
            assert itemsize(name) == np.dtype(name).itemsize


def test_itemsize_of_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="float64"):
        itemsize("float64")


def test_v_may_be_narrower_than_k():
    spec = plain(head_dim=8, v_head_dim=6)
    assert [plane.width for plane in spec.layers[1].planes] == [8, 6]
    assert (spec.head_dim, spec.v_head_dim) == (8, 6)
    assert spec.bytes_per_token == 2 * 4 * (8 + 6) * 4


def test_v_is_as_wide_as_k_unless_said():
    assert plain().v_head_dim == 8


def test_layers_that_are_alike_make_an_equal_spec():
    pair = LayerSpec((PlaneSpec("k", 4, 8), PlaneSpec("v", 4, 8)))
    spec = KVCacheSpec.from_layers([pair, pair], 64)
    assert spec == plain()
    assert hash(spec) == hash(plain())
    assert (spec.num_kv_heads, spec.head_dim, spec.dtype) == (4, 8, "float32")


def test_what_differs_between_layers_has_no_single_value():
    spec = KVCacheSpec.from_layers([layer(8, 8, heads=2), layer(4, 4, heads=1, dtype="float16")], 64)
    assert (spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.dtype) == (None, None, None, None)
    assert repr(spec).count("None") == 4


def test_bytes_of_layers_that_differ_are_summed_plane_by_plane():
    latent = layer(512, 64, dtype="bfloat16", names=["latent", "rope"])
    spec = KVCacheSpec.from_layers([latent, layer(3, heads=5)], 100, block_size=32)
    assert [each.bytes_per_token for each in spec.layers] == [576 * 2, 5 * 3 * 4]
    assert spec.bytes_per_token == 576 * 2 + 60
    assert spec.arena_bytes == 128 * spec.bytes_per_token


def test_quantised_planes_are_found_by_name():
    names = ["k", "k_scales", "k_biases", "v", "v_scales", "v_biases"]
    dtypes = ["uint32", "float16", "float16"] * 2
    planes = [
        PlaneSpec(name, 2, width, dtype)
        for name, width, dtype in zip(names, [8, 1, 1] * 2, dtypes, strict=True)
    ]
    spec = KVCacheSpec.from_layers([LayerSpec(planes)], 64)
    assert (spec.layers[0].k_index, spec.layers[0].v_index) == (0, 3)
    assert spec.dtype is None
    assert spec.bytes_per_token == 2 * 2 * (8 * 4 + 2 + 2)


def test_planes_without_the_names_are_k_and_v_by_order():
    unnamed = layer(512, 64, names=["latent", "rope"])
    assert (unnamed.k_index, unnamed.v_index) == (0, 1)


def test_a_layer_of_one_plane_has_no_v():
    spec = KVCacheSpec.from_layers([layer(8, names=["latent"])], 64)
    assert spec.layers[0].v_index is None
    assert spec.v_head_dim is None


@pytest.mark.parametrize("name", [*PLAIN, "block_size", "v_head_dim"])
@pytest.mark.parametrize("value", [True, False, 2.0, "2", np.float32(2), np.bool_(True), [2]])
def test_what_is_no_int_is_a_type_error_that_names_it(name, value):
    with pytest.raises(TypeError, match=f"{name}|integer"):
        plain(**{name: value})


@pytest.mark.parametrize("name", [*PLAIN, "block_size", "v_head_dim"])
@pytest.mark.parametrize("value", [0, -1, -(2**70)])
def test_counts_below_one_are_refused_with_the_number(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected at least 1"):
        plain(**{name: value})


@pytest.mark.parametrize("name", [*PLAIN, "block_size", "v_head_dim"])
@pytest.mark.parametrize("value", [2**31, 2**63, 2**70])
def test_enormous_counts_are_refused_with_the_number(name, value):
    with pytest.raises(ValueError, match=str(value)):
        plain(**{name: value})


@pytest.mark.parametrize("value", [np.int32(2), np.uint8(2), np.array(2)])
def test_integers_of_numpy_are_ints_here(value):
    assert plain(num_layers=value) == plain(num_layers=2)
    assert type(plain(head_dim=value).head_dim) is int


def test_the_largest_arena_is_one_block_below_two_to_the_31_tokens():
    assert plain(max_total_tokens=2**31 - 16).arena_tokens == 2**31 - 16
    with pytest.raises(ValueError, match=r"134217728 blocks of 16 tokens has 2147483648 tokens"):
        plain(max_total_tokens=2**31 - 15)


def test_bytes_do_not_wrap():
    spec = KVCacheSpec(1000, 2**20, 2**20, 2**30, dtype="float16")
    assert spec.arena_bytes == 1000 * 2 * 2**40 * 2 * 2**30


@pytest.mark.parametrize("dtype", ["float64", "int8", "", "FLOAT32"])
def test_an_unknown_dtype_is_refused_and_the_known_ones_listed(dtype):
    with pytest.raises(ValueError, match="float32, float16, bfloat16"):
        plain(dtype=dtype)
    with pytest.raises(ValueError, match="float32, float16, bfloat16, uint32, uint8"):
        PlaneSpec("k", 1, 8, dtype)


def test_packed_dtypes_are_for_planes_only():
    assert PlaneSpec("k", 1, 8, "uint8").bytes_per_token == 8
    with pytest.raises(ValueError, match="uint8"):
        plain(dtype="uint8")


@pytest.mark.parametrize("dtype", [np.float32, 4, None, b"float32"])
def test_a_dtype_is_given_by_name(dtype):
    with pytest.raises(TypeError, match="expected a name"):
        plain(dtype=dtype)


def test_planes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="'k'"):
        layer(8, 8, names="kk")


@pytest.mark.parametrize(("name", "error"), [("", ValueError), (3, TypeError), (None, TypeError)])
def test_a_plane_needs_a_name(name, error):
    with pytest.raises(error, match="name of a plane"):
        PlaneSpec(name, 1, 8)


@pytest.mark.parametrize("changes", [{"heads": 0}, {"width": 0}, {"heads": 2**31}, {"width": 2**31}])
def test_a_plane_of_impossible_size_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        PlaneSpec(**{"name": "k", "heads": 1, "width": 8, **changes})


def test_layers_and_planes_may_not_be_empty():
    with pytest.raises(ValueError, match="planes is empty"):
        LayerSpec([])
    with pytest.raises(ValueError, match="layers is empty"):
        KVCacheSpec.from_layers([], 64)


def test_only_planes_make_a_layer_and_only_layers_a_spec():
    with pytest.raises(TypeError, match="planes has a str"):
        LayerSpec(["k", "v"])
    with pytest.raises(TypeError, match="layers has a PlaneSpec"):
        KVCacheSpec.from_layers([PlaneSpec("k", 1, 8)], 64)


def test_specs_cannot_be_changed():
    spec = plain()
    for name in ("layers", "block_size", "num_layers", "head_dim"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(spec, name, 1)
    assert spec == plain()


def test_specs_survive_pickling_and_copying():
    spec = plain(v_head_dim=6)
    assert spec.bytes_per_token == 2 * 4 * 14 * 4
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec


def test_specs_that_differ_in_one_number_are_not_equal():
    changes = [
        {"block_size": 8},
        {"max_total_tokens": 65},
        {"dtype": "float16"},
        {"v_head_dim": 4},
        {"num_layers": 3},
    ]
    assert len({plain(), *(plain(**change) for change in changes)}) == len(changes) + 1


@pytest.mark.parametrize("changes", [{}, {"v_head_dim": 6, "dtype": "bfloat16", "block_size": 1}])
def test_the_repr_of_a_plain_spec_makes_an_equal_one(changes):
    assert eval(repr(plain(**changes))) == plain(**changes)


def test_the_arithmetic_needs_no_array_library():
    script = "import sys, kvcache.spec; print([name for name in ('mlx', 'ml_dtypes') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
