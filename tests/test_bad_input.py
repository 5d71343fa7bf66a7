"""What bad input gets: the error that the table of failures names, and nothing changed."""

import copy
import pickle
import sys
import warnings

import numpy as np
import pytest
from observation import unchanged

from kvcache import (
    CacheClosed,
    CacheFull,
    CacheHeld,
    InvalidFree,
    KVCache,
    KVCacheError,
    KVCacheSpec,
    LayerSpec,
    PlaneSpec,
    RequestTooLarge,
    SequenceExists,
    UnknownSequence,
)
from kvcache._ids import Tokens

ENORMOUS = [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**64 + 1, 2**70]
NO_INTS = [True, False, 1.0, float("nan"), "1", b"1", 1j, object()]
NEGATIVE = [-1, -(2**31), -(2**63), -(2**70)]


@pytest.fixture(params=["contiguous", "paged"])
def cache(make_cache, request):
    """`a` with 6 of 12 tokens, written; `b`, a fork of it, with 7."""
    cache = make_cache(placement=request.param)
    cache.allocate_for("a", 6, max_tokens=12)
    for layer in range(2):
        cache.write("a", layer, *[np.full((2, 6, 4), 3 + layer, np.float32)] * 2)
    cache.fork("a", "b")
    cache.append_token("b")
    return cache


def rows(count=1, heads=2, width=4, dtype=np.float32):
    return np.zeros((heads, count, width), dtype)


def raises(cache, error, call, *arguments, **named):
    """`call` raises exactly this kind of error, and leaves no trace."""
    with unchanged(cache), pytest.raises(error) as caught:
        call(*arguments, **named)
    return caught.value


# ---- ids

BY_ID = {
    "append_token": lambda cache, name: cache.append_token(name),
    "append_tokens": lambda cache, name: cache.append_tokens(name, 1),
    "append_tokens of none": lambda cache, name: cache.append_tokens(name, 0),
    "truncate": lambda cache, name: cache.truncate(name, 0),
    "fork": lambda cache, name: cache.fork(name, "new"),
    "set_limit": lambda cache, name: cache.set_limit(name, 20),
    "limit": lambda cache, name: cache.limit(name),
    "commit": lambda cache, name: cache.commit(name),
    "used_tokens": lambda cache, name: cache.used_tokens(name),
    "capacity": lambda cache, name: cache.capacity(name),
    "is_contiguous": lambda cache, name: cache.is_contiguous(name),
    "block_table": lambda cache, name: cache.block_table(name),
    "token_offset_in_block": lambda cache, name: cache.token_offset_in_block(name),
    "write": lambda cache, name: cache.write(name, 0, rows(), rows()),
    "get_k_view": lambda cache, name: cache.get_k_view(name, 0),
    "get_v_view": lambda cache, name: cache.get_v_view(name, 0),
    "get_kv_views": lambda cache, name: cache.get_kv_views(name, 0),
    "get_views": lambda cache, name: cache.get_views(name, 0),
    "batch": lambda cache, name: cache.batch(["a", name]),
    "batch.add": lambda cache, name: cache.batch(["a"]).add(name),
    "batch.remove": lambda cache, name: cache.batch(["a"]).remove(name),
}


@pytest.mark.parametrize("call", BY_ID.values(), ids=BY_ID)
def test_an_unknown_id_is_a_key_error_that_names_it(cache, call):
    for name in ("never seen", None, ("a",)):
        error = raises(cache, UnknownSequence, call, cache, name)
        assert error.request_id == name
        assert isinstance(error, KeyError)
        assert isinstance(error, KVCacheError)


@pytest.mark.parametrize("call", BY_ID.values(), ids=BY_ID)
def test_a_freed_id_is_unknown(cache, call):
    cache.free_for("b")
    raises(cache, UnknownSequence, call, cache, "b")


@pytest.mark.parametrize("call", BY_ID.values(), ids=BY_ID)
def test_an_unhashable_id_is_a_type_error(cache, call):
    for name in ([], {}, {"a"}, np.zeros(2)):
        raises(cache, TypeError, call, cache, name)


def test_an_unhashable_id_is_not_admitted(cache):
    raises(cache, TypeError, cache.allocate_for, [], 1)
    raises(cache, TypeError, cache.fork, "a", [])
    raises(cache, TypeError, cache.free_for, [])


