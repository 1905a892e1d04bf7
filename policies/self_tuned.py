"""Any policy with a headroom that follows the measured attainment: what stands behind ``POLICY+self``.

A headroom of 1.2 lets the policy see the fleet as if the load were 1.2 times what it is: requests that run and wait,
token rates, cache usage, latencies, demand estimates. Scaling what goes in rather than the count that comes out is
one definition for all: a target of 10 requests a replica becomes one of 8.3, an objective is met with a margin, a
demand is multiplied, and nothing compounds where a rule answers relative to the count that it finds. Tolerances,
windows and rate limits are untouched. The network of a learned policy sees its features as they are, and its answer
is multiplied. A constant fleet looks at nothing, so it has nothing to tune.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from policies.columns import any_pool, total
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Bools, Floats, Observation, Policy, Snapshot, Target
from policies.durable import Durable
from policies.error_budget import ErrorBudget
from policies.fleet import Fleet
from policies.latency import slower

LEAST, MOST = 0.5, 3.0
MEMORY_S = 300.0
RISE = 0.4
MOST_BURN = 20.0
STUCK_S = 1800.0
"""At its maxima for this long a fleet is too small for its load, whatever the headroom; before, it may be late."""
SERVICE_LOADS = (
    *("arrival_rps", "prompt_tps", "prefill_tps", "generation_tps", "finished_rps", "queue_requests", "oldest_wait_s"),
)
POOL_LOADS = ("running", "waiting", "kv_cache_usage")
DEMANDS = ("demand_tokens", "demand_occupancy", "demand", "demand_mean")


class SelfTunedPolicy(Durable):
    """A policy whose headroom an error budget moves, from 0.5 to 3.

    The headroom's logarithm falls by at most 0.2 an hour and rises by up to 8 an hour; by up to 1.6 while
    replicas are starting or every pool is at its maximum, and not at all after half an hour there.

    Args:
        policy: what proposes.
        fleet: the services, with their attainment targets.
    """

    def __init__(self, policy: Policy, fleet: Fleet) -> None:
        self.name = f"{policy.name}+self"
        self.policy = policy
        self.fleet = fleet
        self._budget = ErrorBudget(fleet, math.log(LEAST), math.log(MOST), memory_s=MEMORY_S, rise=RISE, most=MOST_BURN)

        self._full_s = np.zeros(len(fleet))

    @property
    def headroom(self) -> Floats:
        """(n,) the factor in force."""
        return np.exp(self._budget.dial)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the budgets and the policy's history of the masked services."""
        self._budget.reset(services)
        self._full_s[slice(None) if services is None else services] = 0.0
        self.policy.reset(services)

    def propose(self, observation: Observation) -> Target:
        """The policy's wish for a load `headroom` times as heavy."""
        snapshot = observation.snapshot
        starting = total(np.nan_to_num(snapshot.replicas_starting)) > 0
        full = ~any_pool(np.nan_to_num(snapshot.replicas_target) < self.fleet.max_replicas)
        self._full_s = np.where(full, self._full_s + np.nan_to_num(snapshot.window_s), 0.0)
        moved = self._budget.update(snapshot, patient=starting | full, stuck=self._full_s > STUCK_S)
        factor = np.exp(moved)
        return self.policy.propose(heavier(observation, factor))


def heavier(observation: Observation, factor: Floats) -> Observation:
    """The observation as it would be with `factor` (n,) times the load; features and attainments as they are."""
    column = factor[:, np.newaxis]
    demands = {name: getattr(observation, name) * column for name in DEMANDS}
    return replace(observation, snapshot=_heavier(observation.snapshot, factor), **demands)


def _heavier(snapshot: Snapshot, factor: Floats) -> Snapshot:
    column = factor[:, np.newaxis]
    return replace(
        snapshot,
        ttft_histogram_rps=slower(snapshot.ttft_histogram_rps, TTFT_EDGES_S, factor),
        tpot_histogram_rps=slower(snapshot.tpot_histogram_rps, TPOT_EDGES_S, factor),
        **{name: getattr(snapshot, name) * factor for name in SERVICE_LOADS},
        **{name: getattr(snapshot, name) * column for name in POOL_LOADS},
    )
