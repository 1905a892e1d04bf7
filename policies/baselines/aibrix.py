"""AIBrix's pod autoscaler (APA).

Source: vllm-project/aibrix at e3e10f9e, `pkg/controller/podautoscaler`. Every 10 s: ``x`` is the mean over a stable
window (180 s) of the metric's average per replica, ``r = x / target``. Above 1.1 the count becomes
``min(ceil(n*r), ceil(2*n))``, below 0.9 ``max(ceil(n*r), floor(n/2))``, else it stays.
A quirk is kept as written: in the scale-down cooldown (300 s) the *lowest* recommendation of the window is taken, where
an HPA takes the highest, so it does not damp; ``cooldown=highest`` mends it.
The metric is the KV cache usage (target 0.5) or running requests per replica.
Left out: KPA mode, schedules, several metrics at once, the GPU optimizer.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import SlidingWindow
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet

RESYNC_S = 10.0
MAX_UP, MAX_DOWN = 2.0, 2.0
TOLERANCE = 0.1
COOLDOWN_S = 300.0


class AibrixPolicy(SinglePoolPolicy):
    """Scales on a metric's average per replica.

    Args:
        fleet: the services.
        metric: ``kv_usage`` or ``running``, the latter as a share of `max_num_seqs`; waiting requests count as well.
        target: of the metric's average.
        stable_window_s: window of the mean, seconds.
        tolerance: relative deviation that changes nothing.
        cooldown: which recommendation of the last 300 s a scale-down takes, ``lowest`` (as written) or ``highest``.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "aibrix-apa"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("metric", "kv_usage", choices=("kv_usage", "running"), meaning="what is averaged"),
        Parameter("target", 0.5, 0.002, 1.5, log=True, meaning="of the metric's average"),
        Parameter("stable_window_s", 180.0, 15.0, 3600.0, log=True, meaning="window of the mean"),
        Parameter("tolerance", TOLERANCE, 0.0, 0.3, zero=True, meaning="relative deviation that changes nothing"),
        Parameter("cooldown", "lowest", choices=("lowest", "highest"), meaning="recommendation that a fall takes"),
        SPOT_SHARE,
    )
    tick_s = RESYNC_S

    def __init__(
        self,
        fleet: Fleet,
        metric: str = "kv_usage",
        target: float = 0.5,
        stable_window_s: float = 180.0,
        tolerance: float = TOLERANCE,
        cooldown: str = "lowest",
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.metric = metric
        self.target = target
        self.tolerance = tolerance
        self.cooldown = cooldown
        self._average = SlidingWindow(len(fleet), stable_window_s)
        self._recommended = SlidingWindow(len(fleet), COOLDOWN_S)

    def forget(self, rows: Bools) -> None:
        """Forget averages and recommendations."""
        self._average.reset(rows)
        self._recommended.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The algorithm's count, after the cooldown."""
        ready = np.maximum(service.ready, 1.0)
        average = service.kv_usage if self.metric == "kv_usage" else service.in_system / ready / service.slots
        known = due & ~np.isnan(average)
        self._average.add(service.time_s, average, known)
        current = service.current
        desired = apa(self._average.mean(service.time_s) / self.target, current, self.tolerance)
        self._recommended.add(service.time_s, desired, known)
        kept = self._recommended.min if self.cooldown == "lowest" else self._recommended.max
        fallen = np.minimum(kept(service.time_s), current)
        return np.where(known, np.where(desired < current, fallen, desired), np.nan)


def apa(ratio: Floats, current: Floats, tolerance: float = TOLERANCE) -> Floats:
    """Replicas (n,) for a metric at `ratio` (n,) of its target.

    >>> apa(np.array([1.1, 1.2, 5.0, 0.9, 0.8, 0.1]), np.array([10.0])).tolist()
    [10.0, 12.0, 20.0, 10.0, 8.0, 5.0]
    """
    scaled = np.ceil(current * ratio - 1e-9)
    up = np.minimum(scaled, np.ceil(MAX_UP * current))
    down = np.maximum(scaled, np.floor(current / MAX_DOWN))
    more, less = ratio > 1.0 + tolerance + 1e-9, ratio < 1.0 - tolerance - 1e-9
    return np.where(more, up, np.where(less, down, current))
