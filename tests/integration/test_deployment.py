"""The objects of `kubectl apply -k configs/deploy`, applied by a real API server, and the rights that they give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube_objects import delete, kube_api
from kube_server import KubeApiServer
from servers import ROOT

from autoscaler.actuators.kube_api import KubeApi
from autoscaler.hosting.config import load_live_config

DEPLOY = ROOT / "configs" / "deploy"
PLURALS = {
    "ServiceAccount": "/api/v1/namespaces/{}/serviceaccounts",
    "ConfigMap": "/api/v1/namespaces/{}/configmaps",
    "PersistentVolumeClaim": "/api/v1/namespaces/{}/persistentvolumeclaims",
    "Service": "/api/v1/namespaces/{}/services",
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/roles",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{}/rolebindings",
    "Lease": "/apis/coordination.k8s.io/v1/namespaces/{}/leases",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
}


def kustomized() -> list[dict[str, Any]]:
    """What the kustomization makes, without the hashes that it puts behind the names of config maps."""
    kustomization = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
    assert set(kustomization) == {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
    objects = [one for name in kustomization["resources"] for one in yaml.safe_load_all((DEPLOY / name).read_text())]
    for made in kustomization["configMapGenerator"]:
        data = {Path(name).name: (DEPLOY / name).read_text() for name in made["files"]}
        metadata = {"name": made["name"], **made.get("options", {})}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for one in objects:
        one["metadata"]["namespace"] = kustomization["namespace"]
        for subject in one.get("subjects", ()):
            subject["namespace"] = kustomization["namespace"]
    return objects


def path_of(one: Mapping[str, Any]) -> str:
    return PLURALS[one["kind"]].format(one["metadata"]["namespace"])


@pytest.fixture(scope="module")
def applied(kube_server: KubeApiServer) -> Iterator[tuple[KubeApi, list[tuple[dict[str, Any], dict[str, Any]]]]]:
    """Every object as it was given and as the server keeps it."""
    api = kube_api(kube_server)
    objects = kustomized()
    for one in objects:  # other tests may have left a Lease
        delete(api, f"{path_of(one)}/{one['metadata']['name']}")
    pairs = [(one, api.post(path_of(one), one)) for one in objects]
    yield api, pairs
    for one in objects:
        delete(api, f"{path_of(one)}/{one['metadata']['name']}")
    api.close()


Applied = tuple[KubeApi, list[tuple[dict[str, Any], dict[str, Any]]]]


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    """Fields that the server did not keep: it drops what it does not know without a word."""
    if isinstance(given, Mapping):
        if not isinstance(kept, Mapping):
            return [where]
        return [path for name, value in given.items() for path in lost(value, kept.get(name), f"{where}.{name}")]
    if isinstance(given, list):
        if not isinstance(kept, list) or len(kept) != len(given):
            return [where]
        return [path for place, value in enumerate(given) for path in lost(value, kept[place], f"{where}[{place}]")]
    # An empty value may be left out.
    return [] if kept == given or (not given and kept is None) else [f"{where}: {given!r}, kept {kept!r}"]


def test_every_object_is_accepted_and_every_field_is_kept(applied: Applied) -> None:
    _, pairs = applied
    assert {given["kind"] for given, _ in pairs} == set(PLURALS)
    for given, kept in pairs:
        assert lost(given, kept, given["kind"]) == []


def test_what_the_deployment_refers_to_is_there(applied: Applied) -> None:
    _, pairs = applied
    names = {kind: {one["metadata"]["name"] for one, _ in pairs if one["kind"] == kind} for kind in PLURALS}
    deployment = next(kept for given, kept in pairs if given["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] in names["ServiceAccount"]
    for volume in pod["volumes"]:
        assert volume.get("configMap", {}).get("name", "jevons-config") in names["ConfigMap"]
        assert volume.get("persistentVolumeClaim", {}).get("claimName", "jevons") in names["PersistentVolumeClaim"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
    service = next(kept for given, kept in pairs if given["kind"] == "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    probes = {name: pod["containers"][0][f"{name}Probe"]["httpGet"]["path"] for name in ("liveness", "readiness")}
    assert probes == {"liveness": "/healthz", "readiness": "/readyz"}
    ports = {port["name"] for port in pod["containers"][0]["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_the_configuration_in_it_loads_and_serves_the_port_that_is_named(applied: Applied, tmp_path: Path) -> None:
    _, pairs = applied
    data = next(kept["data"] for _, kept in pairs if kept["metadata"]["name"] == "jevons-config")
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    live = load_live_config(tmp_path / "jevons.yaml")
    service = next(kept for given, kept in pairs if given["kind"] == "Service")
    assert live.exposition.port == service["spec"]["ports"][0]["port"]


def test_what_asks_for_no_password_is_reached_by_those_alone_who_need_it(applied: Applied) -> None:
    _, pairs = applied
    policies = {kept["metadata"]["name"]: kept["spec"] for given, kept in pairs if given["kind"] == "NetworkPolicy"}
    deployment = next(kept for given, kept in pairs if given["kind"] == "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert policies["jevons-metrics"]["podSelector"]["matchLabels"].items() <= labels.items()
    data = next(kept["data"] for _, kept in pairs if kept["metadata"]["name"] == "jevons-config")
    live = yaml.safe_load(data["jevons.yaml"])
    (rule,) = policies["jevons-metrics"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [live["exposition"]["port"]]
    admin = int(live["actuator"]["batch_cap"]["sockets"][0].rpartition(":")[2])
    (from_jevons,) = [
        rule for rule in policies["haproxy-admin"]["ingress"] if admin in [port["port"] for port in rule["ports"]]
    ]
    assert [peer["podSelector"]["matchLabels"] for peer in from_jevons["from"]] == [{"app": "jevons"}]
