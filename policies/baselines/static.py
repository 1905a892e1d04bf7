"""A constant fleet: what teams run when they trust no autoscaler."""

from __future__ import annotations

import numpy as np

from policies.contract import Bools, Ints, Observation, Target
from policies.fleet import Fleet


class StaticPolicy:
    """Always the same replicas and, unless given, the engine's own batch limit.

    Args:
        fleet: the services.
        replicas: (P,) or (n, P) replicas; the pools' maxima when None.
        batch_cap: a constant cap; the engines' `max_num_seqs` when None.
    """

    name = "static"

    def __init__(self, fleet: Fleet, replicas: Ints | None = None, batch_cap: int | None = None) -> None:
        self._fleet = fleet
        self._replicas = None if replicas is None else np.broadcast_to(replicas, fleet.exists.shape).copy()
        self._batch_cap = batch_cap

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        """The constant, within the pools' bounds."""
        fleet = self._fleet
        wanted = fleet.max_replicas if self._replicas is None else self._replicas
        cap = fleet.max_num_seqs if self._batch_cap is None else self._batch_cap
        return Target(
            replicas=np.clip(wanted, fleet.min_replicas, fleet.max_replicas).astype(np.int64),
            batch_cap=np.clip(cap, 1, fleet.max_num_seqs).astype(np.int64),
        )
