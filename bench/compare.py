"""Prints what a run of the benchmarks has found, and compares it with the committed baseline.

    python bench/compare.py RESULTS.json [--update]

Times differ from machine to machine, so the comparison is in units of the floors that the same run has
measured: a benchmark that takes more than 1.3 times the floors that it took in `baseline.json` makes the exit
status 1. Targets are shown beside the times and decide nothing. `--update` writes the baseline.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

BASELINE = Path(__file__).with_name("baseline.json")
TOLERANCE = 1.3
FLOORS = {"turn]": "an empty loop turn", "call]": "an empty native call"}
MACHINE = ("machine", "processor", "system", "python_version", "numpy", "mlx", "mlx-lm", "cython")


def read_results(path):
    """The benchmarks of a pytest-benchmark file, and the machine: ({name: row}, dict)."""
    report = json.loads(Path(path).read_text())
    rows = {}
    for each in report["benchmarks"]:
        if "median_ns" in each["extra_info"]:
            name = each["fullname"].split("/")[-1]
            rows[name] = {"group": each["group"], **each["extra_info"]}
    call = statistics.median([row["call_ns"] for row in rows.values()])
    for row in rows.values():
        row.setdefault("units", row["steady_ns"] / call)
    info = report["machine_info"]
    machine = {name: info.get(name) for name in MACHINE}
    machine["cpu"] = info.get("cpu", {}).get("brand_raw")
    machine["cores"] = info.get("cpu", {}).get("count")
    return rows, machine


def read_baseline():
    return json.loads(BASELINE.read_text(encoding="utf-8"))["benchmarks"] if BASELINE.exists() else {}


def is_floor(name):
    return "::test_floor" in name


def changes_of(rows, baseline):
    """How many times the baseline's floors each benchmark takes now."""
    return {
        name: row["units"] / baseline[name]["units"]
        for name, row in rows.items()
        if not is_floor(name) and baseline.get(name, {}).get("floor") == row["floor"]
    }


def slower(rows, baseline):
    """The benchmarks that are slower than the baseline allows."""
    return [name for name, change in changes_of(rows, baseline).items() if change > TOLERANCE]


def write_baseline(rows, machine):
    """What later runs are compared with (`units`), and what the manual shows."""
    benchmarks = {
        name: {
            "group": row["group"],
            "floor": row["floor"],
            "units": round(row["units"], 3),
            "turns": round(row["median_ns"] / row["turn_ns"], 1),
            "cells": [*cells_of(name, row), facts_of(row)],
        }
        for name, row in rows.items()
        if not is_floor(name)
    }
    floors = {}
    for floor in ("turn_ns", "call_ns"):
        floors[floor] = duration(statistics.median([row[floor] for row in rows.values()]))
    content = {"machine": machine, "floors": floors, "benchmarks": benchmarks}
    BASELINE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def duration(nanoseconds):
    """As a reader wants it: three digits and a unit."""
    for limit, unit, name in ((1e3, 1, "ns"), (1e6, 1e3, "µs"), (1e9, 1e6, "ms"), (1e30, 1e9, "s")):
        if nanoseconds < 0.9995 * limit:
            return f"{nanoseconds / unit:.3g} {name}"
    raise ValueError(f"{nanoseconds} ns is no duration")


def three_digits(number):
    return f"{number:.3g}" if number < 1000 else f"{float(f'{number:.3g}'):,.0f}"


def judged(row):
    """What a row has targets for: (text of the limit, whether it is met)."""
    for what, limit in row["targets"].items():
        yield f"{'p99 ' if what == 'p99' else ''}{duration(limit)}", row[f"{what}_ns"] <= limit
    for fact, value in row.get("facts", {}).items():
        if isinstance(value, list):
            yield f"{value[1]} {fact.replace('_', ' ')}", value[0] <= value[1]


def facts_of(row):
    found = []
    for fact, value in row.get("facts", {}).items():
        found.append(f"{fact.replace('_', ' ')} {value[0] if isinstance(value, list) else value:.3g}")
    return ", ".join(found)


def table_of(group, rows, changes):
    """One table for a group: floors first."""
    table = Table(title=group, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    for heading in ("", "median", "least", "p99", "in floors"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=bool(heading))
    for heading in ("at most", "met", "to baseline", "counted"):
        table.add_column(heading, justify="right" if heading == "to baseline" else "left")
    for name, row in sorted(rows.items(), key=lambda item: not is_floor(item[0])):
        cells = [escape(cell) for cell in cells_of(name, row)]
        table.add_row(*cells, change_cell(changes.get(name)), facts_of(row))
    return table


def cells_of(name, row):
    """What a table says of a benchmark: its case, times, floors, limits, and whether they are met."""
    limits = list(judged(row))
    return (
        FLOORS[name.split("[")[-1]] if is_floor(name) else name.split("::test_")[-1],
        duration(row["median_ns"]),
        duration(row["least_ns"]),
        duration(row["p99_ns"]) if row["p99_ns"] else "",
        "" if is_floor(name) else f"{three_digits(row['units'])} {row['floor']}",
        "\n".join(text for text, _ in limits),
        "\n".join("yes" if met else "no" for _, met in limits),
    )


def change_cell(change):
    if change is None:
        return ""
    return f"[red]{change:.2f} x[/]" if change > TOLERANCE else f"{change:.2f} x"


def show(rows, baseline, console=None):
    """Prints every group, and returns the benchmarks that are slower than the baseline allows."""
    console = console or Console(width=None if sys.stdout.isatty() else 170, highlight=False)
    changes = changes_of(rows, baseline)
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        console.print(table_of(group, {n: r for n, r in rows.items() if r["group"] == group}, changes), "")
    missing = [name for name in baseline if name not in rows]
    if missing:
        console.print(f"not run: {len(missing)} benchmarks of the baseline")
    bad = slower(rows, baseline)
    for name in bad:
        console.print(
            f"[red]slower[/]: {escape(name)} takes {three_digits(rows[name]['units'])} floors ({rows[name]['floor']}), "
            f"the baseline {three_digits(baseline[name]['units'])}: {changes[name]:.2f} x, allowed is {TOLERANCE} x"
        )
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--update", action="store_true", help="write the baseline")
    chosen = parser.parse_args()
    rows, machine = read_results(chosen.results)
    bad = show(rows, read_baseline())
    if chosen.update:
        write_baseline(rows, machine)
        return 0
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
