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
        Blocks up to the limit, but for those that it shares with sequences and pins that hold them anyway.
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
        Tokens of the prompt, and the limit, as asked; of growth the tokens that were to be added, and the limit.
    blocks_needed : int
        Blocks up to the limit, or the least of them that would have been taken, but for those that it shares with
        sequences and pins that hold them anyway; of growth those that would have been added.
    blocks_free, blocks_unclaimed : int
        Blocks that were free, and blocks that could still be promised, when it was refused.
    blocks_missing : int
        Blocks that would have had to come free; of ``"never_fits"`` blocks beyond what there can be. 0 where blocks are
        not what is missing.
    fitting_tokens : int
        The largest `max_tokens` that would have been granted; 0 if the prompt alone did not fit. Of growth the most
        tokens that could have been added.
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
            there = "no wait can help"
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
    """What there is for a newcomer, in blocks.

    Parameters
    ----------
    block_size : int
        In tokens.
    arena : int
        All blocks.
    free, unclaimed : int
        Not in use, and not yet promised.
    shared : int
        Of its prompt's: those that others hold as well, so that they cost nothing.
    keep : int
        Kept for growth.
    tenant, most : int, optional
        What its tenant may have beside what it has, and may ever have; None: no limit.
    crowded : bool
        Whether its tenant has as many sequences as it may.
    """

    block_size: int
    arena: int
    free: int
    unclaimed: int
    shared: int = 0
    keep: int = 0
    tenant: int | None = None
    most: int | None = None
    crowded: bool = False

    def judge(self, request_id, tokens, limit, least=None, **details):
        """`Fits`, or the `Refusal` that says what is in the way; `least` is the lowest limit that would do."""
        prompt = -(-tokens // self.block_size)
        up_to = -(-(limit if least is None else least) // self.block_size)
        first, needed = prompt - self.shared, up_to - self.shared
        unclaimed = min(self.unclaimed, self.arena)
        most = self.arena if self.most is None else min(self.most, self.arena)
        never = max(up_to - most, prompt - (self.arena - self.keep))
        short = {
            "tenant_limit": 0 if self.tenant is None else up_to - self.tenant,
            "arena_full": first - self.free,
            "promises": needed - unclaimed,
            "watermark": first - (self.free - self.keep),
        }
        missing = max(never if never > 0 else max(short.values()), 0)
        if never > 0:
            reason = "never_fits"
        elif self.crowded:
            reason = "tenant_limit"
        else:
            reason = next((name for name, blocks in short.items() if blocks > 0), None)
        if reason is None:
            return Fits(tokens, limit, needed, self.free, unclaimed)
        return Refusal(
            reason,
            request_id,
            tokens,
            limit,
            needed,
            self.free,
            unclaimed,
            blocks_missing=missing,
            fitting_tokens=self.fitting(prompt, limit),
            **details,
        )

    def fitting(self, prompt, limit):
        """The largest limit, up to this one, that a prompt of so many blocks would be given."""
        promised = min(self.unclaimed + self.shared, self.arena)
        if self.tenant is not None:
            promised = min(promised, self.tenant)
        if self.crowded or prompt > promised or prompt - self.shared > self.free - self.keep:
            return 0
        return min(limit, promised * self.block_size)
