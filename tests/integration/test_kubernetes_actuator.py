"""The Kubernetes actuator against a real API server, and against one that fails in every way it can."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from kube_objects import (
    DEPLOYMENTS,
    PODS,
    create_deployment,
    create_pod,
    delete,
    delete_pods,
    kube_api,
    replicas_of,
    set_ready,
)
from kube_server import KubeApiServer
from servers import wait_until

from autoscaler.actuators.base import PartlyFailed
from autoscaler.actuators.kube_api import KubeConnection, KubeError
from autoscaler.actuators.kubernetes import DELETION_COST, KubernetesActuator, KubernetesConfig, ScaleTarget
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))


def target(replicas: int) -> Target:
    return Target(np.array([[replicas]]), np.array([[16]]))


def actuator(kubeconfig: Path, loads: dict[str, float] | None = None, **target_options: Any) -> KubernetesActuator:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=1.0, deadline_s=3.0)
    config = KubernetesConfig(connection=connection, target=ScaleTarget(**target_options))
    return KubernetesActuator(config, [SPEC], None if loads is None else lambda: loads)


@pytest.fixture
def chat(kube: KubeApiServer) -> Iterator[KubeApiServer]:
    create_deployment(kube, "chat", replicas=2)
    delete_pods(kube)
    yield kube
    delete_pods(kube)


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
        "may get deployments/scale in default",
        "may update deployments/scale in default",
        "may list deployments in default",
        "may list pods in default",
        "may patch pods in default",
        "may list scaledobjects in default",
    } <= refused
    assert replicas_of(chat, "chat") == 2


def test_a_role_with_the_documented_rights_is_enough(chat: KubeApiServer) -> None:
    api = kube_api(chat)
    root = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
    rules = [
        {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get", "list"]},
        {"apiGroups": ["apps"], "resources": ["deployments/scale"], "verbs": ["get", "update"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]},
        {"apiGroups": ["autoscaling"], "resources": ["horizontalpodautoscalers"], "verbs": ["list"]},
        {"apiGroups": ["keda.sh"], "resources": ["scaledobjects"], "verbs": ["list"]},
    ]
    api.post(f"{root}/roles", {"metadata": {"name": "jevons"}, "rules": rules})
    subject = {"kind": "User", "name": "autoscaler", "apiGroup": "rbac.authorization.k8s.io"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "jevons"}
    binding = {"metadata": {"name": "jevons"}, "subjects": [subject], "roleRef": role}
    api.post(f"{root}/rolebindings", binding)
    try:
        limited = actuator(chat.limited)
        assert [line for line in limited.check() if not line.ok] == []
        limited.apply(target(3))
        assert replicas_of(chat, "chat") == 3
    finally:
        delete(api, f"{root}/rolebindings/jevons")
        delete(api, f"{root}/roles/jevons")
        api.close()


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


def test_the_least_loaded_replicas_are_marked_to_go_first(chat: KubeApiServer) -> None:
    for name in ("chat-a", "chat-b", "chat-c"):
        create_pod(chat, name, "chat")
    api = kube_api(chat)
    api.merge(f"{DEPLOYMENTS}/chat", {"spec": {"replicas": 3}})
    actuator(chat.kubeconfig, {"chat-a": 9.0, "chat-b": 1.0, "chat-c": 5.0}).apply(target(1))
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
    assert found.state().replicas_target[0, 0] == 2
    assert found.members() == {}


def test_a_stateful_set_is_scaled_and_its_highest_ordinals_go_first(chat: KubeApiServer) -> None:
    create_deployment(chat, "chat", replicas=3, kind="StatefulSet")
    for ordinal in range(3):
        create_pod(chat, f"chat-{ordinal}", "chat")
    sets = actuator(chat.kubeconfig, {"chat-0": 0.0}, resource="statefulset")
    assert sets.state().replicas_target[0, 0] == 3
    assert sets.victims(sets._pools[0], 2) == ["chat-2", "chat-1"]
    sets.apply(target(1))
    assert sets.state().replicas_target[0, 0] == 1
    delete(kube_api(chat), "/apis/apps/v1/namespaces/default/statefulsets/chat")


def test_any_kind_with_a_scale_subresource_is_scaled(chat: KubeApiServer) -> None:
    create_deployment(chat, "chat", replicas=2, kind="ReplicaSet")
    other = actuator(chat.kubeconfig, resource={"group": "apps", "version": "v1", "plural": "replicasets"})
    other.apply(target(6))
    state = other.state()
    assert (state.replicas_target[0, 0], state.problems) == (6.0, ())
    api = kube_api(chat)
    delete(api, "/apis/apps/v1/namespaces/default/replicasets/chat")
    api.close()


@pytest.fixture
def engines(chat: KubeApiServer) -> Iterator[dict[str, str]]:
    """A custom kind with a scale subresource whose count is not where a Deployment has it."""
    api = kube_api(chat)
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    scale = {
        "specReplicasPath": ".spec.size",
        "statusReplicasPath": ".status.size",
        "labelSelectorPath": ".status.selector",
    }
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": schema, "status": schema}}},
        "subresources": {"status": {}, "scale": scale},
    }
    names = {"plural": "engines", "singular": "engine", "kind": "Engine"}
    spec = {"group": "example.com", "scope": "Namespaced", "names": names, "versions": [version]}
    api.post(definitions, {"metadata": {"name": "engines.example.com"}, "spec": spec})
    root = "/apis/example.com/v1/namespaces/default/engines"
    body = {"apiVersion": "example.com/v1", "kind": "Engine", "metadata": {"name": "chat"}, "spec": {"size": 2}}

    def created() -> bool:
        try:
            api.post(root, body)
        except KubeError as error:
            if error.status == 404:  # not served yet
                return False
            raise
        return True

    wait_until(created, "the custom kind is served")
    api.merge(f"{root}/chat/status", {"status": {"size": 2, "selector": "app=chat"}})
    yield {"group": "example.com", "version": "v1", "plural": "engines"}
    delete(api, f"{definitions}/engines.example.com")
    api.close()


def test_a_custom_kind_is_scaled(chat: KubeApiServer, engines: dict[str, str]) -> None:
    custom = actuator(chat.kubeconfig, resource=engines)
    custom.apply(target(6))
    state = custom.state()
    assert (state.replicas_target[0, 0], state.replicas_ready[0, 0], state.problems) == (6.0, 2.0, ())
    assert [line for line in custom.check() if not line.ok and "may" not in line.subject] == []
