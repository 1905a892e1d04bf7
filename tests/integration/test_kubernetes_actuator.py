"""The Kubernetes actuator against a real API server, and against one that fails in every way it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from kube_objects import (
    DEPLOYMENTS,
    PODS,
    controller,
    create_deployment,
    create_pod,
    delete,
    kube_api,
    replicas_of,
    set_ready,
)
from kube_server import KubeApiServer
from servers import wait_until

from autoscaler.actuators.base import PartlyFailed
from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig, ScaleTarget
from autoscaler.actuators.kubernetes_pods import DELETION_COST
from policies.contract import Target
from policies.cost_rates import replicas_paid
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

STATEFUL_SETS = "/apis/apps/v1/namespaces/default/statefulsets"
ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))


def target(replicas: int) -> Target:
    return Target(np.array([[replicas]]), np.array([[16]]))


def actuator(kubeconfig: Path, loads: dict[str, float] | None = None, **target_options: Any) -> KubernetesActuator:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=1.0, deadline_s=3.0)
    config = KubernetesConfig(connection=connection, target=ScaleTarget(**target_options))
    return KubernetesActuator(config, [SPEC], None if loads is None else lambda: loads)


@pytest.fixture
def chat(kube: KubeApiServer) -> KubeApiServer:
    create_deployment(kube, "chat", replicas=2)
    return kube


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_failure_that_passes_is_retried(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], status: int
) -> None:
    proxy, kubeconfig = faulty_kube
    failures: list[str] = []

    def fail_twice(method: str, path: str) -> int | None:
        if method == "PUT" and len(failures) < 2:
            failures.append(path)
            return status
        return None

    proxy.fault = fail_twice
    actuator(kubeconfig).apply(target(5))
    assert replicas_of(chat, "chat") == 5
    assert len(failures) == 2


@pytest.mark.plays("API server 403, 409, 429, 500, time-out, connection cut")
@pytest.mark.parametrize(
    ("fault", "said"), [(429, "HTTP 429"), (500, "HTTP 500"), ("slow", "no answer"), ("cut", "cut short|no answer")]
)
def test_a_failure_that_stays_is_named_and_changes_nothing(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], fault: int | str, said: str
) -> None:
    proxy, kubeconfig = faulty_kube
    proxy.delay_s = 30.0
    proxy.fault = lambda method, path: fault if path.endswith("/scale") else None
    with pytest.raises(PartlyFailed, match=said) as failed:
        actuator(kubeconfig).apply(target(5))
    assert set(failed.value.failures) == {"chat"}
    assert replicas_of(chat, "chat") == 2


def test_a_server_that_is_down_leaves_everything_unknown(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]
) -> None:
    proxy, kubeconfig = faulty_kube
    proxy.fault = lambda method, path: 500
    state = actuator(kubeconfig).state()
    assert np.isnan(state.replicas_target).all()
    assert state.problems != ()


def test_without_rights_it_fails_and_check_says_which(chat: KubeApiServer) -> None:
    limited = actuator(chat.limited)
    with pytest.raises(PartlyFailed, match="HTTP 403"):
        limited.apply(target(5))
    refused = {line.subject for line in limited.check() if not line.ok}
    assert {
        "may get deployments/scale chat in default",
        "may update deployments/scale chat in default",
        "may get deployments chat in default",
        "may list pods in default",
        "may watch pods in default",
        "may patch pods in default",
        "may list scaledobjects in default",
    } <= refused
    assert replicas_of(chat, "chat") == 2


@pytest.mark.plays("target deleted")
def test_a_deleted_target_is_unknown_and_named(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    delete(api, f"{DEPLOYMENTS}/chat")
    gone = actuator(chat.kubeconfig)
    assert np.isnan(gone.state().replicas_target[0, 0])
    with pytest.raises(PartlyFailed, match=r"deployments/chat in default: HTTP 404"):
        gone.apply(target(3))
    api.close()


def test_an_edit_between_reading_and_writing_is_not_overwritten(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]
) -> None:
    proxy, kubeconfig = faulty_kube
    api = kube_api(chat)

    def somebody_scales_first(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/scale") and replicas_of(chat, "chat") == 2:
            api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 7}})

    proxy.fault = somebody_scales_first
    with pytest.raises(PartlyFailed, match="somebody else changed replicas from 2 to 7"):
        actuator(kubeconfig).apply(target(4))
    assert replicas_of(chat, "chat") == 7
    api.close()


def test_a_change_of_something_else_in_between_is_no_conflict(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]
) -> None:
    proxy, kubeconfig = faulty_kube
    api = kube_api(chat)
    touched: list[str] = []

    def somebody_labels_first(method: str, path: str) -> None:
        if method == "PUT" and path.endswith("/scale") and not touched:
            touched.append(path)
            api.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"labels": {"team": "a"}}})

    proxy.fault = somebody_labels_first
    actuator(kubeconfig).apply(target(4))
    assert replicas_of(chat, "chat") == 4
    assert len(touched) == 1
    api.close()


def test_another_autoscaler_on_the_target_is_named(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    root = "/apis/autoscaling/v1/namespaces/default/horizontalpodautoscalers"
    scaled = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat"}
    api.post(root, {"metadata": {"name": "cpu"}, "spec": {"maxReplicas": 9, "scaleTargetRef": scaled}})
    try:
        found = actuator(chat.kubeconfig)
        assert found.state().owners == ("HorizontalPodAutoscaler default/cpu",)
        wrong = [line.detail for line in found.check() if not line.ok]
        assert wrong == ["HorizontalPodAutoscaler default/cpu scales it too"]
    finally:
        delete(api, f"{root}/cpu")
        api.close()


@pytest.mark.plays("HPAs or ScaledObjects cannot be read")
@pytest.mark.parametrize(("plural", "status"), [("horizontalpodautoscalers", 500), ("scaledobjects", 403)])
def test_owners_that_cannot_be_read_are_unknown_and_not_absent(
    faulty_kube: tuple[FaultProxy, Path], chat: KubeApiServer, plural: str, status: int
) -> None:
    proxy, kubeconfig = faulty_kube
    proxy.fault = lambda method, path: status if path.split("?")[0].endswith(f"/{plural}") else None
    state = actuator(kubeconfig).state()
    assert state.owners_unread == (0,)
    assert f"HTTP {status}" in "; ".join(state.problems)
    assert state.replicas_target[0, 0] == 2
    proxy.fault = lambda method, path: None
    assert actuator(kubeconfig).state().owners_unread == ()


@pytest.mark.parametrize(
    "names", [("chat-a", "chat-b", "chat-c"), ("127.0.0.2:8000", "127.0.0.3:8000", "127.0.0.4:8000")]
)
def test_the_least_loaded_replicas_are_marked_to_go_first(chat: KubeApiServer, names: tuple[str, ...]) -> None:
    """Whether Prometheus names targets by their pods or, as it does by itself, by their addresses."""
    for number, name in enumerate(("chat-a", "chat-b", "chat-c"), start=2):
        create_pod(chat, name, "chat", f"127.0.0.{number}")
    api = kube_api(chat)
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 3}})
    actuator(chat.kubeconfig, dict(zip(names, (9.0, 1.0, 5.0), strict=True))).apply(target(1))
    costs = {
        pod["metadata"]["name"]: pod["metadata"].get("annotations", {}).get(DELETION_COST) for pod in api.items(PODS)
    }
    assert costs == {"chat-a": None, "chat-b": "-1000", "chat-c": "-1000"}
    api.close()


def test_counts_what_starts_is_ready_and_drains(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 5}})
    set_ready(chat, "chat", 3)
    state = actuator(chat.kubeconfig).state()
    counted = [state.replicas_target, state.replicas_ready, state.replicas_starting, state.replicas_draining]
    assert [value[0, 0] for value in counted] == [5.0, 3.0, 2.0, 0.0]
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 1}})
    state = actuator(chat.kubeconfig).state()
    counted = [state.replicas_target, state.replicas_ready, state.replicas_starting, state.replicas_draining]
    assert [value[0, 0] for value in counted] == [1.0, 1.0, 0.0, 2.0]
    api.close()


def test_the_surplus_of_a_rollout_is_there_and_not_on_its_way(chat: KubeApiServer) -> None:
    """A surge of 100 %: the new pods load, answer what scrapes them, and hold their GPUs beside the old ones."""
    for number in range(2):
        create_pod(chat, f"old-{number}", "chat")
        new = controller("ReplicaSet", "chat-abc")
        create_pod(chat, f"new-{number}", "chat", f"127.0.0.{number + 2}", ready=False, owner=new)
    api = kube_api(chat)
    for number in range(2):
        api.merge(f"{PODS}/new-{number}", {"metadata": {"labels": {"pod-template-hash": "abc"}}})
    status = {"replicas": 4, "readyReplicas": 2, "availableReplicas": 2, "updatedReplicas": 2, "unavailableReplicas": 2}
    api.merge(f"{DEPLOYMENTS}/chat/status", {"status": status})
    found = actuator(chat.kubeconfig)
    state = found.state()
    counted = [state.replicas_target, state.replicas_ready, state.replicas_starting, state.replicas_draining]
    assert [value[0, 0] for value in counted] == [2.0, 2.0, 0.0, 2.0]
    assert replicas_paid(state)[0, 0] == 4.0
    assert sorted(found.members()["chat"]) == ["old-0", "old-1"]
    found.close()
    api.close()


def test_replicas_that_cannot_be_listed_are_not_taken_for_none(
    chat: KubeApiServer, faulty_kube: tuple[FaultProxy, Path]
) -> None:
    proxy, kubeconfig = faulty_kube
    create_pod(chat, "chat-a", "chat")
    set_ready(chat, "chat", 1)
    found = actuator(kubeconfig)
    found.state()
    assert found.members() == {"chat": {"chat-a": "127.0.0.1:8000"}}
    proxy.fault = lambda method, path: 500 if path.endswith("/pods") else None
    wait_until(lambda: found.state().problems, "the loss of the watch is known")
    state = found.state()
    assert state.replicas_target[0, 0] == 2
    assert "pods in default (app in (chat)): HTTP 500" in state.problems[0]
    assert found.members() == {}
    with pytest.raises(PartlyFailed, match="HTTP 500"):
        found.apply(target(1))  # nobody knows which would go
    assert replicas_of(chat, "chat") == 2
    found.apply(target(3))
    assert replicas_of(chat, "chat") == 3


@pytest.mark.plays("replicas never ready")
def test_replicas_that_never_come_are_named_and_go_first(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 4}})
    set_ready(chat, "chat", 1)
    create_pod(chat, "chat-a", "chat")
    unready = {"type": "Ready", "status": "False", "message": "containers with unready status: [engine]"}
    lost = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    for name, conditions in (("chat-b", [unready]), ("chat-c", [lost]), ("chat-d", [unready])):
        create_pod(chat, name, "chat", ready=False)
        api.merge(f"{PODS}/{name}/status", {"status": {"conditions": conditions}})
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    pulling = {"name": "engine", "image": "engine", "imageID": "", "ready": False, "restartCount": 0}
    pulling["state"] = {"waiting": waiting}
    api.merge(f"{PODS}/chat-d/status", {"status": {"containerStatuses": [pulling]}})
    late = actuator(chat.kubeconfig, {"chat-a": 0.0, "chat-b": 9.0, "chat-c": 9.0, "chat-d": 9.0})
    assert late.state().replicas_starting[0, 0] == 3.0  # they have only begun
    late._starts._limit_s = dict.fromkeys(late._starts._limit_s, 0.0)
    state = late.state()
    counted = [state.replicas_ready, state.replicas_starting, state.replicas_stuck]
    assert [value[0, 0] for value in counted] == [1.0, 0.0, 3.0]
    for said in ("3 replicas have been", "Unschedulable: 0/3 nodes", "ImagePullBackOff: Back-off", "unready status"):
        assert said in state.problems[0]
    late.apply(target(1))
    costs = {pod["metadata"]["name"]: pod["metadata"].get("annotations", {}) for pod in api.items(PODS)}
    assert sorted(name for name, marks in costs.items() if marks.get(DELETION_COST)) == ["chat-b", "chat-c", "chat-d"]
    api.close()


def test_replicas_that_a_quota_forbids_are_named(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    failed = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "exceeded quota: gpus"}
    api.merge(f"{DEPLOYMENTS}/chat/status", {"status": {"conditions": [failed]}})
    late = actuator(chat.kubeconfig)
    late.state()
    late._starts._limit_s = dict.fromkeys(late._starts._limit_s, 0.0)
    assert "(FailedCreate: exceeded quota: gpus)" in late.state().problems[0]
    api.close()


def test_a_stateful_set_is_scaled_and_its_highest_ordinals_go_first(chat: KubeApiServer) -> None:
    create_deployment(chat, "chat", replicas=3, kind="StatefulSet")
    api = kube_api(chat)
    owner = controller("StatefulSet", "chat", api.get(f"{STATEFUL_SETS}/chat")["metadata"]["uid"])
    for ordinal in range(3):
        create_pod(chat, f"chat-{ordinal}", "chat", owner=owner)
    sets = actuator(chat.kubeconfig, {"chat-0": 0.0}, resource="statefulset")
    assert sets.state().replicas_target[0, 0] == 3
    assert sets.victims(sets._pools[0], 2) == ["chat-2", "chat-1"]
    sets.apply(target(1))
    assert sets.state().replicas_target[0, 0] == 1
    delete(api, f"{STATEFUL_SETS}/chat")
    api.close()


def test_any_kind_with_a_scale_subresource_is_scaled(chat: KubeApiServer) -> None:
    create_deployment(chat, "chat", replicas=2, kind="ReplicaSet")
    other = actuator(chat.kubeconfig, resource={"group": "apps", "version": "v1", "plural": "replicasets"})
    other.apply(target(6))
    state = other.state()
    assert state.replicas_target[0, 0] == 6.0
    assert "its scale names no selector" not in "; ".join(state.problems)
    api = kube_api(chat)
    delete(api, "/apis/apps/v1/namespaces/default/replicasets/chat")
    api.close()
