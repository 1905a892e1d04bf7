"""The virtual world plays what it says, replays by seed, and sees a controller that breaks its promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.records.decisions import Records
from policies.contract import Decision
from tests.chaos.promql import Store, UnknownPromQLError, evaluate, rate_of
from tests.chaos.schedule import Event, Schedule
from tests.chaos.virtual_world import VirtualWorld


def world(folder: Path, *events: Event, ticks: int = 60, seed: int = 2) -> VirtualWorld:
    return VirtualWorld(Schedule(seed, ticks, events), folder)


def test_without_faults_every_promise_holds_and_fleets_are_scaled(tmp_path: Path) -> None:
    quiet = world(tmp_path, ticks=100)
    written = []
    judge = quiet.invariants.judge

    def keep(look: Any) -> list[str]:
        written.extend(write for one in look.services.values() for write in one.writes)
        return judge(look)

    quiet.invariants.judge = keep  # type: ignore[method-assign]
    assert quiet.run() == []
    assert len(written) > 3


FAULTS = (
    Event("metrics 503", -1, 12, 4, 0.5),
    Event("HPA", 0, 14, 4, 0.5),
    Event("controller killed", -1, 15, 2, 0.5),
    Event("paused", 1, 16, 3, 0.5),
)


def test_a_schedule_replays_exactly(tmp_path: Path) -> None:
    looks: list[list[Any]] = [[], []]
    for number, seen in enumerate(looks):
        played = world(tmp_path / str(number), *FAULTS)
        judge: Callable[[Any], list[str]] = played.invariants.judge
        played.invariants.judge = lambda look, seen=seen, judge=judge: (seen.append(look), judge(look))[1]  # type: ignore
        assert played.run() == []
    assert [look.services for look in looks[0]] == [look.services for look in looks[1]]


def test_the_bill_is_judged_also_when_the_controller_is_down_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.chaos.virtual_world.BILLED_TICKS", 20)
    ends = world(tmp_path, Event("controller killed", -1, 38, 90, 0.5), ticks=40)
    judged: list[float] = []
    ends.invariants.judge_dollars = lambda billed, truth, *_: judged.append(billed / truth)  # type: ignore
    assert ends.run() == []
    assert len(judged) == 3
    assert judged == pytest.approx([1.0, 1.0, 1.0], abs=0.1)


def test_a_question_that_the_fake_cannot_answer_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the controller it looks like a fault of the server, which it holds for and names."""

    def beyond(*arguments: Any) -> Any:
        raise UnknownPromQLError("no such function")

    monkeypatch.setattr("tests.chaos.fake_prometheus.evaluate", beyond)
    with pytest.raises(AssertionError, match=r"the fake Prometheus cannot answer .*: no such function"):
        world(tmp_path).run()


def test_a_controller_that_does_not_stop_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heartbeat, "killed", lambda self: ("",) * len(self.services))
    found = world(tmp_path, Event("kill file", -1, 4, 90, 0.5), ticks=100).run()
    assert [line for line in found if "although the kill file is there" in line] != []


def test_a_controller_that_does_not_record_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(self: Records, decision: Decision) -> None:
        """Nothing is kept."""

    monkeypatch.setattr(Records, "record", forget)
    found = world(tmp_path).run()
    assert [line for line in found if "without a recorded decision" in line] != []


def test_rates_are_extrapolated_as_prometheus_does() -> None:
    times, values = [2.0, 7.0, 12.0], [100.0, 150.0, 200.0]
    assert rate_of(times, values, 15.0, 15.0) == pytest.approx(10.0)  # both ends lie within a scrape of the window's
    assert rate_of([7.0, 12.0], [190.0, 10.0], 15.0, 12.0) == pytest.approx((10.0 / 5.0) * 7.5 / 15.0)  # a reset
    assert rate_of([7.0], [1.0], 15.0, 12.0) is None
    assert evaluate("1 + 2 * 3", Store(), 0.0) == 7.0
