"""`kvcache top`: a live view of a cache in another process."""

import http.client
import json
import time
from pathlib import Path

import numpy as np

from kvcache.block_map import image_of, png_of
from kvcache.cli_arguments import UsageError, add_json, count, require, write_json

SECONDS = 5.0  # that an answer may take
MOST_BYTES = 1 << 20  # of an answer
CELLS_A_ROW = 64
PIXELS_A_CELL = 10
NEEDED = {"kvcache", "pid", "placement", "backend", "stats", "promised", "findings", "block_map", "sequences"}


def add_top(commands):
    """Add the command."""
    command = commands.add_parser(
        "top",
        help="watch a cache in another process, which has called serve_status()",
        description="Arena, block map, sequences and rates of a cache, live. It only reads. On a terminal until "
        "interrupted, elsewhere a single picture.",
    )
    command.add_argument(
        "address", nargs="?", metavar="HOST:PORT", help="what serve_status() returned as address"
    )
    command.add_argument("--pid-file", metavar="FILE", help="what serve_status(pid_file=...) wrote, instead")
    command.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="between two looks; default: 1"
    )
    command.add_argument("--frames", type=count, metavar="N", help="look so many times, then end")
    command.add_argument(
        "--plot", metavar="FILE", help="write the block map of one moment as a picture, FILE.png, and end"
    )
    command.add_argument("--dark", action="store_true", help="the picture's ground is dark")
    add_json(command)
    command.set_defaults(run=_top)


def _seconds(text):
    return max(0.1, float(text))


def _top(arguments):
    host, port = _address(arguments)
    if arguments.plot is not None and Path(arguments.plot).suffix.lower() != ".png":
        raise UsageError(f"--plot {arguments.plot}: give a name that ends in .png")
    if arguments.json is not None or arguments.plot is not None:
        seen = look(host, port)
        if arguments.plot is not None:
            _plot(arguments.plot, seen, arguments.dark)
        if arguments.json is not None:
            write_json(arguments.json, [seen])
        return 0
    require("top", "top", {"rich": "rich"})
    from rich.console import Console
    from rich.live import Live

    from kvcache.top_view import frame

    console = Console()
    last = look(host, port)
    if not console.is_terminal and arguments.frames is None:
        arguments.frames = 1
    height = console.height if console.is_terminal else None
    with Live(frame(last, None, console.width, height), console=console, auto_refresh=False) as live:
        shown = 1
        while arguments.frames is None or shown < arguments.frames:
            time.sleep(arguments.interval)
            now = look(host, port)
            height = console.height if console.is_terminal else None
            live.update(frame(now, last, console.width, height), refresh=True)
            last, shown = now, shown + 1
    return 0


def _plot(file, seen, dark):
    """The picture of `KVCache.block_map_image`; of a large arena a pixel is a cell of several blocks."""
    cells = np.array(seen["block_map"]["cells"], np.int32)
    try:
        Path(file).write_bytes(png_of(image_of(cells, CELLS_A_ROW, dark), PIXELS_A_CELL))
    except OSError as error:
        raise UsageError(f"--plot {file}: {error.strerror}") from error


def _address(arguments):
    """Host and port; of a file, those of a process that lives."""
    if (arguments.address is None) == (arguments.pid_file is None):
        raise UsageError("top needs HOST:PORT or --pid-file FILE")
    text = arguments.address
    if text is None:
        try:
            text = json.loads(Path(arguments.pid_file).read_text(encoding="utf-8"))["address"]
        except OSError as error:
            raise UsageError(f"--pid-file {arguments.pid_file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--pid-file {arguments.pid_file}: not written by serve_status()") from error
    host, colon, port = str(text).rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) < 65536):
        raise UsageError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def look(host, port):
    """The snapshot that a process serves, see `kvcache.status.snapshot`."""
    connection = http.client.HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        text = answer.read(MOST_BYTES)
        if answer.status == 503:
            raise UsageError(f"{host}:{port}: the cache is closed")
        told = json.loads(text)
        if answer.status != 200 or not NEEDED.issubset(told):
            raise ValueError
    except (OSError, http.client.HTTPException) as error:
        raise UsageError(f"{host}:{port} does not answer: {error}") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{host}:{port} answers, but is no cache's status") from error
    finally:
        connection.close()
    return told
