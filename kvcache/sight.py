"""What a cache shows of itself: numbers, pictures, findings, and its status to who asks for it."""

import sys

from kvcache.block_map import image_of
from kvcache.errors import KVCacheError, UnknownSequence
from kvcache.options import as_index
from kvcache.queues import NOBODY_WAITS, waiting_before
from kvcache.stats import CacheStats, stats_text

_new_stats = tuple.__new__  # of the namedtuple's fields, all of them


class Sight:
    """The part of `KVCache` that is looked at; nothing here changes who holds what."""

    _status = None  # who serves it, if anybody does

    @property
    def total_allocated(self):
        """Bytes that sequences hold, all layers, all planes."""
        return (self.spec.num_blocks - self.free_blocks) * self.spec.block_bytes

    @property
    def total_free(self):
        """Bytes that nobody holds."""
        return self.free_blocks * self.spec.block_bytes

    @property
    def free_tokens(self):
        """Tokens that fit into the free blocks."""
        return self.free_blocks * self.spec.block_size

    def stats(self):
        """Every number at once: a `CacheStats`, which stays as it is."""
        arena = self.arena
        figures = self._figures(*self._prices, arena.arena_copies, arena.library_memory())
        away = (0, 0) if self._carrier is None else (self._num_away(), self._carrier.corrupt_chunks)
        queues = self._queues.open
        waiting = waiting_before(queues) if queues else NOBODY_WAITS
        return _new_stats(CacheStats, figures + away + waiting)

    def dump_cache_stats(self, file=None):
        """Write the configuration, the state and one line per sequence to `file` (standard output by default)."""
        rows = []
        for request_id in self:
            try:
                used, limit = self.used_tokens(request_id), self.limit(request_id)
                rows.append((request_id, used, limit, self.block_table(request_id)))
            except UnknownSequence:
                continue  # freed by another thread since
        print(stats_text(self.spec, self.stats(), rows), file=sys.stdout if file is None else file)

    def block_map_image(self, width=64, *, dark=False):
        """The blocks as a picture: a pixel a block, `width` to a row, in the order of the arena.

        Free blocks are white, or nearly black; cached ones, whose content may be found again, of a pale blue, or a
        dark one, and those that a pin alone holds of a stronger blue; each sequence has a colour; a block that several
        share has half its holder's brightness; grey ones are free when the last hold ends. Pixels of the last row that
        are no block are of a lighter grey, in a dark picture of a darker one.

        Parameters
        ----------
        width : int
        dark : bool

        Returns
        -------
        array of uint8, ``(rows, width, 3)``
        """
        if as_index(width, "width") < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        return image_of(self._owners(), as_index(width, "width"), bool(dark))

    @property
    def queues(self):
        """Every open `AllocationQueue` before this cache, in order of their making: a tuple."""
        return self._queues.open

    def _enrol(self, queue, name):
        return self._queues.enrol(queue, name)

    def _strike(self, queue):
        self._queues.strike(queue)

    def check_health(self):
        """What an operator should hear of: a tuple of `Finding`, told to the logger ``kvcache`` once a minute each.

        High fragmentation in paged placement, promises above 90 %, arrays of the arena that MLX has copied, chunks that
        a store has given back altered, and a queue whose oldest waiter is older than its `warn_after`. Called by
        whoever exports metrics or the status, and by a request that has waited for that long.
        """
        return self._health.look(self)

    def serve_status(self, host="127.0.0.1", port=0, *, pid_file=None, any_host=False):
        """Let `kvcache top` look at this cache: its state as JSON over HTTP, read-only, from a daemon thread.

        Parameters
        ----------
        host : str
            A loopback address, unless `any_host`: there is no password.
        port : int
            0 for any that is free.
        pid_file : path, optional
            Where to write process id and address; removed at the end.
        any_host : bool
            Whether other machines may ask.

        Returns
        -------
        StatusServer
            With `address`, and `close`; closing the cache closes it.

        Raises
        ------
        KVCacheError
            It is served already.
        OSError, ValueError
            It cannot listen there, or should not.
        """
        from kvcache.status import StatusServer

        self._require_open()
        if self._status is not None and not self._status.closed:
            raise KVCacheError(f"the status is served already, at {self._status.address}")
        self._status = StatusServer(self, host, port, pid_file, any_host)
        return self._status
