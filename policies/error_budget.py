"""Slow controllers that move a policy's caution at run time from the measured attainment.

Hindsight tuning is what operators don't have: instead of a constant margin, the margin follows the error budget.
`BudgetDial` puts a dial where the spent share of the budget says, for a policy that has learned what every position
of its dial costs. `ErrorBudget` moves a dial from where it stands, for a policy whose right margin nobody knows.
This module must not know what the dial means to the policy that reads it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.durable import Durable, State
from policies.fleet import Fleet

AIM = 0.5
"""Share of the allowance that may be spent: what is left absorbs the next burst."""
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


class BudgetDial(Durable):
    """A dial per service between two ends, as far up as the error budget is spent.

    Nothing missed is the low end, the whole allowance the high one. So it settles where the policy misses about as much
    as the position of the dial says, within the allowance if the policy can. It rises at once and falls slowly: a dial
    that falls as fast as misses are forgotten swings around the position that would do.
    Misses and requests are remembered for some hours. What was before the first request is unknown: `PRIOR` of the
    budget counts as spent over `PRIOR_S` of traffic, and is forgotten like the rest.

    Args:
        fleet: attainment targets of the services.
        low: the dial with nothing spent.
        high: the dial with all, or more, spent.
    """

    MEMORY_S = 4 * 3600.0
    PRIOR = 0.6
    PRIOR_S = 3600.0
    POWER = 1.5
    """Of the spent share: above 1, more of the budget is used before the dial is far up."""
    FALL_PER_HOUR = 1.0

    def __init__(self, fleet: Fleet, low: float, high: float) -> None:
        self.fleet = fleet
        self.low = low
        self.high = high
        n = len(fleet)
        # Fading sums of the windows that were measured: requests missed and counted, and their seconds.
        self._missed, self._counted, self._seconds = np.zeros(n), np.zeros(n), np.zeros(n)
        self._prior_s = np.full(n, self.PRIOR_S)
        self.dial = self._wanted()

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        for array in (self._missed, self._counted, self._seconds):
            array[rows] = 0.0
        self._prior_s[rows] = self.PRIOR_S
        self.dial[rows] = self._wanted()[rows]

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, between these ends."""
        super().restore(state)
        self.dial = np.clip(self.dial, self.low, self.high)

    @property
    def spent(self) -> Floats:
        """(n,) share of the error budget that is spent, at least 0; above 1 where it is overdrawn."""
        allowed = 1.0 - self.fleet.attainment_target
        rate = np.divide(self._counted, self._seconds, out=np.ones_like(self._counted), where=self._seconds > 0)
        before = rate * self._prior_s  # requests that the prior stands for
        spent: Floats = (self._missed / allowed + self.PRIOR * before) / (self._counted + before)
        return spent

    def update(self, snapshot: Snapshot) -> Floats:
        """Account for one window; the dial (n,). Windows without a measurement change nothing."""
        window = judged(snapshot, self.fleet)
        seconds = np.where(window.known, np.nan_to_num(snapshot.window_s), 0.0)
        keep = np.exp(-seconds / self.MEMORY_S)
        self._missed = keep * self._missed + np.where(window.known, window.missed, 0.0)
        self._counted = keep * self._counted + np.where(window.known, window.requests, 0.0)
        self._seconds = keep * self._seconds + seconds
        self._prior_s = keep * self._prior_s
        lowest = self.dial - self.FALL_PER_HOUR * seconds / 3600.0
        self.dial = np.where(window.known, np.maximum(self._wanted(), lowest), self.dial)
        return self.dial

    def _wanted(self) -> Floats:
        """(n,) where the spent share would put the dial."""
        wanted: Floats = self.low + (self.high - self.low) * np.minimum(self.spent, 1.0) ** self.POWER
        return wanted


class ErrorBudget(Durable):
    """An integrator per service on the burn rate: misses over allowed misses.

    Where misses come in bursts, as they do, the mean burn rate settles at `AIM`: a burst of misses raises the dial by
    about as much as the quiet after it lowers it. A short `memory_s` answers a burst while it lasts and forgets it when
    it is over; what counts as allowed always follows the traffic of the last hour, so a miss at night is one miss.

    Args:
        fleet: attainment targets of the services.
        low: lowest offset of the dial.
        high: highest offset of the dial.
        memory_s: time constant of the miss rate, seconds.
        rise: dial units per hour and unit of burn rate above `AIM`.
        most: largest burn rate above `AIM` that counts; the dial falls by at most `AIM` times `rise` an hour.
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
    ) -> None:
        self.fleet = fleet
        self.low = low
        self.high = high
        self.memory_s = memory_s
        self.rise = rise
        self.most = most
        n = len(fleet)
        self.dial = np.zeros(n)
        self._missed, self._missed_s = np.zeros(n), np.zeros(n)
        self._counted, self._counted_s = np.zeros(n), np.zeros(n)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        for array in (self.dial, self._missed, self._missed_s, self._counted, self._counted_s):
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
        push = np.clip(burn - AIM, -AIM, self.most)
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
        keep = np.exp(-seconds / memory_s)
        return np.where(known, keep * total + value, total), np.where(known, keep * total_s + seconds, total_s)
