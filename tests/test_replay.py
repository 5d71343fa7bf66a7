"""The replay: its arithmetic against a plain simulation, its rules one by one, and what it catches a cache at."""

import dataclasses
import json
import math
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from replay_model import Anywhere, Buddies, simulate

import kvcache
from kvcache.block_map import CACHED, FREE, GROUNDS, KEPT
from kvcache.replay import Replay, ReplayFault, Settings, chosen, replay
from kvcache.replay_baselines import Buddy, Reserve, RunCache
from kvcache.replay_film import Film, block_owners
from kvcache.replay_sweep import cells_of, record_of, sweep
from kvcache.traces import Trace, read_trace

TRACES = Path(__file__).parents[2] / "shared" / "traces"
SMALL = Settings(pool_tokens=256, block_size=4)


def trace_of(*requests):
    """A trace of (arrival, prompt, output), or of (prompt, output) all at once."""
    rows = [request if len(request) == 3 else (0.0, *request) for request in requests]
    return Trace("small", *zip(*rows, strict=True))


def random_trace(seed, count=60, longest=60, gap=0.05):
    rng = np.random.default_rng(seed)
    prompts = np.minimum(longest, rng.lognormal(2.5, 1.0, count).astype(int) + 1)
    outputs = np.minimum(longest, rng.lognormal(2.0, 1.0, count).astype(int))
    return Trace("random", np.cumsum(rng.exponential(gap, count)), prompts, outputs)


def rows_of(trace):
    return [tuple(trace[index]) for index in range(len(trace))]


def assert_same(figures, expected):
    told = figures.as_dict()
    for name, value in expected.items():
        if isinstance(value, Fraction):
            assert told[name] == pytest.approx(float(value), rel=1e-12), name
        else:
            assert told[name] == value, name


