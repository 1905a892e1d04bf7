"""Our own reactive rule, as strong as we can make one without learning: two estimates, two windows, a backlog guard.

Demand is estimated from the token rates (blind to drifting output lengths until requests finish) and from the requests
in the system (blind to prefill), see `policies.demand`. Either, their maximum or their geometric mean is averaged
over a short and a long window, and the larger counts: a burst is answered at once, the lull between two bursts is
not. When the oldest request has waited for more than a share of the TTFT objective, the target rises at once above
what is ready, whatever the estimates say. Only what a live system can measure is used.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.action import allocate, reference_batch_cap
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Placement
from policies.baselines.windows import SlidingWindow
from policies.contract import Bools, Observation, Target
from policies.durable import Durable
from policies.fleet import Fleet
from policies.pool_arrays import nan_to_num, sum_pools

ESTIMATES = ("larger", "geometric", "tokens", "occupancy")


class ReactivePolicy(Durable):
    """Demand over two windows times a headroom, raised by a backlog.

    Args:
        fleet: the services.
        headroom: factor over the demand.
        estimate: ``tokens``, ``occupancy``, the ``larger`` of both, or their ``geometric`` mean.
        short_s: short window, seconds; one control interval or less is the last measurement.
        long_s: long window, seconds.
        backlog_wait: oldest wait over the TTFT objective that raises the target.
        backlog_boost: by how much it then stands above the ready replicas.
        spot_share: share of capacity on spot where it is offered, 0..1.
    """

    name = "reactive"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("headroom", 1.3, 0.5, 6.0, log=True, meaning="factor over the demand"),
        Parameter("estimate", "larger", choices=ESTIMATES, meaning="of the demand"),
        Parameter("short_s", 30.0, 15.0, 300.0, log=True, meaning="short window"),
        Parameter("long_s", 600.0, 60.0, 7200.0, log=True, meaning="long window"),
        Parameter("backlog_wait", 0.5, 0.05, 2.0, log=True, meaning="oldest wait over the TTFT objective"),
        Parameter("backlog_boost", 0.25, 0.02, 2.0, log=True, zero=True, meaning="rise above the ready replicas"),
        SPOT_SHARE,
    )

    def __init__(
        self,
        fleet: Fleet,
        headroom: float = 1.3,
        estimate: str = "larger",
        short_s: float = 30.0,
        long_s: float = 600.0,
        backlog_wait: float = 0.5,
        backlog_boost: float = 0.25,
        spot_share: float = 0.5,
    ) -> None:
        self.headroom = headroom
        self.estimate = estimate
        self.short_s = short_s
        self.long_s = max(long_s, short_s)
        self.backlog_wait = backlog_wait
        self.backlog_boost = backlog_boost
        self.spot_share = spot_share
        self._fleet = fleet
        self._placement = Placement(fleet)
        self._demand = SlidingWindow(len(fleet), self.long_s, fleet.pools)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the windows of the masked services."""
        rows = np.ones(len(self._fleet), bool) if services is None else services
        self._placement.reset(rows)
        self._demand.reset(rows)

    def propose(self, observation: Observation) -> Target:
        """The demand with headroom, over the pools; a blind window keeps what is there."""
        snapshot, fleet = observation.snapshot, self._fleet
        placed = self._placement.current(snapshot)
        blind = observation.blind
        tokens, occupancy = observation.demand_tokens, observation.demand_occupancy
        demand = {
            "tokens": tokens,
            "occupancy": occupancy,
            "larger": np.maximum(tokens, occupancy),
            "geometric": np.sqrt(tokens * occupancy),
        }[self.estimate]
        self._demand.add(snapshot.time_s, demand, ~blind)
        short = self._demand.mean(snapshot.time_s, self.short_s)
        long = self._demand.mean(snapshot.time_s)
        recent = np.where(np.isnan(short), demand, short)
        wanted = np.fmax(np.fmax(recent, long), 0.0) * self.headroom
        late = nan_to_num(snapshot.oldest_wait_s) > self.backlog_wait * fleet.ttft_slo_s
        # In shares of the work, so that pools of unlike replicas add up: what is ready covers this much of the demand.
        covered = sum_pools(
            np.divide(nan_to_num(snapshot.replicas_ready), wanted, out=np.zeros_like(wanted), where=wanted > 1e-6)
        )
        lift = np.where(late, np.maximum(covered * (1.0 + self.backlog_boost), 1.0), 1.0)
        share = np.full(len(fleet), self.spot_share)
        replicas = allocate(np.nan_to_num(wanted), lift, share, fleet)
        held = blind | np.isnan(wanted).any(axis=1)
        return Target(
            replicas=self._placement.target(np.where(held[:, np.newaxis], placed, replicas)).replicas,
            batch_cap=reference_batch_cap(observation, fleet),
        )
