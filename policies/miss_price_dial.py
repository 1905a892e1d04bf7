"""The dial of the learned policy: the price of a miss, moved by the error budget.

The network can act on any price, but nobody knows beforehand which one a service needs. So an integrator finds it:
misses come in bursts, and a burst raises the price by about as much as the quiet time after it lowers it, so the mean
burn rate settles at the aim.
This module must not know the network.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from policies.contract import Bools, Floats, Snapshot
from policies.durable import Durable, State
from policies.error_budget import ErrorBudget
from policies.fleet import Fleet

MISS_PRICES = (1.0, 90.0)
"""Lowest and highest price of a miss, in costs of serving a request: beyond them little changes but the bill."""
FIRST_BUDGET_PRICE = 0.8
"""Price of all allowed misses before anything is known of a service, over the cost of serving everything."""
AIM = 0.9
"""Share of the error budget that may be spent: what is left absorbs the next burst."""
RISE = 1.0
"""What missing an hour's budget adds to the log of the price."""
KNOWN_RISE = 0.25
"""The same where the first price was found on the service's own traffic: an hour says little beside days."""
MAX_RISE_PER_BURST = 0.5
"""Most that the misses of one burst add to it."""
SLOW_FALL = 0.25
"""Share of the usual fall that is left where the last burst struck."""
EDGE = 0.3
"""How far above the log price at which a burst struck it is too low still."""
BURST_SHARE = 0.05
"""Share of an hour's allowance that must be missed in one window to say that a burst has struck."""
QUIET_S = 600.0
"""A burst is over after this long without such a window."""
MAX_BURST_S = 1800.0
"""What lasts longer is no burst but the load: it counts as another one."""


class Course(NamedTuple):
    """Where the dials of the services begin and how fast they move, (n,) each: settings, so no memory of the dial."""

    first: Floats  # natural log of the price
    rise: Floats  # what missing an hour's budget adds to it


class MissPriceDial(Durable):
    """An integrator per service on the misses, in units of what an hour allows.

    Two things keep the price from swinging. First, a burst shows only that the price was too low, not by how much: most
    of the misses come before replicas can start, whatever the price. So one burst adds `MAX_RISE_PER_BURST` at most.
    Second, a fleet that is a tenth smaller may serve a third of the requests too late, so the price must not return
    there easily: up to a little above the price at which the last burst struck, it falls more slowly, by `SLOW_FALL`.

    The price starts where all allowed misses together cost the same, whatever the target: a miss that is allowed once
    in a hundred requests is dearer than one allowed once in ten. Where a price is known that serves a recording of the
    service's own traffic, it starts there and moves four times more slowly.

    Args:
        fleet: objectives of the services.
        low: lowest natural log of a price that the network was trained for.
        high: highest; `MISS_PRICES` counts where it is narrower.
        first_price: to begin with, in costs of serving a request: one for all services, or (n,) with NaN where none is
            known; None: nowhere.
    """

    def __init__(self, fleet: Fleet, low: float, high: float, first_price: Floats | float | None = None) -> None:
        self.low, self.high = np.clip(np.log(MISS_PRICES), low, high).tolist()
        self._budget = ErrorBudget(fleet)
        self._course = self._course_of(np.nan if first_price is None else first_price)
        self.log_price: Floats = self._course.first.copy()
        self._began_at = self._course.first.copy()
        n = len(fleet)
        # Of the last burst: the log price when it struck, and the time since then and since its last sign.
        self._struck_at = np.full(n, -np.inf)  # nowhere yet
        self._struck_s, self._quiet_s = np.full(n, np.inf), np.full(n, np.inf)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = slice(None) if services is None else services
        self._budget.reset(services)
        self.log_price[rows] = self._course.first[rows]
        self._struck_at[rows] = -np.inf
        self._struck_s[rows] = self._quiet_s[rows] = np.inf

    def restore(self, state: State) -> None:
        """Go on from what `state` returned, between these ends; begin anew where another first price is given now."""
        super().restore(state)
        anew = ~np.isclose(self._began_at, self._course.first)
        self.log_price = np.where(anew, self._course.first, np.clip(self.log_price, self.low, self.high))
        self._began_at = self._course.first.copy()

    def update(self, snapshot: Snapshot) -> Floats:
        """Account for one window; the natural log of the price (n,). Windows without a measurement change nothing."""
        missed, allowed_rps, seconds, known = self._budget.account(snapshot)
        spent_hours = missed / np.maximum(3600.0 * allowed_rps, 1e-12)
        self._find_bursts(spent_hours > BURST_SHARE, known, seconds)
        room = np.maximum(self._struck_at + MAX_RISE_PER_BURST - self.log_price, 0.0)
        rise = np.minimum(self._course.rise * spent_hours, np.where(self._quiet_s <= QUIET_S, room, np.inf))
        steep = self.log_price <= self._struck_at + EDGE
        fall = self._course.rise * AIM * seconds / 3600.0 * np.where(steep, SLOW_FALL, 1.0)
        moved = np.clip(self.log_price + rise - fall, self.low, self.high)
        self.log_price = np.where(known, moved, self.log_price)
        return self.log_price

    def _find_bursts(self, struck: Bools, known: Bools, seconds: Floats) -> None:
        """Account for bursts."""
        another = known & struck & ((self._quiet_s > QUIET_S) | (self._struck_s > MAX_BURST_S))
        self._struck_at = np.where(another, self.log_price, self._struck_at)
        self._struck_s = np.where(another, 0.0, np.where(known, self._struck_s + seconds, self._struck_s))
        self._quiet_s = np.where(known, np.where(struck, 0.0, self._quiet_s + seconds), self._quiet_s)

    def _course_of(self, first_price: Floats | float) -> Course:
        fleet = self._budget.fleet
        known = np.broadcast_to(np.log(first_price), len(fleet))
        by_target = math.log(FIRST_BUDGET_PRICE) - np.log(1.0 - fleet.attainment_target)
        first = np.clip(np.where(np.isnan(known), by_target, known), self.low, self.high)
        return Course(first, np.where(np.isnan(known), RISE, KNOWN_RISE))
