"""What a Kubernetes API server says is there: scaled objects, their replicas, and who else scales them.

This module must not know what is wanted, nor change anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from autoscaler.actuators.base import PoolName
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError
from policies.engine import StrictModel

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"


class Resource(StrictModel):
    """A kind that has a scale subresource."""

    group: str = Field(default="apps", description="API group.")
    version: str = Field(default="v1", description="API version.")
    plural: str = Field(default="deployments", description="Plural of the kind, as in paths.")

    def path(self, namespace: str, name: str = "") -> str:
        """Where the objects, or one of them, are."""
        root = f"/apis/{self.group}/{self.version}/namespaces/{namespace}/{self.plural}"
        return f"{root}/{name}" if name else root


KINDS: dict[str, Resource] = {
    "deployment": Resource(),
    "statefulset": Resource(plural="statefulsets"),
    "leaderworkerset": Resource(group="leaderworkerset.x-k8s.io", plural="leaderworkersets"),
}


class ScaleTarget(StrictModel):
    """Which object holds a pool's replica count."""

    namespace: str = Field(default="default", description="Namespace.")
    name: str = Field(default="{service}", description="Name; {service} and {pool} are filled in.")
    resource: Literal["deployment", "statefulset", "leaderworkerset"] | Resource = Field(
        default="deployment", description="Kind: a known one, or group, version and plural of one with /scale."
    )

    @property
    def kind(self) -> Resource:
        """Group, version and plural."""
        return KINDS[self.resource] if isinstance(self.resource, str) else self.resource


@dataclass(frozen=True)
class Replica:
    """One replica as Kubernetes sees it: a pod, or the first pod of a group of them."""

    name: str
    address: str
    ready: bool
    leaving: bool
    cost: int
    path: str


@dataclass(frozen=True)
class ScaleStatus:
    """One pool's object: replicas asked for, replicas that are ready, and the labels of its pods."""

    target: int
    ready: int
    selector: Mapping[str, str]


@dataclass(frozen=True)
class PoolObjects:
    """What there is of one pool.

    Attributes:
        scale: None where the object was not found.
        replicas: None where they could not be listed.
        owner: another autoscaler that acts on the object, in words; empty where there is none.
        owner_unread: whether it could not be read who else acts on it.
    """

    scale: ScaleStatus | None
    replicas: list[Replica] | None
    owner: str
    owner_unread: bool


