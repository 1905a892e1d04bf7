"""May this controller write a service now, and why not: one list of stops, asked whenever a write is ahead.

Leases, modes, the kill switch, other owners, edits and the decision's age. What cannot be read forbids.
This module must not know what is to be written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from autoscaler.actuators.base import FleetState
from autoscaler.authority.controls import Mode
from autoscaler.authority.foreign_edits import ForeignEdits
from autoscaler.authority.heartbeat import Heartbeat
from policies.contract import Bools, Floats, Ints, Reason


class World(Protocol):
    """What is in force, as the actuator says."""

    @property
    def last(self) -> FleetState:
        """The last reading."""
        ...

    @property
    def readings(self) -> int:
        """How many there have been."""
        ...

    def recent(self, age_s: float) -> FleetState:
        """The last reading, or a new one where that is older than `age_s` seconds."""
        ...

    def wrote(self) -> Floats:
        """(n, P) counts that the last `apply` wrote; NaN where it wrote none or cannot tell."""
        ...


class Clocks(Protocol):
    """The controller's clock."""

    @property
    def now_s(self) -> float:
        """Seconds; Unix time that never jumps while the process lives."""
        ...


@dataclass(frozen=True)
class Hold:
    """Why nothing is written for one service.

    Attributes:
        reason: the first of the stops that apply.
        detail: in one sentence: what was found, who did it where that is known, and the way out.
        until_s: Unix time at which it ends by itself; None where it does not.
    """

    reason: Reason
    detail: str
    until_s: float | None = None


@dataclass(frozen=True, eq=False)
class Permission:
    """The answer for all services at one moment.

    Attributes:
        modes: (n,) modes in force.
        stops: what forbids a write, each with the services (n,) where it does, the most general first.
    """

    modes: npt.NDArray[Any]
    stops: tuple[tuple[Bools, Reason], ...]

    @property
    def stopped(self) -> Bools:
        """(n,) services for which something forbids it."""
        stopped: Bools = self.reasons != 0
        return stopped

    @property
    def reasons(self) -> Ints:
        """(n,) flags of every stop."""
        flags: Ints = np.bitwise_or.reduce([rows * np.int64(reason) for rows, reason in self.stops])
        return flags

    @property
    def granted(self) -> Bools:
        """(n,) services that may be written now."""
        return np.asarray((self.modes == Mode.ACT) & ~self.stopped, bool)

    def first(self, row: int) -> Reason:
        """The most general stop of one service."""
        return next((reason for rows, reason in self.stops if rows[row]), Reason.NONE)


class Authority:
    """Answers for `n` services.

    Args:
        heartbeat: leases, modes, the kill switch.
        edits: what other people have set.
        world: who else acts on the same targets.
        clock: time.
        max_age_s: a decision that is older is not carried out, seconds.
    """

    def __init__(
        self, heartbeat: Heartbeat, edits: ForeignEdits, world: World, clock: Clocks, max_age_s: float
    ) -> None:
        self.edits = edits
        self._heartbeat = heartbeat
        self._world = world
        self._clock = clock
        self._max_age_s = max_age_s
        n = len(heartbeat.services)
        self.brought_back: Bools = np.zeros(n, bool)
        """(n,) services whose memory is here; on the others this controller must not act yet."""

    def ask(self, since_s: float) -> Permission:
        """May they be written now, on a decision whose tick began at `since_s`, and why not."""
        modes = np.array([mode.value for mode in self._heartbeat.pulse.modes])
        acting = np.asarray(modes == Mode.ACT, bool)  # an advised service may be edited and owned by anybody
        state, orders = self._world.last, self.orders()
        owned = np.array([bool(owner) for owner in state.owners], bool) | self.edits.reverted(orders)
        unread = np.zeros(len(modes), bool)
        unread[list(state.owners_unread)] = True
        late = self._clock.now_s - since_s > self._max_age_s
        return Permission(
            modes,
            (
                (~self.leading(), Reason.NOT_LEADER),
                (np.array([bool(why) for why in self._heartbeat.killed()], bool), Reason.KILL_SWITCH),
                (np.asarray(modes == Mode.PAUSED, bool), Reason.PAUSED),
                (owned & acting, Reason.OTHER_AUTOSCALER),
                (unread & acting, Reason.OWNER_UNKNOWN),
                (self.edits.standing(self._clock.now_s, orders) & acting, Reason.FOREIGN_EDIT),
                (np.full(len(modes), late), Reason.OVERDUE),
            ),
        )

    def leading(self) -> Bools:
        """(n,) services that are this controller's to act on."""
        return self._heartbeat.leading() & self.brought_back

    def orders(self) -> Floats:
        """(n,) stamp of the last order for each service."""
        return np.asarray(self._heartbeat.pulse.ordered_s, np.float64)

    def holds(self, permission: Permission | None = None) -> list[Hold | None]:
        """(n,) what forbids each service to be written, now or at the moment of `permission`; None where nothing."""
        permission = permission or self.ask(self._clock.now_s)
        return [
            self._hold(row, permission.first(row)) if stopped else None
            for row, stopped in enumerate(permission.stopped.tolist())
        ]

    def _hold(self, row: int, reason: Reason) -> Hold:
        service, state = self._heartbeat.services[row], self._world.last
        detail, until_s = DETAILS.get(reason, "").format(service=service), None
        match reason:
            case Reason.NOT_LEADER:
                detail = self._heartbeat.pulse.unread.get(service, detail)
            case Reason.KILL_SWITCH:
                detail = self._heartbeat.killed()[row]
            case Reason.OTHER_AUTOSCALER:
                detail = state.owners[row] or (
                    f"{state.author(row) or 'somebody'} has put replicas back to {self.edits.value(row)} each time "
                    f"they were set here; let only one of the two scale, then `jevons resume {service}`"
                )
            case Reason.FOREIGN_EDIT:
                by = f" by {state.author(row)}" if state.author(row) else ""
                detail = f"replicas were set to {self.edits.value(row)}{by}"
                until_s = self.edits.until_s(row)
        return Hold(reason, detail, until_s)


DETAILS = {
    Reason.NOT_LEADER: "another controller holds the lease, or this one could not renew it",
    Reason.PAUSED: "paused by an order; `jevons resume {service}` ends it",
    Reason.OWNER_UNKNOWN: "it could not be read whether somebody else scales it; the problems say why",
    Reason.OVERDUE: "the decision was too old when its turn came",
}
