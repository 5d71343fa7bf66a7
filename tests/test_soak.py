"""The storm of `soak.py`, under Python's development mode: a few seconds of it, or as many as one likes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import soak

import kvcache

SECONDS = float(os.environ.get("KVCACHE_SOAK_SECONDS", "4"))
COMMAND = [
    sys.executable,
    "-X",
    "dev",
    "-X",
    "faulthandler",
    "-W",
    "error",
    str(Path(__file__).with_name("soak.py")),
]
EVERYTHING = (  # that has to have happened, or the storm was none
    "granted",
    "timeout",
    "cancelled",
    "never_fits",
    "cancelled by others",
    "tasks cancelled",
    "grown after all",
    "evicted",
    "objections",
    "cuts",
    "forks",
    "holds",
    "looks",
    "comparisons",
    "appends",
    "owners told",
    "pins",
    "hit tokens",
    "swapped",
    "swaps failed",
    "told leaving",
    "suspended by their owners",
    "came back",
    "came back lost",
    "came back failed",
    "corrupt chunks",
    "computed again",
    "writes that raised",
    "reads that raised",
)


def test_a_storm_leaves_nothing_behind_and_forgets_nobody():
    place = str(Path(kvcache.__file__).parents[1])
    done = subprocess.run(
        [*COMMAND, "--seconds", str(SECONDS), "--seed", "1"],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=SECONDS + 200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["faults"] == 0
    assert [name for name in EVERYTHING if not told.get(name)] == []


SILENCE = """
import sys, threading
sys.path.insert(0, {folder!r})
import soak

soak.STILL_SECONDS = 0.5
soak.THREADS = soak.LOOPS = 0
soak.Storm.hold = soak.Storm.look = soak.Storm.pin = lambda self, number: threading.Event().wait()
soak.Storm("1", 1, {{}}, {store!r}).run()
"""


def test_where_nothing_finishes_all_stacks_are_printed(tmp_path):
    place = str(Path(kvcache.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", SILENCE.format(folder=str(Path(__file__).parent), store=str(tmp_path))],
        env={**os.environ, "PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout") and done.stderr.count("in guarded") == 3


def test_a_fault_is_told_and_ends_it(tmp_path):
    storm = soak.Storm("1", 30, {}, tmp_path)
    storm.cache.get_kv_views = lambda *_: (_ for _ in ()).throw(RuntimeError("wrong bytes"))
    storm.run()
    assert any("wrong bytes" in fault for fault in storm.faults)
