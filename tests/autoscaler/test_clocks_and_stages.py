"""Time: a clock that no jump of the wall moves, stages that cannot hang a tick, and a grid of ticks."""

from __future__ import annotations

import threading

import pytest

from autoscaler.clocks import SteadyWallClock
from autoscaler.controller import following_tick_s
from autoscaler.stages import Stages
from policies.contract import ActuationFailed


def test_a_jump_of_the_wall_clock_moves_nothing() -> None:
    wall, steady = [1_700_000_000.0], [50.0]
    clock = SteadyWallClock(lambda: wall[0], lambda: steady[0])
    for jump_s in (3600.0, -7200.0, 1e6):
        wall[0] += jump_s
        steady[0] += 15.0
    assert clock.now_s == 1_700_000_000.0 + 45.0


def test_a_stopped_clock_waits_no_more() -> None:
    clock = SteadyWallClock()
    clock.stop()
    clock.wait_until(clock.now_s + 3600.0)
    assert clock.stopped


def test_ticks_stay_on_their_grid_and_missed_ones_are_left_out() -> None:
    assert [following_tick_s(30.0, now_s, 15.0) for now_s in (30.0, 34.0, 45.0, 45.1, 100.0)] == [
        45.0,
        45.0,
        45.0,
        60.0,
        105.0,
    ]


def test_a_stage_that_hangs_is_left_behind_and_never_runs_twice_at_once() -> None:
    release, calls = threading.Event(), []

    def hang() -> str:
        calls.append(1)
        release.wait(30.0)
        return "late"

    stages = Stages({"act": 0.05})
    with pytest.raises(ActuationFailed, match="no answer within"):
        stages.run("act", hang, ActuationFailed)
    with pytest.raises(ActuationFailed, match="still hangs"):
        stages.run("act", hang, ActuationFailed)
    assert len(calls) == 1
    release.set()
    stages._running["act"].join(30.0)
    assert stages.run("act", lambda: "new", ActuationFailed) == "new"
    assert set(stages.spent()) == {"act"}


def test_an_error_inside_a_bounded_stage_is_the_callers() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Stages({"read": 5.0}).run("read", broken, ActuationFailed)
