"""Reading traces, whatever is in the file, and traffic that is made up."""

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from kvcache.trace_forms import MOST_TOKENS
from kvcache.traces import Request, Trace, TraceError, read_trace
from kvcache.workloads import WORKLOADS

TRACES = Path(__file__).parents[2] / "shared" / "traces"
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE = "\r\n".join([HEADER, "2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109", ""])
MOONCAKE = "\n".join(
    json.dumps({"timestamp": ms, "input_length": prompt, "output_length": output, "hash_ids": ids})
    for ms, prompt, output, ids in [(0, 1000, 5, [0, 1]), (27, 1500, 7, [0, 1, 9]), (3000, 3, 0, [4])]
)
SESSIONS = "\n".join(
    json.dumps({"id": name, "block_size": 64, "requests": requests})
    for name, requests in {
        "one": [
            {"t": 0.0, "a": "main", "in": 200, "out": 5, "keep": 0, "add": [[1, 3]]},
            {"t": 5.0, "a": "sub", "in": 130, "out": 6, "keep": 0, "add": [[7, 1], [20, 1]]},
            {"t": 9.5, "a": "main", "in": 330, "out": 7, "keep": 2, "add": [[30, 2], [40, 1]]},
            {"t": 11.0, "a": "main", "in": 64, "out": 0, "keep": 1, "add": []},
        ],
        "two": [{"t": 1.0, "a": "main", "in": 70, "out": 8, "keep": 0, "add": [[1, 1]]}],
    }.items()
)


