"""What Prometheus and OpenTelemetry are told: one table, read when somebody scrapes."""

import gc
import json
import re
import threading
from pathlib import Path

import pytest

from kvcache import metrics
from kvcache.admission import AllocationQueue, Reject, Wait
from kvcache.metrics import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    METRICS,
    PROCESS_METRICS,
    QUEUE_METRICS,
    SUFFIXES,
    CacheMetrics,
    Metric,
    Reading,
)
from kvcache.stats import CacheStats
from kvcache.store_memory import MemoryStore

prometheus_client = pytest.importorskip("prometheus_client")

DOCS = Path(__file__).parents[1] / "docs"
EVERY = (*METRICS, *PROCESS_METRICS, *QUEUE_METRICS)


@pytest.fixture
def registry():
    return prometheus_client.CollectorRegistry()


def scraped(registry):
    """Every sample: (name, labels) -> value."""
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def exported_names():
    """Every name that a query may use."""
    for metric in EVERY:
        if metric.kind == HISTOGRAM:
            yield from (f"{metric.prometheus_name}_{part}" for part in ("bucket", "count", "sum"))
        else:
            yield metric.prometheus_name


# ---- Prometheus


def test_a_scrape_says_what_stats_says(make_cache, registry):
    cache = make_cache()
    cache.allocate_for("a", 9, max_tokens=20)
    assert cache.allocate_for("b", 60) is None
    metrics.register(cache, "main", registry)
    seen = scraped(registry)
    label = ("cache", "main")
    assert seen["kvcache_blocks_used", label] == 3
    assert seen["kvcache_blocks_claimed", label] == 2
    assert seen["kvcache_memory_used_bytes", label] == cache.total_allocated
    assert seen["kvcache_refusals_total", label, ("cause", "arena_full")] == 1
    assert seen["kvcache_admissions_total", label] == 1
    assert seen["kvcache_promised_ratio", label] == 5 / 16
    assert seen["kvcache_mlx_active_bytes",] == 0


def test_a_scrape_tells_what_came_of_prompts_given_as_ids(make_cache, registry):
    cache = make_cache()
    for name in ("first", "again"):
        cache.allocate_for(name, [*range(13), ord(name[0])])
        cache.commit(name)
        cache.free_for(name)
    cache.allocate_for("short", [7, 8])  # no whole block to look for
    cache.pin("short")
    cache.pin(tokens=range(8))
    metrics.register(cache, "main", registry)
    seen = scraped(registry)
    label = ("cache", "main")
    told = {name: seen[f"kvcache_prefix_{name}_total", label] for name in ("queries", "query_tokens")}
    assert told == {"queries": 3, "query_tokens": 14 + 14 + 2}
    assert seen["kvcache_prefix_hit_tokens_total", label] == 12
    assert seen["kvcache_blocks_pinned", label] == 2
    assert seen["kvcache_blocks_cached", label] == 1
    causes = {
        key[2][1]: value
        for key, value in seen.items()
        if key[0] == "kvcache_prefix_misses_total" and key[1] == label
    }
    assert causes == {"cold": 1, "evicted": 0, "salted": 0, "partial": 1, "disabled": 0}


def test_a_scrape_tells_of_evictions_by_cause(make_cache, registry):
    cache = make_cache()
    cache.allocate_for("a", list(range(30)))
    cache.commit("a")
    cache.free_for("a")
    cache.allocate_for("b", 48)  # needs five of the seven blocks that are cached, seven are free
    cache.clear_prefix_cache()
    metrics.register(cache, "main", registry)
    seen = scraped(registry)
    label = ("cache", "main")
    causes = ("room", "quota", "duplicate", "cleared")
    counts = [seen["kvcache_prefix_evictions_total", label, ("cause", cause)] for cause in causes]
    assert counts == [3, 0, 0, 4]
    assert seen["kvcache_prefix_evicted_blocks_total", label] == 7


