"""Ray Serve's default autoscaling policy: ongoing requests per replica, with delays on the desired count.

Source: ray-project/ray 2.60, `serve/autoscaling_policy.py`. Running and queued requests, averaged over 30 s, over the
target (2) give an error ratio; ``desired = ceil(n * (1 + factor * (ratio - 1)))``, one less where a factor below 1
would never let it fall. The desired count must point the same way for 30 s to scale up, 600 s to scale down; one that
turns begins anew. From zero replicas the answer is immediate, and only one replica goes to zero. The control loop of
0.1 s runs at the control interval: delays are measured on the clock.
Left out: `max_ongoing_requests` (5) and `max_queued_requests`, dropping of stale handle metrics, application policies.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import TOLERANCE_S, SlidingWindow, Streak
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet


class RayServePolicy(SinglePoolPolicy):
    """Scales on ongoing requests per replica.

    Args:
        fleet: the services.
        target_ongoing_requests: per replica.
        upscale_delay_s: how long the desired count must point up, seconds.
        downscale_delay_s: how long it must point down, seconds.
        upscaling_factor: damps or amplifies a step up.
        downscaling_factor: the same down.
        look_back_period_s: window of the mean, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "ray-serve"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("target_ongoing_requests", 2.0, 0.5, 512.0, log=True, meaning="requests per replica"),
        Parameter("upscale_delay_s", 30.0, 0.0, 300.0, zero=True, meaning="how long the desired count must point up"),
        Parameter("downscale_delay_s", 600.0, 0.0, 7200.0, zero=True, meaning="how long it must point down"),
        Parameter("upscaling_factor", 1.0, 0.1, 3.0, log=True, meaning="factor on a step up"),
        Parameter("downscaling_factor", 1.0, 0.1, 2.0, log=True, meaning="factor on a step down"),
        Parameter("look_back_period_s", 30.0, 15.0, 600.0, log=True, meaning="window of the mean"),
        SPOT_SHARE,
    )
    tick_s = 0.1

    def __init__(
        self,
        fleet: Fleet,
        target_ongoing_requests: float = 2.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
        upscaling_factor: float = 1.0,
        downscaling_factor: float = 1.0,
        look_back_period_s: float = 30.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.target_ongoing_requests = target_ongoing_requests
        self.upscale_delay_s = upscale_delay_s
        self.downscale_delay_s = downscale_delay_s
        self.upscaling_factor = upscaling_factor
        self.downscaling_factor = downscaling_factor
        self._ongoing = SlidingWindow(len(fleet), look_back_period_s)
        self._streak = Streak(len(fleet))

    def forget(self, rows: Bools) -> None:
        """Forget the window and the delays."""
        self._ongoing.reset(rows)
        self._streak.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The smoothed count once its delay is over."""
        known = due & ~np.isnan(service.in_system)
        self._ongoing.add(service.time_s, service.in_system, known)
        total = self._ongoing.mean(service.time_s)
        current = service.current
        replicas = np.maximum(current, 1.0)
        ratio = total / (self.target_ongoing_requests * replicas)
        factor = np.where(ratio >= 1.0, self.upscaling_factor, self.downscaling_factor)
        desired = np.ceil(replicas * (1.0 + factor * (ratio - 1.0)) - 1e-9)
        stuck = (np.ceil(replicas * ratio - 1e-9) < replicas) & (desired == replicas)
        desired = np.maximum(np.where(stuck, desired - 1.0, desired), 0.0)
        desired = np.clip(desired, service.minimum, service.maximum)
        # Only a service at one replica goes to none, and from none the wait is over at once.
        desired = np.where((desired < 1.0) & (current > 1.0), 1.0, desired)
        awake = np.clip(np.ceil(total * self.upscaling_factor / self.target_ongoing_requests - 1e-9), 1.0, None)
        asleep = current < 1.0
        desired = np.where(asleep, np.where(total > 0, awake, current), desired)
        sign = np.nan_to_num(np.sign(desired - current))
        _, held_s = self._streak.update(service.time_s, sign, known)
        delay_s = np.where(sign > 0, self.upscale_delay_s, self.downscale_delay_s)
        ripe = known & ((held_s >= delay_s - TOLERANCE_S) | asleep)
        self._streak.reset(ripe)
        return np.where(ripe, desired, np.nan)
