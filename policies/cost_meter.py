"""The bill of a live fleet: dollars for the replicas that ran, over the time that passed, and the tokens served.

The `Objective` that prices an evaluation prices it. It goes on through blindness and restarts: what was last seen to
run, or has been asked for since, is taken to have gone on running, and between two readings of the tokens served,
however far apart, their rate is taken to have gone from the one to the other in a straight line.
This module must not know who reads the bill, nor where counts and times come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Floats, Snapshot
from policies.cost_rates import Counts, cost_rates, replicas_paid
from policies.objective import Objective
from policies.pool_arrays import any_pool, nan_to_num


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
        self._asked: Floats = np.full(fleet.exists.shape, np.nan)  # replicas that were asked for since they were seen
        self._at_s: Floats = np.full(n, np.nan)  # time up to which the bill goes
        self._token_tps: Floats = np.zeros(fleet.exists.shape)  # tokens per second when they were last known
        self._tokens_at_s: Floats = np.full(n, np.nan)  # time of that, up to which tokens are counted

    def add(self, snapshot: Snapshot, now_s: float, counted: Counts | None = None, more: Floats | float = 0.0) -> None:
        """Bill the time since the last call; the first one only looks.

        Args:
            snapshot: the present fleet and load; NaN where nothing is known.
            now_s: time, seconds; one that lies before the last bills nothing.
            counted: what there is of replicas where nothing could be measured.
            more: (n, P) replicas that are paid for besides those that start, serve or drain.
        """
        paid = replicas_paid(snapshot)
        if counted is not None:
            paid = np.where(np.isnan(paid), replicas_paid(counted), paid)
        unseen = np.isnan(paid)
        self._paid = np.where(unseen, np.where(np.isnan(self._asked), self._paid, self._asked), paid + more)
        self._asked = np.where(unseen, self._asked, np.nan)
        elapsed_s = np.maximum(nan_to_num(now_s - self._at_s), 0.0)
        self._at_s = np.full(len(self._at_s), now_s)
        replica_s = nan_to_num(self._paid) * elapsed_s[:, np.newaxis]
        node_s = np.ceil(nan_to_num(self._paid) / self._slots) * elapsed_s[:, np.newaxis]
        self.usd += self._objective.provisioned_usd(replica_s, node_s) * (1.0 + self._overhead_rate)[:, np.newaxis]
        self._count(snapshot, now_s)

    def asked(self, replicas: Floats) -> None:
        """So many replicas (n, P) have just been asked for, NaN for no change: they run until others are seen."""
        self._asked = np.where(np.isnan(replicas), self._asked, replicas)

    def _count(self, snapshot: Snapshot, now_s: float) -> None:
        """Tokens since they were last known. While they are not, they wait: dollars without them make a wrong price."""
        _, token_tps = cost_rates(snapshot, self._fleet, self._overhead_rate)
        token_tps = np.where(self._fleet.exists, token_tps, 0.0)
        known = ~any_pool(np.isnan(token_tps))
        since_s = np.where(known, np.maximum(nan_to_num(now_s - self._tokens_at_s), 0.0), 0.0)
        mean_tps = (nan_to_num(token_tps) + self._token_tps) / 2.0
        self.tokens += mean_tps * since_s[:, np.newaxis]
        self._token_tps = np.where(known[:, np.newaxis], token_tps, self._token_tps)
        self._tokens_at_s = np.where(known, now_s, self._tokens_at_s)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {
            "usd": self.usd,
            "tokens": self.tokens,
            "paid": self._paid,
            "asked": self._asked,
            "at_s": self._at_s,
            "token_tps": self._token_tps,
            "tokens_at_s": self._tokens_at_s,
        }

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self.usd, self.tokens = np.array(state["usd"], np.float64), np.array(state["tokens"], np.float64)
        self._paid, self._at_s = np.array(state["paid"], np.float64), np.array(state["at_s"], np.float64)
        self._asked = np.array(state["asked"], np.float64)
        self._token_tps = np.array(state["token_tps"], np.float64)
        self._tokens_at_s = np.array(state["tokens_at_s"], np.float64)
