"""Replica counts through the scale subresource of Deployments, StatefulSets, LeaderWorkerSets or any kind that has it.

Optimistic concurrency: a count is only replaced where the object is as it was read, so that somebody else's edit is
never overwritten unseen. Replicas are listed to count those that drain and to mark the least loaded to go first.
This module must not know about batch caps.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, ReplicaLoads, pools_of, wanted
from autoscaler.actuators.kube_api import Json, KubeApi, KubeConnection, KubeError
from policies.contract import Target
from policies.engine import StrictModel
from policies.spec import ScalingSpec

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
MAX_CONFLICTS = 4
"""Reads and writes of one count before giving up on a busy object."""
STATE_AGE_S = 2.0
"""`apply` goes by a state that is at most this old."""


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


class KubernetesConfig(StrictModel):
    """Replica counts in a Kubernetes cluster."""

    kind: Literal["kubernetes"] = Field(default="kubernetes", description="Which actuator this is.")
    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")
    target: ScaleTarget = Field(default=ScaleTarget(), description="The object of every pool that has no own entry.")
    targets: dict[str, ScaleTarget] = Field(
        default={}, description="The object by `service` or, where a service has several pools, `service/pool`."
    )
    least_loaded_first: bool = Field(
        default=True, description="Mark replicas with a deletion cost, so that the least loaded go first."
    )
    replica_port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=8000, description="Port on which a replica serves, for a gateway that follows the replicas."
    )


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
class _Seen:
    """One pool's object as it was last read."""

    target: int
    ready: int
    selector: Mapping[str, str]


