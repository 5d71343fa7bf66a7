"""`kvcache replay`: a trace of served requests, driven through a cache."""

import argparse
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from kvcache.cli_arguments import UsageError, add_json, check_folder, count, require, write_json
from kvcache.replay import ALL_PLACEMENTS, BASELINES, ReplayFault, Settings, replay
from kvcache.replay_sweep import cells_of, record_of, sweep
from kvcache.traces import TraceError, read_trace
from kvcache.workloads import WORKLOADS

PICTURES = (".png", ".svg", ".html")
LISTS = {
    "placement": "contiguous",
    "pool_tokens": 262144,
    "block_size": 16,
    "keep_free": 0.1,
    "policy": "lru",
}  # with defaults
WITH_PREFIXES = {"placement": "paged", "block_size": None}  # other defaults; None: the trace's


def add_replay(commands):
    """Add the command."""
    command = commands.add_parser(
        "replay",
        help="drive a trace of served requests through a cache, and measure",
        description="Admits the requests of a trace in order, appends a token a step to every live sequence, frees "
        "what is finished, and measures. Several values of --placement, --pool-tokens, --block-size, --keep-free or "
        "--policy, with commas between, are a sweep. Exit code 1 if the cache lost something.",
    )
    _add_traffic(command)
    _add_cache(command)
    _add_prefixes(command)
    _add_output(command)
    command.set_defaults(run=_replay)


def _add_traffic(command):
    group = command.add_argument_group("traffic")
    group.add_argument(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="Azure's CSV, Mooncake's JSON lines or sessions, plain or gzipped; without it traffic is generated",
    )
    group.add_argument(
        "--workload",
        choices=tuple(WORKLOADS),
        help="what to generate: "
        + ", ".join(f"{name} (like {workload.like})" for name, workload in WORKLOADS.items())
        + "; default: chat",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of generated traffic; default: 0")
    group.add_argument("--skip-bad", action="store_true", help="count rows that cannot be read, and go on")
    group.add_argument("--max-requests", type=count, metavar="N", help="only the first so many")
    group.add_argument(
        "--max-share",
        type=_share,
        metavar="X",
        help="skip, and count, requests longer than this share of the pool",
    )
    group.add_argument(
        "--arrivals",
        choices=("saturate", "trace"),
        default="saturate",
        help="all requests wait from the start, or each comes at its own time; default: saturate",
    )
    group.add_argument(
        "--speed", type=_positive, default=1.0, metavar="X", help="of their own times; default: 1.0"
    )
    group.add_argument(
        "--step-ms",
        type=_positive,
        default=30.0,
        metavar="X",
        help="how long a step takes, with --arrivals trace; default: 30",
    )


def _add_cache(command):
    group = command.add_argument_group("cache (the first four take lists)")
    add_list = partial(group.add_argument, action="extend")
    add_list(
        "--placement",
        type=_placements,
        metavar="NAME,...",
        help="contiguous or paged; reserve (room for prompt and full output from the start) or buddy (powers of "
        "two), which exist only here, to compare with; default: contiguous",
    )
    add_list("--pool-tokens", type=_counts, metavar="N,...", help="default: 262144")
    add_list("--block-size", type=_counts, metavar="N,...", help="tokens per block; default: 16")
    add_list(
        "--keep-free",
        type=_shares,
        metavar="X,...",
        help="share of the pool that admission leaves free; default: 0.1",
    )
    group.add_argument(
        "--max-tokens-known",
        action="store_true",
        help="promise each request its output; otherwise the cache knows no lengths and promises nothing",
    )
    group.add_argument(
        "--overcommit",
        type=_overcommit,
        metavar="X",
        help="claims over blocks, or inf; default: 1 with known lengths, else inf",
    )
    group.add_argument("--max-move-tokens", type=count, metavar="N", help="that one call may move")
    group.add_argument(
        "--backend",
        choices=("none", "numpy", "mlx"),
        default="none",
        help="numpy and mlx move the bytes of a small model, and compare them; default: none",
    )


def _add_prefixes(command):
    group = command.add_argument_group("prefixes")
    group.add_argument(
        "--prefix",
        action="store_true",
        help="prompts are tokens, and beginnings that were seen before are found; for a trace that tells which begin "
        "alike (Mooncake's, sessions). Default then: paged, in blocks of the trace's size",
    )
    group.add_argument(
        "--policy",
        action="extend",
        type=_names,
        metavar="NAME,...",
        help="of the cache, what is evicted first; takes a list; default: lru",
    )
    group.add_argument(
        "--prefill-only",
        action="store_true",
        help="prompts alone, in the order of the file: each is computed and freed before the next",
    )


def _add_output(command):
    group = command.add_argument_group("output")
    add_json(group)
    group.add_argument(
        "--plot",
        metavar="FILE",
        help="draw the run, or the curve of a sweep, with --prefill-only always a curve; the name ends in .png, "
        ".svg or .html",
    )
    group.add_argument("--jobs", type=count, metavar="N", help="processes of a sweep; default: one a core")
    group.add_argument("--dask", metavar="ADDRESS", help="a Dask scheduler that takes the cells of a sweep")


# --- argument types


def _list_of(convert, name):
    def values(text):
        return [convert(part) for part in text.split(",")]

    values.__name__ = name  # argparse says "invalid count value"
    return values


def _policy(text):
    if not text.strip():
        raise argparse.ArgumentTypeError("a name is empty")
    return text.strip()


def _placement(text):
    if text not in ALL_PLACEMENTS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(ALL_PLACEMENTS)}")
    return text


