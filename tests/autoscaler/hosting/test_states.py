"""The state of each service in one word, with its cause: in status, in JSON and in metrics."""

from __future__ import annotations

import json
import os
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from autoscaler.authority.controls import Controls, Mode
from autoscaler.authority.leases import NOT_HELD, holder_name
from autoscaler.hosting.service import LiveService
from autoscaler.hosting.states import State, states_of
from autoscaler.hosting.status import status_of
from autoscaler.records.database import CONTROLLERS
from autoscaler.records.explain import MEANINGS
from policies.contract import Decision, MetricsUnavailable, Outcome, Reason, Snapshot


@pytest.fixture
def world() -> LiveWorld:
    return LiveWorld([service_spec()], [burst(peak_rps=4.0)])


def shown(service: LiveService) -> tuple[str, str]:
    """State and reason of the only service, as `jevons status` has them."""
    (row,) = status_of(service.config, service.database)["services"]
    return row["state"], row["reason"]


def metrics(service: LiveService) -> dict[tuple[str, ...], float]:
    """Samples by name and label values, the service first."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels, key=lambda one: one != "service"))): (
            sample.value
        )
        for family in text_string_to_metric_families(generate_latest(service.registry).decode())
        for sample in family.samples
    }


def test_a_service_that_is_decided_on_is_ready(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    assert shown(service)[0] == "held"
    assert shown(service)[1] == "no controller runs"
    world.run(service, 3)
    assert shown(service)[0] == "ready"
    found = metrics(service)
    assert found["jevons_service_state", "chat", "ready"] == 1.0
    assert found["jevons_service_state", "chat", "blind"] == 0.0
    assert found["jevons_leader", "chat"] == 1.0
    assert found["jevons_mode", "chat", "act"] == 1.0
    assert found["jevons_mode", "chat", "advise"] == 0.0
    assert found["jevons_kill_switch", "chat"] == 0.0
    assert found["jevons_owner_conflict", "chat"] == 0.0
    assert found["jevons_problems",] == 0.0
    assert 0.0 <= found["jevons_tick_age_seconds",] < found["jevons_tick_stall_seconds",]
    service.close()


def test_what_the_alerts_compare_is_there(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    found, pool = metrics(service), "llama-3.1-8b-l40s"
    assert found["jevons_stuck_replicas", "chat"] == 0.0
    assert found["jevons_attainment_target_ratio", "chat"] == 0.95
    assert (found["jevons_min_replicas", "chat", pool], found["jevons_max_replicas", "chat", pool]) == (1.0, 12.0)
    service.state.last = replace(service.state.last, replicas_stuck=np.array([[2.0]]))
    assert metrics(service)["jevons_stuck_replicas", "chat"] == 2.0
    world.replicas_stuck = np.array([[1.0]])  # type: ignore[attr-defined]  # found where the actuator does not count
    assert metrics(service)["jevons_stuck_replicas", "chat"] == 3.0
    service.close()


def test_a_blind_service_names_what_failed(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    world.blind = True
    world.run(service, 1)
    assert shown(service) == ("blind", "no answer")
    found = metrics(service)
    assert found["jevons_service_state", "chat", "blind"] == 1.0
    assert found["jevons_stage_errors_total", "read"] == 1.0
    world.blind = False
    world.run(service, 1)
    assert shown(service)[0] == "ready"
    service.close()


def test_paused_says_by_whom_and_the_way_out(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    Controls(service.database).set_mode(["chat"], Mode.PAUSED)
    state, reason = shown(service)  # before the controller has heard of it
    assert state == "paused"
    assert reason.startswith("paused by ")
    assert reason.endswith("`jevons resume chat` ends it")
    service.heartbeat.beat()
    world.run(service, 1)
    assert metrics(service)["jevons_service_state", "chat", "paused"] == 1.0
    (tmp_path / "STOP").touch()
    world.run(service, 1)
    assert shown(service)[1].startswith("kill switch: ")
    assert metrics(service)["jevons_kill_switch", "chat"] == 1.0
    service.close()


def test_another_autoscaler_is_named(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.owners = ("HorizontalPodAutoscaler chat",)
    world.run(service, 2)
    assert shown(service)[0] == "held"
    assert metrics(service)["jevons_owner_conflict", "chat"] == 1.0
    service.close()


def measured(**numbers: float) -> Snapshot:
    """One service with one pool; what is not given is 0."""
    one = object.__new__(Snapshot)
    for field in fields(Snapshot):
        shape = (1, 1) if field.name in ("running", "waiting", "batch_cap") else (1,)
        object.__setattr__(one, field.name, np.full(shape, numbers.get(field.name, 0.0)))
    return one


def test_each_service_names_the_trouble_of_its_own_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [service_spec("chat"), service_spec("code"), service_spec("mail")]
    world = LiveWorld(specs, [burst()] * 3)
    service = world.service(live_config(tmp_path, *specs))
    world.run(service, 1)
    troubles = ("Lease jevons-chat: HTTP 500", "Lease jevons-code: HTTP 403", "")
    held = service.leases.renew()
    monkeypatch.setattr(service.leases, "renew", lambda: np.array([*held[:2], NOT_HELD]))
    monkeypatch.setattr(service.leases, "unread", lambda: troubles)
    service.heartbeat.beat()
    assert service.states()["code"].state == "ready"  # it is trusted for a while
    pulse = service.heartbeat.pulse
    service.heartbeat.pulse = replace(pulse, beat_s=np.array([-np.inf, -np.inf, pulse.beat_s[2]]))
    holds = service.supervisor.holds()
    assert [hold.detail for hold in holds if hold] == [
        *troubles[:2],
        "another controller holds the lease, or this one could not renew it",
    ]
    world.run(service, 1)
    rows = status_of(service.config, service.database)["services"]
    assert [row["reason"] for row in rows] == [
        "no controller decides on it; Lease jevons-chat: HTTP 500",
        "no controller decides on it; Lease jevons-code: HTTP 403",
        "no controller decides on it",
    ]
    service.close()


def decided(outcome: Outcome, reasons: Reason, **details: Any) -> Decision:
    """A decision about one service of which only these matter."""
    made = object.__new__(Decision)
    snapshot = measured(running=np.nan if Reason.MISSING_METRICS in reasons else 1.0, batch_cap=details.pop("cap", 8.0))
    object.__setattr__(made, "snapshot", snapshot)
    values = {"outcome": np.array([outcome]), "reasons": np.array([int(reasons)]), "details": details}
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize(
    ("decision", "problems", "state", "reason", "until_s"),
    [
        (
            decided(
                Outcome.HELD,
                Reason.FOREIGN_EDIT | Reason.COOLDOWN,
                hold=np.array(["replicas were set to 9 by kubectl"]),
                hold_until_s=np.array([1234.0]),
            ),
            (),
            State.HELD,
            "replicas were set to 9 by kubectl",
            1234.0,
        ),
        (
            decided(Outcome.HELD, Reason.MISSING_METRICS),
            ("chat-2: 1 of 3 replicas are scraped", "chat: 3 of 4 replicas are scraped"),
            State.BLIND,
            "chat: 3 of 4 replicas are scraped; missing: running",
            None,
        ),
        (
            decided(Outcome.HELD, Reason.MISSING_METRICS),
            (),
            State.BLIND,
            "replica counts or any sign of load were missing, so nothing was changed; missing: running",
            None,
        ),
        (
            decided(Outcome.ADVISED, Reason.PARTLY_BLIND, cap=np.nan),
            (),
            State.READY,
            "some measurements were missing, so the baseline decided (missing: batch_cap)",
            None,
        ),
        (  # a blind tick that comes down to a lowered maximum
            decided(Outcome.SCALED, Reason.MISSING_METRICS | Reason.BOUNDS),
            (),
            State.READY,
            f"{MEANINGS[Reason.MISSING_METRICS]} (missing: running); {MEANINGS[Reason.BOUNDS]}",
            None,
        ),
        (decided(Outcome.HELD, Reason.ACTUATION_FAILED), (), State.HELD, "HTTP 403", None),
        (
            decided(Outcome.UNCHANGED, Reason.COOLDOWN),
            (),
            State.READY,
            "the last change was too recent for a scale-down",
            77.0,
        ),
        (decided(Outcome.SCALED, Reason.NONE), (), State.READY, "", None),
    ],
)
def test_reason_and_end(
    decision: Decision, problems: tuple[str, ...], state: State, reason: str, until_s: float | None
) -> None:
    (found,) = states_of(decision, ["chat"], [Mode.ACT], [""], {"act": "HTTP 403"}, {}, problems, np.array([77.0]))
    assert (found.state, found.reason, found.until_s) == (state, reason, until_s)


def test_dead_processes_leave_and_the_last_one_stays(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 1)

    def lived(pid: int, silent_s: float, doing: str = "acts", controller: str = "jevons") -> None:
        status = {"controller": controller, "doing": doing, "states": {}, "problems": []}
        values = {"name": f"{controller} {pid}", "host": "elsewhere", "pid": pid, "status": status}
        with service.database.begin() as connection:
            connection.execute(CONTROLLERS.insert().values(beat_s=time.time() - silent_s, **values))

    lived(1, 3000.0)
    lived(2, 20.0, "stopped")
    lived(3, 100.0)
    lived(4, 5000.0, controller="other")
    found = [(one["name"], one["doing"]) for one in status_of(service.config, service.database)["controllers"]]
    assert found[1:] == [("jevons 3", "silent"), ("other 4", "silent")]
    assert found[0][1] == "acts"
    service.close()
    with service.database.begin() as connection:
        connection.execute(CONTROLLERS.update().values(beat_s=time.time() - 100.0))
    (row,) = status_of(service.config, service.database)["services"]
    assert row["state"] == "held"


def test_a_process_that_was_killed_leaves_and_one_that_may_wake_leads_nothing(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    host, namespace, *_ = holder_name("jevons").split("/")

    def lived(name: str, process: str, silent_s: float, state: str = "acts") -> None:
        status = {"controller": "jevons", "doing": state, "states": {"chat": {}}, "problems": [], "leads": 1}
        values = {"name": name, "host": host, "pid": 1, "status": {**status, "process": process}}
        with service.database.begin() as connection:
            connection.execute(CONTROLLERS.insert().values(beat_s=time.time() - silent_s, **values))

    def known() -> list[tuple[str, str, int]]:
        found = status_of(service.config, service.database)["controllers"]
        return [(one["name"], one["doing"], one["leads"]) for one in found]

    lived("killed", f"{host}/{namespace}/{os.getpid()}/1/jevons", 5.0)  # its number is another process's now
    assert known() == [("killed", "silent", 1)]  # nobody runs: it shows since when
    world.run(service, 1)
    lived("elsewhere", f"elsewhere/{namespace}/1/1/jevons", 100.0)
    lived("frozen", holder_name("jevons"), 100.0)
    assert [one[1:] for one in known()] == [("acts", 1), ("silent", 0), ("silent", 0)]
    assert {one[0] for one in known()[1:]} == {"elsewhere", "frozen"}
    service.close()


def test_a_standby_shows_no_gauges_of_the_time_when_it_led(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    assert ("jevons_ready_replicas", "chat", "llama-3.1-8b-l40s") in metrics(service)
    tokens = service.heartbeat.pulse.tokens
    service.heartbeat.pulse = replace(service.heartbeat.pulse, tokens=np.full_like(tokens, -1))
    world.run(service, 1)
    found = metrics(service)
    assert ("jevons_ready_replicas", "chat", "llama-3.1-8b-l40s") not in found
    assert ("jevons_service_state", "chat", "ready") not in found
    assert found["jevons_leader", "chat"] == 0.0
    assert found["jevons_decisions_total", "chat", "scaled"] >= 1.0  # counters stay
    service.close()


def test_status_is_plain_data(world: LiveWorld, tmp_path: Path) -> None:
    service = world.service(live_config(tmp_path))
    world.read = lambda: (_ for _ in ()).throw(MetricsUnavailable("http://prometheus: HTTP 401"))  # type: ignore[method-assign]
    world.run(service, 1)
    (row,) = json.loads(json.dumps(status_of(service.config, service.database)))["services"]
    assert (row["state"], row["reason"], row["until_s"]) == ("blind", "http://prometheus: HTTP 401", None)
    service.close()
