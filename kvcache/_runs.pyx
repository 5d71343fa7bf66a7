"""Runs of blocks for whoever needs no sequences: a door on the blocks and gaps."""

import itertools
import sys

import cython

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int32_t, int64_t

from kvcache._blocks cimport (
    block_is_free,
    blocks_destroy,
    blocks_init,
    check_blocks,
    draw_blocks,
    gap_at,
    gap_for,
    give_run,
    largest_free_run,
    take_run,
)
from kvcache._ids cimport as_count
from kvcache._lock cimport (
    kv_lock,
    kv_lock_destroy,
    kv_lock_init,
    kv_lock_is_mine,
    kv_lock_runs_python,
    kv_lock_try,
    kv_unlock,
)

from kvcache.errors import InvalidFree, KVCacheError

POOLS = itertools.count()

cdef enum:
    RUN_MARK = 0x40000000  # in a run's label, where a gap has a block id: ids are smaller


@cython.final
cdef class BlockRun:
    """BlockRun(start, length)\n--\n

    Blocks [start, start + length) as `BlockAllocator.allocate` gave them.

    Runs compare by start, length and generation. One built by hand has generation 0 and is never live.
    """

    def __cinit__(self, start, length):
        self.start = as_count(start, "start", 0)
        self.length = as_count(length, "length", 1)

    def __eq__(self, other):
        if not isinstance(other, BlockRun):
            return NotImplemented
        return (self.start == (<BlockRun>other).start and self.length == (<BlockRun>other).length
                and self.generation == (<BlockRun>other).generation)

    def __hash__(self):
        return hash((self.start, self.length, self.generation))

    def __repr__(self):
        return f"BlockRun(start={self.start}, length={self.length}, generation={self.generation})"

    def __reduce__(self):
        return _same_run, (self.start, self.length, self.generation)


def _same_run(start, length, generation):
    """A run as it was pickled."""
    cdef BlockRun run = BlockRun.__new__(BlockRun, start, length)
    run.generation = generation
    return run


