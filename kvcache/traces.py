"""Traces of served requests: when each came, how long its prompt was, how much was generated.

Three forms are read, plain or gzipped, told apart by what is in the file (`trace_forms` has the rows): the CSV of
Azure's public data set, Mooncake's JSON lines, and sessions of an agent, one a line. A trace is kept in columns, so
that fifty thousand requests are a megabyte.
"""

import gzip
import io
import zlib
from array import array
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kvcache.errors import KVCacheError
from kvcache.trace_forms import BadRow, form_of

LONGEST_LINE = 1 << 26  # characters; a session of ten thousand requests is a fiftieth of it
GZIPPED = b"\x1f\x8b"


class TraceError(KVCacheError, ValueError):
    """A trace that cannot be read.

    Attributes
    ----------
    path : str
    line : int or None
        Where in the file.
    """

    def __init__(self, path, line, what):
        super().__init__(f"{path}:{line}: {what}" if line else f"{path}: {what}")
        self.path = str(path)
        self.line = line


class Request(NamedTuple):
    """One request of a trace."""

    arrival: float  # seconds after the first
    prompt_tokens: int
    output_tokens: int


class Trace:
    """Requests in the order in which they came.

    Parameters
    ----------
    name : str
        Where they are from.
    arrivals : array of float
        Seconds; the first becomes 0.
    prompts, outputs : array of int
        Tokens of each.
    prefixes : PrefixIds, optional
        Which requests begin alike, where the file tells.
    bad_rows : int
        Rows that were skipped.

    Attributes
    ----------
    places : array of int
        Of each request: which row of the file it was.
    """

    def __init__(self, name, arrivals, prompts, outputs, prefixes=None, bad_rows=0):
        arrivals = np.asarray(arrivals, np.float64)
        order = np.argsort(arrivals, kind="stable")
        self.name = name
        self.places = order
        self.arrivals = arrivals[order] - (arrivals[order[0]] if len(order) else 0.0)
        self.prompts = np.asarray(prompts, np.int32)[order]
        self.outputs = np.asarray(outputs, np.int32)[order]
        self.prefixes = None if prefixes is None else prefixes.taken(order)
        self.bad_rows = bad_rows

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, index):
        return Request(float(self.arrivals[index]), int(self.prompts[index]), int(self.outputs[index]))

    def __repr__(self):
        return f"Trace({self.name!r}, {len(self)} requests)"


class PrefixIds:
    """Ids of the blocks that prompts consist of: equal ids mean equal tokens up to the end of the block.

    They are kept as they are told: how many the request has in common with an earlier one, then ranges of new ones.

    Parameters
    ----------
    block_tokens : int
        Tokens a block; the last of a prompt may be shorter, or left out.
    kept, earlier : array of int
        How many of the ids of request `earlier` a request begins with; -1: of none.
    firsts : array of int
        The ranges of request i are ``[firsts[i], firsts[i + 1])``.
    ranges : array of int ``(ranges, 2)``
        First id, and how many.
    """

    def __init__(self, block_tokens, kept, earlier, firsts, ranges):
        self.block_tokens = block_tokens
        self._kept = np.asarray(kept, np.int32)
        self._earlier = np.asarray(earlier, np.int32)
        self._firsts = np.asarray(firsts, np.int64)
        self._ranges = np.asarray(ranges, np.int64).reshape(-1, 2)
        self._places = np.arange(len(self._kept))  # of requests in the file, by their order in the trace

    def taken(self, order):
        """The same, of requests in another order."""
        other = PrefixIds(self.block_tokens, self._kept, self._earlier, self._firsts, self._ranges)
        other._places = self._places[order]
        return other

    def ids(self, index):
        """The ids of one request, as an int64 array, made when asked for."""
        place, wanted, parts = int(self._places[index]), None, []
        while place >= 0:
            own = self._own(place)
            kept = int(self._kept[place])
            if wanted is not None:
                own, kept = own[: max(0, wanted - kept)], min(kept, wanted)
            parts.append(own)
            place, wanted = (int(self._earlier[place]), kept) if kept else (-1, 0)
        return np.concatenate(parts[::-1])

    def next_turns(self):
        """For each request the one that begins with all of its ids and goes on from there, told so by the file.

        Returns
        -------
        array of int
            -1 where there is none.
        """
        ends = np.concatenate(([0], np.cumsum(self._ranges[:, 1])))[self._firsts]
        lengths = self._kept + np.diff(ends)
        later = np.flatnonzero(self._earlier >= 0)[::-1]  # of several the first stands
        later = later[self._kept[later] == lengths[self._earlier[later]]]
        numbers = np.empty(len(self._places), np.int64)
        numbers[self._places] = np.arange(len(self._places))
        turns = np.full(len(self._places), -1, np.int64)
        turns[numbers[self._earlier[later]]] = numbers[later]
        return turns

    def _own(self, place):
        ranges = self._ranges[self._firsts[place] : self._firsts[place + 1]]
        parts = [np.arange(start, start + count, dtype=np.int64) for start, count in ranges]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


