"""Metrics of caches for Prometheus and OpenTelemetry, read from `stats()` when somebody scrapes.

What is exported stands in one table, `kvcache.metric_table`; here is how it reaches either.
"""

import threading
import time
import weakref
from typing import NamedTuple

from kvcache.errors import CacheClosed
from kvcache.health import promised_part
from kvcache.metric_table import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    METRICS,
    PROCESS_METRICS,
    QUEUE_METRICS,
    SUFFIXES,
    Metric,
    Reading,
)

__all__ = [
    "COUNTER",
    "GAUGE",
    "HISTOGRAM",
    "METRICS",
    "PROCESS_METRICS",
    "QUEUE_METRICS",
    "SUFFIXES",
    "CacheMetrics",
    "Metric",
    "Reading",
    "instrument",
    "register",
    "unregister",
]

SAME_MOMENT = 0.05  # seconds that instruments of one OpenTelemetry collection see the same statistics


class Table(NamedTuple):
    """Rows that are exported together: their own labels, and what they are to be read from.

    `readings` is given what `CacheMetrics.read` gave; it returns what the rows take their values from, by the values
    of the labels.
    """

    rows: tuple
    labels: tuple
    readings: object


def _of_process(caches):
    """The reading that knows MLX's memory: with other backends it is 0."""
    if not caches:
        return {}
    return {(): max(caches.values(), key=lambda reading: reading.stats.mlx_peak_bytes)}


TABLES = (
    Table(METRICS, ("cache",), lambda caches: {(name,): reading for name, reading in caches.items()}),
    Table(PROCESS_METRICS, (), _of_process),
    Table(
        QUEUE_METRICS,
        ("cache", "queue"),
        lambda caches: {
            (name, queue.name): queue for name, reading in caches.items() for queue in reading.queues
        },
    ),
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
        """Export more than caches and their queues: what an engine counts itself. Before `instrument`.

        Parameters
        ----------
        rows : iterable of Metric
        read : callable
            Gives a dictionary: the value of the label ``cache``, and what the rows are to take their values from.
        """
        with self._lock:
            self._further.append((tuple(rows), read))

    def tables(self):
        """What is exported, table by table."""
        yield from TABLES
        for rows, read in tuple(self._further):
            yield Table(
                rows, ("cache",), lambda _, read=read: {(name,): each for name, each in read().items()}
            )

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
                    stats, queues = cache.stats(), tuple([queue.stats() for queue in cache.queues])
                    found[name] = Reading(stats, promised_part(stats, cache.overcommit), queues)
                    cache.check_health()
            except CacheClosed:
                continue
        return found

    def describe(self):
        """For a Prometheus registry: the families without samples."""
        return [_family(metric, table.labels) for table in self.tables() for metric in table.rows]

    def collect(self):
        """For a Prometheus registry: the families, from one look at each cache."""
        caches = self.read()
        for table in self.tables():
            readings = table.readings(caches)
            for metric in table.rows:
                family = _family(metric, table.labels)
                for own, reading in readings.items():
                    _add(family, metric, own, reading)
                yield family

    def moment(self):
        """What `read` gives, the same for all instruments of one collection."""
        now = self._clock()
        seen = self._seen
        if seen is None or now - seen[0] > SAME_MOMENT:
            self._seen = seen = now, self.read()
        return seen[1]


# ---- Prometheus


def _family(metric, own_labels):
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    kinds = {GAUGE: GaugeMetricFamily, COUNTER: CounterMetricFamily, HISTOGRAM: HistogramMetricFamily}
    return kinds[metric.kind](metric.prometheus_name, metric.help, labels=[*own_labels, *metric.labels])


def _add(family, metric, own, reading):
    if metric.kind == HISTOGRAM:
        bounds, counts, total = metric.values(reading)
        family.add_metric(own, buckets=list(_cumulative(bounds, counts)), sum_value=total)
        return
    for labels, value in metric.samples(reading):
        family.add_metric((*own, *labels), value)


def _cumulative(bounds, counts):
    within = 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
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
        for table in made.tables():
            for row in (row for metric in table.rows for row in _without_histograms(metric)):
                make = (
                    meter.create_observable_counter if row.kind == COUNTER else meter.create_observable_gauge
                )
                make(row.name, [_callback(made.moment, row, table)], unit=row.unit, description=row.help)
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
            values=lambda now: dict(_cumulative(*metric.values(now)[:2])),
        ),
        metric._replace(
            name=f"{metric.name}.count",
            kind=COUNTER,
            unit="{sequence}",
            values=lambda now: sum(metric.values(now)[1]),
        ),
        metric._replace(name=f"{metric.name}.sum", kind=COUNTER, values=lambda now: metric.values(now)[2]),
    )


def _callback(look, metric, table):
    def observe(_options):
        from opentelemetry.metrics import Observation

        for own, reading in table.readings(look()).items():
            fixed = dict(zip(table.labels, own, strict=True))
            for labels, value in metric.samples(reading):
                yield Observation(value, fixed | dict(zip(metric.labels, labels, strict=True)))

    return observe