@pytest.fixture
def read(tmp_path):
    """Reads text, or bytes, from a file."""

    def read(content, name="trace", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_trace(path, **options)

    return read


def rows_of(trace):
    return [tuple(trace[index]) for index in range(len(trace))]


# --- the three forms


def test_azures_csv_is_read(read):
    trace = read(AZURE, "azure.csv")
    assert (trace.name, len(trace), trace.bad_rows, trace.prefixes) == ("azure.csv", 2, 0, None)
    assert trace[0] == Request(arrival=0.0, prompt_tokens=374, output_tokens=44)
    assert trace[1] == (pytest.approx(4.314579, abs=1e-9), 396, 109)


def test_columns_are_found_by_name_and_further_ones_ignored(read):
    trace = read(
        "GeneratedTokens,NumImages, contexttokens ,TIMESTAMP\n7,0,100,2024-05-10 00:00:00.009930+00:00\n"
    )
    assert rows_of(trace) == [(0.0, 100, 7)]


def test_zones_of_timestamps_count(read):
    lines = [HEADER, "2024-05-10 02:00:00+02:00,1,1", "2024-05-10T00:00:01Z,2,1", "2024-05-10 00:00:02.5,3,1"]
    assert rows_of(read("\n".join(lines))) == [(0.0, 1, 1), (1.0, 2, 1), (2.5, 3, 1)]


def test_mooncakes_json_lines_are_read_with_their_ids(read):
    trace = read(MOONCAKE)
    assert rows_of(trace) == [(0.0, 1000, 5), (0.027, 1500, 7), (3.0, 3, 0)]
    assert trace.prefixes.block_tokens == 512
    assert [trace.prefixes.ids(index).tolist() for index in range(3)] == [[0, 1], [0, 1, 9], [4]]


def test_ids_may_be_missing(read):
    assert read('{"timestamp": 0, "input_length": 10, "output_length": 1}').prefixes is None


def test_sessions_are_read_side_by_side_with_their_ids(read):
    trace = read(SESSIONS)
    assert rows_of(trace) == [(0.0, 200, 5), (1.0, 70, 8), (5.0, 130, 6), (9.5, 330, 7), (11.0, 64, 0)]
    ids = [trace.prefixes.ids(index).tolist() for index in range(5)]
    other = ids[1][0]
    assert ids == [[1, 2, 3], [other], [7, 20], [1, 2, 30, 31, 40], [1]]
    assert other not in {each for row in (ids[0], *ids[2:]) for each in row}


@pytest.mark.parametrize("content", [AZURE, MOONCAKE, SESSIONS], ids=["azure", "mooncake", "sessions"])
def test_gzip_is_known_by_its_content(read, content):
    assert rows_of(read(gzip.compress(content.encode()), "trace.csv")) == rows_of(read(content, "plain.gz"))


def test_line_ends_blank_lines_and_a_byte_order_mark_do_not_matter(read):
    expected = rows_of(read(AZURE))
    assert rows_of(read(AZURE.replace("\r\n", "\n"))) == expected
    assert rows_of(read(b"\xef\xbb\xbf\n" + AZURE.replace("\r\n", "\r\n\r\n").encode())) == expected
    assert rows_of(read(MOONCAKE.replace("\n", "\r\n\n"))) == rows_of(read(MOONCAKE))


def test_requests_come_in_order_of_arrival(read):
    lines = AZURE.split("\r\n")
    assert rows_of(read("\n".join([lines[0], lines[2], lines[1]]))) == rows_of(read(AZURE))
    assert [row[1] for row in rows_of(Trace("", [2, 1, 1], [10, 11, 12], [1, 1, 1]))] == [11, 12, 10]


# --- rows that are not as they should be

BAD_CSV = {
    "2023-11-16 18:15:46,374": "2 fields, expected 3",
    "2023-11-16 18:15:46,374,44,": "4 fields, expected 3",
    "2023-11-16 18:15:46,0,44": "ContextTokens is 0, expected at least 1",
    "2023-11-16 18:15:46,-3,44": "ContextTokens is '-3', expected a count of tokens",
    "2023-11-16 18:15:46,1_0,44": "ContextTokens is '1_0', expected a count",
    "2023-11-16 18:15:46,٣,44": "ContextTokens is '٣', expected a count",
    "2023-11-16 18:15:46,12.5,44": "ContextTokens is '12.5', expected a count",
    "2023-11-16 18:15:46,12,": "GeneratedTokens is '', expected a count",
    "2023-11-16 18:15:46,12,99999999999999999999": "GeneratedTokens is '99999999999999999999', expected a count",
    f"2023-11-16 18:15:46,12,{MOST_TOKENS}": f"come to {MOST_TOKENS + 12}, at most {MOST_TOKENS} are possible",
    "yesterday,374,44": "TIMESTAMP is 'yesterday', expected one like 2023-11-16 18:15:46.6805900",
    "2023-13-16 18:15:46,374,44": "TIMESTAMP is '2023-13-16 18:15:46'",
    "2023-11-16 18:15:46+99:00,374,44": "TIMESTAMP is",
    ",,": "ContextTokens is ''",
    '"': "1 fields, expected 3",
    '"' + "x" * 200_000: "not CSV: field larger than field limit",
    "\0\0": "1 fields, expected 3",
    "\x1b[2Jx,y,z": "ContextTokens is 'y'",
}
GOOD_ROW = {"timestamp": 0, "input_length": 10, "output_length": 1}
GOOD_REQUEST = {"t": 0.0, "a": "main", "in": 70, "out": 5, "keep": 0, "add": [[1, 1]]}


def mooncake(**changes):
    return json.dumps(GOOD_ROW | changes)


def session(block_size=64, **changes):
    return json.dumps({"block_size": block_size, "requests": [GOOD_REQUEST, GOOD_REQUEST | changes]})


BAD_JSON = {
    '{"timestamp": 0, ': "not JSON: Expecting property name",
    "[1, 2]": "expected a JSON object, not list",
    "{}": "expected input_length (a request), or requests (a session)",
    "[" * 100_000: "not JSON: ",
    '{"timestamp": NaN, "input_length": 1, "output_length": 1}': "not JSON: NaN is no number",
    '{"input_length": ' + "9" * 5000 + "}": "not JSON: ",
    mooncake(input_length=True): "input_length is True, expected a whole number from 0",
    mooncake(input_length=1.5): "input_length is 1.5, expected a whole number",
    mooncake(input_length=0): "input_length is 0, expected at least 1",
    mooncake(output_length=None): "output_length is None, expected a whole number",
    mooncake(output_length=-1): "output_length is -1, expected a whole number",
    mooncake(output_length=MOST_TOKENS): "are possible",
    mooncake(output_length=2**40): "output_length is 1099511627776",
    mooncake(timestamp="0"): "timestamp is '0', expected a time",
    mooncake(timestamp=1e300): "timestamp is 1e+300, expected a time",
    mooncake(timestamp=["a" * 1000]): "timestamp is ['aaaa",
    mooncake(hash_ids=[]): "0 hash_ids for 10 tokens, expected one for every 512",
    mooncake(hash_ids=[1, 2]): "2 hash_ids for 10 tokens",
    mooncake(hash_ids=["1"]): "hash_ids should be a list of ids",
    mooncake(hash_ids=7): "hash_ids should be a list of ids",
    session(block_size=0): "block_size is 0, expected a whole number from 1",
    '{"block_size": 64, "requests": 3}': "requests should be a list of objects",
    '{"block_size": 64, "requests": [3]}': "requests should be a list of objects",
    session(t=None): "request 1: t is None, expected a time",
    session(a=7): "request 1: a is 7, expected the name of an agent",
    session(keep=2, add=[]): "request 1: keep is 2, the agent's request before has 1 ids",
    session(keep=1): "request 1: 2 ids for 70 tokens, expected one for every whole 64",
    session(add=None): "request 1: add should be a list of [first id, count]",
    session(add=[[1, -1], [5, 2]]): "request 1: add should be a list",
    session(add=[[1, 1, 1]]): "request 1: add should be a list",
    session(**{"in": 0}): "request 1: in is 0, expected at least 1",
}


@pytest.mark.parametrize(("row", "complaint"), BAD_CSV.items(), ids=range(len(BAD_CSV)))
def test_a_bad_row_of_csv_is_an_error_with_file_and_line(read, tmp_path, row, complaint):
    with pytest.raises(TraceError) as caught:
        read(f"{AZURE}{row}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'trace'}:4: ")
    assert complaint in str(caught.value)
    assert (caught.value.path, caught.value.line) == (str(tmp_path / "trace"), 4)


@pytest.mark.parametrize(("row", "complaint"), BAD_JSON.items(), ids=range(len(BAD_JSON)))
def test_a_bad_row_of_json_is_an_error_with_file_and_line(read, row, complaint):
    with pytest.raises(TraceError, match="trace:2: ") as caught:
        read(f"{mooncake()}\n{row}\n")
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("good", "bad"), [(AZURE, BAD_CSV), (MOONCAKE + "\n", BAD_JSON), (SESSIONS + "\n", BAD_JSON)]
)
def test_bad_rows_can_be_counted_instead(read, good, bad):
    trace = read(good + "\n".join(bad) + "\n", skip_bad=True)
    assert trace.bad_rows == len(bad)
    assert rows_of(trace) == rows_of(read(good))


