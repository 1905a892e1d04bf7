"""The actuator that a live configuration names.

This module must not know what an actuator does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from autoscaler.actuators.base import LiveActuator, ReplicaLoads
from autoscaler.actuators.composite import CompositeActuator
from autoscaler.actuators.config_map import ConfigMapActuator, ConfigMapConfig
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.metric_only import MetricOnlyActuator, MetricOnlyConfig
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from policies.engine import NonNegative, StrictModel
from policies.spec import ScalingSpec

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PartConfig = Annotated[
    KubernetesConfig | RayServeConfig | HAProxyConfig | MetricOnlyConfig | ConfigMapConfig, Field(discriminator="kind")
]


class CompositeConfig(StrictModel):
    """Replicas by one actuator, batch caps by another."""

    kind: Literal["composite"] = Field(default="composite", description="Which actuator this is.")
    replicas: PartConfig = Field(description="What sets replica counts.")
    batch_cap: PartConfig = Field(description="What sets batch caps.")
    drain_s: NonNegative = Field(
        default=120.0, description="Longest wait for the requests of a replica that is to be removed."
    )

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds: one part is read after the other."""
        parts = {"replicas": self.replicas, "batch_cap": self.batch_cap}
        return {f"{name}.{field}": wait_s for name, part in parts.items() for field, wait_s in part.waits_s().items()}


ActuatorConfig = Annotated[
    KubernetesConfig | RayServeConfig | HAProxyConfig | MetricOnlyConfig | ConfigMapConfig | CompositeConfig,
    Field(discriminator="kind"),
]


def build_actuator(
    config: ActuatorConfig,
    specs: Sequence[ScalingSpec],
    loads: ReplicaLoads | None = None,
    registry: CollectorRegistry | None = None,
) -> LiveActuator:
    """Make the actuator of `n` services.

    Args:
        config: which one, and its settings.
        specs: the services.
        loads: running requests by replica name, such as `PrometheusSource.replica_loads`.
        registry: where a metric-only actuator puts its gauges.

    Raises:
        KubeError: when a Kubernetes actuator finds no usable kubeconfig.
    """
    match config:
        case KubernetesConfig():
            return KubernetesActuator(config, specs, loads)
        case RayServeConfig():
            return RayServeActuator(config, specs)
        case HAProxyConfig():
            return HAProxyActuator(config, specs)
        case MetricOnlyConfig():
            return MetricOnlyActuator(config, specs, registry)
        case ConfigMapConfig():
            return ConfigMapActuator(config, specs)
        case CompositeConfig():
            return CompositeActuator(
                build_actuator(config.replicas, specs, loads, registry),
                build_actuator(config.batch_cap, specs, loads, registry),
                specs,
                config.drain_s,
            )
