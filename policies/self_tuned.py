"""Any policy with a headroom that follows the measured attainment: what stands behind ``POLICY+self``.

A headroom of 1.2 lets the policy see the fleet as if the load were 1.2 times what it is: requests that run and wait,
token rates, cache usage, latencies, demand estimates. Scaling the input rather than the count that comes out gives one
definition for all policies: a target of 10 requests a replica becomes one of 8.3, an objective is met with a margin, a
demand is multiplied, and nothing compounds where a rule answers relative to the count that it finds. Tolerances,
windows and rate limits are untouched. The network of a learned policy sees its features as they are, and its answer is
multiplied. A constant fleet looks at nothing, so it has nothing to tune.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Bools, Floats, Observation, Policy, Snapshot, Target
from policies.durable import Durable, State
from policies.error_budget import ErrorBudget, Fading
from policies.fleet import Fleet
from policies.latency import slower
from policies.pool_arrays import any_pool, sum_pools

MIN_HEADROOM, MAX_HEADROOM = 0.5, 3.0
"""Lowest and highest headroom."""
MEMORY_S = 300.0
"""Time constant of the miss rate, seconds: a burst of misses is answered while it lasts, and forgotten after it."""
AIM = 0.5
"""Share of the error budget that may be spent: what is left absorbs the next burst."""
RISE = 0.4
"""What an hour adds to the log of the headroom, per unit of burn rate above the aim."""
MAX_BURN = 20.0
"""Largest burn rate above the aim that counts."""
PATIENCE = 0.2
"""Share of the fastest rise that is left while an earlier one has not taken effect."""
STUCK_S = 1800.0
"""At its maxima for this long a fleet is too small for its load, whatever the headroom; before, it may be late."""
SERVICE_LOADS = (
    *("arrival_rps", "prompt_tps", "prefill_tps", "generation_tps", "finished_rps", "queue_requests", "oldest_wait_s"),
)
POOL_LOADS = ("running", "waiting", "kv_cache_usage")
DEMANDS = ("demand_tokens", "demand_occupancy", "demand", "demand_mean")


class HeadroomDial(Durable):
    """The log of a headroom per service: an integrator on the burn rate, misses over allowed misses.

    It falls by at most 0.2 an hour and rises by up to 8 an hour; by up to 1.6 while replicas are starting or every pool
    is at its maximum, so that the misses of one cold start don't drive it to its limit, and not at all after half an
    hour at the maxima, where a rise could change nothing and would have to come down later.

    Args:
        fleet: the services, with their attainment targets.
    """

    def __init__(self, fleet: Fleet) -> None:
        n = len(fleet)
        self.fleet = fleet
        self.log_headroom: Floats = np.zeros(n)
        self._budget = ErrorBudget(fleet)
        self._misses = Fading(n, MEMORY_S)
        self._full_s = np.zeros(n)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        self.log_headroom[rows] = self._full_s[rows] = 0.0
        self._budget.reset(services)
        self._misses.reset(services)

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, between these ends."""
        super().restore(state)
        self.log_headroom = self._within(self.log_headroom)

    def update(self, snapshot: Snapshot) -> Floats:
        """Account for one window; the log of the headroom (n,). Windows without a measurement don't move it."""
        missed, allowed_rps, seconds, known = self._budget.account(snapshot)
        burn = self._misses.add(missed, seconds, known) / np.maximum(allowed_rps, 1e-12)
        starting = sum_pools(np.nan_to_num(snapshot.replicas_starting)) > 0
        full = ~any_pool(np.nan_to_num(snapshot.replicas_target) < self.fleet.max_replicas)
        self._full_s = np.where(full, self._full_s + seconds, 0.0)
        counted = np.minimum(burn, AIM + np.where(starting | full, PATIENCE, 1.0) * MAX_BURN)
        counted = np.where(self._full_s > STUCK_S, np.minimum(counted, AIM), counted)
        hours = seconds / 3600.0
        moved = self._within(self.log_headroom + RISE * (counted - AIM) * hours)
        self.log_headroom = np.where(known, moved, self.log_headroom)
        return self.log_headroom

    @staticmethod
    def _within(log_headroom: Floats) -> Floats:
        return np.asarray(np.clip(log_headroom, math.log(MIN_HEADROOM), math.log(MAX_HEADROOM)))


class SelfTunedPolicy(Durable):
    """A policy whose headroom an error budget moves, from 0.5 to 3.

    Args:
        policy: what proposes.
        fleet: the services, with their attainment targets.
    """

    def __init__(self, policy: Policy, fleet: Fleet) -> None:
        self.name = f"{policy.name}+self"
        self.policy = policy
        self._dial = HeadroomDial(fleet)

    @property
    def headroom(self) -> Floats:
        """(n,) the factor in force."""
        return np.exp(self._dial.log_headroom)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the budgets and the policy's history of the masked services."""
        self._dial.reset(services)
        self.policy.reset(services)

    def propose(self, observation: Observation) -> Target:
        """The policy's proposal for a load `headroom` times as heavy."""
        return self.policy.propose(heavier(observation, np.exp(self._dial.update(observation.snapshot))))


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
