"""How `kvcache top` looks. Needs rich."""

from itertools import groupby

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvcache.block_map import CACHED, FREE, PINNED, SHARED, WAITING, cells_of, colours_of

MIB = 2**20
BAR = 16  # columns
BESIDE = 3  # columns between two tables
LEAST_NAME = 7  # columns of a sequence's id, however little room there is
MOST_TENANTS = 3  # of a queue
LEAST_MAP = 2  # lines that the map has left, however little room there is
AROUND = 6  # lines: above and below everything, above the map its legend and one more, above the tables one, headings
OUTCOMES = (  # of a queue's requests: heading, and which of the counts
    ("granted", lambda queue: queue["granted"]),
    ("timeout", lambda queue: queue["refused"].get("timeout", 0)),
    ("cancelled", lambda queue: queue["refused"].get("cancelled", 0)),
    ("refused", lambda queue: sum(queue["refused"].values()) - _ended_waiting(queue) + queue["failed"]),
    ("evicted", lambda queue: queue["evicted"]),
)
NOT_HELD = {FREE: "·", CACHED: "▂", PINNED: "▄", WAITING: "░"}  # by sequences
LEGEND = "· free  ▂ cached  ▄ pinned  ░ waits for a hold  ▒ shared"
RATES = (
    ("admitted", "admissions"),
    ("freed", "frees"),
    ("refused: arena full", "refused_arena_full"),
    ("refused: promised", "refused_promises"),
    ("append: no block", "refused_growth"),
    ("append: past limit", "refused_past_limit"),
    ("moves", "moves"),
    ("tokens moved", "moved_tokens"),
    ("tokens copied", "copied_tokens"),
    ("prompt tokens", "query_tokens"),
    ("of these cached", "hit_tokens"),
    ("blocks evicted", "evicted_blocks"),
)


