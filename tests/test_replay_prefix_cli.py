"""`kvcache replay --prefix`: what is printed, swept and drawn, and what is refused with what to do."""

import functools
import json
import re
from xml.etree import ElementTree

import pytest
from commands import run

FOUND = {
    "prefix_hit_ratio",
    "prompt_tokens",
    "cached_tokens",
    "evicted_blocks",
    "copied_tokens",
    "revived_tokens",
}


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal on which nothing is wrapped."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def trace(tmp_path):
    """Conversations of three turns, ten at a time, in Mooncake's form."""
    path = tmp_path / "conversations.jsonl"
    lines = []
    for turn in range(40):
        for talk in range(turn // 4 * 10, turn // 4 * 10 + 10):
            ids = [0, *range(100 * talk + 1, 100 * talk + 2 + 2 * (turn % 4))]
            length = 512 * len(ids) - 100
            request = {"timestamp": 1000 * turn, "input_length": length, "output_length": 20, "hash_ids": ids}
            lines.append(json.dumps(request))
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def replayed(capsys, trace):
    """Replays them with prefixes."""
    return functools.partial(run, capsys, "replay", trace, "--prefix")


def records_of(out):
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize("alone", [[], ["--prefill-only"]])
def test_a_record_tells_what_was_found(replayed, alone):
    code, out, _ = replayed("--pool-tokens", "102400", "--json", "-", *alone)
    (record,) = records_of(out)
    assert code == 0
    assert set(record) >= FOUND
    assert (record["placement"], record["block_size"], record["policy"]) == ("paged", 512, "lru")
    assert record["prefix_hit_ratio"] == record["cached_tokens"] / record["prompt_tokens"] > 0.1
    assert record["finished"] == 400


def test_prompts_alone_tell_of_the_last_half(replayed):
    _, out, _ = replayed("--pool-tokens", "102400", "--prefill-only", "--json", "-")
    (record,) = records_of(out)
    assert 0 < record["prefix_hit_ratio_last_half"] < 1
    assert "utilization" not in record


def test_a_replay_prints_what_was_found(replayed):
    code, out, err = replayed("--pool-tokens", "102400")
    assert (code, err) == (0, "")
    assert "paged, 102,400 tokens in blocks of 512, 10 % kept free, prefixes by lru, lengths unknown" in out
    assert re.search(r"found +\d\d\.\d\d % of [\d,]+ prompt tokens", out)
    assert re.search(r"not computed again +[\d,]+ tokens; 0 were copied, 0 revived", out)
    assert re.search(r"evicted +[\d,]+ blocks", out)


def test_prompts_alone_print_no_steps(replayed):
    _, out, _ = replayed("--pool-tokens", "102400", "--prefill-only")
    assert "prefixes by lru, prompts alone" in out
    assert "in the last half of the requests" in out
    assert "utilization" not in out


def test_policies_and_sizes_are_a_sweep(replayed):
    code, out, err = replayed(
        *("--prefill-only", "--policy", "lru,fifo", "--pool-tokens", "51200,102400,204800", "--json")
    )
    told = [(record["pool_tokens"], record["policy"]) for record in records_of(out)]
    assert code == 0
    assert told == [(pool, name) for pool in (51200, 102400, 204800) for name in ("lru", "fifo")]
    for name in ("found", "last", "cached", "evicted", "copied", "revived"):
        assert name in err
    ratios = [record["prefix_hit_ratio"] for record in records_of(out) if record["policy"] == "lru"]
    assert ratios == sorted(ratios)


def test_contiguous_placement_is_replayed_where_asked_for(replayed):
    _, out, _ = replayed("--placement", "contiguous", "--pool-tokens", "102400", "--prefill-only", "--json")
    (record,) = records_of(out)
    assert record["cached_tokens"] == record["copied_tokens"] + record["revived_tokens"] > 0


def test_bytes_of_what_is_found_are_compared(replayed):
    code, out, _ = replayed(
        *("--pool-tokens", "25600", "--max-requests", "30", "--prefill-only", "--backend", "numpy")
    )
    assert code == 0
    assert re.search(r"contents +[\d,]+ tokens read again, all as written", out)


def test_blocks_of_another_size_find_more_of_a_prompt(replayed):
    _, out, _ = replayed("--prefill-only", "--pool-tokens", "409600", "--block-size", "128,512", "--json")
    fine, coarse = records_of(out)
    assert fine["cached_tokens"] >= coarse["cached_tokens"] > 0


@pytest.mark.parametrize("alone", [[], ["--prefill-only"]])
def test_what_was_found_is_drawn_over_room_a_line_for_each_policy(replayed, tmp_path, alone):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "found.svg"
    code, _, _ = replayed(
        *("--policy", "lru,fifo", "--pool-tokens", "51200,102400", "--plot", str(picture), *alone)
    )
    text = " ".join("".join(element.itertext()) for element in ElementTree.parse(picture).iter())
    assert code == 0
    for told in ("lru", "fifo", "prompt tokens that were found", "blocks of the arena"):
        assert told in text


@pytest.mark.parametrize("name", ["found.png", "found.html"])
def test_one_replay_of_prompts_alone_is_drawn(replayed, tmp_path, name):
    pytest.importorskip("matplotlib")
    code, _, _ = replayed("--prefill-only", "--pool-tokens", "51200", "--plot", str(tmp_path / name))
    assert code == 0
    assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--placement", "buddy"], "--placement buddy keeps no prefixes: leave it or --prefix out"),
        (["--policy", "oldest"], "no cache can be made: policy must be one of"),
        (["--policy", ""], "a name is empty"),
        (["--prefill-only", "--keep-free", "0.2"], "--keep-free means nothing with --prefill-only"),
        (["--prefill-only", "--arrivals", "trace"], "--arrivals trace means nothing with --prefill-only"),
        (["--prefill-only", "--max-tokens-known"], "--max-tokens-known means nothing with --prefill-only"),
        (["--pool-tokens", "100"], "a pool of 100 tokens is less than a block of 512"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(replayed, arguments, complaint):
    code, out, err = replayed(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--policy", "lru"], "--policy is about prefixes: add --prefix"),
        (["--prefill-only"], "--prefill-only is about prefixes: add --prefix"),
        (["--prefix"], "generated traffic has no prefixes: name a trace, or leave --prefix out"),
    ],
)
def test_prefixes_are_asked_for_and_need_a_trace(capsys, arguments, complaint):
    code, out, err = run(capsys, "replay", *arguments)
    assert (code, out) == (2, "")
    assert complaint in err


def test_a_trace_that_tells_no_prefixes_is_refused(capsys, tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2024-01-01 00:00:00,100,5\n")
    code, _, err = run(capsys, "replay", str(path), "--prefix")
    assert code == 2
    assert "does not tell which prompts begin alike: --prefix needs hash_ids, or sessions" in err