# --- against the oracle


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("keep_free", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_of_a_plain_simulation(seed, keep_free, placement):
    trace = random_trace(seed)
    settings = dataclasses.replace(SMALL, placement=placement, keep_free=keep_free)
    figures = replay(trace, settings)
    assert_same(figures, simulate(rows_of(trace), Anywhere(64), 4, keep_free))
    assert figures.finished == figures.requests - figures.refused
    if placement == "contiguous":
        assert figures.zero_copy_fraction == 1.0
    else:
        assert (figures.moves, figures.moved_tokens, figures.longest_pause_tokens) == (0, 0, 0)


def test_some_of_those_simulations_preempt_and_refuse():
    found = [simulate(rows_of(random_trace(seed)), Anywhere(64), 4, 0.0) for seed in range(4)]
    assert all(each["preempted"] for each in found)
    assert simulate([(0, 300, 1), (0, 1, 1)], Anywhere(64), 4, 0.0)["refused"] == 1


@pytest.mark.parametrize("speed", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("seed", range(3))
def test_arrivals_of_their_own_are_those_of_a_plain_simulation(seed, speed):
    trace = random_trace(seed, gap=0.3)
    settings = dataclasses.replace(SMALL, arrivals="trace", speed=speed, step_seconds=0.02)
    expected = simulate(rows_of(trace), Anywhere(64), 4, timed=True, speed=speed, step_seconds=0.02)
    assert_same(replay(trace, settings), expected)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("seed", range(3))
def test_known_lengths_are_promises_and_nobody_is_preempted(seed, placement):
    trace = random_trace(seed)
    settings = dataclasses.replace(SMALL, placement=placement, keep_free=0.0, max_tokens_known=True)
    figures = replay(trace, settings)
    assert_same(figures, simulate(rows_of(trace), Anywhere(64), 4, 0.0, claims_bound=1))
    assert (figures.preempted, figures.blocked_by_fragmentation) == (0, 0)


def test_known_lengths_without_a_bound_admit_as_unknown_ones_do():
    trace = random_trace(1)
    settings = dataclasses.replace(SMALL, keep_free=0.0, max_tokens_known=True, overcommit=math.inf)
    assert_same(replay(trace, settings), simulate(rows_of(trace), Anywhere(64), 4, 0.0))


@pytest.mark.parametrize("num_blocks", [64, 50])
@pytest.mark.parametrize("seed", range(4))
def test_buddies_are_those_of_a_plain_simulation(seed, num_blocks):
    trace, space = random_trace(seed), Buddies(num_blocks)
    settings = dataclasses.replace(SMALL, pool_tokens=4 * num_blocks, placement="buddy", keep_free=0.05)
    figures = replay(trace, settings)
    assert_same(figures, simulate(rows_of(trace), space, 4, 0.05))
    assert figures.zero_copy_fraction == 1.0


def test_reserved_room_is_that_of_a_plain_simulation_where_all_requests_are_alike():
    trace = trace_of(*[(8 + number % 3, 24 - number % 3) for number in range(40)])
    figures = replay(trace, dataclasses.replace(SMALL, placement="reserve", keep_free=0.0))
    assert_same(figures, simulate(rows_of(trace), Anywhere(64, whole=True), 4, 0.0))
    assert (figures.preempted, figures.moves, figures.blocked_by_fragmentation) == (0, 0, 0)


@pytest.mark.parametrize(
    "limits", [{"max_share": 0.2}, {"max_requests": 11}, {"max_share": 0.2, "max_requests": 11}]
)
def test_what_is_left_out_is_what_a_plain_simulation_leaves_out(limits):
    trace = random_trace(2)
    expected = simulate(rows_of(trace), Anywhere(64), 4, **limits)
    assert_same(replay(trace, dataclasses.replace(SMALL, **limits)), expected)
    if "max_share" in limits:
        assert expected["skipped"]


# --- the rules, by hand


def test_a_replay_by_hand():
    # 8 blocks of 4, of which 6 may be held at an admission: 3 + 2 blocks enter, the third waits for the first to end
    trace = trace_of((12, 2), (8, 4), (12, 1))
    figures = replay(trace, Settings(pool_tokens=32, block_size=4, keep_free=0.25))
    # step 1: 13 + 9 tokens, step 2: 14 + 10, then the first is freed; step 3: 11 + 13, the last is admitted
    assert (figures.steps, figures.attended_tokens, figures.appended_tokens) == (3, 22 + 24 + 24, 6)
    assert figures.utilization == pytest.approx((22 + 24 + 24) / 3 / 32)
    assert figures.internal_waste == pytest.approx(((1 - 22 / 28) + (1 - 24 / 28) + (1 - 24 / 28)) / 3)
    assert (figures.mean_sequences, figures.mean_waiting, figures.finished) == (2.0, 2 / 3, 3)


def test_nothing_overtakes_the_head_of_the_queue():
    trace = trace_of((16, 3), (20, 1), (1, 1))
    figures = replay(trace, Settings(pool_tokens=32, block_size=4, keep_free=0.0))
    assert (figures.steps, figures.mean_sequences) == (4, (3 * 1 + 2) / 4)


def test_the_head_may_fill_what_is_not_kept_free_to_the_last_block():
    enters = trace_of((180, 1))
    assert replay(enters, Settings(pool_tokens=200, block_size=1, keep_free=0.1)).refused == 0
    assert replay(trace_of((181, 1)), Settings(pool_tokens=200, block_size=1, keep_free=0.1)).refused == 1


def test_what_can_never_fit_is_refused_counted_and_never_tried():
    trace = trace_of((8, 2), (400, 1), (8, 300), (8, 2))
    running = Replay(trace, SMALL)
    figures = running.run()
    assert (figures.requests, figures.refused, figures.finished) == (4, 2, 2)
    assert running.order == [0, 3]


def test_a_trace_in_which_nothing_fits_has_no_steps():
    figures = replay(trace_of((400, 1)), SMALL)
    assert (figures.requests, figures.refused, figures.steps, figures.utilization) == (1, 1, 0, 0.0)


def test_a_request_without_output_is_prefilled_and_freed():
    figures = replay(trace_of((8, 0), (8, 0)), SMALL)
    assert (figures.finished, figures.steps, figures.appended_tokens) == (2, 0, 0)
    assert replay(trace_of((8, 0), (8, 3), (4, 0)), SMALL).steps == 1


def test_the_youngest_is_preempted_and_recomputed_with_what_it_had_generated():
    # two sequences of 2 blocks fill 4 blocks of 4; the fifth block is wanted in step 1
    running = Replay(trace_of((8, 6), (7, 6)), Settings(pool_tokens=16, block_size=4, keep_free=0.0))
    running._step()
    assert (running.preempted, running.returned, list(running.live)) == (1, [1], [0])
    assert running.prompts[1] == 7  # its token of that step was void
    figures = running.run()
    assert (figures.preempted, figures.finished) == (1, 2)

    running = Replay(trace_of((6, 8), (4, 6)), Settings(pool_tokens=16, block_size=4, keep_free=0.0))
    for _ in range(3):
        running._step()
    assert (running.preempted, running.returned) == (1, [1])
    assert running.prompts[1] == 4 + 2
    assert running.run().finished == 2


def test_who_was_preempted_may_have_what_is_kept_free_when_alone():
    # it has grown to more than admission allows, when it is preempted
    settings = Settings(pool_tokens=40, block_size=4, keep_free=0.5)
    figures = replay(trace_of((4, 30), (4, 30)), settings)
    assert (figures.finished, figures.refused) == (2, 0)


def test_steps_after_the_last_admission_only_drain():
    short = replay(trace_of((8, 2), (8, 2)), SMALL)
    long = replay(trace_of((8, 2), (8, 200)), SMALL)
    assert short.steps == long.steps == 1
    assert long.finished == 2


def test_time_without_requests_has_no_steps():
    trace = trace_of((0.0, 8, 2), (1000.0, 8, 2))
    figures = replay(trace, dataclasses.replace(SMALL, arrivals="trace"))
    assert (figures.steps, figures.mean_sequences, figures.mean_waiting) == (4, 1.0, 0.0)


def test_a_higher_speed_lets_requests_meet():
    trace = trace_of((0.0, 8, 10), (1.0, 8, 10))
    slow, fast = (
        replay(trace, dataclasses.replace(SMALL, arrivals="trace", speed=speed, step_seconds=0.1))
        for speed in (0.5, 10.0)
    )
    assert (slow.mean_sequences, slow.steps) == (1.0, 20)
    assert fast.mean_sequences > 1.5


def test_skipped_requests_do_not_count_to_the_most_that_are_wanted():
    trace = trace_of((200, 1), (8, 1), (200, 1), (8, 1), (200, 1))
    taken, skipped = chosen(trace, dataclasses.replace(SMALL, max_share=0.25, max_requests=2))
    assert (taken.tolist(), skipped) == ([1, 3], 3)
    taken, skipped = chosen(trace, dataclasses.replace(SMALL, max_share=0.25, max_requests=1))
    assert (taken.tolist(), skipped) == ([1], 2)


# --- what it sees


@pytest.mark.parametrize("placement", ["contiguous", "buddy"])
def test_moves_are_told_and_seen(placement):
    settings = Settings(pool_tokens=256, block_size=4, placement=placement, keep_free=0.05)
    figures = replay(random_trace(3, count=200), settings)
    assert 0 < figures.moved_tokens_seen <= figures.moved_tokens
    assert 0 < figures.longest_pause_tokens <= figures.moved_tokens
    assert figures.moved_over_attended == figures.moved_tokens / figures.attended_tokens


def test_a_paged_cache_scatters_and_that_is_counted():
    figures = replay(random_trace(3), dataclasses.replace(SMALL, placement="paged"))
    assert 0 < figures.zero_copy_fraction < 1


def test_a_cache_that_tells_fewer_moves_than_it_makes_is_caught(monkeypatch):
    stats = kvcache.KVCache.stats
    monkeypatch.setattr(
        kvcache.KVCache,
        "stats",
        lambda cache: stats(cache)._replace(moved_tokens=stats(cache).moved_tokens // 2),
    )
    with pytest.raises(ReplayFault, match=r"\d+ tokens were seen to move, stats\(\) tells \d+"):
        replay(random_trace(3, count=200), dataclasses.replace(SMALL, keep_free=0.05))


def test_a_cache_that_admits_nobody_is_caught(monkeypatch):
    monkeypatch.setattr(kvcache.KVCache, "allocate_for", lambda cache, *prompt, **limit: None)
    with pytest.raises(ReplayFault, match="request 0 of 2 blocks is not admitted to an empty pool"):
        replay(trace_of((8, 1)), SMALL)


def test_a_cache_that_refuses_whoever_is_alone_is_caught(monkeypatch):
    monkeypatch.setattr(kvcache.KVCache, "append_token", lambda cache, request_id: False)
    monkeypatch.setattr(kvcache.DecodeBatch, "append", lambda batch: np.zeros(len(batch), bool))
    with pytest.raises(ReplayFault, match="request 0, alone in the pool, is refused token 9"):
        replay(trace_of((8, 1), (8, 1)), SMALL)


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_real_bytes_come_out_as_they_were_written(backend, placement):
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    trace = random_trace(5, count=40)
    settings = dataclasses.replace(SMALL, placement=placement, backend=backend, keep_free=0.0)
    figures, without = replay(trace, settings), replay(trace, dataclasses.replace(settings, backend="none"))
    assert figures.preempted > 0
    assert figures.verified_tokens == int((trace.prompts + trace.outputs).sum())
    for name in ("steps", "moved_tokens", "attended_tokens", "preempted", "moved_tokens_seen"):
        assert getattr(figures, name) == getattr(without, name)


def test_bytes_that_are_lost_are_caught(monkeypatch):
    write = kvcache.DecodeBatch.write
    monkeypatch.setattr(
        kvcache.DecodeBatch, "write", lambda batch, layer, k, v: write(batch, layer, k, 0 * v)
    )
    with pytest.raises(
        ReplayFault, match="layer 0 of request 0 is not what was written, from position 8 of 10 on"
    ):
        replay(trace_of((8, 2)), dataclasses.replace(SMALL, backend="numpy"))


def test_who_watches_sees_it_go_on():
    seen = []
    replay(random_trace(0, count=300), SMALL, watch=lambda now: seen.append((now.finished, len(now.order))))
    assert seen == sorted(seen)
    assert len(seen) > 3


def test_the_same_trace_gives_the_same_figures():
    def untimed(figures):
        told = figures.as_dict()
        del told["wall_seconds"], told["allocator_ns_per_token"]
        return told

    first, second = (untimed(replay(random_trace(7), SMALL)) for _ in range(2))
    assert first == second


# --- baselines


def test_a_buddy_grows_in_place_where_its_right_neighbour_is_free():
    cache = RunCache(Buddy(16), 16, 4)
    cache.allocate_for("a", 8, max_tokens=0)
    cache.append_token("a")
    assert (cache.block_table("a").tolist(), cache.moves, cache.free_blocks) == ([0, 1, 2], 0, 12)
    cache.check()


def test_a_buddy_moves_where_its_neighbour_is_taken_and_refuses_where_nothing_is_long_enough():
    cache = RunCache(Buddy(8), 8, 4)
    cache.allocate_for("a", 8, max_tokens=0)
    cache.allocate_for("b", 8, max_tokens=0)
    assert cache.append_token("a")
    assert (cache.block_table("a").tolist(), cache.moves, cache.moved_tokens) == ([4, 5, 6], 1, 8)
    cache.allocate_for("c", 4, max_tokens=0)
    before = cache.stats(), cache.block_table("b").tolist()
    assert not cache.append_token("b")
    assert (cache.stats(), cache.block_table("b").tolist()) == before
    assert cache.allocate_for("d", 12, max_tokens=0) is None
    cache.check()


def test_a_reserved_run_has_room_for_all_output_and_is_in_one_piece():
    cache = RunCache(Reserve(8), 8, 4)
    assert all(cache.allocate_for(name, 1, max_tokens=8) for name in "abcd")
    cache.free_for("a")
    cache.free_for("c")
    assert cache.free_blocks == 4
    assert cache.allocate_for("e", 1, max_tokens=16) is None
    assert cache.stats().fragmentation == 0.5
    cache.check()


def test_a_batch_of_runs_answers_as_a_decode_batch_does():
    cache, other = RunCache(Reserve(8), 8, 4), kvcache.KVCache(1, 1, 1, 32, 4, backend="none")
    batches = [each.batch() for each in (cache, other)]
    for name in "abc":
        for each, batch in zip((cache, other), batches, strict=True):
            each.allocate_for(name, 3, max_tokens=8)
            batch.add(name)
    for each, batch in zip((cache, other), batches, strict=True):
        assert batch.append().all()
        each.free_for("b")
        batch.remove("b")
    ours, theirs = batches
    assert len(ours) == len(theirs) == 2
    assert ours.lengths.tolist() == theirs.lengths.tolist() == [4, 4]
    assert len(ours.starts) == len(theirs.starts)
    other.close()


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda cache: setattr(cache._rule, "free_blocks", 3), "free runs hold 6 blocks, free_blocks says 3"),
        (lambda cache: cache._rule._free[1].update((2, 0)), "free runs hold"),
        (lambda cache: cache.tokens.fill(99), "holds more tokens than its 2 blocks have"),
        (lambda cache: cache._runs.clear(), "0 blocks held and 6 free, of 8"),
        (lambda cache: cache._runs.update(b=cache._runs["a"]), "begins at block 0, one ends at 2"),
    ],
)
def test_what_is_wrong_with_a_baseline_is_named(break_it, complaint):
    cache = RunCache(Buddy(8), 8, 4)
    cache.allocate_for("a", 8, max_tokens=0)
    cache.check()
    break_it(cache)
    with pytest.raises(RuntimeError, match=complaint):
        cache.check()


