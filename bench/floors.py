"""Floors: costs that nobody gets below. A benchmark takes them between its rounds, and is told in them."""

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

TURNS = 2_000


def native_floor(folder):
    """Compiles `_floor.pyx` in `folder`, an empty one; an instance of its class."""
    source = shutil.copy(Path(__file__).with_name("_floor.pyx"), folder)
    shutil.copy(Path(__file__).parents[1] / "kvcache" / "_hash.h", folder)
    command = [sys.executable, "-m", "Cython.Build.Cythonize", "-3", "--inplace", "--quiet", str(source)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"_floor.pyx does not compile:\n{done.stdout}{done.stderr}")
    binary = Path(folder) / f"_floor{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    spec = importlib.util.spec_from_file_location("_floor", binary)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Floor()


class Floors:
    """Nanoseconds of one turn of an empty Python loop, and of one empty native call beyond its turn."""

    def __init__(self, native):
        self.native = native
        self.ids = [f"request-{number}" for number in range(TURNS)]
        self.turns, self.calls, self.rounds = [], [], []

    def take(self):
        self.rounds.append(timed(nothing))
        self.turns.append(timed(self.empty_turns) / TURNS)
        self.calls.append(timed(self.empty_calls) / TURNS)

    @property
    def turn(self):
        return min(self.turns)

    @property
    def call(self):
        return min(self.calls) - self.turn

    @property
    def empty_round(self):
        """What calling the work and asking the clock take."""
        return min(self.rounds)

    def empty_turns(self):
        for _ in self.ids:
            pass

    def empty_calls(self):
        call = self.native.call
        for request_id in self.ids:
            call(request_id)


def nothing():
    """The work of an empty round."""


def timed(work):
    """Nanoseconds that one call of `work` takes."""
    begin = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - begin
