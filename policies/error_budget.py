"""A slow controller that moves a policy's caution at run time from the measured attainment.

Hindsight tuning is what operators don't have: instead of a constant margin, the margin follows the error budget.
This module must not know what the dial means to the policy that reads it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.durable import Durable, State
from policies.fleet import Fleet

PATIENCE = 0.2
"""Share of the fastest rise that is left while an earlier one has not taken effect."""
NOTICE = 0.05
"""Share of an hour's allowance that must be missed in one window to say that a crowd has struck."""
QUIET_S = 600.0
"""A crowd is over after this long without such a window."""
CROWD_S = 1800.0
"""What lasts longer is no crowd but the load: it counts as another one."""
EDGE = 0.3
"""How far above the position at which a crowd struck the dial is too low still."""


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

    Two things keep the dial from swinging. One crowd says only that the dial was too low, not by how much: most of
    what is missed comes before replicas can start, whatever the dial. So it adds `crest` at most. And where the edge is
    steep, as a fleet that is a tenth smaller may serve a third of the requests too late, going there again must not be
    cheap: up to a little above the position where the last crowd struck, the dial falls with `reluctance`.

    Args:
        fleet: attainment targets of the services.
        low: lowest offset of the dial.
        high: highest offset of the dial.
        memory_s: time constant of the miss rate, seconds; 0: each window by itself, so that every miss counts once.
        rise: dial units per hour and unit of burn rate above `aim`.
        most: largest burn rate above `aim` that counts; the dial falls by at most `aim` times `rise` an hour.
        aim: share of the allowance that may be spent: what is left absorbs the next burst.
        start: offset of the dial before anything is known, one for all or (n,).
        crest: most that the misses of one crowd add to the dial.
        reluctance: share of the usual fall that is left where the last crowd struck; 1: as everywhere.
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
        crest: float = math.inf,
        reluctance: float = 1.0,
    ) -> None:
        self.fleet = fleet
        self.low = low
        self.high = high
        self.memory_s = memory_s
        self.rise = rise
        self.most = most
        self.aim = aim
        self.crest = crest
        self.reluctance = reluctance
        n = len(fleet)
        self.start = tuple(np.clip(np.broadcast_to(start, n), low, high).tolist())  # a setting: no array, see Durable
        self.dial: Floats = np.array(self.start)
        self._missed, self._missed_s = np.zeros(n), np.zeros(n)
        self._counted, self._counted_s = np.zeros(n), np.zeros(n)
        # Of the last crowd: the dial when it struck, and the time since then and since its last sign.
        self._struck_at = np.full(n, low - 1.0)  # nowhere yet
        self._struck_s, self._quiet_s = np.full(n, np.inf), np.full(n, np.inf)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        self.dial[rows] = np.array(self.start)[rows]
        for array in (self._missed, self._missed_s, self._counted, self._counted_s):
            array[rows] = 0.0
        self._struck_at[rows] = self.low - 1.0
        self._struck_s[rows] = self._quiet_s[rows] = np.inf

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
        hours = seconds / 3600.0
        counted = np.minimum(burn, self.aim + self.most)
        if patient is not None:
            counted = np.where(patient, np.minimum(counted, self.aim + PATIENCE * self.most), counted)
        if stuck is not None:
            counted = np.where(stuck, np.minimum(counted, self.aim), counted)
        self._notice(missed > NOTICE * 3600.0 * allowed_rps, known, seconds)
        room = np.maximum(self._struck_at + self.crest - self.dial, 0.0)
        rise = np.minimum(self.rise * counted * hours, np.where(self._quiet_s <= QUIET_S, room, np.inf))
        steep = self.dial <= self._struck_at + EDGE
        fall = self.rise * self.aim * hours * np.where(steep, self.reluctance, 1.0)
        self.dial = np.where(known, np.clip(self.dial + rise - fall, self.low, self.high), self.dial)
        return self.dial

    def _notice(self, struck: Bools, known: Bools, seconds: Floats) -> None:
        """Account for crowds."""
        another = known & struck & ((self._quiet_s > QUIET_S) | (self._struck_s > CROWD_S))
        self._struck_at = np.where(another, self.dial, self._struck_at)
        self._struck_s = np.where(another, 0.0, np.where(known, self._struck_s + seconds, self._struck_s))
        self._quiet_s = np.where(known, np.where(struck, 0.0, self._quiet_s + seconds), self._quiet_s)

    @staticmethod
    def _remember(
        total: Floats, total_s: Floats, value: Floats, seconds: Floats, known: Bools, memory_s: float
    ) -> tuple[Floats, Floats]:
        """An exponential sum and the seconds that it stands for, where the window is known."""
        keep = np.exp(-seconds / max(memory_s, 1e-9))
        return np.where(known, keep * total + value, total), np.where(known, keep * total_s + seconds, total_s)
