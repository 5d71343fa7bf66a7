"""What a queue has granted: whoever has it frees it."""


class Lease:
    """What has been granted. True in a condition; a context manager that frees.

    Attributes
    ----------
    allocation : Allocation
        The cache's record. `request_id`, `tokens`, `max_tokens` and `cached_tokens` are read from it.
    tenant : hashable
    priority : int
    """

    __slots__ = (
        "_blocks",
        "_cache",
        "_holder",
        "_leaving",
        "_tokens",
        "allocation",
        "on_evict",
        "on_swap",
        "priority",
    )

    def __init__(self, cache, allocation, holder, priority, on_evict, on_swap):
        self._cache = cache
        self.allocation = allocation
        self._holder = holder  # the tenant's account
        self._blocks = 0  # on that account
        self.priority = priority
        self.on_evict, self.on_swap = on_evict, on_swap
        self._leaving = False  # chosen as a victim
        self._tokens = allocation.tokens  # when it was last looked at

    @property
    def tenant(self):
        return self._holder.name

    @property
    def request_id(self):
        return self.allocation.request_id

    @property
    def tokens(self):
        return self.allocation.tokens

    @property
    def max_tokens(self):
        return self.allocation.max_tokens

    @property
    def cached_tokens(self):
        return self.allocation.cached_tokens

    def free(self):
        """Ends the sequence that was granted, if it still lives: never a later one of the same id."""
        return self._cache._end(self.allocation)

    def __repr__(self):
        return f"Lease({self.allocation!r}, tenant={self.tenant!r}, priority={self.priority})"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._cache._end(self.allocation)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        self._cache._end(self.allocation)
