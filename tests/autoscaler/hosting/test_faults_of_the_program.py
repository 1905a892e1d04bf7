"""Errors that nobody foresaw: they hold what they concern, are named, and never end the loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec
from prometheus_client import generate_latest

from autoscaler.hosting.config import StageLimits
from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.service import FIRST_LOOK_S, LiveService
from autoscaler.records.ticks import read_outcome, read_ticks
from policies.contract import Reason

BROKEN_TICKS = 15


def broken(*arguments: Any) -> Any:
    """What a reader does with an answer of another shape."""
    return {"data": []}["result"]


def on(owner: str, method: str) -> Callable[[LiveService, LiveWorld], Callable[[], None]]:
    """A part of the service whose method fails."""

    def begin(service: LiveService, world: LiveWorld) -> Callable[[], None]:
        part = getattr(service, owner)
        good = getattr(part, method)
        setattr(part, method, broken)
        return lambda: setattr(part, method, good)

    return begin


FAULTS = {
    "read": (on("source", "read"), "read: KeyError: 'result'", "missing_metrics"),
    "act": (on("actuator", "apply"), "act: KeyError: 'result'", "actuation_failed"),
    "route": (on("actuator", "route"), "route: KeyError: 'result'", None),
    "record": (on("records", "record"), "record: KeyError: 'result'", "not_recorded"),
    "permit": (on("supervisor", "permitted"), "permit: KeyError: 'result'", "overdue"),
    "judge": (on("supervisor", "judge"), "decide: KeyError: 'result'", None),
    "finish": (on("exposition", "publish"), "tick: KeyError: 'result'", None),
    "versions": (on("lifecycle", "before_tick"), "tick: KeyError: 'result'", None),
}


@pytest.mark.plays("an answer that nobody foresaw, in any stage", "held and named; never the end of the loop")
@pytest.mark.parametrize("name", FAULTS)
def test_an_error_of_the_program_is_named_and_never_ends_the_loop(tmp_path: Path, name: str) -> None:
    begin, problem, reason = FAULTS[name]
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    service = LiveService(live_config(tmp_path), source=world, actuator=world, clock=world)
    world.watch = service.state
    ends: list[Callable[[], None]] = []
    seen: list[list[str]] = []
    applied: list[int] = []
    wait = world.wait_until

    def counted(time_s: float) -> None:
        tick = len(seen)
        seen.append(service.problems())
        applied.append(len(world.targets))
        if tick == 4:
            ends.append(begin(service, world))
        elif tick == 4 + BROKEN_TICKS:
            ends[-1]()
        elif tick == 8 + BROKEN_TICKS:
            service.stop()
        wait(time_s)

    world.wait_until = counted  # type: ignore[method-assign]
    service.run(Watchdog())
    assert seen[4] == []
    assert all(found == [problem] for found in seen[5 : 5 + BROKEN_TICKS])
    assert seen[-1] == []
    assert applied[-1] > applied[4 + BROKEN_TICKS]  # acts again
    if name not in {"route", "finish"}:  # those come after the act
        assert applied[4 + BROKEN_TICKS] == applied[4]
    if reason is not None and reason != "not_recorded":
        tick = read_ticks(service.database, last=10)[0]
        outcome, reasons = read_outcome(service.database, tick.id, "chat")
        assert outcome == "held"
        assert reason in Reason(reasons).words()


def test_a_tick_that_fails_between_the_stages_is_counted_and_leaves_no_gauge(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    service = LiveService(live_config(tmp_path), source=world, actuator=world, clock=world)
    world.watch = service.state
    seen: list[str] = []
    wait = world.wait_until

    def counted(time_s: float) -> None:
        seen.append(generate_latest(service.registry).decode())
        if len(seen) == 2:
            on("lifecycle", "before_tick")(service, world)
        elif len(seen) == 5:
            service.stop()
        wait(time_s)

    world.wait_until = counted  # type: ignore[method-assign]
    service.run(Watchdog())
    assert "jevons_decided_replicas{" in seen[1]
    assert "jevons_stage_errors_total{" not in seen[1]
    assert 'jevons_stage_errors_total{stage="tick"} 3.0' in seen[4]
    assert "jevons_decided_replicas{" not in seen[4]


def test_what_cannot_be_let_go_of_begins_no_loop_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever hosts a loop that raises begins it again, also after `jevons down`."""
    world = LiveWorld([service_spec()], [burst()])
    service = LiveService(live_config(tmp_path), source=world, actuator=world, clock=world)
    world.watch = service.state
    world.close = broken  # type: ignore[method-assign]
    service.stop()
    service.run(Watchdog())
    assert f"{service.name} has ended, and could not let go of everything" in caplog.text


class Limits(Watchdog):
    """Keeps how long a loop may say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def fed(self, name: str, limit_s: float) -> None:
        self.seconds.append(limit_s)


def test_a_wait_for_the_policies_at_the_start_is_no_stall(tmp_path: Path) -> None:
    """With short limits the process would end and start, again and again, for as long as the registry is silent."""
    world = LiveWorld([service_spec()], [burst()])
    metrics = {"url": "http://127.0.0.1:9", "deadline_s": 0.1}
    config = live_config(tmp_path, limits=dict.fromkeys(StageLimits.model_fields, 0.6), metrics=metrics)
    service = LiveService(config, source=world, actuator=world, clock=world)
    service.stop()
    watchdog = Limits()
    service.run(watchdog)
    assert watchdog.seconds[0] >= config.stall_s + FIRST_LOOK_S


def test_an_actuator_that_cannot_say_what_is_in_force_is_named_and_forbids(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 3)
    applied, state, read = len(world.targets), world.state, world.cluster.read
    world.state = broken  # type: ignore[method-assign]
    world.read = lambda: service.state() and read()  # type: ignore[method-assign]
    decision = world.run(service, 1)[0]
    assert service.state.last.problems == ("actuator: KeyError: 'result'",)
    assert "owner_unknown" in Reason(int(decision.reasons[0])).words()
    assert len(world.targets) == applied
    world.state = state  # type: ignore[method-assign]
    service.close()
