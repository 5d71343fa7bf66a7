"""The fixture that every benchmark is measured with: floors between the rounds, results checked after each.

A round is short, and there are many: on a machine that is shared, the least and the median of many short
rounds say what the code costs, one long round says what the neighbours did. Where every round is another step
of a scenario, the whole scenario is run several times; calls in the same order do the same work, so each step
counts with its fastest pass, and the median and p99 are over the steps.
"""

import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from floors import Floors, native_floor, timed

FLOOR_EVERY = 20  # rounds of a scenario of several passes, whose steps are many


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    return native_floor(tmp_path_factory.mktemp("floor"))


@pytest.fixture
def measure(benchmark, native):
    return Measure(benchmark, Floors(native))


class Measure:
    """Runs one benchmark, and leaves what it found in its `extra_info`."""

    def __init__(self, benchmark, floors):
        self.benchmark = benchmark
        self.floors = floors
        self.own_floor = []
        self.round = 0

    def __call__(
        self, work, *, verify, prepare=None, rounds=200, passes=1, calls=1, turns=0, floor=None, targets=None
    ):
        """Times `work`, which makes `calls` calls in `turns` turns of a Python loop.

        Parameters
        ----------
        work : callable
            The round: without arguments, and nothing in it but what is measured.
        verify : callable
            Raises if the round before has not done what it should. Called after each.
        prepare : callable, optional
            Makes the state that a round needs, untimed.
        rounds, passes : int
            In all ``rounds * passes`` rounds; with several passes, `prepare` begins anew with each.
        floor : (str, callable), optional
            What the benchmark is told in, and what does as much of it in as many turns; by default the
            empty native call.
        targets : dict of str to float or callable, optional
            At most so many nanoseconds for ``"median"`` or ``"p99"``; a callable is given an empty call's.
        """
        name, floor_work = floor or ("empty call", None)

        def before():
            if self.round:
                verify()
            if passes == 1 or self.round % FLOOR_EVERY == 0:
                self.floors.take()
            if prepare:
                prepare()
            if floor_work:
                self.own_floor.append(timed(floor_work))
            self.round += 1

        self.benchmark.pedantic(work, setup=before, rounds=rounds * passes)
        verify()
        if self.benchmark.stats is not None:
            self.record(name, rounds, passes, calls, turns, targets or {})

    def record(self, name, rounds, passes, calls, turns, targets):
        turn, call = self.floors.turn, self.floors.call
        empty = self.floors.empty_round + turns * turn
        times = [(each * 1e9 - empty) / calls for each in self.benchmark.stats.stats.data]
        floors = [(each - empty) / calls for each in self.own_floor]
        if passes > 1:
            times = [min(times[step::rounds]) for step in range(rounds)]
        typical, least = statistics.median(times), min(times)
        self.benchmark.extra_info.update(
            median_ns=typical,
            least_ns=least,
            p99_ns=sorted(times)[int(0.99 * len(times))] if passes > 1 else None,
            turn_ns=turn,
            call_ns=call,
            floor=name,
            floor_ns=min(floors, default=call),
            steady_ns=typical if passes > 1 else least,
            targets={what: limit(call) if callable(limit) else limit for what, limit in targets.items()},
        )
        if floors:
            self.benchmark.extra_info["units"] = ratio_of(times, floors)

    def note(self, **facts):
        """Facts beside the time: what was counted, or (what was counted, the most it may be)."""
        self.benchmark.extra_info.setdefault("facts", {}).update(facts)

    def empty(self, name):
        """A floor as a benchmark of its own, so that every group's table shows it."""
        work = {"turn": self.floors.empty_turns, "call": self.floors.empty_calls}[name]
        count = len(self.floors.ids)
        self(
            work,
            verify=self.native_does_nothing,
            calls=count,
            turns=count if name == "call" else 0,
            rounds=50,
        )

    def native_does_nothing(self):
        assert self.floors.native.call("request-0") is None


def ratio_of(times, floors):
    """How many floors a round takes, of the quarter of the rounds that the neighbours disturbed least."""
    rounds = sorted(zip(times, floors, strict=True), key=sum)
    return statistics.median([time / floor for time, floor in rounds[: -(-len(rounds) // 4)]])


def pytest_benchmark_update_machine_info(machine_info):
    """What the numbers depend on, and nothing that names the machine."""
    from importlib.metadata import PackageNotFoundError, version

    machine_info.pop("node", None)
    for package in ("numpy", "mlx", "mlx-lm", "cython"):
        try:
            machine_info[package] = version(package)
        except PackageNotFoundError:
            machine_info[package] = None
