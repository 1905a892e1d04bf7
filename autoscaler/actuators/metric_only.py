"""Targets as Prometheus metrics, for a HorizontalPodAutoscaler or KEDA to act on; nothing is changed by us.

This module must not know who reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from prometheus_client import CollectorRegistry, Gauge, start_http_server
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, pools_of, wanted
from policies.contract import Target
from policies.engine import StrictModel
from policies.spec import ScalingSpec


class MetricOnlyConfig(StrictModel):
    """Targets as metrics alone."""

    kind: Literal["metric_only"] = Field(default="metric_only", description="Which actuator this is.")
    port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        default=None, description="Serve /metrics on this port; when unset, only in the registry of the controller."
    )
    address: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 lets every host read what it serves."
    )

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds: nobody is asked."""
        return {}


class MetricOnlyActuator:
    """Exports the desired replicas and batch cap of every pool.

    Args:
        config: whether to serve them.
        specs: the services.
        registry: where the gauges go; one of its own when None.
    """

    def __init__(
        self, config: MetricOnlyConfig, specs: Sequence[ScalingSpec], registry: CollectorRegistry | None = None
    ) -> None:
        self._pools = pools_of(specs)
        self._labels = {pool: (pool.service, specs[pool.row].pools[pool.column].label) for pool in self._pools}
        self.registry = registry or CollectorRegistry()
        names = ("service", "pool")
        self._replicas = Gauge("jevons_desired_replicas", "Replicas asked for.", names, registry=self.registry)
        self._caps = Gauge("jevons_desired_batch_cap", "Requests to admit per replica.", names, registry=self.registry)
        self._known: dict[tuple[int, int], tuple[int, int]] = {}
        self._server = None
        self.port = 0
        """The port that is served, 0 for none."""
        if config.port is not None:
            try:
                self._server, _ = start_http_server(config.port, config.address, self.registry)
            except OSError as error:
                raise OSError(f"actuator.port: {config.address}:{config.port}: {error.strerror or error}") from None
            self.port = self._server.server_port

    def apply(self, target: Target) -> None:
        """Show the target."""
        for pool, replicas, cap in wanted(target, self._pools):
            self._replicas.labels(*self._labels[pool]).set(replicas)
            self._caps.labels(*self._labels[pool]).set(cap)
            self._known[pool.row, pool.column] = (replicas, cap)

    def state(self) -> FleetState:
        """What is shown. How many replicas there are, only their own metrics say."""
        state = FleetState.unknown(self._pools)
        for at, (replicas, cap) in self._known.items():
            state.replicas_target[at] = replicas
            state.batch_cap[at] = cap
        return state

    def check(self) -> list[Access]:
        """There is nothing that could be refused."""
        return [
            Access("metric only", True, "targets are exported as jevons_desired_replicas, jevons_desired_batch_cap")
        ]

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
