"""The leases that a configuration names."""

from __future__ import annotations

from collections.abc import Sequence

from autoscaler.authority.kubernetes_leases import KubernetesLeases
from autoscaler.authority.leases import DatabaseLeases, Leases, LeaseSpec, holder_name
from autoscaler.records.database import Database


def build_leases(spec: LeaseSpec, database: Database, services: Sequence[str], controller: str) -> Leases:
    """Leases of the named controller of this process on the named services.

    Raises:
        KubeError: when there is no usable kubeconfig.
    """
    if spec.kind == "kubernetes":
        return KubernetesLeases(spec, services, holder_name(controller))
    return DatabaseLeases(database, services, holder_name(controller), spec.duration_s)