def test_an_id_that_lives_is_not_admitted_again(cache):
    for prompt, limits in ((1, {}), (6, {"max_tokens": 12}), (64, {})):
        error = raises(cache, SequenceExists, cache.allocate_for, "a", prompt, **limits)
        assert error.request_id == "a"
        assert isinstance(error, ValueError)


def test_a_second_free_is_a_no_op(cache):
    assert cache.free_for("a") is True
    with unchanged(cache):
        assert cache.free_for("a") is False


def test_a_fork_stands_when_its_parent_is_freed_first(cache):
    cache.free_for("a")
    assert np.all(cache.get_k_view("b", 0)[:, :6] == 3)
    assert np.all(cache.get_v_view("b", 1)[:, :6] == 4)
    assert cache.append_token("b") is True
    cache.free_for("b")
    assert cache.stats().used_blocks == 0


# ---- counts

COUNTS = {
    "prompt": (1, lambda cache, n: cache.allocate_for("c", n)),
    "append_tokens": (0, lambda cache, n: cache.append_tokens("a", n)),
    "truncate": (0, lambda cache, n: cache.truncate("a", n)),
    "commit": (0, lambda cache, n: cache.commit("a", n)),
    "set_limit": (6, lambda cache, n: cache.set_limit("a", n)),
    "max_tokens": (6, lambda cache, n: cache.allocate_for("c", 6, max_tokens=n)),
    "max_new_tokens": (0, lambda cache, n: cache.allocate_for("c", 6, max_new_tokens=n)),
    "write start": (0, lambda cache, n: cache.write("a", 0, rows(), rows(), start=n)),
}


@pytest.mark.parametrize(("least", "call"), COUNTS.values(), ids=COUNTS)
def test_a_count_that_is_too_small_is_a_value_error(cache, least, call):
    for count in (*NEGATIVE, least - 1):
        error = raises(cache, ValueError, call, cache, count)
        assert not isinstance(error, (RequestTooLarge, UnicodeError))


@pytest.mark.parametrize("call", [call for _, call in COUNTS.values()], ids=COUNTS)
def test_a_count_that_is_no_int_is_a_type_error(cache, call):
    for count in NO_INTS:
        raises(cache, TypeError, call, cache, count)


def test_numpy_ints_are_ints(cache):
    assert cache.append_tokens("a", np.int64(1)) is True
    assert cache.truncate("a", np.uint8(6)) is True
    assert cache.allocate_for("c", np.int32(4), max_tokens=np.int16(8)).max_tokens == 8
    assert cache.get_k_view("a", np.int64(0)).shape == (2, 6, 4)


def test_numpy_bools_and_floats_are_no_ints(cache):
    for count in (np.bool_(True), np.float32(1)):
        raises(cache, TypeError, cache.append_tokens, "a", count)
        raises(cache, TypeError, cache.allocate_for, "c", count)


