"""What people order while the controller runs: modes, the end of a hold, and the kill switch.

Orders are rows of the records database, so that they reach a controller wherever it runs, outlive it, and can be given
while it is stuck. The kill switch also is a file and a Kubernetes annotation; any of the three engages it.
This module must not know what modes do.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import sqlalchemy as sa

from autoscaler.records.database import CONTROLS, Database

EVERY_SERVICE = "*"
CONTROLLER = "@"
"""In front of a controller's name, where the order is for it and not for a service."""
PAUSED_FROM = "<"
"""In front of a service's name, where the row holds the mode that it was paused from."""
KILLED, RELEASED = "killed", "released"
ANNOTATION = "jevons.dev/kill-switch"
"""Annotation of a Lease object; the value `true` engages the kill switch for its service."""


class Mode(StrEnum):
    """What a controller may do for a service."""

    ADVISE = "advise"
    ACT = "act"
    PAUSED = "paused"


@dataclass(frozen=True)
class Orders:
    """What has been ordered.

    Attributes:
        modes: by service, as far as one was ordered.
        ordered_s: Unix time of each order by service, on the clock of whoever gave it: it tells one order from another,
            and is compared with no other clock.
        killed: why the kill switch is engaged in the database, empty when it is not.
        down_s: Unix time at which each controller was told to end, by its name; the same holds.
        paused_from: mode before the pause by service, where one was ordered.
    """

    modes: dict[str, Mode]
    ordered_s: dict[str, float]
    killed: str
    down_s: dict[str, float]
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
        down = {row.service[1:]: float(row.changed_s) for row in rows if row.service.startswith(CONTROLLER)}
        before = {row.service[1:]: Mode(row.mode) for row in rows if row.service.startswith(PAUSED_FROM)}
        rows = [row for row in rows if not row.service.startswith((CONTROLLER, PAUSED_FROM))]
        modes = {row.service: Mode(row.mode) for row in rows if row.service != EVERY_SERVICE}
        ordered = {row.service: float(row.changed_s) for row in rows}
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

    def end(self, controller: str) -> None:
        """Tell every shard of a controller that runs now to end."""
        self._write({f"{CONTROLLER}{controller}": "down"})

    def revive(self) -> None:
        """Release the kill switch."""
        self._write({EVERY_SERVICE: RELEASED})

    def _write(self, values: dict[str, str]) -> None:
        now_s, who = time.time(), _user()
        with self._database.begin() as connection:
            connection.execute(sa.delete(CONTROLS).where(CONTROLS.c.service.in_(list(values))))
            rows = [
                {"service": service, "mode": value, "changed_s": now_s, "changed_by": who}
                for service, value in values.items()
            ]
            if rows:
                connection.execute(CONTROLS.insert(), rows)


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
