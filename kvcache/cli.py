"""The `kvcache` command.

Exit codes: 0 done, 1 the run found a fault, 2 bad usage or something missing, 130 interrupted.
Every subcommand takes ``--json [FILE]``; with no FILE or ``-``, JSON is all that goes to standard output.
"""

import argparse
import sys

from kvcache._version import __version__
from kvcache.cli_arguments import UsageError
from kvcache.cli_demo import add_demo
from kvcache.cli_plan import add_plan
from kvcache.cli_replay import add_replay
from kvcache.cli_top import add_top
from kvcache.errors import KVCacheError


def main(argv=None):
    """Run the `kvcache` command.

    Parameters
    ----------
    argv : list of str, optional
        Arguments, by default those of the process.

    Returns
    -------
    int
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (UsageError, KVCacheError, MemoryError) as error:
        print(f"kvcache: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvcache: interrupted", file=sys.stderr)
        return 130


def _parser():
    parser = argparse.ArgumentParser(
        prog="kvcache", description="One preallocated K/V arena for LLM inference."
    )
    parser.add_argument("--version", action="version", version=f"kvcache {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_demo(commands)
    add_replay(commands)
    add_plan(commands)
    add_top(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
