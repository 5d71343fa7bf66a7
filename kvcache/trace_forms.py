"""The rows of three trace formats, checked: what is not as it should be is a `BadRow` that says what was expected.

azure
    ``TIMESTAMP,ContextTokens,GeneratedTokens``; columns are found by name, further ones are ignored.
mooncake
    A JSON object a line: ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids`` of 512-token blocks.
sessions
    A JSON object a session, with its ``requests``: ``t`` (s), agent ``a``, ``in``, ``out``; the ids of a prompt are the
    first ``keep`` of the agent's request before, then the ranges ``add``.
"""

import csv
import json
import math
import re
from datetime import datetime
from typing import NamedTuple

MOST_TOKENS = 2**31 - 1  # of a request, prompt and output together
MOONCAKE_BLOCK = 512  # tokens
SESSION_IDS = 2**32  # ids of one session lie apart from those of the next
AZURE_COLUMNS = ("timestamp", "contexttokens", "generatedtokens")
MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", re.ASCII)


class BadRow(Exception):
    """A row that cannot be read; the message says what is wrong with it."""


class Row(NamedTuple):
    """One request, and which ids its prompt consists of."""

    arrival: float  # seconds, from anywhere
    prompt_tokens: int
    output_tokens: int
    block_tokens: int | None = None  # that an id stands for; None where there are no ids
    kept: int = 0  # ids that it has in common with an earlier request
    earlier: int | None = None  # which, among the rows of this line
    ranges: tuple = ()  # (first id, count) of the other ids


def form_of(line):
    """Tell the form from the first line that is not blank.

    Returns
    -------
    form
        ``form.rows(line)`` gives the rows of a line, or raises `BadRow`.
    is_header : bool
        Whether that line was no row yet.
    """
    if line.lstrip().startswith("{"):
        return JsonLines(), False
    names = [name.strip().lower() for name in _fields(line)]
    if all(name in names for name in AZURE_COLUMNS):
        return Azure(names), True
    raise BadRow(
        "this is no trace: expected the columns TIMESTAMP,ContextTokens,GeneratedTokens, or JSON objects with "
        "input_length or requests"
    )


class Azure:
    """Rows of Azure's CSV."""

    def __init__(self, names):
        self._width = len(names)
        self._columns = [names.index(name) for name in AZURE_COLUMNS]
        self._began = (
            None  # the first row's moment, since a float of seconds since 1970 has no room for 100 ns
        )

    def rows(self, line):
        """The one row of a line."""
        fields = _fields(line)
        if len(fields) != self._width:
            raise BadRow(f"{len(fields)} fields, expected {self._width}")
        moment, prompt, output = (fields[column] for column in self._columns)
        prompt, output = _digits(prompt, "ContextTokens"), _digits(output, "GeneratedTokens")
        moment, fraction = _moment(moment)
        row = _row(fraction, prompt, output, ("ContextTokens", "GeneratedTokens"))
        self._began = self._began or moment
        return [row._replace(arrival=(moment - self._began).total_seconds() + fraction)]


def _fields(line):
    try:
        return next(csv.reader([line.rstrip("\r\n")]), [])
    except csv.Error as error:
        raise BadRow(f"not CSV: {error}") from None


def _digits(text, name):
    text = text.strip()
    if not (text.isascii() and text.isdigit()) or len(text) > 10:
        raise BadRow(f"{name} is {_short(text)}, expected a count of tokens")
    return int(text)


def _moment(text):
    """A whole second, and the fraction after it; no zone is UTC."""
    found = MOMENT.fullmatch(text.strip())
    try:
        day, clock, fraction, zone = found.groups()
        moment = datetime.fromisoformat(f"{day} {clock}{'+00:00' if zone in (None, 'Z') else zone}")
    except (AttributeError, ValueError):
        raise BadRow(f"TIMESTAMP is {_short(text)}, expected one like 2023-11-16 18:15:46.6805900") from None
    return moment, float(fraction or 0)


class JsonLines:
    """Rows of JSON objects: requests as Mooncake has them, or sessions."""

    def __init__(self):
        self._sessions = 0

    def rows(self, line):
        """The one row of a request, or the rows of a session."""
        try:
            values = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not JSON: {_short(str(error), quote=False)}") from None
        if not isinstance(values, dict):
            raise BadRow(f"expected a JSON object, not {type(values).__name__}")
        if "requests" in values:
            rows = _session(values, self._sessions * SESSION_IDS)
            self._sessions += 1
            return rows
        if "input_length" in values:
            return [_mooncake(values)]
        raise BadRow("expected input_length (a request), or requests (a session)")


