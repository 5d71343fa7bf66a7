"""Files of cached prefixes: safetensors, verified to the last byte before anything is believed.

A file holds chunks, each a run of whole blocks of tokens that continues another chunk (its parent) or begins a prefix:
first its token ids, then for each layer, each plane in order, ``(heads, tokens, width)``. The header is exactly the one
that its metadata asks for: it is not parsed but compared with that, so that nothing in it can be larger, later or of
another type than expected. Nothing here knows a cache: what is read lies in the caller's buffer.
"""

import contextlib
import itertools
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcache.chunks import FORMAT_VERSION, chunk_tokens_of, layers_text, salt_bytes, xxh3_128
from kvcache.errors import CorruptCacheFile, IncompatibleCacheFile

MAX_HEADER = 64 << 20  # bytes
MAX_FINGERPRINT = 1024  # bytes
PAGE = 4096  # bytes: where the tensors begin

_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint32": "U32", "uint8": "U8"}

_FORMAT = re.compile(rb'\{"__metadata__":\{"format":"kvcache","version":"([0-9]{1,9})"')
_SHAPE = re.compile(
    rb',"fingerprint":"((?:[0-9a-f]{2}){1,1024})","block_size":"([0-9]{1,10})"'
    rb',"layers":"((?:[^"\\]|\\.)*)","chunks":"([0-9]{1,7})"'
)
_CHUNK = re.compile(
    rb',"chunk\.([0-9]{1,7})":"(-1|[0-9]{1,7}) ([0-9]{1,10}) (-|[sb](?:[0-9a-f]{2})*) ([0-9a-f]{32})"'
)

_numbers = itertools.count()


@dataclass(frozen=True)
class FileChunk:
    """A chunk as a file tells of it.

    Attributes
    ----------
    parent : int
        Number of the chunk that it continues, -1 for none.
    first_token, num_tokens : int
        Its place in the prefix.
    salt : str, bytes or None
    checksum : bytes
        xxh3_128 over ids and planes.
    offset, size : int
        Where its ids begin in the file, and bytes of ids and planes together.
    """

    parent: int
    first_token: int
    num_tokens: int
    salt: str | bytes | None
    checksum: bytes
    offset: int
    size: int

    @property
    def ids_bytes(self):
        """Bytes of the token ids."""
        return 4 * self.num_tokens


@dataclass(frozen=True)
class PlannedChunk:
    """A chunk to be written.

    Attributes
    ----------
    ids : int32 array
        Whole blocks of token ids, at most a chunk of them.
    salt : str, bytes or None
        The parent's, where there is one.
    parent : int
        Number of an earlier chunk that it continues, -1 for none.
    """

    ids: np.ndarray
    salt: str | bytes | None = None
    parent: int = -1


# ---- the header


def _salt_text(salt):
    text = salt_bytes(salt)
    return text[:1].decode() + text[1:].hex() if text else "-"


def _salt_of(text):
    if text == b"-":
        return None
    raw = bytes.fromhex(text[1:].decode())
    return raw if text[:1] == b"b" else raw.decode("utf-8", "surrogatepass")


def _metadata_text(spec, fingerprint, count):
    layers = json.dumps(layers_text(spec))[1:-1]
    return (
        f'{{"__metadata__":{{"format":"kvcache","version":"{FORMAT_VERSION}","fingerprint":"{fingerprint.hex()}"'
        f',"block_size":"{spec.block_size}","layers":"{layers}","chunks":"{count}"'
    )


def _chunk_text(number, parent, num_tokens, salt, checksum):
    return f',"chunk.{number}":"{parent} {num_tokens} {_salt_text(salt)} {checksum.hex()}"'


