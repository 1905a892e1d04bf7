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
        shape = fleet.exists.shape
        wanted = fleet.max_replicas if replicas is None else np.broadcast_to(replicas, shape)
        cap = fleet.max_num_seqs if batch_cap is None else np.full(shape, batch_cap)
        self._target = Target(replicas=wanted.astype(np.int64), batch_cap=cap.astype(np.int64))

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        """The constant."""
        return self._target
