"""A whole live service on a simulated cluster: what it may do, what stops it, and what a restart must not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.controls import Controls, Mode
from autoscaler.authority.leases import NOT_HELD, LeasesUnavailable
from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.service import LiveService
from autoscaler.records.database import STATES, put
from autoscaler.records.ticks import read_ticks
from policies.contract import LEAVE_ALONE, Decision, Outcome, Reason, take_rows
from policies.redaction import LONGEST


def outcomes(decisions: list[Decision | None], row: int = 0) -> list[tuple[str, list[str]]]:
    return [
        ("stands by", [])
        if decision is None
        else (Outcome(int(decision.outcome[row])).name.lower(), Reason(int(decision.reasons[row])).words())
        for decision in decisions
    ]


def targets(decisions: list[Any], row: int = 0) -> list[int]:
    return [int(decision.settled.replicas[row].sum()) for decision in decisions]


@pytest.fixture
def world() -> LiveWorld:
    return LiveWorld([service_spec()], [burst()])


def test_acting_follows_a_burst_up_and_down(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    decisions = world.run(service, 100)
    in_force = [int(decision.snapshot.replicas_target[0, 0]) for decision in decisions if decision]
    assert max(in_force) >= 6
    assert in_force[-1] < max(in_force)
    assert in_force[1:] == targets(decisions)[:-1]
    service.close()


def test_advising_changes_nothing_and_says_from_where_the_fleet_stands(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path, mode="advise"))
    decisions = world.run(service, 60)
    assert world.targets == []
    assert {outcome for outcome, _ in outcomes(decisions)} == {"advised"}
    assert {int(decision.snapshot.replicas_target[0, 0]) for decision in decisions} == {2}
    # Every step is one that could be made from the two replicas that are there: at most to four times as many.
    assert max(targets(decisions)) == 4 * 2
    service.close()


def test_advising_is_the_default(tmp_path: Path) -> None:
    given = live_config(tmp_path).model_dump(exclude={"mode"})
    assert type(live_config(tmp_path)).model_validate(given).mode == Mode.ADVISE


def test_modes_are_per_service_and_orders_are_followed_at_the_next_beat(tmp_path: Path) -> None:
    specs = [service_spec("a"), service_spec("b"), service_spec("c")]
    world = LiveWorld(specs, [burst(seed=seed) for seed in range(3)])
    service = world.service(live_config(tmp_path, *specs, mode="advise"))
    Controls(service.database).set_mode(["b"], Mode.ACT)
    Controls(service.database).set_mode(["c"], Mode.PAUSED)
    service.heartbeat.beat()
    decisions = world.run(service, 48)
    decision = decisions[-1]
    a, b, c = ({outcome for outcome, _ in outcomes(decisions, row)} for row in range(3))
    assert (a, "scaled" in b, b <= {"scaled", "unchanged"}, c) == ({"advised"}, True, True, {"held"})
    assert "paused" in Reason(int(decision.reasons[2])).words()
    in_force = world.state().replicas_target[:, 0]
    assert in_force[0] == 2
    assert in_force[1] > 2
    assert in_force[2] == 2
    service.close()


@pytest.mark.parametrize("way", ["file", "database"])
def test_the_kill_switch_stops_everything_at_once(world: LiveWorld, tmp_path: Path, way: str) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 5)
    before = len(world.targets)
    if way == "file":
        (tmp_path / "STOP").touch()
    else:
        Controls(service.database).kill()
        service.heartbeat.beat()
    stopped = world.run(service, 3)
    assert [outcome for outcome, _ in outcomes(stopped)] == ["held"] * 3
    assert all("kill_switch" in reasons for _, reasons in outcomes(stopped))
    assert len(world.targets) == before
    (tmp_path / "STOP").unlink(missing_ok=True)
    Controls(service.database).revive()
    service.heartbeat.beat()
    world.run(service, 1)
    assert len(world.targets) == before + 1
    service.close()


def test_the_kill_file_counts_between_the_decision_and_the_act(
    world: LiveWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller that is stuck with a target in its hands must not carry it out when it comes loose."""
    service = world.service(live_config(tmp_path))
    world.run(service, 3)
    record, before = service.records.record, len(world.targets)

    def stuck(decision: Decision) -> None:
        record(decision)
        (tmp_path / "STOP").touch()

    monkeypatch.setattr(service.records, "record", stuck)
    decision = world.run(service, 1)[-1]
    assert outcomes([decision])[0][0] == "held"
    assert "kill_switch" in outcomes([decision])[0][1]
    assert len(world.targets) == before
    service.close()