class _Tensors:
    """The header's text about tensors, for chunks of one spec."""

    def __init__(self, spec):
        self.bytes_per_token = 4 + spec.bytes_per_token
        self._planes = [
            (
                json.dumps(f".{layer}.{plane.name}")[1:],
                f'":{{"dtype":"{_TYPES[plane.dtype]}","shape":[{plane.heads},'[1:],
                f",{plane.width}]",
                plane.bytes_per_token,
            )
            for layer, planes in enumerate(spec.layers)
            for plane in planes.planes
        ]

    def text(self, number, num_tokens, start):
        """Of one chunk, whose data begin `start` bytes after the header."""
        end = start + 4 * num_tokens
        parts = [f',"{number}.ids":{{"dtype":"I32","shape":[{num_tokens}],"data_offsets":[{start},{end}]}}']
        for name, before, after, size in self._planes:
            start, end = end, end + size * num_tokens
            parts.append(f',"{number}{name}{before}{num_tokens}{after},"data_offsets":[{start},{end}]}}')
        return "".join(parts)


def _header(spec, fingerprint, chunks):
    """The text that belongs to these chunks; their offsets count from the end of the header."""
    tensors = _Tensors(spec)
    parts = [_metadata_text(spec, fingerprint, len(chunks))]
    parts += [
        _chunk_text(number, chunk.parent, chunk.num_tokens, chunk.salt, chunk.checksum)
        for number, chunk in enumerate(chunks)
    ]
    parts.append("}")
    parts += [tensors.text(number, chunk.num_tokens, chunk.offset) for number, chunk in enumerate(chunks)]
    parts.append("}")
    return "".join(parts).encode()


# ---- writing


def write_cache_file(path, spec, fingerprint, plan, fill):
    """Write a file of chunks: whole and synced beneath a temporary name, then renamed.

    Parameters
    ----------
    path : path
        What is there is replaced, once the new file is whole.
    spec : KVCacheSpec
    fingerprint : bytes
        Names the model.
    plan : sequence of PlannedChunk
    fill : callable
        Called with the number of a chunk and a buffer for its planes; fills it and returns whether it could. A chunk
        that is no longer there is left out, and those that continue it.

    Returns
    -------
    int
        Tokens written.

    Raises
    ------
    OSError
        Nothing is left behind then, and what was there is as it was.
    TypeError, ValueError
        A salt that is neither str nor bytes, a chunk that is not whole blocks, or more chunks than a header tells of.
    """
    check_fingerprint(fingerprint)
    planned = _checked_plan(spec, plan)
    room = len(_header(spec, fingerprint, planned)) + 8
    room += -room % PAGE  # checksums are as long as their zeros, and leaving chunks out makes it shorter
    if room > MAX_HEADER:
        raise ValueError(
            f"{len(plan)} chunks need a header of {room} bytes, at most {MAX_HEADER} are written"
        )
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            written = _write_chunks(descriptor, room, planned, plan, fill)
            text = _header(spec, fingerprint, written).ljust(room - 8)
            _write_at(descriptor, 0, len(text).to_bytes(8, "little") + text)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)
    return sum(chunk.num_tokens for chunk in written)


def check_fingerprint(fingerprint):
    """Raise `TypeError` or `ValueError` for what does not name a model."""
    if not isinstance(fingerprint, bytes):
        raise TypeError(f"fingerprint is a {type(fingerprint).__name__}, expected bytes")
    if not 0 < len(fingerprint) <= MAX_FINGERPRINT:
        raise ValueError(f"fingerprint has {len(fingerprint)} bytes, expected 1 to {MAX_FINGERPRINT}")


def _checked_plan(spec, plan):
    """The plan as chunks of a file in which all are written, their checksums still zeros."""
    chunks, most = [], chunk_tokens_of(spec)
    offset = 0
    for number, planned in enumerate(plan):
        tokens = len(planned.ids)
        if not 0 < tokens <= most or tokens % spec.block_size:
            raise ValueError(
                f"chunk {number} has {tokens} tokens, expected whole blocks of {spec.block_size}, at most {most} tokens"
            )
        if not -1 <= planned.parent < number:
            raise ValueError(
                f"chunk {number} continues chunk {planned.parent}, expected an earlier one or -1"
            )
        first = 0
        if planned.parent >= 0:
            before = chunks[planned.parent]
            first = before.first_token + before.num_tokens
            if salt_bytes(before.salt) != salt_bytes(planned.salt):
                raise ValueError(
                    f"chunk {number} has another salt than chunk {planned.parent}, which it continues"
                )
        size = tokens * (4 + spec.bytes_per_token)
        salt_bytes(planned.salt)
        chunks.append(FileChunk(planned.parent, first, tokens, planned.salt, bytes(16), offset, size))
        offset += size
    return chunks


