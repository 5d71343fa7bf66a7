"""As much of PromQL as the dashboard needs, over samples that were scraped: for its picture, and for its tests.

Selectors with matchers, `rate` and `increase` over a range, `sum by`, `max by`, `histogram_quantile`, and arithmetic
between series of equal labels. Ranges are not extrapolated to their ends, which Prometheus does.
"""

import operator
import re

import numpy as np

TOKEN = re.compile(r'\s*(?:(\d+(?:\.\d+)?[smh]?)|([A-Za-z_:][\w:]*)|("[^"]*")|(=~|!=|[-+*/(){}\[\],=]))')
MATCHERS = {
    "=": lambda value, wanted: value == wanted,
    "!=": lambda value, wanted: value != wanted,
    "=~": lambda value, wanted: re.fullmatch(wanted, value) is not None,
}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
UNITS = {"s": 1, "m": 60, "h": 3600}


class Scrapes:
    """What has been scraped.

    Attributes
    ----------
    times : list of float
    series : dict
        By (name, labels as sorted pairs): values by the number of the scrape.
    """

    def __init__(self):
        self.times = []
        self.series = {}

    def take(self, time, registry):
        """One scrape of a Prometheus registry."""
        number = len(self.times)
        self.times.append(time)
        for family in registry.collect():
            for sample in family.samples:
                self.series.setdefault((sample.name, tuple(sorted(sample.labels.items()))), {})[number] = (
                    sample.value
                )

    def select(self, name, matchers):
        """Series by their labels, as arrays with NaN where there was no sample."""
        found = {}
        for (series, labels), values in self.series.items():
            given = dict(labels)
            if series == name and all(MATCHERS[how](given.get(label, ""), to) for label, how, to in matchers):
                found[labels] = np.array([values.get(number, np.nan) for number in range(len(self.times))])
        return found


class Query:
    """An expression; `evaluate` gives series by their labels, or a number.

    Parameters
    ----------
    text : str
    variables : dict of str to str
        What stands for ``$name``.
    """

    def __init__(self, text, variables):
        for name in sorted(variables, key=len, reverse=True):
            text = text.replace(f"${name}", variables[name])
        self.text = text
        self.tokens = self.split(text)
        self.place = 0

    def split(self, text):
        tokens, place = [], 0
        while place < len(text.rstrip()):
            found = TOKEN.match(text, place)
            if not found:
                raise ValueError(f"{text!r} is not understood from {text[place:]!r} on")
            tokens.append(found.group().strip())
            place = found.end()
        return tokens

    def evaluate(self, scrapes):
        """At the times of all scrapes."""
        self.scrapes, self.place = scrapes, 0
        value = self.sum()
        if self.place != len(self.tokens):
            raise ValueError(f"{self.text!r} goes on with {self.tokens[self.place]!r}")
        return value

    # ---- the grammar

    def next(self, *wanted):
        """The next token, which has to be one of these if any are given."""
        token = self.tokens[self.place] if self.place < len(self.tokens) else ""
        if wanted and token not in wanted:
            raise ValueError(f"{self.text!r}: {token!r} where one of {wanted} belongs")
        self.place += 1
        return token

    def peek(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def sum(self):
        value = self.product()
        while self.peek() in ("+", "-"):
            value = combined(OPERATORS[self.next()], value, self.product())
        return value

    def product(self):
        value = self.term()
        while self.peek() in ("*", "/"):
            value = combined(OPERATORS[self.next()], value, self.term())
        return value

    def term(self):
        token = self.next()
        if token == "(":
            value = self.sum()
            self.next(")")
            return value
        if token[0].isdigit():
            return float(token)
        if token in ("sum", "max"):
            return self.aggregate({"sum": np.nansum, "max": np.nanmax}[token])
        if token in ("rate", "increase"):
            self.next("(")
            selected = self.selector(self.next())
            self.next("[")
            seconds = seconds_of(self.next())
            self.next("]")
            self.next(")")
            return {key: self.change(values, seconds, token == "rate") for key, values in selected.items()}
        if token == "histogram_quantile":
            self.next("(")
            part = float(self.next())
            self.next(",")
            buckets = self.sum()
            self.next(")")
            return quantiles(part, buckets)
        return self.selector(token)

    def selector(self, name):
        matchers = []
        if self.peek() == "{":
            self.next()
            while self.peek() != "}":
                label, how = self.next(), self.next(*MATCHERS)
                matchers.append((label, how, self.next().strip('"')))
                if self.peek() == ",":
                    self.next()
            self.next("}")
        return self.scrapes.select(name, matchers)

    def aggregate(self, function):
        kept = []
        if self.peek() == "by":
            self.next()
            self.next("(")
            while self.peek() != ")":
                kept.append(self.next())
                if self.peek() == ",":
                    self.next()
            self.next(")")
        self.next("(")
        groups = {}
        for labels, values in self.sum().items():
            groups.setdefault(tuple(pair for pair in labels if pair[0] in kept), []).append(values)
        self.next(")")
        return {labels: function(np.array(members), axis=0) for labels, members in groups.items()}

    def change(self, values, seconds, per_second):
        """By how much a counter has grown in the time before each scrape; one that falls has begun anew."""
        times = np.array(self.scrapes.times)
        steps = np.diff(values, prepend=values[:1])
        grown = np.cumsum(np.where(steps < 0, values, np.nan_to_num(steps)))
        first = np.searchsorted(times, times - seconds)
        change = grown - grown[first]
        if not per_second:
            return change
        passed = times - times[first]
        return np.divide(change, passed, out=np.full(len(times), np.nan), where=passed > 0)


def seconds_of(text):
    """Of a range such as ``1h``."""
    return float(text[:-1]) * UNITS[text[-1]]


def combined(operation, left, right):
    """Series of equal labels with each other, or all of them with a number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if not isinstance(left, dict) and not isinstance(right, dict):
            return operation(left, right)
        if not isinstance(left, dict):
            return {labels: operation(left, values) for labels, values in right.items()}
        if not isinstance(right, dict):
            return {labels: operation(values, right) for labels, values in left.items()}
        return {labels: operation(left[labels], right[labels]) for labels in left if labels in right}


def quantiles(part, buckets):
    """Of cumulative buckets by the label ``le``; linear within a bucket, the last bound beyond it."""
    groups = {}
    for labels, values in buckets.items():
        bound = float(dict(labels)["le"])
        groups.setdefault(tuple(pair for pair in labels if pair[0] != "le"), []).append((bound, values))
    found = {}
    for labels, members in groups.items():
        bounds, counts = zip(*sorted(members, key=lambda member: member[0]), strict=True)
        found[labels] = np.array([quantile(part, bounds, column) for column in np.array(counts).T])
    return found


def quantile(part, bounds, counts):
    """Of one moment; NaN where nothing has been counted."""
    if not counts[-1] > 0:
        return np.nan
    rank = part * counts[-1]
    place = int(np.searchsorted(counts, rank))
    if bounds[place] == np.inf:
        return bounds[place - 1]
    below = (bounds[place - 1], counts[place - 1]) if place else (0.0, 0.0)
    within = counts[place] - below[1]
    return below[0] + (bounds[place] - below[0]) * ((rank - below[1]) / within if within else 1.0)
