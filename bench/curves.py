"""Replays published traces through the shipped policy, and writes the tables of docs/performance.md from it.

    python bench/curves.py FOLDER [--jobs N] [--write]

FOLDER has the traces that are named below, as they were published. The figures depend on traces and policy, not on
the machine. Without `--write` they are printed.
"""

import argparse
import math
import re
import sys
from pathlib import Path

from rich.progress import Progress
from tables import PAGE

from kvcache.replay import Settings
from kvcache.replay_sweep import cells_of, record_of, sweep
from kvcache.traces import read_trace

TRACES = {
    "Azure conversation": "azure_2023_conv.csv.gz",
    "Azure code": "azure_2023_code.csv.gz",
    "Mooncake conversation": "mooncake_conversation.jsonl.gz",
}
SECTION = re.compile(r"(<!-- traffic: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
COMMON = Settings(max_requests=4000, max_share=0.25)
POOLS = [262144, 32768]
KEEP_FREE = [0.02, 0.05, 0.1, 0.15, 0.2]
BLOCKS = [8, 16, 32, 64]
PLACEMENTS = ["contiguous", "paged", "reserve", "buddy"]
LENGTHS = {"unknown": {}, "known": {"max_tokens_known": True, "overcommit": math.inf}}


def groups():
    """The cells of each table."""
    curves = {
        f"curve, lengths {name}": [
            Settings(**vars(cell) | told) for cell in cells_of(COMMON, pool_tokens=POOLS, keep_free=KEEP_FREE)
        ]
        for name, told in LENGTHS.items()
    }
    return {
        **curves,
        "block sizes": cells_of(COMMON, keep_free=[0.05, 0.1], block_size=BLOCKS),
        "placements": cells_of(COMMON, pool_tokens=POOLS, placement=PLACEMENTS),
    }


def measure(folder, jobs):
    """Records of every group: {group: {trace: [record of each cell]}}."""
    found = {group: {} for group in groups()}
    with Progress(transient=True) as progress:
        task = progress.add_task("replaying", total=len(TRACES) * sum(map(len, groups().values())))
        for name, file in TRACES.items():
            trace = read_trace(folder / file)
            for group, cells in groups().items():
                records = []
                for settings, figures in zip(cells, sweep(trace, cells, jobs), strict=True):
                    records.append(record_of(trace, settings, figures))
                    progress.advance(task)
                found[group][name] = records
    return found


def table(group, found):
    """Markdown: a row for each cell, a column or two for each trace."""
    columns = {"placements": ("at once", "of the pool", "unused of what is held")}
    titles = columns.get(group, ("of the pool", "moved"))
    heads = [f"{trace}: {title}" for trace in found for title in titles]
    lines = [["pool tokens", label_of(group), *heads], ["---"] * (2 + len(heads))]
    for cells in zip(*found.values(), strict=True):
        row = [f"{cells[0]['pool_tokens']:,}", label(group, cells[0])]
        for cell in cells:
            row += figures_of(group, cell)
        lines.append(row)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def label_of(group):
    return {"block sizes": "block, kept free", "placements": "placement"}.get(group, "kept free")


def label(group, cell):
    kept = percent(cell["keep_free"], 0)
    shown = {"block sizes": f"{cell['block_size']}, {kept}", "placements": cell["placement"]}
    return shown.get(group, kept)


def figures_of(group, cell):
    used = percent(cell["utilization"], 1)
    if group == "placements":
        return f"{cell['mean_sequences']:.1f}", used, percent(cell["internal_waste"], 1)
    return used, percent(cell["moved_over_attended"], 2)


def percent(share, digits):
    return f"{100 * share:.{digits}f} %"


def page_of(text, found):
    """The page with its tables made anew."""
    return SECTION.sub(lambda section: section[1] + table(section[2], found[section[2]]) + section[3], text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=None)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.folder, arguments.jobs)
    if not arguments.write:
        for group in found:
            print(f"{group}\n\n{table(group, found[group])}")
        return 0
    PAGE.write_text(page_of(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
