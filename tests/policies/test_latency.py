"""Latency histograms: quantiles as Prometheus interpolates them, and what a slower service would have counted."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import missing, snapshot

from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S
from policies.latency import histogram_quantile, slower, tpot_quantile_s, ttft_quantile_s

EDGES = (1.0, 2.0, 4.0)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([10, 0, 0, 0], 0.9, 0.9),  # the first bin begins at 0
        ([5, 5, 0, 0], 0.5, 1.0),  # exactly at an edge
        ([5, 0, 5, 0], 0.9, 2.0 + 2.0 * 0.8),  # an empty bin in between
        ([1, 0, 0, 9], 0.9, 4.0),  # in the bin without an upper edge: the highest edge
        ([0.1, 0.1, 0.2, 0.0], 0.75, 3.0),  # rates instead of counts
        ([0, 0, 0, 0], 0.9, np.nan),
        ([1, np.nan, 0, 0], 0.9, np.nan),
    ],
)
def test_quantile_is_what_promql_interpolates(counts: list[float], share: float, expected: float) -> None:
    assert histogram_quantile(np.array([counts], float), EDGES, share) == pytest.approx([expected], nan_ok=True)


def test_histogram_without_bins_is_unknown() -> None:
    assert np.isnan(histogram_quantile(np.zeros((2, 0)), EDGES, 0.9)).all()
    assert slower(np.zeros((2, 0)), EDGES, np.ones(2)).shape == (2, 0)


def test_slower_requests_move_up_and_none_is_lost() -> None:
    counts = np.array([[4.0, 4.0, 0.0, 1.0], [4.0, 4.0, 0.0, 1.0], [4.0, 4.0, 0.0, 1.0]])
    moved = slower(counts, EDGES, np.array([1.0, 2.0, 0.5]))
    assert moved.tolist() == [[4.0, 4.0, 0.0, 1.0], [2.0, 2.0, 4.0, 1.0], [8.0, 0.0, 0.0, 1.0]]


def test_snapshot_has_quantiles_of_both_latencies() -> None:
    seen = snapshot(
        n=2,
        ttft_histogram_rps=np.eye(len(TTFT_EDGES_S) + 1)[[8, 20]],
        tpot_histogram_rps=np.eye(len(TPOT_EDGES_S) + 1)[[0, 10]],
    )
    assert ttft_quantile_s(seen, 0.9).tolist() == pytest.approx([0.75 + 0.9 * 0.25, 60.0])
    assert tpot_quantile_s(seen, 0.9).tolist() == pytest.approx([0.0045, 0.075 + 0.9 * 0.025])
    assert np.isnan(ttft_quantile_s(missing(), 0.9)).all()
