"""Objects in the API server, and the few lines that play the kubelet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kube_server import KubeApiServer
from servers import wait_until

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError

DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
PODS = "/api/v1/namespaces/default/pods"
TEMPLATE_HASH = "6d4cf56db6"
"""What a Deployment's controller puts behind its name to name its ReplicaSet."""


def kube_api(server: KubeApiServer) -> KubeApi:
    return KubeApi(KubeConnection(kubeconfig=server.kubeconfig, deadline_s=30))


def delete(api: KubeApi, path: str) -> None:
    try:
        api._retried("DELETE", path, {"gracePeriodSeconds": "0"}, None)
    except KubeError as error:
        if error.status != 404:
            raise


def empty_namespace(server: KubeApiServer) -> None:
    """Delete every object of the kinds that the tests make in the namespace default."""
    kinds = {
        "/api/v1": ("pods", "configmaps", "events"),
        "/apis/apps/v1": ("deployments", "statefulsets", "replicasets"),
        "/apis/autoscaling/v2": ("horizontalpodautoscalers",),
        "/apis/coordination.k8s.io/v1": ("leases",),
        "/apis/policy/v1": ("poddisruptionbudgets",),
        "/apis/rbac.authorization.k8s.io/v1": ("rolebindings", "roles"),
    }
    api = kube_api(server)
    for version, plurals in kinds.items():
        for plural in plurals:
            delete(api, f"{version}/namespaces/default/{plural}")
    api.close()


@contextmanager
def custom_kind(api: KubeApi, group: str, version: str, plural: str, kind: str) -> Iterator[None]:
    """A kind that takes any fields, without a controller."""
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    served = {"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": plural, "singular": kind.lower(), "kind": kind}
    spec = {"group": group, "scope": "Namespaced", "names": names, "versions": [served]}
    api.post(definitions, {"metadata": {"name": f"{plural}.{group}"}, "spec": spec})

    def listed() -> bool:
        try:
            api.items(f"/apis/{group}/{version}/namespaces/default/{plural}")
        except KubeError as error:
            if error.status == 404:
                return False
            raise
        return True

    wait_until(listed, "the custom kind is served")
    yield
    delete(api, f"{definitions}/{plural}.{group}")


def pod_template(labels: dict[str, str]) -> dict[str, Any]:
    return {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "engine", "image": "engine"}]}}


def create_deployment(server: KubeApiServer, name: str, replicas: int, kind: str = "Deployment") -> None:
    """A fresh object with one status: nothing is ready."""
    api = kube_api(server)
    labels = {"app": name}
    plural = f"{kind.lower()}s"
    root = f"/apis/apps/v1/namespaces/default/{plural}"
    delete(api, f"{root}/{name}")
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": pod_template(labels)}
    if kind == "StatefulSet":
        spec["serviceName"] = name
    body = {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": spec}
    api.post(root, body)
    api.close()


def set_ready(server: KubeApiServer, name: str, ready: int) -> None:
    api = kube_api(server)
    status = {"replicas": ready, "readyReplicas": ready, "availableReplicas": ready}
    api.merge(f"{DEPLOYMENTS}/{name}/status", {"status": status})
    api.close()


def replicas_of(server: KubeApiServer, name: str) -> int:
    api = kube_api(server)
    found = int(api.get(f"{DEPLOYMENTS}/{name}")["spec"]["replicas"])
    api.close()
    return found


def controller(kind: str, name: str, uid: str = "1") -> dict[str, Any]:
    """The reference that a controller of the group apps writes into the pods that it makes."""
    return {"apiVersion": "apps/v1", "kind": kind, "name": name, "uid": uid, "controller": True}


def played_pod(name: str, app: str, owner: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pod as its controller makes it; when left out, the ReplicaSet of the Deployment `app`."""
    pod = pod_template({"app": app, "pod-template-hash": TEMPLATE_HASH})
    references = [controller("ReplicaSet", f"{app}-{TEMPLATE_HASH}") if owner is None else owner]
    pod["metadata"] |= {"name": name, "ownerReferences": [one for one in references if one]}
    return {"apiVersion": "v1", "kind": "Pod", **pod}


def create_pod(
    server: KubeApiServer,
    name: str,
    app: str,
    address: str = "127.0.0.1",
    ready: bool = True,
    owner: dict[str, Any] | None = None,
) -> None:
    """A running pod; `owner` as for `played_pod`, nobody where it is empty."""
    api = kube_api(server)
    delete(api, f"{PODS}/{name}")
    api.post(PODS, played_pod(name, app, owner))
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    api.merge(f"{PODS}/{name}/status", {"status": {"phase": "Running", "podIP": address, "conditions": conditions}})
    api.close()
