"""The error budget of a service: the misses that its SLO allows, and how fast they are spent.

A rule's headroom (`policies.self_tuned`) and the price of a miss (`policies.miss_price_dial`) follow it, and count the
same requests. This module must not know what follows it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.durable import Durable
from policies.fleet import Fleet

TRAFFIC_MEMORY_S = 3600.0
"""Time constant of the traffic that says how many misses are allowed, seconds."""


class Spending(NamedTuple):
    """What one window took from the budget, (n,) each."""

    missed: Floats  # requests that missed an objective
    allowed_rps: Floats  # misses per second that the SLO allows, of the traffic of the last hour
    seconds: Floats  # length of the window
    known: Bools  # False where nothing was measured


class ErrorBudget(Durable):
    """Counts misses and allowed misses per service.

    What is allowed follows the traffic of the last hour, so a miss at night counts as one miss, and a burst of traffic
    is not excused its misses because it is a burst.

    Args:
        fleet: objectives of the services.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._traffic = Fading(len(fleet), TRAFFIC_MEMORY_S)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the traffic of the masked services, all when None."""
        self._traffic.reset(services)

    def account(self, snapshot: Snapshot) -> Spending:
        """Account for one window. One without a measurement changes nothing."""
        attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
        requests = np.nan_to_num(snapshot.finished_rps * snapshot.window_s)
        # Nothing finishes and someone has waited too long: what arrives is missed, though nobody has counted it yet.
        stalled = (snapshot.finished_rps == 0) & (snapshot.oldest_wait_s > self.fleet.ttft_slo_s)
        attained = np.where(stalled, 0.0, attained)
        requests = np.where(stalled, np.nan_to_num(snapshot.arrival_rps * snapshot.window_s), requests)
        known = ~np.isnan(attained) & (requests > 0)
        missed = requests * (1.0 - np.nan_to_num(attained, nan=1.0))
        seconds = np.nan_to_num(snapshot.window_s)
        rps = self._traffic.add(requests, seconds, known)
        return Spending(missed, rps * (1.0 - self.fleet.attainment_target), seconds, known)


class Fading(Durable):
    """A rate per service over an exponentially fading past; settings are no arrays, see `policies.durable`.

    Args:
        n: services.
        memory_s: time constant, seconds.
    """

    def __init__(self, n: int, memory_s: float) -> None:
        self.memory_s = memory_s
        self._amount, self._seconds = np.zeros(n), np.zeros(n)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the past of the masked services, all when None."""
        rows = slice(None) if services is None else services
        self._amount[rows] = self._seconds[rows] = 0.0

    def add(self, amount: Floats, seconds: Floats, known: Bools) -> Floats:
        """Take in what came in a window, where it is known; the rate (n,) per second."""
        keep = np.exp(-seconds / self.memory_s)
        self._amount = np.where(known, keep * self._amount + amount, self._amount)
        self._seconds = np.where(known, keep * self._seconds + seconds, self._seconds)
        return np.asarray(self._amount / np.maximum(self._seconds, 1e-9))
