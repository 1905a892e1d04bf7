"""Leases as Kubernetes Lease objects: one per service, optimistic concurrency, the transitions as fencing token.

The annotation `jevons.dev/kill-switch: "true"` on a Lease stops all action on its service; `kubectl annotate` sets it
while the controller is stuck. This is the only module that reads or writes Lease objects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np

from autoscaler.controls import ANNOTATION
from autoscaler.leases import NOT_HELD, LeaseSpec, LeasesUnavailable, SteadyClock, Watch
from policies.contract import Ints

TIMEOUT_S = 5.0
"""Longest wait for one answer of the API server, seconds."""
PARALLEL = 16
CONFLICT, MISSING = 409, 404


class KubernetesLeases:
    """One Lease object per service in one namespace.

    Args:
        spec: where they are.
        services: which services to hold.
        holder: name of this controller, unlike any other's.
        now: a clock that never jumps, seconds.
    """

    def __init__(
        self, spec: LeaseSpec, services: Sequence[str], holder: str, now: SteadyClock = time.monotonic
    ) -> None:
        from kubernetes import client, config

        configuration = client.Configuration()
        load: Any = config  # published with partial type information
        if spec.kubeconfig is not None:
            load.load_kube_config(spec.kubeconfig, client_configuration=configuration)
        else:
            load.load_incluster_config(configuration)
        self._client = client
        self._api = client.CoordinationV1Api(client.ApiClient(configuration))
        self._spec = spec
        self._services = tuple(services)
        self.holder = holder
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
            lease = self._read(service)
            if lease is not None and lease.spec.holder_identity == self.holder:
                lease.spec.holder_identity = ""
                self._write(service, lease)

    def _renew_one(self, service: str) -> int:
        lease = self._read(service)
        if lease is None:
            return self._create(service)
        marks = lease.metadata.annotations or {}
        engaged = str(marks.get(ANNOTATION, "")).lower() == "true"
        self._marks[service] = f"annotation {ANNOTATION} of Lease {self._name(service)}" if engaged else ""
        spec = lease.spec
        token = spec.lease_transitions or 0
        if spec.holder_identity != self.holder:
            free = not spec.holder_identity
            renewal = (spec.holder_identity, token, str(spec.renew_time))
            if not free and not self._watch.expired(service, spec.holder_identity, renewal):
                return NOT_HELD
            token += 1
            spec.holder_identity, spec.lease_transitions = self.holder, token
            spec.acquire_time = datetime.now(UTC)
        spec.renew_time = datetime.now(UTC)
        return token if self._write(service, lease) else NOT_HELD

    def _create(self, service: str) -> int:
        now = datetime.now(UTC)
        lease = self._client.V1Lease(
            metadata=self._client.V1ObjectMeta(name=self._name(service)),
            spec=self._client.V1LeaseSpec(
                holder_identity=self.holder,
                lease_duration_seconds=max(round(self._spec.duration_s), 1),
                acquire_time=now,
                renew_time=now,
                lease_transitions=1,
            ),
        )
        made = self._ask(self._api.create_namespaced_lease, self._spec.namespace, lease)
        return 1 if made is not None else NOT_HELD

    def _read(self, service: str) -> Any:
        return self._ask(self._api.read_namespaced_lease, self._name(service), self._spec.namespace)

    def _write(self, service: str, lease: Any) -> bool:
        """Replace what was read, unless somebody else was faster."""
        written = self._ask(self._api.replace_namespaced_lease, self._name(service), self._spec.namespace, lease)
        return written is not None

    def _ask(self, call: Any, *arguments: Any) -> Any:
        """The answer; None where the object is missing, or changed since it was read."""
        from urllib3.exceptions import HTTPError

        try:
            return call(*arguments, _request_timeout=TIMEOUT_S)
        except self._client.ApiException as error:
            if error.status in {CONFLICT, MISSING}:
                return None
            raise LeasesUnavailable(f"the API server refused a Lease: {error.status} {error.reason}") from error
        except (HTTPError, OSError) as error:
            raise LeasesUnavailable(f"the API server does not answer: {error}") from error

    def _name(self, service: str) -> str:
        return f"{self._spec.prefix}{service}"
