"""Stabilisation windows, rate policies and tolerance of a HorizontalPodAutoscaler's behaviour."""

from __future__ import annotations

import numpy as np
import pytest

from policies.baselines.hpa_behavior import Behavior, ScalingRules, tolerated

DUE = np.array([True])
NO_DOWN_WINDOW = ScalingRules(stabilization_s=0.0, replicas=0, share=1.0, period_s=15.0)


def followed(behavior: Behavior, desired: list[float], current: float, every_s: float = 15.0) -> list[float]:
    """What a fleet does that always follows."""
    path = []
    for tick, wish in enumerate(desired):
        current = float(
            behavior.settle(np.array([every_s * tick]), DUE, np.array([float(current)]), np.array([float(wish)]))[0]
        )
        path.append(current)
    return path


def test_up_window_takes_the_lowest_recommendation() -> None:
    """llm-d: 30 s of stabilisation up, so a spike of one signal adds nothing."""
    up = ScalingRules(stabilization_s=30.0, replicas=100, share=1.0, period_s=15.0)
    assert followed(Behavior(1, up=up), [4, 9, 4, 8, 9, 9], 4) == [4, 4, 4, 4, 8, 9]


def test_down_window_takes_the_highest_recommendation() -> None:
    down = ScalingRules(stabilization_s=60.0, replicas=0, share=1.0, period_s=15.0)
    assert followed(Behavior(1, down=down), [8, 2, 2, 5, 2, 2, 2, 2], 8) == [8, 8, 8, 8, 5, 5, 5, 2]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (ScalingRules(0.0, 4, 1.0, 60.0), [4, 8, 8, 8, 8, 16]),  # max(4, 100 %) a minute
        (ScalingRules(0.0, 1, 0.0, 180.0), [2, 3, 3, 3, 3, 3]),  # one in three minutes, after what was there
        (ScalingRules(0.0, 4, 1.0, 15.0), [6, 12, 24, 48, 96, 100]),
    ],
    ids=["llm-d", "llm-d tokens", "kubernetes"],
)
def test_growth_per_period_is_limited(rules: ScalingRules, expected: list[float]) -> None:
    start = {4: 4.0, 2: 2.0, 6: 6.0}[int(expected[0])]
    assert followed(Behavior(1, up=rules), [start] + [100.0] * 5, start) == expected


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (ScalingRules(0.0, 1, 0.0, 30.0), [10, 9, 9, 8, 8, 7]),  # one every two ticks
        (ScalingRules(0.0, 0, 0.5, 15.0), [10, 5, 2, 1, 0, 0]),  # half, rounded down
        (ScalingRules(0.0, 0, 1.0, 15.0), [10, 0, 0, 0, 0, 0]),
    ],
    ids=["one per 30 s", "half", "all"],
)
def test_shrinking_per_period_is_limited(rules: ScalingRules, expected: list[float]) -> None:
    assert followed(Behavior(1, down=rules), [10.0] + [0.0] * 5, 10) == expected


def test_unknown_recommendation_stays_unknown_and_is_not_remembered() -> None:
    behavior = Behavior(1, down=NO_DOWN_WINDOW)
    assert np.isnan(behavior.settle(np.zeros(1), DUE, np.array([5.0]), np.array([np.nan])))[0]
    assert followed(behavior, [3.0], 5) == [3.0]


@pytest.mark.parametrize(
    ("desired", "current", "expected"), [(11.0, 10.0, 10.0), (11.1, 10.0, 11.1), (9.0, 10.0, 10.0), (8.9, 10.0, 8.9)]
)
def test_ten_percent_are_tolerated(desired: float, current: float, expected: float) -> None:
    assert tolerated(np.array([desired]), np.array([current])).tolist() == [expected]
