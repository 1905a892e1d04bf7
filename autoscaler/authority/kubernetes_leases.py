"""Leases as Kubernetes Lease objects: one per service, optimistic concurrency, the transition count as fencing token.

The annotation `jevons.dev/kill-switch: "true"` on a Lease stops all action on its service; `kubectl annotate` sets it
while the controller is stuck. This is the only module that reads or writes Lease objects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime

import numpy as np

from autoscaler.actuators.base import Access
from autoscaler.actuators.kube_api import Json, KubeApi, KubeError, Needed, rights
from autoscaler.authority.controls import ANNOTATION
from autoscaler.authority.leases import NOT_HELD, LeaseSpec, LeasesUnavailable, SteadyClock, Watch
from policies.contract import Ints

PARALLEL = 16
CONFLICT, MISSING = 409, 404
LEASE_VERBS = ("get", "update")


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
        self._unread = dict.fromkeys(self._services, "")

    def renew(self) -> Ints:
        """One read and at most one write per service, several at a time; one that fails leaves the others theirs."""
        with ThreadPoolExecutor(min(PARALLEL, len(self._services))) as pool:
            tokens = np.array(list(pool.map(self._renewed, self._services)), np.int64)
        if all(self._unread.values()):
            raise LeasesUnavailable(next(iter(self._unread.values())))
        return tokens

    def unread(self) -> tuple[str, ...]:
        """What the server said of each Lease that was not renewed because it could not be read or written."""
        return tuple(self._unread[service] for service in self._services)

    def annotated(self) -> tuple[str, ...]:
        """Why the annotation engages the kill switch."""
        return tuple(self._marks[service] for service in self._services)

    def release(self) -> None:
        """The objects stay, for their transitions; the holder is nobody."""
        failures = []
        for service in self._services:
            try:
                self._release_one(service)
            except LeasesUnavailable as error:
                failures.append(str(error))
        if failures:
            raise LeasesUnavailable("; ".join(failures))

    def check(self) -> list[Access]:
        """The rights without which nobody ever leads."""
        group, namespace, lines, missing = "coordination.k8s.io", self._spec.namespace, [], False
        for service in self._services:
            needed = [Needed(verb, group, "leases", "", self._name(service)) for verb in LEASE_VERBS]
            lines += rights(self._api, needed, namespace)
            with suppress(LeasesUnavailable):  # said by the right that is missing
                missing |= self._asked("GET", service) is None
        if missing:  # the right to make one cannot be given by name
            lines += rights(self._api, [Needed("create", group, "leases")], namespace)
        return lines

    def close(self) -> None:
        """Drop connections."""
        self._api.close()

    def _release_one(self, service: str) -> None:
        lease = self._asked("GET", service)
        if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self.holder:
            lease["spec"]["holderIdentity"] = ""
            self._asked("PUT", service, lease)

    def _renewed(self, service: str) -> int:
        try:
            with self._api.one_operation():
                token, self._unread[service] = self._renew_one(service), ""
        except LeasesUnavailable as error:
            token, self._unread[service] = NOT_HELD, str(error)
        return token

    def _renew_one(self, service: str) -> int:
        lease = self._asked("GET", service)
        if lease is None:
            return self._create(service)
        mark = str(lease["metadata"].get("annotations", {}).get(ANNOTATION, ""))
        engaged = mark.lower() == "true"
        name = self._name(service)
        way_out = f"`kubectl annotate lease {name} {ANNOTATION}-` ends it"
        self._marks[service] = f"annotation {ANNOTATION} of Lease {name}; {way_out}" if engaged else ""
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
            if body is not None:
                return self._api.put(path, body)
            lease = self._api.get(path)
        except KubeError as error:
            if error.status in {CONFLICT, MISSING}:
                return None
            raise LeasesUnavailable(f"Lease {self._name(service)}: {error}") from error
        if not _is_lease(lease):
            raise LeasesUnavailable(f"Lease {self._name(service)}: an answer of another shape")
        return lease

    def _name(self, service: str) -> str:
        return f"{self._spec.prefix}{service}"


def _is_lease(answer: object) -> bool:
    """Whether an answer has the parts of a Lease that are read, and they are what they can be."""
    if not isinstance(answer, dict) or not isinstance(answer.get("metadata"), dict):
        return False
    spec, notes = answer.get("spec", {}), answer["metadata"].get("annotations", {})
    if not isinstance(spec, dict) or not isinstance(notes, dict):
        return False
    turns = spec.get("leaseTransitions", 0)
    return isinstance(turns, int) and 0 <= turns < 2**31 and isinstance(spec.get("holderIdentity", ""), str)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
