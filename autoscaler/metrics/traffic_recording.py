"""What a service's own traffic was: arrivals and lengths, from Prometheus or from a gateway's access log.

Arrivals are counter increments between two scrapes, so they are exact in number and as fine as the scrapes in time.
Lengths are histograms of finished requests over blocks of minutes.
This module must not know what a trace is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.metrics import promql
from autoscaler.metrics.client import PrometheusClient, PrometheusConfig, label_values
from autoscaler.metrics.latency_histograms import Buckets, read_buckets
from autoscaler.metrics.queries import Kind, candidates_by_signal, grouping_of
from policies.contract import Floats
from policies.engine import ConfigError

BLOCK_S = 300.0
"""Length histograms are read over this time, seconds."""
SUMMED_AS = "ttft_bucket"
"""The signal whose way over ranks and targets length histograms go too."""
LENGTHS = ("prompt_sum", "output_sum")
"""Signals that name the length histograms."""
HAPROXY_LINE = re.compile(
    r"\[(?P<time>\d{2}/\w{3}/\d{4}:\d{2}:\d{2}:\d{2}\.\d{3})\] \S+ (?P<backend>[^/ ]+)/(?P<server>\S+) "
    r"-?\d+/-?\d+/-?\d+/-?\d+/\+?-?\d+ (?P<status>-?\d+) "
)
"""HAProxy's ``option httplog``: accept time, backend, server, timers, status."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """When requests came.

    Attributes:
        from_s: (k,) start of each span, Unix seconds; equal to `until_s` where the moment is known.
        until_s: (k,) its end.
        count: (k,) requests in it, at least 1.
    """

    from_s: Floats
    until_s: Floats
    count: Floats

    @property
    def resolution_s(self) -> float:
        """Mean length of a span, seconds, weighted by its requests; 0 where every moment is known."""
        total = self.count.sum()
        return float(((self.until_s - self.from_s) * self.count).sum() / total) if total else 0.0


@dataclass(frozen=True, eq=False)
class Lengths:
    """How long requests were, block by block.

    Attributes:
        until_s: (b,) end of each block, Unix seconds.
        edges: (e,) upper edges, tokens, ascending; the last may be infinite.
        counts: (b, e) requests per bucket.
    """

    until_s: Floats
    edges: Floats
    counts: Floats


@dataclass(frozen=True, eq=False)
class Recording:
    """One service's traffic and what could not be known of it.

    Attributes:
        start_s: start of the recording, Unix seconds.
        duration_s: its length, seconds.
        arrivals: when requests came.
        prompt: prompt tokens.
        output: output tokens.
        lost: sentences on the resolution that was lost.
    """

    start_s: float
    duration_s: float
    arrivals: Arrivals
    prompt: Lengths
    output: Lengths
    lost: tuple[str, ...]


def record(
    config: PrometheusConfig, service: str, start_s: float, end_s: float, access_log: Path | None = None
) -> Recording:
    """Read one service's traffic.

    Args:
        config: where the metrics are and what they are called.
        service: its name in the live configuration.
        start_s: start, Unix seconds.
        end_s: end, Unix seconds.
        access_log: HAProxy's log; arrivals are then exact to a millisecond, and lengths still come from Prometheus.

    Raises:
        ConfigError: when there was no request, or no length histogram is known for the engines or has anything in it.
        PrometheusQueryError: when Prometheus does not answer.
    """
    names = candidates_by_signal(config)
    sums = [[one for one in names.get(signal, ((), ""))[0] if one.endswith("_sum")] for signal in LENGTHS]
    if not all(sums):
        raise ConfigError(f"engines {', '.join(config.engines)}: no length histograms are known for them")
    client = PrometheusClient(config)
    client.log_in()
    lost = []
    try:
        if access_log is not None:
            backends = label_values(config.gateway_names, service)
            arrivals = read_haproxy_log(access_log, backends, start_s, end_s)
        else:
            arrivals, said = _counted(client, config, service, start_s, end_s)
            lost.append(said)
        prompt, output = (_lengths(client, config, service, found, start_s, end_s) for found in sums)
    finally:
        client.close()
    between = f"between {_shown(start_s)} and {_shown(end_s)}"
    if not arrivals.count.sum():
        raise ConfigError(f"service {service!r}: no request {between}")
    for lengths, found in ((prompt, sums[0]), (output, sums[1])):
        if not lengths.counts.sum():
            what = promql.whole_name(found[0])
            raise ConfigError(f"service {service!r}: no finished request in the histogram {what} {between}")
    lost += [
        f"arrivals are known to {arrivals.resolution_s:.3g} s and spread evenly within that"
        if arrivals.resolution_s
        else "arrivals are known to a millisecond",
        f"lengths are known by histogram bucket and by {BLOCK_S:g} s, and spread within a bucket",
        "which prompt went with which output is not known: they are drawn apart from each other",
        "sessions, tenants and prefix hits of single requests are not known",
    ]
    return Recording(start_s, end_s - start_s, arrivals, prompt, output, tuple(lost))


def read_haproxy_log(file: Path, backends: Sequence[str], start_s: float, end_s: float) -> Arrivals:
    """Arrivals of a service's backends from lines of ``option httplog``, whatever a log daemon put in front of them.

    HAProxy writes local time; it is taken as UTC unless the line begins with another offset.

    Raises:
        ConfigError: when no line of the file can be read.
    """
    times, lines, read = [], 0, 0
    try:
        with file.open(encoding="utf-8", errors="replace") as log:
            for line in log:
                lines += 1
                found = HAPROXY_LINE.search(line)
                if found is None:
                    continue
                read += 1
                if found["backend"] in backends and not found["server"].startswith("<NOSRV>"):
                    at_s = datetime.strptime(found["time"], "%d/%b/%Y:%H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
                    if start_s <= at_s < end_s:
                        times.append(at_s)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror or error}") from None
    if lines and not read:
        raise ConfigError(f"{file}: none of its {lines} lines is in the format of HAProxy's `option httplog`")
    moments = np.sort(np.array(times))
    return Arrivals(moments, moments, np.ones(len(moments)))


def increments(samples: Iterable[Sequence[Any]], start_s: float, end_s: float) -> list[tuple[float, float, float]]:
    """(from, until, count) between the samples of one counter; after a reset the counter's value is the count."""
    found, before = [], None
    for at, text in samples:
        at_s, value = float(at), float(text)
        if before is not None and start_s < at_s <= end_s:
            grown = value - before[1] if value >= before[1] else value
            if grown > 0:
                found.append((before[0], at_s, grown))
        before = (at_s, value)
    return found


