"""What the commands have in common: options, output as JSON, and errors that say what to do."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path


class UsageError(Exception):
    """Something that the caller of a command can put right; the message says how."""


def count(text):
    """A whole number from 1 on, as the type of an argument."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def add_json(command):
    """Give a command ``--json [FILE]``."""
    command.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write the result as JSON, to standard output by default",
    )


def require(what, extra, modules):
    """Refuse to go on without libraries.

    Parameters
    ----------
    what : str
        What needs them, for the message.
    extra : str
        The extra of this package that brings them.
    modules : dict
        Name to import, and name of the distribution.
    """
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"{what} needs {', '.join(missing)}: pip install 'kvcache[{extra}]'")


def check_folder(option, file):
    """Refuse a file in a folder that is not there, before anything is computed."""
    if file not in (None, "-") and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"{option} {file}: there is no such folder")


def write_json(file, values, indent=None):
    """Write each of some values as JSON, to standard output if the file is ``-``; None writes nothing."""
    if file is None:
        return
    text = "".join(json.dumps(each, indent=indent, allow_nan=False) + "\n" for each in values)
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {file}: {error.strerror}") from error
