"""A constant fleet: what teams run when they trust no autoscaler."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import Parameter
from policies.contract import Bools, Ints, Observation, Target
from policies.fleet import Fleet


class StaticPolicy:
    """Always the same replicas and, unless given, the engine's own batch limit.

    Args:
        fleet: the services.
        replicas: (P,) or (n, P) replicas; the pools' maxima when None.
        batch_cap: a constant cap; the engines' `max_num_seqs` when None.
        share: of the pools' maxima, rounded up, when `replicas` is None.
    """

    name = "static"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("share", 1.0, 0.02, 1.0, limit=1.0, meaning="share of the pools' maxima"),
    )

    def __init__(
        self, fleet: Fleet, replicas: Ints | None = None, batch_cap: int | None = None, share: float = 1.0
    ) -> None:
        self._fleet = fleet
        self._replicas = None if replicas is None else np.broadcast_to(replicas, fleet.exists.shape).copy()
        self._batch_cap = batch_cap
        self.share = share

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        """The constant, within the pools' bounds."""
        fleet = self._fleet
        wanted = np.ceil(self.share * fleet.max_replicas - 1e-9) if self._replicas is None else self._replicas
        cap = fleet.max_num_seqs if self._batch_cap is None else self._batch_cap
        return Target(
            replicas=np.clip(wanted, fleet.min_replicas, fleet.max_replicas).astype(np.int64),
            batch_cap=np.clip(cap, 1, fleet.max_num_seqs).astype(np.int64),
        )
