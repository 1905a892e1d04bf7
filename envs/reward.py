"""The reward of training episodes: the cost of a window over the cost of following the demand, every term kept apart.

This module must not know how episodes are drawn or actions decoded.
"""

from __future__ import annotations

import numpy as np

from policies.contract import Bools, Floats, Ints
from policies.fleet import Fleet
from policies.objective import Objective, Usage, attainment
from policies.pool_arrays import clip
from policies.spec import ObjectiveSpec


class Reward:
    """Prices the windows of `n` episodes.

    Args:
        objective: overhead and the price of a scale event.
        fleet: prices of pools and of a miss; rows may be overwritten between episodes.
        interval_s: the control interval.
        scale: factor on the reward.
        usual_miss_rate: miss rate at which misses weigh as much as the bill, see `weight`.
        miss_limit: most misses counted in one window, in mean arrivals per window.
    """

    def __init__(
        self,
        objective: ObjectiveSpec,
        fleet: Fleet,
        interval_s: float,
        *,
        scale: float,
        usual_miss_rate: float,
        miss_limit: float,
    ) -> None:
        n, pools = fleet.exists.shape
        self._fleet = fleet
        self._interval_s = interval_s
        self._scale = scale
        self._usual_miss_rate = usual_miss_rate
        self._miss_limit = miss_limit
        self._bill_per_node = np.zeros((n, pools), bool)
        self._node_gpus = np.ones((n, pools))
        self._objective = Objective(objective, fleet, self._bill_per_node, self._node_gpus)
        self._request_usd = np.ones(n)
        self._window_usd = np.ones(n)
        self._window_arrivals = np.ones(n)
        self._missed = np.zeros(n)

    def begin(
        self, rows: Ints, *, bill_per_node: Bools, node_gpus: Floats, window_usd: Floats, window_arrivals: Floats
    ) -> None:
        """Start new episodes on the listed rows (k,).

        Args:
            rows: (k,) which.
            bill_per_node: (k, P) True where a pool is billed per node.
            node_gpus: (k, P) size of such a node.
            window_usd: (k,) cost of following the demand for one window: the unit of all costs.
            window_arrivals: (k,) mean arrivals in one window.
        """
        self._bill_per_node[rows] = bill_per_node
        self._node_gpus[rows] = node_gpus
        self._window_usd[rows] = window_usd
        self._window_arrivals[rows] = window_arrivals
        self._request_usd[rows] = window_usd / window_arrivals
        self._missed[rows] = 0.0

    def of_window(self, window: Usage, so_far: Usage) -> tuple[Floats, dict[str, Floats]]:
        """The reward (n,) of the last window, and its terms (n,) over the cost of following the demand, unscaled.

        Args:
            window: usage in it.
            so_far: usage since the episode's start; its attainment is among the terms.
        """
        missed = so_far.finished - so_far.good + so_far.rejected + so_far.overdue
        # A miss counts when it is certain: a first token that is overdue counts before it comes.
        new_misses = clip(missed - self._missed, 0.0, self._miss_limit * self._window_arrivals)
        self._missed = np.maximum(missed, self._missed)
        cost = self._objective.cost(window, self._request_usd, self._interval_s, new_misses)
        terms = {
            "provisioned": cost.provisioned_usd / self._window_usd,
            "misses": cost.miss_usd / self._window_usd,
            "churn": cost.churn_usd / self._window_usd,
            "attainment": attainment(so_far),
        }
        reward = -self._scale * self.weight * (terms["provisioned"] + terms["misses"] + terms["churn"])
        return reward, terms

    @property
    def weight(self) -> Floats:
        """(n,) factor on the costs of each episode, by its price of a miss; does not change which policy is best."""
        weight: Floats = 1.0 / (1.0 + self._usual_miss_rate * np.exp(self._fleet.log_miss_price))
        return weight