@pytest.mark.parametrize("count", ENORMOUS)
def test_an_enormous_prompt_or_limit_never_fits(cache, count):
    for call, what in (
        (lambda: cache.allocate_for("c", count), "prompt"),
        (lambda: cache.allocate_for("c", 1, max_tokens=count), "max_tokens"),
        (lambda: cache.set_limit("a", count), "max_tokens"),
    ):
        error = raises(cache, RequestTooLarge, call)
        assert (error.what, error.tokens, error.num_blocks) == (what, count, 16)
        assert error.blocks_needed == -(-count // 4)
    error = raises(cache, RequestTooLarge, cache.allocate_for, "c", 5, max_new_tokens=count)
    assert error.tokens == count + 5


@pytest.mark.parametrize("count", ENORMOUS)
def test_an_enormous_append_is_refused(cache, count):
    with unchanged(cache):
        assert cache.append_tokens("a", count) is False


@pytest.mark.parametrize("count", ENORMOUS)
def test_an_enormous_cut_or_commit_is_a_value_error(cache, count):
    raises(cache, ValueError, cache.truncate, "a", count)
    raises(cache, ValueError, cache.commit, "a", count)
    raises(cache, ValueError, cache.write, "a", 0, rows(), rows(), start=count)


def test_a_limit_below_the_prompt_is_a_value_error(cache):
    for limit in (0, 5):
        raises(cache, ValueError, cache.allocate_for, "c", 6, max_tokens=limit)


def test_two_limits_are_a_type_error(cache):
    raises(cache, TypeError, cache.allocate_for, "c", 6, max_tokens=8, max_new_tokens=2)


def test_an_empty_prompt_is_a_value_error(cache):
    for prompt in ([], (), range(0), np.zeros(0, np.int32)):
        raises(cache, ValueError, cache.allocate_for, "c", prompt)


@pytest.mark.parametrize(
    "prompt", ["text", b"bytes", bytearray(b"ab"), memoryview(b"ab"), [1.0], [True], ["1"], [None]]
)
def test_a_prompt_that_is_no_token_ids_is_a_type_error(cache, prompt):
    raises(cache, TypeError, cache.allocate_for, "c", prompt)
    raises(cache, TypeError, cache.append_tokens, "a", prompt)


@pytest.mark.parametrize("prompt", [np.zeros(2), np.zeros(2, bool), np.array(["1"])])
def test_an_array_of_no_ints_is_a_type_error(cache, prompt):
    raises(cache, TypeError, cache.allocate_for, "c", prompt)
    raises(cache, TypeError, cache.append_tokens, "a", prompt)


@pytest.mark.parametrize(
    "prompt", [[-1], [2**31], [1, 2**70], np.zeros((2, 2), int), np.array([-1]), np.array([2**31])]
)
def test_token_ids_out_of_range_are_a_value_error(cache, prompt):
    raises(cache, ValueError, cache.allocate_for, "c", prompt)
    raises(cache, ValueError, cache.append_tokens, "a", prompt)


@pytest.mark.parametrize(
    ("token", "error"),
    [
        (-1, ValueError),
        (2**31, ValueError),
        (2**70, ValueError),
        (1.0, TypeError),
        (True, TypeError),
        ("1", TypeError),
    ],
)
def test_a_token_that_is_no_id_is_an_error(cache, token, error):
    raises(cache, error, cache.append_token, "a", token)


# ---- layers, shapes, dtypes

BY_LAYER = {
    "get_k_view": lambda cache, layer: cache.get_k_view("a", layer),
    "get_v_view": lambda cache, layer: cache.get_v_view("a", layer),
    "get_kv_views": lambda cache, layer: cache.get_kv_views("a", layer),
    "get_views": lambda cache, layer: cache.get_views("a", layer),
    "write": lambda cache, layer: cache.write("a", layer, rows(), rows()),
}


@pytest.mark.parametrize("call", BY_LAYER.values(), ids=BY_LAYER)
def test_a_layer_out_of_range_is_an_index_error(cache, call):
    for layer in (2, -1, *NEGATIVE, *ENORMOUS):
        raises(cache, IndexError, call, cache, layer)


@pytest.mark.parametrize("call", BY_LAYER.values(), ids=BY_LAYER)
def test_a_layer_that_is_no_int_is_a_type_error(cache, call):
    for layer in (*NO_INTS, None):
        raises(cache, TypeError, call, cache, layer)


@pytest.mark.parametrize(
    "bad",
    [
        rows(heads=1),
        rows(heads=3),
        rows(width=3),
        rows(width=5),
        rows()[0],
        rows()[None],
        rows(dtype=np.float64),
        rows(dtype=np.float16),
        rows(dtype=np.int32),
        rows(dtype=np.uint32),
        rows(dtype=bool),
        rows(dtype=">f4"),
        np.transpose(rows(count=3), (1, 0, 2)),
        rows(count=2),
    ],
    ids=lambda bad: f"{bad.dtype}{bad.shape}",
)
def test_rows_of_a_wrong_shape_or_dtype_are_a_value_error(cache, bad):
    good = rows()
    for planes in ((bad, good), (good, bad)):
        raises(cache, ValueError, cache.write, "a", 0, *planes)


def test_the_error_names_what_came_and_what_was_wanted(cache):
    message = str(raises(cache, ValueError, cache.write, "a", 0, rows(), rows(width=5)))
    assert "'v'" in message
    assert "(2, 1, 4)" in message
    assert "(2, 1, 5)" in message
    message = str(raises(cache, ValueError, cache.write, "a", 0, rows(dtype=np.float16), rows()))
    assert "float16" in message
    assert "float32" in message


@pytest.mark.parametrize("planes", [(), (rows(),), (rows(), rows(), rows())])
def test_the_wrong_number_of_planes_is_a_value_error(cache, planes):
    raises(cache, ValueError, cache.write, "a", 0, *planes)


@pytest.mark.parametrize("bad", [None, 1.0, [[[0.0] * 4]] * 2, "rows", memoryview(bytes(32))])
def test_rows_that_are_no_array_are_a_type_error(cache, bad):
    raises(cache, TypeError, cache.write, "a", 0, bad, rows())
    raises(cache, TypeError, cache.write, "a", 0, rows(), bad)


def test_half_precision_is_never_mixed_up(make_cache):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    halves = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
    for dtype, other in (("float16", "bfloat16"), ("bfloat16", "float16")):
        cache = make_cache(2, 2, 4, 64, 4, dtype=dtype)
        cache.allocate_for("a", 2)
        for wrong in (halves[other], np.uint16, np.float32):
            raises(cache, ValueError, cache.write, "a", 0, rows(dtype=wrong), rows(dtype=halves[dtype]))


def test_wrong_mlx_rows_are_a_value_error(cache):
    mx = pytest.importorskip("mlx.core")
    good = mx.zeros((2, 1, 4))
    for bad in (mx.zeros((2, 1, 5)), mx.zeros((2, 1, 4), mx.float16), mx.zeros((1, 1, 4)), mx.zeros((2, 4))):
        raises(cache, ValueError, cache.write, "a", 0, bad, good)
        raises(cache, ValueError, cache.write, "a", 0, good, bad)


# ---- construction

SHAPE = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 4, "max_total_tokens": 64, "block_size": 4}


