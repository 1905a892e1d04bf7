"""Latency histograms of all services: the share within an objective, and counts by latency.

This module must not know which engine measured them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from policies.contract import Bools, Floats


class Buckets(NamedTuple):
    """Cumulative histograms of `n` services over common edges.

    Attributes:
        edges: (e,) finite upper edges, ascending.
        cumulative: (n, e) events per second up to each; between a service's own edges linear.
        own: (n, e) True where the edge is one of the service's own.
        total: (n,) all events per second; NaN where there is no histogram.
    """

    edges: Floats
    cumulative: Floats
    own: Bools
    total: Floats


def read_buckets(
    rows: Sequence[Mapping[str, Any]], label: str, row_of: Mapping[str, int], n: int, at_s: Floats
) -> Buckets:
    """Sort the rows of a query by service and edge.

    A service with an edge that is no number has no histogram.

    Args:
        rows: Prometheus's answer: a row for each service and ``le``, or a native histogram for each service.
        label: the label that names the service.
        row_of: place of a service by that label's value.
        n: services.
        at_s: edges to have besides those that are found: a native histogram names no bucket that is empty.
    """
    classic = [sample for sample in rows if "le" in sample["metric"]]
    native = [sample["histogram"][1] for sample in rows if "histogram" in sample]
    # 1 and 1.0 are one edge: texts are read as numbers, each text once.
    edge_of = {text: float(text) for text in {sample["metric"]["le"] for sample in classic}}
    native_edges = {float(text) for one in native for part in one.get("buckets", ()) for text in part[1:3]}
    named = {*edge_of.values(), *native_edges, *at_s.tolist()} if rows else set()
    edges = np.array(sorted(edge for edge in named if 0 < edge < np.inf))
    columns = {text: int(np.searchsorted(edges, edge)) for text, edge in edge_of.items() if edge > 0}
    forms = np.full((2, n, len(edges) + 1), np.nan)  # classic rows, native ones; the last column is that of +Inf
    odd = np.zeros(n, bool)

    def add(form: int, row: int, column: int | slice, value: Any) -> None:
        before = forms[form, row, column]
        forms[form, row, column] = np.where(np.isnan(before), value, before + value)

    for sample in classic:
        row, column = row_of.get(sample["metric"].get(label, "")), columns.get(sample["metric"]["le"])
        if row is not None and column is not None:
            add(0, row, column, float(sample["value"][1]))
        if row is not None and sample["metric"]["le"] == "NaN":
            odd[row] = True
    for sample in rows:
        row = row_of.get(sample["metric"].get(label, ""))
        if row is not None and "histogram" in sample:
            add(1, row, slice(None), _cumulative(sample["histogram"][1], edges))
    # Where some targets of a service have one form and some the other, only an edge of both is one of the service's.
    mixed = (~np.isnan(forms)).any(axis=2).all(axis=0)
    found = np.where(mixed[:, np.newaxis], forms.sum(axis=0), np.fmax(*forms))
    found[~np.isfinite(found)] = np.nan
    found[odd] = np.nan
    cumulative, own = found[:, :-1], ~np.isnan(found[:, :-1])
    for part in np.flatnonzero(own.any(axis=1) & ~own.all(axis=1)):
        cumulative[part] = np.interp(edges, edges[own[part]], cumulative[part, own[part]], left=0.0)
    return Buckets(edges, cumulative, own, found[:, -1])


def _cumulative(histogram: Mapping[str, Any], edges: Floats) -> Floats:
    """(e + 1,) events up to each edge and all events of a native histogram; NaN at an edge inside of a bucket."""
    counts = np.append(np.zeros(len(edges)), float(histogram["count"]))
    for _, left, right, count in histogram.get("buckets", ()):
        counts[:-1] += np.where(edges >= float(right), float(count), np.where(edges > float(left), np.nan, 0.0))
    return counts


def share_within(buckets: Buckets, slo_s: Floats, wait_s: Floats) -> tuple[Floats, Bools]:
    """(n,) share of events within the objective, and (n,) True where it cannot be told: it is no bucket edge.

    Exact where nothing waits in front. A wait moves the objective into a bucket, which is linear inside: a wait of
    milliseconds costs its share of the bucket and not all of it.

    Args:
        buckets: the histograms.
        slo_s: (n,) objectives.
        wait_s: (n,) what is spent before the histogram's clock starts; NaN makes the share unknown.
    """
    edges, cumulative, own, total = buckets
    n, some = len(total), total > 0
    if not len(edges):
        return np.full(n, np.nan), np.zeros(n, bool)
    place = np.abs(edges[np.newaxis, :] - slo_s[:, np.newaxis]).argmin(axis=1)
    rows = np.arange(n)
    is_edge = (np.abs(edges[place] - slo_s) <= 1e-6 * slo_s) & own[rows, place]
    moved = _reached(buckets, (slo_s - wait_s)[:, np.newaxis])[:, 0]
    within = np.where(wait_s > 0, moved, cumulative[rows, place])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(some & is_edge & ~np.isnan(wait_s), np.clip(within / total, 0.0, 1.0), np.nan)
    return share, some & ~is_edge


def counts_by_latency(buckets: Buckets, edges_s: Sequence[float], wait_s: Floats) -> Floats:
    """(n, m + 1) events per second per bin of the edges (m,), linear inside a bucket, later by the wait (n,).

    What is above the largest finite edge of the source is in the last bin.
    """
    n = len(buckets.total)
    if not len(buckets.edges):
        return np.full((n, len(edges_s) + 1), np.nan)
    reached = _reached(buckets, np.asarray(edges_s)[np.newaxis, :] - wait_s[:, np.newaxis])
    ends = np.concatenate([np.zeros((n, 1)), reached, buckets.total[:, np.newaxis]], axis=1)
    return np.maximum(np.diff(ends, axis=1), 0.0)


def mean_at_least(buckets: Buckets) -> Floats:
    """(n,) mean latency, seconds, if every event took no longer than the lower edge of its bucket; NaN when unknown."""
    edges, cumulative, _, total = buckets
    if not len(edges):
        return np.full(len(total), np.nan)
    later = np.maximum(total[:, np.newaxis] - cumulative, 0.0)  # than each edge
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_s: Floats = np.where(total > 0, later @ np.diff(edges, prepend=0.0) / total, np.nan)
    return mean_s


def _reached(buckets: Buckets, at_s: Floats) -> Floats:
    """(n, m) events per second up to the given latencies (n, m), linear inside a bucket; NaN at a latency of NaN."""
    edges, cumulative, _, total = buckets
    n = len(total)
    lower = np.concatenate([[0.0], edges])
    counts = np.concatenate([np.zeros((n, 1)), cumulative], axis=1)
    place = np.clip(np.searchsorted(lower, at_s, "right") - 1, 0, len(edges) - 1)
    inside = np.clip((at_s - lower[place]) / (lower[place + 1] - lower[place]), 0.0, 1.0)
    rows = np.arange(n)[:, np.newaxis]
    reached: Floats = counts[rows, place] + inside * (counts[rows, place + 1] - counts[rows, place])
    return reached
