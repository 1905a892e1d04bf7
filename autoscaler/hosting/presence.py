"""A controller's own row in the database: where it runs, and what it last said of itself.

This module must not know what a status holds.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from autoscaler.records.database import CONTROLLERS, Database


class Presence:
    """Says that a controller lives.

    Args:
        database: where.
        name: of the controller; the process is told apart by its identifier.
    """

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._key = f"{name} {os.getpid()}"

    def tell(self, status: Mapping[str, Any]) -> None:
        """Replace what was said before.

        Raises:
            RecordsUnavailable: when it cannot be written.
        """
        values = {"host": socket.gethostname(), "pid": os.getpid(), "beat_s": time.time(), "status": dict(status)}
        with self._database.begin() as connection:
            mine = CONTROLLERS.c.name == self._key
            if connection.execute(CONTROLLERS.update().where(mine).values(**values)).rowcount == 0:
                connection.execute(CONTROLLERS.insert().values(name=self._key, **values))