def _positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def _share(text):
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: above 0, at most 1")
    return number


def _kept_share(text):
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: from 0, below 1")
    return number


def _overcommit(text):
    number = float(text)
    if not number >= 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return number


for _type, _name in ((_positive, "number"), (_share, "share"), (_overcommit, "number")):
    _type.__name__ = _name
_counts, _placements = _list_of(count, "count"), _list_of(_placement, "placement")
_shares, _names = _list_of(_kept_share, "share"), _list_of(_policy, "name")


# --- the command


def _replay(arguments):
    _check_prefixes(arguments)
    for name, default in (LISTS | (WITH_PREFIXES if arguments.prefix else {})).items():
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name) or [default])))
    _check(arguments)
    trace = _trace(arguments)
    settings = Settings(
        arrivals=arguments.arrivals,
        speed=arguments.speed,
        step_seconds=arguments.step_ms / 1000,
        max_requests=arguments.max_requests,
        max_share=arguments.max_share,
        max_tokens_known=arguments.max_tokens_known,
        overcommit=arguments.overcommit,
        max_move_tokens=arguments.max_move_tokens,
        backend=arguments.backend,
        prefix=arguments.prefix,
        prefill_only=arguments.prefill_only,
    )
    cells = cells_of(settings, **{name: getattr(arguments, name) for name in LISTS})
    return _run(arguments, trace, cells)


def _trace(arguments):
    """What is replayed; its block size is the cache's where prefixes are and no other is given."""
    if arguments.trace is None:
        name = arguments.workload or "chat"
        return WORKLOADS[name].make(f"{name} (generated, seed {arguments.seed})", arguments.seed)
    trace = read_trace(arguments.trace, arguments.skip_bad)
    if arguments.prefix:
        if trace.prefixes is None:
            raise UsageError(
                f"{arguments.trace} does not tell which prompts begin alike: --prefix needs hash_ids, or sessions"
            )
        if arguments.block_size == [None]:
            arguments.block_size = [trace.prefixes.block_tokens]
            _check_sizes(arguments)
    return trace


def _check_prefixes(arguments):
    """Refuse what makes no sense with or without prefixes, by what was given and not by what is by default."""
    given = {
        "--policy": arguments.policy,
        "--prefill-only": arguments.prefill_only,
        "--keep-free": arguments.keep_free,
        "--arrivals trace": arguments.arrivals == "trace",
        "--max-tokens-known": arguments.max_tokens_known,
    }
    given = [option for option, value in given.items() if value]
    if not arguments.prefix:
        if given[:1] in (["--policy"], ["--prefill-only"]):
            raise UsageError(f"{given[0]} is about prefixes: add --prefix")
        return
    if arguments.trace is None:
        raise UsageError("generated traffic has no prefixes: name a trace, or leave --prefix out")
    if arguments.prefill_only and given[-1] != "--prefill-only":
        raise UsageError(f"{given[-1]} means nothing with --prefill-only: leave it out")


