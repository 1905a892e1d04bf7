"""Pods with the labels of a service that are not its own, on a real API server: whoever may make pods can make them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kube_objects import (
    DEPLOYMENTS,
    PODS,
    TEMPLATE_HASH,
    controller,
    create_deployment,
    create_pod,
    delete,
    replicas_of,
    set_ready,
)
from kube_server import KubeApiServer
from test_kubernetes_actuator import STATEFUL_SETS, actuator, target

from autoscaler.actuators.base import PartlyFailed
from autoscaler.actuators.kube_api import KubeApi
from autoscaler.actuators.kubernetes_pods import DELETION_COST

OWN = [f"chat-{number}" for number in range(3)]
NOBODY: dict[str, Any] = {}
REPLICA_SET = controller("ReplicaSet", f"chat-{TEMPLATE_HASH}")
STRANGERS = [
    (NOBODY, "nobody"),
    ({**REPLICA_SET, "controller": False}, "nobody"),
    (controller("ReplicaSet", "evil-6d4cf56db6"), "ReplicaSet evil-6d4cf56db6"),
    (controller("ReplicaSet", "chat-canary-6d4cf56db6"), "ReplicaSet chat-canary-6d4cf56db6"),
    (controller("ReplicaSet", "chat-5b8d7c9f44"), "ReplicaSet chat-5b8d7c9f44"),  # not the hash of its label
    (controller("StatefulSet", "chat"), "StatefulSet chat"),
    # The garbage collector knows no such kind, so it would leave the pod there.
    ({**REPLICA_SET, "apiVersion": "evil.example.com/v1"}, f"ReplicaSet chat-{TEMPLATE_HASH}"),
]


def marks(api: KubeApi) -> dict[str, str]:
    pods = {pod["metadata"]["name"]: pod["metadata"].get("annotations", {}) for pod in api.items(PODS)}
    return {name: found[DELETION_COST] for name, found in pods.items() if DELETION_COST in found}


@pytest.fixture
def held_pods(api: KubeApi) -> Iterator[None]:
    """Pods that a finalizer holds go when the test ends."""
    yield
    for pod in api.items(PODS):
        api.merge(f"{PODS}/{pod['metadata']['name']}", {"metadata": {"finalizers": None}})


@pytest.mark.usefixtures("held_pods")
@pytest.mark.plays(
    "pods of others carry a service's labels",
    "named, and left alone: not counted, routed to, drained or marked",
)
@pytest.mark.parametrize(("owner", "whose"), STRANGERS)
def test_pods_of_strangers_are_left_alone(kube: KubeApiServer, api: KubeApi, owner: dict[str, Any], whose: str) -> None:
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 3}})
    set_ready(kube, "chat", 3)
    for number, name in enumerate(OWN):
        create_pod(kube, name, "chat", f"10.0.0.{number + 1}")
    for number in range(5):
        create_pod(kube, f"evil-{number}", "chat", f"10.6.6.{number + 1}", number < 3, owner)
    api.merge(f"{PODS}/evil-0", {"metadata": {"finalizers": ["example.com/for-ever"]}})
    delete(api, f"{PODS}/evil-0")
    loads = {**dict.fromkeys(OWN, 5.0), "chat-1": 1.0} | {f"evil-{number}": 0.0 for number in range(5)}
    made = actuator(kube.kubeconfig, loads)
    state = made.state()
    columns = (state.replicas_target, state.replicas_ready, state.replicas_starting, state.replicas_draining)
    assert [column[0, 0] for column in columns] == [3.0, 3.0, 0.0, 0.0]
    assert state.problems == (
        f"deployments/chat in default: 4 pods match app in (chat) but belong to {whose}: not counted, routed to, "
        "drained or marked",
    )
    assert made.members() == {"chat": {name: f"10.0.0.{number + 1}:8000" for number, name in enumerate(OWN)}}
    assert sorted(made.victims(made._pools[0], 10)) == OWN
    made.apply(target(2))
    assert (replicas_of(kube, "chat"), marks(api)) == (2, {"chat-1": "-1000"})
    made.close()


def test_many_strangers_are_one_sentence(kube: KubeApiServer, api: KubeApi) -> None:
    for number in range(6):
        create_pod(kube, f"evil-{number}", "chat", owner=controller("ReplicaSet", f"evil-{number}\x1b[31m" + "x" * 900))
    made = actuator(kube.kubeconfig)
    (problem,) = made.state().problems
    assert "6 pods match app in (chat) but belong to ReplicaSet evil-0" in problem
    assert "and 3 others: not counted" in problem
    assert problem.isprintable()
    assert len(problem) < 1000
    made.close()


def test_no_replica_is_given_back_where_none_can_be_told_to_be_its_own(kube: KubeApiServer, api: KubeApi) -> None:
    """Such as those of a ReplicaSet that a Deployment of another name has left behind, and this one has taken over."""
    set_ready(kube, "chat", 2)
    for number in range(2):
        create_pod(kube, f"old-{number}", "chat", owner=controller("ReplicaSet", f"old-{TEMPLATE_HASH}"))
    made = actuator(kube.kubeconfig)
    with pytest.raises(PartlyFailed, match=f"2 pods match .* but belong to ReplicaSet old-{TEMPLATE_HASH}"):
        made.apply(target(1))
    assert (replicas_of(kube, "chat"), marks(api), made.members()) == (2, {}, {})
    made.apply(target(3))
    assert replicas_of(kube, "chat") == 3
    made.close()


def test_of_a_stateful_set_those_pods_count_that_carry_its_uid(kube: KubeApiServer, api: KubeApi) -> None:
    create_deployment(kube, "chat", replicas=2, kind="StatefulSet")
    uid = api.get(f"{STATEFUL_SETS}/chat")["metadata"]["uid"]
    for number in range(2):
        create_pod(kube, f"chat-{number}", "chat", owner=controller("StatefulSet", "chat", uid))
    create_pod(kube, "chat-8", "chat", owner=controller("StatefulSet", "chat", "1"))
    create_pod(kube, "chat-9", "chat", owner=NOBODY)
    made = actuator(kube.kubeconfig, resource="statefulset")
    (problem,) = made.state().problems
    assert "2 pods match app in (chat) but belong to StatefulSet chat, nobody" in problem
    assert made.victims(made._pools[0], 9) == ["chat-1", "chat-0"]
    made.close()
