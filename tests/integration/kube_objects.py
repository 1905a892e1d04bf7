"""Objects in the API server, and the few lines that play the kubelet."""

from __future__ import annotations

from typing import Any

from kube_server import KubeApiServer

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError

DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
PODS = "/api/v1/namespaces/default/pods"


def kube_api(server: KubeApiServer) -> KubeApi:
    return KubeApi(KubeConnection(kubeconfig=server.kubeconfig, deadline_s=30))


def delete(api: KubeApi, path: str) -> None:
    try:
        api._retried("DELETE", path, {"gracePeriodSeconds": "0"}, None)
    except KubeError as error:
        if error.status != 404:
            raise


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


def create_pod(server: KubeApiServer, name: str, app: str, address: str = "127.0.0.1", ready: bool = True) -> None:
    api = kube_api(server)
    delete(api, f"{PODS}/{name}")
    template = pod_template({"app": app})
    template["metadata"]["name"] = name
    api.post(PODS, {"apiVersion": "v1", "kind": "Pod", **template})
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    api.merge(f"{PODS}/{name}/status", {"status": {"phase": "Running", "podIP": address, "conditions": conditions}})
    api.close()


def delete_pods(server: KubeApiServer) -> None:
    api = kube_api(server)
    for pod in api.items(PODS):
        delete(api, f"{PODS}/{pod['metadata']['name']}")
    api.close()


def delete_config_maps(server: KubeApiServer) -> None:
    api = kube_api(server)
    root = "/api/v1/namespaces/default/configmaps"
    for found in api.items(root):
        delete(api, f"{root}/{found['metadata']['name']}")
    api.close()
