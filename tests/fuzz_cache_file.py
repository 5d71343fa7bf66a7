"""A fuzz target for the reader of cache files: mutants of the files in `cache_files/`, for so many seconds.

    python tests/fuzz_cache_file.py SECONDS [SEED]

Whatever a file says, reading it ends in `CorruptCacheFile`, `IncompatibleCacheFile` or `OSError`, or in bytes that were
written so; with little memory, and soon. The first mutant that does otherwise is kept, and its name told.
"""

import random
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

from kvcache.cache_file import CacheFile, PlannedChunk, write_cache_file
from kvcache.errors import CorruptCacheFile, IncompatibleCacheFile
from kvcache.spec import KVCacheSpec, LayerSpec, PlaneSpec

CORPUS = Path(__file__).parent / "cache_files"
MODEL = b"model"
PLAIN = LayerSpec([PlaneSpec("k", 1, 2, "bfloat16"), PlaneSpec("v", 1, 3, "float16")])
PACKED = LayerSpec(
    [PlaneSpec("k", 1, 2, "uint32"), PlaneSpec("k_scales", 1, 1, "float32"), PlaneSpec("x", 1, 1, "uint8")]
)
SPEC = KVCacheSpec.from_layers([PLAIN, PACKED], 64, 2)
MOST_MEMORY = 8 << 20  # bytes
MOST_SECONDS = 5.0  # for one file of some kilobytes
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    10**30,
)
WORDS = (
    *(str(number).encode() for number in (-1, *NUMBERS)),
    *(
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"\0",
        b"\xff",
        b" ",
        b"[" * 3000,
    ),
    *(
        b'"__metadata__"',
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"chunk.0"',
        b"BF16",
        b"F64",
        b"-1 2 - ",
    ),
)


def reads_well(path):
    """Reads a file to its end: True where all of it is in order, False where it is refused."""
    try:
        with CacheFile(path, SPEC, MODEL) as file:
            file.verify(bytearray(file.buffer_bytes))
    except (CorruptCacheFile, IncompatibleCacheFile, OSError):
        return False
    return True


def judged(path):
    """As `reads_well`; `AssertionError` for too much memory or time."""
    tracemalloc.reset_peak()
    began = time.monotonic()
    well = reads_well(path)
    seconds, memory = time.monotonic() - began, tracemalloc.get_traced_memory()[1]
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    assert memory < MOST_MEMORY, f"{memory} bytes"
    return well


def mutant(source, others, rng):
    """`source` changed in one to four places; the length of its header is often put right again."""
    data = bytearray(source)
    for _ in range(rng.randint(1, 4)):
        rng.choice((flip, put_word, put_number, cut, double, splice))(data, others, rng)
    if len(data) >= 8 and rng.random() < 0.5:
        end = data.rfind(b"}") + 1
        data[:8] = max(0, end - 8 + rng.randint(0, 1)).to_bytes(8, "little")
    return bytes(data)


def place_in(data, rng):
    """A place, in the header as a rule: it is what the reader has to think about."""
    end = len(bytes(data[:4096]).rstrip(b" ")) if rng.random() < 0.8 else len(data)
    return rng.randint(0, max(0, end - 1))


def flip(data, others, rng):
    """One bit."""
    if data:
        data[place_in(data, rng)] ^= 1 << rng.randint(0, 7)


def put_word(data, others, rng):
    """A word of the format, over or between what is there."""
    word, place = rng.choice(WORDS), place_in(data, rng)
    data[place : place + rng.choice((0, len(word)))] = word


def put_number(data, others, rng):
    """Another number where there is one in the text, or in the first eight bytes."""
    if rng.random() < 0.2:
        data[:8] = (rng.choice(NUMBERS) % 2**64).to_bytes(8, "little")
        return
    place = place_in(data, rng)
    digits = [at for at in range(place, min(place + 200, len(data))) if data[at : at + 1].isdigit()]
    if digits:
        end = digits[0]
        while data[end : end + 1].isdigit():
            end += 1
        data[digits[0] : end] = str(rng.choice(NUMBERS)).encode()


def cut(data, others, rng):
    """Leave some out, or the end away."""
    place = place_in(data, rng)
    del data[place : place + rng.choice((1, 8, 100, len(data)))]


def double(data, others, rng):
    """Say some of it twice."""
    place, size = place_in(data, rng), rng.choice((1, 8, 100, 1000))
    data[place:place] = data[place : place + size]


def splice(data, others, rng):
    """Go on as another file does."""
    other = rng.choice(others)
    place = place_in(data, rng)
    data[place:] = other[place_in(other, rng) :]


def corpus():
    """Files by name: those that are committed beside this one."""
    return {path.name: path.read_bytes() for path in sorted(CORPUS.iterdir())}


def fuzz(seconds, seed, folder):
    """Number of mutants tried, and of those that read well; `AssertionError` with the name of one that did wrong."""
    rng = random.Random(seed)
    sources = list(corpus().values())
    path = Path(folder) / "mutant"
    tried = well = 0
    until = time.monotonic() + seconds
    tracemalloc.start()
    try:
        while time.monotonic() < until:
            path.write_bytes(mutant(rng.choice(sources), sources, rng))
            try:
                well += judged(path)
            except BaseException as error:
                kept = Path(tempfile.gettempdir()) / f"cache_file_mutant_{seed}_{tried}"
                kept.write_bytes(path.read_bytes())
                raise AssertionError(f"mutant {tried} of seed {seed}, kept as {kept}: {error!r}") from error
            tried += 1
    finally:
        tracemalloc.stop()
    return tried, well


def make_corpus():
    """Write the files anew."""
    import numpy as np

    def ids(first, count):
        return np.arange(first, first + count, dtype=np.int32)

    def fill(number, buffer):
        buffer[:] = bytes(range(256)) * (len(buffer) // 256) + bytes(range(len(buffer) % 256))
        return True

    plans = {
        "empty": [],
        "one": [PlannedChunk(ids(0, 2))],
        "tree": [
            PlannedChunk(ids(0, 4)),
            PlannedChunk(ids(9, 2), parent=0),
            PlannedChunk(ids(7, 2), parent=0),
        ],
        "salted": [
            PlannedChunk(ids(0, 2), "tenant"),
            PlannedChunk(ids(5, 2), "tenant", 0),
            PlannedChunk(ids(0, 2), b"\0"),
        ],
    }
    CORPUS.mkdir(exist_ok=True)
    for name, plan in plans.items():
        write_cache_file(CORPUS / f"{name}.safetensors", SPEC, MODEL, plan, fill)


def main():
    seconds = float(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    with tempfile.TemporaryDirectory() as folder:
        tried, well = fuzz(seconds, seed, folder)
    print(f"cache files: {tried} mutants of {len(corpus())} files, {well} in order, {tried - well} refused")


if __name__ == "__main__":
    if sys.argv[1:] == ["--make-corpus"]:
        make_corpus()
    else:
        main()