def _check(arguments):
    """Refuse what cannot work before anything is computed."""
    _check_libraries(arguments)
    check_folder("--json", arguments.json)
    check_folder("--plot", arguments.plot)
    if _is_trace(arguments.json):  # --json takes what follows it
        raise UsageError(
            f"--json {arguments.json} would overwrite a trace: name the trace first, or give --json -"
        )
    if arguments.plot is not None and Path(arguments.plot).suffix.lower() not in PICTURES:
        raise UsageError(f"--plot {arguments.plot}: give a name that ends in {', '.join(PICTURES)}")
    without = [name for name in arguments.placement if name in BASELINES]
    if without and arguments.prefix:
        raise UsageError(f"--placement {without[0]} keeps no prefixes: leave it or --prefix out")
    if without and arguments.backend != "none":
        raise UsageError(f"--placement {without[0]} keeps no bytes: leave --backend {arguments.backend} out")
    if arguments.trace is not None and arguments.workload is not None:
        raise UsageError(f"--workload generates traffic, and {arguments.trace} has its own: give one of them")
    if arguments.dask is not None and arguments.jobs is not None:
        raise UsageError(
            "--jobs counts processes of this machine, --dask has workers of its own: give one of them"
        )
    if arguments.overcommit not in (None, math.inf) and not arguments.max_tokens_known:
        raise UsageError(
            "--overcommit bounds what is promised, and with unknown lengths every request is promised the whole "
            "pool: add --max-tokens-known, or leave it out"
        )
    if arguments.seed < 0:
        raise UsageError(f"--seed is {arguments.seed}, expected at least 0")
    if None not in arguments.block_size:
        _check_sizes(arguments)


def _check_sizes(arguments):
    small, large = min(arguments.pool_tokens), max(arguments.block_size)
    if small < large:
        raise UsageError(
            f"a pool of {small} tokens is less than a block of {large}: give a larger --pool-tokens"
        )


def _is_trace(file):
    if file in (None, "-") or not Path(file).is_file():
        return False
    try:
        return len(read_trace(file, skip_bad=True)) > 0
    except TraceError:
        return False


def _check_libraries(arguments):
    require("a replay", "replay", {"rich": "rich"})
    if arguments.dask is not None:
        require("--dask", "dask", {"joblib": "joblib", "distributed": "dask[distributed]"})
    if arguments.jobs != 1 and math.prod(len(getattr(arguments, name)) for name in LISTS) > 1:
        require("a sweep", "replay", {"joblib": "joblib"})
    if arguments.plot is not None:
        require("--plot", "replay", {"matplotlib": "matplotlib"})
    if arguments.backend == "mlx":
        require("--backend mlx", "mlx", {"mlx": "mlx"})


def _run(arguments, trace, cells):
    from rich.console import Console

    from kvcache import replay_view

    for cell in cells:
        _check_cell(cell)
    seed = arguments.seed if arguments.trace is None else None
    console = Console(stderr=arguments.json == "-")
    film = _film(arguments, cells)
    records = []
    try:
        for cell, figures in zip(cells, _figures(arguments, trace, cells, film), strict=True):
            records.append(record_of(trace, cell, figures) | {"seed": seed})
    except ReplayFault as fault:
        print(f"kvcache: {fault}", file=sys.stderr)
        return 1
    replay_view.print_records(console, records)
    write_json(arguments.json, records)
    if arguments.plot is not None:
        _plot(arguments.plot, records, film)
    return 0


def _check_cell(cell):
    """Refuse a shape that makes no cache, whose bytes are not tried yet."""
    try:
        with replace(cell, backend="none").open_pool():
            pass
    except (TypeError, ValueError) as error:
        raise UsageError(f"no cache can be made: {error}") from error


def _film(arguments, cells):
    """What pictures are taken on, where one replay is drawn."""
    if arguments.plot is None or len(cells) > 1 or arguments.prefill_only:
        return None
    from kvcache.replay_film import Film

    return Film()


def _figures(arguments, trace, cells, film):
    """The figures of each cell in turn, with a bar meanwhile."""
    from rich.console import Console

    from kvcache import replay_view

    console = Console(stderr=True)
    if len(cells) == 1 and arguments.dask is None:
        with replay_view.progress_bar(console, "requests", len(trace)) as tell:
            yield replay(trace, cells[0], lambda now: tell(now.finished, len(now.order)), film)
        return
    with replay_view.progress_bar(console, "cells", len(cells)) as tell:
        try:
            for done, figures in enumerate(sweep(trace, cells, arguments.jobs, arguments.dask), 1):
                tell(done)
                yield figures
        except OSError as error:
            raise UsageError(f"the cells cannot be given out: {error}") from error


def _plot(file, records, film):
    from kvcache import replay_plot

    if film is not None and not film.steps:
        raise UsageError(
            f"--plot {file}: every request was refused, there is no step to draw: give a larger --pool-tokens"
        )
    try:
        replay_plot.draw(file, records, film)
    except OSError as error:
        raise UsageError(f"--plot {file}: {error.strerror}") from error
