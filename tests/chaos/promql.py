"""As much of PromQL as Jevons asks, over samples in memory: instant queries, evaluated as Prometheus does.

Selectors, ranges, `rate` with its extrapolation, `*_over_time`, aggregations, set operators, comparisons, arithmetic.
This module must not know what the series mean.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Labels = tuple[tuple[str, str], ...]
LOOKBACK_S = 300.0
MOST_REMEMBERED = 4096
TOKEN = re.compile(
    r"\s*(?:(?P<duration>(?:\d+(?:ms|[smhd]))+(?![\w:]))|(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?(?![a-zA-Z_:]))|(?P<name>[a-zA-Z_:][\w:]*)"
    r'|(?P<string>"(?:[^"\\]|\\.)*")|(?P<range>\[[^\]]*\])|(?P<op>==|!=|>=|<=|=~|!~|[-+*/%^(){},<>=@]))'
)
UNITS_S = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
AGGREGATIONS: Mapping[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "avg": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
    "count": lambda values: float(len(values)),
    "group": lambda values: 1.0,
}


@dataclass
class Series:
    """Samples of one series, oldest first; `ended_s` is when its target was gone."""

    labels: dict[str, str]
    times: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    ended_s: float = math.inf
    answers: dict[object, bool] = field(default_factory=dict)
    """Whether a selector chooses it: its labels never change."""

    def __post_init__(self) -> None:
        self.key: Labels = tuple(sorted(self.labels.items()))

    def add(self, time_s: float, value: float) -> None:
        self.times.append(time_s)
        self.values.append(value)
        self.ended_s = math.inf
        if len(self.times) > 128:
            del self.times[:64], self.values[:64]

    def within(self, after_s: float, until_s: float) -> tuple[list[float], list[float]]:
        """Samples in (after, until]."""
        first, last = bisect.bisect_right(self.times, after_s), bisect.bisect_right(self.times, until_s)
        return self.times[first:last], self.values[first:last]


class Sample(NamedTuple):
    labels: Labels
    value: float
    time_s: float


Vector = list[Sample]


class Store(dict[str, dict[Labels, Series]]):
    """Series by name and labels; `memory` has what parts of queries were answered since a series last changed."""

    def __init__(self) -> None:
        self.memory: dict[tuple[str, float], Any] = {}


Node = Callable[[Store, float], Any]


class UnknownPromQLError(ValueError):
    """Raised for what this evaluator does not know."""


def seconds(text: str) -> float:
    """``1m30s`` in seconds."""
    return sum(float(number) * UNITS_S[unit] for number, unit in re.findall(r"(\d+)(ms|s|m|h|d)", text))


def evaluate(query: str, store: Store, at_s: float) -> Vector | float:
    """The answer to an instant query."""
    if len(store.memory) > MOST_REMEMBERED:
        store.memory.clear()
    return parse(query)(store, at_s)


@functools.lru_cache(maxsize=512)
def parse(query: str) -> Node:
    """A query, ready to be asked."""
    parser = Parser(query)
    node = parser.set_operation()
    if parser.at < len(parser.tokens):
        raise UnknownPromQLError(f"{query}: cannot read {parser.tokens[parser.at]}")
    return node


def chosen(by: bool, names: frozenset[str], name: str) -> bool:
    """Whether a grouping keeps a label."""
    return (name in names) == by


def every(name: str) -> bool:
    """Keeps all labels."""
    return True


@functools.lru_cache(maxsize=1 << 16)
def plain(labels: Labels, keep: Callable[[str], bool] = every) -> Labels:
    return tuple(pair for pair in labels if keep(pair[0]) and pair[0] != "__name__")


class Parser:
    def __init__(self, query: str) -> None:
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(query.rstrip()):
            match = TOKEN.match(query, position)
            if match is None:
                raise UnknownPromQLError(f"{query}: cannot read {query[position : position + 20]!r}")
            self.tokens.append((str(match.lastgroup), match.group().strip()))
            position = match.end()
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if expected and token != expected:
            raise UnknownPromQLError(f"expected {expected}, found {token!r}")
        self.at += 1
        return token

    # Operators, the loosest first

    def set_operation(self) -> Node:
        left = self.intersection()
        while self.peek() == "or":
            self.take()
            left = set_or(left, *self.matching(), self.intersection())
        return left

    def intersection(self) -> Node:
        left = self.arithmetic(0)
        while self.peek() in ("and", "unless"):
            keep = self.take() == "and"
            left = set_and(keep, left, *self.matching(), self.arithmetic(0))
        return left

    LEVELS = (("==", "!=", ">", "<", ">=", "<="), ("+", "-"), ("*", "/", "%"), ("^",))

    def arithmetic(self, level: int) -> Node:
        if level == len(self.LEVELS):
            return self.unary()
        left = self.arithmetic(level + 1)
        while self.peek() in self.LEVELS[level]:
            operator = self.take()
            as_bool = self.peek() == "bool" and bool(self.take())
            left = binary(operator, as_bool, left, *self.matching(), self.arithmetic(level + 1))
        return left

    def matching(self) -> tuple[Callable[[str], bool]]:
        """By which labels two sides are matched."""
        keep: Callable[[str], bool] = every
        if self.peek() in ("on", "ignoring"):
            on, names = self.take() == "on", self.names()
            keep = (lambda name: name in names) if on else (lambda name: name not in names)
        if self.peek() in ("group_left", "group_right"):
            self.take()
            if self.peek() == "(":
                self.names()
        return (keep,)

    def names(self) -> frozenset[str]:
        self.take("(")
        found = set()
        while self.peek() != ")":
            found.add(self.take())
            if self.peek() == ",":
                self.take()
        self.take(")")
        return frozenset(found)

    def unary(self) -> Node:
        if self.peek() == "-":
            self.take()
            return binary("*", False, lambda store, at_s: -1.0, every, self.unary())
        return self.primary()

    def primary(self) -> Node:
        first = self.at
        node = self.part()
        return remembered(" ".join(token for _, token in self.tokens[first : self.at]), node)

    def part(self) -> Node:
        kind, token = self.tokens[self.at]
        if token == "(":
            self.take()
            inner = self.set_operation()
            self.take(")")
            return inner
        if kind == "number":
            self.take()
            return lambda store, at_s: float(token)
        if kind == "string":
            self.take()
            return lambda store, at_s: token[1:-1]
        following = self.tokens[self.at + 1][1] if self.at + 1 < len(self.tokens) else ""
        if token in AGGREGATIONS and following in ("(", "by", "without"):
            return self.aggregation()
        if kind == "name" and following == "(":
            self.take()
            return call(token, self.arguments())
        return self.selector()

    def arguments(self) -> list[Node]:
        self.take("(")
        found = []
        while self.peek() != ")":
            found.append(self.set_operation())
            if self.peek() == ",":
                self.take()
        self.take(")")
        return found

    def aggregation(self) -> Node:
        combine = AGGREGATIONS[self.take()]
        keep: Callable[[str], bool] = lambda name: False  # noqa: E731
        inner: list[Node] = []
        for _ in range(2):
            if self.peek() in ("by", "without"):
                by, names = self.take() == "by", self.names()
                keep = functools.partial(chosen, by, names)
            elif self.peek() == "(" and not inner:
                inner = self.arguments()

        def aggregated(store: Store, at_s: float) -> Vector:
            groups: dict[Labels, list[float]] = {}
            for sample in inner[0](store, at_s):
                groups.setdefault(plain(sample.labels, keep), []).append(sample.value)
            return [Sample(labels, combine(values), at_s) for labels, values in groups.items()]

        return aggregated

    def selector(self) -> Node:
        tests: list[tuple[str, str, Any]] = []
        if self.peek() != "{":
            tests.append(("__name__", "=", self.take()))
        if self.peek() == "{":
            self.take()
            while self.peek() != "}":
                label, operator, text = self.take(), self.take(), self.take()
                value = text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
                tests.append((label, operator, re.compile(value) if operator.endswith("~") else value))
                if self.peek() == ",":
                    self.take()
            self.take("}")
        window_s = None
        if self.at < len(self.tokens) and self.tokens[self.at][0] == "range":
            window_s = seconds(self.take())
        ago_s = 0.0
        if self.peek() == "offset":
            self.take()
            ago_s = seconds(self.take())
        names, others = [one for one in tests if one[0] == "__name__"], [one for one in tests if one[0] != "__name__"]
        exact = next((value for _, operator, value in names if operator == "="), None)
        alike = functools.lru_cache(lambda name: all(matches(name, *test[1:]) for test in names))

        def chooses(series: Series) -> bool:
            answer = series.answers.get(select)
            if answer is None:
                answer = all(matches(series.labels.get(label, ""), *test) for label, *test in others)
                series.answers[select] = answer
            return answer

        def select(store: Store, at_s: float) -> Any:
            at_s -= ago_s
            groups = [store.get(exact, {})] if exact is not None else [store[name] for name in store if alike(name)]
            found = [series for group in groups for series in group.values() if chooses(series)]
            if window_s is not None:
                return [(one.key, *one.within(at_s - window_s, at_s), window_s) for one in found]
            samples = []
            for one in found:
                times, values = one.within(at_s - LOOKBACK_S, at_s)
                if times and one.ended_s > at_s:
                    samples.append(Sample(one.key, values[-1], times[-1]))
            return samples

        return select


def remembered(text: str, node: Node) -> Node:
    """The parts of a query, and of all queries of a tick, have much in common."""

    def ask(store: Store, at_s: float) -> Any:
        found = store.memory.get((text, at_s))
        if found is None:
            found = store.memory[text, at_s] = node(store, at_s)
        return found

    return ask


def matches(text: str, operator: str, value: Any) -> bool:
    if operator.endswith("~"):
        return (value.fullmatch(text) is not None) == (operator == "=~")
    return (text == value) == (operator == "=")


def set_or(left: Node, keep: Callable[[str], bool], right: Node) -> Node:
    def both(store: Store, at_s: float) -> Vector:
        first = left(store, at_s)
        there = {plain(one.labels, keep) for one in first}
        return [*first, *(one for one in right(store, at_s) if plain(one.labels, keep) not in there)]

    return both


def set_and(common: bool, left: Node, keep: Callable[[str], bool], right: Node) -> Node:
    def part(store: Store, at_s: float) -> Vector:
        there = {plain(one.labels, keep) for one in right(store, at_s)}
        return [one for one in left(store, at_s) if (plain(one.labels, keep) in there) == common]

    return part


def compute(operator: str, a: float, b: float) -> float | bool:
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case "/":
            return a / b if b else math.nan if not a else math.copysign(math.inf, a)
        case "%":
            return math.fmod(a, b) if b else math.nan
        case "^":
            return float(a**b)
        case "==":
            return a == b
        case "!=":
            return a != b
        case ">":
            return a > b
        case "<":
            return a < b
        case ">=":
            return a >= b
    return a <= b


def binary(operator: str, as_bool: bool, left: Node, keep: Callable[[str], bool], right: Node) -> Node:
    compares = operator in Parser.LEVELS[0]

    def one(labels: Labels, a: float, b: float, kept: float, at_s: float) -> list[Sample]:
        value = compute(operator, a, b)
        if compares and not as_bool:
            return [Sample(labels, kept, at_s)] if value else []
        return [Sample(plain(labels), float(value), at_s)]

    def both(store: Store, at_s: float) -> Any:
        a, b = left(store, at_s), right(store, at_s)
        if isinstance(a, float) and isinstance(b, float):
            return float(compute(operator, a, b))
        if isinstance(b, float):
            return [made for x in a for made in one(x.labels, x.value, b, x.value, at_s)]
        if isinstance(a, float):
            return [made for y in b for made in one(y.labels, a, y.value, y.value, at_s)]
        others = {plain(y.labels, keep): y for y in b}
        return [
            made
            for x in a
            if (y := others.get(plain(x.labels, keep))) is not None
            for made in one(x.labels, x.value, y.value, x.value, at_s)
        ]

    return both


def rate_of(times: list[float], values: list[float], window_s: float, at_s: float) -> float | None:
    """Prometheus's extrapolated rate per second."""
    if len(times) < 2:
        return None
    grown = values[-1] - values[0] + sum(a for a, b in itertools.pairwise(values) if b < a)
    sampled_s = times[-1] - times[0]
    mean_s = sampled_s / (len(times) - 1)
    to_start_s, to_end_s = times[0] - (at_s - window_s), at_s - times[-1]
    if grown > 0 and values[0] >= 0:
        to_start_s = min(to_start_s, sampled_s * values[0] / grown)
    reach_s = sampled_s
    for gap_s in (to_start_s, to_end_s):
        reach_s += gap_s if gap_s < 1.1 * mean_s else mean_s / 2
    return float(grown * reach_s / sampled_s / window_s)