def test_a_decision_that_is_too_old_is_not_carried_out(
    world: LiveWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 3)
    before = len(world.targets)
    record = service.records.record

    def slow(decision: Decision) -> None:
        record(decision)
        world.wait_until(world.now_s + 40.0)

    monkeypatch.setattr(service.records, "record", slow)
    decision = world.run(service, 1)[-1]
    assert "overdue" in outcomes([decision])[0][1]
    assert len(world.targets) == before
    service.close()


def test_what_cannot_be_recorded_is_not_carried_out(
    world: LiveWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 40)
    before, record = len(world.targets), service.records.record

    def full(decision: Decision) -> None:
        raise RecordsUnavailable("disk full")

    monkeypatch.setattr(service.records, "record", full)
    lost = world.run(service, 3)
    assert all(outcome == "held" and "not_recorded" in reasons for outcome, reasons in outcomes(lost))
    assert len(world.targets) == before
    monkeypatch.setattr(service.records, "record", record)
    assert outcomes(world.run(service, 1))[0][0] in {"scaled", "unchanged"}
    service.close()


def test_blind_ticks_hold_and_the_first_sight_goes_on(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 44)
    in_force = world.state().replicas_target[0, 0]
    world.blind = True
    assert [outcome for outcome, _ in outcomes(world.run(service, 5))] == ["held"] * 5
    assert world.state().replicas_target[0, 0] == in_force
    world.blind = False
    assert outcomes(world.run(service, 1))[0][0] in {"scaled", "unchanged"}
    service.close()


@pytest.mark.plays(
    "a manual edit",
    "left alone for `edit_hold_s` (`foreign_edit`), then the new start; earlier when objectives are missed for want of "
    "replicas",
)
def test_a_manual_edit_is_left_alone_for_a_while_and_then_taken_as_the_start(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    config = live_config(tmp_path, supervision={"edit_hold_s": 120.0, "revalidation": {"wait_s": 0.0}})
    service = world.service(config)
    world.run(service, 10)
    world.set([[9]])
    held = world.run(service, 8)
    assert [outcome for outcome, _ in outcomes(held)] == ["held"] * 8
    assert all("foreign_edit" in reasons for _, reasons in outcomes(held))
    assert world.state().replicas_target[0, 0] == 9
    after = world.run(service, 8)
    assert outcomes(after)[-1][0] in {"scaled", "unchanged"}
    assert world.state().replicas_target[0, 0] < 9
    service.close()


def test_every_new_edit_starts_the_hold_anew_and_resume_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LiveWorld([service_spec()], [burst(peak_rps=4.0)])
    service = world.service(live_config(tmp_path, supervision={"edit_hold_s": 120.0}))
    world.run(service, 10)
    for replicas in (9, 5, 7):
        world.set([[replicas]])
        assert all("foreign_edit" in reasons for _, reasons in outcomes(world.run(service, 6)))
    monkeypatch.setattr("autoscaler.authority.controls.time.time", lambda: 1.0)  # a host whose clock is behind
    Controls(service.database).resume(["chat"], Mode.ACT)
    service.heartbeat.beat()
    assert "foreign_edit" not in outcomes(world.run(service, 1))[0][1]
    service.close()


@pytest.mark.plays("HPA on the same target")
def test_another_autoscaler_on_the_same_target_is_never_fought(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 5)
    world.owners = ("HorizontalPodAutoscaler chat",)
    before = len(world.targets)
    held = world.run(service, 5)
    # The owner is read with the first of these ticks, and counts from it on.
    assert all("other_autoscaler" in reasons for _, reasons in outcomes(held))
    assert len(world.targets) == before
    world.owners = ("",)
    assert outcomes(world.run(service, 2))[-1][0] in {"scaled", "unchanged"}
    service.close()


@pytest.mark.plays("HPAs or ScaledObjects cannot be read")
def test_an_owner_that_cannot_be_read_forbids(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 5)
    world.owners_unread = (0,)
    before = len(world.targets)
    assert all(outcome == "held" and "owner_unknown" in why for outcome, why in outcomes(world.run(service, 5)))
    assert len(world.targets) == before
    world.owners_unread = ()
    assert outcomes(world.run(service, 2))[-1][0] in {"scaled", "unchanged"}
    service.close()


def test_a_service_that_cannot_be_scaled_does_not_hold_up_the_others(tmp_path: Path) -> None:
    specs = [service_spec("a"), service_spec("b")]
    world = LiveWorld(specs, [burst(), burst()])
    world.refused = ("a",)
    service = world.service(live_config(tmp_path, *specs))
    decisions = world.run(service, 45)
    assert all(outcome == "held" and "actuation_failed" in why for outcome, why in outcomes(decisions))
    assert service.states()["a"].reason == "forbidden"
    assert {outcome for outcome, _ in outcomes(decisions, row=1)} <= {"scaled", "unchanged"}
    assert world.state().replicas_target[0, 0] == 2
    assert world.state().replicas_target[1, 0] > 2
    world.refused = ()
    world.run(service, 2)
    assert world.state().replicas_target[0, 0] > 2
    service.close()


def test_a_scale_down_is_looked_at_twice(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(peak_rps=4.0)])
    service = world.service(live_config(tmp_path, supervision={"revalidation": {"wait_s": 30.0}}))
    decisions = world.run(service, 6)
    waits = ["revalidating" in reasons for _, reasons in outcomes(decisions)]
    first = waits.index(True)
    assert waits[first : first + 2] == [True, True]
    assert targets(decisions)[first : first + 2] == [6, 6]
    assert targets(decisions)[first + 2] < 6
    prices = [decision.details["own/usd_per_hour"][0] / decision.settled.replicas.sum() for decision in decisions]
    assert prices == pytest.approx([prices[0]] * len(prices))  # of the target that was settled in the end
    service.close()


