"""Histograms of a service whose targets are stored in two forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from autoscaler.metrics.latency_histograms import read_buckets


def classic(service: str, **buckets: float) -> list[dict[str, Any]]:
    """A row for each edge, such as `_05=1`; `inf` for all."""
    edges = {name: "+Inf" if name == "inf" else name.replace("_", "0.", 1) for name in buckets}
    return [
        {"metric": {"service": service, "le": edges[name]}, "value": [0, str(value)]} for name, value in buckets.items()
    ]


def native(service: str, *buckets: tuple[float, float, float]) -> list[dict[str, Any]]:
    """One whole histogram, of buckets (lower, upper, count)."""
    told = [[0, str(lower), str(upper), str(count)] for lower, upper, count in buckets]
    histogram = {"count": str(sum(count for *_, count in buckets)), "sum": "1", "buckets": told}
    return [{"metric": {"service": service}, "histogram": [0, histogram]}]


def test_forms_with_the_same_edges_add_up() -> None:
    rows = classic("chat", _25=2, _5=4, inf=5) + native("chat", (0.0, 0.25, 1), (0.25, 0.5, 3))
    found = read_buckets(rows, "service", {"chat": 0}, 1, np.array([0.5]))
    assert (found.edges.tolist(), found.cumulative.tolist(), found.total.tolist()) == ([0.25, 0.5], [[3.0, 8.0]], [9.0])


def test_an_edge_that_only_one_form_has_is_none_of_the_services() -> None:
    """Its count would be that of a part; the other services keep their own."""
    rows = [
        *classic("chat", _1=1, _25=2, _5=4, inf=4),
        *native("chat", (0.0, 0.1, 1), (0.1, 0.3, 1), (0.3, 0.5, 2)),
        *classic("code", _1=1, _25=2, _5=4, inf=4),
        *native("mail", (0.0, 0.1, 1), (0.1, 0.3, 1), (0.3, 0.5, 2)),
    ]
    services = {"chat": 0, "code": 1, "mail": 2}
    found = read_buckets(rows, "service", services, 3, np.array([0.5] * 3))
    assert found.edges.tolist() == [0.1, 0.25, 0.3, 0.5]
    both, first, second = [True, False, False, True], [True, True, False, True], [True, False, True, True]
    assert found.own.tolist() == [both, first, second]
    assert found.cumulative[0].tolist() == pytest.approx([2.0, 4.25, 5.0, 8.0])  # linear between the edges of both
    assert found.cumulative[1, [0, 1, 3]].tolist() == [1.0, 2.0, 4.0]