# --- sweeps and films


def test_cells_are_every_combination():
    cells = cells_of(SMALL, placement=["contiguous", "buddy"], keep_free=[0.1, 0.2])
    told = [(cell.placement, cell.keep_free) for cell in cells]
    assert told == [("contiguous", 0.1), ("contiguous", 0.2), ("buddy", 0.1), ("buddy", 0.2)]
    assert all(cell.pool_tokens == SMALL.pool_tokens for cell in cells)


def test_a_sweep_in_processes_gives_what_each_replay_gives():
    pytest.importorskip("joblib")
    trace, cells = random_trace(1), cells_of(SMALL, keep_free=[0.0, 0.2])
    for figures, cell in zip(sweep(trace, cells, jobs=2), cells, strict=True):
        assert figures.attended_tokens == replay(trace, cell).attended_tokens


def test_a_dask_cluster_takes_a_sweep():
    pytest.importorskip("joblib")
    distributed = pytest.importorskip("distributed")
    trace, cells = random_trace(1), cells_of(SMALL, keep_free=[0.0, 0.2])
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        told = list(sweep(trace, cells, dask=cluster.scheduler_address))
    assert [each.steps for each in told] == [replay(trace, cell).steps for cell in cells]


def test_settings_figures_and_traces_travel_to_other_processes():
    figures = replay(random_trace(1), SMALL)
    assert pickle.loads(pickle.dumps(figures)) == figures
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL
    assert rows_of(pickle.loads(pickle.dumps(random_trace(1)))) == rows_of(random_trace(1))


