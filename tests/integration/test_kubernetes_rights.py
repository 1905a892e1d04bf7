"""The shipped Roles on a real API server: a whole tick works with them, and what is not needed is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kube_objects import DEPLOYMENTS, PODS, create_deployment, create_pod, kube_api, replicas_of
from kube_server import KubeApiServer
from servers import ROOT, HAProxy, wait_until

from autoscaler.actuators.base import PartlyFailed
from autoscaler.actuators.composite import CompositeActuator
from autoscaler.actuators.config_map import ConfigMapActuator, ConfigMapConfig
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.actuators.haproxy_api import RuntimeApi
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError, Needed
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.kubernetes_pods import DELETION_COST
from autoscaler.authority.kubernetes_leases import KubernetesLeases
from autoscaler.authority.leases import LeaseSpec
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

DEPLOY = ROOT / "configs" / "deploy"
ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
ROLES = "/apis/rbac.authorization.k8s.io/v1/namespaces/default"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
CONFIG_MAPS = "/api/v1/namespaces/default/configmaps"


def bind(api: KubeApi, name: str, rules: list[dict[str, Any]]) -> None:
    """Give the user of `limited.kubeconfig` a Role."""
    subject = {"kind": "User", "name": "autoscaler", "apiGroup": "rbac.authorization.k8s.io"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    api.post(f"{ROLES}/roles", {"metadata": {"name": name}, "rules": rules})
    api.post(f"{ROLES}/rolebindings", {"metadata": {"name": name}, "subjects": [subject], "roleRef": reference})


@pytest.fixture
def api(kube: KubeApiServer) -> Iterator[KubeApi]:
    """Deployments chat and other, with nothing allowed yet; nothing else is there."""
    for name in ("chat", "other"):
        create_deployment(kube, name, replicas=2)
        create_pod(kube, f"{name}-a", name)
    api = kube_api(kube)
    yield api
    api.close()


def shipped(api: KubeApi, *files: str) -> None:
    """The Roles and Leases of the shipped manifests."""
    for file in files:
        for one in yaml.safe_load_all((DEPLOY / file).read_text()):
            if one["kind"] == "Role":
                bind(api, one["metadata"]["name"], one["rules"])
            if one["kind"] == "Lease":
                api.post(LEASES, one)


def actuator(kubeconfig: Path, **settings: Any) -> KubernetesActuator:
    connection = KubeConnection(kubeconfig=kubeconfig, timeout_s=5.0, deadline_s=10.0)
    return KubernetesActuator(KubernetesConfig(connection=connection, **settings), [SPEC])


def target(replicas: int) -> Target:
    return Target(np.array([[replicas]]), np.array([[16]]))


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except KubeError as error:
        return error.status == 403
    return False


def test_a_whole_tick_works_with_the_shipped_roles_and_nothing_else_does(kube: KubeApiServer, api: KubeApi) -> None:
    shipped(api, "rbac.yaml", "removal_order.yaml")
    made = actuator(kube.limited)
    assert [line for line in made.check() if not line.ok] == []
    state = made.state()
    assert (state.replicas_target[0, 0], state.problems, state.owners_unread) == (2.0, (), ())
    assert made.members() == {"chat": {"chat-a": "127.0.0.1:8000"}}
    made.apply(target(3))
    assert replicas_of(kube, "chat") == 3
    made.apply(target(1))
    assert replicas_of(kube, "chat") == 1
    assert api.get(f"{PODS}/chat-a")["metadata"]["annotations"] == {DELETION_COST: "-1000"}
    lease = LeaseSpec(kind="kubernetes", connection=KubeConnection(kubeconfig=kube.limited))
    leases = KubernetesLeases(lease, ("chat",), "a/1")
    assert [line for line in leases.check() if not line.ok] == []
    assert leases.renew().tolist() == [1]
    leases.release()
    leases.close()
    made.close()

    limited = KubeApi(KubeConnection(kubeconfig=kube.limited))
    scale = api.get(f"{DEPLOYMENTS}/other/scale")
    api.post(CONFIG_MAPS, {"metadata": {"name": "chat-jevons"}})
    api.post(LEASES, {"metadata": {"name": "other"}})
    forbidden: dict[str, Callable[[], object]] = {
        "scale another Deployment": lambda: limited.put(f"{DEPLOYMENTS}/other/scale", scale),
        "read another Deployment": lambda: limited.get(f"{DEPLOYMENTS}/other"),
        "list Deployments": lambda: limited.items(DEPLOYMENTS),
        "change the Deployment": lambda: limited.merge(f"{DEPLOYMENTS}/chat", {"metadata": {"labels": {"a": "b"}}}),
        "change another Lease": lambda: limited.put(f"{LEASES}/other", api.get(f"{LEASES}/other")),
        "make a Lease": lambda: limited.post(LEASES, {"metadata": {"name": "new"}}),
        "change a ConfigMap": lambda: limited.merge(f"{CONFIG_MAPS}/chat-jevons", {"data": {"a": "b"}}),
        "make a ConfigMap": lambda: limited.post(CONFIG_MAPS, {"metadata": {"name": "new"}}),
        "read a Secret": lambda: limited.items("/api/v1/namespaces/default/secrets"),
        "delete a pod": lambda: limited._retried("DELETE", f"{PODS}/chat-a", {}, None),
        "watch pods of another namespace": lambda: limited.items("/api/v1/namespaces/kube-system/pods"),
    }
    assert [what for what, call in forbidden.items() if not refused(call)] == []
    limited.close()


def test_without_the_right_to_patch_pods_it_works_where_it_is_not_asked_to(kube: KubeApiServer, api: KubeApi) -> None:
    shipped(api, "rbac.yaml")
    marking = actuator(kube.limited)
    assert [line.subject for line in marking.check() if not line.ok] == ["may patch pods in default"]
    marking.close()
    made = actuator(kube.limited, least_loaded_first=False)
    assert [line for line in made.check() if not line.ok] == []
    made.apply(target(1))
    assert replicas_of(kube, "chat") == 1
    assert made.victims(made._pools[0], 1) == []  # Kubernetes chooses
    made.close()
    limited = KubeApi(KubeConnection(kubeconfig=kube.limited))
    mark = {"metadata": {"annotations": {DELETION_COST: "-1"}}}
    assert refused(lambda: limited.merge(f"{PODS}/other-a", mark))
    limited.close()


@pytest.mark.parametrize(
    ("role", "lost"),
    [
        ("jevons-removal-order", Needed("patch", "", "pods")),
        ("jevons-scale", Needed("list", "", "pods")),
        ("jevons-scale", Needed("update", "apps", "deployments", "scale", "chat")),
    ],
    ids=["patch pods", "list pods", "update scale"],
)
def test_without_a_right_that_a_removal_needs_nothing_is_drained(
    kube: KubeApiServer, api: KubeApi, haproxy: HAProxy, role: str, lost: Needed
) -> None:
    create_pod(kube, "chat-b", "chat", "127.0.0.2")
    shipped(api, "rbac.yaml", "removal_order.yaml")
    gateway = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), route=("chat",)), [SPEC])
    made = CompositeActuator(actuator(kube.limited), gateway, [SPEC], 60.0)
    made.apply(target(2))
    made.route(np.array([True]), np.array([False]))
    rules = api.get(f"{ROLES}/roles/{role}")["rules"]
    resource = "/".join(filter(None, [lost.resource, lost.subresource]))
    for rule in rules:
        rule["verbs"] = [verb for verb in rule["verbs"] if resource not in rule["resources"] or verb != lost.verb]
    api.merge(f"{ROLES}/roles/{role}", {"rules": [rule for rule in rules if rule["verbs"]]})
    limited = KubeApi(KubeConnection(kubeconfig=kube.limited))
    wait_until(lambda: not limited.allowed(lost, "default"), "the right is lost")
    for _ in range(2):
        with pytest.raises(PartlyFailed, match=f"chat: .*HTTP 403.*cannot {lost.verb} resource"):
            made.apply(target(1))
        made.route(np.array([True]), np.array([False]))
        servers = RuntimeApi(str(haproxy.socket), 2.0).servers("chat").values()
        assert [one.draining for one in servers] == [False, False]
    assert replicas_of(kube, "chat") == 2
    limited.close()
    made.close()


def test_a_config_map_by_name_is_enough_once_it_is_there(kube: KubeApiServer, api: KubeApi) -> None:
    (rules,) = [
        rules
        for text in (ROOT / "docs" / "actuators.md").read_text().split("```yaml")[1:]
        if "configmaps" in text and (rules := yaml.safe_load(text.split("```")[0]).get("rules"))
    ]
    bind(api, "jevons-cap", rules)
    connection = KubeConnection(kubeconfig=kube.limited)
    made = ConfigMapActuator(ConfigMapConfig(connection=connection), [SPEC])
    assert [line.subject for line in made.check() if not line.ok] == ["may create configmaps in default"]
    api.post(CONFIG_MAPS, {"metadata": {"name": "chat-jevons"}})
    assert [line for line in made.check() if not line.ok] == []
    made.apply(target(2))
    assert api.get(f"{CONFIG_MAPS}/chat-jevons")["data"] == {"batch_cap": "16"}
    made.close()
