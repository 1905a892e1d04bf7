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


def read_buckets(rows: Sequence[Mapping[str, Any]], label: str, row_of: Mapping[str, int], n: int) -> Buckets:
    """Sort the rows of a query by service and edge.

    Args:
        rows: Prometheus's answer, grouped by `label` and ``le``.
        label: the label that names the service.
        row_of: place of a service by that label's value.
        n: services.
    """
    # 1 and 1.0 are one edge: texts are read as numbers, each text once.
    edge_of = {text: float(text) for text in {sample["metric"].get("le", "nan") for sample in rows}}
    edges = np.array(sorted({edge for edge in edge_of.values() if np.isfinite(edge)}))
    columns = {text: int(np.searchsorted(edges, edge)) for text, edge in edge_of.items() if not np.isnan(edge)}
    found = np.full((n, len(edges) + 1), np.nan)  # the last column is that of +Inf
    for sample in rows:
        metric = sample["metric"]
        row, column = row_of.get(metric.get(label, "")), columns.get(metric.get("le", "nan"))
        if row is not None and column is not None:
            value, before = float(sample["value"][1]), found[row, column]
            found[row, column] = value if before != before else before + value
    found[~np.isfinite(found)] = np.nan
    cumulative, own = found[:, :-1], ~np.isnan(found[:, :-1])
    for part in np.flatnonzero(own.any(axis=1) & ~own.all(axis=1)):
        cumulative[part] = np.interp(edges, edges[own[part]], cumulative[part, own[part]], left=0.0)
    return Buckets(edges, cumulative, own, found[:, -1])


def share_within(buckets: Buckets, slo_s: Floats, wait_s: Floats) -> tuple[Floats, Bools]:
    """(n,) share of events within the objective, and (n,) True where it cannot be told: it is no bucket edge.

    Exact where the objective is a bucket edge and nothing waits in front. With a wait, the largest edge that the wait
    leaves room for is read: the share can then only be too low.

    Args:
        buckets: the histograms.
        slo_s: (n,) objectives.
        wait_s: (n,) what is spent before the histogram's clock starts; NaN makes the share unknown.
    """
    edges, cumulative, own, total = buckets
    n, some = len(total), total > 0
    if not len(edges):
        return np.full(n, np.nan), np.zeros(n, bool)
    room_s = slo_s - wait_s
    place = np.abs(edges[np.newaxis, :] - slo_s[:, np.newaxis]).argmin(axis=1)
    rows = np.arange(n)
    is_edge = (np.abs(edges[place] - slo_s) <= 1e-6 * slo_s) & own[rows, place]
    below = np.where(own & (edges[np.newaxis, :] <= room_s[:, np.newaxis] * (1 + 1e-6)), cumulative, 0.0)
    within = np.where(wait_s > 0, below.max(axis=1), np.where(is_edge, cumulative[rows, place], np.nan))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(some & np.isfinite(room_s), np.clip(within / total, 0.0, 1.0), np.nan)
    return share, some & (wait_s <= 0) & ~is_edge


def counts_by_latency(buckets: Buckets, edges_s: Sequence[float], wait_s: Floats) -> Floats:
    """(n, m + 1) events per second per bin of the edges (m,), linear inside a bucket, later by the wait (n,).

    What is above the largest finite edge of the source is in the last bin.
    """
    edges, cumulative, _, total = buckets
    n = len(total)
    if not len(edges):
        return np.full((n, len(edges_s) + 1), np.nan)
    at_s = np.asarray(edges_s)[np.newaxis, :] - wait_s[:, np.newaxis]
    lower = np.concatenate([[0.0], edges])
    counts = np.concatenate([np.zeros((n, 1)), cumulative], axis=1)
    place = np.clip(np.searchsorted(lower, at_s, "right") - 1, 0, len(edges) - 1)
    inside = np.clip((at_s - lower[place]) / (lower[place + 1] - lower[place]), 0.0, 1.0)
    rows = np.arange(n)[:, np.newaxis]
    reached = counts[rows, place] + inside * (counts[rows, place + 1] - counts[rows, place])
    ends = np.concatenate([np.zeros((n, 1)), reached, total[:, np.newaxis]], axis=1)
    return np.maximum(np.diff(ends, axis=1), 0.0)
