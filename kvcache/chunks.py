r"""Chunks: K/V of some consecutive tokens as one string of bytes that says what it is and can be verified.

An envelope of one or more pages of 4 KiB, then the payload: for each layer, each plane in order, ``(heads, tokens,
width)`` in C order. The envelope has, little-endian::

    0    8   magic, b"KVCHUNK\0"
    8    4   format version
    12   4   number of token ids: as many as tokens, or 0 where tokens are only counted
    16   8   bytes of the envelope
    24   8   bytes of the payload
    32   8   first token: its position in the sequence
    40   8   tokens
    48   32  identity of the model, see `identity_of`
    80   32  key
    112  16  xxh3_128 of the payload
    128  16  xxh3_128 of the envelope, with zeros here
    144      token ids, int32; zeros up to the end of the envelope

More than 988 ids take further pages.
"""

import hashlib
import json
import struct
from dataclasses import dataclass

import numpy as np

FORMAT_VERSION = 1
PAGE = 4096  # bytes: envelopes are made of whole pages, so that payloads begin at one
CHUNK_BYTES = 1 << 21  # about what a chunk's payload has
MAGIC = b"KVCHUNK\0"

_FIELDS = struct.Struct("<8sIIQQqq32s32s16s16s")
_OWN_CHECKSUM = slice(128, 144)


def xxh3_128(*parts):
    """The 16 bytes of XXH3-128 over the bytes of `parts`, one after another. Releases the GIL for large ones."""
    import xxhash

    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def identity_of(spec, fingerprint):
    """32 bytes that two caches share if K/V of one mean the same in the other.

    Parameters
    ----------
    spec : KVCacheSpec
        Of it the layers count: planes, heads, widths and dtypes. Arenas may differ in size.
    fingerprint : bytes
        Names the model: weights, adapter, quantisation, RoPE.
    """
    digest = hashlib.blake2b(digest_size=32, person=b"kvcache identity")
    for part in (str(FORMAT_VERSION).encode(), layers_text(spec).encode(), bytes(fingerprint)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def layers_text(spec):
    """The planes of a spec's layers as JSON; equal layers that follow each other are told once, with a count."""
    runs = []
    for layer in spec.layers:
        planes = [[plane.name, plane.heads, plane.width, plane.dtype] for plane in layer.planes]
        if runs and runs[-1][1] == planes:
            runs[-1][0] += 1
        else:
            runs.append([1, planes])
    return json.dumps(runs, separators=(",", ":"))


def chunk_tokens_of(spec):
    """Tokens of a whole chunk: as many blocks as make about 2 MiB, at least one."""
    return max(1, round(CHUNK_BYTES / spec.block_bytes)) * spec.block_size


def envelope_bytes(num_ids):
    """Bytes of the envelope of a chunk that tells so many token ids: whole pages."""
    return -(-(_FIELDS.size + 4 * num_ids) // PAGE) * PAGE


def salt_bytes(salt):
    """A salt as bytes, other ones for a str than for bytes; `TypeError` for what cannot meet a store.

    `None`, no salt, is the empty string of bytes.
    """
    if salt is None:
        return b""
    if isinstance(salt, str):
        return b"s" + salt.encode("utf-8", "surrogatepass")
    if isinstance(salt, bytes):
        return b"b" + salt
    raise TypeError(f"a salt that meets a store is str or bytes, this one is a {type(salt).__name__}")


def prefix_keys(identity, salt, ids, chunk_tokens):
    """Keys of the chunks of a prefix: each names everything up to its end.

    Parameters
    ----------
    identity : bytes
        From `identity_of`.
    salt : str, bytes or None
    ids : int32 array
        Token ids from the first on.
    chunk_tokens : int

    Returns
    -------
    list of str
        One per chunk; the last may be shorter.
    """
    salt = salt_bytes(salt)
    ids = np.ascontiguousarray(ids, "<i4")
    link = hashlib.blake2b(identity + len(salt).to_bytes(8, "little") + salt, digest_size=32).digest()
    keys = []
    for start in range(0, len(ids), chunk_tokens):
        piece = ids[start : start + chunk_tokens]
        link = hashlib.blake2b(
            link + len(piece).to_bytes(8, "little") + piece.tobytes(),
            digest_size=32,
            person=b"kvcache prefix",
        ).digest()
        keys.append(link.hex())
    return keys


def private_key(secret, number, first_token):
    """Key of a chunk that belongs to one sequence and is no one else's to find.

    Parameters
    ----------
    secret : bytes
        16 random bytes of the cache.
    number : int
        Of the suspension, unique within the cache.
    first_token : int
    """
    text = secret + number.to_bytes(8, "little") + first_token.to_bytes(8, "little")
    return hashlib.blake2b(text, digest_size=32, person=b"kvcache private").hexdigest()


@dataclass(frozen=True)
class ChunkLabel:
    """What a chunk says of itself, and what its reader expects it to say.

    Attributes
    ----------
    identity : bytes
        32 bytes, from `identity_of`.
    key : str
        64 hexadecimal digits.
    first_token, num_tokens : int
    ids : int32 array or None
        Token ids; None where tokens are only counted.
    payload_bytes : int
    """

    identity: bytes
    key: str
    first_token: int
    num_tokens: int
    ids: np.ndarray | None
    payload_bytes: int

    @property
    def num_ids(self):
        """Token ids that the envelope tells."""
        return 0 if self.ids is None else len(self.ids)

    @property
    def envelope_bytes(self):
        """Bytes before the payload."""
        return envelope_bytes(self.num_ids)

    @property
    def chunk_bytes(self):
        """Bytes of the whole chunk."""
        return self.envelope_bytes + self.payload_bytes

    def _envelope(self, checksum):
        pages = bytearray(self.envelope_bytes)
        _FIELDS.pack_into(
            pages,
            0,
            MAGIC,
            FORMAT_VERSION,
            self.num_ids,
            len(pages),
            self.payload_bytes,
            self.first_token,
            self.num_tokens,
            self.identity,
            bytes.fromhex(self.key),
            checksum,
            bytes(16),
        )
        if self.ids is not None:
            ids = np.ascontiguousarray(self.ids, "<i4").tobytes()
            pages[_FIELDS.size : _FIELDS.size + len(ids)] = ids
        pages[_OWN_CHECKSUM] = xxh3_128(pages)
        return pages

    def payload_of(self, chunk):
        """The payload within the bytes of a chunk, in place."""
        return memoryview(chunk).cast("B")[self.envelope_bytes : self.chunk_bytes]

    def seal(self, chunk):
        """Write the envelope before a payload that is in place: `chunk` is a writable buffer of `chunk_bytes`."""
        view = memoryview(chunk).cast("B")
        view[: self.envelope_bytes] = self._envelope(xxh3_128(self.payload_of(chunk)))

    def verify(self, chunk):
        """Whether `chunk` is exactly the chunk that this label describes, every byte of it as it was sealed."""
        view = memoryview(chunk).cast("B")
        if view.nbytes != self.chunk_bytes:
            return False
        return view[: self.envelope_bytes] == self._envelope(xxh3_128(self.payload_of(chunk)))