def read_trace(path, skip_bad=False):
    """Read a file of requests.

    Parameters
    ----------
    path : str or Path
        Plain or gzipped, whatever its name.
    skip_bad : bool
        Leave out rows that cannot be read, and count them, in place of stopping at the first.

    Returns
    -------
    Trace
        In order of arrival. Sessions tell their own times only: here all of them begin at 0.

    Raises
    ------
    TraceError
        With file and line, and what was expected there.
    """
    try:
        with _opened(path) as file:
            columns = _read(path, file, skip_bad)
    except OSError as error:
        raise TraceError(path, None, error.strerror or f"damaged: {error}") from error
    except (EOFError, zlib.error) as error:
        raise TraceError(path, None, f"damaged: {error}") from error
    if not columns.prompts:
        skipped = f": {columns.bad_rows} rows were skipped" if columns.bad_rows else ""
        raise TraceError(path, None, f"no requests in it{skipped}")
    return columns.trace(Path(path).name)


@contextmanager
def _opened(path):
    """The lines of a file, unpacked if it begins as gzip does. What is not UTF-8 becomes a bad row."""
    with Path(path).open("rb") as file:
        packed = file.peek(len(GZIPPED)).startswith(GZIPPED)
        binary = gzip.GzipFile(fileobj=file) if packed else file
        with io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace") as lines:
            yield lines


def _read(path, file, skip_bad):
    columns, form, number = _Columns(), None, 0
    while line := file.readline(LONGEST_LINE):
        number += 1
        if len(line) == LONGEST_LINE:
            raise TraceError(path, number, f"a line of {LONGEST_LINE:,} characters or more")
        if not line.strip():
            continue
        try:
            if form is None:
                form, is_header = form_of(line)
                if is_header:
                    continue
            columns.take(form.rows(line))
        except BadRow as error:
            if form is None or not skip_bad:
                raise TraceError(path, number, error) from None
            columns.bad_rows += 1
    return columns


class _Columns:
    """Grows by the rows of a line at a time."""

    def __init__(self):
        self.arrivals, self.prompts, self.outputs = array("d"), array("i"), array("i")
        self.block_tokens = None
        self.kept, self.earlier, self.firsts, self.ranges = (
            array("i"),
            array("i"),
            array("q", [0]),
            array("q"),
        )
        self.bad_rows = 0

    def take(self, rows):
        """Rows of one line; each names an earlier one by its number among them."""
        before = len(self.prompts)
        block_tokens = rows[0].block_tokens if rows else self.block_tokens
        if before and block_tokens != self.block_tokens:
            raise BadRow(f"ids of blocks of {block_tokens} tokens after ids of blocks of {self.block_tokens}")
        self.block_tokens = block_tokens
        for row in rows:
            self.arrivals.append(row.arrival)
            self.prompts.append(row.prompt_tokens)
            self.outputs.append(row.output_tokens)
            self.kept.append(row.kept)
            self.earlier.append(-1 if row.earlier is None else before + row.earlier)
            for first_id, count in row.ranges:
                self.ranges.extend((first_id, count))
            self.firsts.append(len(self.ranges) // 2)

    def trace(self, name):
        prefixes = None
        if self.block_tokens is not None:
            prefixes = PrefixIds(self.block_tokens, self.kept, self.earlier, self.firsts, self.ranges)
        return Trace(name, self.arrivals, self.prompts, self.outputs, prefixes, self.bad_rows)
