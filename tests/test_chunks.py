"""Chunks: packed from the arena and back, sealed, and worth nothing once a single bit of them has changed."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache._pack import pack, unpack
from kvcache.arena import make_arena
from kvcache.chunks import (
    PAGE,
    ChunkLabel,
    chunk_tokens_of,
    envelope_bytes,
    identity_of,
    prefix_keys,
    private_key,
    salt_bytes,
    xxh3_128,
)
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec

SPEC = KVCacheSpec.from_layers(
    [
        LayerSpec([PlaneSpec("k", 2, 3, "float32"), PlaneSpec("v", 2, 5, "float16")]),
        LayerSpec(
            [
                PlaneSpec("k", 1, 4, "uint32"),
                PlaneSpec("k_scales", 3, 2, "bfloat16"),
                PlaneSpec("z", 1, 7, "uint8"),
            ]
        ),
    ],
    max_total_tokens=64,
    block_size=4,
)
IDENTITY = identity_of(SPEC, b"model")
KEY = "0123456789abcdef" * 4


def bits(array):
    return np.asarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def filled(seed):
    """An arena of random bits, and what its planes hold, as arrays of bits."""
    arena = make_arena(SPEC, "numpy")
    rng = np.random.default_rng(seed)
    for planes in arena.planes:
        for plane in planes.values():
            plane_bits = bits(plane)
            plane_bits[...] = rng.integers(0, 2 ** (8 * plane.dtype.itemsize), plane.shape, plane_bits.dtype)
    return arena


def wanted(arena, slots):
    """The payload of tokens at `slots`, by the layout's own words."""
    return b"".join(bits(plane)[:, slots].tobytes() for planes in arena.planes for plane in planes.values())


def slots_of(spans):
    return [slot for start, count in spans for slot in range(start, start + count)]


@pytest.mark.parametrize("spans", [[(8, 10)], [(0, 4), (40, 4), (12, 3)], [(60, 4), (0, 1)], [(0, 64)]])
def test_a_payload_has_each_layers_planes_in_order(spans):
    arena = filled(1)
    slots = slots_of(spans)
    payload = bytearray(SPEC.bytes_per_token * len(slots))
    pack(arena.copier, spans, payload)
    assert payload == wanted(arena, slots)


@pytest.mark.parametrize("spans", [[(8, 10)], [(0, 4), (40, 4), (12, 3)], [(60, 4), (0, 1)]])
def test_unpacking_writes_these_tokens_and_no_others(spans):
    source, target = filled(1), filled(2)
    before = [[bits(plane).copy() for plane in planes.values()] for planes in target.planes]
    slots = slots_of(spans)
    payload = bytearray(SPEC.bytes_per_token * len(slots))
    pack(source.copier, [(0, len(slots))], payload)
    unpack(target.copier, spans, payload)
    for planes, old, new in zip(source.planes, before, target.planes, strict=True):
        for plane, kept, written in zip(planes.values(), old, new.values(), strict=True):
            kept[:, slots] = bits(plane)[:, : len(slots)]
            np.testing.assert_array_equal(bits(written), kept)


@pytest.mark.parametrize("call", [pack, unpack])
@pytest.mark.parametrize("spans", [[(61, 4)], [(-1, 4)], [(0, -4), (0, 8)]])
def test_slots_outside_the_arena_are_refused_and_nothing_written(call, spans):
    arena = filled(1)
    before = wanted(arena, slice(None))
    payload = bytearray(b"\1" * SPEC.bytes_per_token * 4)
    with pytest.raises(ValueError, match="do not lie in slots"):
        call(arena.copier, spans, payload)
    assert payload == b"\1" * len(payload)
    assert wanted(arena, slice(None)) == before


@pytest.mark.parametrize("call", [pack, unpack])
@pytest.mark.parametrize("more", [-1, 1])
def test_a_payload_of_another_size_is_refused(call, more):
    size = SPEC.bytes_per_token * 4
    with pytest.raises(ValueError, match=f"has {size + more} bytes, 4 tokens have {size}"):
        call(filled(1).copier, [(0, 4)], bytearray(size + more))


def test_a_closed_arena_is_refused():
    arena = filled(1)
    copier = arena.copier
    arena.close()
    with pytest.raises(ValueError, match="closed"):
        pack(copier, [(0, 4)], bytearray(SPEC.bytes_per_token * 4))


@pytest.mark.parametrize("writes", ["host", "graph"])
def test_mlx_gives_and_takes_the_same_payload(writes):
    mx = pytest.importorskip("mlx.core")
    from kvcache.arena import MlxArena

    source, target = filled(3), MlxArena(SPEC, writes=writes)
    spans = [(8, 4), (32, 4), (0, 3)]
    payload = bytearray(SPEC.bytes_per_token * 11)
    pack(source.copier, spans, payload)
    unpack(target.copier, spans, payload)
    mx.eval(target.planes)
    back = bytearray(len(payload))
    pack(target.copier, spans, back)
    assert back == payload
    run = bytearray(SPEC.bytes_per_token * 4)
    pack(target.copier, [(32, 4)], run)
    assert run == wanted(source, slice(32, 36))
    target.close()


# ---- envelopes


def label_of(ids=None, tokens=12, **changes):
    facts = {"identity": IDENTITY, "key": KEY, "first_token": 24, "num_tokens": tokens, "ids": ids}
    return ChunkLabel(**{**facts, "payload_bytes": tokens * SPEC.bytes_per_token, **changes})


def sealed(label, seed=0):
    chunk = bytearray(label.chunk_bytes)
    label.payload_of(chunk)[:] = np.random.default_rng(seed).bytes(label.payload_bytes)
    label.seal(chunk)
    return chunk


