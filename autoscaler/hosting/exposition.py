"""The controller's own Prometheus metrics, among them the real-time cost per million tokens.

Values are computed from the arrays of the last tick when Prometheus asks, so a tick costs nothing for them. What is not
known is left out, never 0.
This module must not know how decisions are made.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from pydantic import Field

from autoscaler.actuators.base import FleetState
from policies.contract import Bools, Decision, Floats, Outcome, Reason
from policies.cost_meter import CostMeter
from policies.cost_rates import cost_rates, served_tps
from policies.engine import StrictModel
from policies.fleet import Fleet
from policies.pool_arrays import sum_pools

LATENCY_EDGES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class ExpositionConfig(StrictModel):
    """Where the controller serves its own metrics."""

    port: int | None = Field(
        default=9490,
        ge=0,
        le=65000,
        description="Port of /metrics; a shard adds its number; none when null, any for 0.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")


class Exposition:
    """A prometheus_client collector over the last tick.

    Args:
        services: names.
        pools: names of each service's pools.
        fleet: prices.
        overhead_rate: (n,) share of the GPU bill.
        meter: the bill.
        leading: (n,) services whose bill so far is here; of the others another controller shows it.
        version: policy version in use.
        failures: how often each stage of a tick has failed.
        implausible: how often a measurement was impossible, by service and signal.
        registry: where to register.
    """

    def __init__(
        self,
        services: Sequence[str],
        pools: Sequence[Sequence[str]],
        fleet: Fleet,
        overhead_rate: Floats,
        meter: CostMeter,
        leading: Callable[[], Bools],
        version: Callable[[], str],
        failures: Callable[[], Mapping[str, int]],
        implausible: Callable[[], Mapping[tuple[str, str], int]],
        registry: CollectorRegistry,
    ) -> None:
        self._services = tuple(services)
        self._pools = tuple(tuple(names) for names in pools)
        self._fleet = fleet
        self._overhead_rate = overhead_rate
        self._leading = leading
        self._version = version
        self._failures = failures
        self._implausible = implausible
        self._lock = threading.Lock()
        self._decision: Decision | None = None
        n = len(fleet)
        self.meter = meter
        self._outcomes = {outcome: np.zeros(n, np.int64) for outcome in Outcome}
        self._held_by = {reason: np.zeros(n, np.int64) for reason in Reason if reason}
        self._latency: dict[str, Floats] = {}  # counts by edge, then the count and the sum of all
        self._stuck_paid: Floats = np.zeros(fleet.exists.shape)  # replicas that hold their GPUs and never get ready
        registry.register(self)

    def publish(self, decision: Decision, seconds: dict[str, float], now_s: float, counted: FleetState) -> None:
        """Take over a tick that finished at `now_s`, after which the actuator had `counted` so many replicas."""
        held = decision.outcome == Outcome.HELD
        with self._lock:
            self._decision = decision
            self._stuck_paid = np.broadcast_to(counted.replicas_stuck_paid, self._fleet.exists.shape)
            self.meter.add(decision.snapshot, now_s, counted, self._stuck_paid)
            scaled = (decision.outcome == Outcome.SCALED)[:, np.newaxis] & self._fleet.exists
            self.meter.asked(np.where(scaled, decision.settled.replicas, np.nan))
            for outcome, counts in self._outcomes.items():
                counts += decision.outcome == outcome
            for reason, held_counts in self._held_by.items():
                held_counts += held & ((decision.reasons & int(reason)) != 0)
            for stage, spent_s in seconds.items():
                spent = self._latency.setdefault(stage, np.zeros(len(LATENCY_EDGES_S) + 2))
                spent += np.array([*(spent_s <= edge for edge in LATENCY_EDGES_S), 1.0, spent_s])

    def forget(self) -> None:
        """Nothing is decided here any more: counters stay, gauges go."""
        with self._lock:
            self._decision = None

    def collect(self) -> Iterable[Metric]:
        """The families, as of the last tick."""
        with self._lock:
            decision = self._decision
            yield self._info()
            yield from self._counters()
            if decision is not None:
                yield from self._gauges(decision)

    def _info(self) -> Metric:
        return InfoMetricFamily("jevons_policy", "Policy that decides.", {"version": self._version()})

    def _gauges(self, decision: Decision) -> Iterable[Metric]:
        snapshot, fleet = decision.snapshot, self._fleet
        usd_per_s, token_tps = cost_rates(snapshot, fleet, self._overhead_rate, self._stuck_paid)
        seen_s = float(np.max(snapshot.time_s)) if len(snapshot) else math.nan
        stamp = GaugeMetricFamily("jevons_last_tick_timestamp_seconds", "Time of the last snapshot.")
        stamp.add_metric([], seen_s)
        yield stamp
        sums = np.nansum(np.where(fleet.exists, usd_per_s, 0.0), axis=1)
        by_service = {
            "jevons_cost_usd_per_hour": ("Provisioned dollars per hour, overhead included.", sums * 3600.0),
            "jevons_cost_usd_per_million_tokens": (
                "Provisioned dollars per million tokens in the last window, prompt and output.",
                _ratio(sums * 1e6, served_tps(snapshot)),
            ),
            "jevons_tokens_per_second": (
                "Tokens of finished requests per second.",
                served_tps(snapshot),
            ),
            "jevons_ttft_attainment_ratio": ("Share of first tokens within the objective.", snapshot.ttft_attainment),
            "jevons_tpot_attainment_ratio": ("Share of requests within the TPOT objective.", snapshot.tpot_attainment),
            "jevons_attainment_target_ratio": ("Share that is promised to be within both.", fleet.attainment_target),
            "jevons_queue_requests": ("Requests that wait in front of the batch cap.", snapshot.queue_requests),
        }
        if "demand" in decision.details:
            covered = sum_pools(
                np.where(fleet.exists, snapshot.replicas_ready / np.maximum(decision.details["demand"], 1e-9), 0)
            )
            by_service["jevons_utilization_ratio"] = (
                "Demand over ready capacity.",
                _ratio(np.ones(len(snapshot)), covered),
            )
        if "distance" in decision.details:
            distance = decision.details["distance"]
            by_service["jevons_observation_distance"] = ("Distance from the policy's training range.", distance)
        for name, (text, values) in by_service.items():
            family = GaugeMetricFamily(name, text, labels=["service"])
            for service, value in zip(self._services, values.tolist(), strict=True):
                if math.isfinite(value):
                    family.add_metric([service], value)
            yield family
        by_pool = {
            "jevons_pool_cost_usd_per_hour": ("Provisioned dollars per hour.", usd_per_s * 3600.0),
            "jevons_pool_cost_usd_per_million_tokens": (
                "Provisioned dollars per million tokens in the last window.",
                _ratio(usd_per_s * 1e6, token_tps),
            ),
            "jevons_decided_replicas": ("Replicas that the last decision settled on.", decision.settled.replicas),
            "jevons_decided_batch_cap": ("Batch cap that the last decision settled on.", decision.settled.batch_cap),
            "jevons_target_replicas": ("Replicas asked for in the cluster.", snapshot.replicas_target),
            "jevons_ready_replicas": ("Replicas that serve.", snapshot.replicas_ready),
            "jevons_starting_replicas": ("Replicas that start.", snapshot.replicas_starting),
            "jevons_min_replicas": ("Fewest replicas that are allowed.", fleet.min_replicas),
            "jevons_max_replicas": ("Most replicas that are allowed.", fleet.max_replicas),
        }
        for name, (text, pool_values) in by_pool.items():
            yield self._pool_family(GaugeMetricFamily(name, text, labels=["service", "pool"]), pool_values)

    def _counters(self) -> Iterable[Metric]:
        # A bill that began at 0 here and goes on where it was would count as spent anew by whoever takes increases.
        labels, own = ["service", "pool"], self._leading()[:, np.newaxis]
        usd = CounterMetricFamily("jevons_cost_usd", "Provisioned dollars, overhead included.", labels=labels)
        yield self._pool_family(usd, np.where(own, self.meter.usd, np.nan))
        tokens = CounterMetricFamily("jevons_tokens", "Prompt and output tokens of finished requests.", labels=labels)
        yield self._pool_family(tokens, np.where(own, self.meter.tokens, np.nan))
        outcomes = CounterMetricFamily("jevons_decisions", "Decisions by outcome.", labels=["service", "outcome"])
        for outcome, counts in self._outcomes.items():
            for row in np.flatnonzero(counts).tolist():
                outcomes.add_metric([self._services[row], outcome.name.lower()], float(counts[row]))
        yield outcomes
        held = CounterMetricFamily("jevons_held_decisions", "Held decisions by reason.", labels=["service", "reason"])
        for reason, counts in self._held_by.items():
            for row in np.flatnonzero(counts).tolist():
                held.add_metric([self._services[row], reason.words()[0]], float(counts[row]))
        yield held
        failed = CounterMetricFamily("jevons_stage_errors", "Stages of a tick that failed.", labels=["stage"])
        for stage, count in self._failures().items():
            failed.add_metric([stage], float(count))
        yield failed
        odd = CounterMetricFamily(
            "jevons_implausible_values",
            "Measurements that cannot be, and so count as missing.",
            labels=["service", "signal"],
        )
        for names, count in dict(self._implausible()).items():
            odd.add_metric(names, float(count))
        yield odd
        latency = HistogramMetricFamily(
            "jevons_stage_seconds", "Time that each stage of a tick took.", labels=["stage"]
        )
        for stage, spent in self._latency.items():
            *within, count, sum_s = spent.tolist()
            buckets = [(str(edge), inside) for edge, inside in zip(LATENCY_EDGES_S, within, strict=True)]
            latency.add_metric([stage], [*buckets, ("+Inf", count)], sum_s)
        yield latency

    def _pool_family(self, family: Any, values: Any) -> Any:
        for row, names in enumerate(self._pools):
            for column, pool in enumerate(names):
                value = float(values[row, column])
                if math.isfinite(value):
                    family.add_metric([self._services[row], pool], value)
        return family


def _ratio(above: Any, below: Any) -> Any:
    """Element by element; NaN where the divisor is 0 or unknown."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