@pytest.mark.parametrize("name", SHAPE)
def test_a_shape_without_extent_is_a_value_error(name):
    for value in (0, -1, -(2**70)):
        with pytest.raises(ValueError, match=name):
            KVCache(**SHAPE | {name: value})


@pytest.mark.parametrize("name", SHAPE)
def test_a_shape_that_is_no_int_is_a_type_error(name):
    for value in (True, 2.0, "2", [2]):
        with pytest.raises(TypeError):
            KVCache(**SHAPE | {name: value})


@pytest.mark.parametrize("tokens", [2**31, 2**31 - 1, 2**63, 2**70])
def test_an_arena_beyond_32_bits_is_a_value_error(tokens):
    with pytest.raises(ValueError, match=r"\d"):
        KVCache(1, 1, 1, tokens, 16, backend="none")


def test_an_arena_larger_than_memory_is_refused_before_it_is_touched():
    for backend in ("numpy", "mlx"):
        if backend == "mlx":
            pytest.importorskip("mlx.core")
        with pytest.raises(MemoryError) as caught:
            KVCache(256, 128, 1024, 2**30, 16, backend=backend)
        error = caught.value
        asked = 256 * 128 * 1024 * 2**30 * 2 * 4
        assert error.bytes_needed == asked
        assert 0 < error.bytes_available < asked
        assert str(asked) in str(error)
        assert str(error.bytes_available) in str(error)


@pytest.mark.parametrize(
    "options",
    [{"backend": None}, {"backend": 3}, {"placement": None}, {"dtype": np.float32}],
)
def test_a_choice_that_is_no_name_is_an_error(options):
    with pytest.raises((TypeError, ValueError)):
        KVCache(**SHAPE, **options)


@pytest.mark.parametrize("options", [{"max_batch": 3}, {"Backend": "numpy"}])
def test_an_unknown_option_is_a_type_error(options):
    with pytest.raises(TypeError):
        KVCache(**SHAPE, **options)


def test_layers_without_planes_are_a_value_error():
    for make in (
        lambda: LayerSpec(()),
        lambda: KVCacheSpec.from_layers([], 64),
        lambda: LayerSpec((PlaneSpec("k", 1, 4), PlaneSpec("k", 1, 4))),
        lambda: PlaneSpec("k", 0, 4),
        lambda: PlaneSpec("k", 1, 4, "float64"),
    ):
        with pytest.raises(ValueError, match=r"."):
            make()


# ---- errors as values