OVER_TIME: Mapping[str, Callable[[list[float]], float]] = {
    "last": lambda values: values[-1],
    "max": max,
    "min": min,
    "sum": sum,
    "count": lambda values: float(len(values)),
    "avg": lambda values: sum(values) / len(values),
}


def call(name: str, arguments: list[Node]) -> Node:
    if name in ("rate", "increase"):

        def rates(store: Store, at_s: float) -> Vector:
            found = []
            for labels, times, values, window_s in arguments[0](store, at_s):
                value = rate_of(times, values, window_s, at_s)
                if value is not None:
                    by = window_s if name == "increase" else 1.0
                    found.append(Sample(plain(labels), value * by, at_s))
            return found

        return rates
    if name.endswith("_over_time") and name.removesuffix("_over_time") in OVER_TIME:
        reduce, keeps = OVER_TIME[name.removesuffix("_over_time")], name == "last_over_time"

        def reduced(store: Store, at_s: float) -> Vector:
            return [
                Sample(labels if keeps else plain(labels), reduce(values), at_s)
                for labels, times, values, _ in arguments[0](store, at_s)
                if values
            ]

        return reduced
    if name in ("histogram_count", "histogram_sum", "histogram_fraction", "histogram_quantile"):
        return lambda store, at_s: []  # no series is a native histogram
    if name == "timestamp":
        return lambda store, at_s: [Sample(plain(one.labels), one.time_s, at_s) for one in arguments[0](store, at_s)]
    if name == "time":
        return lambda store, at_s: at_s
    if name in ("clamp_min", "clamp_max"):
        bound = max if name == "clamp_min" else min
        return lambda store, at_s: [
            Sample(one.labels, bound(one.value, arguments[1](store, at_s)), at_s) for one in arguments[0](store, at_s)
        ]
    if name == "absent":
        return lambda store, at_s: [] if arguments[0](store, at_s) else [Sample((), 1.0, at_s)]
    if name == "vector":
        return lambda store, at_s: [Sample((), arguments[0](store, at_s), at_s)]
    if name == "label_replace":

        def replaced(store: Store, at_s: float) -> Vector:
            vector, new, text, source, pattern = (one(store, at_s) for one in arguments)
            found = []
            for one in vector:
                match = re.fullmatch(pattern.replace("\\\\", "\\"), dict(one.labels).get(source, ""))
                labels = dict(one.labels)
                if match is not None:
                    labels[new] = match.expand(re.sub(r"\$(\d+)", r"\\\1", text))
                found.append(Sample(tuple(sorted(labels.items())), one.value, one.time_s))
            return found

        return replaced
    raise UnknownPromQLError(f"the function {name} is not known here")
