"""Prefixes in a replay: tokens made of ids, what is found against a plain simulation, and the published figures."""

import dataclasses
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefix_model import prefill

from kvcache.replay import Replay, ReplayFault, Settings, chosen, replay
from kvcache.replay_prompts import Prompts
from kvcache.traces import PrefixIds, Trace, read_trace

TRACES = Path(__file__).parents[2] / "shared" / "traces"
BLOCK = 4
ALONE = Settings(pool_tokens=64, block_size=BLOCK, placement="paged", prefix=True, prefill_only=True)
TOGETHER = dataclasses.replace(ALONE, prefill_only=False, keep_free=0.0)


def trace_of(*requests, arrivals=None):
    """A trace of (ids, prompt tokens, output tokens), with blocks of 4."""
    ids, prompts, outputs = zip(*requests, strict=True)
    firsts = np.concatenate(([0], np.cumsum([len(each) for each in ids])))
    ranges = [(one, 1) for each in ids for one in each]
    none = np.zeros(len(ids), int)
    prefixes = PrefixIds(BLOCK, none, none - 1, firsts, ranges)
    return Trace("small", range(len(ids)) if arrivals is None else arrivals, prompts, outputs, prefixes)


def session_trace(tmp_path, *sessions):
    """A trace of sessions, each of (in, out, keep, [start, count] or None)."""
    lines = []
    for session in sessions:
        requests = [
            {"t": turn, "a": "main", "in": given, "out": out, "keep": keep, "add": [add] if add else []}
            for turn, (given, out, keep, add) in enumerate(session)
        ]
        lines.append(json.dumps({"id": "one", "block_size": 64, "requests": requests}))
    path = tmp_path / "sessions.jsonl"
    path.write_text("\n".join(lines))
    return read_trace(path)


def random_prompts(seed, count=80):
    """Prompts that begin as earlier ones do, and go on by ids of their own."""
    rng = np.random.default_rng(seed)
    prompts, fresh = [], 0
    for _ in range(count):
        ids = []
        if prompts and rng.random() < 0.7:
            earlier = prompts[int(rng.integers(max(0, len(prompts) - 30), len(prompts)))]
            ids = earlier[: int(rng.integers(0, len(earlier) + 1))]
        new = int(rng.integers(1 if not ids else 0, 6))
        prompts.append([*ids, *range(fresh, fresh + new)])
        fresh += new
    return [(ids, len(ids) * BLOCK - int(rng.integers(0, BLOCK))) for ids in prompts]


def assert_same(figures, expected):
    told = figures.as_dict()
    for name, value in expected.items():
        assert told[name] == (float(value) if isinstance(value, Fraction) else value), name


# --- tokens


def test_equal_ids_have_equal_tokens_and_others_do_not():
    ids = [0, 1, 2**31, 2**31 + 1, 2**40, 710 << 32]
    prompts = Prompts(trace_of(*(([one], BLOCK, 0) for one in ids), ([0], BLOCK, 0)))
    blocks = [tuple(prompts.tokens(number, BLOCK)) for number in range(len(ids) + 1)]
    assert len(set(blocks)) == len(ids)
    assert blocks[-1] == blocks[0]


@given(st.lists(st.integers(0, 2**61 - 1), min_size=1, max_size=20), st.integers(0, BLOCK - 1))
def test_tokens_are_ids_that_a_cache_takes_as_many_as_there_are(ids, missing):
    tokens = Prompts(trace_of((ids, len(ids) * BLOCK - missing, 0))).tokens(0, len(ids) * BLOCK - missing)
    assert tokens.dtype == np.int32
    assert len(tokens) == len(ids) * BLOCK - missing
    assert (tokens >= 0).all()


def test_a_shorter_block_of_an_id_begins_as_a_whole_one():
    prompts = Prompts(trace_of(([7, 8], 6, 0), ([7, 8], 8, 0)))
    assert (prompts.tokens(0, 6) == prompts.tokens(1, 8)[:6]).all()


def test_what_a_request_generates_is_its_own():
    trace = trace_of(([5], 3, 9), ([5], 3, 9), ([5, 6, 7], 12, 0))
    prompts = Prompts(trace)
    one, other, third = (prompts.tokens(number, 12) for number in range(3))
    assert (one[:3] == other[:3]).all()
    assert (one[3:] != other[3:]).all()
    assert (one[:4] != third[:4]).any()


def test_the_next_turn_of_a_session_tells_how_a_request_went_on(tmp_path):
    trace = session_trace(tmp_path, [(100, 50, 0, [1, 1]), (200, 5, 1, [2, 2])])
    prompts = Prompts(trace)
    assert (prompts.tokens(0, 150) == prompts.tokens(1, 150)).all()