def _counted(
    client: PrometheusClient, config: PrometheusConfig, service: str, start_s: float, end_s: float
) -> tuple[Arrivals, str]:
    """Arrivals from a counter's raw samples, all series of the service together."""
    names = candidates_by_signal(config)
    candidates: Sequence[str]
    kind: Kind
    if "arrival" in names:
        candidates, kind = names["arrival"]
        said = "arrivals are those at the gateway"
    elif "ttft_bucket" in names:
        candidates, kind = [f"{promql.whole_name(one)}_count" for one in names["ttft_bucket"][0]], "engine"
        said = "arrivals are the times of first tokens: the engines' queues have smoothed bursts"
    else:
        raise ConfigError(f"engines {', '.join(config.engines)}: they count no arrivals; set metrics.gateway")
    group = grouping_of(config, kind, "arrival", [service])
    # Who scraped does not matter, nor which of several ranks that work together: that is one counter.
    same = {*config.scraper_labels, *group.copies}
    found: list[tuple[float, float, float]] = []
    for candidate in candidates:
        series: dict[str, list[Sequence[Any]]] = {}
        for until_s in np.arange(start_s + BLOCK_S, end_s + BLOCK_S, BLOCK_S):
            until_s = min(float(until_s), end_s)
            # One block at a time keeps answers small; what came before the very first sample is not counted.
            text = f"{promql.selector(candidate, config.matchers, group.only)}[{promql.duration(BLOCK_S)}]"
            for row in client.ask(text, at_s=until_s, window=True):
                labels = {name: row["metric"][name] for name in row["metric"] if name not in same}
                known = series.setdefault(str(sorted(labels.items())), [])
                last = float(known[-1][0]) if known else -np.inf
                known += [sample for sample in row["values"] if float(sample[0]) > last]
        found = [one for samples in series.values() for one in increments(samples, start_s, end_s)]
        if found:
            break
    spans = np.array(sorted(found)).reshape(-1, 3)
    return Arrivals(np.maximum(spans[:, 0], start_s), spans[:, 1], spans[:, 2]), said


def _lengths(
    client: PrometheusClient, config: PrometheusConfig, service: str, sums: Sequence[str], start_s: float, end_s: float
) -> Lengths:
    """Histograms block by block, by the names of their sums; a block without a finished request is empty."""
    group = grouping_of(config, "engine", SUMMED_AS, [service])
    names = [f"{promql.whole_name(one)}_bucket" for one in sums]
    row_of = dict.fromkeys(label_values(config.names, service), 0)
    ends: list[float] = []
    blocks: list[Buckets] = []
    until_s = start_s
    while until_s < end_s:
        span_s = min(BLOCK_S, end_s - until_s)
        until_s += span_s
        rows = [
            row
            for render in (
                promql.render,
                promql.render_native,
            )  # of some targets, or at some time, stored as native ones
            for row in client.ask(render(SUMMED_AS, names, group, config.matchers, span_s), at_s=until_s)
        ]
        found = read_buckets(rows, config.service_label, row_of, 1, np.zeros(0))
        ends.append(until_s)
        blocks.append(found._replace(cumulative=found.cumulative * span_s, total=found.total * span_s))
    edges = np.array(sorted({edge for block in blocks for edge in block.edges.tolist()}))
    counts = [np.diff(_cumulative(block, edges), prepend=0.0) for block in blocks]
    return Lengths(np.array(ends), np.append(edges, np.inf), np.maximum(np.array(counts), 0.0))


def _cumulative(block: Buckets, edges: Floats) -> Floats:
    """(e + 1,) requests up to each of the edges and all of them, linear between the block's own edges."""
    upto = np.interp(edges, np.append(0.0, block.edges), np.append(0.0, block.cumulative[0]))
    found: Floats = np.nan_to_num(np.append(upto, block.total[0]))
    return found


def _shown(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