def _write_chunks(descriptor, room, planned, plan, fill):
    """Chunks that could be written, as the header tells of them."""
    written, numbers = [], {-1: -1}  # number in the plan -> number in the file
    buffer = memoryview(bytearray(max((chunk.size for chunk in planned), default=0)))
    offset = 0
    for number, chunk in enumerate(planned):
        data, ids_bytes = buffer[: chunk.size], 4 * chunk.num_tokens
        if chunk.parent not in numbers or not fill(number, data[ids_bytes:]):
            continue
        data[:ids_bytes] = np.ascontiguousarray(plan[number].ids, "<i4").tobytes()
        _write_at(descriptor, room + offset, data)
        numbers[number] = len(written)
        facts = chunk.first_token, chunk.num_tokens, chunk.salt, xxh3_128(data), offset, chunk.size
        written.append(FileChunk(numbers[chunk.parent], *facts))
        offset += chunk.size
    return written


def _write_at(descriptor, offset, data):
    data = memoryview(data)
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading


class CacheFile:
    """A file of chunks, open for reading; its header has been found to be what it must be.

    Memory is bounded by the header, at most 64 MiB, and what the caller reads into.

    Parameters
    ----------
    path : path
    spec : KVCacheSpec
        What the planes must be: those of a file made for others are refused.
    fingerprint : bytes
        The model that the file must be made for.

    Attributes
    ----------
    chunks : list of FileChunk

    Raises
    ------
    CorruptCacheFile
        It is cut short, altered, or of another format.
    IncompatibleCacheFile
        It was made for another model, other planes or blocks of another size, or by another version.
    OSError
        It cannot be read.
    """

    def __init__(self, path, spec, fingerprint):
        check_fingerprint(fingerprint)
        self.path = os.fspath(path)
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.chunks = self._scan(spec, fingerprint)
        except BaseException:
            self.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Close the file. Again: nothing happens."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @property
    def buffer_bytes(self):
        """Bytes of the largest chunk."""
        return max((chunk.size for chunk in self.chunks), default=0)

    def read(self, number, buffer):
        """Read chunk `number` into the beginning of `buffer` and verify it.

        Returns
        -------
        ids : int32 array
        planes : memoryview
            Both lie in `buffer`, at least `buffer_bytes` long.

        Raises
        ------
        CorruptCacheFile
            It is not what was written.
        """
        chunk = self.chunks[number]
        data = memoryview(buffer).cast("B")[: chunk.size]
        self._read_into(data, chunk.offset)
        if xxh3_128(data) != chunk.checksum:
            raise self._corrupt(f"chunk {number} does not have its checksum")
        ids = np.frombuffer(data[: chunk.ids_bytes], "<i4")
        if ids.min() < 0:
            raise self._corrupt(f"chunk {number} has a negative token id")
        return ids, data[chunk.ids_bytes :]

    def verify(self, buffer):
        """Read every chunk into `buffer`, one after another; `CorruptCacheFile` for the first that is wrong."""
        for number in range(len(self.chunks)):
            self.read(number, buffer)

    def _corrupt(self, reason):
        return CorruptCacheFile(path=self.path, reason=reason)

    def _refuse_unless(self, field, found, wanted):
        if found != wanted:
            raise IncompatibleCacheFile(path=self.path, field=field, found=found, wanted=wanted)

    def _read_into(self, view, offset):
        while view:
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise self._corrupt(f"it ends {len(view)} bytes too early, at byte {offset}")
            view, offset = view[count:], offset + count

    def _scan(self, spec, fingerprint):
        """The chunks that the header tells of."""
        status = os.fstat(self._descriptor)
        if stat.S_ISDIR(status.st_mode):
            raise self._corrupt("it is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise self._corrupt("it is not a regular file")
        if status.st_size < 8:
            raise self._corrupt(f"it has {status.st_size} bytes, too few for a header")
        length = bytearray(8)
        self._read_into(memoryview(length), 0)
        length = int.from_bytes(length, "little")
        if length > min(MAX_HEADER, status.st_size - 8):
            raise self._corrupt(
                f"its header claims {length} bytes, of a file of {status.st_size} and at most {MAX_HEADER}"
            )
        text = bytearray(length)
        self._read_into(memoryview(text), 8)
        chunks, place, size = self._scan_metadata(text, spec, fingerprint, 8 + length)
        place = self._scan_tensors(text, place, spec, chunks, 8 + length)
        if text[place : place + 1] != b"}" or text[place + 1 :].strip(b" "):
            raise self._corrupt(f"its header does not end at byte {8 + place}, as it should")
        if 8 + length + size != status.st_size:
            raise self._corrupt(f"it has {status.st_size} bytes, its header tells of {8 + length + size}")
        return chunks

    def _scan_metadata(self, text, spec, fingerprint, offset):
        """Chunks, where their metadata end, and bytes of all of them."""
        start = _FORMAT.match(text)
        if not start:
            raise self._corrupt("it is not a file that this package has written")
        self._refuse_unless("version", int(start[1]), FORMAT_VERSION)
        shape = _SHAPE.match(text, start.end())
        if not shape:
            raise self._corrupt("its metadata do not say what it is made for")
        self._refuse_unless("fingerprint", bytes.fromhex(shape[1].decode()), fingerprint)
        self._refuse_unless("layers", self._unescaped(shape[3]), layers_text(spec))
        self._refuse_unless("block_size", int(shape[2]), spec.block_size)
        chunks, place, begin = [], shape.end(), offset
        most = chunk_tokens_of(spec)
        for number in range(int(shape[4])):
            told = _CHUNK.match(text, place)
            if not told or int(told[1]) != number:
                raise self._corrupt(f"its metadata do not tell of chunk {number} at byte {8 + place}")
            chunks.append(self._chunk(number, told, chunks, spec, most, offset))
            place, offset = told.end(), offset + chunks[-1].size
        if text[place : place + 1] != b"}":
            raise self._corrupt(f"its metadata do not end at byte {8 + place}, as they should")
        return chunks, place + 1, offset - begin

    def _unescaped(self, text):
        try:
            return json.loads(b'"' + text + b'"')
        except ValueError:
            raise self._corrupt("its layers are told in no text") from None

    def _chunk(self, number, told, chunks, spec, most, offset):
        parent, tokens = int(told[2]), int(told[3])
        if not 0 < tokens <= most or tokens % spec.block_size:
            raise self._corrupt(
                f"chunk {number} claims {tokens} tokens, expected whole blocks of {spec.block_size}, at most {most}"
            )
        if parent >= number:
            raise self._corrupt(f"chunk {number} continues chunk {parent}, which does not come before it")
        try:
            salt = _salt_of(told[4])
        except ValueError:
            raise self._corrupt(f"the salt of chunk {number} is no text") from None
        first = 0
        if parent >= 0:
            before = chunks[parent]
            first = before.first_token + before.num_tokens
            if salt_bytes(before.salt) != salt_bytes(salt):
                raise self._corrupt(
                    f"chunk {number} has another salt than chunk {parent}, which it continues"
                )
        size = tokens * (4 + spec.bytes_per_token)
        return FileChunk(parent, first, tokens, salt, bytes.fromhex(told[5].decode()), offset, size)

    def _scan_tensors(self, text, place, spec, chunks, data):
        """Where the tensors' part ends, having found every byte of it as it should be."""
        tensors = _Tensors(spec)
        for number, chunk in enumerate(chunks):
            wanted = tensors.text(number, chunk.num_tokens, chunk.offset - data).encode()
            if not text.startswith(wanted, place):
                raise self._corrupt(f"the tensors of chunk {number} are not told as they should be")
            place += len(wanted)
        return place
