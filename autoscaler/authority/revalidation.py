"""The second look at a scale-down: simulate the smaller fleet, wait, look again, and only then give replicas back.

This module must not know who scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from policies.contract import Bools, Floats, Ints, Observation, Target
from policies.engine import NonNegative, StrictModel
from policies.fleet import Fleet
from policies.pool_arrays import any_pool, nan_to_num, sum_pools

NOTHING = -1


class RevalidationSpec(StrictModel):
    """How a scale-down is looked at again."""

    wait_s: NonNegative = Field(
        default=15.0, description="Time between the first and the second look, seconds; 0 acts at the first."
    )
    max_wait_share: NonNegative = Field(
        default=0.5, description="Largest modelled queue wait on the smaller fleet, as a share of the TTFT objective."
    )


class Revalidation:
    """Candidates for a scale-down, one per service.

    Args:
        fleet: the services.
        spec: how long to wait.
    """

    def __init__(self, fleet: Fleet, spec: RevalidationSpec) -> None:
        self._fleet = fleet
        self.spec = spec
        self._candidate: Ints = np.full(fleet.exists.shape, NOTHING, np.int64)
        self._since_s: Floats = np.full(len(fleet), np.inf)
        self._before = (self._candidate, self._since_s)  # the last look

    def judge(self, settled: Target, current: Target, rows: Bools, observation: Observation) -> tuple[Target, Bools]:
        """The target without the scale-downs that must wait, and (n,) True where one must.

        A scale-down that passes the second look gives back no more than was announced at the first. What the maximum
        alone takes away needs no look: it is an order, and the guardrails bound its step.

        Args:
            settled: the target to be carried out.
            current: the target in force.
            rows: (n,) which services are ours to scale.
            observation: the present load.
        """
        self._before = (self._candidate, self._since_s)
        in_bounds = np.minimum(current.replicas, self._fleet.max_replicas)
        down = rows & any_pool(settled.replicas < in_bounds)
        time_s = observation.snapshot.time_s
        enough = self._enough(settled.replicas, observation)
        announced = self._candidate[:, 0] != NOTHING
        ripe = announced & (time_s - self._since_s >= self.spec.wait_s - 1e-6)
        if self.spec.wait_s == 0:
            ripe = down
            candidate = settled.replicas
        else:
            candidate = self._candidate
        passed = down & ripe & enough
        waiting = down & ~passed
        kept = np.where(waiting[:, np.newaxis], np.maximum(settled.replicas, in_bounds), settled.replicas)
        gentle = np.minimum(np.maximum(settled.replicas, candidate), np.maximum(in_bounds, settled.replicas))
        replicas = np.where(passed[:, np.newaxis], gentle, kept)
        # A candidate stays while the proposal stays; what no longer fits, or was carried out, is forgotten.
        begin = down & enough & ~announced
        stay = down & enough & announced & ~passed
        self._since_s = np.where(begin, time_s, np.where(stay, self._since_s, np.inf))
        announced_replicas = np.where(begin[:, np.newaxis], settled.replicas, self._candidate)
        self._candidate = np.where((begin | stay)[:, np.newaxis], announced_replicas, NOTHING)
        return Target(replicas=replicas.astype(np.int64), batch_cap=settled.batch_cap), waiting

    def keep(self, rows: Bools) -> None:
        """The scale-downs of the masked services (n,) that have passed are not carried out yet: they need not wait."""
        candidate, since_s = self._before
        self._candidate = np.where(rows[:, np.newaxis], candidate, self._candidate)
        self._since_s = np.where(rows, since_s, self._since_s)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart."""
        return {"candidate": self._candidate, "candidate_since_s": self._since_s}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self._candidate = np.array(state["candidate"], np.int64)
        self._since_s = np.array(state["candidate_since_s"], np.float64)

    def _enough(self, replicas: Ints, observation: Observation) -> Bools:
        wait_s = modelled_wait_s(replicas, observation, self._fleet)
        enough: Bools = wait_s <= self.spec.max_wait_share * self._fleet.ttft_slo_s
        return enough


def modelled_wait_s(replicas: Ints, observation: Observation, fleet: Fleet) -> Floats:
    """(n,) mean wait for a place in a batch on a fleet of `replicas` (n, P) under the present load, seconds.

    A queue with one server per place: `c = replicas * batch limit`, load `rho = demand / replicas`, and
    `S / c * rho**(sqrt(2 * (c + 1)) - 1) / (1 - rho)` after H. Sakasegawa, "An approximation formula
    Lq = alpha * rho**beta / (1 - rho)", Annals of the Institute of Statistical Mathematics 29 (1977). The time in
    service `S` is Little's law on what runs and finishes; unknown, it is 30 s. Infinite below the demand.
    """
    snapshot = observation.snapshot
    needed = np.maximum(observation.demand, 1e-9)
    share = np.where(fleet.exists, replicas / needed, 0.0)
    rho = 1.0 / np.maximum(sum_pools(share), 1e-9)
    places = np.maximum(sum_pools(np.where(fleet.exists, replicas * observation.batch_limit, 0.0)), 1.0)
    running, finished_rps = sum_pools(nan_to_num(snapshot.running)), nan_to_num(snapshot.finished_rps)
    service_s = np.divide(running, finished_rps, out=np.full(len(rho), 30.0), where=finished_rps > 0)
    stable = np.minimum(rho, 1.0 - 1e-9)
    wait_s = service_s / places * stable ** (np.sqrt(2.0 * (places + 1.0)) - 1.0) / (1.0 - stable)
    idle = sum_pools(observation.demand) <= 1e-6
    return np.where(idle, 0.0, np.where(rho >= 1.0, np.inf, wait_s))
