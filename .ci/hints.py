"""Compiles the native modules to C, elsewhere, and fails on any warning or performance hint of Cython's."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = sorted(Path("kvcache").glob("*.pyx"))
DIRECTIVES = runpy.run_path("setup.py")["DIRECTIVES"]


def complaints_of(source, folder):
    options = [word for name, value in DIRECTIVES.items() for word in ("-X", f"{name}={value}")]
    command = [sys.executable, "-m", "cython", *options, str(source), "-o", f"{folder}/{source.stem}.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return [done.stdout + done.stderr]
    # a compile looks into the .pxd files of others as well: each complaint is told once
    return [line for line in done.stderr.splitlines() if line.startswith(("warning:", "performance hint:"))]


def main():
    with tempfile.TemporaryDirectory() as folder:
        told = {line for source in SOURCES for line in complaints_of(source, folder)}
    print("\n".join(sorted(told)) or f"cython: {len(SOURCES)} modules, no warnings, no performance hints")
    return bool(told)


if __name__ == "__main__":
    sys.exit(main())
