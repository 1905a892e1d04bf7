"""Ticks, sliding windows, streaks: the peers' own time."""

from __future__ import annotations

import numpy as np
import pytest

from policies.baselines.windows import SlidingWindow, Streak, Tick

ALWAYS = np.array([True])


def due_times(period_s: float, interval_s: float, ticks: int) -> list[float]:
    tick = Tick(1, period_s)
    return [t * interval_s for t in range(ticks) if tick.due(np.array([t * interval_s]), ALWAYS)[0]]


@pytest.mark.parametrize(
    ("period_s", "expected"),
    [
        (2.0, [0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0]),  # shorter than the interval: every time
        (15.0, [0.0, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0]),
        (20.0, [0.0, 30.0, 45.0, 60.0, 90.0]),  # three times a minute all the same
        (30.0, [0.0, 30.0, 60.0, 90.0]),
        (60.0, [0.0, 60.0]),
    ],
)
def test_tick_keeps_the_phase_of_its_period(period_s: float, expected: list[float]) -> None:
    assert due_times(period_s, 15.0, 7) == expected


def test_evaluation_that_cannot_be_made_stays_due() -> None:
    tick = Tick(1, 60.0)
    seen = [bool(tick.due(np.array([15.0 * t]), np.array([t >= 2]))[0]) for t in range(8)]
    assert seen == [False, False, True, False, False, False, True, False]


def test_services_tick_on_their_own_clocks_and_anew_after_a_reset() -> None:
    tick = Tick(2, 60.0)
    assert tick.due(np.array([0.0, 500.0]), np.ones(2, bool)).tolist() == [True, True]
    tick.reset(np.array([False, True]))
    assert tick.due(np.array([15.0, 0.0]), np.ones(2, bool)).tolist() == [False, True]


def test_window_reduces_what_is_younger_than_its_span() -> None:
    window = SlidingWindow(1, 60.0)
    for time_s, value in ((0.0, 100.0), (15.0, 4.0), (30.0, np.nan), (45.0, 2.0), (60.0, 9.0)):
        window.add(np.array([time_s]), np.array([value]))
    now = np.array([60.0])  # the sample at 0 is exactly a minute old, and out
    assert (window.mean(now)[0], window.sum(now)[0], window.max(now)[0], window.min(now)[0]) == (5.0, 15.0, 9.0, 2.0)
    assert window.deviation(now)[0] == pytest.approx(np.std([4.0, 2.0, 9.0]))
    assert (window.mean(now, 20.0)[0], window.count(now)[0]) == (5.5, 3.0)
    assert np.isnan(window.mean(np.array([500.0]))[0])


def test_window_is_unknown_before_its_first_sample_and_keeps_the_shape() -> None:
    window = SlidingWindow(2, 60.0, 3)
    assert np.isnan(window.max(np.zeros(2))).tolist() == [[True] * 3] * 2
    window.add(np.zeros(2), np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]]))
    assert window.max(np.zeros(2)).tolist()[0] == [1.0, 2.0, 3.0]
    assert np.isnan(window.max(np.zeros(2))[1]).all()


def test_streak_counts_samples_and_seconds_of_one_direction() -> None:
    streak = Streak(1)
    seen = []
    for tick, sign in enumerate([1, 1, 1, 0, 1, -1, -1]):
        samples, seconds = streak.update(np.array([20.0 * tick]), np.array([float(sign)]), ALWAYS)
        seen.append((samples[0], seconds[0]))
    assert seen == [(1, 0), (2, 20), (3, 40), (0, 0), (1, 0), (1, 0), (2, 20)]
    assert streak.update(np.array([200.0]), np.array([1.0]), ~ALWAYS)[0][0] == 2  # not sampled: nothing changes
