"""How `kvcache replay` looks on a terminal: a bar while it runs, a table when it is done. Needs rich."""

from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
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
    served = [] if record["prefill_only"] else [f"{percent(record['keep_free'], 0)} kept free"]
    kept = [f"prefixes by {record['policy']}"] if record["prefix"] else []
    return f"{record['trace']}: {', '.join([how, *served, *kept, _lengths(record)])}"


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
        print_sweep(console, records)


def print_replay(console, caption, record):
    """Print the figures of one replay.

    Parameters
    ----------
    console : rich.console.Console
    caption : str
    record : dict
        As ``--json`` has it.
    """
    table = Table.grid(padding=(0, 2))
    for name, told in facts_of(record):
        table.add_row(name, told)
    console.print(Text(caption, "bold"), Text(), table, sep="\n", highlight=False)


def facts_of(record):
    """Name and text of what a person wants to know of a replay."""
    left_out = [f"{record[name]:,} {name}" for name in ("refused", "skipped", "bad_rows") if record[name]]
    yield (
        "requests",
        ", ".join([f"{record['finished']:,} finished", *left_out]).replace("bad_rows", "bad rows"),
    )
    if record["prefix"]:
        yield from _found(record)
    if record["prefill_only"]:
        if record["verified_tokens"]:
            yield _verified(record)
        yield "bookkeeping", f"{record['allocator_ns_per_token']:.1f} ns per prompt token"
        yield "took", f"{record['wall_seconds']:.2f} s"
        return
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
        yield _verified(record)
    yield "bookkeeping", f"{record['allocator_ns_per_token']:.0f} ns per token"
    yield "took", f"{record['wall_seconds']:.2f} s"


def _verified(record):
    return "contents", f"{record['verified_tokens']:,} tokens read again, all as written"


def _found(record):
    """Of facts those about prefixes."""
    told = f"{percent(record['prefix_hit_ratio'], 2)} of {record['prompt_tokens']:,} prompt tokens"
    if record["prefill_only"]:
        told += f", {percent(record['prefix_hit_ratio_last_half'], 2)} in the last half of the requests"
    yield "found", told
    copied, revived = (f"{record[name]:,}" for name in ("copied_tokens", "revived_tokens"))
    yield "not computed again", f"{record['cached_tokens']:,} tokens; {copied} were copied, {revived} revived"
    yield "evicted", f"{record['evicted_blocks']:,} blocks"


def _hundredths(name, digits=1):
    return lambda cell: f"{100 * cell[name]:.{digits}f}"


SETTINGS = {  # setting -> heading and text; left out of the table where all cells have the same
    "placement": ("placement", lambda cell: cell["placement"]),
    "pool_tokens": ("pool\ntokens", lambda cell: f"{cell['pool_tokens']:,}"),
    "block_size": ("block", lambda cell: str(cell["block_size"])),
    "keep_free": ("kept\nfree %", lambda cell: f"{100 * cell['keep_free']:.3g}"),
    "policy": ("policy", lambda cell: cell["policy"]),
}
FOUND = {
    "found\n%": _hundredths("prefix_hit_ratio", 2),
    "cached\ntokens": lambda cell: f"{cell['cached_tokens']:,}",
    "evicted\nblocks": lambda cell: f"{cell['evicted_blocks']:,}",
    "copied\ntokens": lambda cell: f"{cell['copied_tokens']:,}",
    "revived\ntokens": lambda cell: f"{cell['revived_tokens']:,}",
}
LAST_HALF = {"last\nhalf %": _hundredths("prefix_hit_ratio_last_half", 2)}
FOUND_LEGEND = {
    "found": "prompt tokens that were there, of all",
    "cached": "how many",
    "copied": "of these, from where they were found",
    "revived": "of these, continued where they were found",
}
FIGURES = {
    "at\nonce": lambda cell: f"{cell['mean_sequences']:.1f}",
    "used\n%": _hundredths("utilization"),
    "one\nrun %": _hundredths("zero_copy_fraction"),
    "moved\n%": _hundredths("moved_over_attended", 2),
    "pause": lambda cell: f"{cell['longest_pause_tokens']:,}",
    "waste\n%": _hundredths("internal_waste"),
    "pre-\nempts": lambda cell: f"{cell['preempted']:,}",
    "blocked": lambda cell: f"{cell['blocked_by_fragmentation']:,}",
}
SERVED = {name: FIGURES[name] for name in ("at\nonce", "used\n%", "pre-\nempts")}
LEGEND = {
    "at once": "live sequences in a step",
    "used": "live tokens, of the pool",
    "one run": "sequences that a view need not copy",
    "moved": "tokens, of those attended to",
    "pause": "the most tokens moved at once",
    "waste": "of the blocks held",
    "preempts": "times that a sequence was preempted",
    "blocked": "steps in which enough was free, but not in one piece",
}


def sweep_rows(records):
    """A table of the cells: its caption, the names of its columns, and a row of text for each cell."""
    first = records[0]
    varied = [name for name in SETTINGS if any(record[name] != first[name] for record in records)]
    told = {
        "placement": first["placement"],
        "pool_tokens": f"{first['pool_tokens']:,} tokens",
        "block_size": f"blocks of {first['block_size']}",
        "keep_free": f"{percent(first['keep_free'], 0)} kept free",
        "policy": f"prefixes by {first['policy']}",
    }
    absent = {"keep_free"} if first["prefill_only"] else set()
    absent |= set() if first["prefix"] else {"policy"}
    fixed = [text for name, text in told.items() if name not in varied and name not in absent]
    caption = f"{first['trace']}: {', '.join([*fixed, _lengths(first)])}"
    columns = dict(SETTINGS[name] for name in varied)
    if first["prefill_only"]:
        columns |= {"found\n%": FOUND["found\n%"]} | LAST_HALF | FOUND
    else:
        columns |= FIGURES if not first["prefix"] else SERVED | FOUND
    return caption, list(columns), [[text(record) for text in columns.values()] for record in records]


def _lengths(record):
    if record["prefill_only"]:
        return "prompts alone"
    return f"lengths {'known' if record['max_tokens_known'] else 'unknown'}"


def print_sweep(console, records):
    """Print a row for every cell.

    Parameters
    ----------
    console : rich.console.Console
    records : list of dict
        As ``--json`` has them.
    """
    caption, heading, rows = sweep_rows(records)
    table = Table(box=SIMPLE_HEAD, padding=0)
    for name in heading:
        table.add_column(
            name,
            justify="left" if name in ("placement", "policy") else "right",
            min_width=len(name.split()[0]),
        )
    for row in rows:
        table.add_row(*row)
    legend = Table.grid(padding=(0, 2))
    meanings = LEGEND
    if records[0]["prefix"]:
        served = () if records[0]["prefill_only"] else ("at once", "used", "preempts")
        meanings = {name: LEGEND[name] for name in served} | FOUND_LEGEND
    for name, meaning in meanings.items():
        legend.add_row(name, meaning, style="dim")
    console.print(Text(caption, "bold"), table, legend, sep="\n", highlight=False)
