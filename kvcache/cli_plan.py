"""`kvcache plan`: what a model's K and V cost, and how memory divides."""

import argparse
import importlib.util
import re
import sys
from decimal import Decimal
from pathlib import Path

from kvcache.cli_arguments import UsageError, add_json, check_folder, count, require, write_json
from kvcache.spec import FLOATS, MAX_TOKENS

SCALES = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("k", "M", "G", "T"), 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)")


def add_plan(commands):
    """Add the command."""
    command = commands.add_parser(
        "plan",
        help="say what a model's K and V cost, and how memory divides",
        description="Reads the config.json of a model and says how many bytes a token and a sequence cost, how memory "
        "divides into weights, activations and arena, how many sequences fit, and what cache to make. "
        "Sizes have a unit: 24GiB, 40GB, 512MiB.",
    )
    command.add_argument("config", metavar="CONFIG", help="a config.json, or the folder that it is in")
    memory = command.add_mutually_exclusive_group()
    memory.add_argument("--memory", type=_size, metavar="SIZE", help="that is there for everything")
    memory.add_argument(
        "--device",
        action="store_true",
        help="take what this machine has: on Metal the recommended working set",
    )
    command.add_argument("--weights", type=_size, metavar="SIZE", help="default: estimated from the config")
    command.add_argument(
        "--activations", type=_size, metavar="SIZE", help="default: estimated from the config"
    )
    command.add_argument("--dtype", choices=FLOATS, help="of K and V; default: the model's, or bfloat16")
    command.add_argument(
        "--state-dtype", choices=FLOATS, help="of recurrent states; default: the config's, or float32"
    )
    command.add_argument(
        "--context", type=count, metavar="N", help="tokens of a sequence; default: 8192, or the model's most"
    )
    command.add_argument(
        "--concurrency", type=count, metavar="N", help="sequences at a time; default: as many as fit"
    )
    command.add_argument("--block-size", type=count, metavar="N", help="tokens per block; default: 16 to 64")
    add_json(command)
    command.add_argument("--python", action="store_true", help="print the constructor call, and nothing else")
    command.set_defaults(run=_plan)


def _size(text):
    match = SIZE.fullmatch(text)
    if not match or match[2] not in SCALES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: a number and one of {', '.join(SCALES)}, such as 24GiB"
        )
    return int(Decimal(match[1]) * SCALES[match[2]])


_size.__name__ = "size"


def _plan(arguments):
    from kvcache.model_config import read_config
    from kvcache.planning import Wishes, make_plan

    _check(arguments)
    try:
        model = read_config(arguments.config, arguments.dtype, arguments.state_dtype)
    except FileNotFoundError as error:
        raise UsageError(
            f"{error.filename}: there is no such file: give the config.json of a model, or the folder that it is in"
        ) from error
    except OSError as error:
        raise UsageError(f"{arguments.config}: {error.strerror}") from error
    memory, source = _memory(arguments)
    wishes = Wishes(
        memory=memory,
        weights=arguments.weights,
        activations=arguments.activations,
        context=arguments.context,
        concurrency=arguments.concurrency,
        block_size=arguments.block_size,
    )
    return _tell(arguments, _planned(make_plan, model, wishes), source)


def _planned(make_plan, model, wishes):
    """The plan; what stands in its way is told with the options that help."""
    from kvcache.errors import UnreadableConfig
    from kvcache.planning import BudgetTooSmall

    try:
        return make_plan(model, wishes)
    except BudgetTooSmall as error:
        raise UsageError(
            f"{error}: give more --memory, or the --weights and --activations that you have measured"
        ) from error
    except UnreadableConfig as error:
        raise UsageError(
            f"weights and activations cannot be estimated, give --weights and --activations: {error}"
        ) from error


def _check(arguments):
    """Refuse what cannot work before anything is read."""
    if arguments.python and arguments.json == "-":
        raise UsageError(
            "--python and --json both print to standard output: give one of them, or --json a FILE"
        )
    if not arguments.python:
        require("a plan", "plan", {"rich": "rich"})
    if arguments.block_size is not None and arguments.block_size >= MAX_TOKENS:
        raise UsageError(
            f"--block-size is {arguments.block_size}, and an arena has fewer than {MAX_TOKENS} tokens"
        )
    check_folder("--json", arguments.json)
    if arguments.json in (None, "-"):
        return
    config = Path(arguments.config)
    if Path(arguments.json).resolve() in (config.resolve(), (config / "config.json").resolve()):
        raise UsageError(
            f"--json {arguments.json} would overwrite the config: give another name, or --json -"
        )


def _memory(arguments):
    """Bytes to divide and where they are from; None where none are given."""
    if not arguments.device:
        return arguments.memory, "given"
    if importlib.util.find_spec("mlx") is not None:
        import mlx.core as mx

        from kvcache.mlx_graph import usable_memory

        device = mx.default_device()
        return usable_memory(device), "the system" if device.type == mx.cpu else "MLX"
    from kvcache.memory import available_memory

    return available_memory(), "the system"


def _tell(arguments, plan, source):
    from kvcache.plan_record import constructor_of, record_of

    if arguments.python:
        if plan.max_total_tokens is None:
            raise UsageError(_no_arena(plan))
        sys.stdout.write(constructor_of(plan))
        for warning in plan.warnings:
            print(f"kvcache: {warning}", file=sys.stderr)
    else:
        from rich.console import Console

        from kvcache.plan_view import print_plan

        print_plan(Console(stderr=arguments.json == "-"), plan, _caption(arguments, plan))
    write_json(arguments.json, [record_of(plan) | {"memory_from": source if plan.budget else None}])
    return 0


def _no_arena(plan):
    if plan.costs.arena_bytes_per_token:
        return "--python needs to know how large: give --memory, --device or --concurrency"
    return "--python: no layer of this model keeps K and V, there is no cache to make"


def _caption(arguments, plan):
    path = Path(arguments.config).resolve()
    name = path.parent.name if path.name == "config.json" else path.name.removesuffix(".json")
    model = plan.model
    kind = f" ({model.model_type})" if model.model_type else ""
    return f"{name}{kind}: {len(model.layers)} layers, K and V in {model.dtype}"
