"""Files of cached prefixes: what was written is read back to the last bit, all else is refused in little memory."""

import json
import os
import stat
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import cache_file
from kvcache.cache_file import CacheFile, PlannedChunk, write_cache_file
from kvcache.chunks import chunk_tokens_of
from kvcache.errors import CorruptCacheFile, IncompatibleCacheFile, KVCacheError
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec

PLAIN = LayerSpec([PlaneSpec("k", 2, 3, "bfloat16"), PlaneSpec("v", 1, 5, "float16")])
PACKED = LayerSpec(
    [
        PlaneSpec("k", 1, 4, "uint32"),
        PlaneSpec('k "scales"\n', 1, 3, "float32"),
        PlaneSpec("é", 1, 7, "uint8"),
    ]
)
SPEC = KVCacheSpec.from_layers([PLAIN, PLAIN, PACKED], 1024, 4)
MODEL = b"weights 1"


def planes_of(number, size):
    return np.random.default_rng(number).bytes(size)


def ids_of(first, count):
    return np.arange(first, first + count, dtype=np.int32)


PLAN = [
    PlannedChunk(ids_of(0, 8)),
    PlannedChunk(ids_of(100, 4), parent=0),
    PlannedChunk(ids_of(200, 12), parent=0),
    PlannedChunk(ids_of(0, 4), salt="tenant é"),
    PlannedChunk(ids_of(2**31 - 4, 4), salt="tenant é", parent=3),
    PlannedChunk(ids_of(7, 4), salt=b"\0\xff"),
    PlannedChunk(ids_of(7, 4), salt=""),
]


def fill(number, buffer):
    buffer[:] = planes_of(number, buffer.nbytes)
    return True


def write(path, plan=PLAN, fill=fill, spec=SPEC, fingerprint=MODEL):
    return write_cache_file(path, spec, fingerprint, plan, fill)


def read(path, spec=SPEC, fingerprint=MODEL):
    """(ids, salt, parent, planes) of every chunk."""
    with CacheFile(path, spec, fingerprint) as file:
        buffer = bytearray(file.buffer_bytes)
        found = []
        for number, chunk in enumerate(file.chunks):
            ids, planes = file.read(number, buffer)
            found.append((ids.tolist(), chunk.salt, chunk.parent, bytes(planes)))
        return found


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefixes.safetensors"


@pytest.fixture
def good(path):
    """The bytes of a file that is in order."""
    write(path)
    return path.read_bytes()


def split(data):
    """Header text and tensor data."""
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length], data[8 + length :]


def joined(header, tensors):
    return len(header).to_bytes(8, "little") + header + tensors