cdef class BlockAllocator:
    """BlockAllocator(num_blocks)\n--\n

    Contiguous runs of blocks out of a pool of `num_blocks` (1 to 2**30 - 1), from any thread.

    Raises
    ------
    ValueError
        `num_blocks` is out of range.
    MemoryError
        The bookkeeping (about 12 bytes a block) cannot be had.
    """

    def __cinit__(self, num_blocks):
        cdef int64_t count = as_count(num_blocks, "num_blocks", 1)
        if count >= RUN_MARK:
            raise ValueError(f"num_blocks must be below {RUN_MARK}, not {num_blocks}")
        if kv_lock_init(&self.lock) or blocks_init(&self.blocks, count, True):
            raise MemoryError(f"no memory for the bookkeeping of {num_blocks} blocks")
        self.generation = next(POOLS) << 40  # runs of other pools are never live in this one

    def __dealloc__(self):
        blocks_destroy(&self.blocks)
        kv_lock_destroy(&self.lock)

    cdef int take_lock(self) except -1:
        if not kv_lock_try(&self.lock):
            if kv_lock_is_mine(&self.lock):
                raise KVCacheError("called by a finalizer that runs while this thread checks the pool")
            with nogil:
                kv_lock(&self.lock)
        return 0

    def allocate(self, n):
        """A run of `n` blocks, or None where no gap is so long.

        Raises
        ------
        TypeError, ValueError
            `n` is not an int, or less than 1.
        """
        cdef int64_t length = as_count(n, "n", 1)
        cdef int64_t start
        cdef BlockRun run = BlockRun.__new__(BlockRun, 0, 1)
        self.take_lock()
        start = gap_for(&self.blocks, length)
        if start >= 0:
            take_run(&self.blocks, start, start, length)
            self.label(start, length)
            run.start, run.length, run.generation = start, length, self.generation
        kv_unlock(&self.lock)
        return run if start >= 0 else None

    cdef void label(self, int64_t start, int64_t length) noexcept nogil:
        """Gives a run its generation, which is what `require_live` looks for."""
        self.generation += 1
        self.blocks.cells[start].length = <int32_t>length
        self.blocks.cells[start].a = <int32_t>self.generation
        self.blocks.cells[start].b = <int32_t>(RUN_MARK | self.generation >> 32)

    cdef int require_live(self, BlockRun run) except -1:
        """Under the lock, which is given up before the error is made."""
        cdef bint live = False
        if run.generation and run.start < self.blocks.num_blocks and not block_is_free(&self.blocks, run.start):
            live = (self.blocks.cells[run.start].length == run.length
                    and self.blocks.cells[run.start].a == <int32_t>run.generation
                    and self.blocks.cells[run.start].b == <int32_t>(RUN_MARK | run.generation >> 32))
        if live:
            return 0
        kv_unlock(&self.lock)
        raise InvalidFree(start=run.start, length=run.length, reason="it is not a live run of this pool")

    def extend(self, BlockRun run not None, n):
        """The run with `n` more blocks, in place, or None where they are not free. Afterwards only the new run is live.

        Raises
        ------
        InvalidFree
            `run` is not live.
        TypeError, ValueError
            `n` is not an int, or less than 1.
        """
        cdef int64_t more = as_count(n, "n", 1)
        cdef int64_t end
        cdef BlockRun longer = BlockRun.__new__(BlockRun, 0, 1)
        self.take_lock()
        self.require_live(run)
        end = run.start + run.length
        if gap_at(&self.blocks, end) < more:
            longer = None
        else:
            take_run(&self.blocks, end, end, more)
            self.label(run.start, run.length + more)
            longer.start, longer.length, longer.generation = run.start, run.length + more, self.generation
        kv_unlock(&self.lock)
        return longer

    def free(self, BlockRun run not None):
        """Gives a run back.

        Raises
        ------
        InvalidFree
            `run` is not live exactly as given: freed before, extended since, part of a run, another pool's, built
            by hand. Nothing has changed then.
        """
        self.take_lock()
        self.require_live(run)
        self.blocks.cells[run.start].b = 0
        give_run(&self.blocks, run.start, run.length)
        kv_unlock(&self.lock)

    @property
    def num_blocks(self):
        """Blocks of the pool."""
        return self.blocks.num_blocks

    @property
    def free_blocks(self):
        """Blocks in no run."""
        return self.blocks.free_blocks

    @property
    def used_blocks(self):
        """Blocks in runs."""
        return self.blocks.num_blocks - self.blocks.free_blocks

    @property
    def largest_free_run(self):
        """Blocks of the longest gap."""
        self.take_lock()
        longest = largest_free_run(&self.blocks)
        kv_unlock(&self.lock)
        return longest

    @property
    def fragmentation(self):
        """``1 - largest_free_run / free_blocks``; 0.0 when nothing is free."""
        self.take_lock()
        cdef int64_t longest = largest_free_run(&self.blocks)
        cdef int64_t there = self.blocks.free_blocks
        kv_unlock(&self.lock)
        return fragmentation_of(longest, there)

    def dump_block_map(self, file=None, width=64):
        """Writes the numbers and a map of the blocks, `width` to a row, to `file` (standard output by default)."""
        cdef int64_t columns = as_count(width, "width", 1)
        cdef bytearray cells = bytearray(self.blocks.num_blocks)
        self.take_lock()
        cdef int64_t there = self.blocks.free_blocks
        cdef int64_t longest = largest_free_run(&self.blocks)
        draw_blocks(&self.blocks, PyByteArray_AS_STRING(cells))
        kv_unlock(&self.lock)
        print(block_map_text(cells, columns, there, longest), file=sys.stdout if file is None else file)

    def check(self):
        """Walks every structure.

        Raises
        ------
        KVCacheError
            Naming the first thing that is wrong.
        """
        self.take_lock()
        kv_lock_runs_python(&self.lock, True)  # to say what is wrong
        try:
            wrong = check_blocks(&self.blocks)
        finally:
            kv_lock_runs_python(&self.lock, False)
            kv_unlock(&self.lock)
        if wrong is not None:
            raise KVCacheError(wrong)


cdef double fragmentation_of(int64_t longest, int64_t there) noexcept:
    return 1.0 - <double>longest / <double>there if there else 0.0


cdef str block_map_text(bytearray cells, int64_t width, int64_t there, int64_t longest):
    """The numbers, and rows of `width` blocks; `there` are free, `longest` of them in a row."""
    cdef int64_t total = len(cells)
    text = cells.decode("ascii")
    rows = "\n".join(["    " + text[row : row + width] for row in range(0, total, width)])
    return (f"KVBlockAllocator State:\n  Total blocks: {total}\n  Used: {total - there} Free: {there}\n"
            f"  Fragmentation: {fragmentation_of(longest, there):.2f}\n"
            f"  Block map (. = free, X = used):\n{rows}")
