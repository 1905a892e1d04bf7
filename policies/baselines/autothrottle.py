"""A two-level bandit after Autothrottle: a slow learner picks a set-point, a fast heuristic holds it.

Source: Autothrottle (NSDI 2024) and its published code. Its Tower picks, once a minute and by the request rate, how
much throttling services may show; its Captains move CPU limits to hold that. Translated to replicas: *use* is the
demand in replicas that requests in the system make, *throttling* the share of it that ready replicas cannot take.
Captain, every tick: ``margin += throttling - target``; throttling above three targets multiplies the fleet by ``1 +
throttling - 3 * target``; otherwise ``max + deviation * margin`` of the last 50 samples of use, where that is at most
0.9 of the fleet, becomes the fleet, at least half of it; a throttling spike after such a step takes it back. Tower,
every minute: nine targets; the cost of a minute is the fleet over its maximum where P99 meets the objectives, else 2
plus the latency over ten objectives (at most 1); per bucket of request rate the target with the lowest median cost of
the last samples, a neighbour with probability 0.1. This follows the style of the original and is not a copy: the
original learns two targets of two service groups with a neural contextual bandit, from 10,000 resamples, and its
captains act every second. The random numbers are the policy's own and the same in every run.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import SlidingWindow, Tick
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Bools, Floats, Observation
from policies.fleet import Fleet
from policies.latency import histogram_quantile

TARGETS = np.array([0.0, 0.02, 0.04, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3])
TOWER_S = 60.0
SAMPLES = 50
MEMORY = 8
BUCKETS = 24
SHRINK_BELOW = 0.9
MAX_SHRINK = 0.5
EXPLORE = 0.1
P99 = 0.99


class AutothrottlePolicy(SinglePoolPolicy):
    """A bandit over set-points above a heuristic that holds them.

    Args:
        fleet: the services.
        use_factor: on the demand that requests in the system make.
        explore: probability of a neighbouring set-point.
        seed: of the bandit's random numbers.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "autothrottle"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("use_factor", 1.0, 0.3, 4.0, log=True, meaning="factor on the demand in use"),
        Parameter("explore", EXPLORE, 0.0, 0.5, zero=True, limit=1.0, meaning="probability of a neighbour"),
        SPOT_SHARE,
    )
    tick_s = 1.0

    def __init__(
        self,
        fleet: Fleet,
        use_factor: float = 1.0,
        explore: float = EXPLORE,
        seed: int = 0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        n = len(fleet)
        self.use_factor = use_factor
        self.explore = explore
        self.seed = seed
        self._tower = Tick(n, TOWER_S)
        self._use = SlidingWindow(n, SAMPLES * 15.0)
        self._replicas = SlidingWindow(n, TOWER_S)
        self._rate = SlidingWindow(n, TOWER_S)
        self._first_tokens = SlidingWindow(n, TOWER_S, len(TTFT_EDGES_S) + 1)
        self._finishes = SlidingWindow(n, TOWER_S, len(TPOT_EDGES_S) + 1)
        self._costs = np.full((n, BUCKETS, len(TARGETS), MEMORY), np.nan)
        self._choice = np.zeros(n, np.int64)
        self._bucket = np.zeros(n, np.int64)
        self._draws = np.zeros(n, np.uint64)
        self._margin = np.zeros(n)
        self._before = np.full(n, np.nan)  # the fleet before the last step down

    def forget(self, rows: Bools) -> None:
        """Forget what was learned and measured; random numbers begin anew."""
        for part in (self._tower, self._use, self._replicas, self._rate, self._first_tokens, self._finishes):
            part.reset(rows)
        self._costs[rows] = np.nan
        self._choice[rows] = self._bucket[rows] = 0
        self._draws[rows] = 0
        self._margin[rows] = 0.0
        self._before[rows] = np.nan

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The captain's count for the tower's set-point."""
        snapshot, time_s = service.snapshot, service.time_s
        use = observation.demand_occupancy[:, 0] * self.use_factor
        known = due & ~np.isnan(use + service.waiting + service.ready)
        self._use.add(time_s, use, known)
        self._replicas.add(time_s, service.current, known)
        self._rate.add(time_s, snapshot.arrival_rps)
        if snapshot.ttft_histogram_rps.shape[1]:
            self._first_tokens.add(time_s, snapshot.ttft_histogram_rps)
            self._finishes.add(time_s, snapshot.tpot_histogram_rps)
        fresh = self._tower.fresh
        self._learn(service, self._tower.due(time_s, known), fresh)

        target = TARGETS[self._choice]
        throttled = np.maximum(use - service.ready, 0.0) / np.maximum(use, 1e-9)
        self._margin = np.where(known, np.maximum(self._margin + throttled - target, 0.0), self._margin)
        current = service.current
        spike = throttled > 3.0 * target + 1e-9
        grown = np.ceil(current * (1.0 + throttled - 3.0 * target) - 1e-9)
        # A spike after a step down takes it back.
        grown = np.fmax(grown, np.where(spike, self._before, np.nan))
        wanted = self._use.max(time_s) + self._use.deviation(time_s) * self._margin
        shrunk = np.maximum(np.ceil(np.maximum(wanted, MAX_SHRINK * current) - 1e-9), 1.0)
        smaller = ~spike & (wanted <= SHRINK_BELOW * current) & (shrunk < current)
        desired = np.where(spike, grown, np.where(smaller, shrunk, current))
        self._before = np.where(known & smaller, current, np.where(known & spike, np.nan, self._before))
        return np.where(known, desired, np.nan)

    def _learn(self, service: Service, due: Bools, fresh: Bools) -> None:
        """Book the minute's cost under the set-point it was run with, and pick the next one."""
        rows = np.flatnonzero(due)
        if not len(rows):
            return
        time_s = service.time_s
        latency = np.zeros(len(self.fleet))
        for window, edges, slo_s in (
            (self._first_tokens, TTFT_EDGES_S, self.fleet.ttft_slo_s),
            (self._finishes, TPOT_EDGES_S, self.fleet.tpot_slo_s),
        ):
            latency = np.fmax(latency, histogram_quantile(window.sum(time_s), edges, P99) / slo_s)
        allocation = self._replicas.mean(time_s) / np.maximum(service.maximum, 1.0)
        cost = np.where(latency <= 1.0, allocation, 2.0 + np.minimum(latency / 10.0, 1.0))
        booked = rows[~fresh[rows] & ~np.isnan(cost[rows])]
        history = self._costs[booked, self._bucket[booked], self._choice[booked]]
        self._costs[booked, self._bucket[booked], self._choice[booked]] = np.concatenate(
            [history[:, 1:], cost[booked, np.newaxis]], axis=1
        )
        rate = np.nan_to_num(self._rate.mean(time_s))
        self._bucket[rows] = np.clip(np.rint(2.0 * np.log2(np.maximum(rate[rows], 1.0 / 64.0))) + 12, 0, BUCKETS - 1)
        tried = self._costs[rows, self._bucket[rows]]
        count = (~np.isnan(tried)).sum(axis=2)
        ordered = np.sort(tried, axis=2)  # NaN last
        middle = np.take_along_axis(ordered, np.maximum(count - 1, 0)[..., np.newaxis] // 2, 2)[..., 0]
        best = np.where(count > 0, middle, np.inf).argmin(axis=1)
        explored = self._uniform(rows) < self.explore
        step = np.where(self._uniform(rows) < 0.5, -1, 1)
        neighbour = np.clip(best + step, 0, len(TARGETS) - 1)
        self._choice[rows] = np.where(explored, neighbour, best)

    def _uniform(self, rows: np.ndarray) -> Floats:
        """One number in [0, 1) per row: the next of the seed's own sequence (splitmix64), alike for all services."""
        self._draws[rows] += np.uint64(1)
        with np.errstate(over="ignore"):
            z = self._draws[rows] * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self.seed)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
        uniform: Floats = (z >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        return uniform