def refusal(path, spec=SPEC, fingerprint=MODEL):
    """What reading the file to its end raises, in little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(KVCacheError) as caught:
            read(path, spec, fingerprint)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert caught.value.path == str(path)
    return caught.value


# ---- there and back


def test_what_was_written_is_read_back_to_the_last_bit(path):
    assert write(path) == sum(len(chunk.ids) for chunk in PLAN)
    expected = [
        (
            chunk.ids.tolist(),
            chunk.salt,
            chunk.parent,
            planes_of(number, len(chunk.ids) * SPEC.bytes_per_token),
        )
        for number, chunk in enumerate(PLAN)
    ]
    assert read(path) == expected


def test_chunks_know_their_place_in_the_prefix(good, path):
    with CacheFile(path, SPEC, MODEL) as file:
        assert [chunk.first_token for chunk in file.chunks] == [0, 8, 8, 0, 4, 0, 0]


def test_a_file_of_nothing_is_a_file(path):
    assert write(path, []) == 0
    assert read(path) == []


def test_the_same_chunks_make_the_same_file(good, tmp_path):
    write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == good


def test_other_programs_read_it_as_safetensors(path):
    safetensors = pytest.importorskip("safetensors")
    plan = [PlannedChunk(ids_of(0, 8)), PlannedChunk(ids_of(100, 4), parent=0)]
    write(path, plan)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "kvcache"
        np.testing.assert_array_equal(file.get_tensor("1.ids"), plan[1].ids)
        raw = planes_of(1, 4 * SPEC.bytes_per_token)
        begin = 2 * 3 * 4 * 2  # K of the first layer comes before its V
        v = np.frombuffer(raw, np.float16, 1 * 4 * 5, begin).reshape(1, 4, 5)
        np.testing.assert_array_equal(file.get_tensor("1.0.v").view(np.uint16), v.view(np.uint16))
        assert file.get_slice("0.0.k").get_dtype() == "BF16"
        assert file.get_slice('0.2.k "scales"\n').get_shape() == [1, 8, 3]


def test_mlx_reads_its_bfloat16(path):
    mx = pytest.importorskip("mlx.core")
    write(path, PLAN[:1])
    k = mx.load(str(path))["0.0.k"]
    assert k.dtype == mx.bfloat16
    raw = np.frombuffer(planes_of(0, 8 * SPEC.bytes_per_token), np.uint16, 2 * 8 * 3).reshape(2, 8, 3)
    np.testing.assert_array_equal(np.asarray(k.view(mx.uint16)), raw)


def test_the_tensors_begin_at_a_page(good):
    header, _ = split(good)
    assert (8 + len(header)) % 4096 == 0
    json.loads(header)


# ---- writing


def test_a_chunk_that_is_gone_is_left_out_with_what_continues_it(path):
    gone = {0, 5}
    assert write(path, fill=lambda number, buffer: number not in gone and fill(number, buffer)) == 12
    found = read(path)
    assert [(ids[0], parent) for ids, _, parent, _ in found] == [(0, -1), (2**31 - 4, 0), (7, -1)]
    assert found[1][3] == planes_of(4, 4 * SPEC.bytes_per_token)


def names(path):
    return sorted(each.name for each in path.parent.iterdir())


def test_nothing_but_the_file_is_left_in_the_folder(good, path):
    assert names(path) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def failing(number, buffer):
    raise RuntimeError("the cache was closed")


def test_a_write_that_fails_halfway_leaves_the_old_file(good, path):
    with pytest.raises(RuntimeError, match="closed"):
        write(path, fill=failing)
    assert path.read_bytes() == good
    assert names(path) == [path.name]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(good, path, monkeypatch, call):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_file.os, call, full)
    with pytest.raises(OSError, match="No space"):
        write(path)
    monkeypatch.undo()
    assert path.read_bytes() == good
    assert names(path) == [path.name]


def test_the_file_is_synced_then_renamed_then_the_folder_is_synced(path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append("renamed")
        replace(source, target)

    monkeypatch.setattr(cache_file.os, "fsync", noted_fsync)
    monkeypatch.setattr(cache_file.os, "replace", noted_replace)
    write(path)
    assert calls == ["file", "renamed", "folder"]


def test_a_folder_in_the_files_place_is_an_error_of_the_system(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write(tmp_path / "folder")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "plan, complaint",
    [
        ([PlannedChunk(ids_of(0, 6))], "6 tokens, expected whole blocks of 4"),
        ([PlannedChunk(ids_of(0, 0))], "0 tokens"),
        ([PlannedChunk(ids_of(0, chunk_tokens_of(SPEC) + 4))], "at most"),
        ([PlannedChunk(ids_of(0, 4), parent=0)], "continues chunk 0, expected an earlier one"),
        ([PlannedChunk(ids_of(0, 4)), PlannedChunk(ids_of(0, 4), "a", 0)], "another salt"),
    ],
)
def test_a_plan_that_makes_no_file_is_refused_before_one_is_made(path, plan, complaint):
    with pytest.raises(ValueError, match=complaint):
        write(path, plan)
    assert not path.exists()


def test_a_salt_that_meets_a_file_is_text_or_bytes(path):
    with pytest.raises(TypeError, match="tuple"):
        write(path, [PlannedChunk(ids_of(0, 4), salt=("a", 1))])
    assert names(path) == []


def test_more_chunks_than_a_header_tells_of_are_refused(path, monkeypatch):
    monkeypatch.setattr(cache_file, "MAX_HEADER", 4096)
    with pytest.raises(ValueError, match="7 chunks need a header of 8192 bytes, at most 4096"):
        write(path)
    assert names(path) == []


@pytest.mark.parametrize(
    "fingerprint, kind", [("text", TypeError), (b"", ValueError), (bytes(1025), ValueError)]
)
def test_a_fingerprint_is_bytes_of_a_bounded_length(path, fingerprint, kind):
    with pytest.raises(kind, match="fingerprint"):
        write(path, fingerprint=fingerprint)


# ---- made for others


def test_another_model_is_incompatible(good, path):
    error = refusal(path, fingerprint=b"weights 2")
    assert isinstance(error, IncompatibleCacheFile)
    assert (error.field, error.found, error.wanted) == ("fingerprint", MODEL, b"weights 2")


@pytest.mark.parametrize(
    "layers",
    [
        [PLAIN, PLAIN],
        [PLAIN, PACKED, PLAIN],
        [LayerSpec([PlaneSpec("k", 3, 2, "bfloat16"), PLAIN.planes[1]]), PLAIN, PACKED],
        [LayerSpec([PlaneSpec("k", 2, 3, "float16"), PLAIN.planes[1]]), PLAIN, PACKED],
        [LayerSpec([PlaneSpec("K", 2, 3, "bfloat16"), PLAIN.planes[1]]), PLAIN, PACKED],
    ],
)
def test_other_planes_are_incompatible(good, path, layers):
    error = refusal(path, KVCacheSpec.from_layers(layers, 1024, 4))
    assert isinstance(error, IncompatibleCacheFile) and error.field == "layers"


def test_blocks_of_another_size_are_incompatible(good, path):
    error = refusal(path, KVCacheSpec.from_layers(SPEC.layers, 1024, 8))
    assert (error.field, error.found, error.wanted) == ("block_size", 4, 8)


def test_an_arena_of_another_size_reads_it_just_as_well(good, path):
    assert read(path, KVCacheSpec.from_layers(SPEC.layers, 64, 4)) == read(path)


def test_another_version_is_incompatible(good, path):
    path.write_bytes(good.replace(b'"version":"1"', b'"version":"2"'))
    error = refusal(path)
    assert (error.field, error.found, error.wanted) == ("version", 2, 1)


# ---- cut, altered, foreign


def test_a_file_that_is_not_there_is_an_error_of_the_system(path):
    with pytest.raises(FileNotFoundError):
        read(path)


def test_a_folder_is_no_cache_file(tmp_path):
    error = refusal(tmp_path)
    assert isinstance(error, CorruptCacheFile) and error.reason == "it is a directory"


def test_a_pipe_is_no_cache_file_and_nobody_waits_for_it(path):
    os.mkfifo(path)
    assert refusal(path).reason == "it is not a regular file"


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_corrupt(good, path, size):
    path.write_bytes(good[:size])
    assert refusal(path).reason == f"it has {size} bytes, too few for a header"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_corrupt(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "file"
    write(path)
    size = data.draw(st.integers(0, path.stat().st_size - 1))
    os.truncate(path, size)
    assert isinstance(refusal(path), CorruptCacheFile)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_with_one_bit_changed_anywhere_that_means_anything_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "file"
    write(path)
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    refusal(path)


def test_a_byte_too_many_is_corrupt(good, path):
    path.write_bytes(good + b"\0")
    assert refusal(path).reason == f"it has {len(good) + 1} bytes, its header tells of {len(good)}"


def test_a_file_of_another_format_is_corrupt(path):
    for content in (b"PK\3\4" + bytes(100), b"\x93NUMPY" + bytes(100), b"GGUF" + bytes(100), b"{}" * 50):
        path.write_bytes(content)
        assert isinstance(refusal(path), CorruptCacheFile)


def test_safetensors_that_others_wrote_are_corrupt(path):
    numpy_files = pytest.importorskip("safetensors.numpy")
    numpy_files.save_file({"0.ids": np.zeros(4, np.int32)}, path, {"format": "pt"})
    assert refusal(path).reason == "it is not a file that this package has written"


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(good, path):
    with CacheFile(path, SPEC, MODEL) as file:
        os.truncate(path, len(good) - 1)
        with pytest.raises(CorruptCacheFile, match="ends 1 bytes too early"):
            file.verify(bytearray(file.buffer_bytes))


def test_a_file_that_is_altered_while_it_is_read_is_found_out(good, path):
    with CacheFile(path, SPEC, MODEL) as file:
        buffer = bytearray(file.buffer_bytes)
        file.verify(buffer)
        with path.open("r+b") as other:
            other.seek(-1, os.SEEK_END)
            other.write(bytes([good[-1] ^ 1]))
        with pytest.raises(CorruptCacheFile, match="chunk 6 does not have its checksum"):
            file.verify(buffer)


# ---- hostile headers


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 2**63 - 1, 2**40, (64 << 20) + 1])
def test_a_header_that_claims_gigabytes_is_refused_unread(good, path, claim):
    path.write_bytes(claim.to_bytes(8, "little") + good[8:])
    assert f"its header claims {claim} bytes" in refusal(path).reason


def test_a_sparse_file_of_a_terabyte_is_refused_by_what_its_header_says(good, path):
    os.truncate(path, 1 << 40)
    assert f"its header tells of {len(good)}" in refusal(path).reason


def changed_tensors(header, change):
    """The header with its JSON changed, written as the package writes."""
    parsed = json.loads(header)
    change(parsed)
    return json.dumps(parsed, separators=(",", ":"), ensure_ascii=True).encode()


HOSTILE = {
    "overlap": lambda h: h["0.0.v"].update(data_offsets=h["0.0.k"]["data_offsets"]),
    "hole": lambda h: h["0.0.v"]["data_offsets"].__setitem__(0, h["0.0.v"]["data_offsets"][0] + 1),
    "backwards": lambda h: h["0.0.v"]["data_offsets"].reverse(),
    "overflow": lambda h: h["0.0.v"].update(shape=[2**63, 2**63, 2**63]),
    "offsets": lambda h: h["0.0.v"].update(data_offsets=[2**64 - 8, 2**64 + 8]),
    "negative": lambda h: h["0.0.v"].update(shape=[-1, -8, 5]),
    "gigabytes": lambda h: h["0.0.v"].update(shape=[1, 1 << 30, 5]),
    "dtype": lambda h: h["0.0.v"].update(dtype="BF16"),
    "missing": lambda h: h.pop("0.0.v"),
    "more": lambda h: h.update({"9.0.v": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
    "renamed": lambda h: h.update({"0.0.w": h.pop("0.0.v")}),
    "deep": lambda h: h["0.0.v"].update(shape=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_tensors_other_than_the_expected_ones_are_refused(good, path, change):
    header, tensors = split(good)
    path.write_bytes(joined(changed_tensors(header, change), tensors))
    assert isinstance(refusal(path), CorruptCacheFile)


def test_a_key_that_is_told_twice_is_refused(good, path):
    header, tensors = split(good)
    twice = header.rstrip().removesuffix(b"}") + b',"0.0.k":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    path.write_bytes(joined(twice, tensors))
    assert isinstance(refusal(path), CorruptCacheFile)


METADATA = {
    "tokens": (b'"chunk.0":"-1 8 ', b'"chunk.0":"-1 4000000000 '),
    "no tokens": (b'"chunk.0":"-1 8 ', b'"chunk.0":"-1 0 '),
    "half a block": (b'"chunk.0":"-1 8 ', b'"chunk.0":"-1 7 '),
    "itself": (b'"chunk.1":"0 ', b'"chunk.1":"1 '),
    "a later one": (b'"chunk.1":"0 ', b'"chunk.1":"6 '),
    "its salt": (b'"chunk.1":"0 4 - ', b'"chunk.1":"0 4 b00 '),
    "no text": (b" - ", b" sff "),
    "chunks": (b'"chunks":"7"', b'"chunks":"9999999"'),
    "fewer": (b'"chunks":"7"', b'"chunks":"6"'),
    "numbers": (b'"chunk.2"', b'"chunk.3"'),
    "checksum": (b'"chunk.2":"0 12 - ', b'"chunk.2":"0 12 - 00'),
    "layers": (b'"layers":"', b'"layers":"\\ud800\\x'),
    "fingerprint": (b'"fingerprint":"', b'"fingerprint":"' + b"00" * 2000),
    "escape": (b'"layers":"', b'"layers":"\\'),
}


@pytest.mark.parametrize("old, new", METADATA.values(), ids=METADATA)
def test_metadata_that_cannot_be_are_refused(good, path, old, new):
    header, tensors = split(good)
    assert old in header
    path.write_bytes(joined(header.replace(old, new, 1), tensors))
    assert isinstance(refusal(path), CorruptCacheFile)


@pytest.mark.parametrize(
    "text", [b"[" * (1 << 20), b'{"a":' * (1 << 18), b'{"__metadata__":{' + b'"a":"",' * (1 << 17)]
)
def test_a_header_of_brackets_costs_nothing_to_refuse(path, text):
    path.write_bytes(joined(text, b""))
    assert isinstance(refusal(path), CorruptCacheFile)


def test_a_negative_id_with_a_good_checksum_is_refused(path):
    write(path, [PlannedChunk(np.array([1, 2, -3, 4], np.int32))])
    assert refusal(path).reason == "chunk 0 has a negative token id"


def test_reading_takes_no_more_memory_than_a_chunk(tmp_path):
    spec = KVCacheSpec(2, 2, 16, 1 << 16, 16)
    path = tmp_path / "large"
    tokens = chunk_tokens_of(spec) // 4 // 16 * 16
    plan = [PlannedChunk(ids_of(number, tokens)) for number in range(40)]
    write(path, plan, spec=spec)
    assert path.stat().st_size > 16 << 20
    tracemalloc.start()
    with CacheFile(path, spec, MODEL) as file:
        file.verify(bytearray(file.buffer_bytes))
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
