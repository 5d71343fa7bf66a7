"""Sequences that decode together: a step appends for all of them and writes once a layer."""

from kvcache._batch import BatchCore


class DecodeBatch(BatchCore):
    """Sequences that decode together: one append a step for all of them, one write a layer.

    Made by `KVCache.batch`. Reading any array brings it up to date first.
    """

    def write(self, layer, *planes):
        """Write the tokens of the last append in one layer, to where they are now.

        Parameters
        ----------
        layer : int
        *planes : array ``(B, heads, width)`` or ``(tokens, heads, width)``
            One per plane: a row per token asked for (those of refused members are skipped), or per token granted.

        Raises
        ------
        UnknownSequence
            A member has been freed.
        ValueError
            No step, wrong number, shape or dtype of planes, a token that has been cut off since.
        CacheFull
            A shared block would have to be copied first, and no block is unclaimed.
        """
        cache = self.cache
        cache._require_open()
        layer = cache._checked(layer)
        sources = cache.arena.sources(layer, planes, rows_axis=0)
        cache.arena.note_stream()
        self._write_rows(sources, layer)

    @property
    def device_slots(self):
        """Slots of the tokens granted, as an array of the arena's library; made at most once per generation."""
        return self._device_arrays()[1]

    @property
    def device_positions(self):
        """Positions of the tokens granted; as `device_slots`."""
        return self._device_arrays()[2]

    def _device_arrays(self):
        made = getattr(self, "_made", None)
        if made is None or made[0] != self.generation:
            generation, slots, positions = self._granted()
            on_device = self.cache.arena.device_array
            made = self._made = generation, on_device(slots), on_device(positions)
        return made
