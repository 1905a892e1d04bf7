"""A slow controller that moves a policy's caution at run time from the measured attainment.

Hindsight tuning is what operators don't have: instead of a constant margin, the margin follows the error budget. When
misses spend it faster than allowed the dial rises at once; while there is slack it falls slowly.
This module must not know what the dial means to the policy that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.fleet import Fleet


class ErrorBudget:
    """An integrator per service on the burn rate: misses over allowed misses.

    Args:
        fleet: attainment targets of the services.
        low: lowest offset of the dial.
        high: highest offset of the dial.
        memory_s: time constant of the miss rate, seconds.
        rise: dial units per hour and unit of burn rate above half of the allowance. With the burn rate bounded, the
            dial rises by up to twice this an hour and falls by up to half of it.
    """

    def __init__(self, fleet: Fleet, low: float, high: float, memory_s: float = 3600.0, rise: float = 2.0) -> None:
        self.fleet = fleet
        self.low = low
        self.high = high
        self.memory_s = memory_s
        self.rise = rise
        self.dial = np.zeros(len(fleet))
        self._missed = np.zeros(len(fleet))
        self._counted = np.zeros(len(fleet))

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        for array in (self.dial, self._missed, self._counted):
            array[rows] = 0.0

    def state(self) -> dict[str, Floats]:
        """The dial and its memory, (n,) each."""
        return {"dial": self.dial, "missed": self._missed, "counted": self._counted}

    def restore(self, state: Mapping[str, Floats]) -> None:
        """Go on from what `state` returned."""
        self.dial = np.clip(state["dial"], self.low, self.high)
        self._missed = np.array(state["missed"], np.float64)
        self._counted = np.array(state["counted"], np.float64)

    def update(self, snapshot: Snapshot) -> Floats:
        """Account for one window; the dial (n,). Windows without a measurement change nothing."""
        attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
        count = np.nan_to_num(snapshot.finished_rps * snapshot.window_s)
        known = ~np.isnan(attained) & (count > 0)
        keep = np.exp(-snapshot.window_s / self.memory_s)
        self._counted = np.where(known, keep * self._counted + count, self._counted)
        missed = keep * self._missed + count * (1.0 - np.nan_to_num(attained, nan=1.0))
        self._missed = np.where(known, missed, self._missed)
        allowed = 1.0 - self.fleet.attainment_target
        burn = self._missed / np.maximum(self._counted * allowed, 1e-9)
        # Half of the allowance is the aim: what is left absorbs the next burst.
        push = np.clip(burn - 0.5, -0.5, 2.0)
        moved = self.dial + self.rise * push * snapshot.window_s / 3600.0
        self.dial = np.where(known, np.clip(moved, self.low, self.high), self.dial)
        return self.dial
