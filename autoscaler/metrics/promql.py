"""PromQL: one query for one signal of all services, counted by target.

Every candidate is looked up with ``or`` inside the aggregation, series by series, the current name first: in the
middle of a rollout some replicas speak the old name and some the new, and all of them count, each once.

Ranks of a target are combined first, scrape by scrape. Of several scrapes of one target, under the names of two jobs or
by two Prometheus servers, the largest number is taken: a replica counts once, however often it is scraped.
This module must not know what a signal is good for, nor how queries are sent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from autoscaler.metrics.presets import SIGNALS, Combine

_SPELLING = re.compile(r"^(ray_)?(vllm|sglang)[:_]")
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_SPECIAL, _ESCAPED = re.compile(r"[\\.+*?()|\[\]{}^$]"), r"\\\g<0>"
"""In a regular expression of PromQL, which is one of the whole value."""
NATIVE = "native_histogram"
"""The label that has the name of a native histogram, in the rows that say which there are."""
_HISTOGRAM_PART = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True)
class Grouping:
    """Which labels say what.

    Attributes:
        services: what an answer is grouped by: the label of the service, and of the pool.
        target: the label that names a target; empty where targets do not matter.
        scrapers: labels that say who scraped a target.
        copies: labels of ranks that report the same as each other.
        only: a matcher, as PromQL, of the series that can be of the services; any when empty. What somebody else
            exposes under a metric's name is not even looked at.
    """

    services: tuple[str, ...]
    target: str = ""
    scrapers: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    only: str = ""


class Most(NamedTuple):
    """That a target counts no more of one thing than of another."""

    signal: str
    """The other one."""
    candidates: Sequence[str]
    """Its metric names, the preferred one first."""
    factor: float
    """So many times as much is still possible."""
    window_s: float
    """Over which it is judged: what is counted earlier of a request than the other is in it just so."""


def duration(seconds: float) -> str:
    """A PromQL duration, exact to a millisecond."""
    milliseconds = round(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def edge_pattern(edges: Iterable[float]) -> str:
    """A regular expression for ``le`` that finds bucket edges in either spelling of whole numbers (1 and 1.0)."""
    spellings: dict[str, None] = {}
    for edge in edges:
        text = f"{edge:g}"
        spellings[text] = None
        if float(edge).is_integer():
            spellings[f"{edge:.1f}"] = None
    return "|".join([*(re.escape(text) for text in spellings), r"\+Inf"])


def selector(candidate: str, matchers: Mapping[str, str], *more: str) -> str:
    """One metric with label matchers.

    Args:
        candidate: its name, which may carry matchers of its own in braces; after a tilde, a regular expression.
        matchers: label values that the series must have.
        more: matchers as PromQL; empty ones say nothing.
    """
    name, _, own = candidate.partition("{")
    by_name = f'__name__=~"{quoted(name[1:])}"' if name.startswith("~") else f'__name__="{quoted(name)}"'
    parts = [by_name, *([own.removesuffix("}")] if own else [])]
    parts += [f'{_label(label)}="{quoted(value)}"' for label, value in matchers.items()]
    return "{" + ",".join([*parts, *(one for one in more if one)]) + "}"


def one_of(label: str, values: Iterable[str]) -> str:
    """The matcher of series whose label has one of the values."""
    return f'{_label(label)}=~"{quoted("|".join(_SPECIAL.sub(_ESCAPED, value) for value in values))}"'


def quoted(text: str) -> str:
    """Text as it is written inside of double quotes."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(
    signal: str,
    candidates: Sequence[str],
    grouping: Grouping,
    matchers: Mapping[str, str],
    window_s: float,
    edges: Iterable[float] = (),
    highest: float = math.inf,
    most: Most | None = None,
) -> str:
    """The query for one signal of all services.

    With a highest value, a target that reports another one than 0 to that is left out, and answered by itself: its row
    has its label, and of a histogram all its events. So is one that reports more than of another signal.

    Args:
        signal: its name in `SIGNALS`.
        candidates: metric names, the preferred one first.
        grouping: which labels say what.
        matchers: label values that every series must have.
        window_s: window of rates, seconds.
        edges: for buckets, the edges to fetch; all of them when empty.
        highest: what a target can report at most, in the signal's unit.
        most: of which other signal it reports no more.
    """
    kind = SIGNALS[signal].series
    le = f'le=~"{quoted(edge_pattern(edges))}"' if kind == "bucket_rate" and tuple(edges) else ""
    # What is left out is told by rates alone: that of a counter without its birth is a third as long to ask for.
    totals = [selector(one, matchers, 'le="+Inf"' * (kind == "bucket_rate"), grouping.only) for one in candidates]
    counts = kind in ("rate", "bucket_rate")
    judged = _rates(totals, window_s) if counts else _over_window(kind, totals, window_s)
    if kind != "bucket_rate":
        more: tuple[str, ...] = ()
        series = _counted(totals, (), window_s) if counts else judged
    else:
        # Whether a histogram is there, and stays, is told by one bucket of it: there are dozens.
        apart = _apart(candidates)
        groups = [[selector(one, matchers, le, grouping.only) for one in group] for group in apart]
        wholes = [[selector(one, matchers, 'le="+Inf"', grouping.only) for one in group] for group in apart]
        parts = [_counted(*both, window_s) for both in zip(groups, wholes, strict=True)]
        there = [_over_window("last", whole, window_s) for whole in wholes]
        more = ("le",)
        series = _first_of(parts, there, "ignoring (le) ")
    targets, judged = _by_target(signal, series, grouping, more), _by_target(signal, judged, grouping)
    if most is None:
        return _combined(signal, targets, judged, grouping, highest, more)
    others = [selector(one, matchers, grouping.only) for one in most.candidates]
    own = _by_target(signal, _rates(totals, most.window_s), grouping)
    other = _by_target(most.signal, _rates(others, most.window_s), grouping)
    too_many = f"{own} > {most.factor:g} * {other}"
    return f"{_combined(signal, f'({targets} unless {too_many})', judged, grouping, highest, more)} or ({too_many})"