class Altering(MemoryStore):
    """A store in which a bit of what was put there turns over."""

    def get(self, keys, buffers, *, timeout):
        job = super().get(keys, buffers, timeout=timeout)
        buffers[0][len(buffers[0]) // 2] ^= 1
        return job


def test_a_scrape_tells_of_suspended_sequences_and_chunks_that_came_back_wrong(make_cache, registry):
    cache = make_cache()
    metrics.register(cache, "main", registry)
    cache.allocate_for("a", 20)
    assert cache.suspend("a", Altering(1 << 20, 1 << 16)).wait(30)
    label = ("cache", "main")
    seen = scraped(registry)
    assert seen["kvcache_sequences_suspended", label] == 1
    assert seen["kvcache_sequences", label] == seen["kvcache_corrupt_chunks_total", label] == 0
    assert cache.resume("a").wait(30)
    seen = scraped(registry)
    assert seen["kvcache_sequences_suspended", label] == seen["kvcache_corrupt_chunks_total", label] == 1


def test_the_latencies_are_a_histogram_that_sums_up(make_cache, registry):
    cache = make_cache()
    for number in range(16):
        cache.allocate_for(number, 4)
    for number in range(0, 16, 2):
        cache.free_for(number)
    cache.allocate_for("large", 32)  # moves the others
    metrics.register(cache, "main", registry)
    seen = scraped(registry)
    name, label = "kvcache_admission_duration_seconds", ("cache", "main")
    buckets = [value for key, value in seen.items() if key[0] == f"{name}_bucket"]
    assert buckets == sorted(buckets) and len(buckets) == 13
    assert seen[f"{name}_bucket", label, ("le", "+Inf")] == seen[f"{name}_count", label] == 17
    assert seen[f"{name}_sum", label] == cache.stats().admission_seconds > 0


def test_two_caches_have_a_label_each(make_cache, registry):
    one, other = make_cache(), make_cache()
    one.allocate_for("a", 4)
    assert metrics.register(one, "one", registry) is metrics.register(other, "other", registry)
    seen = scraped(registry)
    assert seen["kvcache_sequences", ("cache", "one")] == 1
    assert seen["kvcache_sequences", ("cache", "other")] == 0


def test_a_name_that_is_taken_is_refused_until_its_cache_is_closed(make_cache, registry):
    one, other = make_cache(), make_cache()
    metrics.register(one, "main", registry)
    metrics.register(one, "main", registry)
    with pytest.raises(ValueError, match="'main' is exported already"):
        metrics.register(other, "main", registry)
    one.close()
    metrics.register(other, "main", registry)
    assert ("kvcache_sequences", ("cache", "main")) in scraped(registry)


def test_a_closed_cache_is_skipped(make_cache, registry):
    cache, other = make_cache(), make_cache()
    metrics.register(cache, "main", registry)
    metrics.register(other, "other", registry)
    cache.close()
    assert {key[1] for key in scraped(registry) if len(key) > 1} == {("cache", "other")}


def test_nothing_is_left_when_all_are_closed(make_cache, registry):
    cache = make_cache()
    metrics.register(cache, "main", registry)
    cache.close()
    assert scraped(registry) == {}


def test_a_cache_that_is_no_longer_exported_is_gone(make_cache, registry):
    cache = make_cache()
    metrics.register(cache, "main", registry)
    assert metrics.unregister("main", registry)
    assert not metrics.unregister("main", registry)
    assert scraped(registry) == {}


def test_exporting_a_cache_does_not_keep_it(registry):
    from kvcache import KVCache

    metrics.register(KVCache(2, 2, 4, 64, 4), "main", registry)
    gc.collect()
    assert scraped(registry) == {}


def test_the_text_is_what_a_server_sends(make_cache, registry):
    from prometheus_client.parser import text_string_to_metric_families

    cache = make_cache()
    AllocationQueue(cache)
    metrics.register(cache, "main", registry)
    text = prometheus_client.generate_latest(registry).decode()
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    for metric in EVERY:
        assert kinds[metric.prometheus_name.removesuffix("_total")] == metric.kind


def test_scraping_while_others_work_is_safe(make_cache, registry):
    cache = make_cache()
    metrics.register(cache, "main", registry)
    wrong, done = [], threading.Event()

    def scrape():
        while not done.is_set():
            seen = scraped(registry)
            label = ("cache", "main")
            if seen["kvcache_blocks_used", label] + seen["kvcache_blocks_free", label] != 16:
                wrong.append(seen)

    thread = threading.Thread(target=scrape)
    thread.start()
    for _ in range(2000):
        cache.allocate_for("a", 20)
        cache.free_for("a")
    done.set()
    thread.join()
    assert wrong == []


def test_queues_and_the_like_may_stand_beside_the_caches(make_cache, registry, telemetry):
    provider, collect = telemetry
    rows = [Metric("kvcache.queue.length", GAUGE, "{request}", "Requests that wait.", "", lambda now: now)]
    metrics.register(make_cache(), "main", registry).extend(rows, lambda: {"main": 7})
    assert scraped(registry)["kvcache_queue_length", ("cache", "main")] == 7
    exported = CacheMetrics()
    exported.extend(rows, lambda: {"main": 8})
    metrics.instrument(make_cache(), "main", provider, exported)
    assert collect()["kvcache.queue.length", ("cache", "main")] == 8


# ---- queues


@pytest.fixture
def waited_for(make_cache):
    """A cache of which "t" has all, with two queues; in the first a thread waits, and somebody was refused."""
    cache = make_cache()
    now = [0.0]
    queue = AllocationQueue(cache, Wait(), name="chat", warn_after=20.0, clock=lambda: now[0])
    AllocationQueue(cache, name="batch", warn_after=None)
    lease = queue.allocate("a", 60, tenant="t")
    thread = threading.Thread(target=lambda: queue.allocate("b", 8))
    thread.start()
    while not len(queue):
        pass
    now[0] = 7.5
    queue.allocate("c", 20, strategy=Reject())
    yield cache
    lease.free()
    thread.join(30)
    assert cache.free_for("b")


def test_queues_are_told_by_cache_queue_and_tenant(waited_for, registry):
    metrics.register(waited_for, "main", registry)
    seen = scraped(registry)
    chat, batch = (("cache", "main"), ("queue", "chat")), (("cache", "main"), ("queue", "batch"))
    nobody, tenant = ("tenant", ""), ("tenant", "t")
    assert seen[("kvcache_queue_waiting", *chat, nobody)] == 1
    assert (
        seen[("kvcache_queue_waiting", *chat, tenant)] == seen[("kvcache_queue_waiting", *batch, nobody)] == 0
    )
    assert seen[("kvcache_queue_oldest_age_seconds", *chat, nobody)] == 7.5
    assert seen[("kvcache_queue_warn_after_seconds", *chat)] == 20.0
    assert seen[("kvcache_queue_warn_after_seconds", *batch)] == float("inf")
    assert seen[("kvcache_queue_blocks", *chat, tenant)] == 15
    outcomes = {
        key[2]: value
        for key, value in seen.items()
        if key[0] == "kvcache_queue_requests_total" and chat[1] in key and nobody in key and value
    }
    assert outcomes == {("outcome", "arena_full"): 1}
    assert seen["kvcache_queue_requests_total", chat[0], ("outcome", "granted"), chat[1], tenant] == 1
    assert seen["kvcache_queue_wait_seconds_bucket", chat[0], ("le", "0.001"), chat[1]] == 1


def test_a_queue_that_is_closed_is_no_longer_told_of(make_cache, registry):
    cache = make_cache()
    metrics.register(cache, "main", registry)
    queue = AllocationQueue(cache)
    assert ("kvcache_queue_waiting", ("cache", "main"), ("queue", "default"), ("tenant", "")) in scraped(
        registry
    )
    queue.close()
    assert not [key for key in scraped(registry) if key[0].startswith("kvcache_queue")]


# ---- what is exported

ELSEWHERE = {  # fields of CacheStats that no row reads
    "waiting_requests": "kvcache.queue.waiting tells it of each queue and tenant",
    "oldest_wait": "kvcache.queue.oldest_age tells it of each queue and tenant",
}


class Noting:
    """Statistics that know which of their fields have been read."""

    def __init__(self, stats):
        self.stats, self.read = stats, []

    def __getattr__(self, field):
        self.read.append(field)
        return getattr(self.stats, field)


def test_every_statistic_is_exported_by_one_row(make_cache):
    noting = Noting(make_cache().stats())
    for metric in (*METRICS, *PROCESS_METRICS):
        metric.values(Reading(noting, promised=0.0))
    assert sorted([*noting.read, *ELSEWHERE]) == sorted(CacheStats._fields)


@pytest.mark.parametrize(
    "name, kind",
    [("refusals", "refused"), ("prefix.misses", "misses"), ("prefix.evictions", "evictions")],
)
def test_each_cause_has_the_statistic_of_that_cause(make_cache, name, kind):
    noting = Noting(make_cache().stats())
    metric = next(metric for metric in METRICS if metric.name == f"kvcache.{name}")
    causes = list(metric.values(Reading(noting, promised=0.0)))
    assert noting.read == [f"{kind}_{cause}" for cause in causes]


# ---- names


def test_names_and_units_follow_the_conventions():
    names = [metric.prometheus_name for metric in EVERY]
    assert len(set(names)) == len(names)
    for metric in EVERY:
        name = metric.prometheus_name
        assert re.fullmatch(r"kvcache_[a-z_]+[a-z]", name)
        assert name.endswith("_total") == (metric.kind == COUNTER)
        assert SUFFIXES.get(metric.unit, "") in name
        assert metric.help.endswith(".") and metric.kind in (GAUGE, COUNTER, HISTOGRAM)
        assert metric.unit in SUFFIXES or re.fullmatch(r"\{[a-z]+\}", metric.unit)


def test_every_metric_is_in_the_manual():
    page = (DOCS / "monitoring.md").read_text()
    listed = set(re.findall(r"^\| `(kvcache_\w+)`", page, re.MULTILINE))
    assert listed == {metric.prometheus_name for metric in EVERY}


def test_every_query_of_the_dashboard_names_exported_metrics():
    dashboard = json.loads((DOCS / "grafana" / "kvcache.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if "query" in variable
        and isinstance(variable["query"], dict)
    ]  # fmt: skip
    assert len(queries) > 15
    names = set(exported_names())
    for query in queries:
        used = set(re.findall(r"\bkvcache_\w+", query))
        assert used and used <= names, query


def test_every_alert_of_the_manual_names_exported_metrics():
    page = (DOCS / "monitoring.md").read_text()
    (alerts,) = re.findall(r"### Alerts to begin with\n\n```text\n(.*?)```", page, re.DOTALL)
    used = set(re.findall(r"\bkvcache_\w+", alerts))
    assert (
        {"kvcache_prefix_hit_tokens_total", "kvcache_corrupt_chunks_total"} <= used <= set(exported_names())
    )


def test_panels_of_the_dashboard_do_not_overlap():
    dashboard = json.loads((DOCS / "grafana" / "kvcache.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# ---- OpenTelemetry


@pytest.fixture
def telemetry():
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    provider = sdk.MeterProvider([reader], shutdown_on_exit=False)

    def collect():
        """Every point: (name, attributes) -> value."""
        data = reader.get_metrics_data()
        scopes = data.resource_metrics[0].scope_metrics if data else ()
        return {
            (metric.name, *sorted(point.attributes.items())): point.value
            for scope in scopes
            for metric in scope.metrics
            for point in metric.data.data_points
        }

    yield provider, collect
    provider.shutdown()


def test_opentelemetry_is_told_the_same(make_cache, registry, telemetry):
    provider, collect = telemetry
    cache = make_cache()
    cache.allocate_for("a", list(range(9)), max_tokens=20)
    cache.commit("a")
    cache.pin("a")
    queue = AllocationQueue(cache)
    queue.allocate("b", 9, tenant="t")
    queue.allocate("c", 60)
    metrics.register(cache, "main", registry)
    metrics.instrument(cache, "main", provider)
    points, samples = collect(), scraped(registry)
    for metric in (*METRICS, *QUEUE_METRICS):
        if metric.kind != HISTOGRAM:
            told = {key[1:]: value for key, value in points.items() if key[0] == metric.name}
            assert told and told == {
                key[1:]: value for key, value in samples.items() if key[0] == metric.prometheus_name
            }
    name, label = "kvcache.admission.duration", ("cache", "main")
    assert points["kvcache.prefix.misses", label, ("cause", "cold")] == 1
    assert points["kvcache.blocks.pinned", label] == 2
    assert points[f"{name}.bucket", label, ("le", "1e-06")] == points[f"{name}.count", label] == 2
    name, labels = "kvcache.queue.wait", (label, ("queue", "default"))
    assert (
        points[(f"{name}.count", *labels)] == points[f"{name}.bucket", label, ("le", "0.001"), labels[1]] == 1
    )


def test_opentelemetry_skips_a_closed_cache_and_takes_a_second(make_cache, telemetry):
    provider, collect = telemetry
    one, other = make_cache(), make_cache()
    exported = metrics.instrument(one, "one", provider)
    assert metrics.instrument(other, "other", provider, metrics=exported) is exported
    assert {value for key in collect() for name, value in key[1:] if name == "cache"} == {"one", "other"}
    one.close()
    exported.unregister("other")
    assert collect() == {}


def test_instruments_of_one_collection_see_one_moment(make_cache):
    cache = make_cache()
    now = [0.0]
    exported = CacheMetrics(clock=lambda: now[0])
    exported.register(cache, "main")
    seen = exported.moment()
    cache.allocate_for("a", 4)
    assert exported.moment() is seen
    now[0] = 1.0
    assert exported.moment()["main"].stats.num_sequences == 1
