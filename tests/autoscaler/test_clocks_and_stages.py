"""Time: a clock that no jump of the wall moves, stages that cannot hang a tick, and a grid of ticks."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from autoscaler.actuators.base import PoolName, wanted
from autoscaler.clocks import SteadyWallClock
from autoscaler.controller import following_tick_s
from autoscaler.stages import Stages
from policies.contract import ActuationFailed, MetricsUnavailable, Target


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


def test_what_was_left_behind_carries_nothing_more_out() -> None:
    """Orders given since then, such as the kill switch, would not be heard."""
    release, written = threading.Event(), []
    pools = (PoolName("chat", "", 0, 0), PoolName("code", "", 1, 0))
    target = Target(replicas=np.array([[3], [4]]), batch_cap=np.array([[8], [8]]))

    def apply() -> None:
        for pool, _, _ in wanted(target, pools):
            release.wait(30.0)
            written.append(pool.service)

    stages = Stages({"act": 0.05})
    with pytest.raises(ActuationFailed, match="no answer within"):
        stages.run("act", apply, ActuationFailed)
    release.set()
    stages._running["act"].join(30.0)
    assert written == ["chat"]
    stages.run("act", apply, ActuationFailed)
    assert written == ["chat", "chat", "code"]


def test_whatever_goes_wrong_in_a_bounded_stage_holds_and_is_named() -> None:
    def broken() -> None:
        raise KeyError("value")

    stages = Stages({"read": 5.0})
    with pytest.raises(MetricsUnavailable, match="stage read: KeyError: 'value'"):
        stages.run("read", broken, MetricsUnavailable)
    assert stages.errors == {"read": "KeyError: 'value'"}
    with pytest.raises(KeyError):
        stages.run("decide", broken, RuntimeError)
    assert stages.failures == {"read": 1, "decide": 1}


def test_not_even_the_end_of_the_interpreter_leaves_a_bounded_stage() -> None:
    stages = Stages({"read": 5.0})
    with pytest.raises(MetricsUnavailable, match="stage read: RuntimeError: SystemExit: 3"):
        stages.run("read", lambda: sys.exit(3), MetricsUnavailable)


def test_what_another_thread_is_reading_does_not_change_under_it() -> None:
    def broken() -> None:
        raise OSError("no route")

    stages = Stages({"read": 5.0, "act": 5.0})
    with pytest.raises(MetricsUnavailable):
        stages.run("read", broken, MetricsUnavailable)
    errors, failures = stages.errors, stages.failures
    with pytest.raises(ActuationFailed):
        stages.run("act", broken, ActuationFailed)
    stages.run("read", lambda: None, MetricsUnavailable)
    stages.count("tick")
    assert (errors, failures) == ({"read": "OSError: no route"}, {"read": 1})
    assert (stages.errors, stages.failures) == ({"act": "OSError: no route"}, {"read": 1, "act": 1, "tick": 1})
    stages.forget()
    assert stages.errors == {}
