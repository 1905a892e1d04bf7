"""Quantiles of the snapshot's latency histograms, as Prometheus interpolates them.

This module must not know what a quantile is used for.
"""

from __future__ import annotations

import numpy as np

from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Floats, Snapshot


def histogram_quantile(counts: Floats, edges: tuple[float, ...], share: float) -> Floats:
    """The `share` quantile (n,) of requests counted per bin (n, len(edges) + 1), after PromQL's `histogram_quantile`.

    Values are taken as spread evenly inside a bin, the first of which begins at 0. A quantile in the last bin, which
    has no upper edge, is the highest edge. NaN where nothing was counted, where a bin is missing, and where there are
    no bins at all (n, 0).

    >>> histogram_quantile(np.array([[5.0, 5.0, 0.0]]), (1.0, 2.0), 0.9).tolist()
    [1.8]
    """
    n = len(counts)
    if counts.shape[1] == 0:
        return np.full(n, np.nan)
    cumulative = np.cumsum(counts, axis=1)
    rank = share * cumulative[:, -1]
    reached = (cumulative >= rank[:, np.newaxis]).argmax(axis=1)
    upper = np.array([*edges, edges[-1]])
    lower = np.array([0.0, *edges])
    row = np.arange(n)
    inside = counts[row, reached]
    below = cumulative[row, reached] - inside
    part = np.divide(rank - below, inside, out=np.zeros(n), where=inside > 0)
    value = lower[reached] + (upper[reached] - lower[reached]) * part
    return np.where(cumulative[:, -1] > 0, value, np.nan)


def slower(counts: Floats, edges: tuple[float, ...], factor: Floats) -> Floats:
    """The histogram (n, bins) of the same requests, had each been `factor` (n,) times as slow.

    Inside a bin values are taken as spread evenly; those of the last bin stay there.
    """
    if counts.shape[1] == 0:
        return counts
    cumulative = np.cumsum(counts, axis=1)
    known = np.array([0.0, *edges])
    moved = np.empty_like(cumulative)
    for row, factor_here in enumerate(factor):
        below = np.concatenate([[0.0], cumulative[row, :-1]])
        moved[row, :-1] = np.interp(np.array(edges) / factor_here, known, below)
    moved[:, -1] = cumulative[:, -1]
    return np.diff(moved, axis=1, prepend=0.0)


def ttft_quantile_s(snapshot: Snapshot, share: float) -> Floats:
    """(n,) TTFT quantile of the window, seconds; NaN where unknown."""
    return histogram_quantile(snapshot.ttft_histogram_rps, TTFT_EDGES_S, share)


def tpot_quantile_s(snapshot: Snapshot, share: float) -> Floats:
    """(n,) TPOT quantile of the window, seconds; NaN where unknown."""
    return histogram_quantile(snapshot.tpot_histogram_rps, TPOT_EDGES_S, share)
