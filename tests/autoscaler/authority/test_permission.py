"""Who may write a service now: owners, edits and reverts, on a whole live service in a simulated cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.controls import Controls, Mode
from autoscaler.authority.permission import Hold
from autoscaler.hosting.service import LiveService
from policies.contract import Decision, Outcome, Reason, Snapshot

AT_ONCE: dict[str, Any] = {"revalidation": {"wait_s": 0.0}}
LOAD_RPS, OVERLOAD_RPS = 8.0, 40.0


def found(decision: Decision) -> tuple[str, Reason]:
    return Outcome(int(decision.outcome[0])).name.lower(), Reason(int(decision.reasons[0]))


def in_force(world: LiveWorld) -> int:
    return int(world.state().replicas_target[0, 0])


def then(service: LiveService, monkeypatch: pytest.MonkeyPatch, happens: Any) -> None:
    """Something happens between the record and the act of the next tick."""
    record = service.records.record

    def recorded(decision: Decision) -> None:
        record(decision)
        happens()

    monkeypatch.setattr(service.records, "record", recorded)


@pytest.mark.parametrize("what", ["owner", "unread", "edit"])
def test_what_becomes_known_before_the_act_forbids_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision={**AT_ONCE, "max_reading_age_s": 0.0}))
    world.run(service, 2)

    def happens() -> None:
        match what:
            case "owner":
                world.owners = ("HorizontalPodAutoscaler chat",)
            case "unread":
                world.owners_unread = (0,)
            case _:
                world.set([[1]])

    before = len(world.targets)
    then(service, monkeypatch, happens)
    (decision,) = world.run(service, 1)
    expected = {"owner": Reason.OTHER_AUTOSCALER, "unread": Reason.OWNER_UNKNOWN, "edit": Reason.FOREIGN_EDIT}[what]
    assert found(decision)[0] == "held"
    assert expected in found(decision)[1]
    assert str(decision.details["hold"][0]) != ""
    assert len(world.targets) == before
    service.close()


def test_a_young_reading_is_not_taken_twice(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 1)
    before = world.state_calls
    world.run(service, 1)
    assert world.state_calls - before == 2  # the watch's, and the simulated source's own
    service.close()


@pytest.mark.plays("a manual edit")
def test_the_hold_of_an_edit_ends_when_objectives_are_missed_for_want_of_replicas(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(mean_rps=LOAD_RPS, peak_rps=LOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.run(service, 20)
    assert in_force(world) > 1
    world.set([[1]])
    world.set_by = ("argo-rollouts",)
    decisions = world.run(service, 6)
    assert Reason.FOREIGN_EDIT in found(decisions[0])[1]
    assert str(decisions[0].details["hold"][0]) == "replicas were set to 1 by argo-rollouts"
    assert decisions[0].details["hold_until_s"][0] == pytest.approx(float(decisions[0].snapshot.time_s[0]) + 900.0)
    ended = next(decision for decision in decisions if found(decision)[0] == "scaled")
    assert "left alone no longer: objectives are missed" in str(ended.details["hold"][0])
    assert in_force(world) > 1
    service.close()


def test_the_hold_of_an_edit_to_nothing_ends_when_requests_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway without a server refuses at once: nothing waits, and nothing is measured that could miss objectives."""
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(mean_rps=LOAD_RPS, peak_rps=LOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.run(service, 20)
    read, none = world.read, np.zeros(1)

    def refused() -> Snapshot:
        nan = np.full(1, np.nan)
        return replace(read(), queue_requests=none, waiting=none[:, None], ttft_attainment=nan, tpot_attainment=nan)

    monkeypatch.setattr(world, "read", refused)
    world.set([[0]])
    decisions = world.run(service, 6)
    assert "scaled" in [found(decision)[0] for decision in decisions]
    assert in_force(world) >= 1
    service.close()


def test_whoever_sets_replicas_may_be_called_anything(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(mean_rps=LOAD_RPS, peak_rps=LOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision={**AT_ONCE, "edit_hold_yields_to_slo": False}))
    world.run(service, 20)
    world.set([[1]])
    world.set_by = ("{service[0]} {nobody}",)
    (decision,) = world.run(service, 1)
    assert str(decision.details["hold"][0]) == "replicas were set to 1 by {service[0]} {nobody}"
    service.close()


def test_the_operator_can_say_that_an_edit_is_left_alone_even_so(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    supervision = {**AT_ONCE, "edit_hold_yields_to_slo": False}
    service = world.service(live_config(tmp_path, supervision=supervision))
    world.run(service, 40)
    world.set([[1]])
    assert {found(decision)[0] for decision in world.run(service, 20)} == {"held"}
    assert in_force(world) == 1
    service.close()


def test_a_pause_is_not_ended_by_missed_objectives(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.run(service, 2)
    Controls(service.database).set_mode(["chat"], Mode.PAUSED)
    service.heartbeat.beat()
    before = in_force(world)
    assert {found(decision)[0] for decision in world.run(service, 20)} == {"held"}
    assert in_force(world) == before
    assert service.supervisor.holds() == [
        Hold(Reason.PAUSED, "paused by an order; `jevons resume chat` ends it", None),
    ]
    service.close()


def test_an_edit_upward_in_an_incident_is_left_alone_though_objectives_are_missed(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.run(service, 1)
    assert in_force(world) < 12
    world.set([[12]])
    decisions = world.run(service, 6)
    assert {found(decision)[0] for decision in decisions} == {"held"}
    assert in_force(world) == 12
    service.close()


def controller_puts_back(world: LiveWorld, replicas: int) -> None:
    """Another controller's reconcile loop: it answers each write at once."""
    world.after_apply = lambda: world.set([[replicas]])


@pytest.mark.plays(
    "another controller puts replicas back",
    "the second time in a row it is an owner: held (`other_autoscaler`) until `jevons resume`",
)
def test_the_second_silent_revert_makes_an_owner_and_ends_the_tug_of_war(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.set_by = ("engine-operator",)
    controller_puts_back(world, 2)
    decisions = world.run(service, 60)
    raised = [target for target in world.targets if target.replicas[0, 0] > 2]
    assert len(raised) == 2
    assert found(decisions[-1])[0] == "held"
    assert Reason.OTHER_AUTOSCALER in found(decisions[-1])[1]
    (hold,) = service.supervisor.holds()
    assert hold == Hold(
        Reason.OTHER_AUTOSCALER,
        "engine-operator has put replicas back to 2 each time they were set here; let only one of the two scale, then "
        "`jevons resume chat`",
    )
    # It outlives a restart, and an order ends it.
    service.close()
    world.stopped = False
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    assert Reason.OTHER_AUTOSCALER in found(world.run(service, 1)[-1])[1]
    world.after_apply = lambda: None
    Controls(service.database).resume(["chat"], Mode.ACT)
    service.heartbeat.beat()
    world.run(service, 2)
    assert in_force(world) > 2
    service.close()


def test_edits_of_a_person_far_apart_make_no_owner(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(mean_rps=LOAD_RPS, peak_rps=LOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision={**AT_ONCE, "edit_hold_s": 45.0, "revert_s": 30.0}))
    world.run(service, 10)
    for _ in range(3):
        world.set([[9]])
        assert Reason.FOREIGN_EDIT in found(world.run(service, 1)[-1])[1]
        world.run(service, 25)
        assert in_force(world) < 9
    service.close()


def test_counts_that_are_declared_to_be_ours_are_put_back_at_once(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    world.edits_put_back = True
    service = world.service(live_config(tmp_path, supervision=AT_ONCE))
    world.run(service, 40)
    ours = in_force(world)
    world.set([[1]])
    assert found(world.run(service, 1)[-1])[0] in {"scaled", "unchanged"}
    assert in_force(world) >= ours - 1
    controller_puts_back(world, 1)
    assert Reason.OTHER_AUTOSCALER in found(world.run(service, 6)[-1])[1]
    service.close()


def test_an_edit_that_a_failed_write_ran_into_is_left_alone(tmp_path: Path) -> None:
    """The actuator refuses to overwrite it, and the next tick must not do so either."""
    world = LiveWorld([service_spec()], [burst(mean_rps=OVERLOAD_RPS, peak_rps=OVERLOAD_RPS)])
    service = world.service(live_config(tmp_path, supervision={**AT_ONCE, "edit_hold_yields_to_slo": False}))

    def somebody_scales_first() -> None:
        world.set([[3]])
        world.refusing, world.before_apply = True, lambda: None

    world.before_apply = somebody_scales_first
    (decision,) = world.run(service, 1)
    assert decision.settled.replicas[0, 0] > 3
    assert Reason.ACTUATION_FAILED in found(decision)[1]
    world.refusing = False
    (decision,) = world.run(service, 1)
    assert Reason.FOREIGN_EDIT in found(decision)[1]
    assert in_force(world) == 3
    service.close()
