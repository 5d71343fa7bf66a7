"""How `kvcache top` looks. Needs rich."""

from itertools import groupby

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvcache.block_map import CACHED, FREE, SHARED, WAITING, colours_of

MIB = 2**20
MOST_ROWS = 12  # of sequences
MOST_TENANTS = 3  # of a queue
OUTCOMES = (  # of a queue's requests: heading, and which of the counts
    ("granted", lambda queue: queue["granted"]),
    ("timed out", lambda queue: queue["refused"].get("timeout", 0)),
    ("cancelled", lambda queue: queue["refused"].get("cancelled", 0)),
    ("refused", lambda queue: sum(queue["refused"].values()) - _ended_waiting(queue) + queue["failed"]),
    ("evicted", lambda queue: queue["evicted"]),
)
LEGEND = "· free, ▂ cached, ░ waits for a hold, ▒ shared"
NOT_HELD = {FREE: "·", CACHED: "▂", WAITING: "░"}
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
)


def frame(now, last, width):
    """A panel.

    Parameters
    ----------
    now, last : dict
        Snapshots; without a last one there are no rates.
    width : int
        Columns of the terminal.
    """
    parts = [_arena(now), Text(), _map(now["block_map"]["cells"], max(16, width - 4)), Text()]
    parts += [Text(f"! {finding}", style="yellow") for finding in now["findings"]]
    parts.append(_columns(_rates(now, last), _sequences(now)))
    if now.get("queues"):
        parts += [Text(), _queues(now, last)]
    title = f"kvcache {now['kvcache']}, process {now['pid']}, {now['placement']}, {now['backend']}"
    return Panel(Group(*parts), title=Text(title), border_style="dim")


def _arena(now):
    stats = now["stats"]
    bars = Table.grid(padding=(0, 1))
    per_cell = now["block_map"]["blocks_per_cell"]
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
            "peak",
            stats["peak_used_blocks"] / stats["total_blocks"],
            f"{stats['peak_used_blocks']:,} blocks, {stats['peak_sequences']:,} sequences; "
            f"fragmentation now {stats['fragmentation']:.2f}",
        ),
    ):
        bars.add_row(name, ProgressBar(total=1, completed=min(part, 1), width=24), text)
    bars.add_row("map", "", f"{per_cell} block{'s' if per_cell > 1 else ''} a cell, {LEGEND}")
    return bars


def _map(cells, width):
    """A cell a character; a sequence in one colour."""
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


def _rates(now, last):
    table = Table(show_edge=False, pad_edge=False, box=None)
    for heading in ("", "in all", "per second"):
        table.add_column(heading, justify="right" if heading else "left")
    seconds = now["seconds"] - last["seconds"] if last else 0
    for name, field in RATES:
        count = now["stats"][field]
        rate = f"{(count - last['stats'][field]) / seconds:,.1f}" if seconds > 0 else ""
        table.add_row(name, f"{count:,}", rate)
    return table


def _sequences(now):
    table = Table(show_edge=False, pad_edge=False, box=None)
    for heading in ("oldest sequences", "tokens", "limit", ""):
        table.add_column(heading, justify="left" if heading == "oldest sequences" else "right", no_wrap=True)
    shown = now["sequences"][:MOST_ROWS]
    for each in shown:
        name = Text("█ ", style="dim" if each["place"] is None else _style(each["place"]))
        name.append(_printable(each["id"]).plain, style="default")
        state = "" if each["contiguous"] else "scattered"
        table.add_row(name, f"{each['tokens']:,}", f"{each['limit']:,}", state)
    more = now["stats"]["num_sequences"] - len(shown)
    if more > 0:
        table.add_row(Text(f"and {more:,} more", style="dim"))
    return table


def _columns(left, right):
    both = Table.grid(padding=(0, 3))
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
            table.add_row("  per second", "", "", *rates, style="dim")
        for tenant in queue["tenants"][:MOST_TENANTS] if len(queue["tenants"]) > 1 else ():
            name = Text("  ").append_text(_printable(tenant["name"] or "(no tenant)"))
            counts = [f"{count(tenant):,}" for _, count in OUTCOMES]
            table.add_row(name, f"{tenant['waiting']:,}", _age(tenant), *counts, style="dim")
    return table


def _age(each):
    return f"{each['oldest_age']:.1f} s" if each["waiting"] else ""


def _printable(text):
    return Text("".join(c if c.isprintable() else "?" for c in text))
