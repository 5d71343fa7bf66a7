"""The dashboard's queries, evaluated over scrapes of a real collector: each panel has something to show."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kvcache import metrics
from kvcache.admission import AllocationQueue, Reject

prometheus_client = pytest.importorskip("prometheus_client")

DOCS = Path(__file__).parents[1] / "docs"
DASHBOARD = json.loads((DOCS / "grafana" / "kvcache.json").read_text())
VARIABLES = {"cache": "main", "__rate_interval": "60s"}


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


promql = loaded("promql")


class Samples:
    """A registry by hand: every list is one scrape of (name, labels, value)."""

    def __init__(self, *samples):
        self.samples = [prometheus_client.metrics_core.Metric("x", "", "gauge")]
        for name, labels, value in samples:
            self.samples[0].add_sample(name, labels, value)

    def collect(self):
        return self.samples


def scraped(*scrapes, every=10.0):
    made = promql.Scrapes()
    for number, samples in enumerate(scrapes):
        made.take(number * every, Samples(*samples))
    return made


def answer(text, scrapes, **variables):
    """Of the last scrape, by labels."""
    found = promql.Query(text, variables).evaluate(scrapes)
    return {labels: values[-1] for labels, values in found.items()} if isinstance(found, dict) else found


@pytest.fixture(scope="module")
def served():
    """Twelve scrapes of a cache with a queue, and traffic between them."""
    from kvcache import KVCache

    cache = KVCache(2, 2, 4, 64, 4)
    queue = AllocationQueue(cache, Reject(), name="chat")
    registry, scrapes = prometheus_client.CollectorRegistry(), promql.Scrapes()
    metrics.register(cache, "main", registry)
    for second in range(0, 180, 15):
        scrapes.take(second, registry)
        for number in range(4):
            if queue.allocate((second, number), [*range(9), *range(11)], tenant="t"):
                cache.commit((second, number))
        for request_id in list(cache):
            cache.free_for(request_id)
    cache.close()
    return scrapes


@pytest.mark.parametrize("panel", DASHBOARD["panels"], ids=lambda panel: panel["title"])
def test_every_query_of_a_panel_finds_series_whose_labels_its_legend_names(panel, served):
    for target in panel["targets"]:
        found = promql.Query(target["expr"], VARIABLES).evaluate(served)
        assert found, target["expr"]
        for labels, values in found.items():
            assert values.shape == (12,) and not np.isnan(values[-1])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= {name for name, _ in labels}


def test_what_the_panels_say_is_what_happened(served):
    begun = answer('rate(kvcache_admissions_total{cache=~"$cache"}[60s])', served, cache="main")
    assert list(begun.values()) == [3 * 4 / 60]
    outcomes = answer("sum by (outcome) (increase(kvcache_queue_requests_total[1h]))", served)
    assert {labels[0][1]: count for labels, count in outcomes.items() if count} == {
        "granted": 30,  # of 33: a series begins with its first sample
        "arena_full": 10,
    }


def test_the_hit_rate_is_of_tokens(served):
    (panel,) = [panel for panel in DASHBOARD["panels"] if panel["title"] == "Prefix hit rate"]
    now, hour = (answer(target["expr"], served, **VARIABLES) for target in panel["targets"])
    assert list(now.values()) == [16 / 20]  # four of the five blocks, in every query but the first
    assert list(hour.values()) == [32 * 16 / (33 * 20)]  # which is the first of 33


# ---- the language


def test_matchers_choose_series():
    scrapes = scraped([("m", {"a": "x", "b": "1"}, 1.0), ("m", {"a": "y"}, 2.0), ("n", {"a": "x"}, 3.0)])
    x, y = (("a", "x"), ("b", "1")), (("a", "y"),)
    assert answer("m", scrapes) == {x: 1.0, y: 2.0}
    assert (
        answer('m{a="x"}', scrapes)
        == answer('m{a=~"x|z"}', scrapes)
        == answer('m{b!=""}', scrapes)
        == {x: 1.0}
    )
    assert answer('m{a=~"$it", b=""}', scrapes, it=".*") == {y: 2.0}


def test_sums_keep_the_labels_they_are_told_to_keep():
    scrapes = scraped(
        [("m", {"a": "x", "b": "1"}, 1.0), ("m", {"a": "x", "b": "2"}, 2.0), ("m", {"a": "y"}, 4.0)]
    )
    assert answer("sum by (a) (m)", scrapes) == {(("a", "x"),): 3.0, (("a", "y"),): 4.0}
    assert answer("max by (a) (m)", scrapes) == {(("a", "x"),): 2.0, (("a", "y"),): 4.0}
    assert answer("sum(m)", scrapes) == {(): 7.0}


def test_arithmetic_is_between_series_of_equal_labels():
    scrapes = scraped([("m", {"a": "x"}, 6.0), ("n", {"a": "x"}, 4.0), ("n", {"a": "y"}, 4.0)])
    assert answer("1 - m / n", scrapes) == {(("a", "x"),): -0.5}
    assert answer("(m + n) * 2", scrapes) == {(("a", "x"),): 20.0}


def test_rates_survive_counters_that_begin_anew():
    scrapes = scraped(*[[("m", {}, value)] for value in (5.0, 8.0, 2.0, 3.0)])
    assert answer("increase(m[20s])", scrapes) == {(): 3.0}
    assert answer("rate(m[20s])", scrapes) == {(): 0.15}
    assert answer("increase(m[1h])", scrapes) == {(): 6.0}


def test_quantiles_are_linear_within_a_bucket():
    buckets = [("m", {"le": "1.0"}, 5.0), ("m", {"le": "2.0"}, 9.0), ("m", {"le": "+Inf"}, 10.0)]
    scrapes = scraped(buckets)
    assert answer("histogram_quantile(0.5, m)", scrapes) == {(): 1.0}
    assert answer("histogram_quantile(0.7, m)", scrapes) == {(): 1.5}
    assert answer("histogram_quantile(0.99, m)", scrapes) == {(): 2.0}
    assert np.isnan(answer("histogram_quantile(0.5, n)", scraped([("n", {"le": "+Inf"}, 0.0)]))[()])


@pytest.mark.parametrize("text", ["m[", "sum by (a) m", "m +", "m )", "m{a~'x'}", "rate(m)"])
def test_what_is_not_understood_is_an_error(text):
    with pytest.raises((ValueError, IndexError)):
        promql.Query(text, {}).evaluate(scraped([("m", {}, 1.0)]))
