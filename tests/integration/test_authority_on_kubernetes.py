"""A whole live service that scales a Deployment of a real API server, while others write it too.

Load, engines and time are simulated; the simulated fleet has the replicas that the server says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kube_objects import DEPLOYMENTS, replicas_of
from kube_server import KubeApiServer
from live_fakes import LiveWorld, burst, live_config, service_spec
from test_kubernetes_events import told
from test_kubernetes_owners import replicas, setters

from autoscaler.actuators.base import Announcement, FleetState
from autoscaler.actuators.kube_api import KubeApi, KubeConnection
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.authority.controls import Controls, Mode
from autoscaler.hosting.service import LiveService
from policies.contract import Bools, Floats, Outcome, Target

LOAD_RPS, OVERLOAD_RPS = 8.0, 40.0


class ScaledOnKubernetes(LiveWorld):
    """A simulated fleet whose counts are those of a Deployment."""

    def __init__(self, kube: KubeApiServer, rps: float, initial_replicas: int, **options: Any) -> None:
        spec = service_spec(initial_replicas=initial_replicas)
        super().__init__([spec], [burst(mean_rps=rps, peak_rps=rps)])
        connection = KubeConnection(kubeconfig=kube.kubeconfig, timeout_s=1.0, deadline_s=3.0)
        self.actuator = KubernetesActuator(KubernetesConfig(connection=connection, **options), [spec])
        self.writes: list[int] = []

    def state(self) -> FleetState:
        told = self.actuator.state()
        self.set(told.replicas_target)
        kept = {name: getattr(told, name) for name in ("replicas_target", "owners", "owners_unread", "problems")}
        return replace(super().state(), set_by=told.set_by, edits_put_back=told.edits_put_back, **kept)

    def apply(self, target: Target) -> None:
        self.actuator.apply(target)
        wrote = self.actuator.wrote()[0, 0]
        if wrote == wrote:
            self.writes.append(int(wrote))
            self.after_apply()

    def wrote(self) -> Floats:
        return self.actuator.wrote()

    def announce(self, announcement: Announcement) -> None:
        self.actuator.announce(announcement)

    def route(self, rows: Bools, adrift: Bools) -> None:
        """Nothing routes here."""


def outcome(service: LiveService) -> str:
    assert service.last is not None
    return Outcome(int(service.last.outcome[0])).name.lower()


def hold(service: LiveService) -> str:
    assert service.last is not None
    return str(service.last.details["hold"][0])


def test_a_controller_that_puts_replicas_back_is_recognised_and_named(
    kube: KubeApiServer, api: KubeApi, tmp_path: Path
) -> None:
    world = ScaledOnKubernetes(kube, OVERLOAD_RPS, initial_replicas=2)

    def reconcile() -> None:
        api.merge(f"{DEPLOYMENTS}/chat", replicas(2), fieldManager="engine-operator")

    world.after_apply = reconcile
    service = world.service(live_config(tmp_path))
    world.run(service, 40)
    assert len(world.writes) == 2
    assert replicas_of(kube, "chat") == 2
    sentence = (
        "engine-operator has put replicas back to 2 each time they were set here; let only one of the two scale, then "
        "`jevons resume chat`"
    )
    assert (outcome(service), hold(service)) == ("held", sentence)
    warnings = [(reason, note) for kind, reason, note, _ in told(api) if kind == "Warning"]
    assert ("OtherAutoscaler", sentence) in warnings
    world.after_apply = lambda: None
    Controls(service.database).resume(["chat"], Mode.ACT)
    service.heartbeat.beat()
    world.run(service, 2)
    assert replicas_of(kube, "chat") > 2
    service.close()


def test_an_edit_under_load_is_named_and_left_alone_only_until_objectives_are_missed(
    kube: KubeApiServer, api: KubeApi, tmp_path: Path
) -> None:
    world = ScaledOnKubernetes(kube, LOAD_RPS, initial_replicas=2)
    service = world.service(live_config(tmp_path))
    world.run(service, 20)
    api.merge(f"{DEPLOYMENTS}/chat", replicas(1), fieldManager="kubectl-edit")
    world.run(service, 1)
    assert (outcome(service), hold(service)) == ("held", "replicas were set to 1 by kubectl-edit")
    for _ in range(6):
        world.run(service, 1)
        if outcome(service) == "scaled":
            break
    assert "left alone no longer: objectives are missed" in hold(service)
    assert replicas_of(kube, "chat") > 1
    service.close()


def test_an_edit_of_a_declared_count_lasts_one_tick(kube: KubeApiServer, api: KubeApi, tmp_path: Path) -> None:
    world = ScaledOnKubernetes(kube, OVERLOAD_RPS, initial_replicas=2, own_replicas=True)
    service = world.service(live_config(tmp_path))
    world.run(service, 10)
    ours = replicas_of(kube, "chat")
    assert ours == 12  # the maximum, so that it stays
    assert setters(api) == [("jevons", "Apply")]
    api.merge(f"{DEPLOYMENTS}/chat", replicas(1), fieldManager="kubectl-edit")
    world.run(service, 1)
    assert outcome(service) != "held"
    assert (replicas_of(kube, "chat"), setters(api)) == (ours, [("jevons", "Apply")])
    service.close()


def test_counts_are_events_with_their_reason(kube: KubeApiServer, api: KubeApi, tmp_path: Path) -> None:
    world = ScaledOnKubernetes(kube, OVERLOAD_RPS, initial_replicas=2)
    service = world.service(live_config(tmp_path))
    world.run(service, 5)
    ups = [note for kind, reason, note, _ in told(api) if (kind, reason) == ("Normal", "ScaledUp")]
    assert len(ups) == len(world.writes)
    assert any(note.startswith(f"from 2 to {world.writes[0]} replicas by token-demand") for note in ups)
    assert service.problems() == []
    service.close()