def test_bytes_that_are_no_text_are_a_bad_row(read):
    trace = read(AZURE.encode() + b"\xff\xfe,\x80\n", skip_bad=True)
    assert (len(trace), trace.bad_rows) == (2, 1)


def test_a_first_row_that_is_cut_off_does_not_hide_the_form(read):
    assert len(read('{"timestamp": 0,\n' + MOONCAKE, skip_bad=True)) == 3


def test_a_session_with_a_bad_request_is_left_out_whole(read):
    trace = read(f"{SESSIONS}\n{session(t=None)}", skip_bad=True)
    assert (len(trace), trace.bad_rows) == (5, 1)


def test_ids_of_different_blocks_are_not_mixed(read):
    with pytest.raises(TraceError, match="trace:4: ids of blocks of 64 tokens after ids of blocks of 512"):
        read(f"{MOONCAKE}\n{session()}")


# --- files that are no traces


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no requests in it"),
        ("\n\n", "no requests in it"),
        (HEADER, "no requests in it"),
        (gzip.compress(b""), "no requests in it"),
        (
            "a,b,c\n1,2,3\n",
            ":1: this is no trace: expected the columns TIMESTAMP,ContextTokens,GeneratedTokens",
        ),
        ("\n# notes\n", ":2: this is no trace"),
        (bytes(range(256)) * 4, "this is no trace"),
        (gzip.compress(MOONCAKE.encode())[:-20], "damaged: "),
        (b"\x1f\x8bnot really", "damaged: "),
        (gzip.compress(MOONCAKE.encode())[:20] + b"\0" * 30, "damaged: "),
    ],
)
def test_a_file_that_is_no_trace_is_an_error_that_says_so(read, content, complaint):
    for skip_bad in (False, True):
        with pytest.raises(TraceError) as caught:
            read(content, skip_bad=skip_bad)
        assert complaint in str(caught.value)


def test_nothing_but_bad_rows_is_an_error_that_counts_them(read):
    with pytest.raises(TraceError, match="no requests in it: 2 rows were skipped"):
        read(f"{HEADER}\na,b,c\n1,2\n", skip_bad=True)


