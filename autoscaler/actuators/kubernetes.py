"""Replica counts through the scale subresource of Deployments, StatefulSets, LeaderWorkerSets or any kind that has it.

Optimistic concurrency: a count is only replaced if the object has not changed since it was read, so that somebody
else's edit is never overwritten unseen. Replicas are watched, to tell those that are ready from those that start, drain
or never come; which of them go is decided on what the server says at that moment.
This module must not know about batch caps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from autoscaler.actuators.base import (
    STATE_AGE_S,
    Access,
    Announcement,
    FleetState,
    PartlyFailed,
    PoolName,
    ReplicaLoads,
    pools_of,
    refuse_shared,
    shape_of,
    wanted,
)
from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError, Needed, parsed, rights
from autoscaler.actuators.kubernetes_events import EventWriter
from autoscaler.actuators.kubernetes_objects import ObjectReader, PoolObjects, ScaleStatus, ScaleTarget
from autoscaler.actuators.kubernetes_owners import MANAGER, Claim, ClaimReader, OwnReplicas
from autoscaler.actuators.kubernetes_pods import Replica, going
from autoscaler.actuators.removal_order import DEPLOYMENTS, RemovalOrder
from autoscaler.actuators.server_side_apply import KIND_NAMES, declare_replicas
from autoscaler.actuators.starts import Start, StartLedger, StartSpec
from autoscaler.stages import left_behind
from policies.contract import ActuationFailed, Floats, Target
from policies.engine import StrictModel
from policies.spec import ScalingSpec

MAX_CONFLICTS = 4
"""Reads and writes of one count before giving up on a busy object."""


class KubernetesConfig(StrictModel):
    """Replica counts in a Kubernetes cluster."""

    kind: Literal["kubernetes"] = Field(default="kubernetes", description="Which actuator this is.")
    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")
    target: ScaleTarget = Field(default=ScaleTarget(), description="The object of every pool that has no own entry.")
    targets: dict[str, ScaleTarget] = Field(
        default={}, description="The object by `service` or, where a service has several pools, `service/pool`."
    )
    least_loaded_first: bool = Field(
        default=True,
        description="Mark the pods of Deployments with a deletion cost, so that the least loaded, or those that a"
        " gateway has drained, go first. Without it Kubernetes chooses, and none is drained before it goes.",
    )
    events: bool = Field(
        default=True, description="Write Kubernetes Events on the objects: on changed counts, and on holds that begin."
    )
    own_replicas: OwnReplicas = Field(
        default=False,
        description="Declare spec.replicas by server-side apply with field manager jevons, so that GitOps sees who "
        "owns it, and put back what others set; `force` also takes it from managers that declare it.",
    )
    starts: StartSpec = Field(default=StartSpec(), description="How long a start may take.")
    replica_port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=8000, description="Port on which a replica serves, for a gateway that follows the replicas."
    )

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds."""
        return {"connection.deadline_s": self.connection.deadline_s}

    @model_validator(mode="after")
    def _owned_kinds(self) -> KubernetesConfig:
        kinds = {target.kind.plural for target in (self.target, *self.targets.values())}
        if self.own_replicas and not kinds <= set(KIND_NAMES):
            raise ValueError("own_replicas: only for resource deployment, statefulset or leaderworkerset")
        return self


