"""Which replicas of a pool go when its count falls, and the marks by which Kubernetes takes those.

Decided on what the server says at that moment, never on a watch, and on the load that Prometheus says. What one write
asks twice, to drain replicas and then to mark them, is asked of the servers once.
This module must not know what is wanted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from autoscaler.actuators.base import PoolName, ReplicaLoads
from autoscaler.actuators.kube_api import KubeApi, KubeError
from autoscaler.actuators.kubernetes_objects import ObjectReader, ScaleTarget
from autoscaler.actuators.kubernetes_pods import DELETION_COST, Replica, ordinal

DEPLOYMENTS = "deployments"
"""The kind whose pods can be given an order of removal."""
FIRST_COST, USUAL_COST = -1000, 0


class RemovalOrder:
    """The order of removal of the pools of one cluster.

    Args:
        api: the server.
        reader: of the objects.
        targets: which object holds a pool's count.
        marked: whether pods of Deployments are marked; else Kubernetes chooses among them.
        port: on which a replica serves.
        loads: running requests by pod, or by address and port; all equal when None.
    """

    def __init__(
        self,
        api: KubeApi,
        reader: ObjectReader,
        targets: Mapping[PoolName, ScaleTarget],
        marked: bool,
        port: int,
        loads: ReplicaLoads | None,
    ) -> None:
        self._api, self._reader, self._targets = api, reader, targets
        self._marked, self._port, self._ask_loads = marked, port, loads
        self._preferred: dict[PoolName, tuple[str, ...]] = {}
        self._listed: dict[PoolName, list[Replica]] = {}
        self._loads: Mapping[str, float] | None = None

    def forget(self) -> None:
        """What was listed is old: the next write asks anew."""
        self._listed, self._loads = {}, None

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        """Take these first: they have been drained."""
        self._preferred[pool] = tuple(replicas)

    def victims(self, pool: PoolName, count: int) -> list[str]:
        """The replicas that a scale-down by `count` should take.

        Not ready ones first, the longest-starting before the others, as Kubernetes takes them; then those that were
        preferred, then the least loaded. A StatefulSet or LeaderWorkerSet always removes its highest ordinals; those
        are named then. Of a Deployment none, where Kubernetes chooses among its pods without us.

        Raises:
            KubeError: when they cannot be listed.
        """
        deployment = self._targets[pool].kind.plural == DEPLOYMENTS
        if deployment and not self._marked:
            return []
        if pool not in self._listed:
            self._listed[pool] = self._reader.replicas_now(pool)
        replicas = [replica for replica in self._listed[pool] if replica.counts]
        if not deployment:
            order = sorted(replicas, key=lambda one: ordinal(one.name), reverse=True)
            return [replica.name for replica in order[:count]]
        if self._loads is None:
            self._loads = self._ask_loads() if self._ask_loads is not None else {}
        loads, first = self._loads, self._preferred.get(pool, ())

        def rank(one: Replica) -> tuple[bool, float, bool, float, int, str]:
            late_s = 0.0 if one.ready else one.since_s
            # Prometheus names a target by its address unless it is told to name it by its pod.
            load = loads.get(one.name, loads.get(f"{one.address}:{self._port}", 0.0))
            return one.ready, late_s, one.name not in first, load, one.cost, one.name

        return [replica.name for replica in sorted(replicas, key=rank)[:count]]

    def mark(self, pool: PoolName, count: int) -> None:
        """Give the victims the lowest deletion cost and the others the usual one. A pod that is gone is no error.

        Raises:
            KubeError: when they cannot be listed, or not be marked.
        """
        victims = self.victims(pool, count)
        if not self._marked or self._targets[pool].kind.plural != DEPLOYMENTS:
            return
        for place, replica in enumerate(self._listed[pool]):
            cost = FIRST_COST if replica.name in victims else USUAL_COST
            if replica.cost == cost or not replica.counts:
                continue
            try:
                self._api.merge(replica.path, {"metadata": {"annotations": {DELETION_COST: str(cost)}}})
            except KubeError as error:
                if error.status != 404:
                    raise
            self._listed[pool][place] = replace(replica, cost=cost)