IDS = np.arange(100, 112, dtype=np.int32)


@pytest.mark.parametrize("ids", [None, IDS])
def test_a_chunk_as_it_was_sealed_is_verified(ids):
    label = label_of(ids)
    assert label.verify(sealed(label))


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": identity_of(SPEC, b"another model")},
        {"key": KEY[::-1]},
        {"first_token": 25},
        {"ids": None},
        {"ids": IDS + 1},
        {"ids": IDS[:-1]},
        {"num_tokens": 13},
    ],
)
def test_a_chunk_of_something_else_is_not_verified(changes):
    label = label_of(IDS)
    other = label_of(**{"ids": IDS, **changes})
    other = ChunkLabel(**{**vars(other), "payload_bytes": label.payload_bytes})
    assert not other.verify(sealed(label))


@given(st.integers(0, 8 * (PAGE + 12 * SPEC.bytes_per_token) - 1))
def test_a_chunk_with_one_bit_changed_is_not_verified(bit):
    label = label_of(IDS)
    chunk = sealed(label)
    chunk[bit // 8] ^= 1 << bit % 8
    assert not label.verify(chunk)


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1])
def test_a_chunk_cut_short_is_not_verified(size):
    label = label_of(IDS)
    assert not label.verify(sealed(label)[:size])


def test_the_envelope_is_what_the_page_says():
    label = label_of(IDS)
    chunk = sealed(label)
    payload = bytes(label.payload_of(chunk))
    assert chunk[:8] == b"KVCHUNK\0"
    assert np.frombuffer(chunk, "<u4", 2, 8).tolist() == [1, 12]
    assert np.frombuffer(chunk, "<u8", 4, 16).tolist() == [PAGE, len(payload), 24, 12]
    assert chunk[48:80] == IDENTITY and chunk[80:112].hex() == KEY
    assert chunk[112:128] == xxh3_128(payload)
    assert np.frombuffer(chunk, "<i4", 12, 144).tolist() == IDS.tolist()
    assert len(chunk) == PAGE + len(payload)


@pytest.mark.parametrize("ids, pages", [(0, 1), (988, 1), (989, 2), (988 + 1024, 2), (988 + 1025, 3)])
def test_ids_that_do_not_fit_take_further_pages(ids, pages):
    assert envelope_bytes(ids) == pages * PAGE
    label = label_of(np.arange(ids, dtype=np.int32), tokens=ids)
    assert label.verify(sealed(label))


def test_the_checksum_is_xxh3_of_all_parts():
    xxhash = pytest.importorskip("xxhash")
    assert xxh3_128(b"ab", b"c") == xxhash.xxh3_128_digest(b"abc")
    assert xxh3_128().hex() == "99aa06d3014798d86001c324468d497f"  # of the empty string, as published


# ---- names


def test_identities_differ_by_model_and_layers_and_not_by_the_size_of_the_arena():
    larger = KVCacheSpec.from_layers(SPEC.layers, 1 << 20, 16)
    other = KVCacheSpec.from_layers(SPEC.layers[:1], 64, 4)
    assert identity_of(larger, b"model") == IDENTITY
    assert (
        len({IDENTITY, identity_of(SPEC, b"model2"), identity_of(other, b"model"), identity_of(SPEC, b"")})
        == 4
    )


def test_a_key_names_all_tokens_up_to_the_chunks_end():
    ids = np.arange(40, dtype=np.int32)
    keys = prefix_keys(IDENTITY, None, ids, 16)
    assert len(keys) == 3
    assert prefix_keys(IDENTITY, None, ids[:32], 16) == keys[:2]
    changed = ids.copy()
    changed[17] = 0
    others = prefix_keys(IDENTITY, None, changed, 16)
    assert others[0] == keys[0]
    assert set(others[1:]).isdisjoint(keys)


def test_keys_differ_by_salt_and_its_type():
    ids = np.arange(4, dtype=np.int32)
    salts = [None, "", b"", "a", b"a", "sa"]
    assert len({prefix_keys(IDENTITY, salt, ids, 4)[0] for salt in salts}) == len(salts)


def test_a_salt_that_is_neither_str_nor_bytes_meets_no_store():
    with pytest.raises(TypeError, match="tuple"):
        salt_bytes(("tenant", 1))
    assert salt_bytes("\ud800") == b"s\xed\xa0\x80"


def test_keys_are_64_hex_digits_and_the_same_in_every_process():
    (key,) = prefix_keys(bytes(32), "tenant", np.array([1, 2, 3]), 16)
    link = hashlib.blake2b(bytes(32) + (7).to_bytes(8, "little") + b"stenant", digest_size=32).digest()
    text = link + (3).to_bytes(8, "little") + np.array([1, 2, 3], "<i4").tobytes()
    assert key == hashlib.blake2b(text, digest_size=32, person=b"kvcache prefix").hexdigest()


def test_private_keys_differ_by_cache_suspension_and_place():
    keys = {
        private_key(secret * 16, number, first)
        for secret in (b"a", b"b")
        for number in (1, 2)
        for first in (0, 16)
    }
    assert len(keys) == 8 and {len(key) for key in keys} == {64}


def test_a_chunk_is_about_two_mebibytes_in_whole_blocks():
    assert chunk_tokens_of(KVCacheSpec(32, 8, 128, 4096, 16, "bfloat16")) == 16  # one block has 2 MiB
    assert chunk_tokens_of(KVCacheSpec(2, 2, 64, 4096, 16, "float32")) == 1024
    assert chunk_tokens_of(KVCacheSpec(80, 64, 128, 4096, 16, "float32")) == 16  # a block has 80 MiB