def test_a_record_is_json_whatever_is_in_it():
    trace = trace_of((8, 1))
    record = record_of(trace, SMALL, replay(trace, SMALL))
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["overcommit"], record["trace"], record["bad_rows"]) == ("inf", "small", 0)
    known = dataclasses.replace(SMALL, max_tokens_known=True)
    assert record_of(trace, known, replay(trace, known))["overcommit"] == 1.0


def test_what_is_cached_has_a_colour_and_is_named():
    pytest.importorskip("matplotlib")
    from kvcache.replay_plot import _any_cached, _coloured

    owners = np.array([[FREE, CACHED], [3, CACHED]])
    cells = _coloured(owners, {"mean_sequences": 4})
    assert [tuple(cell) for cell in cells[0]] == [GROUNDS[False], KEPT[False]]
    assert tuple(cells[1, 0]) not in {GROUNDS[False], KEPT[False]}
    assert _any_cached(SimpleNamespace(maps=[owners[:, 0], owners[:, 1]]))
    assert not _any_cached(SimpleNamespace(maps=[owners[:, 0]]))


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_a_film_shows_what_is_cached(placement):
    settings = dataclasses.replace(SMALL, placement=placement, prefix=True)
    with settings.open_pool() as pool:
        pool.allocate_for(0, list(range(3 * settings.block_size + 1)))
        pool.commit(0)
        kept = pool.block_table(0)[:3].tolist()
        pool.free_for(0)
        pool.allocate_for(7, 2 * settings.block_size)
        batch = pool.batch([7])
        meter = SimpleNamespace(stats=pool.stats(), starts=batch.starts, lengths=batch.lengths)
        now = SimpleNamespace(settings=settings, meter=meter, pool=pool, live=[7])
        owners = block_owners(now)
        assert np.flatnonzero(owners == CACHED).tolist() == sorted(kept)
        assert np.flatnonzero(owners == 7).tolist() == sorted(pool.block_table(7))
        assert (owners == FREE).sum() == settings.num_blocks - 5


