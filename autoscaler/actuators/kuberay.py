"""Whether a KubeRay RayService owns the Ray cluster whose Serve is written to.

What is written through Serve's REST interface is the live layer only: KubeRay's operator puts `serveConfigV2` of the
RayService back after a crash of the head, a restart or an edit.
This module must not know about Serve.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from pydantic import Field

from autoscaler.actuators.kube_api import Json, KubeApi, KubeConnection, KubeError
from policies.engine import StrictModel

HEAD_SERVICE = "-head-svc"
"""What KubeRay puts behind a RayService's or a RayCluster's name to name the head's Service."""
OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeRayConfig(StrictModel):
    """Where a RayService that owns the Ray cluster would be."""

    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")
    namespace: str | None = Field(
        default=None, description="Namespace; when unset that of the head's Service in `address`, else the pod's own."
    )
    name: str | None = Field(
        default=None, description="The RayService; when unset it is found by the head's Service in `address`."
    )


class Ownership(NamedTuple):
    """Who owns the cluster, in one sentence, and why that could not be read; each empty where there is nothing."""

    owner: str = ""
    problem: str = ""


class RayServices:
    """Looks for the RayService that owns one cluster.

    Args:
        config: where; None looks only where `address` is that of a head's Service.
        address: of Ray's dashboard.
    """

    def __init__(self, config: KubeRayConfig | None, address: str) -> None:
        stem, namespace = head_service(address)
        self._config = config or KubeRayConfig()
        self._name = self._config.name or stem
        self._namespace = self._config.namespace or namespace or _own_namespace()
        self._api: KubeApi | None = None

    def ownership(self) -> Ownership:
        """Who owns it now."""
        if not self._name:
            return Ownership()
        try:
            self._api = self._api or KubeApi(self._config.connection)
            with self._api.one_operation():
                found = self._api.items(f"/apis/ray.io/v1/namespaces/{self._namespace}/rayservices")
            names = [one["metadata"]["name"] for one in found if self._owns(one)]
        except KubeError as error:
            if error.status == 404:  # KubeRay is not installed
                return Ownership()
            return Ownership(problem=f"RayServices in {self._namespace}: {error}")
        except (AttributeError, KeyError, TypeError) as error:
            return Ownership(problem=f"RayServices in {self._namespace}: the answer does not parse: {error!r:.200}")
        if not names and self._config.name:
            return Ownership(problem=f"RayService {self._namespace}/{self._name}: not found, see kuberay.name")
        if not names:
            return Ownership()
        return Ownership(
            f"RayService {self._namespace}/{names[0]} owns this cluster, and its operator puts serveConfigV2 back: set "
            "num_replicas and max_ongoing_requests there, and stay in mode advise"
        )

    def close(self) -> None:
        """Drop connections."""
        if self._api is not None:
            self._api.close()

    def _owns(self, service: Json) -> bool:
        status = service.get("status") or {}
        parts = [status.get(part) or {} for part in ("activeServiceStatus", "pendingServiceStatus")]
        names = {service["metadata"]["name"], *(part.get("rayClusterName") for part in parts)}
        return self._name in names


def head_service(address: str) -> tuple[str, str]:
    """The name before `-head-svc` of an address that is a head's Service, and its namespace; empty where there is none.

    >>> head_service("http://chat-head-svc.inference.svc.cluster.local:8265")
    ('chat', 'inference')
    >>> head_service("http://127.0.0.1:8265")
    ('', '')
    """
    host, _, domain = (urlsplit(address).hostname or "").partition(".")
    if not host.endswith(HEAD_SERVICE):
        return "", ""
    return host.removesuffix(HEAD_SERVICE), domain.partition(".")[0]


def _own_namespace() -> str:
    try:
        return OWN_NAMESPACE.read_text(encoding="utf-8").strip()
    except OSError:
        return "default"
