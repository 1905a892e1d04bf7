"""What people order: modes, the end of a hold, the kill switch, and the end of a controller.

Orders are rows of the records database, so that they reach a controller wherever it runs, outlive it, and can be given
while it is stuck, restarts or waits. The kill switch also is a file and a Kubernetes annotation; any of the three
engages it.
This module must not know what modes do.
"""

from __future__ import annotations

import getpass
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from autoscaler.records.database import CONTROLS, Database, put

EVERY_SERVICE = "*"
CONTROLLER = "@"
"""In front of a controller's name, where the order is for it and not for a service."""
PAUSED_FROM = "<"
"""In front of a service's name, where the row holds the mode that it was paused from."""
KILLED, RELEASED = "killed", "released"
DOWN, DONE = "down", "done"
OPEN_S = 600.0
"""How long `jevons down` that has not seen the last one end counts for whoever starts, seconds."""
ANNOTATION = "jevons.dev/kill-switch"
"""Annotation of a Lease object; the value `true` engages the kill switch for its service."""


class Mode(StrEnum):
    """What a controller may do for a service."""

    ADVISE = "advise"
    ACT = "act"
    PAUSED = "paused"


@dataclass(frozen=True)
class DownOrder:
    """An order to a controller to end.

    Attributes:
        ordered_s: Unix time on the clock of whoever gave it: it tells one order from another.
        by: who gave it.
        done: whether everybody has been seen to end.
    """

    ordered_s: float
    by: str
    done: bool

    @property
    def open(self) -> bool:
        """Whether it also is for whoever starts now: `jevons down` waits, or has given up waiting not long ago."""
        return not self.done and abs(time.time() - self.ordered_s) < OPEN_S


@dataclass(frozen=True)
class Orders:
    """What has been ordered.

    Attributes:
        modes: by service, as far as one was ordered.
        ordered_s: Unix time of each order by service, on the clock of whoever gave it: it tells one order from another,
            and is compared with no other clock.
        killed: why the kill switch is engaged in the database, empty when it is not.
        down: the last order to each controller to end, by its name.
        paused_from: mode before the pause by service, where one was ordered.
    """

    modes: dict[str, Mode]
    ordered_s: dict[str, float]
    killed: str
    down: dict[str, DownOrder]
    paused_from: dict[str, Mode] = field(default_factory=dict)


class Controls:
    """Reads and writes orders.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def read(self) -> Orders:
        """All orders.

        Raises:
            RecordsUnavailable: when they cannot be read.
        """
        with self._database.begin() as connection:
            rows = connection.execute(CONTROLS.select()).all()
        down = {
            row.service[1:]: DownOrder(_stamp(row.changed_s), row.changed_by, row.mode == DONE)
            for row in rows
            if row.service.startswith(CONTROLLER)
        }
        before = {row.service[1:]: _mode(row.mode) for row in rows if row.service.startswith(PAUSED_FROM)}
        rows = [row for row in rows if not row.service.startswith((CONTROLLER, PAUSED_FROM))]
        modes = {row.service: _mode(row.mode) for row in rows if row.service != EVERY_SERVICE}
        ordered = {row.service: _stamp(row.changed_s) for row in rows}
        killed = [row.changed_by for row in rows if row.service == EVERY_SERVICE and row.mode == KILLED]
        return Orders(modes, ordered, f"ordered by {killed[0]}" if killed else "", down, before)

    def set_mode(self, services: Sequence[str], mode: Mode) -> None:
        """Order a mode for the named services."""
        values = dict.fromkeys(services, mode.value)
        if mode == Mode.PAUSED:
            before = self.read().modes
            values |= {f"{PAUSED_FROM}{name}": before[name] for name in services if before.get(name, mode) != mode}
        self._write(values)

    def resume(self, services: Sequence[str], otherwise: Mode) -> dict[str, Mode]:
        """End holds and pauses of the named services; the modes that are in force then.

        A service keeps its mode; one that is paused goes back to the mode that it was paused from.

        Args:
            services: names.
            otherwise: mode of a service for which none was ordered.
        """
        orders = self.read()
        modes = {name: orders.modes.get(name, otherwise) for name in services}
        for name, mode in modes.items():
            if mode == Mode.PAUSED:
                modes[name] = orders.paused_from.get(name, otherwise)
        self._write({name: mode.value for name, mode in modes.items()})
        return modes

    def kill(self) -> None:
        """Engage the kill switch for every service of this database."""
        self._write({EVERY_SERVICE: KILLED})

    def end(self, controller: str) -> float:
        """Tell every shard of a controller to end, and whoever starts until `ended`; the order's stamp."""
        return self._write({f"{CONTROLLER}{controller}": DOWN})

    def ended(self, controller: str, ordered_s: float) -> None:
        """The order with this stamp has been carried out: who starts from now on is not meant."""
        order = CONTROLS.update().where(
            CONTROLS.c.service == f"{CONTROLLER}{controller}", CONTROLS.c.changed_s == ordered_s
        )
        with self._database.begin() as connection:
            connection.execute(order.values(mode=DONE))

    def revive(self) -> None:
        """Release the kill switch."""
        self._write({EVERY_SERVICE: RELEASED})

    def _write(self, values: dict[str, str]) -> float:
        now_s, who = time.time(), _user()
        with self._database.begin() as connection:
            for service, value in sorted(values.items()):  # in one order, so that two people do not lock each other out
                row = {"service": service, "mode": value, "changed_s": now_s, "changed_by": who}
                put(connection, CONTROLS, row)
        return now_s


class DownWatch:
    """Whether a run has been told to end, over all of its restarts.

    Every order is for it but the one that had been carried out when it began.

    Args:
        controller: its name.
        before_s: stamp of that order, -inf without one; None where the run begins with its first look.
    """

    def __init__(self, controller: str, before_s: float | None = None) -> None:
        self.controller = controller
        self.before_s = before_s
        """As given; as of the first look where none was."""

    def told(self, orders: Orders) -> str:
        """Who has told it to end, in words; empty when nobody has."""
        order = orders.down.get(self.controller)
        ordered_s = -math.inf if order is None else order.ordered_s
        if self.before_s is None:
            self.before_s = -math.inf if order is not None and order.open else ordered_s
        return "" if order is None or ordered_s == self.before_s else f"`jevons down` by {order.by}"


def _mode(word: str) -> Mode:
    """A mode as it is stored; one that nobody here knows forbids."""
    return Mode(word) if word in set(Mode) else Mode.PAUSED


def _stamp(value: object) -> float:
    """When an order was given; 0 where the row says no time."""
    try:
        return float(str(value))
    except ValueError:
        return 0.0


def kill_file_engaged(path: Path | None) -> str:
    """Why the kill-switch file engages it, empty when it does not; a path that cannot be looked at engages it."""
    if path is None:
        return ""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"the kill-switch file {path} cannot be looked at: {error.strerror}"
    return f"the file {path} exists"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "somebody"