class KubernetesActuator:
    """Sets replica counts of `n` services.

    Args:
        config: where the objects are.
        specs: the services.
        loads: running requests by replica name; all equal when None.

    Raises:
        KubeError: when there is no usable kubeconfig.
    """

    def __init__(
        self, config: KubernetesConfig, specs: Sequence[ScalingSpec], loads: ReplicaLoads | None = None
    ) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._targets = {pool: config.targets.get(pool.label, config.target) for pool in self._pools}
        self._names = {pool: pool.render(target.name) for pool, target in self._targets.items()}
        self._loads = loads
        self._api = KubeApi(config.connection)
        self._seen: dict[PoolName, _Seen] = {}
        self._replicas: dict[PoolName, list[Replica]] = {}
        self._preferred: dict[PoolName, tuple[str, ...]] = {}
        self._read_s = -np.inf

    def apply(self, target: Target) -> None:
        """Set the counts that differ. Raises `PartlyFailed`."""
        if time.monotonic() - self._read_s > STATE_AGE_S:
            self.state()
        self._read_s = -np.inf  # what is written now makes the reading old
        failures: dict[str, str] = {}
        for pool, replicas, _ in wanted(target, self._pools):
            seen = self._seen.get(pool)
            if seen is not None and seen.target == replicas:
                continue
            try:
                if seen is not None and replicas < seen.target:
                    self._mark(pool, self.victims(pool, seen.target - replicas))
                self._scale(pool, replicas, None if seen is None else seen.target)
            except KubeError as error:
                failures[pool.service] = f"{self._where(pool)}: {error}"
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """What is in force, from one list per kind and namespace."""
        problems: list[str] = []
        objects, scales = self._objects(problems)
        pods = self._pods(problems)
        state = FleetState.unknown(self._pools)
        owners = [""] * len(state.owners)
        foreign = self._foreign(problems)
        self._seen, self._replicas = {}, {}
        for pool in self._pools:
            target, name = self._targets[pool], self._names[pool]
            found = scales.get(pool) or _read_object(objects.get((target.namespace, target.kind.plural, name)))
            owner = foreign.get((target.namespace, target.kind.plural, name))
            if owner:
                owners[pool.row] = owner
            if found is None:
                if not problems:
                    problems.append(f"{self._where(pool)}: not found")
                continue
            self._seen[pool] = found
            replicas = [_replica(pod) for pod in _selected(pods.get(target.namespace, {}), found.selector)]
            if target.namespace in pods:
                self._replicas[pool] = replicas
            at = (pool.row, pool.column)
            state.replicas_target[at] = found.target
            state.replicas_ready[at] = min(found.ready, found.target)
            state.replicas_starting[at] = max(0, found.target - found.ready)
            leaving = sum(replica.leaving for replica in replicas)
            state.replicas_draining[at] = max(leaving, found.ready - found.target)
        self._read_s = time.monotonic()
        return replace(state, owners=tuple(owners), problems=tuple(dict.fromkeys(problems)))

    def check(self) -> list[Access]:
        """Rights and objects, each by the server's own word; scale is tried with a server-side dry run."""
        lines = []
        places = {(target.namespace, target.kind) for target in self._targets.values()}
        for namespace, kind in sorted(places, key=str):
            wishes = [
                ("get", kind.group, kind.plural, "scale"),
                ("update", kind.group, kind.plural, "scale"),
                ("list", kind.group, kind.plural, ""),
                ("list", "", "pods", ""),
                ("list", "autoscaling", "horizontalpodautoscalers", ""),
            ]
            if self.config.least_loaded_first:
                wishes.append(("patch", "", "pods", ""))
            for verb, group, resource, sub in wishes:
                what = f"may {verb} {resource}{'/' + sub if sub else ''} in {namespace}"
                try:
                    ok = self._api.allowed(verb, group, resource, sub, namespace)
                    lines.append(Access(what, ok, "" if ok else "not granted: bind a Role that allows it"))
                except KubeError as error:
                    lines.append(Access(what, False, str(error)))
        state = self.state()
        for pool in self._pools:
            lines.append(self._try_scale(pool))
            if state.owners[pool.row]:
                lines.append(Access(self._where(pool), False, f"{state.owners[pool.row]} scales it too"))
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def members(self) -> dict[str, dict[str, str]]:
        """Ready replicas that are not leaving, by pool label: name to ``address:port``; as of the last `state`.

        A pool whose replicas could not be listed is left out, so that nobody takes it for empty.
        """
        found = {
            pool: {
                replica.name: f"{replica.address}:{self.config.replica_port}"
                for replica in replicas
                if replica.ready and not replica.leaving and replica.address
            }
            for pool, replicas in self._replicas.items()
        }
        return {pool.label: names for pool, names in found.items() if names or not self._seen[pool].ready}

    def victims(self, pool: PoolName, count: int) -> list[str]:
        """The replicas that a scale-down by `count` should take: not ready ones, then the least loaded.

        A StatefulSet or LeaderWorkerSet always removes its highest ordinals; those are named then.
        """
        replicas = [replica for replica in self._replicas.get(pool, []) if not replica.leaving]
        if self._targets[pool].kind.plural == "deployments":
            loads = self._loads() if self._loads is not None else {}
            first = self._preferred.get(pool, ())
            order = sorted(
                replicas,
                key=lambda one: (one.name not in first, one.ready, loads.get(one.name, 0.0), one.cost, one.name),
            )
        else:
            order = sorted(replicas, key=lambda one: _ordinal(one.name), reverse=True)
        return [replica.name for replica in order[:count]]

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        """Take these first when the count falls: they have been drained."""
        self._preferred[pool] = tuple(replicas)

    def _mark(self, pool: PoolName, victims: Sequence[str]) -> None:
        """Give the victims the lowest deletion cost and the others the usual one. A pod that is gone is no error."""
        if not self.config.least_loaded_first or self._targets[pool].kind.plural != "deployments":
            return
        for replica in self._replicas.get(pool, []):
            cost = -1000 if replica.name in victims else 0
            if replica.cost == cost or replica.leaving:
                continue
            try:
                self._api.merge(replica.path, {"metadata": {"annotations": {DELETION_COST: str(cost)}}})
            except KubeError as error:
                if error.status != 404:
                    raise

    def _scale(self, pool: PoolName, replicas: int, expected: int | None) -> None:
        """Write the count, unless somebody else changed it since it was read."""
        path = f"{self._targets[pool].kind.path(self._targets[pool].namespace, self._names[pool])}/scale"
        for attempt in range(MAX_CONFLICTS):
            scale = self._api.get(path)
            current = int(scale.get("spec", {}).get("replicas", 0))
            if current == replicas:
                return
            if expected is not None and current != expected:
                raise KubeError(409, f"somebody else changed replicas from {expected} to {current}")
            expected = current
            body = {**scale, "spec": {**scale.get("spec", {}), "replicas": replicas}}
            try:
                self._api.put(path, body)
                return
            except KubeError as error:
                if error.status != 409 or attempt == MAX_CONFLICTS - 1:
                    raise

    def _try_scale(self, pool: PoolName) -> Access:
        path = f"{self._targets[pool].kind.path(self._targets[pool].namespace, self._names[pool])}/scale"
        try:
            scale = self._api.get(path)
            self._api.put(path, scale, dryRun="All")
        except KubeError as error:
            return Access(self._where(pool), False, str(error))
        ready = self._seen[pool].ready if pool in self._seen else "unknown"
        return Access(self._where(pool), True, f"replicas {scale['spec'].get('replicas', 0)}, ready {ready}; may scale")

    def _objects(self, problems: list[str]) -> tuple[dict[tuple[str, str, str], Json], dict[PoolName, _Seen]]:
        """Objects of known kinds by (namespace, plural, name), and the scale of each pool of another kind."""
        objects: dict[tuple[str, str, str], Json] = {}
        scales: dict[PoolName, _Seen] = {}
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
                    problems.append(f"{self._where(pool)}: {error}")
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

    def _foreign(self, problems: list[str]) -> dict[tuple[str, str, str], str]:
        """Other autoscalers by (namespace, plural, name) of what they scale."""
        found: dict[tuple[str, str, str], str] = {}
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
                    if error.status == 404 or (what == "ScaledObject" and error.status == 403):
                        continue  # KEDA is not installed, or none of our business
                    problems.append(f"{what} in {namespace}: {error}")
                    continue
                for item in items:
                    scaled = item["spec"].get("scaleTargetRef", {})
                    kind = scaled.get("kind", "Deployment")
                    plural = plurals.get(kind, f"{kind.lower()}s")
                    owner = f"{what} {namespace}/{item['metadata']['name']}"
                    found[namespace, plural, scaled.get("name", "")] = owner
        return found

    def _where(self, pool: PoolName) -> str:
        target = self._targets[pool]
        return f"{target.kind.plural}/{self._names[pool]} in {target.namespace}"


def _read_object(item: Json | None) -> _Seen | None:
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
    return _Seen(int(spec.get("replicas", 1)), int(status.get("readyReplicas") or 0), selector)


def _read_scale(scale: Json) -> _Seen:
    """A scale subresource, which counts replicas but not ready ones: all that there are count as ready."""
    selector = {}
    for part in str(scale.get("status", {}).get("selector", "")).split(","):
        name, equals, value = part.partition("=")
        if equals and not name.endswith("!"):
            selector[name] = value.removeprefix("=")
    wanted_count = int(scale.get("spec", {}).get("replicas", 0))
    return _Seen(wanted_count, int(scale.get("status", {}).get("replicas") or 0), selector)


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


def _ordinal(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1
