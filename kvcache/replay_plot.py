"""What a person would rather look at than read: a replay over time, or the curve of a sweep. Needs matplotlib."""

import html
import io
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from kvcache.block_map import CACHED, FREE, GROUNDS, KEPT
from kvcache.replay_view import caption_of, facts_of, sweep_rows

STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.hashsalt": "kvcache",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}
BLUE, GREEN, GREY, RED = "#2b6cb0", "#2f855a", "#718096", "#c53030"
COLOURS = {"contiguous": BLUE, "paged": GREEN, "buddy": RED, "reserve": "#b7791f"}
PALETTE = (BLUE, GREEN, RED, "#b7791f", "#6b46c1", GREY)
MARKERS = "osD^vPX*"
CROWDED = 40  # live sequences: more are seen in a close-up
LEAST_LABELLED = 0.002  # moved over attended
NOBODY = {FREE: GROUNDS[False], CACHED: KEPT[False]}
TONES = ((0.48, 0.84), (0.28, 0.97), (0.58, 0.66), (0.38, 0.92))  # saturation and value

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 1200px; padding: 0 1rem }}
h1 {{ font-size: 1.2rem }}
svg {{ width: 100%; height: auto }}
div {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #e5e5e5; text-align: right }}
td:first-child, th:first-child, .facts td {{ text-align: left }}
</style></head><body>
<h1>{title}</h1>
<div>{picture}</div>
<div>{table}</div>
</body></html>
"""


def draw(file, records, film=None):
    """Draw one replay, or the cells of a sweep.

    Parameters
    ----------
    file : str or Path
        Ends in ``.png``, ``.svg`` or ``.html``: the last is one page with the picture and the table.
    records : list of dict
        As ``--json`` has them.
    film : Film, optional
        Of the one replay.
    """
    kind = Path(file).suffix.lower()[1:]
    with rc_context(STYLE):
        if film is not None:
            figure = _figure_of_replay(records[0], film)
        elif records[0]["prefix"]:
            figure = _figure_of_prefixes(records)
        else:
            figure = _figure_of_sweep(records)
        if kind == "png":
            figure.savefig(file, dpi=150)
            return
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    picture = text.getvalue()
    if kind == "html":
        picture = _page(records, picture[picture.index("<svg") :])
    Path(file).write_text(picture, encoding="utf-8")


def _page(records, picture):
    if len(records) == 1:
        title, kind, rows = caption_of(records[0]), "facts", _html_rows(facts_of(records[0]))
    else:
        title, heading, rows = sweep_rows(records)
        heading = [name.replace("-\n", "").replace("\n", " ") for name in heading]
        kind, rows = "cells", _html_rows([heading], "th") + _html_rows(rows)
    table = f'<table class="{kind}">{rows}</table>'
    return PAGE.format(title=html.escape(title), picture=picture, table=table)


def _html_rows(rows, tag="td"):
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for row in rows)
    return "".join(f"<tr>{row}</tr>" for row in cells)


# --- one replay over time


def _figure_of_replay(record, film):
    closely = film.every > 1 and record["mean_sequences"] > CROWDED
    figure = Figure(figsize=(12, 13 if closely else 10), layout="constrained")
    heights = [1.1, 0.9, 0.9, 0.9, 4.5, *([3.5] if closely else [])]
    panels = figure.subplots(len(heights), 1, height_ratios=heights)
    steps = np.array(film.steps)
    _draw_utilization(panels[0], record, steps, np.array(film.tokens))
    _draw_line(panels[1], steps, film.sequences, "live sequences", GREEN)
    _draw_line(panels[2], steps, film.waiting, "requests in the queue", GREY)
    _draw_moves(panels[3], record, steps, np.array(film.moved))
    _draw_map(panels[4], record, film.maps, steps, _arena_tokens(record))
    panels[4].set_title(
        "the arena over time: one colour per sequence (alike: admitted at about the same time), "
        + ("white is free" if not _any_cached(film) else "white is free, pale blue is cached")
    )
    for panel in panels[:5]:
        panel.set_xlim(steps[0] - film.every / 2, steps[-1] + film.every / 2)
    for panel in panels[:4]:
        panel.tick_params(labelbottom=False)
    if closely:
        _draw_map(panels[5], record, film.close_maps, film.close_steps, film.close_tokens)
        panels[5].set_title(
            "a part of it, every step: sequences grow downwards, and jump when they are moved"
        )
    panels[-1].set_xlabel("step (every live sequence gets one token)")
    figure.suptitle(caption_of(record), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.align_ylabels(panels)
    return figure


def _any_cached(film):
    return any((owners == CACHED).any() for owners in film.maps)


def _draw_utilization(panel, record, steps, tokens):
    share = tokens / _arena_tokens(record)
    panel.fill_between(steps, share, color=BLUE, alpha=0.15, linewidth=0)
    panel.plot(steps, share, color=BLUE, linewidth=1)
    bound = 1 - record["keep_free"]
    panel.axhline(bound, color=RED, linewidth=0.8, linestyle=(0, (4, 3)))
    panel.set_title(
        f"utilization: live tokens over tokens of the pool, {record['utilization']:.1%} on average "
        f"(dashed: admission stops at {bound:.0%})"
    )
    panel.set_ylim(0, 1.02)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _draw_line(panel, steps, values, title, colour):
    panel.plot(steps, values, color=colour, linewidth=1)
    panel.set_title(title)
    panel.set_ylim(0, max(1, *values) * 1.08)
    panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _draw_moves(panel, record, steps, moved):
    edges = np.concatenate(([0], steps))
    per_step = np.diff(np.concatenate(([0], moved))) / np.maximum(1, np.diff(edges))
    panel.fill_between(steps, per_step, step="pre", color=RED, alpha=0.8, linewidth=0)
    panel.set_title(
        f"tokens moved per step: {record['moved_tokens']:,} in all, "
        f"{record['moved_over_attended']:.2%} of what was attended to"
    )
    panel.set_ylim(0, max(1, per_step.max()) * 1.08)
    panel.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panel.yaxis.set_major_formatter(FuncFormatter(_thousands))


def _draw_map(panel, record, maps, steps, tokens):
    half = (steps[1] - steps[0]) / 2 if len(steps) > 1 else 0.5
    extent = (steps[0] - half, steps[-1] + half, tokens, 0)
    image = _coloured(np.array(maps).T, record)
    panel.imshow(image, aspect="auto", interpolation="nearest", extent=extent)
    panel.grid(False)
    panel.set_ylabel("place in the arena (tokens)")
    panel.yaxis.set_major_formatter(FuncFormatter(_thousands))
    panel.xaxis.set_major_formatter(FuncFormatter(_thousands))


def _coloured(owners, record):
    """RGB of each cell. The hue goes around once in twice as many requests as live at once; tones alternate."""
    numbers, cells = np.unique(owners, return_inverse=True)
    hues = numbers / max(8.0, 2 * record["mean_sequences"]) % 1
    tones = np.array(TONES)[numbers % len(TONES)]
    colours = hsv_to_rgb(np.column_stack([hues, tones]))
    for kind, colour in NOBODY.items():
        colours[numbers == kind] = np.array(colour) / 255
    return (255 * colours).astype(np.uint8)[cells.reshape(owners.shape)]


def _arena_tokens(record):
    return -(-record["pool_tokens"] // record["block_size"]) * record["block_size"]


def _thousands(value, position):
    return f"{value:,.0f}"


# --- a sweep


def _figure_of_sweep(records):
    groups = _groups(records)
    figure = Figure(figsize=(12, max(5.5, 2 + 0.32 * len(groups))), layout="constrained")
    curve, held = figure.subplots(1, 2, width_ratios=[3, 2])
    for (label, colour, marker), cells in groups.items():
        shares = [cell["utilization"] for cell in cells]
        moved = [cell["moved_over_attended"] for cell in cells]
        curve.plot(shares, moved, color=colour, marker=marker, markersize=5, linewidth=1.2, label=label)
    _label_kept(curve, groups)
    labelled = " (labels: share kept free)" if len(records) > len(groups) else ""
    curve.set_title(f"moved over attended tokens{labelled}")
    curve.set_xlabel("utilization: live tokens over tokens of the pool")
    curve.set_ylabel("tokens moved over tokens attended to")
    curve.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    curve.yaxis.set_major_formatter(PercentFormatter(1))
    curve.yaxis.set_major_locator(MaxNLocator(8))
    curve.margins(x=0.08, y=0.12)
    curve.set_ylim(bottom=-0.02 * curve.get_ylim()[1])
    curve.legend(framealpha=0.7, edgecolor="none", loc="best")
    _draw_held(held, groups)
    figure.suptitle(sweep_rows(records)[0], x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _groups(records):
    """Cells that differ in what is kept free only: a line each, coloured by placement."""
    groups, markers = defaultdict(list), {}
    pools, blocks = ({record[name] for record in records} for name in ("pool_tokens", "block_size"))
    shapes = {(record["pool_tokens"], record["block_size"]) for record in records}
    for record in records:
        shape = record["pool_tokens"], record["block_size"]
        marker = markers.setdefault(shape, MARKERS[len(markers) % len(MARKERS)])
        label = [record["placement"]]
        label += [f"{shape[0]:,}"] if len(pools) > 1 else []
        label += [f"blocks of {shape[1]}"] if len(blocks) > 1 else []
        paled = 0.6 * list(markers).index(shape) / len(shapes)
        groups[", ".join(label), _paler(COLOURS[record["placement"]], paled), marker].append(record)
    return {line: sorted(cells, key=lambda cell: -cell["keep_free"]) for line, cells in groups.items()}


def _paler(colour, share):
    """A colour, by so much on its way to white."""
    return tuple(1 - (1 - part) * (1 - share) for part in to_rgb(colour))


def _label_kept(panel, groups):
    """What was kept free, beside each point of a line that is not flat."""
    for (_, colour, marker), cells in groups.items():
        moved = [cell["moved_over_attended"] for cell in cells]
        flat = max(moved) < 2 * min(moved) or max(moved) < LEAST_LABELLED
        if flat or marker != MARKERS[0]:  # the other lines have the same points in the same order
            continue
        for cell in cells:
            panel.annotate(
                f"{cell['keep_free']:.3g}",
                (cell["utilization"], cell["moved_over_attended"]),
                xytext=(-6, 5),
                textcoords="offset points",
                ha="right",
                fontsize=9,
                color=colour,
            )


def _draw_held(panel, groups):
    """How many sequences each holds: a bar for each group, at the least that it kept free."""
    labels = [label for label, _, _ in groups]
    cells = [cells[-1] for cells in groups.values()]
    values = [cell["mean_sequences"] for cell in cells]
    bars = panel.barh(labels, values, color=[colour for _, colour, _ in groups], height=0.6)
    panel.bar_label(bars, [f"{value:.1f}" for value in values], padding=4)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.margins(x=0.15)
    kept = sorted({f"{cell['keep_free']:.0%}" for cell in cells})
    panel.set_title(f"live sequences, {', '.join(kept)} kept free")
    panel.set_xlabel("sequences held at once, on average")


# --- what is found again


def _figure_of_prefixes(records):
    """Found over room, a line for each policy."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    alone = records[0]["prefill_only"]
    found, beside = figure.subplots(1, 2, sharex=True, sharey=alone)
    for label, colour, marker, cells in _policies(records):
        capacities = [-(-cell["pool_tokens"] // cell["block_size"]) for cell in cells]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.2}
        for panel, name in (
            (found, "prefix_hit_ratio"),
            (beside, "prefix_hit_ratio_last_half" if alone else "mean_sequences"),
        ):
            panel.plot(capacities, [cell[name] for cell in cells], label=label, **style)
    found.set_title("prompt tokens that were found, of all")
    beside.set_title("the same, of the last half of the requests" if alone else "live sequences, on average")
    for panel in (found, beside):
        panel.set_xscale("log")
        panel.set_xlabel("blocks of the arena")
        panel.xaxis.set_major_formatter(FuncFormatter(_thousands))
        panel.set_ylim(bottom=0)
        panel.margins(x=0.05, y=0.1)
    for panel in (found, beside) if alone else (found,):
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    found.legend(framealpha=0.7, edgecolor="none", loc="best")
    figure.suptitle(sweep_rows(records)[0], x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _policies(records):
    """Cells that differ in their room only: label, colour by policy, marker by the rest, and the cells."""
    groups = defaultdict(list)
    for record in records:
        groups[record["policy"], record["placement"], record["block_size"], record["keep_free"]].append(
            record
        )
    policies = list(dict.fromkeys(key[0] for key in groups))
    others = list(dict.fromkeys(key[1:] for key in groups))
    for key, cells in groups.items():
        placement, block_size, kept = key[1:]
        label = [key[0]]
        label += [placement] if len({other[0] for other in others}) > 1 else []
        label += [f"blocks of {block_size}"] if len({other[1] for other in others}) > 1 else []
        label += [f"{kept:.3g} kept free"] if len({other[2] for other in others}) > 1 else []
        colour = PALETTE[policies.index(key[0]) % len(PALETTE)]
        marker = MARKERS[others.index(key[1:]) % len(MARKERS)]
        yield ", ".join(label), colour, marker, sorted(cells, key=lambda cell: cell["pool_tokens"])