@pytest.mark.parametrize("placement", ["contiguous", "paged", "buddy"])
def test_a_film_shows_who_holds_which_block(placement):
    class Checked(Film):
        def shoot(self, now):
            super().shoot(now)
            held = {number: (self.maps[-1] == number).sum() for number in now.live}
            assert held == {number: len(now.pool.block_table(number)) for number in now.live}

    film = Checked()
    replay(random_trace(2, count=30), dataclasses.replace(SMALL, placement=placement), film=film)
    assert film.every == 1
    assert len(film.maps) == len(film.steps) == len(film.tokens) == len(film.waiting)
    assert film.maps[0].shape == (64,)


def test_a_long_film_keeps_frames_at_even_distances(monkeypatch):
    monkeypatch.setattr("kvcache.replay_film.MOST_FRAMES", 10)
    film = Film()
    figures = replay(random_trace(2, count=100), SMALL, film=film)
    assert film.every > 1
    assert 5 <= len(film.steps) <= 10
    assert film.steps == list(range(film.every, figures.steps + 1, film.every))[: len(film.steps)]
    assert film.moved == sorted(film.moved)


# --- on real traffic

TABLE = [
    ("azure_2023_conv.csv.gz", 262144, 0.88),
    ("azure_2023_conv.csv.gz", 32768, 0.86),
    ("azure_2023_code.csv.gz", 262144, 0.85),
    ("azure_2023_code.csv.gz", 32768, 0.80),
    ("mooncake_conversation.jsonl.gz", 262144, 0.85),
]


