"""A slow controller that moves a policy's caution at run time from the measured attainment.

Hindsight tuning is what operators don't have: instead of a constant margin, the margin follows the error budget.
This module must not know what the dial means to the policy that reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.durable import Durable, State
from policies.fleet import Fleet

PATIENCE = 0.2
"""Share of the fastest rise that is left while an earlier one has not taken effect."""


class Verdicts(NamedTuple):
    """Requests judged in one window, (n,) each."""

    requests: Floats
    missed: Floats
    known: Bools  # False where nothing was measured


def judged(snapshot: Snapshot, fleet: Fleet) -> Verdicts:
    """How many requests of a window count, and how many of them missed their objectives."""
    attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
    count = np.nan_to_num(snapshot.finished_rps * snapshot.window_s)
    # Nothing finishes and someone has waited too long: what arrives is missed, though nobody has counted it yet.
    stalled = (snapshot.finished_rps == 0) & (snapshot.oldest_wait_s > fleet.ttft_slo_s)
    attained = np.where(stalled, 0.0, attained)
    count = np.where(stalled, np.nan_to_num(snapshot.arrival_rps * snapshot.window_s), count)
    known = ~np.isnan(attained) & (count > 0)
    return Verdicts(count, count * (1.0 - np.nan_to_num(attained, nan=1.0)), known)


class ErrorBudget(Durable):
    """An integrator per service on the burn rate: misses over allowed misses.

    Where misses come in bursts, as they do, the mean burn rate settles at `aim`: a burst of misses raises the dial by
    about as much as the quiet after it lowers it. A short `memory_s` answers a burst while it lasts and forgets it when
    it is over; what counts as allowed always follows the traffic of the last hour, so a miss at night is one miss.

    Args:
        fleet: attainment targets of the services.
        low: lowest offset of the dial.
        high: highest offset of the dial.
        memory_s: time constant of the miss rate, seconds; 0: each window by itself, so that every miss counts once.
        rise: dial units per hour and unit of burn rate above `aim`.
        most: largest burn rate above `aim` that counts; the dial falls by at most `aim` times `rise` an hour.
        aim: share of the allowance that may be spent: what is left absorbs the next burst.
        start: offset of the dial before anything is known, one for all or (n,).
    """

    TRAFFIC_MEMORY_S = 3600.0

    def __init__(
        self,
        fleet: Fleet,
        low: float,
        high: float,
        memory_s: float = 3600.0,
        rise: float = 2.0,
        most: float = 2.0,
        aim: float = 0.5,
        start: Floats | float = 0.0,
    ) -> None:
        self.fleet = fleet
        self.low = low
        self.high = high
        self.memory_s = memory_s
        self.rise = rise
        self.most = most
        self.aim = aim
        n = len(fleet)
        self.start = tuple(np.clip(np.broadcast_to(start, n), low, high).tolist())  # a setting: no array, see Durable
        self.dial: Floats = np.array(self.start)
        self._missed, self._missed_s = np.zeros(n), np.zeros(n)
        self._counted, self._counted_s = np.zeros(n), np.zeros(n)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        self.dial[rows] = np.array(self.start)[rows]
        for array in (self._missed, self._missed_s, self._counted, self._counted_s):
            array[rows] = 0.0

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, between these ends."""
        super().restore(state)
        self.dial = np.clip(self.dial, self.low, self.high)

    def update(self, snapshot: Snapshot, patient: Bools | None = None, stuck: Bools | None = None) -> Floats:
        """Account for one window; the dial (n,). Windows without a measurement change nothing.

        Args:
            snapshot: the window.
            patient: (n,) where an earlier rise has not taken effect yet: the dial rises a fifth as fast at most, so
                that the misses of one cold start don't drive it to its limit.
            stuck: (n,) where a rise could change nothing: the dial does not rise, so that it need not come down later.
        """
        count, missed, known = judged(snapshot, self.fleet)
        seconds = np.nan_to_num(snapshot.window_s)
        self._missed, self._missed_s = self._remember(
            self._missed, self._missed_s, missed, seconds, known, self.memory_s
        )
        self._counted, self._counted_s = self._remember(
            self._counted, self._counted_s, count, seconds, known, self.TRAFFIC_MEMORY_S
        )
        allowed_rps = self._counted / np.maximum(self._counted_s, 1e-9) * (1.0 - self.fleet.attainment_target)
        burn = self._missed / np.maximum(self._missed_s, 1e-9) / np.maximum(allowed_rps, 1e-12)
        push = np.clip(burn - self.aim, -self.aim, self.most)
        if patient is not None:
            push = np.where(patient, np.minimum(push, PATIENCE * self.most), push)
        if stuck is not None:
            push = np.where(stuck, np.minimum(push, 0.0), push)
        moved = self.dial + self.rise * push * seconds / 3600.0
        self.dial = np.where(known, np.clip(moved, self.low, self.high), self.dial)
        return self.dial

    @staticmethod
    def _remember(
        total: Floats, total_s: Floats, value: Floats, seconds: Floats, known: Bools, memory_s: float
    ) -> tuple[Floats, Floats]:
        """An exponential sum and the seconds that it stands for, where the window is known."""
        keep = np.exp(-seconds / max(memory_s, 1e-9))
        return np.where(known, keep * total + value, total), np.where(known, keep * total_s + seconds, total_s)