def test_a_line_without_end_is_not_read_to_its_end(read, monkeypatch):
    monkeypatch.setattr("kvcache.traces.LONGEST_LINE", 1000)
    with pytest.raises(TraceError, match="trace:2: a line of 1,000 characters or more"):
        read(f"{HEADER}\n{'1' * 5000}\n", skip_bad=True)


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "absent")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(TraceError("a.csv", 7, "bad")))
    assert (str(error), error.path, error.line) == ("a.csv:7: bad", "a.csv", 7)


# --- the published traces, where they are at hand

FACTS = {
    "azure_2023_conv.csv.gz": ("chat", 19366, 3502, (1020, 2734, 4142, 14050), (129, 601, 1000)),
    "azure_2023_code.csv.gz": ("code", 8819, 3436, (1469, 5186, 7436, 7437), (13, 249, 1899)),
    "mooncake_conversation.jsonl.gz": ("long", 12031, 3537, (6909, 27367, 85399, 126195), (350, 1115, 2000)),
    "weka_claude_code.jsonl.gz": (None, 49334, None, (103656, 233633, 498319, 894371), (216, 3685, 18195)),
}


def percentiles(lengths, *wanted):
    return tuple(int(each) for each in np.percentile(lengths, wanted, method="lower"))


@pytest.mark.parametrize("name", FACTS)
def test_a_published_trace_has_the_published_lengths(name):
    if not (TRACES / name).exists():
        pytest.skip(f"{name} is not here")
    _, count, seconds, prompts, outputs = FACTS[name]
    trace = read_trace(TRACES / name)
    assert len(trace) == count
    assert percentiles(trace.prompts, 50, 90, 99, 100) == prompts
    assert percentiles(trace.outputs, 50, 99, 100) == outputs
    assert seconds is None or round(trace.arrivals[-1]) == seconds


def test_mooncakes_ids_have_the_published_hit_ratio():
    path = TRACES / "mooncake_conversation.jsonl.gz"
    if not path.exists():
        pytest.skip("the trace is not here")
    trace, seen, hits = read_trace(path), set(), 0
    for index, prompt in enumerate(trace.prompts.tolist()):
        ids = trace.prefixes.ids(index).tolist()
        known = next((place for place, each in enumerate(ids) if each not in seen), len(ids))
        hits += min(prompt, known * 512)
        seen.update(ids)
    assert hits / trace.prompts.sum(dtype=np.int64) == pytest.approx(0.3736, abs=5e-5)


def test_ids_of_sessions_are_as_many_as_whole_blocks():
    path = TRACES / "weka_claude_code.jsonl.gz"
    if not path.exists():
        pytest.skip("the trace is not here")
    trace = read_trace(path)
    for index in range(0, len(trace), 997):
        assert len(trace.prefixes.ids(index)) == trace.prompts[index] // 64


# --- traffic that is made up


@pytest.mark.parametrize(
    "name", ["azure_2023_conv.csv.gz", "azure_2023_code.csv.gz", "mooncake_conversation.jsonl.gz"]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_workload_has_the_published_medians_and_tails(name, seed):
    kind, count, seconds, prompts, outputs = FACTS[name]
    trace = WORKLOADS[kind].make(kind, seed)
    assert len(trace) == count
    assert percentiles(trace.prompts, 50, 90) == pytest.approx(prompts[:2], rel=0.05)
    assert percentiles(trace.prompts, 99) == pytest.approx(prompts[2:3], rel=0.08)
    assert percentiles(trace.outputs, 50) == pytest.approx(outputs[:1], rel=0.05)
    assert percentiles(trace.outputs, 99) == pytest.approx(outputs[1:2], rel=0.08)
    assert trace.prompts.max() <= prompts[3]
    assert trace.outputs.max() <= outputs[2]
    assert min(trace.prompts.min(), trace.outputs.min()) >= 1
    assert trace.arrivals[-1] == pytest.approx(seconds, rel=0.5 if kind == "code" else 0.05)


def test_code_comes_in_bursts():
    variations = {
        kind: np.std(gaps) / np.mean(gaps)
        for kind in WORKLOADS
        for gaps in [np.diff(WORKLOADS[kind].make(kind, 0, 50_000).arrivals)]
    }
    assert variations["code"] > 6
    assert variations["chat"] == pytest.approx(1, abs=0.05)


def test_a_seed_repeats_a_workload_and_another_does_not():
    first, again, other = (rows_of(WORKLOADS["chat"].make("", seed, 100)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
