"""How `kvcache demo` looks: a live view while it runs, a table when it is done. Needs rich."""

import time

import numpy as np
from rich.console import Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kvcache.block_map import CACHED, FREE, cells_of

COLOURS = (
    "cyan",
    "magenta",
    "green",
    "yellow",
    "blue",
    "red",
    "bright_cyan",
    "bright_magenta",
    "bright_green",
)
MAP_ROWS = 8  # at most
REFRESH = 0.1  # seconds between two frames
ROUNDING = 0.01  # of a log-probability in float32, generously
PHASES = {"serve": "serving from one arena", "replay": "replaying one by one"}


class DemoView:
    """Watches a run: a live panel on a terminal, elsewhere a line for each phase.

    Parameters
    ----------
    console : rich.console.Console
    """

    def __init__(self, console):
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._colours = {}  # request id -> colour
        self._last = {}  # phase -> its newest progress
        self._drawn = -REFRESH

    def __enter__(self):
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception):
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, progress):
        """Draw, at most ten times a second."""
        if not self._console.is_terminal:
            if progress.phase not in self._last:
                self._console.print(f"{PHASES[progress.phase]}: {progress.requests} requests ...")
        elif time.monotonic() - self._drawn >= REFRESH or progress.finished == progress.requests:
            self._drawn = time.monotonic()
            self._live.update(self.frame(progress), refresh=True)
        self._last[progress.phase] = progress

    def frame(self, progress):
        """The panel for a moment of a run."""
        now = self._last | {progress.phase: progress}
        bars = Table.grid(padding=(0, 1))
        for phase in (phase for phase in PHASES if phase in now):
            bars.add_row(PHASES[phase], *_bar(now[phase]))
        return Panel(Group(bars, Text(), *self._arena(progress)), title="kvcache demo", border_style="dim")

    def _arena(self, progress):
        stats = progress.cache.stats()
        if progress.phase == "serve":
            yield self._map(progress, stats.total_blocks, max(16, self._console.width - 6))
            yield Text()
        yield Text(
            f"{len(progress.live)} sequences decode, {progress.waiting} wait   "
            f"{stats.used_blocks}/{stats.total_blocks} blocks used   "
            f"{stats.moves} moves of {stats.moved_tokens:,} tokens   {stats.arena_copies} arena copies"
        )
        if stats.hit_tokens:
            yield Text(
                f"{stats.cached_blocks} blocks cached   "
                f"{stats.hit_tokens:,} of {stats.query_tokens:,} prompt tokens skipped   "
                f"{stats.revived_tokens:,} revived, {stats.copied_tokens:,} copied"
            )

    def _map(self, progress, num_blocks, width):
        """The arena, a sequence in one colour, what ended ones left low; a cell is a block, or several."""
        owners = np.where(progress.cache._owners() == CACHED, CACHED, FREE)
        for number, request_id in enumerate(progress.live):
            owners[progress.cache.block_table(request_id)] = number
            self._colours.setdefault(request_id, COLOURS[len(self._colours) % len(COLOURS)])
        text = Text()
        for index, cell in enumerate(cells_of(owners, width * MAP_ROWS)[1].tolist(), 1):
            if cell >= 0:
                text.append("█", self._colours[progress.live[cell]])
            else:
                text.append("▂" if cell == CACHED else "·", "dim")
            if index % width == 0:
                text.append("\n")
        return text


def _bar(progress):
    yield ProgressBar(total=progress.requests, completed=progress.finished, width=24)
    yield f"{progress.finished}/{progress.requests} requests"
    yield f"{progress.tokens:,} tokens"
    yield f"{progress.tokens / progress.seconds:,.0f} tokens/s"


def print_result(console, result, caption):
    """Print the table and the verdict.

    Parameters
    ----------
    console : rich.console.Console
    result : kvcache.demo.Result
    caption : str
        What was run.
    """
    table = Table(title=caption, title_justify="left", show_edge=False, pad_edge=False)
    for heading in ("", "at once", "tokens", "seconds", "tokens/s"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row(
        "one arena, continuous batching",
        f"{result.largest_batch}",
        f"{result.tokens:,}",
        f"{result.seconds:.2f}",
        f"{result.tokens_per_second:,.0f}",
    )
    table.add_row(
        "mlx-lm's cache, " + ("one by one" if result.turns == 1 else "nothing skipped"),
        "1",
        f"{result.tokens:,}",
        f"{result.mlx_lm_seconds:.2f}",
        f"{result.mlx_lm_tokens_per_second:,.0f}",
    )
    turns = (_turns(result), Text()) if result.turns > 1 else ()
    console.print(table, Text(), *turns, _facts(result), Text(), _verdict(result), sep="\n", highlight=False)


def _turns(result):
    """What was skipped of the prompts, a row a turn."""
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("turn", "requests", "with a hit", "prompt tokens", "skipped", ""):
        table.add_column(heading, justify="right")
    for turn in result.by_turn:
        table.add_row(
            f"{turn.turn}",
            f"{turn.requests:,}",
            f"{turn.hits:,}",
            f"{turn.prompt_tokens:,}",
            f"{turn.skipped_tokens:,}",
            f"{turn.skipped_tokens / turn.prompt_tokens:.0%}",
        )
    return table


def _facts(result):
    facts = Table.grid(padding=(0, 2))
    facts.add_row(
        "arena",
        f"{result.arena_bytes / 2**20:.1f} MiB, "
        f"{result.peak_used_blocks} of {result.num_blocks} blocks used at the peak",
    )
    facts.add_row(
        "moves",
        f"{result.moves} of {result.moved_tokens:,} tokens in all, {result.arena_copies} arena copies",
    )
    if result.turns > 1 or result.skipped_tokens:
        facts.add_row("prefill", _prefill(result))
    facts.add_row(
        "choices",
        f"{result.distinct_tokens} distinct tokens, closest decision {result.smallest_margin:.1g}, "
        f"log-probabilities within {result.largest_logprob_difference:.1g}",
    )
    return facts


def _prefill(result):
    skipped = (
        f"{result.skipped_tokens:,} of {result.prompt_tokens:,} tokens skipped ({result.skipped_share:.0%})"
    )
    ways = {"revived": result.revived_tokens, "copied": result.copied_tokens, "shared": result.shared_tokens}
    told = ", ".join(f"{tokens:,} {way}" for way, tokens in ways.items() if tokens)
    return f"{skipped}: {told}" if told else skipped


def _verdict(result):
    if not result.equal:
        return Text(f"✗ {result.difference}", style="bold red")
    verdict = Text(
        f"✓ all {result.tokens:,} tokens of {result.requests} requests are the same as alone, "
        "with mlx-lm's own cache",
        style="bold green",
    )
    if result.largest_logprob_difference > ROUNDING:
        verdict.append("\n! but log-probabilities differ by more than rounding explains", style="bold yellow")
    return verdict