ERRORS = [
    RequestTooLarge(what="prompt", tokens=40000, blocks_needed=2500, num_blocks=2048),
    UnknownSequence(request_id=("a", 1)),
    SequenceExists(request_id="a"),
    InvalidFree(start=1, length=2, reason="twice"),
    CacheFull(blocks_needed=2, blocks_available=1),
    CacheClosed(),
    CacheHeld(holds=2),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickle_and_copy(error):
    assert isinstance(error, KVCacheError)
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_no_warning_is_raised_on_the_way(make_cache):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = make_cache()
        cache.allocate_for("a", np.int8(3))
        cache.append_tokens("a", np.uint64(1))
        assert sys.getrefcount(cache) < 10


def test_a_prompt_that_shrinks_while_it_is_read_is_taken_as_it_was(make_cache):
    class Shrinking:
        def __index__(self):
            prompt.clear()
            return 7

    prompt = [Shrinking(), *range(1, 30)]
    assert make_cache().allocate_for("a", prompt).tokens == 30


# ---- prefixes

BY_IDS = {
    "allocate_for": lambda cache, ids: cache.allocate_for("c", ids),
    "probe": lambda cache, ids: cache.probe(ids),
    "append_tokens": lambda cache, ids: cache.append_tokens("a", ids),
    "set_tokens": lambda cache, ids: cache.set_tokens("a", ids),
    "pin": lambda cache, ids: cache.pin(tokens=ids),
    "batch.append": lambda cache, ids: cache.batch(["a", "b"]).append(ids, counts=1),
    "Tokens": lambda cache, ids: Tokens(ids),
}
NO_IDS = {
    "negative": ([5, -1], ValueError, "position 1"),
    "beyond": ([2**31, 5], ValueError, "position 0"),
    "enormous": ([5, 2**70], ValueError, "position 1"),
    "a float": ([5, 1.0], TypeError, "position 1"),
    "a bool": ([True, 5], TypeError, "position 0"),
    "a NumPy bool": ([5, np.bool_(True)], TypeError, "position 1"),
    "None": ([None, 5], TypeError, "position 0"),
    "a negative int32": (np.array([5, -1], np.int32), ValueError, "position 1"),
    "a negative int64": (np.array([-1, 5]), ValueError, "position 0"),
    "a large int64": (np.array([5, 2**31]), ValueError, "position 1"),
    "a large uint64": (np.array([5, 2**63], np.uint64), ValueError, "position 1"),
    "floats": (np.zeros(2), TypeError, "float64"),
    "bools": (np.zeros(2, bool), TypeError, "bool"),
    "strings": (np.array(["1", "2"]), TypeError, "ints"),
    "objects": (np.array([1, 2], object), TypeError, "object"),
    "str": ("ab", TypeError, "str"),
    "bytes": (b"ab", TypeError, "bytes"),
    "bytearray": (bytearray(b"ab"), TypeError, "bytearray"),
    "memoryview of bytes": (memoryview(b"ab"), TypeError, "bytes"),
}


@pytest.mark.parametrize(("ids", "error", "said"), NO_IDS.values(), ids=NO_IDS)
@pytest.mark.parametrize("call", BY_IDS.values(), ids=BY_IDS)
def test_what_is_no_token_id_is_named_and_changes_nothing(cache, call, ids, error, said):
    assert said in str(raises(cache, error, call, cache, ids))


@pytest.mark.parametrize("call", [BY_IDS["allocate_for"], BY_IDS["probe"], BY_IDS["append_tokens"]])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_in_two_dimensions_are_a_value_error(cache, call, shape, dtype):
    raises(cache, ValueError, call, cache, np.zeros(shape, dtype))


def test_mlx_arrays_that_are_no_ids_are_an_error(cache):
    mx = pytest.importorskip("mlx.core")
    for call in (BY_IDS["allocate_for"], BY_IDS["probe"], BY_IDS["append_tokens"]):
        raises(cache, ValueError, call, cache, mx.array([1, -1]))
        raises(cache, ValueError, call, cache, mx.zeros((2, 2), mx.int32))
        raises(cache, TypeError, call, cache, mx.zeros(2))
        raises(cache, TypeError, call, cache, mx.zeros(2, mx.bool_))


def test_ids_that_are_no_ids_in_a_batch_are_refused(cache):
    batch = cache.batch(["a", "b"])
    batch.append()
    for ids, error in (([1], ValueError), ([1, -1], ValueError), ([1, 1.0], TypeError), ("ab", TypeError)):
        raises(cache, error, batch.set_tokens, ids)
        raises(cache, error, batch.append, ids)


def test_batch_ids_without_a_step_are_a_value_error(cache):
    batch = cache.batch(["a", "b"])
    raises(cache, ValueError, batch.set_tokens, [1, 2])


@pytest.mark.parametrize("salt", [[], {}, {"a"}, np.zeros(2), ([],)], ids=str)
def test_an_unhashable_salt_is_a_type_error(cache, salt):
    raises(cache, TypeError, cache.allocate_for, "c", [1, 2, 3, 4, 5], salt=salt)
    raises(cache, TypeError, cache.allocate_for, "c", 5, salt=salt)
    raises(cache, TypeError, cache.probe, [1, 2, 3, 4, 5], salt=salt)
    raises(cache, TypeError, cache.pin, tokens=[1, 2, 3, 4, 5], salt=salt)
    raises(cache, TypeError, cache.unpin, tokens=[1, 2, 3, 4, 5], salt=salt)
    raises(cache, TypeError, cache.set_quota, salt, 100)


@pytest.mark.parametrize("form", [list, np.array, Tokens])
def test_a_prompt_of_ids_that_exceeds_the_arena_never_fits(cache, form):
    error = raises(cache, RequestTooLarge, cache.allocate_for, "c", form(range(65)))
    assert (error.what, error.tokens, error.blocks_needed, error.num_blocks) == ("prompt", 65, 17, 16)
    raises(cache, RequestTooLarge, cache.probe, form(range(65)))
    error = raises(cache, RequestTooLarge, cache.pin, tokens=form(range(65)))
    assert (error.tokens, error.blocks_needed, error.num_blocks) == (65, 17, 16)


def test_ids_beyond_the_limit_are_an_error_before_admission(cache):
    raises(cache, ValueError, cache.allocate_for, "c", [1, 2, 3, 4, 5, 6], max_tokens=5)
    raises(cache, RequestTooLarge, cache.allocate_for, "c", [1, 2], max_tokens=65)
    raises(cache, TypeError, cache.allocate_for, "c", [1, 2], max_tokens=8, max_new_tokens=4)
    with unchanged(cache):
        assert cache.append_tokens("a", list(range(7))) is False


@pytest.mark.parametrize("priority", [None, 1.0, "1", True, [1]])
def test_a_priority_that_is_no_int_is_a_type_error(cache, priority):
    raises(cache, TypeError, cache.allocate_for, "c", [1, 2], priority=priority)


@pytest.mark.parametrize(
    ("ttl", "error"),
    [(0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (True, TypeError)],
)
def test_a_time_to_live_that_is_none_is_an_error(cache, ttl, error):
    raises(cache, error, cache.allocate_for, "c", [1, 2], ttl=ttl)


def test_names_that_the_sequence_has_no_tokens_for_are_a_value_error(cache):
    for ids, start in ((list(range(7)), None), ([1], 6), ([1], 3), ([1], 2**70)):
        raises(cache, ValueError, cache.set_tokens, "a", ids, start)
    for start in (-1, -(2**70)):
        raises(cache, ValueError, cache.set_tokens, "a", [1], start)
    for start in (True, 1.0, "1"):
        raises(cache, TypeError, cache.set_tokens, "a", [1], start)
    for name in ("never seen", None):
        raises(cache, UnknownSequence, cache.set_tokens, name, [1])
        raises(cache, UnknownSequence, cache.pin, name) if name else raises(cache, TypeError, cache.pin, name)


def test_a_pin_of_neither_or_both_is_a_type_error(cache):
    raises(cache, TypeError, cache.pin)
    raises(cache, TypeError, cache.pin, "a", tokens=[1])
    raises(cache, TypeError, cache.pin, "a", salt="s")
    raises(cache, TypeError, cache.unpin)


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "mru"},
        {"policy": 3},
        {"policy": None},
        {"clock": 3},
        {"prefix_cache": 1},
        {"prefix_cache": None},
    ],
    ids=str,
)
def test_a_choice_of_prefixes_that_is_none_is_an_error(options):
    with pytest.raises((TypeError, ValueError)):
        KVCache(**SHAPE, **options)


def test_an_index_that_calls_back_while_ids_are_read_finds_the_cache_open(make_cache):
    cache = make_cache()

    class Calling:
        def __index__(self):
            cache.allocate_for("inner", [1, 2, 3, 4, 5])
            return 7

    assert cache.allocate_for("outer", [Calling(), 1, 2]).tokens == 3
    assert list(cache) == ["inner", "outer"]
