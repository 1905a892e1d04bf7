"""What counts as a replica, of every kind: pods, groups of pods, and kinds of which only the scale is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kube_objects import PODS, controller, create_pod, delete, kube_api, pod_template
from kube_server import KubeApiServer
from servers import wait_until

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
ENGINE = find_engine("llama-3.1-8b-h100", Path())
BIG = find_engine("llama-3.1-70b-h100-tp4", Path())
ENGINES = {"group": "example.com", "version": "v1", "plural": "engines"}


@pytest.fixture
def api(kube: KubeApiServer) -> Iterator[KubeApi]:
    api = kube_api(kube)
    yield api
    api.close()


def define(api: KubeApi, group: str, kind: str, paths: dict[str, str]) -> str:
    """A custom kind with a scale subresource; the path of its objects once it is served."""
    plural = f"{kind.lower()}s"
    free = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": free, "status": free}}},
        "subresources": {"status": {}, "scale": paths},
    }
    names = {"plural": plural, "singular": kind.lower(), "kind": kind}
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": [version]}
    api.post(DEFINITIONS, {"metadata": {"name": f"{plural}.{group}"}, "spec": spec})
    root = f"/apis/{group}/v1/namespaces/default/{plural}"

    def served() -> bool:
        try:
            api.items(root)
        except KubeError:
            return False
        return True

    wait_until(served, "the custom kind is served")
    return root


@pytest.fixture(scope="module")
def engines(kube_server: KubeApiServer) -> Iterator[str]:
    paths = {
        "specReplicasPath": ".spec.size",
        "statusReplicasPath": ".status.size",
        "labelSelectorPath": ".status.selector",
    }
    api = kube_api(kube_server)
    yield define(api, "example.com", "Engine", paths)
    delete(api, f"{DEFINITIONS}/engines.example.com")
    api.close()


@pytest.fixture
def engine(api: KubeApi, engines: str) -> Iterator[str]:
    api.post(
        engines,
        {"apiVersion": "example.com/v1", "kind": "Engine", "metadata": {"name": "chat"}, "spec": {"size": 4}},
    )
    yield engines
    delete(api, f"{engines}/chat")


def actuator(kube: KubeApiServer, resource: Any, pool: PoolSpec | None = None) -> KubernetesActuator:
    spec = ScalingSpec(
        service="chat",
        slo=Slo(ttft_s=0.5, tpot_s=0.05),
        pools=(pool or PoolSpec(engine=ENGINE, max_replicas=8),),
    )
    config = {
        "connection": KubeConnection(kubeconfig=kube.kubeconfig, timeout_s=5.0, deadline_s=10.0),
        "target": {"resource": resource},
        "starts": {"at_least_s": 0.0, "cold_starts": 1e-9},
    }
    return KubernetesActuator(KubernetesConfig.model_validate(config), [spec])


def counted(made: KubernetesActuator) -> tuple[list[float], tuple[str, ...]]:
    """Target, ready, starting, stuck, draining, and what is wrong."""
    state = made.state()
    columns = ("target", "ready", "starting", "stuck", "draining")
    return [float(getattr(state, f"replicas_{name}")[0, 0]) for name in columns], state.problems


def test_of_a_kind_with_only_a_scale_those_pods_are_ready_that_say_so(kube: KubeApiServer, engine: str) -> None:
    api = kube_api(kube)
    api.merge(f"{engine}/chat/status", {"status": {"size": 4, "selector": "app=chat,tier notin (test)"}})
    for number in range(4):
        create_pod(kube, f"chat-{number}", "chat", ready=number < 2)
    create_pod(kube, "other-1", "other")
    made = actuator(kube, ENGINES)
    made._starts._limit_s = dict.fromkeys(made._starts._limit_s, 1e9)
    assert counted(made) == ([4.0, 2.0, 2.0, 0.0, 0.0], ())
    assert sorted(made.members()["chat"]) == ["chat-0", "chat-1"]
    made.close()
    api.close()


def test_a_canary_that_loads_is_there_and_not_on_its_way(kube: KubeApiServer, engine: str) -> None:
    """`replicas` holds both generations, and so does the selector."""
    api = kube_api(kube)
    api.merge(f"{engine}/chat/status", {"status": {"size": 6, "selector": "app=chat"}})
    for number in range(4):
        create_pod(kube, f"stable-{number}", "chat", f"127.0.0.{number + 1}")
    for number in range(2):
        owner = controller("ReplicaSet", "chat-2")
        create_pod(kube, f"canary-{number}", "chat", f"127.0.1.{number + 1}", ready=False, owner=owner)
    made = actuator(kube, ENGINES)
    assert counted(made) == ([4.0, 4.0, 0.0, 0.0, 2.0], ())
    made.close()
    api.close()


@pytest.mark.plays(
    "pods and `replicas` of a custom kind do not fit",
    "that service is held, both numbers named",
)
@pytest.mark.parametrize(("pods", "said"), [(8, "8 pods for 2 replicas"), (0, "0 pods for 2 replicas")])
def test_a_selector_that_counts_another_unit_is_named_and_no_number(
    kube: KubeApiServer, engine: str, pods: int, said: str
) -> None:
    api = kube_api(kube)
    api.merge(f"{engine}/chat", {"spec": {"size": 2}})
    api.merge(f"{engine}/chat/status", {"status": {"size": 2, "selector": "app=chat"}})
    for number in range(pods):
        create_pod(kube, f"chat-{number}", "chat")
    made = actuator(kube, ENGINES)
    state = made.state()
    assert np.isnan(state.replicas_ready[0, 0])
    assert np.isnan(state.replicas_starting[0, 0])
    assert state.replicas_target[0, 0] == 2.0
    assert said in "; ".join(state.problems)
    made.close()
    api.close()


def test_a_scale_without_a_selector_is_named_and_no_number(kube: KubeApiServer, engine: str) -> None:
    made = actuator(kube, ENGINES)
    state = made.state()
    assert np.isnan(state.replicas_ready[0, 0])
    assert "its scale names no selector" in "; ".join(state.problems)
    made.close()


@pytest.fixture
def groups(api: KubeApi) -> Iterator[str]:
    """A LeaderWorkerSet of two groups of two pods, four GPUs in each group."""
    paths = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.hpaPodSelector",
    }
    root = define(api, "leaderworkerset.x-k8s.io", "LeaderWorkerSet", paths)
    template = pod_template({"app": "chat"})
    template["spec"]["containers"][0]["resources"] = {"limits": {"nvidia.com/gpu": "2"}}
    body = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": "chat"},
        "spec": {"replicas": 2, "leaderWorkerTemplate": {"size": 2, "workerTemplate": template}},
    }
    api.post(root, body)
    api.merge(f"{root}/chat/status", {"status": {"replicas": 2, "readyReplicas": 1}})
    yield root
    delete(api, f"{DEFINITIONS}/leaderworkersets.leaderworkerset.x-k8s.io")


def create_group(kube: KubeApiServer, group: int, *ready: bool) -> None:
    api = kube_api(kube)
    for worker, one in enumerate(ready):
        name = f"chat-{group}-{worker}" if worker else f"chat-{group}"
        owner = controller("StatefulSet", f"chat-{group}" if worker else "chat")
        create_pod(kube, name, "chat", f"127.0.{group}.{worker + 1}", one, owner)
        labels = {"name": "chat", "group-index": str(group), "worker-index": str(worker)}
        own = {f"leaderworkerset.sigs.k8s.io/{key}": value for key, value in labels.items()}
        api.merge(f"{PODS}/{name}", {"metadata": {"labels": own}})
    api.close()


def test_a_replica_of_a_leader_worker_set_is_a_group(kube: KubeApiServer, groups: str) -> None:
    create_group(kube, 0, True, True)
    create_group(kube, 1, True, False)  # a leader alone serves nothing
    api = kube_api(kube)
    status = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "full"}]}
    api.merge(f"{PODS}/chat-1-1/status", {"status": status})
    big = PoolSpec(engine=BIG, max_replicas=8)
    made = actuator(kube, "leaderworkerset", big)
    numbers, problems = counted(made)
    assert numbers == [2.0, 1.0, 0.0, 1.0, 0.0]
    assert "chat-1: chat-1-1: Unschedulable: full" in "; ".join(problems)
    assert made.members() == {"chat": {"chat-0": "127.0.0.1:8000"}}
    assert made.victims(made._pools[0], 1) == ["chat-1"]
    fits = [line for line in made.check() if "leaderworkersets/chat" in line.subject]
    assert [line.ok for line in fits] == [True]
    made.close()
    small = actuator(kube, "leaderworkerset", PoolSpec(engine=ENGINE, max_replicas=8))
    wrong = [line.detail for line in small.check() if not line.ok and "GPUs" in line.detail]
    assert len(wrong) == 1
    assert "a replica (2 pods) asks for 4 GPUs, but its engine profile has 1" in wrong[0]
    small.close()
    api.close()


def test_of_a_leader_worker_set_those_pods_count_that_its_stateful_sets_made(kube: KubeApiServer, groups: str) -> None:
    create_group(kube, 0, True, True)
    create_group(kube, 7, True, True)
    api = kube_api(kube)
    for name in ("chat-7", "chat-7-1"):
        api.merge(f"{PODS}/{name}", {"metadata": {"ownerReferences": [controller("StatefulSet", "evil")]}})
    made = actuator(kube, "leaderworkerset", PoolSpec(engine=BIG, max_replicas=8))
    assert "2 pods match" in "; ".join(counted(made)[1])
    assert made.members() == {"chat": {"chat-0": "127.0.0.1:8000"}}
    made.close()
    api.close()


def test_of_a_kind_with_only_a_scale_pods_without_a_controller_do_not_count(kube: KubeApiServer, engine: str) -> None:
    api = kube_api(kube)
    api.merge(f"{engine}/chat", {"spec": {"size": 2}})
    api.merge(f"{engine}/chat/status", {"status": {"size": 2, "selector": "app=chat"}})
    for number in range(2):
        create_pod(kube, f"chat-{number}", "chat")
    create_pod(kube, "evil-0", "chat", owner={})
    made = actuator(kube, ENGINES)
    assert counted(made)[0][:2] == [2.0, 2.0]
    assert sorted(made.members()["chat"]) == ["chat-0", "chat-1"]
    create_pod(kube, "evil-1", "chat", owner=controller("ReplicaSet", "evil"))  # what stands between is not known
    wait_until(lambda: np.isnan(made.state().replicas_ready[0, 0]), "it is seen")
    assert "3 pods for 2 replicas" in "; ".join(made.state().problems)
    assert made.members() == {}  # routing stays as it is
    made.close()
    api.close()
