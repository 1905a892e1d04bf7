"""Dollars: provisioned time, missed objectives and churn, every term kept apart; cost per million tokens.

This module must not know where the usage was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies.contract import Floats
from policies.fleet import Fleet
from policies.pool_arrays import min_pools, sum_pools
from policies.spec import ObjectiveSpec, ScalingSpec


@dataclass(frozen=True, eq=False, slots=True)
class Usage:
    """What was provisioned and served over some span of time, for `n` services. Counts, tokens, seconds."""

    span_s: Floats  # (n,)
    arrivals: Floats  # (n,)
    rejected: Floats  # (n,) refused on arrival
    finished: Floats  # (n,)
    ttft_ok: Floats  # (n,) first tokens in time
    tpot_ok: Floats  # (n,) finished at the promised pace
    good: Floats  # (n,) finished within both objectives
    overdue: Floats  # (n,) without a first token at the end, past the TTFT objective
    prompt_tokens: Floats  # (n,) of finished requests
    output_tokens: Floats  # (n,) of finished requests
    good_tokens: Floats  # (n,) prompt and output tokens of good requests
    scale_events: Floats  # (n,)
    replica_s: Floats  # (n, P) billed replica-seconds
    node_s: Floats  # (n, P) billed node-seconds
    ready_s: Floats  # (n, P) replica-seconds that could serve
    busy_s: Floats  # (n, P) replica-seconds in which the engine ran an iteration

    @property
    def served_tokens(self) -> Floats:
        """(n,) prompt and output tokens of finished requests."""
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, eq=False, slots=True)
class Cost:
    """The terms of the objective in dollars, (n,) each."""

    gpu_usd: Floats
    overhead_usd: Floats
    miss_usd: Floats
    churn_usd: Floats

    @property
    def provisioned_usd(self) -> Floats:
        """What the bill says: GPUs and overhead."""
        return self.gpu_usd + self.overhead_usd

    @property
    def total_usd(self) -> Floats:
        """What a policy should minimise."""
        return self.gpu_usd + self.overhead_usd + self.miss_usd + self.churn_usd


class Objective:
    """Prices usage.

    Args:
        spec: overhead rate and the prices of misses and scale events.
        fleet: prices of the pools.
        bill_per_node: (n, P) True where a pool is billed per node; then `node_gpus` (n, P) is the node's size.
    """

    def __init__(
        self,
        spec: ObjectiveSpec,
        fleet: Fleet,
        bill_per_node: np.ndarray | None = None,
        node_gpus: np.ndarray | None = None,
    ) -> None:
        shape = fleet.exists.shape
        self.spec = spec
        self.fleet = fleet
        self.bill_per_node = np.zeros(shape, bool) if bill_per_node is None else bill_per_node
        self.node_gpus = np.ones(shape) if node_gpus is None else node_gpus

    @classmethod
    def of(cls, specs: Sequence[ScalingSpec], fleet: Fleet) -> Objective:
        """As the specs (n,) of the services of `fleet` say; the rates are those of the first."""
        by_node, node_gpus = np.zeros(fleet.exists.shape, bool), np.ones(fleet.exists.shape)
        for row, spec in enumerate(specs):
            for column, pool in enumerate(spec.pools):
                by_node[row, column] = pool.billing == "node"
                node_gpus[row, column] = pool.engine.gpus_per_node
        return cls(specs[0].objective, fleet, by_node, node_gpus)

    def pool_usd(self, usage: Usage) -> Floats:
        """(n, P) GPU dollars by pool, without overhead."""
        return self.provisioned_usd(usage.replica_s, usage.node_s)

    def provisioned_usd(self, replica_s: Floats, node_s: Floats) -> Floats:
        """(n, P) GPU dollars of billed replica-seconds (n, P), and node-seconds where a pool is billed per node."""
        by_replica = replica_s * self.fleet.usd_per_replica_s
        if not self.bill_per_node.any():
            return by_replica
        per_gpu_s = self.fleet.usd_per_replica_s / np.maximum(self.fleet.gpus, 1.0)
        by_node = node_s * self.node_gpus * per_gpu_s
        return np.where(self.bill_per_node, by_node, by_replica)

    def cost(self, usage: Usage, request_usd: Floats, interval_s: float, missed: Floats | None = None) -> Cost:
        """Price a span of usage.

        Args:
            usage: the span.
            request_usd: (n,) mean cost of serving a request, the unit of the miss price.
            interval_s: the control interval, the unit of the churn price.
            missed: (n,) misses to charge; the finished ones that were not good and the rejected ones when None.
        """
        gpu_usd = sum_pools(self.pool_usd(usage))
        if missed is None:
            missed = usage.finished - usage.good + usage.rejected
        cheapest = min_pools(np.where(self.fleet.exists, self.fleet.usd_per_replica_s, np.inf))
        return Cost(
            gpu_usd=gpu_usd,
            overhead_usd=gpu_usd * self.spec.overhead_rate,
            miss_usd=np.exp(self.fleet.log_miss_price) * request_usd * missed,
            churn_usd=self.spec.scale_event_price * interval_s * cheapest * usage.scale_events,
        )


def attainment(usage: Usage) -> Floats:
    """(n,) share of arrivals that met both objectives: unfinished and rejected ones are misses once they are overdue.

    Requests still within their objectives at the end are left out of the count; NaN without any arrival.
    """
    judged = usage.finished + usage.rejected + usage.overdue
    return np.where(judged > 0, usage.good / np.maximum(judged, 1.0), np.nan)


def usd_per_mtok(usd: Floats, tokens: Floats) -> Floats:
    """Dollars per million tokens; NaN where there are none."""
    return np.where(tokens > 0, usd / np.maximum(tokens, 1.0) * 1e6, np.nan)