def test_a_lower_maximum_needs_no_second_look_and_is_reached_step_by_step(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=12)], [burst(mean_rps=40.0)])
    config = live_config(tmp_path, service_spec(max_replicas=2), supervision={"revalidation": {"wait_s": 1e6}})
    service = world.service(config)
    decisions = world.run(service, 5)
    assert targets(decisions)[:3] == [6, 3, 2]
    assert [outcome for outcome, _ in outcomes(decisions)][:3] == ["scaled"] * 3
    service.close()


def test_a_refused_scale_down_is_no_change_and_stays_named_until_it_is_done(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6), service_spec("b")], [burst(peak_rps=4.0), burst()])
    config = live_config(tmp_path, *world.specs, supervision={"revalidation": {"wait_s": 30.0}})
    service = world.service(config)
    world.refused = ("chat",)
    decisions = world.run(service, 20)
    found, first = outcomes(decisions), targets(decisions).index(3)
    assert {outcome for outcome, _ in found[first:]} == {"held"}
    assert all("actuation_failed" in reasons and "cooldown" not in reasons for _, reasons in found[first:])
    assert service.states()["chat"].reason == "forbidden"
    assert [one.reason for one in world.announced if one.row == 0] == ["ActuationFailed"]
    world.refused = ()
    assert outcomes(world.run(service, 1))[0][0] == "scaled"
    assert [one.reason for one in world.announced if one.row == 0] == ["ActuationFailed", "ScaledDown"]
    assert service.problems() == []
    service.close()


def test_a_count_that_waits_for_a_drain_is_no_change_until_it_is_written(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(initial_replicas=6)], [burst(peak_rps=4.0)])
    service = world.service(live_config(tmp_path, supervision={"revalidation": {"wait_s": 30.0}}))
    world.busy = ("chat",)
    decisions = world.run(service, 20)
    found = outcomes(decisions)
    first = next(tick for tick, (_, reasons) in enumerate(found) if "draining" in reasons)
    assert all("draining" in reasons for _, reasons in found[first:])
    assert [outcome for outcome, _ in found[first:]].count("scaled") <= 1  # its batch cap
    assert not any("cooldown" in reasons for _, reasons in found[first:])
    assert (set(targets(decisions)), world.announced) == ({6}, [])
    assert "finish their requests first" in service.states()["chat"].reason
    world.busy = ()
    decisions = world.run(service, 2)
    assert outcomes(decisions)[0][0] == "scaled"
    assert "cooldown" in outcomes(decisions)[1][1]
    assert [one.note.split(" by")[0] for one in world.announced] == [f"from 6 to {targets(decisions)[0]} replicas"]
    service.close()