def render_native(
    signal: str,
    candidates: Sequence[str],
    grouping: Grouping,
    matchers: Mapping[str, str],
    window_s: float,
    highest: float = math.inf,
) -> str:
    """The same for a part of a histogram, of the targets of which the server has stored it as a native one alone.

    Args:
        signal: its name in `SIGNALS`.
        candidates: the names of its classic series, which end in ``_bucket``, ``_sum`` or ``_count``.
        grouping: which labels say what.
        matchers: label values that every series must have.
        window_s: window of rates, seconds.
        highest: what a target can report at most; a whole histogram is of no sign.
    """
    buckets = SIGNALS[signal].series == "bucket_rate"
    groups = [[selector(whole_name(one), matchers, grouping.only) for one in group] for group in _apart(candidates)]
    parts = [_rates(group, window_s) for group in groups]
    if buckets:
        # Whole histograms have no largest one; the mean of equal ones is any of them.
        by_target = _by_target(signal, _first_of(parts, parts), grouping, scrapes="avg")
    else:
        part = "histogram_sum" if candidates[0].endswith("_sum") else "histogram_count"
        by_target = _by_target(signal, f"{part}({' or '.join(parts)})", grouping)
    if grouping.target:  # one that has classic series, too, is read by those
        classic = [selector(one, matchers, 'le="+Inf"' * buckets, grouping.only) for one in candidates]
        labels = _labels((*grouping.services, grouping.target))
        by_target = f"({by_target} unless group by ({labels}) ({_over_window('last', classic, window_s)}))"
    return _combined(signal, by_target, "" if buckets else by_target, grouping, math.inf if buckets else highest)


def render_targets(
    candidates: Sequence[str], grouping: Grouping, matchers: Mapping[str, str], window_s: float
) -> tuple[str, str]:
    """What is scraped: samples in the window by each scraper of each target; and when a target's newest one was taken.

    The time is in seconds since the epoch. That of an answer would be the time of the question.
    """
    series = [selector(one, matchers, grouping.only) for one in candidates]
    by_target = dict.fromkeys((*grouping.services, grouping.target))
    seen = " or ".join(f"count_over_time({one}[{duration(window_s)}])" for one in series)
    taken = " or ".join(f"timestamp({one})" for one in series)
    return (
        f"max by ({_labels((*by_target, *grouping.scrapers))}) ({seen})",
        f"max by ({_labels((grouping.services[0], grouping.target))}) ({taken})",
    )


def render_services(candidates: Sequence[str], label: str, matchers: Mapping[str, str], window_s: float) -> str:
    """Which values the label of the service has, also those that are no service's."""
    window = duration(window_s)
    there = " or ".join(f"last_over_time({selector(one, matchers)}[{window}])" for one in candidates)
    return f"group by ({_label(label)}) ({there})"


def render_native_names(
    candidates: Iterable[str], grouping: Grouping, matchers: Mapping[str, str], window_s: float
) -> str:
    """The names of histograms that are stored as native ones, by service, under a label of their own.

    Those of a classic one have an ending.

    Args:
        candidates: the names of classic series.
        grouping: which labels say what.
        matchers: label values that every series must have.
        window_s: window, seconds.
    """
    names = "|".join(re.escape(one) for one in dict.fromkeys(whole_name(one) for one in candidates))
    series = selector(f"~{names}", matchers, 'quantile=""', grouping.only)
    # Set operators do not tell metrics apart by their names, only by their labels.
    named = f'label_replace(last_over_time({series}[{duration(window_s)}]), "{NATIVE}", "$1", "__name__", "(.+)")'
    return f"group by ({_labels((NATIVE, *grouping.services))}) ({named})"


