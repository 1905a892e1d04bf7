"""What is told to those who watch the scaled objects, and what happens when it cannot be told."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from live_fakes import START_S, LiveWorld, burst, live_config, service_spec

from autoscaler.actuators.base import Announcement
from autoscaler.authority.announcements import MAX_UNTOLD, Announcer
from autoscaler.records.explain import COUNTS, MEANINGS
from autoscaler.stages import Stages
from autoscaler.versions.ladder import ALWAYS_MEASURED
from policies.contract import ActuationFailed, Outcome, Reason


def test_each_change_of_a_count_is_told_once_with_its_reason(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    decisions = world.run(service, 90)
    changes = [
        (int(decision.details["in_force"][0, 0]), int(decision.settled.replicas[0, 0]))
        for decision in decisions
        if decision.outcome[0] == Outcome.SCALED
    ]
    changes = [(before, after) for before, after in changes if before != after]
    told = [one for one in world.announced if not one.warning]
    assert [(one.reason, one.row, one.column) for one in told] == [
        ("ScaledUp" if after > before else "ScaledDown", 0, 0) for before, after in changes
    ]
    assert {one.reason for one in told} == {"ScaledUp", "ScaledDown"}
    before, after = changes[0]
    assert told[0].note.startswith(f"from {before} to {after} replicas by token-demand")
    service.close()


def holds(world: LiveWorld) -> list[Announcement]:
    """Those that were told, without their times."""
    return [one._replace(at_s=0.0) for one in world.announced if one.warning]


def scaled(before: int, proposed: int, after: int, *reasons: Reason) -> str:
    """What is told of the reasons of a change."""
    made: Any = SimpleNamespace(
        outcome=np.array([Outcome.SCALED]),
        reasons=np.array([sum(int(one) for one in reasons)]),
        policy="token-demand",
        proposed=SimpleNamespace(replicas=np.array([[proposed]])),
        settled=SimpleNamespace(replicas=np.array([[after]])),
        details={"mode": np.array(["act"]), "in_force": np.array([[before]]), "hold": np.array([""])},
        snapshot=SimpleNamespace(row=lambda _: dict.fromkeys((*COUNTS, *ALWAYS_MEASURED), 1.0) | {"batch_cap": [None]}),
    )
    world = LiveWorld([service_spec()], [burst()])
    Announcer(np.ones((1, 1), bool), world, Stages(), ["chat"], dict).tell(made, START_S)  # type: ignore[arg-type]
    (told,) = world.announced
    start = f"from {before} to {after} replicas by token-demand"
    assert (told.note[: len(start)], told.at_s) == (start, START_S)
    return told.note.removeprefix(start).removeprefix(": ")


@pytest.mark.parametrize("kept", [Reason.SLO_BURNING, Reason.REPLICAS_STARTING, Reason.COOLDOWN])
def test_a_scale_down_is_not_told_with_a_reason_that_says_that_there_was_none(kept: Reason) -> None:
    assert scaled(6, 2, 4, Reason.BOUNDS, kept) == MEANINGS[Reason.BOUNDS]
    assert scaled(4, 9, 6, Reason.STEP_LIMIT, kept, Reason.STEADY_TRAFFIC) == MEANINGS[Reason.STEP_LIMIT]


def test_a_reason_that_limited_another_pool_is_not_told_of_one_that_got_what_was_proposed() -> None:
    assert scaled(6, 2, 4, Reason.STEADY_TRAFFIC) == MEANINGS[Reason.STEADY_TRAFFIC]
    assert (
        scaled(6, 4, 4, Reason.STEADY_TRAFFIC, Reason.STEP_LIMIT, Reason.PARTLY_BLIND)
        == f"{MEANINGS[Reason.PARTLY_BLIND]} (missing: batch_cap)"
    )


def test_the_words_of_a_reason_hold_where_it_acted_in_part() -> None:
    assert "none was made" not in MEANINGS[Reason.STEADY_TRAFFIC]


def test_what_is_told_late_has_the_time_at_which_it_was_so_and_its_end(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)

    def refuse() -> None:
        raise ActuationFailed("HTTP 500")

    world.on_announce = refuse
    world.owners = ("HorizontalPodAutoscaler default/cpu",)
    world.run(service, 4)
    world.owners = ("",)
    world.run(service, 2)
    world.on_announce = lambda: None
    world.run(service, 1)
    (told,) = (one for one in world.announced if one.warning)
    assert told.at_s == START_S + 45.0
    assert told.note == "HorizontalPodAutoscaler default/cpu; it was so from 22:14:05 to 22:15:05 UTC"
    service.close()


def test_a_hold_is_told_when_it_begins_and_not_at_every_tick(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    world.owners = ("HorizontalPodAutoscaler default/cpu",)
    world.run(service, 5)
    warning = Announcement(0, None, True, "OtherAutoscaler", "HorizontalPodAutoscaler default/cpu")
    assert holds(world) == [warning]
    for _ in range(3):  # it comes and goes
        world.owners = ("",)
        world.run(service, 1)
        world.owners = (warning.note,)
        world.run(service, 1)
    assert holds(world) == [warning]
    world.owners = ("",)
    world.run(service, 40)
    world.owners = (warning.note,)
    world.run(service, 2)
    assert holds(world) == [warning, warning]
    service.close()


def test_what_went_wrong_with_a_write_is_told(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.refusing = True
    world.run(service, 3)
    assert [(one.reason, one.note) for one in world.announced] == [("ActuationFailed", "said no")]
    service.close()


def test_nothing_is_told_of_what_is_only_advised(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, mode="advise"))
    world.run(service, 30)
    world.blind = True
    world.run(service, 2)
    assert world.announced == []
    service.close()


@pytest.mark.plays("Kubernetes takes no Event", "a problem in the status, counted; tried again, nothing waits for it")
def test_a_server_that_takes_no_announcement_is_a_problem_and_nothing_else(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))

    def refuse() -> None:
        raise ActuationFailed("an Event on deployments/chat in default: HTTP 403")

    world.on_announce = refuse
    decisions = world.run(service, 45)
    assert {Outcome(int(decision.outcome[0])) for decision in decisions} == {Outcome.SCALED, Outcome.UNCHANGED}
    assert service.problems() == ["announce: an Event on deployments/chat in default: HTTP 403"]
    assert service.stages.failures["announce"] >= 1
    world.on_announce = lambda: None
    world.run(service, 1)
    assert service.problems() == []
    assert world.announced[0].reason in {"ScaledUp", "ScaledDown"}
    service.close()


def test_a_server_that_hangs_does_not_hold_up_the_ticks(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, limits={"read_s": 60.0, "act_s": 60.0, "announce_s": 0.02}))
    let_go = threading.Event()
    world.on_announce = let_go.wait
    decisions = world.run(service, 45)
    assert Outcome.SCALED in [int(decision.outcome[0]) for decision in decisions]
    assert world.announced == []
    assert any("announce" in problem and "an earlier call still hangs" in problem for problem in service.problems())
    let_go.set()
    service.stages._running["announce"].join()
    world.run(service, 1)
    assert world.announced != []
    service.close()


@pytest.mark.parametrize("later", [1, MAX_UNTOLD], ids=["kept", "dropped"])
def test_what_hangs_is_told_once_and_nothing_else_is_lost_by_it(later: int) -> None:
    """A call that was left behind may come back when what it tells has been dropped, and beside the next tick."""
    world, let_go, told = LiveWorld([service_spec()], [burst()]), threading.Event(), list[str]()

    def announce(one: Announcement) -> None:
        assert let_go.wait(60.0)
        told.append(one.note)

    world.announce = announce  # type: ignore[method-assign]
    stages = Stages({"announce": 0.02})
    announcer = Announcer(np.ones((1, 1), bool), world, stages, ["chat"], dict)  # type: ignore[arg-type]
    announcer._untold.append(Announcement(0, None, True, "Held", "first"))
    announcer.tell(None, 0.0)
    announcer._untold.extend(Announcement(0, None, True, "Held", str(number)) for number in range(later))
    let_go.set()
    stages._running["announce"].join()
    assert told == ["first"]
    announcer.tell(None, 0.0)
    assert told == ["first", *map(str, range(later))]
