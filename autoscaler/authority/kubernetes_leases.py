"""Leases as Kubernetes Lease objects: one per service, optimistic concurrency, the transition count as fencing token.

The annotation `jevons.dev/kill-switch: "true"` on a Lease stops all action on its service; `kubectl annotate` sets it
while the controller is stuck. This is the only module that reads or writes Lease objects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np

from autoscaler.actuators.base import Access
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError, rights
from autoscaler.authority.controls import ANNOTATION
from autoscaler.authority.leases import NOT_HELD, LeaseSpec, LeasesUnavailable, SteadyClock, Watch
from policies.contract import Ints

PARALLEL = 16
CONFLICT, MISSING = 409, 404
LEASE_VERBS = ("get", "create", "update")


class KubernetesLeases:
    """One Lease object per service in one namespace.

    Args:
        spec: where they are.
        services: which services to hold.
        holder: name of this controller, unlike any other's.
        now: a clock that never jumps, seconds.

    Raises:
        KubeError: when there is no usable kubeconfig.
    """

    def __init__(
        self, spec: LeaseSpec, services: Sequence[str], holder: str, now: SteadyClock = time.monotonic
    ) -> None:
        self.holder = holder
        self._api = KubeApi(spec.connection)
        self._spec = spec
        self._services = tuple(services)
        self._watch = Watch(services, spec.duration_s, now)
        self._marks = dict.fromkeys(self._services, "")

    def renew(self) -> Ints:
        """One read and at most one write per service, several at a time."""
        with ThreadPoolExecutor(min(PARALLEL, len(self._services))) as pool:
            return np.array(list(pool.map(self._renew_one, self._services)), np.int64)

    def annotated(self) -> tuple[str, ...]:
        """Why the annotation engages the kill switch."""
        return tuple(self._marks[service] for service in self._services)

    def release(self) -> None:
        """The objects stay, for their transitions; the holder is nobody."""
        for service in self._services:
            lease = self._asked("GET", service)
            if lease is not None and lease["spec"].get("holderIdentity") == self.holder:
                lease["spec"]["holderIdentity"] = ""
                self._asked("PUT", service, lease)

    def check(self) -> list[Access]:
        """The rights without which nobody ever leads."""
        group = "coordination.k8s.io"
        return rights(self._api, [(verb, group, "leases", "") for verb in LEASE_VERBS], self._spec.namespace)

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def _renew_one(self, service: str) -> int:
        lease = self._asked("GET", service)
        if lease is None:
            return self._create(service)
        mark = str(lease["metadata"].get("annotations", {}).get(ANNOTATION, ""))
        engaged = mark.lower() == "true"
        self._marks[service] = f"annotation {ANNOTATION} of Lease {self._name(service)}" if engaged else ""
        spec = lease.setdefault("spec", {})
        token, holder = int(spec.get("leaseTransitions", 0)), str(spec.get("holderIdentity", ""))
        if holder != self.holder:
            if holder and not self._watch.expired(service, holder, (holder, token, spec.get("renewTime"))):
                return NOT_HELD
            token += 1
            spec |= {"holderIdentity": self.holder, "leaseTransitions": token, "acquireTime": _now()}
        spec |= {"renewTime": _now(), "leaseDurationSeconds": max(round(self._spec.duration_s), 1)}
        # Replaced only as it was read: of two controllers that see a lease expire, one gets it.
        return token if self._asked("PUT", service, lease) is not None else NOT_HELD

    def _create(self, service: str) -> int:
        lease: Json = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name(service), "namespace": self._spec.namespace},
            "spec": {
                "holderIdentity": self.holder,
                "leaseTransitions": 1,
                "leaseDurationSeconds": max(round(self._spec.duration_s), 1),
                "acquireTime": _now(),
                "renewTime": _now(),
            },
        }
        return 1 if self._asked("POST", service, lease) is not None else NOT_HELD

    def _asked(self, method: str, service: str, body: Json | None = None) -> Json | None:
        """The answer; None where the object is missing, or not as it was read any more."""
        folder = f"/apis/coordination.k8s.io/v1/namespaces/{self._spec.namespace}/leases"
        try:
            if method == "POST":
                return self._api.post(folder, body or {})
            path = f"{folder}/{self._name(service)}"
            return self._api.get(path) if body is None else self._api.put(path, body)
        except KubeError as error:
            if error.status in {CONFLICT, MISSING}:
                return None
            raise LeasesUnavailable(f"Lease {self._name(service)}: {error}") from error

    def _name(self, service: str) -> str:
        return f"{self._spec.prefix}{service}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