class ObjectReader:
    """Reads the objects of all pools, one list per kind and namespace.

    Args:
        api: the server.
        targets: which object holds a pool's count.
        names: names of these objects, rendered.
    """

    def __init__(self, api: KubeApi, targets: Mapping[PoolName, ScaleTarget], names: Mapping[PoolName, str]) -> None:
        self._api = api
        self._targets = targets
        self._names = names

    def read(self, problems: list[str]) -> dict[PoolName, PoolObjects]:
        """What there is of every pool; `problems` is told what could not be read."""
        objects, scales = self._objects(problems)
        pods = self._pods(problems)
        foreign, unread = self._foreign(problems)
        found = {}
        for pool, target in self._targets.items():
            key = (target.namespace, target.kind.plural, self._names[pool])
            scale = scales.get(pool) or _read_object(objects.get(key))
            replicas = None
            if scale is not None and target.namespace in pods:
                replicas = [_replica(pod) for pod in _selected(pods[target.namespace], scale.selector)]
            found[pool] = PoolObjects(scale, replicas, foreign.get(key, ""), target.namespace in unread)
        return found

    def where(self, pool: PoolName) -> str:
        """A pool's object in words."""
        target = self._targets[pool]
        return f"{target.kind.plural}/{self._names[pool]} in {target.namespace}"

    def _objects(self, problems: list[str]) -> tuple[dict[tuple[str, str, str], Json], dict[PoolName, ScaleStatus]]:
        """Objects of known kinds by (namespace, plural, name), and the scale of each pool of another kind."""
        objects: dict[tuple[str, str, str], Json] = {}
        scales: dict[PoolName, ScaleStatus] = {}
        known = {kind.plural for kind in KINDS.values()}
        for namespace, kind in {
            (one.namespace, one.kind) for one in self._targets.values() if one.kind.plural in known
        }:
            try:
                for item in self._api.items(kind.path(namespace)):
                    objects[namespace, kind.plural, item["metadata"]["name"]] = item
            except KubeError as error:
                problems.append(f"{kind.plural} in {namespace}: {error}")
        for pool, target in self._targets.items():
            if target.kind.plural not in known:
                try:
                    scales[pool] = _read_scale(
                        self._api.get(f"{target.kind.path(target.namespace, self._names[pool])}/scale")
                    )
                except KubeError as error:
                    problems.append(f"{self.where(pool)}: {error}")
        return objects, scales

    def _pods(self, problems: list[str]) -> dict[str, dict[tuple[str, str], list[Json]]]:
        """Pods by namespace and by each of their labels; without the namespaces that could not be read."""
        found: dict[str, dict[tuple[str, str], list[Json]]] = {}
        for namespace in sorted({target.namespace for target in self._targets.values()}):
            index: dict[tuple[str, str], list[Json]] = {}
            try:
                for pod in self._api.items(f"/api/v1/namespaces/{namespace}/pods"):
                    for label in pod["metadata"].get("labels", {}).items():
                        index.setdefault(label, []).append(pod)
                found[namespace] = index
            except KubeError as error:
                problems.append(f"pods in {namespace}: {error}")
        return found

    def _foreign(self, problems: list[str]) -> tuple[dict[tuple[str, str, str], str], set[str]]:
        """Other autoscalers by (namespace, plural, name) of what they scale, and namespaces where they are unknown."""
        found: dict[tuple[str, str, str], str] = {}
        unread: set[str] = set()
        plurals = {"Deployment": "deployments", "StatefulSet": "statefulsets", "LeaderWorkerSet": "leaderworkersets"}
        places = {
            # v1 is served by every release; it names the target as the newer versions do.
            "HorizontalPodAutoscaler": "/apis/autoscaling/v1/namespaces/{}/horizontalpodautoscalers",
            "ScaledObject": "/apis/keda.sh/v1alpha1/namespaces/{}/scaledobjects",
        }
        for namespace in sorted({target.namespace for target in self._targets.values()}):
            for what, path in places.items():
                try:
                    items = self._api.items(path.format(namespace))
                except KubeError as error:
                    if error.status != 404:  # else it is not installed
                        problems.append(f"{what}s in {namespace}: {error}")
                        unread.add(namespace)
                    continue
                for item in items:
                    scaled = item["spec"].get("scaleTargetRef", {})
                    kind = scaled.get("kind", "Deployment")
                    plural = plurals.get(kind, f"{kind.lower()}s")
                    owner = f"{what} {namespace}/{item['metadata']['name']}"
                    found[namespace, plural, scaled.get("name", "")] = owner
        return found, unread


def _read_object(item: Json | None) -> ScaleStatus | None:
    """A Deployment, StatefulSet or LeaderWorkerSet."""
    if item is None:
        return None
    spec, status = item.get("spec", {}), item.get("status", {})
    selector = spec.get("selector", {}).get("matchLabels", {})
    if "leaderWorkerTemplate" in spec:
        selector = {
            "leaderworkerset.sigs.k8s.io/name": item["metadata"]["name"],
            "leaderworkerset.sigs.k8s.io/worker-index": "0",
        }
    return ScaleStatus(int(spec.get("replicas", 1)), int(status.get("readyReplicas") or 0), selector)


def _read_scale(scale: Json) -> ScaleStatus:
    """A scale subresource, which counts replicas but not ready ones: all that there are count as ready."""
    selector = {}
    for part in str(scale.get("status", {}).get("selector", "")).split(","):
        name, equals, value = part.partition("=")
        if equals and not name.endswith("!"):
            selector[name] = value.removeprefix("=")
    wanted_count = int(scale.get("spec", {}).get("replicas", 0))
    return ScaleStatus(wanted_count, int(scale.get("status", {}).get("replicas") or 0), selector)


def _selected(index: Mapping[tuple[str, str], list[Json]], selector: Mapping[str, str]) -> Iterable[Json]:
    if not selector:
        return []
    first = next(iter(selector.items()))
    return [pod for pod in index.get(first, []) if selector.items() <= pod["metadata"]["labels"].items()]


def _replica(pod: Json) -> Replica:
    metadata: dict[str, Any] = pod["metadata"]
    status = pod.get("status", {})
    conditions = {one.get("type"): one.get("status") for one in status.get("conditions", [])}
    try:
        cost = int(metadata.get("annotations", {}).get(DELETION_COST, 0))
    except ValueError:
        cost = 0
    return Replica(
        name=metadata["name"],
        address=status.get("podIP", ""),
        ready=conditions.get("Ready") == "True",
        leaving="deletionTimestamp" in metadata,
        cost=cost,
        path=f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}",
    )
