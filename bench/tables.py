"""Writes the tables of docs/performance.md from what was measured last: `baseline.json` and `serving.json`.

    python bench/tables.py [--check]

A table stands between a line ``<!-- measured: its group -->`` and ``<!-- end -->``; so do the machine and the
peers. With `--check` nothing is written, and tables that differ make the exit status 1.
"""

import json
import re
import sys
from pathlib import Path

import serving_tables
from compare import BASELINE, three_digits

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
SERVING = BASELINE.with_name("serving.json")
SECTION = re.compile(r"(<!-- measured: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
HEADINGS = ("", "median", "least", "p99", "in floors", "at most", "met", "counted")

# Peers' medians in turns of an empty Python loop, from one run of all of them (one turn told at 31 ns).
PEER_NAMES = ("best doing the whole of it", "vLLM 0.33", "nano-vllm", "vllm-mlx 0.6")
PEERS = {
    "a decode step of 1,024": (
        (
            "test_batch.py::test_append[spread-1024-contiguous]",
            "test_batch.py::test_append[spread-1024-paged]",
        ),
        (
            "1,260, SGLang 0.5.23's allocator alone; 4,290 with its bookkeeping",
            "165,000",
            "28,100",
            "2,900 *",
        ),
    ),
    "the same at 95 % with turnover": (
        (
            "test_batch.py::test_append_after_turnover[unknown-contiguous]",
            "test_batch.py::test_append_after_turnover[unknown-paged]",
        ),
        ("6,680, SGLang", "161,000", "41,600", "15,500 *"),
    ),
    "append one token by id": (
        ("test_append.py::test_append_token[contiguous]", "test_append.py::test_append_token[paged]"),
        ("24, nano-vllm with hashing; 6 to 8 without", "158", "24", "4 to 14 *"),
    ),
    "free and allocate a prompt, 65,536 blocks": (
        (
            "test_admission.py::test_one_replaces_another[contiguous-65536]",
            "test_admission.py::test_one_replaces_another[paged-65536]",
        ),
        ("613, SGLang's allocator alone, and vLLM without caching", "4,320", "3,190", "1,190"),
    ),
    "the same, 1 M blocks": (
        (
            "test_admission.py::test_one_replaces_another[contiguous-1048576]",
            "test_admission.py::test_one_replaces_another[paged-1048576]",
        ),
        ("613, vLLM without caching", "not run", "2,390", "1,030"),
    ),
    "make a manager of 1 M blocks": (
        (
            "test_construction.py::test_construction[contiguous-with_prefixes]",
            "test_construction.py::test_construction[paged-with_prefixes]",
        ),
        ("38,700, mini-sglang: a free list", "35,500,000", "41,900,000", "48,400,000"),
    ),
}


def table(group, benchmarks):
    """Markdown, without the columns that are empty throughout."""
    rows = [each["cells"] for each in benchmarks.values() if each["group"] == group]
    if not rows:
        raise ValueError(f"the baseline has no group {group!r}")
    shown = [column for column in range(len(HEADINGS)) if any(row[column] for row in rows)]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *[[f"`{row[0]}`", *row[1:]] for row in rows]]
    cells = [[line[column].replace("\n", ", ") for column in shown] for line in lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def page_of(text, baseline):
    """The page with its tables made anew."""

    def section(found):
        group = found[2]
        special = {
            "machine": machine,
            "peers": peers,
            "moves beside attention": lambda _: serving("moves", serving_tables.MOVES),
            "the arena beside mlx-lm": lambda _: serving("mlx_lm", serving_tables.MLX_LM),
            "serving": lambda _: (
                serving_tables.machine_text(json.loads(SERVING.read_text())["machine"]) + "\n"
            ),
        }.get(group)
        return found[1] + (special(baseline) if special else table(group, baseline["benchmarks"])) + found[3]

    return SECTION.sub(section, text)


def serving(part, columns):
    headings, *rows = serving_tables.cells(columns, json.loads(SERVING.read_text(encoding="utf-8"))[part])
    lines = [headings, ["---:"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def machine(baseline):
    about, floors = baseline["machine"], baseline["floors"]
    packages = ", ".join(
        f"{name} {about[name]}" for name in ("numpy", "mlx", "mlx-lm", "cython") if about[name]
    )
    return (
        f"{about['cpu']}, {about['cores']} cores, {about['system']} {about['machine']}, "
        f"Python {about['python_version']}, {packages}. "
        f"One turn of an empty loop over a list took {floors['turn_ns']}, "
        f"one empty native call {floors['call_ns']} beyond its turn.\n"
    )


def peers(baseline):
    """Everybody in turns of an empty Python loop: ours are of the cheapest kind, one over a list."""
    rows = [("in turns", "contiguous", "paged", *PEER_NAMES), ("---",) * (3 + len(PEER_NAMES))]
    for work, (ours, theirs) in PEERS.items():
        turns = [three_digits(baseline["benchmarks"][name]["turns"]) for name in ours]
        rows.append((work, *turns, *theirs))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main():
    before = PAGE.read_text(encoding="utf-8")
    after = page_of(before, json.loads(BASELINE.read_text(encoding="utf-8")))
    if "--check" in sys.argv:
        return before != after
    PAGE.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
