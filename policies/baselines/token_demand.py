"""Token demand times a headroom: the strongest simple rule, and the reference that the learned policy starts from."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.action import allocate, reference_batch_cap
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Placement
from policies.contract import Bools, Observation, Target
from policies.durable import Durable
from policies.fleet import Fleet


class TokenDemandPolicy(Durable):
    """Replicas for the larger of both demand estimates, short window or five-minute mean, times a headroom.

    Args:
        fleet: the services.
        headroom: factor over the demand, at least 1 to hold any objective.
        spot_share: share of capacity on spot where it is offered, 0..1.
        memory_s: time constant of the slow demand mean, seconds.
    """

    name = "token-demand"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("headroom", 1.5, 0.5, 6.0, log=True, meaning="factor over the demand"),
        Parameter("memory_s", 300.0, 15.0, 7200.0, log=True, meaning="time constant of the slow mean"),
        SPOT_SHARE,
    )

    def __init__(self, fleet: Fleet, headroom: float = 1.5, spot_share: float = 0.5, memory_s: float = 300.0) -> None:
        self.headroom = headroom
        self.spot_share = spot_share
        self.memory_s = memory_s
        self._fleet = fleet
        self._placement = Placement(fleet)
        self._mean = np.full(fleet.exists.shape, np.nan)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the slow mean of the masked services."""
        rows = np.ones(len(self._fleet), bool) if services is None else services
        self._placement.reset(rows)
        self._mean[rows] = np.nan

    def propose(self, observation: Observation) -> Target:
        """The demand with headroom, over the pools; a blind window keeps what is there."""
        n = len(self._fleet)
        snapshot = observation.snapshot
        placed = self._placement.current(snapshot)
        blind = observation.blind[:, np.newaxis]
        keep = np.exp(-np.nan_to_num(snapshot.window_s) / self.memory_s)[:, np.newaxis]
        moved = keep * self._mean + (1.0 - keep) * observation.demand
        moved = np.where(np.isnan(self._mean), observation.demand, moved)
        self._mean = np.where(blind, self._mean, moved)
        wanted = np.fmax(observation.demand, self._mean)
        replicas = allocate(wanted, np.full(n, self.headroom), np.full(n, self.spot_share), self._fleet)
        return Target(
            replicas=self._placement.target(np.where(blind, placed, replicas)).replicas,
            batch_cap=reference_batch_cap(observation, self._fleet),
        )
