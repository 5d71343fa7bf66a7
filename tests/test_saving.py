"""Save and load: a cached prefix survives the process, and what is wrong with a file changes nothing."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from kvcache import KVCache
from kvcache.errors import CorruptCacheFile, IncompatibleCacheFile, UnknownSequence
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec

LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 8, 4
MODEL = b"a model"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(
        "kvcache.chunks.CHUNK_BYTES", 2 * BLOCK * LAYERS * 2 * HEADS * WIDTH * 4
    )  # two blocks


@pytest.fixture(params=["contiguous", "paged"])
def placement(request):
    return request.param


@pytest.fixture
def make(placement):
    made = []

    def one(blocks=64, **options):
        options = {"placement": placement, "fingerprint": MODEL, **options}
        made.append(KVCache(LAYERS, HEADS, WIDTH, blocks * BLOCK, BLOCK, **options))
        return made[-1]

    yield one
    for cache in made:
        cache.check()
        cache.close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefixes"


def rows(ids, layer, side, salt=None):
    """K or V of tokens as a function of all ids up to each: so a wrong hit is seen."""
    ids = np.asarray(ids, np.int64)
    sums = np.cumsum(ids * (np.arange(len(ids)) + 7)) + 1000 * layer + 100_000 * side + (hash(salt) % 97)
    return np.broadcast_to((sums % 8191).astype(np.float32)[None, :, None], (HEADS, len(ids), WIDTH)).copy()


def compute(cache, request_id, ids, salt=None, **options):
    """Admit a prompt, compute what is not in place; the allocation."""
    granted = cache.allocate_for(request_id, ids, salt=salt, **options)
    there = granted.cached_tokens
    for layer in range(LAYERS):
        k, v = (rows(ids, layer, side, salt)[:, there:] for side in (0, 1))
        cache.write(request_id, layer, k, v, start=there)
    return granted


def seen(cache, ids, salt=None):
    """Tokens that are in place for a prompt; what is there must be right."""
    granted = cache.allocate_for("seen", [*ids, 1], salt=salt)
    count = granted.cached_tokens
    for layer in range(LAYERS):
        views = cache.get_kv_views("seen", layer, copy=True)
        for side in (0, 1):
            np.testing.assert_array_equal(
                np.array(views[side])[:, :count], rows(ids, layer, side, salt)[:, :count]
            )
    cache.free_for("seen")
    return count


A = list(range(100, 120))  # five blocks
B = [*A[:12], *range(300, 308)]  # shares three
C = list(range(500, 507))  # one block and a half


def three(cache):
    for name, ids in (("a", A), ("b", B), ("c", C)):
        compute(cache, name, ids)
        cache.free_for(name)


def test_what_was_saved_is_found_in_another_cache(make, path):
    one = make()
    three(one)
    assert one.save(path) == (5 + 2 + 1) * BLOCK
    two = make()
    assert two.load(path) == (5 + 2 + 1) * BLOCK
    assert [seen(two, ids) for ids in (A, B, C)] == [20, 20, 4]
    assert two.stats().used_blocks == 0


def test_a_block_that_two_prefixes_share_is_saved_once(make, path):
    one = make()
    three(one)
    one.save(path)
    size = path.stat().st_size - 4096
    assert size == 8 * BLOCK * (4 + one.spec.bytes_per_token)


def test_live_sequences_are_saved_as_far_as_they_are_committed(make, path):
    one = make()
    compute(one, "a", A, max_tokens=40)
    one.append_tokens("a", [1, 2, 3, 4])  # no K/V yet
    assert one.save(path) == 20
    assert seen(make(), A) == 0
    two = make()
    assert two.load(path) == 20
    assert seen(two, [*A, 1, 2, 3, 4]) == 20


def test_only_prefixes_of_these_sequences(make, path):
    one = make()
    three(one)
    compute(one, "b", B)
    assert one.save(path, ["b"]) == 20
    two = make()
    assert two.load(path) == 20
    assert [seen(two, ids) for ids in (C, A, B)] == [0, 12, 20]


def test_what_is_under_a_salt_that_has_been_forgotten_is_left_out(make, path):
    cache = make()
    for name, salt in (("a", "long ago"), ("b", None)):
        compute(cache, name, range(8), salt)
        cache.free_for(name)
    for number in range(2 * 64 + 1024):
        cache.probe(range(8), salt=number)
    assert cache.save(path) == 8
    other = make()
    assert other.load(path) == 8
    assert seen(other, range(8)) == 8 and seen(other, range(8), "long ago") == 0


def test_salts_are_kept_apart_and_by_type(make, path):
    one = make()
    for name, salt in (("a", "tenant"), ("b", b"tenant"), ("c", None), ("d", "")):
        compute(one, name, [*A, len(name)], salt)
        one.free_for(name)
    one.save(path)
    two = make()
    assert two.load(path) == 4 * 20
    assert [seen(two, A, salt) for salt in ("tenant", b"tenant", None, "", "other")] == [20, 20, 20, 20, 0]


def test_a_salt_that_is_neither_str_nor_bytes_is_not_saved(make, path):
    one = make()
    compute(one, "a", A, ("tenant", 1))
    one.free_for("a")
    with pytest.raises(TypeError, match="tuple"):
        one.save(path)
    assert not path.exists()


def test_sequences_that_are_only_counted_are_not_saved(make, path):
    one = make()
    one.allocate_for("a", 20)
    one.commit("a")
    assert one.save(path) == 0
    assert make().load(path) == 0


def test_loading_again_changes_nothing(make, path):
    one = make()
    three(one)
    one.save(path)
    before = one.stats()
    assert one.load(path) == 8 * BLOCK
    assert one.stats().cached_blocks == before.cached_blocks
    two = make()
    assert two.load(path) == two.load(path) == 8 * BLOCK


def test_loading_beside_what_is_there_joins_it(make, path):
    one, two = make(), make()
    three(one)
    one.save(path)
    compute(two, "live", A[:12])
    compute(two, "other", C[:4])
    two.free_for("other")
    assert two.load(path) == 8 * BLOCK
    assert [seen(two, ids) for ids in (A, B, C)] == [20, 20, 4]
    assert two.used_tokens("live") == 12


def test_loading_is_no_query_and_no_sequence_in_the_statistics(make, path):
    one, two = make(), make()
    three(one)
    one.save(path)
    two.load(path)
    stats = two.stats()
    assert (stats.queries, stats.hit_tokens, stats.admissions, stats.frees) == (0, 0, 0, 0)
    assert stats.num_sequences == stats.used_blocks == 0


def test_more_than_fits_is_loaded_as_far_as_it_fits(make, path):
    one = make()
    three(one)
    one.save(path)
    two = make(blocks=6)
    compute(two, "live", [1, 2, 3, 4, 5])
    found = two.load(path)
    assert 0 < found <= 4 * BLOCK
    there = [two.probe([*ids, 1]) for ids in (A, B, C)]
    assert found == max(there[:2]) + there[2]
    two.free_for("live")
    assert seen(two, A[:12]) == min(there[0], 12)
    full = make(blocks=3)
    full.allocate_for("all", 12)
    assert full.load(path) == 0


def test_a_cache_that_keeps_no_prefixes_saves_and_loads_none(make, path):
    one = make()
    three(one)
    one.save(path)
    off = make(prefix_cache=False)
    assert off.load(path) == 0
    compute(off, "a", A)
    assert off.save(path) == 0


def test_an_arena_of_another_size_and_placement_loads_it(make, path, placement):
    one = make()
    three(one)
    one.save(path)
    two = make(blocks=32, placement="paged" if placement == "contiguous" else "contiguous")
    assert two.load(path) == 8 * BLOCK
    assert [seen(two, ids) for ids in (A, B, C)] == [20, 20, 4]


def test_many_prefixes_of_one_beginning(make, path):
    one = make(blocks=256)
    prompts = [[*A, *range(1000 + 10 * n, 1009 + 10 * n)] for n in range(40)]
    for number, ids in enumerate(prompts):
        compute(one, number, ids)
        one.free_for(number)
    saved = one.save(path)
    assert saved == (5 + 40 * 2) * BLOCK
    two = make(blocks=256)
    assert two.load(path) == saved
    assert {seen(two, ids) for ids in prompts} == {28}


def test_planes_of_all_kinds_and_bfloat16_stay_what_they_are(path):
    layers = [
        LayerSpec(
            [
                PlaneSpec("k", 2, 4, "uint32"),
                PlaneSpec("k_scales", 2, 1, "bfloat16"),
                PlaneSpec("v", 1, 3, "uint8"),
            ]
        ),
        LayerSpec([PlaneSpec("k", 1, 5, "float16")]),
    ]
    spec = KVCacheSpec.from_layers(layers, 64, 4)
    rng = np.random.default_rng(1)
    planes = []
    with KVCache(spec, fingerprint=MODEL) as one:
        one.allocate_for("a", A)
        for number, layer in enumerate(layers):
            planes.append([])
            for plane, there in zip(layer.planes, one.arena.planes[number].values(), strict=True):
                bits = rng.bytes(plane.heads * len(A) * plane.width * there.dtype.itemsize)
                planes[-1].append(np.frombuffer(bits, there.dtype).reshape(plane.heads, len(A), plane.width))
            one.write("a", number, *planes[-1])
        one.save(path)
    with KVCache(spec, fingerprint=MODEL) as two:
        assert two.load(path) == 20
        assert two.allocate_for("a", [*A, 1]).cached_tokens == 20
        for number in range(2):
            for view, wanted in zip(two.get_views("a", number), planes[number], strict=True):
                assert view[:, :20].tobytes() == wanted.tobytes()


def test_mlx_loads_what_numpy_saved(path):
    mx = pytest.importorskip("mlx.core")
    with KVCache(LAYERS, HEADS, WIDTH, 256, BLOCK, fingerprint=MODEL) as one:
        three(one)
        one.save(path)
    with KVCache(LAYERS, HEADS, WIDTH, 256, BLOCK, backend="mlx", fingerprint=MODEL) as two:
        assert two.load(path) == 8 * BLOCK
        assert two.allocate_for("b", [*B, 1]).cached_tokens == 20
        k = two.get_k_view("b", 1)
        mx.eval(k)
        np.testing.assert_array_equal(np.array(k)[:, :20], rows(B, 1, 0))
        two.check()


def test_another_process_finds_it(make, path):
    one = make()
    three(one)
    one.save(path)
    script = (
        "import sys; from kvcache import KVCache\n"
        f"cache = KVCache({LAYERS}, {HEADS}, {WIDTH}, 256, {BLOCK}, fingerprint={MODEL!r})\n"
        f"print(cache.load(sys.argv[1]), cache.probe({[*A, 1]}))"
    )
    # the chunks here are smaller than another process's: they are whole blocks, and that is enough
    output = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["32", "20"]


def test_saving_while_others_serve_writes_a_file_that_loads(make, path):
    one = make(blocks=40)
    stop = threading.Event()

    def serve():
        number = 0
        while not stop.is_set():
            number += 1
            if one.allocate_for("x", [*A[:8], *range(number, number + 12)]) is not None:
                one.commit("x")
                one.free_for("x")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(10):
            saved = one.save(path)
            two = make(blocks=64)
            assert two.load(path) == saved
    finally:
        stop.set()
        thread.join()


# ---- refusals


@pytest.mark.parametrize("call", ["save", "load"])
def test_without_a_fingerprint_nothing_is_saved_or_loaded(make, path, call):
    with pytest.raises(ValueError, match=f"{call} needs to know the model"):
        getattr(make(fingerprint=None), call)(path)
    assert not path.exists()


@pytest.mark.parametrize("fingerprint, kind", [("text", TypeError), (b"", ValueError)])
def test_a_fingerprint_is_bytes(fingerprint, kind):
    with pytest.raises(kind, match="fingerprint"):
        KVCache(1, 1, 8, 64, fingerprint=fingerprint)


def test_without_storage_nothing_is_saved(path):
    with pytest.raises(ValueError, match="no storage"):
        KVCache(1, 1, 8, 64, backend="none", fingerprint=MODEL).save(path)


def test_who_does_not_live_is_not_saved(make, path):
    with pytest.raises(UnknownSequence):
        make().save(path, ["nobody"])
    assert not path.exists()


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "altered":
        data[-1] ^= 1
    elif how == "cut":
        del data[-1]
    elif how == "foreign":
        data[20:30] = b"x" * 10
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["altered", "cut", "foreign"])
def test_a_file_that_is_not_in_order_changes_nothing(make, path, how):
    one = make()
    three(one)
    one.save(path)
    damage(path, how)
    two = make(blocks=8)
    compute(two, "old", C)
    two.free_for("old")
    before = two.stats()
    with pytest.raises(CorruptCacheFile):
        two.load(path)
    assert two.stats() == before
    assert seen(two, C) == 4 and seen(two, A) == 0


def test_a_file_of_another_model_changes_nothing(make, path):
    one = make()
    three(one)
    one.save(path)
    two = make(fingerprint=b"another model")
    before = two.stats()
    with pytest.raises(IncompatibleCacheFile, match="fingerprint"):
        two.load(path)
    assert two.stats() == before


def test_a_file_that_changes_after_it_was_verified_enters_nothing_that_is_wrong(make, path, monkeypatch):
    one = make()
    three(one)
    one.save(path)
    two = make()
    begin = two._begin_prefix

    def late(*arguments):
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x55")
        return begin(*arguments)

    class Late(type(two)):
        _begin_prefix = staticmethod(late)

    two.__class__ = Late
    with pytest.raises(CorruptCacheFile):
        two.load(path)
    assert two.stats().used_blocks == 0
    for ids in (A, B, C):
        seen(two, ids)
