"""Knative's pod autoscaler (KPA): concurrency over a stable and a panic window.

Source: knative.dev serving, `pkg/autoscaler/scaling` (1.x). Totals over all replicas:
``stable = ceil(S / T)`` and ``panic = ceil(P / T)`` with ``T = 100 * 0.7``, both clipped to
``[floor(ready / 2), ceil(1000 * ready)]``. Panic begins, or goes on, when the unclipped panic count is at least twice
the ready replicas, and ends after a stable window (60 s) without; in panic the count is the larger of both and never
falls. A service that is found with more than one replica starts in panic. A scale-down waits for the highest count of
the scale-down delay (0 s).
The tick of 2 s and the panic window of a tenth of the stable one (6 s) are shorter than a control interval: both become
the last window's measurement.
Left out: burst capacity and the activator, the scale-to-zero grace period (30 s), initial scale, excess burst signals.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.baselines.windows import SlidingWindow
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet

PANIC_WINDOW_SHARE = 0.1
MAX_SCALE_UP_RATE = 1000.0


class KnativePolicy(SinglePoolPolicy):
    """Scales on the concurrency of all replicas.

    Args:
        fleet: the services.
        target: concurrency per replica.
        utilization: share of the target that is aimed at.
        stable_window_s: seconds.
        panic_threshold: panic count over ready replicas that begins a panic.
        max_scale_down_rate: the count may fall to the ready replicas over this.
        scale_down_delay_s: how long the highest count is kept, seconds.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "knative"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("target", 100.0, 0.5, 1000.0, log=True, meaning="concurrency per replica"),
        Parameter("utilization", 0.7, 0.3, 1.0, limit=1.0, meaning="share of the target that is aimed at"),
        Parameter("stable_window_s", 60.0, 15.0, 3600.0, log=True, meaning="window of the stable count"),
        Parameter("panic_threshold", 2.0, 1.1, 10.0, log=True, meaning="panic count over ready replicas"),
        Parameter("max_scale_down_rate", 2.0, 1.05, 10.0, log=True, meaning="most that one step divides by"),
        Parameter("scale_down_delay_s", 0.0, 0.0, 3600.0, zero=True, meaning="how long the highest count is kept"),
        SPOT_SHARE,
    )
    tick_s = 2.0

    def __init__(
        self,
        fleet: Fleet,
        target: float = 100.0,
        utilization: float = 0.7,
        stable_window_s: float = 60.0,
        panic_threshold: float = 2.0,
        max_scale_down_rate: float = 2.0,
        scale_down_delay_s: float = 0.0,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        n = len(fleet)
        self.target = target * utilization
        self.stable_window_s = stable_window_s
        self.panic_threshold = panic_threshold
        self.max_scale_down_rate = max_scale_down_rate
        self._concurrency = SlidingWindow(n, stable_window_s)
        self._delayed = SlidingWindow(n, scale_down_delay_s)
        self._panic_s = np.full(n, -np.inf)  # when the panic last had a reason; -inf outside of one
        self._panic_peak = np.zeros(n)
        self._fresh = np.ones(n, bool)

    def forget(self, rows: Bools) -> None:
        """Forget windows and panics."""
        self._concurrency.reset(rows)
        self._delayed.reset(rows)
        self._panic_s[rows] = -np.inf
        self._panic_peak[rows] = 0.0
        self._fresh[rows] = True

    @property
    def panicking(self) -> Bools:
        """(n,) services in panic."""
        return ~np.isneginf(self._panic_s)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """The stable count, or in panic the highest seen."""
        time_s, load = service.time_s, service.in_system
        known = due & ~np.isnan(load)
        self._concurrency.add(time_s, load, known)
        stable = np.ceil(self._concurrency.mean(time_s) / self.target - 1e-9)
        panic_window_s = max(PANIC_WINDOW_SHARE * self.stable_window_s, 2 * self.tick_s)
        recent = np.fmax(self._concurrency.mean(time_s, panic_window_s), np.nan)
        panic = np.ceil(np.where(np.isnan(recent), load, recent) / self.target - 1e-9)
        ready = np.maximum(service.ready, 1.0)
        over = panic / ready >= self.panic_threshold
        low = np.floor(ready / self.max_scale_down_rate)
        high = np.ceil(MAX_SCALE_UP_RATE * ready)
        stable, panic = np.clip(stable, low, high), np.clip(panic, low, high)

        started = known & self._fresh & (service.current > 1)
        self._panic_peak = np.where(started, service.current, self._panic_peak)
        self._fresh &= ~known
        ended = self.panicking & ~over & (time_s - self._panic_s > self.stable_window_s)
        begun = known & (over | started)
        self._panic_s = np.where(begun, time_s, np.where(known & ended, -np.inf, self._panic_s))
        self._panic_peak = np.where(self.panicking, self._panic_peak, 0.0)
        highest = np.maximum(np.maximum(stable, panic), self._panic_peak)
        self._panic_peak = np.where(known & self.panicking, highest, self._panic_peak)
        count = np.where(self.panicking, highest, stable)
        self._delayed.add(time_s, count, known)
        return np.where(known, np.fmax(count, self._delayed.max(time_s)), np.nan)
