"""How `kvcache replay` looks on a terminal: a bar while it runs, a table when it is done. Needs rich."""

from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text


@contextmanager
def progress_bar(console, what, total):
    """A bar on a terminal, nothing elsewhere; gives a function that is told how far it is, and of how much."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,.0f}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of=total: bar.update(task, completed=done, total=of)


def percent(share, digits=1):
    """A share as text."""
    return f"{100 * share:.{digits}f} %"


def caption_of(record):
    """A line that says what was replayed."""
    how = f"{record['placement']}, {record['pool_tokens']:,} tokens in blocks of {record['block_size']}"
    lengths = "known" if record["max_tokens_known"] else "unknown"
    return f"{record['trace']}: {how}, {percent(record['keep_free'], 0)} kept free, lengths {lengths}"


def print_records(console, records):
    """Print a replay, or the cells of a sweep.

    Parameters
    ----------
    console : rich.console.Console
    records : list of dict
        As ``--json`` has them.
    """
    if len(records) == 1:
        print_replay(console, caption_of(records[0]), records[0])
    else:
        print_sweep(console, f"{records[0]['trace']}, {len(records)} replays", records)


def print_replay(console, caption, record):
    """Print the figures of one replay.

    Parameters
    ----------
    console : rich.console.Console
    caption : str
    record : dict
        As ``--json`` has it.
    """
    table = Table(title=caption, title_justify="left", show_header=False, show_edge=False, pad_edge=False)
    for name, told in facts_of(record):
        table.add_row(name, told)
    console.print(table, highlight=False)


def facts_of(record):
    """Name and text of what a person wants to know of a replay."""
    left_out = [f"{record[name]:,} {name}" for name in ("refused", "skipped", "bad_rows") if record[name]]
    yield (
        "requests",
        ", ".join([f"{record['finished']:,} finished", *left_out]).replace("bad_rows", "bad rows"),
    )
    yield "sequences", f"{record['mean_sequences']:.1f} at once over {record['steps']:,} steps"
    yield "utilization", percent(record["utilization"])
    yield "zero-copy", f"{percent(record['zero_copy_fraction'], 2)} of sequence-steps"
    moved = record["moved_tokens"]
    yield (
        "moved",
        f"{moved:,} tokens, {percent(record['moved_over_attended'], 2)} of {record['attended_tokens']:,} attended",
    )
    yield "longest pause", f"{record['longest_pause_tokens']:,} tokens"
    yield "preempted", f"{record['preempted']:,}"
    yield "unused in blocks held", percent(record["internal_waste"])
    yield (
        "fragmentation",
        f"{record['fragmentation_mean']:.2f}, {record['blocked_by_fragmentation']:,} steps blocked by it",
    )
    if record["spills"] or record["heals"]:
        yield "spilled", f"{record['spills']:,} times, healed {record['heals']:,} times"
    if record["verified_tokens"]:
        yield "contents", f"{record['verified_tokens']:,} tokens read again, all as written"
    yield "bookkeeping", f"{record['allocator_ns_per_token']:.0f} ns per token"
    yield "took", f"{record['wall_seconds']:.2f} s"


COLUMNS = {
    "placement": lambda cell: cell["placement"],
    "pool": lambda cell: f"{cell['pool_tokens']:,}",
    "block": lambda cell: str(cell["block_size"]),
    "kept free": lambda cell: percent(cell["keep_free"], 0),
    "sequences": lambda cell: f"{cell['mean_sequences']:.1f}",
    "utilization": lambda cell: percent(cell["utilization"]),
    "zero-copy": lambda cell: percent(cell["zero_copy_fraction"]),
    "moved": lambda cell: percent(cell["moved_over_attended"], 2),
    "pause": lambda cell: f"{cell['longest_pause_tokens']:,}",
    "waste": lambda cell: percent(cell["internal_waste"]),
    "preempted": lambda cell: f"{cell['preempted']:,}",
    "refused": lambda cell: f"{cell['refused']:,}",
}
LEFT_COLUMNS = ("placement",)


def print_sweep(console, caption, records):
    """Print a row for every cell.

    Parameters
    ----------
    console : rich.console.Console
    caption : str
    records : list of dict
        As ``--json`` has them.
    """
    table = Table(title=caption, title_justify="left", show_edge=False, pad_edge=False)
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in LEFT_COLUMNS else "right")
    for record in records:
        table.add_row(*(told(record) for told in COLUMNS.values()))
    note = "moved: of attended tokens; pause: the most tokens moved at once; waste: of the blocks held"
    console.print(table, Text(note, "dim"), sep="\n", highlight=False)
