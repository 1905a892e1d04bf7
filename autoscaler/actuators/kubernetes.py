"""Replica counts through the scale subresource of Deployments, StatefulSets, LeaderWorkerSets or any kind that has it.

Optimistic concurrency: a count is only replaced if the object has not changed since it was read, so that somebody
else's edit is never overwritten unseen. Replicas are listed to count those that drain and to mark the least loaded to
go first.
This module must not know about batch caps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, ReplicaLoads, pools_of, wanted
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError, rights
from autoscaler.actuators.kubernetes_objects import DELETION_COST, ObjectReader, Replica, ScaleStatus, ScaleTarget
from policies.contract import Target
from policies.engine import StrictModel
from policies.spec import ScalingSpec

MAX_CONFLICTS = 4
"""Reads and writes of one count before giving up on a busy object."""
STATE_AGE_S = 2.0
"""`apply` and `members` go by a state that is at most this old."""


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
        self._reader = ObjectReader(self._api, self._targets, self._names)
        self._seen: dict[PoolName, ScaleStatus] = {}
        self._replicas: dict[PoolName, list[Replica]] = {}
        self._preferred: dict[PoolName, tuple[str, ...]] = {}
        self._read_s = -np.inf
        self._written = False  # whether counts were written since they were read

    def apply(self, target: Target) -> None:
        """Set the counts that differ. Raises `PartlyFailed`."""
        if self._written or time.monotonic() - self._read_s > STATE_AGE_S:
            self.state()
        self._written = True
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
                failures[pool.service] = f"{self._reader.where(pool)}: {error}"
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """What is in force, from one list per kind and namespace."""
        problems: list[str] = []
        state = FleetState.unknown(self._pools)
        owners = [""] * len(state.owners)
        there = self._reader.read(problems)
        unread = tuple(sorted({pool.row for pool, found in there.items() if found.owner_unread}))
        self._seen, self._replicas = {}, {}  # only now: an `apply` may be under way in another thread
        for pool, found in there.items():
            if found.owner:
                owners[pool.row] = found.owner
            scale = found.scale
            if scale is None:
                if not problems:
                    problems.append(f"{self._reader.where(pool)}: not found")
                continue
            self._seen[pool] = scale
            if found.replicas is not None:
                self._replicas[pool] = found.replicas
            at = (pool.row, pool.column)
            state.replicas_target[at] = scale.target
            state.replicas_ready[at] = min(scale.ready, scale.target)
            state.replicas_starting[at] = max(0, scale.target - scale.ready)
            leaving = sum(replica.leaving for replica in found.replicas or ())
            state.replicas_draining[at] = max(leaving, scale.ready - scale.target)
        self._read_s, self._written = time.monotonic(), False
        return replace(state, owners=tuple(owners), problems=tuple(dict.fromkeys(problems)), owners_unread=unread)

    def check(self) -> list[Access]:
        """Rights and objects, each by the server's own word; scale is tried with a server-side dry run."""
        lines: list[Access] = []
        places = {(target.namespace, target.kind) for target in self._targets.values()}
        for namespace, kind in sorted(places, key=str):
            needed = [
                ("get", kind.group, kind.plural, "scale"),
                ("update", kind.group, kind.plural, "scale"),
                ("list", kind.group, kind.plural, ""),
                ("list", "", "pods", ""),
                ("list", "autoscaling", "horizontalpodautoscalers", ""),
                ("list", "keda.sh", "scaledobjects", ""),
            ]
            if self.config.least_loaded_first:
                needed.append(("patch", "", "pods", ""))
            lines += rights(self._api, needed, namespace)
        state = self.state()
        for pool in self._pools:
            lines.append(self._try_scale(pool))
            if state.owners[pool.row]:
                lines.append(Access(self._reader.where(pool), False, f"{state.owners[pool.row]} scales it too"))
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def members(self) -> dict[str, dict[str, str]]:
        """Ready replicas that are not leaving, by pool label: name to ``address:port``; at most `STATE_AGE_S` old.

        A pool whose replicas could not be listed is left out, so that nobody takes it for empty.
        """
        if time.monotonic() - self._read_s > STATE_AGE_S:
            self.state()
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
            return Access(self._reader.where(pool), False, str(error))
        ready = self._seen[pool].ready if pool in self._seen else "unknown"
        return Access(
            self._reader.where(pool), True, f"replicas {scale['spec'].get('replicas', 0)}, ready {ready}; may scale"
        )


def _ordinal(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1