def test_after_refused_writes_a_step_counts_from_what_is_in_force(tmp_path: Path) -> None:
    world = LiveWorld([service_spec(max_replicas=40)], [burst(peak_rps=60.0)])
    service = world.service(live_config(tmp_path, service_spec(max_replicas=40)))
    world.run(service, 38)
    world.refused = ("chat",)
    world.run(service, 7)
    world.refused = ()
    assert world.state().replicas_target[0, 0] == 2
    assert targets(world.run(service, 3)) == [8, 32, 40]
    service.close()


def test_an_edit_while_nobody_knows_what_was_carried_out_is_the_new_start(tmp_path: Path) -> None:
    """Killed before the decision was concluded, then blind: what was remembered is not put back in one step."""
    world = LiveWorld([service_spec()], [burst(mean_rps=0.5, peak_rps=0.5)])
    service = world.service(live_config(tmp_path))
    world.run(service, 10)

    def kill() -> None:
        raise Killed

    world.after_apply = kill
    with pytest.raises(Killed):
        world.run(service, 1)
    world.after_apply = lambda: None
    service = world.service(live_config(tmp_path))
    world.blind = True
    world.run(service, 3)
    world.set([[8]])
    world.run(service, 2)
    world.blind = False
    assert sorted(set(targets(world.run(service, 12))), reverse=True) == [8, 4, 2, 1]
    service.close()


# Routing


def test_services_adrift_are_told_to_the_gateway_until_another_one_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 1)
    renew, now_s = service.leases.renew, time.monotonic() + 3600.0

    def away() -> None:
        raise LeasesUnavailable("no answer")

    monkeypatch.setattr(service.leases, "renew", away)
    monkeypatch.setattr(service.heartbeat, "_now", lambda: now_s)
    service.heartbeat.beat()
    world.run(service, 1)
    assert (world.routed, world.adrift) == ([[True], [False]], [[False], [True]])
    monkeypatch.setattr(service.leases, "renew", lambda: np.full_like(renew(), NOT_HELD))
    service.heartbeat.beat()
    world.run(service, 1)
    assert len(world.routed) == 2  # another one's
    service.close()


def test_routing_follows_at_every_tick_whatever_the_mode(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, mode="advise"))
    world.run(service, 2)
    Controls(service.database).set_mode(["chat"], Mode.PAUSED)
    world.run(service, 2)
    (tmp_path / "STOP").touch()
    world.blind = True
    world.run(service, 2)
    assert world.routed == [[True]] * 6
    assert world.targets == []
    service.close()


