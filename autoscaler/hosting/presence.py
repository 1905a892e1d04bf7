"""A controller's own row in the database: where it runs, and what it last said of itself.

This module must not know what a status holds.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from autoscaler.authority.leases import holder_name
from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import CONTROLLERS, Database, put
from policies.redaction import scrubbed

OWN_PAGE, PROCESS = "/status", "process"
"""Where a controller also says it beside its metrics, and the word that tells which process does."""
KEEP_S = 7 * 86400.0
"""Processes that have said nothing for longer are dropped when another one starts, seconds."""


class Doing(StrEnum):
    """What a shard says that it does."""

    STARTS = "starts"
    WAITS = "waits"
    """For something that can pass: a database, a port, a Ray cluster."""
    ACTS = "acts"
    STANDS_BY = "stands by"
    FAILS = "fails"
    """At its last tick; it goes on."""
    ENDED = "ended"
    FAILED = "failed"
    """For good."""


RUNNING = frozenset({Doing.ACTS, Doing.STANDS_BY, Doing.FAILS})
"""It ticks."""
ALIVE = RUNNING | {Doing.STARTS, Doing.WAITS}
"""The same with those that cannot run yet."""


class Presence:
    """Says that a controller lives; nothing depends on it.

    Args:
        database: where.
        name: of the controller; the process is told apart by its identifier.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._key = f"{name} {os.getpid()}@{socket.gethostname()}"
        self._process = holder_name(name)
        self._swept = False
        self.problem = ""
        """Why the last word was not heard, empty when it was."""

    def tell(self, status: Mapping[str, Any]) -> None:
        """Replace what was said before."""
        try:
            self._put(status)
            self.problem = ""
        except RecordsUnavailable as error:
            self.problem = str(error)

    def signed(self, status: Mapping[str, Any]) -> dict[str, Any]:
        """What is said, and by which process."""
        return {**scrubbed(status), PROCESS: self._process}

    def leave(self) -> None:
        """Take back all that was said: others speak for the shard from now on.

        Raises:
            RecordsUnavailable: when it cannot be written.
        """
        with self._database.begin() as connection:
            connection.execute(CONTROLLERS.delete().where(CONTROLLERS.c.name == self._key))

    def _put(self, status: Mapping[str, Any]) -> None:
        values: dict[str, Any] = {
            "name": self._key,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "beat_s": time.time(),
            "status": self.signed(status),
        }
        with self._database.begin() as connection:
            if not self._swept:
                connection.execute(CONTROLLERS.delete().where(CONTROLLERS.c.beat_s < values["beat_s"] - KEEP_S))
                self._swept = True
            put(connection, CONTROLLERS, values)
