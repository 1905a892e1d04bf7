"""The second half of a HorizontalPodAutoscaler: tolerance, stabilisation windows and rate policies.

After Kubernetes autoscaling/v2 (`behavior`), which several peers scale through. The lowest recommendation of the up
window and the highest of the down window apply, and the count found at the start is the first recommendation; then each
direction may change a number of replicas or a share of them per period, whichever is more.
This module must not know where a recommendation comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.baselines.windows import SlidingWindow
from policies.contract import Bools, Floats

TOLERANCE = 0.1
PERIOD_S = 15.0


@dataclass(frozen=True)
class ScalingRules:
    """One direction of a HorizontalPodAutoscaler's `behavior`.

    Attributes:
        stabilization_s: recommendations are remembered this long, seconds.
        replicas: that may change in one period.
        share: of the replicas that may change in one period; the larger of both applies.
        period_s: seconds.
    """

    stabilization_s: float
    replicas: float
    share: float
    period_s: float


UP = ScalingRules(stabilization_s=0.0, replicas=4, share=1.0, period_s=15.0)
DOWN = ScalingRules(stabilization_s=300.0, replicas=0, share=1.0, period_s=15.0)
"""What Kubernetes does unless told otherwise."""


def tolerated(desired: Floats, current: Floats, tolerance: float = TOLERANCE) -> Floats:
    """`desired`, or `current` where the two differ by no more than the tolerance. Fractions of replicas count."""
    return np.where(np.abs(desired - current) <= tolerance * current + 1e-9, current, desired)


class Behavior:
    """Stabilises and limits recommendations (n, *width)."""

    def __init__(self, n: int, *width: int, up: ScalingRules = UP, down: ScalingRules = DOWN) -> None:
        self.up, self.down = up, down
        self._recommended = SlidingWindow(n, max(up.stabilization_s, down.stabilization_s), *width)
        self._changes = SlidingWindow(n, max(up.period_s, down.period_s), *width, 2)
        self._last = np.full((n, *width), np.nan)
        self._last_s = np.full(n, np.nan)
        self._fresh = np.ones(n, bool)

    def __len__(self) -> int:
        """Recommendations remembered."""
        return len(self._recommended)

    def reset(self, rows: Bools) -> None:
        """Forget the masked services."""
        self._recommended.reset(rows)
        self._changes.reset(rows)
        self._last[rows] = np.nan
        self._last_s[rows] = np.nan
        self._fresh[rows] = True

    def settle(self, time_s: Floats, due: Bools, current: Floats, desired: Floats) -> Floats:
        """What to scale to (n, ...), and remember the recommendation where it is `due` (n,).

        A NaN recommendation stays NaN and is not remembered. Changes are those seen in `current`, whoever made them.
        """
        first = due & self._fresh
        if first.any():
            self._recommended.add(time_s, current, first)
        # What is seen now was changed after the last look.
        changed = current - self._last
        self._changes.add(self._last_s, np.stack([np.maximum(changed, 0.0), np.maximum(-changed, 0.0)], axis=-1))
        self._last, self._last_s = current.copy(), time_s.copy()
        self._fresh = self._fresh & ~due
        lowest = np.fmin(desired, self._recommended.min(time_s, self.up.stabilization_s))
        highest = np.fmax(desired, self._recommended.max(time_s, self.down.stabilization_s))
        self._recommended.add(time_s, desired, due)
        stable = np.minimum(np.maximum(current, lowest), highest)
        high = self._limit(time_s, current, self.up, 1.0)
        low = self._limit(time_s, current, self.down, -1.0)
        return np.where(np.isnan(desired), np.nan, np.clip(stable, np.minimum(low, current), high))

    def _limit(self, time_s: Floats, current: Floats, rules: ScalingRules, sign: float) -> Floats:
        """The furthest that one direction may go in the current period."""
        moved = self._changes.sum(time_s, rules.period_s)
        added, removed = moved[..., 0], moved[..., 1]
        start = current - np.nan_to_num(added) + np.nan_to_num(removed)
        if sign > 0:
            limit = start + np.maximum(rules.replicas, np.ceil(start * rules.share - 1e-9))
            return np.maximum(limit, current)
        by_share = np.floor(start * (1.0 - rules.share) + 1e-9)
        return np.maximum(np.minimum(start - rules.replicas, by_share), 0.0)
