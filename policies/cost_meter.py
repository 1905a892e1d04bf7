"""The bill of a live fleet: dollars for the replicas that ran, over the time that passed, and the tokens served.

The `Objective` that prices an evaluation prices it. It goes on through blindness and restarts:
what was last seen to run is taken to have gone on running.
This module must not know who reads the bill, nor where counts and times come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Floats, Snapshot
from policies.cost_rates import cost_rates, replicas_paid
from policies.objective import Objective
from policies.pool_arrays import nan_to_num


class CostMeter:
    """Adds up over the ticks of a controller.

    Replicas of a pool that is billed per node are taken to be packed onto as few nodes as can hold them.

    Args:
        objective: prices.
        overhead_rate: (n,) network, storage and CPU as a share of the GPU bill.
    """

    def __init__(self, objective: Objective, overhead_rate: Floats) -> None:
        fleet, n = objective.fleet, len(objective.fleet)
        self._objective = objective
        self._fleet = fleet
        self._overhead_rate = overhead_rate
        self._slots = np.maximum(objective.node_gpus // np.maximum(fleet.gpus, 1.0), 1.0)  # replicas that fit a node
        self.usd: Floats = np.zeros(fleet.exists.shape)
        """(n, P) since the first tick, overhead included."""
        self.tokens: Floats = np.zeros(fleet.exists.shape)
        """(n, P) prompt and output tokens of finished requests."""
        self._paid: Floats = np.full(fleet.exists.shape, np.nan)  # replicas when they were last seen
        self._at_s: Floats = np.full(n, np.nan)  # time up to which the bill goes

    def add(self, snapshot: Snapshot, now_s: float) -> None:
        """Bill the time since the last call; the first one only looks.

        Args:
            snapshot: the present fleet and load; NaN where nothing is known.
            now_s: time, seconds; one that lies before the last bills nothing.
        """
        paid = replicas_paid(snapshot)
        self._paid = np.where(np.isnan(paid), self._paid, paid)
        elapsed_s = np.maximum(nan_to_num(now_s - self._at_s), 0.0)
        self._at_s = np.full(len(self._at_s), now_s)
        replica_s = nan_to_num(self._paid) * elapsed_s[:, np.newaxis]
        node_s = np.ceil(nan_to_num(self._paid) / self._slots) * elapsed_s[:, np.newaxis]
        self.usd += self._objective.provisioned_usd(replica_s, node_s) * (1.0 + self._overhead_rate)[:, np.newaxis]
        # Rates say nothing of a time that their window does not cover.
        covered_s = np.minimum(elapsed_s, nan_to_num(snapshot.window_s))
        _, token_tps = cost_rates(snapshot, self._fleet, self._overhead_rate)
        self.tokens += nan_to_num(token_tps * covered_s[:, np.newaxis])

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {"usd": self.usd, "tokens": self.tokens, "paid": self._paid, "at_s": self._at_s}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self.usd, self.tokens = np.array(state["usd"], np.float64), np.array(state["tokens"], np.float64)
        self._paid, self._at_s = np.array(state["paid"], np.float64), np.array(state["at_s"], np.float64)
