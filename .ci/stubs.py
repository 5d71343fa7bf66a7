"""Checks the stubs of the native modules against the installed package."""

import sys
from importlib.resources import files

from mypy.stubtest import main


def stubbed():
    """Modules of the installed package that have a stub; the others are Python, or rooms behind a door."""
    return sorted(
        f"kvcache.{path.name[:-4]}" for path in files("kvcache").iterdir() if path.name.endswith(".pyi")
    )


if __name__ == "__main__":
    modules = stubbed()
    if not modules:
        sys.exit("no stub is installed with kvcache")
    sys.argv[1:] = ["--ignore-disjoint-bases", *modules]
    sys.exit(main())