def render_any(candidates: Iterable[str]) -> str:
    """Whether there is any series of these classic histograms, whoever's it is."""
    names = "|".join(re.escape(one) for one in dict.fromkeys(candidates))
    series = selector(f"~{names}", {"le": "+Inf"})
    return f"group({series})"


def is_histogram_part(candidate: str) -> bool:
    """Whether this is a series of a classic histogram."""
    return bool(_HISTOGRAM_PART.search(candidate))


def whole_name(candidate: str) -> str:
    """The name of the histogram that a series is a part of."""
    return _HISTOGRAM_PART.sub("", candidate)


def _over_window(kind: str, series: Sequence[str], window_s: float) -> str:
    """Gauges over the window, those of the first name that a target has."""
    over = "avg_over_time" if kind == "average" else "last_over_time"
    # The last sample of the window: one scrape that failed makes no replica vanish.
    return " or ".join(f"{over}({one}[{duration(window_s)}])" for one in series)


def _counted(series: Sequence[str], wholes: Sequence[str], window_s: float) -> str:
    """Counters over the window, those of the first name that a target has.

    A counter that was not there when the window began, in a scrape that went well, has counted from 0 since: all of it
    belongs to the window, and a rate would leave its first sample out. Where the target is new, or was not answering,
    nobody knows when it began to count. Nor where one of its series is not in its newest scrape any more, though it may
    be there for two scrapes: what looks new may be that one under other labels, with all that it has ever counted.

    Args:
        series: the counters, or the buckets of histograms.
        wholes: the last bucket of each histogram, which tells of all of them; none for counters.
        window_s: window, seconds.
    """
    told, window = wholes or series, duration(window_s)
    before = " or ".join(f"{one} offset {window}" for one in told)
    there = f"up offset {window} == 1 and up"
    scraped = "max by (job, instance) (timestamp(up))"
    kept = " or ".join(f"timestamp({one}) >= on (job, instance) group_left () {scraped}" for one in told)
    born = f"(({_over_window('last', told, window_s)}) unless ({before})) and on (job, instance) ({there})"
    born += f" unless on (job, instance) (({before}) unless ({kept}))"
    if wholes:
        born = f"({_over_window('last', series, window_s)}) and ignoring (le) ({born})"
    return f"({born}) / {window_s:g} or {_rates(series, window_s)}"


def _rates(series: Sequence[str], window_s: float) -> str:
    return " or ".join(f"rate({one}[{duration(window_s)}])" for one in series)


def _by_target(signal: str, series: str, grouping: Grouping, more: Sequence[str] = (), scrapes: Combine = "max") -> str:
    """Series to ranks to scrapes to targets."""
    if grouping.copies:
        series = f"{scrapes} without ({_labels(grouping.copies)}) ({series})"
    if grouping.target:
        by_target = (*grouping.services, grouping.target, *more)
        series = f"{SIGNALS[signal].ranks} by ({_labels((*by_target, *grouping.scrapers))}) ({series})"
        series = f"{scrapes} by ({_labels(by_target)}) ({series})"
    return series


def _combined(
    signal: str,
    targets: str,
    judged: str,
    grouping: Grouping,
    highest: float = math.inf,
    more: Sequence[str] = (),
) -> str:
    """Targets to services; `judged` is that by which it is told which of them are left out."""
    combined = f"{SIGNALS[signal].targets} by ({_labels((*grouping.services, *more))})"
    if not grouping.target or highest == math.inf:
        return f"{combined} ({targets})"
    # A comparison keeps what it is true of, and nothing is true of NaN.
    within = f">= 0 <= {highest:g}"
    return f"{combined} ({targets} {within}) or ({judged} unless {judged} {within})"


def _apart(candidates: Sequence[str]) -> list[list[str]]:
    """Candidates by histogram, of which a target is read for one only, the first that it has.

    Bucket by bucket, `or` would fill a histogram up with another one's buckets where their edges differ.
    """
    stems: dict[str, list[str]] = {}
    for candidate in candidates:
        stems.setdefault(_SPELLING.sub("", candidate), []).append(candidate)
    return list(stems.values())


def _first_of(parts: Sequence[str], there: Sequence[str], matching: str = "") -> str:
    """The first of several metrics that a target has; `there` has the series of each part, whatever their values."""
    if len(parts) == 1:
        return parts[0]
    found = [f"({parts[0]})"]
    for place, part in enumerate(parts[1:], start=1):
        found.append(f"(({part}) unless {matching}({' or '.join(there[:place])}))")
    return " or ".join(found)


def _labels(names: Iterable[str]) -> str:
    return ", ".join(_label(name) for name in dict.fromkeys(names))


def _label(name: str) -> str:
    """A label's name; one that is not ASCII letters, digits and underscores needs a Prometheus from 3.0 on."""
    return name if _LABEL.fullmatch(name) else json.dumps(name, ensure_ascii=False)