def frame(now, last, width, height=None):
    """A panel.

    Parameters
    ----------
    now, last : dict
        Snapshots; without a last one there are no rates.
    width : int
        Columns of the terminal.
    height : int, optional
        Its lines: with few of them the map is coarser, and what has never been counted is left out.
    """
    columns = max(16, width - 4)
    findings = [Text(f"! {finding}", style="yellow") for finding in now["findings"]]
    queues = [Text(), _queues(now, last)] if now.get("queues") else []
    arena = _arena(now, last)
    rates, lines = RATES, None
    if height is not None:
        said = sum(-(-finding.cell_len // columns) for finding in findings)
        used = AROUND + arena.row_count + said + (2 + queues[1].row_count if queues else 0)
        rates = _rates_within(height - used - LEAST_MAP, now)
        lines = max(LEAST_MAP, height - used - len(rates))
    parts = [arena, Text(), *_map(now["block_map"], columns, lines), Text(), *findings]
    counts = _rates(now, last, rates)
    beside = _sequences(now, len(rates), columns - BESIDE - _width_of(counts))
    parts += [_columns(_table(counts), _table(beside)), *queues]
    title = f"kvcache {now['kvcache']}, process {now['pid']}, {now['placement']}, {now['backend']}"
    return Panel(Group(*parts), title=Text(title), border_style="dim")


def _arena(now, last):
    stats = now["stats"]
    bars = Table.grid(padding=(0, 1))
    for name, part, text in (
        (
            "used",
            stats["used_blocks"] / stats["total_blocks"],
            f"{stats['used_blocks']:,} of {stats['total_blocks']:,} blocks, "
            f"{stats['allocated_bytes'] / MIB:,.1f} of {stats['arena_bytes'] / MIB:,.1f} MiB",
        ),
        (
            "promised",
            now["promised"],
            f"{now['promised']:.0%}: {stats['claimed_blocks']:,} blocks claimed beyond those used",
        ),
        (
            "cached",
            stats["cached_blocks"] / stats["total_blocks"],
            f"{stats['cached_blocks']:,} blocks; {stats['pinned_blocks']:,} pinned; "
            f"{stats['suspended_sequences']:,} sequence{'' if stats['suspended_sequences'] == 1 else 's'} suspended",
        ),
        ("hits", *_hits(stats, last and last["stats"])),
        (
            "peak",
            stats["peak_used_blocks"] / stats["total_blocks"],
            f"{stats['peak_used_blocks']:,} blocks, {stats['peak_sequences']:,} sequences; "
            f"fragmentation now {stats['fragmentation']:.2f}",
        ),
    ):
        bars.add_row(name, ProgressBar(total=1, completed=min(part, 1), width=BAR), text)
    return bars


def _hits(stats, before):
    """Which part of the prompts was there, as a number and in words."""
    if not stats["query_tokens"]:
        return 0.0, "no prompt was given as ids"
    part = stats["hit_tokens"] / stats["query_tokens"]
    text = f"{part:.0%} of prompt tokens since the start"
    asked = stats["query_tokens"] - before["query_tokens"] if before else 0
    if asked > 0:
        text += f", {(stats['hit_tokens'] - before['hit_tokens']) / asked:.0%} now"
    return part, text


def _map(block_map, width, lines):
    """What the signs mean, and a cell a character, in at most so many lines; a sequence has one colour."""
    cells, per_cell = block_map["cells"], block_map["blocks_per_cell"]
    if lines is not None and len(cells) > lines * width:
        more, merged = cells_of(np.array(cells, np.int32), lines * width)
        cells, per_cell = merged.tolist(), per_cell * more
    legend = f"{per_cell} block{'s' if per_cell > 1 else ''} a cell  {LEGEND}"
    return Text(legend, style="dim"), _drawn(cells, width)


def _drawn(cells, width):
    text = Text(no_wrap=True)
    for start in range(0, len(cells), width):
        for cell, same in groupby(cells[start : start + width]):
            length = len(list(same))
            if cell in NOT_HELD:
                text.append(NOT_HELD[cell] * length, "dim")
            else:
                text.append(("▒" if cell >= SHARED else "█") * length, _style(cell & ~SHARED))
        if start + width < len(cells):
            text.append("\n")
    return text


def _style(place):
    red, green, blue = colours_of([place])[0].tolist()
    return f"rgb({red},{green},{blue})"


def _rates_within(lines, now):
    """Those that so many lines have room for: what has been counted before what has not, in order."""
    counted = [each for each in RATES if now["stats"][each[1]]]
    others = [each for each in RATES if not now["stats"][each[1]]]
    kept = (counted + others)[: max(0, lines)]
    return [each for each in RATES if each in kept]


def _rates(now, last, shown):
    """Rows of cells, the headings first."""
    rows = [("", "in all", "a second")]
    seconds = now["seconds"] - last["seconds"] if last else 0
    for name, field in shown:
        count = now["stats"][field]
        rate = f"{(count - last['stats'][field]) / seconds:,.1f}" if seconds > 0 else ""
        rows.append((name, f"{count:,}", rate))
    return rows


def _sequences(now, lines, columns):
    """Rows of cells, of the oldest ones; where there are more than lines, the last one says how many."""
    told = max(len(now["sequences"]), now["stats"]["num_sequences"])
    shown = now["sequences"][: lines if told <= lines else max(0, lines - 1)]
    rows = [("sequences", "tokens", "limit", "")]
    for each in shown:
        state = "suspended" if each.get("suspended") else "" if each["contiguous"] else "scattered"
        rows.append(("█ ", f"{each['tokens']:,}", f"{each['limit']:,}", state))
    most = max(LEAST_NAME, columns - _width_of(rows) + len("sequences") - len("█ "))
    rows[1:] = [(_named(each, most), *row[1:]) for each, row in zip(shown, rows[1:], strict=True)]
    if told > len(shown):
        rows.append((Text(f"and {told - len(shown):,} more", style="dim"), "", "", ""))
    return rows


def _named(each, most):
    """A sequence's colour and its id, without the middle where it is too long."""
    text = _printable(each["id"]).plain
    if len(text) > most:
        end = most // 2
        text = f"{text[: most - 1 - end]}…{text[-end:]}"
    name = Text("█ ", style="dim" if each["place"] is None else _style(each["place"]))
    return name.append(text, style="default")


def _table(rows):
    """The first column to the left, numbers to the right."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    for number, heading in enumerate(rows[0]):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _width_of(rows):
    """Columns that a table of these cells takes."""
    return sum(max(len(row[column]) for row in rows) + 2 for column in range(len(rows[0]))) - 2


def _columns(left, right):
    both = Table.grid(padding=(0, BESIDE))
    both.add_row(left, right)
    return both


def _ended_waiting(queue):
    return queue["refused"].get("timeout", 0) + queue["refused"].get("cancelled", 0)


def _queues(now, last):
    """A line for each queue, and below it the tenants of whom most wait."""
    table = Table(show_edge=False, pad_edge=False, box=None)
    for heading in ("queue", "waiting", "oldest", *[name for name, _ in OUTCOMES]):
        table.add_column(heading, justify="left" if heading == "queue" else "right", no_wrap=True)
    before = {queue["name"]: queue for queue in last.get("queues", ())} if last else {}
    seconds = now["seconds"] - last["seconds"] if last else 0
    for queue in now["queues"]:
        old = queue["warn_after"] is not None and queue["oldest_age"] > queue["warn_after"]
        age = Text(_age(queue), style="yellow" if old else "")
        counts = [f"{count(queue):,}" for _, count in OUTCOMES]
        table.add_row(_printable(queue["name"]), f"{queue['waiting']:,}", age, *counts)
        if queue["name"] in before and seconds > 0:
            then = before[queue["name"]]
            rates = [f"{(count(queue) - count(then)) / seconds:,.1f}" for _, count in OUTCOMES]
            table.add_row("  a second", "", "", *rates, style="dim")
        for tenant in queue["tenants"][:MOST_TENANTS] if len(queue["tenants"]) > 1 else ():
            name = Text("  ").append_text(_printable(tenant["name"] or "(no tenant)"))
            counts = [f"{count(tenant):,}" for _, count in OUTCOMES]
            table.add_row(name, f"{tenant['waiting']:,}", _age(tenant), *counts, style="dim")
    return table


def _age(each):
    return f"{each['oldest_age']:.1f} s" if each["waiting"] else ""


def _printable(text):
    return Text("".join(c if c.isprintable() else "?" for c in text))
