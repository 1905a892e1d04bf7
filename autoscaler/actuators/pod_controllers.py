"""Which pods are an object's own: by the reference to their controller, as Kubernetes counts them, not by their labels.

Whoever may make pods may give them any label. A reference to a controller that is not there does not last: the garbage
collector deletes such a pod. One to a controller that is there makes the pod that controller's, and it is counted.
This module must not know where pods are read from, nor what they are counted for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from autoscaler.actuators.kubernetes_pods import GROUP, LEADER, WORKER, Replica, plain

APPS = "apps/v1"
TEMPLATE_HASH = "pod-template-hash"
NAMED = 3
"""Controllers of strangers that are named."""


class Parent(NamedTuple):
    """An object that has pods."""

    plural: str
    """Of its kind."""
    name: str
    uid: str

    def owns(self, pod: Replica) -> bool:
        """Whether a pod with the right labels is one of its own.

        A Deployment's ReplicaSets, and the StatefulSets of a LeaderWorkerSet, are known by their names: to read them
        would take rights on all of a namespace. Of other kinds it is not known what stands between them and their pods.
        """
        of = pod.controller
        match self.plural:
            case "deployments":
                return of[:3] == (APPS, "ReplicaSet", f"{self.name}-{pod.labels.get(TEMPLATE_HASH, '')}")
            case "statefulsets":
                return of == (APPS, "StatefulSet", self.name, self.uid)
            case "leaderworkersets":
                leads = pod.labels.get(WORKER) == LEADER
                name = self.name if leads else f"{self.name}-{pod.labels.get(GROUP, '')}"
                return of[:3] == (APPS, "StatefulSet", name)
        return of.kind != ""


def strangers(pods: Iterable[Replica], selector: str) -> str:
    """Pods that match an object's selector and are not its own, in one sentence; empty where there are none."""
    found = [pod.controller for pod in pods if pod.counts]
    if not found:
        return ""
    owners = sorted({f"{one.kind} {one.name}" if one.kind else "nobody" for one in found})
    more = f" and {len(owners) - NAMED} others" if len(owners) > NAMED else ""
    whose = ", ".join(plain(one) for one in owners[:NAMED])
    count = "1 pod matches" if len(found) == 1 else f"{len(found)} pods match"
    belong = "belongs" if len(found) == 1 else "belong"
    return f"{count} {plain(selector)} but {belong} to {whose}{more}: not counted, routed to, drained or marked"
