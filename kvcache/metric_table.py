"""The one table of what is exported, to Prometheus and to OpenTelemetry.

Names are OpenTelemetry's; Prometheus' follow from them by the rules that its exporters use, so that both give the
same series (but for histograms, which OpenTelemetry cannot observe), and one dashboard serves both.
"""

from typing import NamedTuple

from kvcache.stats import LATENCY_BOUNDS
from kvcache.tallies import WAIT_BOUNDS

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
SUFFIXES = {"By": "_bytes", "s": "_seconds", "1": "_ratio"}  # of a Prometheus name, by unit


class Metric(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    name : str
        OpenTelemetry's.
    kind : str
        ``"gauge"``, ``"counter"`` or ``"histogram"``.
    unit : str
        In UCUM: ``"By"``, ``"s"``, ``"1"``, or a noun in braces.
    help : str
    label : str or tuple of str
        Name of the label that the samples differ in, or names of several; empty for a single sample.
    values : callable
        From what is read to a number; with a label to a dictionary of them by its value, with several by tuples of
        values; of a histogram to (bounds, counts within each and beyond the one before and beyond the last, sum).
    """

    name: str
    kind: str
    unit: str
    help: str
    label: str | tuple
    values: object

    @property
    def labels(self):
        """Names of all labels that the samples differ in."""
        return self.label if isinstance(self.label, tuple) else (self.label,) if self.label else ()

    def samples(self, reading):
        """The values of the labels with each number."""
        values = self.values(reading)
        if not self.label:
            return [((), values)]
        several = isinstance(self.label, tuple)
        return [(key if several else (key,), value) for key, value in values.items()]

    @property
    def prometheus_name(self):
        """With the unit and, of a counter, ``_total`` at its end."""
        name = self.name.replace(".", "_") + SUFFIXES.get(self.unit, "")
        return name + "_total" if self.kind == COUNTER else name


def _gauge(name, unit, text, values, label=""):
    return Metric(f"kvcache.{name}", GAUGE, unit, text, label, values)


def _counter(name, unit, text, values, label=""):
    return Metric(f"kvcache.{name}", COUNTER, unit, text, label, values)


class Reading(NamedTuple):
    """What the rows of `METRICS` are given, and a `QueueStats` of each queue for those of `QUEUE_METRICS`.

    Attributes
    ----------
    stats : CacheStats
    promised : float
        How much of what may be promised is.
    queues : tuple of QueueStats
    """

    stats: object
    promised: float
    queues: tuple = ()


METRICS = (
    _gauge("memory.arena", "By", "Size of the arena.", lambda now: now.stats.arena_bytes),
    _gauge("memory.used", "By", "Bytes of blocks that are held.", lambda now: now.stats.allocated_bytes),
    _gauge("memory.free", "By", "Bytes of blocks that nobody holds.", lambda now: now.stats.free_bytes),
    _gauge("sequences", "{sequence}", "Live sequences.", lambda now: now.stats.num_sequences),
    _gauge(
        "sequences.suspended",
        "{sequence}",
        "Sequences that are suspended or on their way to a store or back.",
        lambda now: now.stats.suspended_sequences,
    ),
    _gauge("blocks.arena", "{block}", "Blocks of the arena.", lambda now: now.stats.total_blocks),
    _gauge("blocks.used", "{block}", "Blocks that are held.", lambda now: now.stats.used_blocks),
    _gauge("blocks.free", "{block}", "Blocks that nobody holds.", lambda now: now.stats.free_blocks),
    _gauge(
        "blocks.cached",
        "{block}",
        "Free blocks whose content may be found again.",
        lambda now: now.stats.cached_blocks,
    ),
    _gauge("blocks.pinned", "{block}", "Used blocks that a pin holds.", lambda now: now.stats.pinned_blocks),
    _gauge(
        "blocks.claimed",
        "{block}",
        "Blocks promised to live sequences beyond what they hold.",
        lambda now: now.stats.claimed_blocks,
    ),
    _gauge(
        "blocks.waiting",
        "{block}",
        "Used blocks that are free when the last hold ends.",
        lambda now: now.stats.waiting_blocks,
    ),
    _gauge(
        "blocks.largest_run",
        "{block}",
        "Blocks of the longest run of free ones.",
        lambda now: now.stats.largest_free_run,
    ),
    _gauge(
        "fragmentation",
        "1",
        "Part of the free blocks outside the longest run.",
        lambda now: now.stats.fragmentation,
    ),
    _gauge(
        "promised",
        "1",
        "Part of what may be promised that is held or claimed, 0 without a bound.",
        lambda now: now.promised,
    ),
    _gauge(
        "blocks.used.peak",
        "{block}",
        "Most blocks held at once, since the start or the last reset of peaks.",
        lambda now: {"start": now.stats.peak_used_blocks, "reset": now.stats.recent_peak_used_blocks},
        "since",
    ),
    _gauge(
        "sequences.peak",
        "{sequence}",
        "Most sequences at once, since the start or the last reset of peaks.",
        lambda now: {"start": now.stats.peak_sequences, "reset": now.stats.recent_peak_sequences},
        "since",
    ),
    _gauge(
        "blocks.claimed.peak",
        "{block}",
        "Most blocks promised at once, since the start or the last reset of peaks.",
        lambda now: {"start": now.stats.peak_claimed_blocks, "reset": now.stats.recent_peak_claimed_blocks},
        "since",
    ),
    _gauge(
        "longest_pause_tokens",
        "{token}",
        "Most used tokens that one call has moved.",
        lambda now: now.stats.longest_pause_tokens,
    ),
    _counter(
        "admissions",
        "{sequence}",
        "Sequences that have begun, forks included.",
        lambda now: now.stats.admissions,
    ),
    _counter("frees", "{sequence}", "Sequences that have ended.", lambda now: now.stats.frees),
    _counter(
        "refusals",
        "{refusal}",
        "Requests that were answered with not now, by cause.",
        lambda now: {
            "arena_full": now.stats.refused_arena_full,
            "promises": now.stats.refused_promises,
            "growth": now.stats.refused_growth,
            "past_limit": now.stats.refused_past_limit,
        },
        "cause",
    ),
    _counter("moves", "{move}", "Runs moved to another place.", lambda now: now.stats.moves),
    _counter("moved_tokens", "{token}", "Used tokens in runs moved.", lambda now: now.stats.moved_tokens),
    _counter("moved", "By", "Bytes of used tokens moved.", lambda now: now.stats.moved_bytes),
    _counter(
        "copied_tokens",
        "{token}",
        "Tokens copied by forks, hits and copies on write.",
        lambda now: now.stats.copied_tokens,
    ),
    _counter(
        "moved_cached_tokens",
        "{token}",
        "Tokens of cached runs copied to another place.",
        lambda now: now.stats.moved_cached_tokens,
    ),
    _counter(
        "spills",
        "{spill}",
        "Times that a sequence was given blocks apart from its run.",
        lambda now: now.stats.spills,
    ),
    _counter(
        "heals",
        "{heal}",
        "Times that a scattered sequence became one run again.",
        lambda now: now.stats.heals,
    ),
    _counter(
        "arena_copies",
        "{copy}",
        "Times that MLX copied a plane where it should write in place.",
        lambda now: now.stats.arena_copies,
    ),
    _counter(
        "prefix.queries",
        "{query}",
        "Admissions whose prompt was given as ids.",
        lambda now: now.stats.queries,
    ),
    _counter(
        "prefix.query_tokens",
        "{token}",
        "Tokens of prompts that were given as ids.",
        lambda now: now.stats.query_tokens,
    ),
    _counter(
        "prefix.hit_tokens",
        "{token}",
        "Tokens of these prompts that were there, and need not be computed.",
        lambda now: now.stats.hit_tokens,
    ),
    _counter(
        "prefix.revived_tokens",
        "{token}",
        "Tokens of hits that were continued where they were, without a copy.",
        lambda now: now.stats.revived_tokens,
    ),
    _counter(
        "prefix.misses",
        "{query}",
        "Queries that found less than there could be, by cause.",
        lambda now: {
            "cold": now.stats.misses_cold,
            "evicted": now.stats.misses_evicted,
            "salted": now.stats.misses_salted,
            "partial": now.stats.misses_partial,
            "disabled": now.stats.misses_disabled,
        },
        "cause",
    ),
    _counter(
        "prefix.evictions",
        "{block}",
        "Cached blocks given away, by cause.",
        lambda now: {
            "room": now.stats.evictions_room,
            "quota": now.stats.evictions_quota,
            "duplicate": now.stats.evictions_duplicate,
            "cleared": now.stats.evictions_cleared,
        },
        "cause",
    ),
    _counter(
        "prefix.evicted_blocks",
        "{block}",
        "Cached blocks given away whose content is lost, whatever the cause.",
        lambda now: now.stats.evicted_blocks,
    ),
    _counter(
        "corrupt_chunks",
        "{chunk}",
        "Chunks that came back from a store as something else than what was put there.",
        lambda now: now.stats.corrupt_chunks,
    ),
    Metric(
        "kvcache.admission.duration",
        HISTOGRAM,
        "s",
        "Time until admission; what neither waited, moved nor copied is within the first bound, and 0 in the sum.",
        "",
        lambda now: (LATENCY_BOUNDS, now.stats.admission_latencies, now.stats.admission_seconds),
    ),
)

PROCESS_METRICS = (  # of the whole process: once, without a cache's label
    _gauge("mlx.active", "By", "MLX memory in use, arenas included.", lambda now: now.stats.mlx_active_bytes),
    _gauge("mlx.peak", "By", "Most MLX memory in use at once.", lambda now: now.stats.mlx_peak_bytes),
    _gauge("mlx.cache", "By", "MLX memory kept for reuse.", lambda now: now.stats.mlx_cache_bytes),
)


def _by_tenant(field):
    return lambda queue: {name: getattr(tenant, field) for name, tenant in queue.tenants.items()}


def _outcomes(granted, refused, failed):
    """Counts by tenant and outcome; the names are of fields of `TenantStats`, the last may be missing."""

    def values(queue):
        found = {}
        for name, tenant in queue.tenants.items():
            found[name, "granted"] = getattr(tenant, granted)
            if failed:
                found[name, "failed"] = getattr(tenant, failed)
            for reason, count in getattr(tenant, refused).items():
                found[name, reason] = count
        return found

    return values


QUEUE_METRICS = (
    _gauge(
        "queue.waiting",
        "{request}",
        "Requests that wait, growth included.",
        _by_tenant("waiting"),
        "tenant",
    ),
    _gauge(
        "queue.oldest_age",
        "s",
        "How long the first of those who wait has waited, 0 where nobody does.",
        _by_tenant("oldest_age"),
        "tenant",
    ),
    _gauge(
        "queue.warn_after",
        "s",
        "The age of the oldest that the queue is warned of.",
        lambda queue: float("inf") if queue.warn_after is None else queue.warn_after,
    ),
    _gauge(
        "queue.sequences",
        "{sequence}",
        "Live sequences that the queue has granted.",
        _by_tenant("sequences"),
        "tenant",
    ),
    _gauge("queue.blocks", "{block}", "Blocks of their limits.", _by_tenant("blocks"), "tenant"),
    _counter(
        "queue.requests",
        "{request}",
        "Newcomers, by what became of them.",
        _outcomes("granted", "refused", "failed"),
        ("tenant", "outcome"),
    ),
    _counter(
        "queue.growth",
        "{request}",
        "Appends that had no room at once, by what became of them.",
        _outcomes("grown", "growth_refused", None),
        ("tenant", "outcome"),
    ),
    _counter(
        "queue.evictions",
        "{sequence}",
        "Sequences that were ended to make room.",
        _by_tenant("evicted"),
        "tenant",
    ),
    _counter(
        "queue.swaps",
        "{sequence}",
        "Sequences that had to leave for a store to make room, by what became of them.",
        lambda queue: {
            (name, outcome): count
            for name, tenant in queue.tenants.items()
            for outcome, count in (("suspended", tenant.swapped), ("intact", tenant.swaps_failed))
        },
        ("tenant", "outcome"),
    ),
    _counter(
        "queue.returns",
        "{request}",
        "Suspended sequences that were to come back, by what became of them.",
        _outcomes("resumed", "resume_refused", None),
        ("tenant", "outcome"),
    ),
    Metric(
        "kvcache.queue.wait",
        HISTOGRAM,
        "s",
        "How long who was granted had waited; who was admitted at once counts as within the first bound.",
        "",
        lambda queue: (WAIT_BOUNDS, queue.waits, queue.wait_sum),
    ),
)
