"""What passes between the allocator, which decides, and the arena, which holds the bytes."""

from libc.stdint cimport int64_t

ctypedef struct move_t:  # copy whole blocks; source and destination may overlap
    int64_t source       # first block to read
    int64_t destination  # first block to write
    int64_t blocks

# Carries out moves one after another, in list order. 0: every byte is in place. Otherwise nothing has been
# written, and the arena keeps the exception. Called under the allocator's lock, without the GIL.
ctypedef int (*move_f)(void *arena, const move_t *moves, int64_t count) noexcept nogil

ctypedef struct span_t:  # rows of what the caller writes -> consecutive slots of the arena
    int64_t row          # first row of the source
    int64_t slot         # first arena token
    int64_t count        # rows
