"""Metrics of caches for Prometheus and OpenTelemetry: one table, read from `stats()` when somebody scrapes.

Names are OpenTelemetry's; Prometheus' follow from them by the rules that its exporters use, so that both give the
same series (but for the histogram, which OpenTelemetry cannot observe), and one dashboard serves both.
"""

import threading
import time
import weakref
from typing import NamedTuple

from kvcache.errors import CacheClosed
from kvcache.health import promised_part
from kvcache.stats import LATENCY_BOUNDS

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"
SUFFIXES = {"By": "_bytes", "s": "_seconds", "1": "_ratio"}  # of a Prometheus name, by unit
SAME_MOMENT = 0.05  # seconds that instruments of one OpenTelemetry collection see the same statistics


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
    label : str
        Name of the label that the samples differ in, empty for a single sample.
    values : callable
        From what is read to a number; with a label to a dictionary of them; of a histogram to (buckets, sum).
    """

    name: str
    kind: str
    unit: str
    help: str
    label: str
    values: object

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
    """What the rows of `METRICS` are given: the statistics, and how much of what may be promised is."""

    stats: object
    promised: float


METRICS = (
    _gauge("memory.arena", "By", "Size of the arena.", lambda now: now.stats.arena_bytes),
    _gauge("memory.used", "By", "Bytes of blocks that are held.", lambda now: now.stats.allocated_bytes),
    _gauge("memory.free", "By", "Bytes of blocks that nobody holds.", lambda now: now.stats.free_bytes),
    _gauge("sequences", "{sequence}", "Live sequences.", lambda now: now.stats.num_sequences),
    _gauge("blocks.arena", "{block}", "Blocks of the arena.", lambda now: now.stats.total_blocks),
    _gauge("blocks.used", "{block}", "Blocks that are held.", lambda now: now.stats.used_blocks),
    _gauge("blocks.free", "{block}", "Blocks that nobody holds.", lambda now: now.stats.free_blocks),
    _gauge(
        "blocks.cached",
        "{block}",
        "Free blocks whose content may be found again.",
        lambda now: now.stats.cached_blocks,
    ),
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
        "Tokens copied by forks and copies on write.",
        lambda now: now.stats.copied_tokens,
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
    Metric(
        "kvcache.admission.duration",
        HISTOGRAM,
        "s",
        "Time until admission; what neither waited nor moved counts as within the first bound, and 0 in the sum.",
        "",
        lambda now: (now.stats.admission_latencies, now.stats.admission_seconds),
    ),
)

PROCESS_METRICS = (  # of the whole process: once, without a cache's label
    _gauge("mlx.active", "By", "MLX memory in use, arenas included.", lambda now: now.stats.mlx_active_bytes),
    _gauge("mlx.peak", "By", "Most MLX memory in use at once.", lambda now: now.stats.mlx_peak_bytes),
    _gauge("mlx.cache", "By", "MLX memory kept for reuse.", lambda now: now.stats.mlx_cache_bytes),
)


class CacheMetrics:
    """The caches that are exported, each under a name. From any thread.

    A cache that has been closed, or forgotten, is skipped. The references to caches are weak.

    Parameters
    ----------
    clock : callable
        Seconds, never backwards; OpenTelemetry's instruments see one moment for a twentieth of one.

    Attributes
    ----------
    instrumented : bool
        Whether OpenTelemetry has instruments of it.
    """

    def __init__(self, clock=time.monotonic):
        self._caches = {}  # name -> weak reference
        self._further = []  # (rows, read): of what stands beside the caches
        self._lock = threading.Lock()
        self._clock = clock
        self._seen = None  # when OpenTelemetry looked, and what it saw
        self.instrumented = False

    def register(self, cache, name="default"):
        """Export a cache. A name that another live cache has is a `ValueError`."""
        with self._lock:
            there = self._caches.get(name, lambda: None)()
            if there is not None and there is not cache and not there.closed:
                raise ValueError(f"a cache named {name!r} is exported already")
            self._caches[name] = weakref.ref(cache)
            self._seen = None

    def unregister(self, name="default"):
        """No longer export a cache: True, or False where there is none of that name."""
        with self._lock:
            self._seen = None
            return self._caches.pop(name, None) is not None

    def extend(self, rows, read):
        """Export more than the caches: queues before them, for example. Before `instrument`, with OpenTelemetry.

        Parameters
        ----------
        rows : iterable of Metric
        read : callable
            Gives a dictionary: the value of the label ``cache``, and what the rows are to take their values from.
        """
        with self._lock:
            self._further.append((tuple(rows), read))

    def tables(self):
        """What is exported: of each table its rows, whether they have the label ``cache``, and what reads them."""
        yield METRICS, True, self.read
        yield PROCESS_METRICS, False, self.read
        for rows, read in tuple(self._further):
            yield rows, True, read

    def read(self):
        """Look at every cache, and for what an operator should hear of.

        Returns
        -------
        dict of str to Reading
        """
        with self._lock:
            there = {name: reference() for name, reference in self._caches.items()}
        found = {}
        for name, cache in there.items():
            try:
                if cache is not None:
                    stats = cache.stats()
                    found[name] = Reading(stats, promised_part(stats, cache.overcommit))
                    cache.check_health()
            except CacheClosed:
                continue
        return found

    def describe(self):
        """For a Prometheus registry: the families without samples."""
        return [_family(metric, of_cache) for rows, of_cache, _ in self.tables() for metric in rows]

    def collect(self):
        """For a Prometheus registry: the families, from one look at each cache."""
        caches = self.read()
        for rows, of_cache, read in self.tables():
            readings = caches if read == self.read else read()
            for metric in rows:
                family = _family(metric, of_cache)
                if of_cache:
                    for name, reading in readings.items():
                        _add(family, metric, (name,), metric.values(reading))
                elif readings:
                    _add(family, metric, (), metric.values(_of_process(readings)))
                yield family

    def moment(self):
        """What `read` gives, the same for all instruments of one collection."""
        now = self._clock()
        seen = self._seen
        if seen is None or now - seen[0] > SAME_MOMENT:
            self._seen = seen = now, self.read()
        return seen[1]


def _of_process(readings):
    """The reading that knows MLX's memory: with other backends it is 0."""
    return max(readings.values(), key=lambda reading: reading.stats.mlx_peak_bytes)


