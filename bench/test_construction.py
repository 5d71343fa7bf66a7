"""A pool of a million blocks: how long it takes to make, and how much memory it takes."""

import ctypes
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
from scenes import books

from kvcache import BlockAllocator

pytestmark = pytest.mark.benchmark(group="a pool of 1,048,576 blocks")

BLOCKS = 2**20
BYTES_A_BLOCK = 16
ALL_SET = b"\xff" * (BLOCKS // 8)
KINDS = {
    "contiguous": lambda: books(BLOCKS, "contiguous", prefix_cache=False),
    "paged": lambda: books(BLOCKS, "paged", prefix_cache=False),
    "contiguous-with_prefixes": lambda: books(BLOCKS, "contiguous"),
    "paged-with_prefixes": lambda: books(BLOCKS, "paged"),
    "allocator": lambda: BlockAllocator(BLOCKS),
}
give_freed_pages_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's


@pytest.mark.parametrize("name", ["turn", "call"])
def test_floor(measure, name):
    measure.empty(name)


@pytest.mark.parametrize("kind", KINDS)
def test_construction(measure, kind):
    """Its floor: a bitmap of as many bits, filled."""
    pools = []

    def verify():
        pool = pools.pop()
        assert pool.free_blocks == BLOCKS and not pools
        if kind == "allocator":
            assert pool.allocate(BLOCKS).length == BLOCKS
        else:
            assert pool.allocate_for("request", 16).tokens == 16
        pool.check()
        del pool
        give_freed_pages_back(
            0
        )  # the next one is made of fresh pages, as the first and only one of a process is

    measure(
        lambda: pools.append(KINDS[kind]()),
        verify=verify,
        rounds=40,
        floor=("bitmap", bitmap),
        targets={"median": 5_000_000},
    )
    reserved, resident = in_a_process_of_its_own(kind)
    bounded = "prefixes" not in kind  # what is cached has a bound of its own: tests/test_prefix_memory.py
    reserved /= BLOCKS
    measure.note(
        bytes_a_block=(reserved, BYTES_A_BLOCK) if bounded else reserved,
        bytes_a_block_in_use=resident / BLOCKS,
    )


def bitmap():
    """Fresh pages for a bit a block, all set."""
    with mmap.mmap(-1, BLOCKS // 8) as bits:
        bits[:] = ALL_SET


def in_a_process_of_its_own(kind):
    """What the pool adds to a process: address space when made, resident memory when it has been used."""
    done = subprocess.run(
        [sys.executable, __file__, kind],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def memory():
    """Bytes of address space, and resident."""
    pages = Path("/proc/self/statm").read_text().split()
    return int(pages[0]) * 4096, int(pages[1]) * 4096


def fill(pool, kind):
    """Every block becomes part of a sequence of 64, and every sequence's neighbour goes again."""
    if kind == "allocator":
        runs = [pool.allocate(64) for _ in range(BLOCKS // 64)]
        for run in runs[::2]:
            pool.free(run)
        return
    for number in range(BLOCKS // 64):
        assert pool.allocate_for(number, 64 * 16)
    for number in range(0, BLOCKS // 64, 2):
        assert pool.free_for(number)


def main(kind):
    books(64, "contiguous").close()
    space, resident = memory()
    pool = KINDS[kind]()
    reserved = memory()[0] - space
    fill(pool, kind)
    print(json.dumps([reserved, memory()[1] - resident]))


if __name__ == "__main__":
    main(sys.argv[1])