def test_a_turn_that_begins_otherwise_tells_nothing(tmp_path):
    trace = session_trace(tmp_path, [(200, 50, 0, [1, 3]), (200, 5, 2, [9, 1])])
    prompts = Prompts(trace)
    one, other = (prompts.tokens(number, 200) for number in range(2))
    assert (one[:128] == other[:128]).all()
    assert (one[192:] != other[192:]).all()


def test_sessions_have_tokens_apart(tmp_path):
    trace = session_trace(tmp_path, [(64, 1, 0, [1, 1])], [(64, 1, 0, [1, 1])])
    prompts = Prompts(trace)
    assert (prompts.tokens(0, 64) != prompts.tokens(1, 64)).any()


def test_ids_of_single_tokens_are_refused():
    prefixes = PrefixIds(1, [0], [-1], [0, 1], [(5, 1)])
    with pytest.raises(ValueError, match="blocks of 1 token"):
        Prompts(Trace("tiny", [0], [1], [0], prefixes))


def test_a_trace_that_does_not_tell_is_refused():
    with pytest.raises(ValueError, match="plain does not tell which prompts begin alike"):
        Prompts(Trace("plain", [0], [1], [0]))


# --- prompts alone


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize("num_blocks", [8, 16, 40, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_a_plain_simulation_finds(seed, num_blocks, policy):
    requests = random_prompts(seed)
    trace = trace_of(*((ids, length, 3) for ids, length in requests))
    figures = replay(trace, dataclasses.replace(ALONE, pool_tokens=num_blocks * BLOCK, policy=policy))
    assert_same(figures, prefill(requests, BLOCK, num_blocks, policy))


def test_those_simulations_find_evict_and_refuse():
    told = [prefill(random_prompts(seed), BLOCK, 8) for seed in range(3)]
    assert all(each["cached_tokens"] and each["evicted_blocks"] for each in told)
    assert any(each["refused"] for each in told)


@pytest.mark.parametrize("num_blocks", [16, 1000])
def test_contiguous_placement_finds_by_copies_and_by_going_on(num_blocks):
    requests = random_prompts(5)
    trace = trace_of(*((ids, length, 3) for ids, length in requests))
    settings = dataclasses.replace(ALONE, pool_tokens=num_blocks * BLOCK, placement="contiguous")
    figures = replay(trace, settings)
    assert figures.finished == figures.requests - figures.refused
    assert figures.copied_tokens + figures.revived_tokens == figures.cached_tokens > 0


def test_prompts_come_in_the_order_of_the_file():
    trace = trace_of(([1, 2], 8, 0), ([1, 3], 8, 0), arrivals=[5.0, 1.0])
    taken, skipped = chosen(trace, dataclasses.replace(ALONE, max_requests=1))
    assert [trace.prefixes.ids(number).tolist() for number in taken] == [[1, 2]]
    assert skipped == 0


def test_outputs_do_not_count_to_the_share_of_prompts_alone():
    trace = trace_of(([1], 4, 100), ([1, 2, 3, 4, 5], 20, 0))
    taken, skipped = chosen(trace, dataclasses.replace(ALONE, max_share=0.25))
    assert (taken.tolist(), skipped) == ([0], 1)


def test_who_watches_prompts_sees_them_go_on():
    seen = []
    replay(
        trace_of(*[([1], 4, 0)] * 200),
        ALONE,
        lambda now: seen.append((now.finished, len(now.order))),
    )
    assert seen == [(1, 200), (65, 200), (129, 200), (193, 200)]


# --- served together


def test_a_prompt_is_found_while_who_computed_it_still_lives():
    figures = replay(trace_of(([1, 2], 8, 5), ([1, 2, 3], 12, 5)), TOGETHER)
    assert (figures.prompt_tokens, figures.cached_tokens) == (20, 8)
    assert figures.prefix_hit_ratio == 0.4
    assert figures.finished == 2


def test_the_next_turn_finds_what_was_generated(tmp_path):
    trace = session_trace(tmp_path, [(100, 50, 0, [1, 1]), (200, 5, 1, [2, 2])])
    settings = Settings(pool_tokens=64 * 20, block_size=64, placement="paged", prefix=True, arrivals="trace")
    figures = replay(trace, dataclasses.replace(settings, speed=0.01))
    assert (figures.prompt_tokens, figures.cached_tokens) == (300, 128)


def test_who_is_preempted_finds_what_it_had():
    alone = [([10 * number + 1], 4, 22) for number in range(3)]
    settings = dataclasses.replace(TOGETHER, pool_tokens=40, arrivals="trace")
    figures = replay(trace_of(*alone, arrivals=[0.0] * 3), settings)
    assert figures.preempted > 0
    assert figures.cached_tokens > 0
    assert figures.finished == 3


@pytest.mark.parametrize("placement", ["contiguous", "paged"])
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize("seed", range(3))
def test_served_together_all_finish_and_some_is_found(seed, policy, placement):
    requests = [(ids, length, length % 9) for ids, length in random_prompts(seed)]
    settings = dataclasses.replace(TOGETHER, pool_tokens=160, placement=placement, policy=policy)
    running = Replay(trace_of(*requests), settings)
    figures = running.run()
    assert figures.finished == figures.requests - figures.refused
    assert 0 < figures.cached_tokens < figures.prompt_tokens
    assert not running.tokens


def test_without_prefixes_nothing_is_found():
    figures = replay(
        trace_of(([1, 2], 8, 5), ([1, 2, 3], 12, 5)), dataclasses.replace(TOGETHER, prefix=False)
    )
    assert (figures.prompt_tokens, figures.cached_tokens, figures.prefix_hit_ratio) == (0, 0, 0.0)


# --- real bytes


@pytest.mark.parametrize("prefill_only", [False, True])
@pytest.mark.parametrize("placement", ["contiguous", "paged"])
def test_what_is_found_has_the_bytes_of_its_tokens(placement, prefill_only):
    requests = [(ids, length, length % 9) for ids, length in random_prompts(7)]
    settings = dataclasses.replace(
        TOGETHER, pool_tokens=160, placement=placement, prefill_only=prefill_only, backend="numpy"
    )
    figures = replay(trace_of(*requests), settings)
    assert figures.cached_tokens > 0
    assert figures.verified_tokens > figures.cached_tokens


def test_what_is_found_with_other_bytes_is_caught():
    def spoil(running):
        running.pool.arena.k[0][:] += 1

    settings = dataclasses.replace(ALONE, backend="numpy")
    with pytest.raises(ReplayFault, match="not what was written, from position 0 of 8"):
        replay(trace_of(([1, 2], 8, 0), ([1, 2], 8, 0)), settings, spoil)


# --- real traffic


def real(name):
    path = TRACES / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return read_trace(path)


@pytest.fixture(scope="module")
def mooncake():
    return real("mooncake_conversation.jsonl.gz")


@pytest.mark.parametrize(
    ("num_blocks", "ratio", "last_half"),
    [(1000, 0.0459, 0.0474), (10000, 0.2192, 0.2229), (50000, 0.3632, 0.3788), (400000, 0.3734, 0.3978)],
)
def test_conversations_are_found_as_a_reference_simulation_finds_them(mooncake, num_blocks, ratio, last_half):
    settings = Settings(num_blocks * 512, 512, "paged", prefix=True, prefill_only=True)
    figures = replay(mooncake, settings)
    assert figures.prefix_hit_ratio == pytest.approx(ratio, abs=2e-4)
    assert figures.prefix_hit_ratio_last_half == pytest.approx(last_half, abs=2e-4)


@pytest.mark.parametrize(
    ("num_blocks", "least"), [(500, 0.0404), (1000, 0.060), (5000, 0.135), (10000, 0.223), (50000, 0.3738)]
)
def test_conversations_are_kept_by_worth(mooncake, num_blocks, least):
    settings = Settings(num_blocks * 512, 512, "paged", prefix=True, prefill_only=True, policy="worth")
    assert replay(mooncake, settings).prefix_hit_ratio_last_half >= least


def most_that_can_be_found(trace, numbers):
    """Tokens of blocks that an earlier prompt had, the last token of a prompt always left out."""
    seen, found = set(), 0
    for number in numbers:
        ids = trace.prefixes.ids(number).tolist()
        most = (int(trace.prompts[number]) - 1) // trace.prefixes.block_tokens
        found += next((count for count, one in enumerate(ids[:most]) if one not in seen), min(most, len(ids)))
        seen.update(ids)
    return found * trace.prefixes.block_tokens


@pytest.mark.parametrize("policy", ["lru", "worth"])
def test_sessions_find_nearly_all_that_there_is_where_one_fits(policy):
    trace = real("weka_claude_code.jsonl.gz")
    settings = Settings(
        14000 * 64, 64, "paged", prefix=True, prefill_only=True, max_requests=1500, policy=policy
    )
    figures = replay(trace, settings)
    ideal = most_that_can_be_found(trace, chosen(trace, settings)[0]) / figures.prompt_tokens
    assert figures.prefix_hit_ratio == pytest.approx(ideal, abs=0.005)
