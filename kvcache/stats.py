"""What `stats()` returns and how the dumps print it."""

from typing import NamedTuple

MB = 1024 * 1024
LATENCY_BOUNDS = tuple(4**power / 1e6 for power in range(12))  # seconds: 1 µs to 4.2 s
NOT_COMPARED = 33  # fields at the end, after waiting_blocks


class CacheStats(NamedTuple):
    """One moment of a cache. Equal to another as long as nothing has changed.

    Counts of admissions, frees and refusals, latencies, MLX's memory, queues, and peaks other than `peak_used_blocks`
    take no part in that.

    Attributes
    ----------
    num_sequences : int
        Live sequences.
    total_blocks, used_blocks, free_blocks, cached_blocks, pinned_blocks, claimed_blocks : int
        Blocks of the arena; held by sequences and pins; held by nobody; of the free ones, those whose content may be
        found again; of the used ones, those that a pin holds; promised to live sequences beyond what they hold.
    largest_free_run : int
        Blocks of the longest gap.
    fragmentation : float
        ``1 - largest_free_run / free_blocks``; 0.0 when nothing is free.
    allocated_bytes, free_bytes, arena_bytes : int
    peak_used_blocks : int
        The most blocks ever held at once.
    moves, moved_tokens, moved_bytes : int
        Runs moved to another place, used tokens in them, and the bytes of these in all layers.
    copied_tokens : int
        Tokens copied by forks, hits and copies on write.
    moved_cached_tokens : int
        Tokens of cached runs copied to another place.
    revived_tokens : int
        Tokens of hits that were continued where they were, without a copy.
    evicted_blocks : int
        Cached blocks given away whose content is lost, for whatever reason.
    spills, heals : int
        Times that a sequence was given blocks apart from its run, since a bound on moves left no other place, and
        that moves made a scattered sequence one run again.
    longest_pause_tokens : int
        The most used tokens that one call has moved.
    arena_copies : int
        Times that MLX copied a whole plane where it should have written in place.
    waiting_blocks : int
        Of the used blocks, those that nobody has any more: free when the last hold ends.
    peak_sequences, peak_claimed_blocks : int
        The most since the start, as `peak_used_blocks`.
    recent_peak_used_blocks, recent_peak_sequences, recent_peak_claimed_blocks : int
        The most since the last `reset_peaks()`.
    admissions, frees : int
        Sequences that have begun, forks included, and that have ended.
    refused_arena_full, refused_promises : int
        Admissions and forks that did not fit: too few blocks were free, or the free ones were promised to others.
        Among the latter are new limits and cuts that were refused.
    refused_growth, refused_past_limit : int
        Appends that found no block (with `overcommit` above 1 only), and appends beyond the sequence's limit. What an
        `AllocationQueue` refuses for lack of room, of these and of the two above, is counted by the queue alone.
    queries, query_tokens, hit_tokens : int
        Admissions whose prompt was given as ids, the tokens of these prompts, and those of them that were there.
    misses_cold, misses_evicted, misses_salted, misses_partial, misses_disabled : int
        Queries that found less than there could be: the block had never been there; it had been there; nothing is
        known under the salt; the prompt has no whole block to look for; prefixes are not kept.
    evictions_room, evictions_quota, evictions_duplicate, evictions_cleared : int
        Cached blocks given away by why: their memory was needed, their salt had too many, another block has their
        content (nothing is lost then), `clear_prefix_cache` said so.
    admission_latencies : tuple of int
        Admissions by how long they took: for each of `LATENCY_BOUNDS` those within it and beyond the one before, then
        those beyond the last. Who was admitted at once, without a wait, a move or a copy, is not timed and counted
        as within the first bound.
    admission_seconds : float
        What those that were timed took, together.
    mlx_active_bytes, mlx_peak_bytes, mlx_cache_bytes : int
        MLX's memory in this process, the arena included; 0 with other backends.
    suspended_sequences : int
        Sequences that are suspended or on their way. Those that hold blocks meanwhile are among `num_sequences`.
    corrupt_chunks : int
        Chunks that came back from a store as something else than what had been put there.
    waiting_requests : int
        Requests that wait in the queues before the cache.
    oldest_wait : float
        How long the first of them has waited, in units of its queue's clock; 0.0 where none does.
    """

    num_sequences: int
    total_blocks: int
    used_blocks: int
    free_blocks: int
    cached_blocks: int
    pinned_blocks: int
    claimed_blocks: int
    largest_free_run: int
    fragmentation: float
    allocated_bytes: int
    free_bytes: int
    arena_bytes: int
    peak_used_blocks: int
    moves: int
    moved_tokens: int
    moved_bytes: int
    copied_tokens: int
    moved_cached_tokens: int
    revived_tokens: int
    evicted_blocks: int
    spills: int
    heals: int
    longest_pause_tokens: int
    arena_copies: int
    waiting_blocks: int
    peak_sequences: int
    peak_claimed_blocks: int
    recent_peak_used_blocks: int
    recent_peak_sequences: int
    recent_peak_claimed_blocks: int
    admissions: int
    frees: int
    refused_arena_full: int
    refused_promises: int
    refused_growth: int
    refused_past_limit: int
    queries: int
    query_tokens: int
    hit_tokens: int
    misses_cold: int
    misses_evicted: int
    misses_salted: int
    misses_partial: int
    misses_disabled: int
    evictions_room: int
    evictions_quota: int
    evictions_duplicate: int
    evictions_cleared: int
    admission_latencies: tuple[int, ...]
    admission_seconds: float
    mlx_active_bytes: int
    mlx_peak_bytes: int
    mlx_cache_bytes: int
    suspended_sequences: int
    corrupt_chunks: int
    waiting_requests: int
    oldest_wait: float

    def _compared(self):
        return tuple(self)[:-NOT_COMPARED]

    def __eq__(self, other):
        return self._compared() == other._compared() if isinstance(other, CacheStats) else NotImplemented

    def __ne__(self, other):
        return self._compared() != other._compared() if isinstance(other, CacheStats) else NotImplemented

    def __hash__(self):
        return hash(self._compared())


def stats_text(spec, stats, rows):
    """The text of `dump_cache_stats`; `rows` are (request id, used tokens, limit, block table)."""
    heads, head_dim = (("mixed" if each is None else each) for each in (spec.num_kv_heads, spec.head_dim))
    lines = [
        "=== KVCache Statistics ===",
        "Configuration:",
        f"  Layers: {spec.num_layers}, Heads: {heads}, HeadDim: {head_dim}",
        f"  BlockSize: {spec.block_size}, TotalBlocks: {stats.total_blocks}",
        "Allocation State:",
        f"  Allocated sequences: {stats.num_sequences}",
        f"  Total allocated: {stats.allocated_bytes / MB:.2f} MB",
        f"  Total free: {stats.free_bytes / MB:.2f} MB",
        f"  Fragmentation: {stats.fragmentation:.2f}",
        "Sequences:",
    ]
    lines += [f"  {name}: {used}/{limit} tokens, blocks {_runs(table)}" for name, used, limit, table in rows]
    return "\n".join(lines)


def _runs(table, most=8):
    """``[start, +blocks]`` of each run of a block table, the first few of them."""
    runs = []
    for block in table.tolist():
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1][1] += 1
        else:
            runs.append([block, 1])
    shown = ", ".join(f"[{start}, +{length}]" for start, length in runs[:most])
    return (shown or "none") + (f" and {len(runs) - most} more runs" if len(runs) > most else "")
