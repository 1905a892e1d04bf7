"""Kubernetes' HorizontalPodAutoscaler v2 on concurrency per replica, with its default behaviour.

Source: kubernetes.io, "Horizontal Pod Autoscaling" and KEP-853, API autoscaling/v2. Every 15 s
``desired = ceil(replicas * metric / target)``, no change within a tolerance of 10 %, scale-up at most
max(4 replicas, 100 %) per 15 s without stabilisation, scale-down over the highest recommendation of the last 300 s, the
size found at the start included. Replicas that are not ready report no metric: they count as idle on the way up and at
the target on the way down; a change of direction by that correction means no change, and so does a window without
metrics.
Metric: requests that run or wait, per replica, over a share of the engine's `max_num_seqs`.
Left out: several metrics at once, container resource metrics, readiness initialisation periods.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.hpa_behavior import DOWN, PERIOD_S, TOLERANCE, UP, Behavior, ScalingRules
from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet


class HpaPolicy(SinglePoolPolicy):
    """Scales on requests per replica, running and waiting.

    Args:
        fleet: the services.
        target_share: target concurrency per replica as a share of the engine's `max_num_seqs`.
        tolerance: relative deviation that changes nothing.
        stabilization_s: window of the scale-down stabilisation, seconds.
        max_up_replicas: replicas that one period may add.
        max_up_share: share of the replicas that one period may add; the larger of both applies.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "hpa"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("target_share", 0.5, 0.002, 1.5, log=True, meaning="target concurrency over max_num_seqs"),
        Parameter("tolerance", 0.1, 0.0, 0.3, zero=True, meaning="relative deviation that changes nothing"),
        Parameter("stabilization_s", 300.0, 0.0, 3600.0, zero=True, meaning="window of scale-down stabilisation"),
        Parameter("max_up_replicas", 4, 1, 16, whole=True, meaning="replicas that 15 s may add"),
        Parameter("max_up_share", 1.0, 0.1, 4.0, log=True, zero=True, meaning="share that 15 s may add"),
        SPOT_SHARE,
    )
    tick_s = PERIOD_S

    def __init__(
        self,
        fleet: Fleet,
        target_share: float = 0.5,
        tolerance: float = TOLERANCE,
        stabilization_s: float = 300.0,
        max_up_replicas: int = 4,
        max_up_share: float = 1.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.target_share = target_share
        self.tolerance = tolerance
        self.behavior = Behavior(
            len(fleet),
            up=ScalingRules(UP.stabilization_s, max_up_replicas, max_up_share, UP.period_s),
            down=ScalingRules(stabilization_s, DOWN.replicas, DOWN.share, DOWN.period_s),
        )

    def forget(self, rows: Bools) -> None:
        """Forget recommendations."""
        self.behavior.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The recommendation, stabilised and limited."""
        target = np.maximum(self.target_share * service.slots, 1e-9)
        desired = recommend(service.in_system, target, service.current, service.ready, self.tolerance)
        return self.behavior.settle(service.time_s, due & ~np.isnan(desired), service.current, desired)


def recommend(load: Floats, target: Floats, current: Floats, ready: Floats, tolerance: float = TOLERANCE) -> Floats:
    """Replicas (n,) for `load` at `target` per replica, careful with replicas that report no metric.

    Args:
        load: (n,) sum of the metric over ready replicas.
        target: (n,) per replica.
        current: (n,) replicas asked for.
        ready: (n,) of them that report.
        tolerance: relative deviation that changes nothing.
    """
    ready_ratio = load / np.maximum(ready, 1.0) / target
    unready = np.maximum(current - ready, 0.0)
    replicas = np.maximum(ready + unready, 1.0)
    # Not-ready replicas: no load on the way up, exactly the target on the way down.
    assumed = np.where(ready_ratio > 1.0, 0.0, target) * unready
    ratio = (load + assumed) / replicas / target
    flipped = (ratio - 1.0) * (ready_ratio - 1.0) < 0.0
    within = np.abs(ratio - 1.0) <= tolerance + 1e-9
    return np.where(flipped | within, current, np.ceil(ratio * replicas - 1e-9))
