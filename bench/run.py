"""Runs the benchmarks, prints their tables, and compares them with the committed baseline: `make bench`.

    python bench/run.py [--update] [arguments for pytest, such as -k append]

A benchmark that seems too slow is measured again, up to three times: a neighbour's load passes, a slower
program stays. With `--update` everything is run three times, the quietest of the three is each benchmark's
baseline, and the tables of docs/performance.md are written from it. Choose a quiet hour for that.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compare
import tables

HERE = Path(__file__).parent
TRIES = 3
OPTIONS = (
    "--benchmark-only",
    "--benchmark-disable-gc",
    "--benchmark-quiet",
    "-p",
    "no:cacheprovider",
    "--quiet",
    "--no-header",
)


def run(arguments, tests):
    """One run: ({name: row}, the machine). Whatever fails ends it."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        project = ["-c", str(HERE.parent / "pyproject.toml"), "--rootdir", str(HERE.parent)]
        command = [sys.executable, "-m", "pytest", *project, *OPTIONS, f"--benchmark-json={results}"]
        # threads of linear algebra that nobody asked for would only take turns with what is measured
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run([*command, *arguments, *tests], cwd=HERE, env=environment, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return compare.read_results(results)


def again(arguments, rows, baseline):
    """Measures what seems too slow once more, and keeps the better of the two."""
    for _ in range(TRIES):
        names = compare.slower(rows, baseline)
        if not names:
            return
        print(f"{len(names)} seem slower than the baseline allows: measured again")
        for name, row in run(arguments, names)[0].items():
            if row["units"] < rows[name]["units"]:
                rows[name] = row


def quietest(runs):
    """Of several runs, each benchmark's row from the one in which its median was least."""
    return {name: min([run[name] for run in runs], key=lambda row: row["median_ns"]) for name in runs[0]}


def main():
    arguments = [argument for argument in sys.argv[1:] if argument != "--update"]
    if "--update" in sys.argv:
        if arguments:
            sys.exit("the baseline is of all benchmarks: --update goes without other arguments")
        found = [run([], [str(HERE)]) for _ in range(TRIES)]
        rows, machine = quietest([rows for rows, _ in found]), found[0][1]
        compare.show(rows, compare.read_baseline())
        compare.write_baseline(rows, machine)
        return tables.main()
    rows, _ = run(arguments, [str(HERE)])
    baseline = compare.read_baseline()
    again(arguments, rows, baseline)
    return bool(compare.show(rows, baseline))


if __name__ == "__main__":
    sys.exit(main())