class KubernetesActuator:
    """Sets replica counts of `n` services.

    Args:
        config: where the objects are.
        specs: the services.
        loads: running requests by pod, or by address and port; all equal when None.

    Raises:
        ConfigError: when two pools have one object.
        KubeError: when there is no usable kubeconfig.
    """

    def __init__(
        self, config: KubernetesConfig, specs: Sequence[ScalingSpec], loads: ReplicaLoads | None = None
    ) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._targets = {pool: config.targets.get(pool.label, config.target) for pool in self._pools}
        self._names = {pool: pool.render(target.name) for pool, target in self._targets.items()}
        refuse_shared(
            {pool: target.kind.path(target.namespace, self._names[pool]) for pool, target in self._targets.items()}
        )
        self._api = KubeApi(config.connection)
        self._reader = ObjectReader(self._api, self._targets, self._names)
        self._order = RemovalOrder(
            self._api, self._reader, self._targets, config.least_loaded_first, config.replica_port, loads
        )
        self._events = EventWriter(self._api)
        self._uids: dict[PoolName, str] = {}
        self._claims = ClaimReader(self._api, config.own_replicas)
        self._claimed: dict[PoolName, Claim] = {}
        self._wrote = np.full(shape_of(self._pools), np.nan)
        self._starts = StartLedger(specs, config.starts)
        self._gpus = {pool: specs[pool.row].pools[pool.column].engine.gpus_per_replica for pool in self._pools}
        self._seen: dict[PoolName, ScaleStatus] = {}
        self._replicas: dict[PoolName, list[Replica]] = {}
        self._problems: tuple[str, ...] = ()  # of the last reading
        self._read_s = -np.inf
        self._written = False  # whether counts were written since they were read

    def apply(self, target: Target) -> None:
        """Set the counts that differ; where it is not known what is in force, nothing is set. Raises `PartlyFailed`."""
        if self._written or time.monotonic() - self._read_s > STATE_AGE_S:
            self.state()
        self._written = True
        self._wrote = np.full_like(self._wrote, np.nan)
        failures: dict[str, str] = {}
        for pool, replicas, _ in wanted(target, self._pools):
            seen = self._seen.get(pool)
            if seen is None:  # it may be an edit, or a scale-down of which nobody has drained the replicas
                where = self._reader.where(pool)
                known = (one for one in self._problems if one.startswith(f"{where}: "))
                failures[pool.service] = next(known, f"{where}: the count in force is not known")
                continue
            declared = not self.config.own_replicas or self._claimed[pool].ours
            if seen.target == replicas and declared:
                continue
            try:
                if replicas < seen.target:
                    self._order.mark(pool, seen.target - replicas)
                self._scale(pool, replicas, seen.target)
                self._wrote[pool.row, pool.column] = replicas
            except KubeError as error:
                failures[pool.service] = f"{self._reader.where(pool)}: {error}"
        self._order.forget()
        if failures:
            raise PartlyFailed(failures)

    def wrote(self) -> Floats:
        """(n, P) counts that the last `apply` wrote; NaN where it wrote none."""
        return self._wrote

    def announce(self, announcement: Announcement) -> None:
        """As an Event on the objects. Raises `ActuationFailed`."""
        for pool in self._pools if self.config.events else ():
            if pool.row != announcement.row or announcement.column not in (None, pool.column):
                continue
            target = self._targets[pool]
            group_version = f"{target.kind.group}/{target.kind.version}"
            try:
                regarding = {
                    "apiVersion": group_version,
                    "kind": self._events.kind(group_version, target.kind.plural),
                    "namespace": target.namespace,
                    "name": self._names[pool],
                    "uid": self._uids.get(pool, ""),
                }
                self._events.write(regarding, announcement)
            except KubeError as error:
                raise ActuationFailed(f"an Event on {self._reader.where(pool)}: {error}") from None

    def state(self) -> FleetState:
        """What is in force: the objects by name, their pods from a watch."""
        problems: list[str] = []
        state = FleetState.unknown(self._pools)
        owners = [""] * len(state.owners)
        with self._api.one_operation():
            there = self._reader.read(problems)
            claims = {pool: self._claims.read(pool, found.item, problems) for pool, found in there.items()}
        unread = sorted({pool.row for pool, found in there.items() if found.owner_unread or claims[pool].unread})
        set_by = list(owners)
        starts: dict[PoolName, list[Start]] = {}
        scales: dict[PoolName, ScaleStatus] = {}
        replicas: dict[PoolName, list[Replica]] = {}
        for pool, found in there.items():
            owners[pool.row] = owners[pool.row] or claims[pool].owner or found.owner
            if found.owner and not claims[pool].owner:
                claims[pool] = replace(claims[pool], owner=f"{found.owner} scales it too")
            set_by[pool.row] = set_by[pool.row] or claims[pool].author
            scale = found.scale
            if scale is None:
                continue
            scales[pool] = scale
            if found.item is not None:
                self._uids[pool] = str(found.item["metadata"].get("uid", ""))
            at = (pool.row, pool.column)
            state.replicas_target[at] = scale.target
            ready = self._ready(pool, found, problems)
            if ready is None:
                continue
            if found.replicas is not None:
                replicas[pool] = found.replicas
            state.replicas_ready[at] = min(ready, scale.target)
            state.replicas_starting[at] = max(0, scale.target - ready)
            starts[pool] = _starts(found.replicas or (), scale.failure)
            if found.replicas is not None:
                state.replicas_draining[at] = max(going(found.replicas, scale.target), ready - scale.target)
        problems = list(dict.fromkeys(problems))
        if not left_behind():  # a newer reading, or what has been written since, must not be undone
            # Only now, and whole: an `apply` may be under way in another thread.
            self._claimed, self._seen, self._replicas = claims, scales, replicas
            self._problems = tuple(problems)
            self._read_s, self._written = time.monotonic(), False
            self._order.forget()
        state = replace(
            state,
            owners=tuple(owners),
            problems=tuple(problems),
            owners_unread=tuple(unread),
            set_by=tuple(set_by),
            edits_put_back=bool(self.config.own_replicas),
        )
        return self._starts.settle(state, starts)

    def check(self) -> list[Access]:
        """Rights and objects, each by the server's own word; scale is tried with a server-side dry run."""
        lines: list[Access] = []
        for namespace, needed in self._reader.needed().items():
            for pool, target in self._targets.items():
                if target.namespace == namespace:
                    kind, name = target.kind, self._names[pool]
                    needed.append(Needed("get", kind.group, kind.plural, "scale", name))
                    if self.config.own_replicas:
                        needed.append(Needed("patch", kind.group, kind.plural, "", name))
                    else:
                        needed.append(Needed("update", kind.group, kind.plural, "scale", name))
            if self.config.events:
                needed.append(Needed("create", "events.k8s.io", "events"))
            marked = any(one.kind.plural == DEPLOYMENTS for one in self._targets.values() if one.namespace == namespace)
            if self.config.least_loaded_first and marked:
                needed.append(Needed("patch", "", "pods"))
            lines += rights(self._api, dict.fromkeys(needed), namespace)
        state = self.state()
        lines += [Access("replicas", False, problem) for problem in state.problems]
        for pool in self._pools:
            lines.append(self._try_scale(pool, state.replicas_ready[pool.row, pool.column]))
            claim = self._claimed[pool]
            if claim.owner or claim.remark:
                lines.append(Access(self._reader.where(pool), not claim.owner, claim.owner or claim.remark))
        return lines

    def close(self) -> None:
        """End the watches and drop connections."""
        self._reader.close()
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
                if replica.ready and replica.counts and replica.address
            }
            for pool, replicas in self._replicas.items()
        }
        # The object counts ready ones that are not among the pods: not known, rather than empty.
        return {pool.label: names for pool, names in found.items() if names or not self._seen[pool].ready}

    def victims(self, pool: PoolName, count: int) -> list[str]:
        """The replicas that a scale-down by `count` should take, as the server sees them. Raises `KubeError`."""
        return self._order.victims(pool, count)

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        """Take these first when the count falls: they have been drained."""
        self._order.prefer(pool, replicas)

    def rehearse(self, pool: PoolName, count: int) -> None:
        """Mark the replicas to remove, and try the scale-down with a server-side dry run. Raises `KubeError`."""
        seen = self._seen.get(pool)
        if seen is None:
            raise KubeError(0, f"{self._reader.where(pool)}: the count in force is not known")
        try:
            self._order.mark(pool, seen.target - count)
            self._scale(pool, count, seen.target, dry_run=True)
        except KubeError as error:
            raise KubeError(error.status, f"{self._reader.where(pool)}: {error}") from None

    def _ready(self, pool: PoolName, found: PoolObjects, problems: list[str]) -> int | None:
        """Ready replicas: as the object says, else as many as are ready of its pods; None where that is not known."""
        scale = found.scale
        if scale is None or scale.ready is not None:
            return None if scale is None else scale.ready
        if not scale.selector.requirements:
            problems.append(f"{self._reader.where(pool)}: its scale names no selector, so nobody knows what is ready")
        if found.replicas is None:
            return None
        counted = [replica for replica in found.replicas if replica.counts]
        low, high = sorted((scale.target, scale.count))
        if not low <= len(counted) <= high:
            problems.append(
                f"{self._reader.where(pool)}: {len(counted)} pods for {scale.count} replicas, {scale.target} asked for:"
                " its selector counts another unit than its replicas"
            )
            return None
        return sum(replica.ready for replica in counted)

    def _scale(self, pool: PoolName, replicas: int, expected: int, dry_run: bool = False) -> None:
        """Write the count, unless somebody else changed it since it was read."""
        path = self._path(pool)
        if self.config.own_replicas:
            declare_replicas(self._api, path, replicas, self.config.own_replicas, dry_run)
            return
        path = f"{path}/scale"
        for attempt in range(MAX_CONFLICTS):
            scale = self._api.get(path)
            with parsed():
                current = int(scale["spec"].get("replicas", 0))
                body = {**scale, "spec": {**scale["spec"], "replicas": replicas}}
            if current == replicas:
                return
            if current != expected:
                raise KubeError(409, f"somebody else changed replicas from {expected} to {current}")
            try:
                self._api.put(path, body, fieldManager=MANAGER, dryRun="All" if dry_run else "")
                return
            except KubeError as error:
                if error.status != 409 or attempt == MAX_CONFLICTS - 1:
                    raise

    def _path(self, pool: PoolName) -> str:
        return self._targets[pool].kind.path(self._targets[pool].namespace, self._names[pool])

    def _try_scale(self, pool: PoolName, ready: float) -> Access:
        path = self._path(pool)
        try:
            scale = self._api.get(f"{path}/scale")
            with parsed():
                count = int(scale["spec"].get("replicas", 0))
            if self.config.own_replicas:
                declare_replicas(self._api, path, count, self.config.own_replicas, dry_run=True)
            else:
                self._api.put(f"{path}/scale", scale, dryRun="All")
        except KubeError as error:
            return Access(self._reader.where(pool), False, str(error))
        told = "unknown" if np.isnan(ready) else f"{ready:.0f}"
        detail = f"replicas {count}, ready {told}; may scale"
        seen, expected = self._seen.get(pool), self._gpus[pool]
        fits = seen is None or seen.gpus in (0, expected)
        if seen is not None and not fits:
            group = f" ({seen.group_size} pods)" if seen.group_size > 1 else ""
            detail += f"; a replica{group} asks for {seen.gpus} GPUs, but its engine profile has {expected}"
        return Access(self._reader.where(pool), fits, detail)


def _starts(replicas: Sequence[Replica], failure: str) -> list[Start]:
    """The replicas that are not ready, and why there are not more of them."""
    now_s = time.time()
    found = [
        Start(one.name, now_s - one.since_s, one.reason, placed=bool(one.address))
        for one in replicas
        if one.counts and not one.ready
    ]
    return [*found, Start("", 0.0, failure)] if failure else found