def _no_constant(name):
    raise ValueError(f"{name} is no number")


def _mooncake(values):
    arrival = _number(values, "timestamp") / 1000
    prompt, output = _count(values, "input_length"), _count(values, "output_length")
    row = _row(arrival, prompt, output, ("input_length", "output_length"))
    ids = values.get("hash_ids")
    if ids is None:
        return row
    if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < SESSION_IDS for each in ids):
        raise BadRow("hash_ids should be a list of ids from 0")
    if len(ids) != -(-prompt // MOONCAKE_BLOCK):
        raise BadRow(f"{len(ids)} hash_ids for {prompt} tokens, expected one for every {MOONCAKE_BLOCK}")
    return row._replace(block_tokens=MOONCAKE_BLOCK, ranges=_ranges(ids))


def _ranges(ids):
    """Ids that follow one another are told as (first, count)."""
    ranges = []
    for each in ids:
        if ranges and each == ranges[-1][0] + ranges[-1][1]:
            ranges[-1][1] += 1
        else:
            ranges.append([each, 1])
    return ranges


def _session(values, offset):
    """The requests of a session; an agent's prompt begins as its one before."""
    requests, block_tokens = values["requests"], _count(values, "block_size", least=1)
    if not isinstance(requests, list) or not all(isinstance(request, dict) for request in requests):
        raise BadRow("requests should be a list of objects")
    rows, newest = [], {}  # agent -> (number of its request before, ids of that)
    for number, request in enumerate(requests):
        try:
            agent = request.get("a", "")
            if not isinstance(agent, str):
                raise BadRow(f"a is {_short(agent)}, expected the name of an agent")
            earlier, known = newest.get(agent, (None, 0))
            rows.append(_session_row(request, block_tokens, earlier, known, offset))
            newest[agent] = number, rows[-1].kept + sum(count for _, count in rows[-1].ranges)
        except BadRow as error:
            raise BadRow(f"request {number}: {error}") from None
    return rows


def _session_row(request, block_tokens, earlier, known, offset):
    row = _row(_number(request, "t"), _count(request, "in"), _count(request, "out"), ("in", "out"))
    kept, ranges = _count(request, "keep"), request.get("add")
    if kept > known:
        raise BadRow(f"keep is {kept}, the agent's request before has {known} ids")
    if not isinstance(ranges, list) or not all(_is_range(each) for each in ranges):
        raise BadRow("add should be a list of [first id, count]")
    ids = kept + sum(count for _, count in ranges)
    if ids != row.prompt_tokens // block_tokens:
        raise BadRow(f"{ids} ids for {row.prompt_tokens} tokens, expected one for every whole {block_tokens}")
    placed = tuple((offset + first, count) for first, count in ranges)
    return row._replace(block_tokens=block_tokens, kept=kept, earlier=earlier, ranges=placed)


def _is_range(value):
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(each) is int for each in value)
        and 0 <= value[0] < SESSION_IDS
        and 0 <= value[1] <= MOST_TOKENS
    )


def _row(arrival, prompt, output, names):
    if prompt < 1:
        raise BadRow(f"{names[0]} is {prompt}, expected at least 1")
    if prompt + output > MOST_TOKENS:
        raise BadRow(
            f"{names[0]} and {names[1]} come to {prompt + output}, at most {MOST_TOKENS} are possible"
        )
    return Row(arrival, prompt, output)


def _count(values, name, least=0):
    count = values.get(name)
    if type(count) is not int or not least <= count <= MOST_TOKENS:
        raise BadRow(f"{name} is {_short(count)}, expected a whole number from {least}")
    return count


def _number(values, name):
    number = values.get(name)
    if type(number) not in (int, float) or not math.isfinite(number) or abs(number) > 1e15:
        raise BadRow(f"{name} is {_short(number)}, expected a time")
    return float(number)


def _short(value, quote=True):
    """At most 60 characters of what was found instead."""
    text = repr(value) if quote else value
    return text if len(text) <= 60 else text[:57] + "..."