@pytest.mark.parametrize(("name", "pool_tokens", "utilization"), TABLE)
def test_real_traffic_fills_the_pool_and_every_view_is_one_run(name, pool_tokens, utilization):
    if not (TRACES / name).exists():
        pytest.skip(f"{name} is not here")
    settings = Settings(pool_tokens=pool_tokens, max_share=0.25, max_requests=4000)
    figures = replay(read_trace(TRACES / name), settings)
    assert figures.requests == figures.finished == 4000
    assert figures.utilization >= utilization
    assert figures.zero_copy_fraction == 1.0


def test_a_trace_of_four_million_tokens_is_replayed_in_seconds_and_little_memory():
    path = TRACES / "azure_2023_conv.csv.gz"
    status = Path("/proc/self/status")
    if not path.exists() or not status.exists():
        pytest.skip("the trace is not here, or nothing that tells a process's peak memory")
    script = (
        "import sys, time; from kvcache.cli import main; code = main(['replay', sys.argv[1], '--json']); "
        "print(time.process_time()); print(open(sys.argv[2]).read()); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(status)], capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(Path(kvcache.__file__).parents[1])},
    )  # fmt: skip
    record, seconds, *told = done.stdout.splitlines()
    (peak,) = [int(line.split()[1]) for line in told if line.startswith("VmHWM")]  # KiB; not the parent's
    assert json.loads(record)["finished"] == 19366
    assert json.loads(record)["appended_tokens"] > 4_000_000
    assert float(seconds) < 10
    assert peak * 1024 < 200 * 2**20
