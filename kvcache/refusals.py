"""Why a request does not fit, in numbers: what was asked, what was there, what would have sufficed."""

from dataclasses import dataclass

REASONS = ("arena_full", "promises", "watermark", "tenant_limit", "never_fits", "timeout", "cancelled")


@dataclass(frozen=True, slots=True)
class Fits:
    """It would be admitted now. True in a condition.

    Attributes
    ----------
    tokens, max_tokens : int
        Tokens of the prompt, and the limit, as asked.
    blocks_needed : int
        Blocks up to the limit.
    blocks_free, blocks_unclaimed : int
        Blocks that are free, and blocks that may still be promised.
    """

    tokens: int
    max_tokens: int
    blocks_needed: int
    blocks_free: int
    blocks_unclaimed: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """It is not admitted. False in a condition; a context manager that does nothing, as a lease is one that frees.

    Attributes
    ----------
    reason : str
        ``"arena_full"``: the prompt needs more blocks than are free. ``"promises"``: the free blocks are promised to
        live sequences, or kept for those who have waited longer. ``"watermark"``: they are kept for growth.
        ``"tenant_limit"``: the tenant has what it may have. ``"never_fits"``: waiting cannot help. ``"timeout"``,
        ``"cancelled"``: it has waited until then.
    request_id : hashable
    tokens, max_tokens : int
        Tokens of the prompt, and the limit, as asked.
    blocks_needed : int
        Blocks up to the limit, or the least of them that would have been taken.
    blocks_free, blocks_unclaimed : int
        Blocks that were free, and blocks that could still be promised, when it was refused.
    blocks_missing : int
        Blocks that would have had to come free; 0 where blocks are not what is missing.
    fitting_tokens : int
        The largest `max_tokens` that would have been granted; 0 if the prompt alone did not fit.
    tenant : hashable
    waited : float
        How long it has waited, in units of the queue's clock.
    """

    reason: str
    request_id: object
    tokens: int
    max_tokens: int
    blocks_needed: int
    blocks_free: int
    blocks_unclaimed: int
    blocks_missing: int
    fitting_tokens: int
    tenant: object = None
    waited: float = 0.0

    def __bool__(self):
        return False

    def __str__(self):
        size = f"{self.tokens} tokens, {self.max_tokens} at most, need {self.blocks_needed} blocks"
        there = f"{self.blocks_free} free, {self.blocks_unclaimed} of them unclaimed"
        if self.reason == "never_fits":
            return f"never_fits: {size}, more than there can be"
        return f"{self.reason}: {size}, {there}; at most {self.fitting_tokens} tokens would have fitted"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exception):
        pass


@dataclass(frozen=True, slots=True)
class Room:
    """What there is for a newcomer, in blocks: free, not yet promised, kept for growth, and left to its tenant."""

    block_size: int
    free: int
    unclaimed: int
    keep: int = 0
    tenant: int | None = None  # None: no limit

    def judge(self, request_id, tokens, limit, least=None, **details):
        """`Fits`, or the `Refusal` that says what is in the way; `least` is the lowest limit that would do."""
        first = -(-tokens // self.block_size)
        needed = -(-(limit if least is None else least) // self.block_size)
        promised = self.unclaimed if self.tenant is None else min(self.unclaimed, self.tenant)
        short = {
            "tenant_limit": 0 if self.tenant is None else needed - max(self.tenant, 0),
            "arena_full": first - self.free,
            "promises": needed - self.unclaimed,
            "watermark": first - (self.free - self.keep),
        }
        reason = next((name for name, missing in short.items() if missing > 0), None)
        if reason is None:
            return Fits(tokens, limit, needed, self.free, self.unclaimed)
        roomy = first <= min(self.free - self.keep, promised)
        return Refusal(
            reason,
            request_id,
            tokens,
            limit,
            needed,
            self.free,
            self.unclaimed,
            blocks_missing=max(short.values()),
            fitting_tokens=min(limit, promised * self.block_size) if roomy else 0,
            **details,
        )
