"""Measures serving with real bytes: moves beside attention, and one arena beside mlx-lm's own buffers.

    python bench/serving.py [--quick] [--json FILE] [--tokens N] [--steps N] [--only moves|mlx-lm]

Llama-3.2-1B's shape in float32, on the CPU. With `--quick` everything is small, and says nothing but that it runs.
Ratios are of times taken in turns in one run. What the manual shows is in `serving.json`; `tables.py` writes it there.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # threads that spin would only take turns with what is measured

import beside_attention
import beside_mlx_lm
import mlx.core as mx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from serving_tables import MLX_LM, MOVES, cells, machine_text
from traffic import Shape


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tokens: int = 32_768  # of the arena beside attention: 2 GiB
    layers: int = 16
    keep_free: tuple = (0.10, 0.05)
    steps: int = 1000
    every: int = 50  # steps, of which attention is computed in one
    cases: tuple = ((8, 16), (32, 8), (128, 2))  # live sequences, layers
    race_steps: int = 384
    attend_every: int = 32


QUICK = Size(
    tokens=8192,
    layers=2,
    keep_free=(0.10,),
    steps=40,
    every=20,
    cases=((3, 2),),
    race_steps=112,
    attend_every=28,
)


def moves_beside_attention(size, progress):
    """A row for each share that is kept free."""
    rows = []
    for keep_free in size.keep_free:
        task = progress.add_task(f"moves, {keep_free:.0%} kept free", total=size.steps)
        rows.append(
            beside_attention.measure(
                Shape(layers=size.layers),
                size.tokens,
                keep_free,
                size.steps,
                size.every,
                tell=lambda step, task=task: progress.update(task, completed=step + 1),
            )
        )
    return rows


def arena_beside_mlx_lm(size, progress):
    """A row for each number of live sequences."""
    rows = []
    for sequences, layers in size.cases:
        task = progress.add_task(f"mlx-lm, {sequences} sequences", total=size.race_steps)
        row = beside_mlx_lm.race(
            Shape(layers=layers),
            sequences,
            size.race_steps,
            size.attend_every,
            tell=lambda step, task=task: progress.update(task, completed=step + 1),
        )
        mx.clear_cache()
        for side in ("ours", "theirs"):
            found = peak_alone(side, sequences, layers, size.race_steps)
            row |= {f"{side}_{what}": value for what, value in found.items()}
        rows.append(row)
    return rows


def peak_alone(side, *numbers):
    """`beside_mlx_lm.peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", side, *map(str, numbers)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def table(title, columns, rows):
    made = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    headings, *shown = cells(columns, rows)
    for heading in headings:
        made.add_column(heading, justify="right")
    for row in shown:
        made.add_row(*row)
    return made


def machine():
    """What the figures depend on, and nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    found = {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count()}
    return found | {name: version(name) for name in ("numpy", "mlx", "mlx-lm")}


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="small: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found")
    parser.add_argument(
        "--only", choices=("moves", "mlx-lm"), help="one of the two parts; the other stays in the file"
    )
    parser.add_argument("--tokens", type=int, help="of the arena beside attention (default: 32768, 2 GiB)")
    parser.add_argument("--steps", type=int, help="that are measured beside attention (default: 1000)")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def sized(chosen):
    size = QUICK if chosen.quick else Size()
    given = {name: getattr(chosen, name) for name in ("tokens", "steps") if getattr(chosen, name)}
    return Size(**{**asdict(size), **given})


def main():
    chosen = parsed()
    if chosen.peak:
        side, (sequences, layers, steps) = chosen.peak[0], map(int, chosen.peak[1:])
        print(json.dumps(beside_mlx_lm.peak(side, Shape(layers=layers), sequences, steps)))
        return
    size, found = sized(chosen), {"machine": machine()}
    with mx.stream(mx.cpu), Progress(console=Console(stderr=True), transient=True) as progress:
        if chosen.only != "mlx-lm":
            found["moves"] = moves_beside_attention(size, progress)
        if chosen.only != "moves":
            found["mlx_lm"] = arena_beside_mlx_lm(size, progress)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(machine_text(found["machine"]), "")
    for part, title, columns in (
        ("moves", "What moves cost beside attention", MOVES),
        ("mlx_lm", "Beside mlx-lm's own buffers", MLX_LM),
    ):
        if part in found:
            console.print(table(title, columns, found[part]), "")
    if chosen.json:
        kept = json.loads(chosen.json.read_text()) if chosen.only and chosen.json.exists() else {}
        chosen.json.write_text(json.dumps(kept | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
