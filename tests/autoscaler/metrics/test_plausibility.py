"""Measurements that contradict each other; the real server's part is in `tests/integration`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from autoscaler.metrics.latency_histograms import Buckets
from autoscaler.metrics.plausibility import LeftOut, Plausibility
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=16),))
WINDOW_S = 15.0
NO_LATENCIES = Buckets(np.zeros(0), np.zeros((1, 0)), np.zeros((1, 0), bool), np.full(1, np.nan))


def kv_usage(usage: float, running: float, replicas: float, scraped: float) -> float:
    """What is left of it after two windows."""
    judge = Plausibility([SPEC], WINDOW_S, 0.7)
    values = {"running": np.array([[running]]), "kv_cache_usage": np.array([[usage]])}
    counts = np.array([[replicas]]), np.array([[scraped]])
    for tick in range(4):
        found = judge.possible(values, NO_LATENCIES, *counts, WINDOW_S * tick, [])
    return float(found["kv_cache_usage"][0, 0])


def test_full_caches_of_few_requests_are_cached_blocks() -> None:
    assert np.isnan(kv_usage(0.9, running=4, replicas=12, scraped=12))


def test_replicas_that_only_start_hold_no_cache() -> None:
    assert kv_usage(0.9, running=4, replicas=12, scraped=2) == 0.9


@pytest.mark.parametrize(("targets", "left"), [(10.0, 5.0), (4.0, 5.0), (3.0, np.nan), (1.0, np.nan), (np.nan, np.nan)])
def test_without_a_target_that_cannot_be_the_others_are_enough_or_the_signal_is_missing(
    targets: float, left: float
) -> None:
    """Of a gateway nobody knows how many targets there should be."""
    judge = Plausibility([SPEC], WINDOW_S, 0.7)
    problems: list[str] = []
    out = {"waiting": {0: LeftOut({"r1": -70.0}, 1e7, targets)}}
    found = judge.without({"waiting": np.array([5.0])}, out, problems)
    np.testing.assert_equal(found["waiting"], [left])
    few = ", and too few are left" if np.isnan(left) else ""
    assert problems == [f"waiting: {SPEC.service} reports -70, but at least 0 is possible; left out: r1{few}"]
    assert judge.counts == {(SPEC.service, "waiting"): 1}


def latencies(rate: float, lower_s: float, upper_s: float) -> Buckets:
    """So many requests per second, all within one bucket."""
    edges = np.array([edge for edge in (lower_s, upper_s) if edge > 0])
    counts = np.array([[rate * (edge == upper_s) for edge in edges]])
    return Buckets(edges, counts, np.ones_like(counts, bool), np.array([rate]))


def doubted(tokens: float, running: Sequence[float], tpot: Buckets, tick_s: float = WINDOW_S) -> list[bool]:
    """Whether the gauge is taken for wrong, reading by reading, at a rate of generated tokens."""
    judge, found = Plausibility([SPEC], WINDOW_S, 0.7), []
    one = np.ones((1, 1))
    for tick, count in enumerate(running):
        values = {"running": np.array([[count]]), "generation": np.array([tokens])}
        left = judge.possible(values, tpot, one, one, tick_s * tick, [])
        found.append(bool(np.isnan(left["running"]).all()))
    return found


@pytest.mark.parametrize(
    ("tokens", "running", "tpot", "readings"),
    [
        (2000.0, 0.0, latencies(20, 0.025, 0.05), 2),  # 50 must run
        (2000.0, 12.0, latencies(20, 0.025, 0.05), 2),  # one of four ranks
        (300.0, 0.0, latencies(3, 0.01, 0.025), 7),  # 3 must: a small service takes longer to tell
        (2000.0, 0.0, NO_LATENCIES, 14),  # by the fastest iteration that the engine has
        (2000.0, 0.0, latencies(20, 0.0, 0.025), 14),
    ],
)
def test_a_running_gauge_that_stays_too_low_for_the_tokens_is_doubted(
    tokens: float, running: float, tpot: Buckets, readings: int
) -> None:
    found = doubted(tokens, [running] * 40, tpot)
    assert not any(found[:readings])
    assert all(found[readings + 2 :])


def test_a_small_service_is_idle_at_many_scrapes_and_a_burst_between_two_of_them_is_none() -> None:
    assert not any(doubted(300.0, [0.0, 0.0, 3.0, 0.0, 5.0, 2.0] * 20, latencies(3, 0.01, 0.025)))
    assert not any(doubted(2000.0, [0.0, 90.0] * 20, latencies(20, 0.025, 0.05)))


def test_overlapping_windows_are_no_more_evidence() -> None:
    slow = doubted(300.0, [0.0] * 100, latencies(3, 0.01, 0.025))
    often = doubted(300.0, [0.0] * 100, latencies(3, 0.01, 0.025), tick_s=WINDOW_S / 5)
    assert abs(often.index(True) - 5 * slow.index(True)) <= 5
