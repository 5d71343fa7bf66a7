"""`kvcache replay`: options, what goes where, pictures, and errors that say what to do next."""

import base64
import functools
import gzip
import html.parser
import importlib.util
import json
import re
import struct
import subprocess
import sys
import zlib
from xml.etree import ElementTree

import pytest
from commands import run

import kvcache
from kvcache import cli, cli_replay

ISSUED = {
    "requests",
    "finished",
    "refused",
    "preempted",
    "steps",
    "mean_sequences",
    "utilization",
    "zero_copy_fraction",
    "moved_tokens",
    "attended_tokens",
    "moved_over_attended",
    "longest_pause_tokens",
    "internal_waste",
    "fragmentation_mean",
    "allocator_ns_per_token",
    "wall_seconds",
}
SETTINGS = {
    "placement",
    "pool_tokens",
    "block_size",
    "keep_free",
    "arrivals",
    "speed",
    "max_share",
    "max_requests",
}
QUICK = ("--max-requests", "60", "--pool-tokens", "16384")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal on which nothing is wrapped."""
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def quick(capsys):
    """Replays little."""
    return functools.partial(run, capsys, "replay", *QUICK)


@pytest.fixture
def trace(tmp_path):
    """A file of a few requests."""
    path = tmp_path / "small.csv"
    rows = [f"2024-01-01 00:00:{second:02}.5,{100 + 7 * second},{5 + second}" for second in range(40)]
    path.write_text("\r\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return str(path)


def records_of(out):
    return [json.loads(line) for line in out.splitlines()]


# --- what is printed


def test_help_names_every_option_and_its_default(capsys):
    code, out, _ = run(capsys, "replay", "--help")
    assert code == 0
    told = re.sub(r"\s+", " ", out)
    for option in (
        *("--workload", "--seed", "--skip-bad", "--max-requests", "--max-share", "--arrivals", "--speed"),
        *("--step-ms", "--placement", "--pool-tokens", "--block-size", "--keep-free", "--max-tokens-known"),
        *("--overcommit", "--max-move-tokens", "--backend", "--json", "--plot", "--jobs", "--dask"),
        *("--prefix", "--policy", "--prefill-only"),
    ):
        assert option in told
    for default in ("262144", "16", "0.1", "saturate", "contiguous", "chat", "none", "30", "lru"):
        assert f"default: {default}" in told


def test_help_imports_nothing_that_is_heavy():
    script = (
        "import sys; from kvcache.cli import main\n"
        "try: main(['replay', '--help'])\n"
        "except SystemExit: print([name for name in ('matplotlib', 'joblib', 'rich', 'mlx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_a_replay_prints_a_table(quick):
    code, out, err = quick()
    assert (code, err) == (0, "")
    assert "chat (generated, seed 0): contiguous, 16,384 tokens in blocks of 16, 10 % kept free" in out
    assert re.search(r"requests +60 finished", out)
    assert re.search(r"zero-copy +100.00 % of sequence-steps", out)


@pytest.mark.parametrize("argument", [["--json"], ["--json", "-"]])
def test_json_is_all_that_goes_to_standard_output(quick, argument):
    code, out, err = quick(*argument)
    (record,) = records_of(out)
    assert code == 0
    assert "60 finished" in err
    assert set(record) >= ISSUED | SETTINGS
    assert (record["requests"], record["finished"], record["refused"]) == (60, 60, 0)
    assert (record["zero_copy_fraction"], record["seed"], record["backend"]) == (1.0, 0, "none")
    assert 0.5 < record["utilization"] < 0.95
    assert record["moved_tokens_seen"] <= record["moved_tokens"]
    assert record["allocator_ns_per_token"] > 0


def test_json_goes_to_a_file(quick, tmp_path):
    code, out, _ = quick("--json", str(tmp_path / "out.json"))
    (record,) = records_of((tmp_path / "out.json").read_text())
    assert (code, record["finished"]) == (0, 60)
    assert "60 finished" in out


def test_json_does_not_overwrite_a_trace_that_follows_it(quick, trace, tmp_path):
    with open(trace) as file:
        before = file.read()
    code, out, err = quick("--json", trace)
    with open(trace) as file:
        assert file.read() == before
    assert (code, out) == (2, "")
    assert f"--json {trace} would overwrite a trace: name the trace first, or give --json -" in err
    for _ in range(2):  # what it wrote itself may be written anew
        assert quick(trace, "--json", str(tmp_path / "out.json"))[0] == 0


def test_every_figure_is_a_finite_number(quick):
    (record,) = records_of(quick("--json")[1])
    assert all(type(record[name]) in (int, float) for name in ISSUED)


def test_a_seed_repeats_a_replay(quick):
    timed = ("wall_seconds", "allocator_ns_per_token")
    told = []
    for seed in ("3", "3", "4"):
        (record,) = records_of(quick("--json", "--seed", seed)[1])
        told.append({name: value for name, value in record.items() if name not in (*timed, "seed", "trace")})
    assert told[0] == told[1] != told[2]


@pytest.mark.parametrize("workload", ["chat", "code", "long"])
def test_each_workload_is_replayed(quick, workload):
    (record,) = records_of(quick("--workload", workload, "--max-share", "0.9", "--json")[1])
    assert record["finished"] == record["requests"] == 60
    assert record["trace"] == f"{workload} (generated, seed 0)"
    assert (record["skipped"] > 0) == (workload == "long")


def test_a_file_is_replayed(quick, trace):
    (record,) = records_of(quick(trace, "--json", "--arrivals", "trace", "--speed", "100")[1])
    assert (record["trace"], record["finished"], record["seed"]) == ("small.csv", 40, None)
    assert (record["arrivals"], record["speed"], record["step_seconds"]) == ("trace", 100.0, 0.03)


def test_rows_that_are_skipped_are_counted(quick, trace):
    with open(trace, "a") as file:
        file.write("\nnot,a,row\n")
    code, out, err = quick(trace)
    assert (code, out) == (2, "")
    assert err == f"kvcache: {trace}:42: ContextTokens is 'a', expected a count of tokens\n"
    (record,) = records_of(quick(trace, "--skip-bad", "--json")[1])
    assert (record["bad_rows"], record["finished"]) == (1, 40)
    assert "40 finished, 1 bad rows" in quick(trace, "--skip-bad")[1]


def test_a_gzipped_trace_is_replayed(quick, trace, tmp_path):
    with open(trace, "rb") as file:
        (tmp_path / "packed").write_bytes(gzip.compress(file.read()))
    assert "40 finished" in quick(str(tmp_path / "packed"))[1]


def test_known_lengths_are_promises_unless_told_otherwise(quick):
    bounds = [
        records_of(quick("--json", *options)[1])[0]["overcommit"]
        for options in ([], ["--max-tokens-known"], ["--max-tokens-known", "--overcommit", "inf"])
    ]
    assert bounds == ["inf", 1.0, "inf"]


def test_bytes_are_moved_and_compared(quick):
    code, out, _ = quick("--backend", "numpy", "--max-requests", "20")
    assert code == 0
    assert re.search(r"contents +\d+,\d+ tokens read again, all as written", out)


# --- sweeps


def test_lists_make_a_sweep_with_an_object_per_cell(quick):
    code, out, err = quick(
        *("--placement", "contiguous,paged,buddy", "--placement", "reserve"),
        *("--block-size", "8,32", "--json", "--jobs", "1"),
    )
    records = records_of(out)
    assert code == 0
    assert [(each["placement"], each["block_size"]) for each in records] == [
        (placement, size) for placement in ("contiguous", "paged", "buddy", "reserve") for size in (8, 32)
    ]
    assert all(set(each) >= ISSUED | SETTINGS for each in records)
    assert err.startswith("chat (generated, seed 0): 16,384 tokens, 10 % kept free, lengths unknown\n")
    assert "placement" in err
    assert "reserve" in err


def test_a_value_that_comes_twice_is_one_cell(quick):
    assert len(records_of(quick("--keep-free", "0.1,0.2,0.1", "--jobs", "1", "--json")[1])) == 2


def test_a_sweep_in_processes_prints_its_cells_in_order(quick):
    pytest.importorskip("joblib")
    records = records_of(quick("--pool-tokens", "32768", "--jobs", "2", "--json")[1])
    assert [each["pool_tokens"] for each in records] == [16384, 32768]


# --- pictures


@pytest.fixture
def drawn(quick, tmp_path):
    """Draws into a file of this name, and gives its path."""
    pytest.importorskip("matplotlib")

    def draw(name, *options):
        code, _, err = quick("--plot", str(tmp_path / name), "--jobs", "1", *options)
        assert (code, err) == (0, "")
        return tmp_path / name

    return draw


SWEEP = ("--placement", "contiguous,paged,buddy,reserve", "--keep-free", "0.05,0.2")


def pixels_of(png):
    """How many different rows of pixels a PNG has, and its size; unpacked without a library."""
    width, height = struct.unpack(">II", png[16:24])
    data, place = b"", 8
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        data += png[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    rows = zlib.decompress(data)
    stride = len(rows) // height
    return len({rows[start : start + stride] for start in range(0, len(rows), stride)}), width, height


@pytest.mark.parametrize("options", [(), SWEEP], ids=["one", "sweep"])
def test_a_picture_is_drawn(drawn, options):
    different, width, height = pixels_of(drawn("run.png", *options).read_bytes())
    assert width >= 1200
    assert height >= 700
    assert different > height / 4


@pytest.mark.parametrize("options", [(), SWEEP], ids=["one", "sweep"])
def test_a_drawing_has_titles_and_units(drawn, options):
    text = " ".join(ElementTree.parse(drawn("run.svg", *options)).getroot().itertext())
    wanted = (
        ("moved over attended tokens", "utilization: live tokens over tokens of the pool", "reserve")
        if options
        else ("utilization", "live sequences", "requests in the queue", "tokens moved per step", "the arena over time",
              "place in the arena (tokens)", "step (every live sequence gets one token)")
    )  # fmt: skip
    for each in wanted:
        assert each in text


class Page(html.parser.HTMLParser):
    """Collects the tags of a page, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.cells, self.inside = set(), [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside = tag
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.cells.append(data)


@pytest.mark.parametrize("options", [(), SWEEP], ids=["one", "sweep"])
def test_a_page_stands_alone_with_picture_and_table(drawn, options):
    text = drawn("run.html", *options).read_text()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert page.loads == []
    assert {"svg", "table", "title"} <= page.tags
    assert "script" not in page.tags
    assert ("reserve" if options else "utilization") in page.cells
    if not options:
        (image,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
        assert base64.b64decode(image).startswith(b"\x89PNG")


def test_the_same_replay_is_drawn_the_same(drawn):
    one, other = (drawn(name).read_bytes() for name in ("one.svg", "other.svg"))
    assert one == other


def test_a_crowded_arena_is_drawn_with_a_close_up(capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("kvcache.replay_film.MOST_FRAMES", 100)
    file = tmp_path / "run.svg"
    assert run(capsys, "replay", "--max-requests", "400", "--plot", str(file))[0] == 0
    assert "a part of it, every step" in file.read_text()


def test_a_replay_without_steps_cannot_be_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "run.png"
    code, out, err = run(
        capsys, "replay", "--max-requests", "1", "--pool-tokens", "64", "--plot", str(file), "--json"
    )
    (record,) = records_of(out)
    assert (code, record["refused"], record["steps"]) == (2, 1, 0)
    assert "every request was refused, there is no step to draw: give a larger --pool-tokens" in err
    assert not file.exists()


# --- errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["absent.csv"], "absent.csv: No such file or directory"),
        (["--placement", "contiguous,anywhere"], "'anywhere' is none of contiguous, paged, buddy, reserve"),
        (["--block-size", "0"], "argument --block-size: 0 is less than 1"),
        (["--block-size", "16,,8"], "argument --block-size: invalid count value: '16,,8'"),
        (["--keep-free", "1"], "argument --keep-free: 1 is no share: from 0, below 1"),
        (["--keep-free", "nan"], "argument --keep-free: nan is no share"),
        (["--max-share", "0"], "argument --max-share: 0 is no share: above 0, at most 1"),
        (["--speed", "0"], "argument --speed: 0 is not above 0"),
        (["--step-ms", "inf"], "argument --step-ms: inf is not above 0"),
        (["--overcommit", "0.5"], "argument --overcommit: 0.5 is less than 1"),
        (["--overcommit", "2"], "every request is promised the whole pool: add --max-tokens-known"),
        (["--max-requests", "0"], "argument --max-requests: 0 is less than 1"),
        (["--seed", "-1"], "--seed is -1, expected at least 0"),
        (
            ["--pool-tokens", "8"],
            "a pool of 8 tokens is less than a block of 16: give a larger --pool-tokens",
        ),
        (["--pool-tokens", "99999999999"], "no cache can be made: "),
        (["--placement", "buddy", "--backend", "numpy"], "buddy keeps no bytes: leave --backend numpy out"),
        (["--plot", "run.pdf"], "--plot run.pdf: give a name that ends in .png, .svg, .html"),
        (["--plot", "no/such/run.png"], "--plot no/such/run.png: there is no such folder"),
        (["--json", "no/such/out.json"], "--json no/such/out.json: there is no such folder"),
        (["--jobs", "2", "--dask", "tcp://127.0.0.1:1"], "--dask has workers of its own: give one of them"),
        (["--workload", "chat", "absent.csv"], "absent.csv has its own: give one of them"),
        (["--workload", "poems"], "invalid choice: 'poems'"),
        (["--arrivals", "never"], "invalid choice: 'never'"),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_do(quick, arguments, complaint):
    if "--dask" in arguments:
        pytest.importorskip("distributed")
    code, out, err = quick(*arguments)
    assert (code, out) == (2, "")
    assert complaint in err


@pytest.mark.parametrize(
    ("arguments", "absent", "complaint"),
    [
        ([], "rich", "a replay needs rich: pip install 'kvcache[replay]'"),
        (["--keep-free", "0.1,0.2"], "joblib", "a sweep needs joblib: pip install 'kvcache[replay]'"),
        (["--plot", "run.png"], "matplotlib", "--plot needs matplotlib: pip install 'kvcache[replay]'"),
        (["--backend", "mlx"], "mlx", "--backend mlx needs mlx: pip install 'kvcache[mlx]'"),
        (
            ["--dask", "tcp://127.0.0.1:1"],
            "distributed",
            "--dask needs dask[distributed]: pip install 'kvcache[dask]'",
        ),
    ],
)
def test_a_missing_library_is_named_with_the_extra(quick, monkeypatch, arguments, absent, complaint):
    find = importlib.util.find_spec
    found = lambda name: None if name == absent else find(name) or name  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    code, out, err = quick(*arguments)
    assert (code, out) == (2, "")
    assert err == f"kvcache: {complaint}\n"


def test_a_scheduler_that_is_not_there_is_an_error_that_helps(quick, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("kvcache.replay_sweep.CONNECT_SECONDS", 0.2)
    code, _, err = quick("--dask", "tcp://127.0.0.1:1")
    assert code == 2
    assert "the cells cannot be given out" in err
    assert "127.0.0.1:1" in err


def test_a_picture_that_cannot_be_written_is_an_error_that_helps(quick, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "run.png").mkdir()
    code, _, err = quick("--plot", str(tmp_path / "run.png"))
    assert code == 2
    assert f"--plot {tmp_path / 'run.png'}: Is a directory" in err


def test_a_fault_is_exit_code_1_and_named(quick, monkeypatch):
    write = kvcache.DecodeBatch.write
    monkeypatch.setattr(
        kvcache.DecodeBatch, "write", lambda batch, layer, k, v: write(batch, layer, 0 * k, v)
    )
    code, out, err = quick("--backend", "numpy", "--json")
    assert (code, out) == (1, "")
    assert "is not what was written" in err


def test_an_interrupted_replay_says_so(quick, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_replay, "replay", interrupt)
    code, _, err = quick()
    assert (code, err) == (130, "kvcache: interrupted\n")


def test_a_bound_on_moves_is_passed_on(capsys, monkeypatch):
    given = {}

    class Cache(kvcache.KVCache):
        def __init__(self, *shape, max_move_tokens=None, **options):
            given["max_move_tokens"] = max_move_tokens
            super().__init__(*shape, **options)

    monkeypatch.setattr("kvcache.replay.KVCache", Cache)
    assert cli.main(["replay", *QUICK, "--max-move-tokens", "512", "--json"]) == 0
    assert given == {"max_move_tokens": 512}
    assert json.loads(capsys.readouterr().out)["max_move_tokens"] == 512
