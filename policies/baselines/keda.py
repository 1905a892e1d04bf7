"""KEDA: a queue trigger, with a HorizontalPodAutoscaler behind it.

Source: keda.sh 2.x, ScaledObject; trigger and threshold after the vLLM production stack's chart
(`num_requests_waiting`, 5 a replica). Every 15 s the HPA behind asks for the metric as an AverageValue:
``desired = ceil(sum / threshold)`` unless it is within 10 % of what is there, then the HPA's default behaviour. From
and to zero replicas KEDA scales itself, where a service may have none: 0 to 1 at the next poll (30 s) that finds
something to do, 1 to 0 after a cooldown (300 s) without anything.
Left out: fallback replicas after failures (a window without metrics holds), pause annotations, formulas over triggers.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.hpa_behavior import DOWN, PERIOD_S, TOLERANCE, Behavior, ScalingRules
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import Tick
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet

POLL_S = 30.0
COOLDOWN_S = 300.0
TRIGGERS = ("waiting", "running", "in_system")


class KedaPolicy(SinglePoolPolicy):
    """Scales on the sum of a metric over a threshold per replica.

    Args:
        fleet: the services.
        trigger: ``waiting`` requests, ``running`` ones, or both (``in_system``).
        threshold: requests per replica.
        tolerance: relative deviation that changes nothing.
        stabilization_s: window of the HPA's scale-down stabilisation, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "keda"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("trigger", "waiting", choices=TRIGGERS, meaning="what is counted"),
        Parameter("threshold", 5.0, 0.25, 512.0, log=True, meaning="requests per replica"),
        Parameter("tolerance", 0.1, 0.0, 0.3, zero=True, meaning="relative deviation that changes nothing"),
        Parameter("stabilization_s", 300.0, 0.0, 3600.0, zero=True, meaning="window of scale-down stabilisation"),
        SPOT_SHARE,
    )
    tick_s = PERIOD_S

    def __init__(
        self,
        fleet: Fleet,
        trigger: str = "waiting",
        threshold: float = 5.0,
        tolerance: float = TOLERANCE,
        stabilization_s: float = 300.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.trigger = trigger
        self.threshold = threshold
        self.tolerance = tolerance
        self._behavior = Behavior(
            len(fleet), down=ScalingRules(stabilization_s, DOWN.replicas, DOWN.share, DOWN.period_s)
        )
        self._poll = Tick(len(fleet), POLL_S)
        self._active_s = np.full(len(fleet), np.nan)

    def forget(self, rows: Bools) -> None:
        """Forget recommendations and activity."""
        self._behavior.reset(rows)
        self._poll.reset(rows)
        self._active_s[rows] = np.nan

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The HPA's answer from one replica on, KEDA's own between none and one."""
        load = np.asarray(getattr(service, self.trigger))
        known = ~np.isnan(load)
        desired = np.maximum(np.ceil(load / self.threshold - 1e-9), 1.0)
        # The HPA compares the metric itself, not the rounded count, with what is there.
        within = np.abs(load / self.threshold - service.current) <= self.tolerance * service.current + 1e-9
        desired = np.where(within, service.current, desired)
        settled = self._behavior.settle(service.time_s, due & known, service.current, desired)
        # Anything in the system counts as activity: a request that runs must not lose its replica.
        active = (load > 0) | (service.in_system > 0)
        polled = self._poll.due(service.time_s, due & known)
        never = np.isnan(self._active_s)
        self._active_s = np.where((active & known) | (never & due), service.time_s, self._active_s)
        idle = service.time_s - self._active_s >= COOLDOWN_S
        none = np.where(polled & active, 1.0, 0.0)
        return np.where(service.current < 1, np.where(known, none, np.nan), np.where(idle & known, 0.0, settled))