# ---- Prometheus


def _family(metric, of_cache):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds = {GAUGE: GaugeMetricFamily, COUNTER: CounterMetricFamily, HISTOGRAM: HistogramMetricFamily}
    labels = [*(("cache",) if of_cache else ()), *((metric.label,) if metric.label else ())]
    return kinds[metric.kind](metric.prometheus_name, metric.help, labels=labels)


def _add(family, metric, labels, values):
    if metric.kind == HISTOGRAM:
        counts, seconds = values
        family.add_metric(labels, buckets=list(_cumulative(counts)), sum_value=seconds)
    elif metric.label:
        for label, value in values.items():
            family.add_metric((*labels, label), value)
    else:
        family.add_metric(labels, values)


def _cumulative(counts):
    within = 0
    for bound, count in zip((*LATENCY_BOUNDS, float("inf")), counts, strict=True):
        within += count
        yield "+Inf" if bound == float("inf") else repr(bound), within


_exported = weakref.WeakKeyDictionary()  # registry -> CacheMetrics
_exporting = threading.Lock()


def register(cache, name="default", registry=None):
    """Export a cache to Prometheus. Needs ``prometheus_client``: ``pip install 'kvcache[metrics]'``.

    Parameters
    ----------
    cache : KVCache
    name : str
        The value of its label ``cache``.
    registry : prometheus_client.CollectorRegistry, optional
        By default the library's own.

    Returns
    -------
    CacheMetrics
        The collector of that registry.

    Raises
    ------
    ValueError
        Another live cache has this name.
    """
    from prometheus_client import REGISTRY

    registry = REGISTRY if registry is None else registry
    with _exporting:
        metrics = _exported.get(registry)
        if metrics is None:
            metrics = CacheMetrics()
            registry.register(metrics)
            _exported[registry] = metrics
    metrics.register(cache, name)
    return metrics


def unregister(name="default", registry=None):
    """No longer export the cache of that name: True, or False where there is none."""
    from prometheus_client import REGISTRY

    metrics = _exported.get(REGISTRY if registry is None else registry)
    return metrics is not None and metrics.unregister(name)


# ---- OpenTelemetry


def instrument(cache, name="default", meter_provider=None, metrics=None):
    """Export a cache through OpenTelemetry. Needs ``opentelemetry-api``: ``pip install 'kvcache[otel]'``.

    Every row of the table is an observable instrument. There is none for histograms: the buckets are a counter with
    the attribute ``le``, count and sum are counters beside it.

    Parameters
    ----------
    cache : KVCache
    name : str
        The value of the attribute ``cache``.
    meter_provider : opentelemetry.metrics.MeterProvider, optional
        By default the global one.
    metrics : CacheMetrics, optional
        What an earlier call returned, for the cache to join its instruments, or one that has been extended.

    Returns
    -------
    CacheMetrics
        `unregister` it with this name.
    """
    made = CacheMetrics() if metrics is None else metrics
    made.register(cache, name)
    if not made.instrumented:
        from opentelemetry.metrics import get_meter

        made.instrumented = True

        meter = get_meter("kvcache", meter_provider=meter_provider)
        for rows, of_cache, read in made.tables():
            look = made.moment if read == made.read else read
            for row in (row for metric in rows for row in _without_histograms(metric)):
                make = (
                    meter.create_observable_counter if row.kind == COUNTER else meter.create_observable_gauge
                )
                make(row.name, [_callback(look, row, of_cache)], unit=row.unit, description=row.help)
    return made


def _without_histograms(metric):
    if metric.kind != HISTOGRAM:
        return (metric,)
    return (
        metric._replace(
            name=f"{metric.name}.bucket",
            kind=COUNTER,
            unit="{sequence}",
            label="le",
            values=lambda now: dict(_cumulative(metric.values(now)[0])),
        ),
        metric._replace(
            name=f"{metric.name}.count",
            kind=COUNTER,
            unit="{sequence}",
            values=lambda now: sum(metric.values(now)[0]),
        ),
        metric._replace(name=f"{metric.name}.sum", kind=COUNTER, values=lambda now: metric.values(now)[1]),
    )


def _callback(look, metric, of_cache):
    def observe(_options):
        from opentelemetry.metrics import Observation

        readings = look()
        if not of_cache:
            readings = {"": _of_process(readings)} if readings else {}
        for name, reading in readings.items():
            own = {"cache": name} if of_cache else {}
            values = metric.values(reading)
            for label, value in values.items() if metric.label else (("", values),):
                yield Observation(value, own | ({metric.label: label} if metric.label else {}))

    return observe
