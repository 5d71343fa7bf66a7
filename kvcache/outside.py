"""What a cache does with K/V outside its arena: suspend and resume, save and load."""

import threading

_MAKING = threading.Lock()


class Outside:
    """The part of `KVCache` that takes K/V out of the arena and brings them back.

    What carries them is made when it is first wanted.
    """

    _carrier = None  # who carries K/V to stores, if anybody ever has

    def suspend(self, request_id, store=None):
        """Take K/V of a sequence out of the arena, to come back when `resume` is called.

        The id stays live, with its limit, salt and tokens; appends, views, writes, `fork` and `truncate` raise
        `Suspended` from now on, `free_for` ends it as always. It keeps its blocks until the transfer is ``ok``; then
        they are free, and nothing is promised to it. A transfer that fails leaves it as it was.

        Parameters
        ----------
        request_id : hashable
        store : kvcache.store.ChunkStore, optional
            Where to; by default host memory, at most twice what the arena has and two pages a block.

        Returns
        -------
        Transfer

        Raises
        ------
        UnknownSequence, Suspended
        ValueError
            The arena has no storage.
        """
        return self._carries().suspend(request_id, store)

    def resume(self, request_id, *, recompute=False):
        """Bring a suspended sequence back, into any free place, byte for byte.

        Parameters
        ----------
        request_id : hashable
        recompute : bool
            Give it blocks without K/V, at once, for the engine to compute them again: for a sequence whose chunks are
            lost. `Transfer.tokens` says how many leading ones are in place, since they are cached.

        Returns
        -------
        Transfer or None
            None when it does not fit now; nothing has changed then. The id is `Suspended` until the transfer is ``ok``;
            one that is not leaves it suspended.

        Raises
        ------
        UnknownSequence
        Suspended
            It is on its way already.
        ValueError
            It is not suspended.
        """
        return self._carries().resume(request_id, recompute)

    def _bring_back(self, request_id, recompute):
        """As `resume`, but False where it would wait for a hold; a sequence that is not suspended has arrived."""
        if self.is_suspended(request_id):
            return self._carries().resume(request_id, recompute, patient=False)
        from kvcache.suspension import arrival

        return arrival(request_id, self.used_tokens(request_id))

    def save(self, path, request_ids=None):
        """Write what is cached to a file: prefixes that have been freed, and what live sequences have committed.

        Whole blocks whose token ids are known. The file is synced and renamed when it is whole; until then what was
        there is as it was. Other calls go on meanwhile; what they evict before its turn comes is left out.

        Parameters
        ----------
        path : path
        request_ids : iterable of hashable, optional
            Only prefixes of these live sequences.

        Returns
        -------
        int
            Tokens written.

        Raises
        ------
        ValueError
            The cache has no fingerprint or no storage, or there is more than one file tells of.
        TypeError
            A salt that is neither str nor bytes.
        UnknownSequence, OSError
        """
        from kvcache.saving import save_prefixes

        self._require_fingerprint("save")
        return save_prefixes(self, path, request_ids, self._carries().pace)

    def load(self, path):
        """Bring saved prefixes into the cache, as far as they fit into what is free.

        All of the file is verified before anything changes.

        Parameters
        ----------
        path : path

        Returns
        -------
        int
            Tokens of the file that can be found now.

        Raises
        ------
        CorruptCacheFile
            It is cut short, altered, or no such file.
        IncompatibleCacheFile
            It was made for another model, other planes, or blocks of another size.
        ValueError
            The cache has no fingerprint or no storage.
        OSError
        """
        from kvcache.saving import load_prefixes

        self._require_fingerprint("load")
        return load_prefixes(self, path, self._carries().pace)

    def _require_fingerprint(self, call):
        if self.fingerprint is None:
            raise ValueError(f"{call} needs to know the model: make the cache with fingerprint=")

    def _carries(self):
        self._require_open()
        if self.backend == "none":
            raise ValueError("backend='none' has no storage to save or suspend")
        if self._carrier is None:
            from kvcache.suspension import Carrier

            with _MAKING:
                if self._carrier is None:
                    self._carrier = Carrier(self, *self._stores)
        return self._carrier

    def _abandoned(self, journey):
        """A suspended sequence has been freed: nobody wants its chunks."""
        if journey.chunks is not None:
            self._carrier.forget(journey.chunks)
