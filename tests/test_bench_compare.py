"""What `make bench` decides: slower than the committed baseline, in units of the floors, or not."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def compare():
    pytest.importorskip("rich")
    spec = importlib.util.spec_from_file_location("compare", BENCH / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(tmp_path, times, call=10.0):
    """A file as pytest-benchmark writes it, with these nanoseconds by name."""
    benchmarks = [
        {
            "fullname": f"bench/test_append.py::test_{name}",
            "group": "append",
            "extra_info": {
                "median_ns": time,
                "least_ns": time,
                "steady_ns": time,
                "p99_ns": None,
                "turn_ns": 6.0,
                "call_ns": call,
                "floor": "empty call",
                "targets": {"median": 50.0},
            },
        }
        for name, time in times.items()
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"benchmarks": benchmarks, "machine_info": {"cpu": {"count": 2}}}))
    return path


def baseline_of(units):
    return {
        f"test_append.py::test_{name}": {"floor": "empty call", "units": value}
        for name, value in units.items()
    }


def test_more_than_1_3_times_the_floors_of_the_baseline_is_slower(compare, tmp_path):
    rows, _ = compare.read_results(report(tmp_path, {"one": 131.0, "two": 129.0}))
    assert compare.slower(rows, baseline_of({"one": 10.0, "two": 10.0})) == ["test_append.py::test_one"]


def test_a_slower_machine_is_not_a_slower_program(compare, tmp_path):
    rows, _ = compare.read_results(report(tmp_path, {"one": 300.0}, call=30.0))
    assert compare.slower(rows, baseline_of({"one": 10.0})) == []


def test_a_benchmark_that_the_baseline_does_not_know_is_not_slower(compare, tmp_path):
    rows, _ = compare.read_results(report(tmp_path, {"new": 1e6}))
    assert compare.slower(rows, baseline_of({"one": 10.0})) == []


def test_units_of_another_floor_are_not_compared(compare, tmp_path):
    rows, _ = compare.read_results(report(tmp_path, {"one": 1e6}))
    assert compare.slower(rows, {"test_append.py::test_one": {"floor": "memcpy", "units": 1.0}}) == []


def test_the_table_names_what_is_slower_and_what_misses_its_target(compare, tmp_path, capsys):
    rows, _ = compare.read_results(report(tmp_path, {"one": 140.0}))
    assert compare.show(rows, baseline_of({"one": 10.0})) == ["test_append.py::test_one"]
    printed = capsys.readouterr().out
    assert "slower: test_append.py::test_one takes 14 floors" in printed and "1.40 x" in printed
    assert re.search(r"one .*140 ns .*50 ns .*no", printed)


def test_a_baseline_that_has_been_written_is_met_by_its_own_run(compare, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    rows, machine = compare.read_results(report(tmp_path, {"one": 140.0, "floor[call]": 10.0}))
    compare.write_baseline(rows, machine)
    baseline = compare.read_baseline()
    assert list(baseline) == ["test_append.py::test_one"]
    assert compare.slower(rows, baseline) == []


def test_the_committed_baseline_knows_the_benchmarks_that_there_are(compare):
    functions = {
        f"{path.name}::{name}"
        for path in BENCH.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        if not name.startswith("test_floor")
    }
    assert {name.split("[")[0] for name in compare.read_baseline()} == functions


def test_the_tables_of_the_manual_are_those_of_the_baseline():
    done = subprocess.run([sys.executable, str(BENCH / "tables.py"), "--check"], check=False)
    assert done.returncode == 0