def test_a_gateway_that_does_not_answer_is_named_and_holds_nothing(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.unroutable = True
    decisions = world.run(service, 2)
    assert {outcome for outcome, _ in outcomes(decisions)} <= {"scaled", "unchanged"}
    assert "route: chat: the gateway does not answer" in service.status()["problems"]
    world.unroutable = False
    world.run(service, 1)
    assert service.status()["problems"] == []
    service.close()


# Restarts


PEERS = ("knative", "keda", "wva-v2", "autothrottle")


@pytest.mark.parametrize("reference", ["learned", "llm-d-slo"])
def test_a_restart_decides_as_if_nothing_had_happened(
    tmp_path: Path, new_database: Callable[[], str], reference: str
) -> None:
    """Decision for decision, with cooldowns, means, windows, error budget and second looks in the middle of things."""
    changes: dict[str, Any] = {
        "policy": {"reference": reference, "cache": tmp_path / "p"},
        "counterfactuals": PEERS,
        "supervision": {"revalidation": {"wait_s": 15.0}},
    }
    straight = LiveWorld([service_spec()], [burst()])
    service = straight.service(live_config(tmp_path, records={"url": new_database()}, **changes))
    expected = straight.run(service, 60)
    service.close()
    records = {"url": new_database()}
    broken, found = LiveWorld([service_spec()], [burst()]), []
    for ticks in (7, 36, 4, 13):
        service = broken.service(live_config(tmp_path, records=records, **changes))
        found += broken.run(service, ticks)
        broken.stopped = False
        del service  # killed: nothing is handed back
    assert targets(found) == targets(expected)
    assert outcomes(found) == outcomes(expected)
    assert [caps.settled.batch_cap.tolist() for caps in found] == [caps.settled.batch_cap.tolist() for caps in expected]
    for peer in PEERS:
        wishes = [
            [one.details[f"peer {peer}/replicas"].tolist() for one in decisions] for decisions in (found, expected)
        ]
        assert wishes[0] == wishes[1], peer


@pytest.mark.plays("a damaged memory of a service")
@pytest.mark.parametrize("older", [False, True], ids=["", "an older one is left"])
def test_with_a_damaged_memory_a_service_starts_from_the_fleet_as_it_is(tmp_path: Path, older: bool) -> None:
    """Also where the count would be an edit by an older memory, which is what is left."""
    world = LiveWorld([service_spec()], [burst(mean_rps=20.0, peak_rps=20.0)])
    first = world.service(live_config(tmp_path))
    world.run(first, 5)
    first.heartbeat.stop(release=False)
    with first.database.begin() as connection:
        row = connection.execute(STATES.select()).one()
        connection.execute(STATES.update().values(arrays=b"damaged"))
        if older:
            put(connection, STATES, {**row._mapping, "controller": "an earlier process"})
    world.set([[9]])
    second = world.service(live_config(tmp_path))
    (decision,) = world.run(second, 1)
    (problem,) = second.problems()
    assert problem.startswith(
        "the memory of chat is set aside, and the fleet taken as it is: a stored archive is damaged"
    )
    assert int(decision.details["in_force"][0, 0]) == 9
    assert "foreign_edit" not in outcomes([decision])[0][1]
    world.run(second, 1)
    assert second.problems() == []
    second.close()


def test_services_find_the_windows_of_their_policies_in_another_order(tmp_path: Path) -> None:
    """Two controllers become one: what each remembers is as long as it has run."""
    specs = [service_spec(name) for name in "abc"]
    world = LiveWorld(specs, [burst(seed=seed) for seed in range(3)])
    seen = []
    for _ in range(50):
        world.wait_until(world.now_s + 15.0)
        world.watch = lambda: None
        seen.append(world.read())
    config = live_config(tmp_path, *specs, policy={"reference": "llm-d-slo", "cache": tmp_path}, mode="advise")
    parts = []
    for rows, first in (([2], 0), ([1, 0], 25)):
        part = LiveService(
            config.model_copy(update={"services": tuple(specs[row] for row in rows)}), actuator=world, clock=world
        )
        for window in seen[first:]:
            part.ladder.propose(part.decider.observe(take_rows(window, np.array(rows))))
        parts.append(part)
    whole = LiveService(config, actuator=world, clock=world)
    for part, rows in zip(parts, ({2: 0}, {1: 0, 0: 1}), strict=True):
        assert whole.memory.restore(part.memory.state(), rows)[list(rows)].all()
    world.wait_until(world.now_s + 15.0)
    window = world.read()
    together = whole.ladder.propose(whole.decider.observe(window)).replicas
    for part, rows in zip(parts, ([2], [1, 0]), strict=True):
        alone = part.ladder.propose(part.decider.observe(take_rows(window, np.array(rows)))).replicas
        assert together[rows].tolist() == alone.tolist()


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.plays(
    "`kill -9` in mid tick, before and after the act",
    "the decision of the record is in force afterwards: nothing doubled, nothing lost",
)
@pytest.mark.parametrize("moment", ["before_apply", "after_apply"])
def test_killed_in_the_middle_of_a_tick_nothing_is_doubled_or_lost(
    tmp_path: Path, database_url: str, moment: str
) -> None:
    config = live_config(tmp_path, records={"url": database_url})
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(config)
    world.run(service, 41)
    in_force = int(world.state().replicas_target[0, 0])

    def kill() -> None:
        raise Killed

    while True:  # to the tick that scales up
        setattr(world, moment, kill)
        with pytest.raises(Killed):
            world.run(service, 1)
        setattr(world, moment, lambda: None)
        tick = read_ticks(service.database, last=1)[-1]
        settled = int(tick.target("settled").replicas.sum())
        assert not tick.concluded
        service = world.service(config)
        decision = world.run(service, 1)[-1]
        assert "foreign_edit" not in outcomes([decision])[0][1]
        if settled > in_force:
            break
        in_force = int(world.state().replicas_target[0, 0])
    # The decision in the record is in force after the restart, not twice and not undone: the cooldown holds it.
    assert targets([decision])[0] >= settled
    assert int(world.state().replicas_target[0, 0]) == targets([decision])[0]
    assert read_ticks(service.database, last=1)[-1].concluded
    service.close()


@pytest.mark.plays("two controllers")
def test_two_controllers_at_once_one_acts_and_the_other_takes_over(tmp_path: Path, database_url: str) -> None:
    config = live_config(tmp_path, records={"url": database_url})
    world = LiveWorld([service_spec()], [burst()])
    first = world.service(config)
    steady = [0.0]
    second = LiveService(config, source=world, actuator=world, clock=world)
    second.leases.holder = "elsewhere/1/1/1"  # type: ignore[attr-defined]
    second.leases._watch._now = lambda: steady[0]  # type: ignore[attr-defined]
    second.heartbeat.beat()
    world.run(first, 3)
    routed = len(world.routed)
    assert second.step() is None
    assert len(world.routed) == routed == 3  # only the leader routes
    first.heartbeat.thread.stopping.set()  # it hangs: no more beats
    steady[0] += 46.0
    second.heartbeat.beat()
    world.watch = second.state
    assert outcomes([second.step()])[0][0] in {"scaled", "unchanged"}
    # The first comes back to life in mid tick: its pulse still looks young, but its token is older.
    before = len(world.targets)
    world.watch = first.state
    late = world.run(first, 1)[-1]
    assert outcomes([late]) == [("held", [*outcomes([late])[0][1]])]
    assert "not_recorded" in outcomes([late])[0][1]
    assert len(world.targets) == before
    first.heartbeat.beat()
    assert first.step() is None


def test_down_ends_the_loop_and_hands_the_leases_back(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    Controls(service.database).end("jevons")
    service.heartbeat.beat()
    assert service.step() is None
    assert world.stopped
    service.close()
    successor = LiveService(live_config(tmp_path), source=world, actuator=world, clock=world)
    assert successor.heartbeat.beat().tokens.tolist() == [2]


def test_an_order_to_end_counts_on_whatever_clock_it_was_given(
    world: LiveWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = live_config(tmp_path)
    service = world.service(config)
    controls = Controls(service.database)
    controls.ended(config.name, controls.end(config.name))  # of an earlier life of this controller
    service.close()
    world.stopped = False
    service = world.service(config)
    world.run(service, 2)
    assert not world.stopped
    monkeypatch.setattr("autoscaler.authority.controls.time.time", lambda: 1.0)
    Controls(service.database).end(config.name)
    service.heartbeat.beat()
    assert service.step() is None
    assert world.stopped
    service.close()


@pytest.mark.parametrize(("mode", "outcome"), [(Mode.PAUSED, "held"), (Mode.ADVISE, "advised")])
def test_an_order_between_the_record_and_the_act_is_obeyed(
    world: LiveWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Mode, outcome: str
) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 5)
    record = service.records.record

    def then_order(decision: Decision) -> None:
        record(decision)
        Controls(service.database).set_mode(["chat"], mode)

    monkeypatch.setattr(service.records, "record", then_order)
    before = len(world.targets)
    ((found, _),) = outcomes(world.run(service, 1))
    assert found == outcome
    carried_out = [target.replicas[0].tolist() for target in world.targets[before:]]
    assert all(replicas == [LEAVE_ALONE] for replicas in carried_out)
    assert [tick.arrays["outcome"].tolist() for tick in read_ticks(service.database, last=1)] != []
    service.close()


def test_a_problem_is_no_longer_than_people_read(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    service.stages.errors["act"] = "x" * 1_000_000
    assert max(map(len, service.problems())) == LONGEST
    assert max(map(len, service.status()["problems"])) == LONGEST
    service.close()
