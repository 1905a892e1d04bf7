"""Replicas as Kubernetes sees them: pods, or groups of pods, and why one does not get ready.

This module must not know where pods are read from, nor what they are counted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from sys import intern
from typing import NamedTuple

from autoscaler.actuators.kube_api import Json
from autoscaler.actuators.kube_paths import path_of
from policies.json_text import read_integer

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
GROUP = "leaderworkerset.sigs.k8s.io/group-index"
WORKER = "leaderworkerset.sigs.k8s.io/worker-index"
LEADER = "0"
REASON_LENGTH = 200
STARTING_REASONS = ("", "ContainerCreating", "PodInitializing")
"""A container that waits for one of these is on its way."""
CRASHES = "CrashLoopBackOff"
SERVED_S = 60.0
"""Shortest run of a container that counts as having served: one without a readiness probe is ready as soon as it runs,
so for a moment in each of its crashes, seconds."""


class Controller(NamedTuple):
    """What a pod says of the controller that made it."""

    api: str
    """Group and version."""
    kind: str
    name: str
    uid: str


NOBODY = Controller("", "", "", "")


@dataclass(frozen=True, slots=True)
class Replica:
    """One replica: a pod, or the leader of a group of them. Of a pod only this is kept."""

    name: str
    path: str
    labels: Mapping[str, str]
    address: str
    ready: bool
    leaving: bool
    ended: bool
    """Evicted or completed: it will never serve again, and its owner has replaced it."""
    cost: int
    since_s: float
    """Unix time since when it is as ready as it is."""
    reason: str
    """Why it does not get ready, empty where nothing is known to be wrong."""
    controller: Controller

    @property
    def counts(self) -> bool:
        """Whether it is one of the replicas that were asked for."""
        return not self.leaving and not self.ended


def read_pod(pod: Json) -> Replica:
    """What is kept of a pod.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, KubeError: when it is no pod.
    """
    metadata: Json = pod["metadata"]
    status: Json = pod.get("status") or {}
    conditions = {one["type"]: one for one in status.get("conditions") or ()}
    ready = conditions.get("Ready") or {}
    reason = _reason(conditions, status)
    made, changed = metadata["creationTimestamp"], ready.get("lastTransitionTime")
    if CRASHES in reason and not _served(status, changed):
        changed = made
    return Replica(
        name=str(metadata["name"]),
        path=path_of("v1", metadata["namespace"], "pods", metadata["name"]),
        labels=dict(metadata.get("labels") or {}),
        address=str(status.get("podIP") or ""),
        ready=ready.get("status") == "True",
        leaving="deletionTimestamp" in metadata,
        ended=status.get("phase") in ("Failed", "Succeeded"),
        cost=_cost(metadata),
        since_s=unix_s(changed or made),
        reason="" if ready.get("status") == "True" else reason,
        controller=_controller(metadata),
    )


def groups(pods: Iterable[Replica], size: int) -> list[Replica]:
    """Replicas of a LeaderWorkerSet: each group of pods as its leader, ready when all of its `size` pods are."""
    found: dict[str, list[Replica]] = {}
    for pod in pods:
        if pod.counts or pod.labels.get(WORKER) == LEADER:
            found.setdefault(pod.labels.get(GROUP, ""), []).append(pod)
    replicas = []
    for pods_of_group in found.values():
        leader = next((pod for pod in pods_of_group if pod.labels.get(WORKER) == LEADER), None)
        if leader is None:
            continue  # the group is being made anew
        late = [pod for pod in pods_of_group if not pod.ready]
        ready = not late and len(pods_of_group) >= size
        since_s = min((pod.since_s for pod in late), default=leader.since_s)
        reason = next((f"{pod.name}: {pod.reason}" for pod in late if pod.reason), "")
        replicas.append(replace(leader, ready=ready, since_s=since_s, reason="" if ready else reason))
    return replicas


def going(replicas: Iterable[Replica], target: int) -> int:
    """How many are there beyond the `target`: those that leave, and the surplus of a rollout, which will.

    A new replica of a rollout holds its GPUs, and may be scraped, from when it has an address on, ready or not. Without
    one it waits for a node, perhaps for ever.
    """
    there = [one for one in replicas if one.leaving or one.address]
    leaving = sum(one.leaving for one in there)
    return leaving + max(0, sum(one.counts for one in there) - target)


def plain(text: object) -> str:
    """Words of a server in one line of bounded length, without control characters."""
    line = " ".join(str(text).split())
    return "".join(one for one in line if one.isprintable())[:REASON_LENGTH]


def unix_s(time: str) -> float:
    """Unix time of a timestamp of the API server, seconds. Raises `ValueError`."""
    return datetime.fromisoformat(time).timestamp()


def _reason(conditions: Mapping[str, Json], status: Json) -> str:
    """Unschedulable, an image that cannot be pulled, a crash: in the words of scheduler and kubelet."""
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return plain(f"{scheduled.get('reason', 'not scheduled')}: {scheduled.get('message', '')}")
    for one in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (one.get("state") or {}).get("waiting") or {}
        if waiting.get("reason", "") not in STARTING_REASONS:
            ended = (one.get("lastState") or {}).get("terminated") or {}
            last = f", last {ended.get('reason')} with exit code {ended.get('exitCode')}" if ended else ""
            return plain(f"{waiting['reason']}: {waiting.get('message', '')}{last}")
    ready = conditions.get("Ready") or {}
    return plain(ready.get("message", "")) if ready.get("status") == "False" else ""


def _controller(metadata: Json) -> Controller:
    for one in metadata.get("ownerReferences") or ():
        if one.get("controller"):
            # One text for all pods of a controller: there may be very many of them.
            return Controller(*(intern(str(one[field])) for field in ("apiVersion", "kind", "name", "uid")))
    return NOBODY


def _served(status: Json, changed: str | None) -> bool:
    """Whether a pod that crashes had served until it `changed`: in an earlier run than the last one, or in a long one.

    What was never ready, or only for moments, has been starting since it was made.
    """
    for one in status.get("containerStatuses") or ():
        ended = (one.get("lastState") or {}).get("terminated") or {}
        if ((one.get("state") or {}).get("waiting") or {}).get("reason") == CRASHES and changed:
            began, over = ended.get("startedAt"), ended.get("finishedAt")
            if not began or not over:
                return False
            return unix_s(changed) < unix_s(began) or unix_s(over) - unix_s(began) >= SERVED_S
    return False


def _cost(metadata: Json) -> int:
    try:
        return read_integer((metadata.get("annotations") or {}).get(DELETION_COST, "0"))
    except ValueError:
        return 0


def ordinal(name: str) -> int:
    """The number at the end of a StatefulSet's or LeaderWorkerSet's pod; -1 without one."""
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdecimal() else -1
