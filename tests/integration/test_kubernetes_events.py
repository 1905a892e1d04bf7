"""Kubernetes Events on the scaled objects, by a real API server's own word."""

from __future__ import annotations

import pytest
from kube_objects import DEPLOYMENTS, custom_kind
from kube_server import KubeApiServer
from test_kubernetes_owners import actuator

from autoscaler.actuators.base import Announcement
from autoscaler.actuators.kube_api import KubeApi
from policies.contract import ActuationFailed

EVENTS = "/api/v1/namespaces/default/events"
SCALED = Announcement(0, 0, False, "ScaledUp", "from 1 to 4 replicas by learned: the oldest request had waited")
HELD = Announcement(0, None, True, "OtherAutoscaler", "HorizontalPodAutoscaler default/cpu", 1_700_000_000.25)


def told(api: KubeApi) -> list[tuple[str, ...]]:
    fields = ("type", "reason", "message", "reportingComponent")
    return sorted(tuple(one[field] for field in fields) for one in api.items(EVENTS))


def test_changes_and_holds_are_events_on_the_object(kube: KubeApiServer, api: KubeApi) -> None:
    found = actuator(kube.kubeconfig)
    found.state()
    found.announce(SCALED)
    found.announce(HELD)
    assert told(api) == [
        ("Normal", SCALED.reason, SCALED.note, "jevons.dev/autoscaler"),
        ("Warning", HELD.reason, HELD.note, "jevons.dev/autoscaler"),
    ]
    uid = api.get(f"{DEPLOYMENTS}/chat")["metadata"]["uid"]
    about = {"apiVersion": "apps/v1", "kind": "Deployment", "namespace": "default", "name": "chat", "uid": uid}
    assert [one["involvedObject"] for one in api.items(EVENTS)] == [about, about]
    times = {one["reason"]: one["eventTime"] for one in api.items(EVENTS)}
    assert times[HELD.reason] == "2023-11-14T22:13:20.250000Z"


def test_a_long_note_with_any_letters_is_taken(kube: KubeApiServer, api: KubeApi) -> None:
    actuator(kube.kubeconfig).announce(HELD._replace(note="ü€\n" * 2000))
    assert [len(message) for _, _, message, _ in told(api)] == [1000]


def test_events_can_be_switched_off(kube: KubeApiServer, api: KubeApi) -> None:
    silent = actuator(kube.kubeconfig, events=False)
    silent.announce(SCALED)
    assert told(api) == []
    assert "may create events in default" not in [line.subject for line in silent.check()]


def test_without_the_right_it_fails_and_check_says_so(kube: KubeApiServer, api: KubeApi) -> None:
    limited = actuator(kube.limited)
    with pytest.raises(ActuationFailed, match="an Event on deployments/chat in default: HTTP 403"):
        limited.announce(SCALED)
    assert "may create events in default" in [line.subject for line in limited.check() if not line.ok]


def test_an_object_of_a_custom_kind_has_events_too(kube: KubeApiServer, api: KubeApi) -> None:
    with custom_kind(api, "example.com", "v1", "motors", "Motor"):
        resource = {"group": "example.com", "version": "v1", "plural": "motors"}
        actuator(kube.kubeconfig, target={"resource": resource}).announce(SCALED)
        (event,) = api.items(EVENTS)
        assert event["involvedObject"] | {"uid": ""} == {
            "apiVersion": "example.com/v1",
            "kind": "Motor",
            "namespace": "default",
            "name": "chat",
            "uid": "",
        }
