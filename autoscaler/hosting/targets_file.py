"""Which targets the file for Ray Serve's policies holds: those in force, service by service.

This module must not know how the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from autoscaler.controller import not_acted
from policies.atomic_files import write_text
from policies.contract import Decision


class TargetsFile:
    """Writes the file.

    Args:
        path: of the file.
        services: names.
        pools: names of each service's pools.
    """

    def __init__(self, path: Path, services: Sequence[str], pools: Sequence[Sequence[str]]) -> None:
        self.path = path
        self.problem = ""
        """Why the file could not be written, empty when it could."""
        self._services = tuple(services)
        self._pools = tuple(tuple(names) for names in pools)
        self._targets: dict[str, dict[str, dict[str, float]]] = {}

    def publish(self, decision: Decision, now_s: float) -> None:
        """Write the targets in force. A service whose decision is not carried out keeps its last entry."""
        stopped = not_acted(decision)
        for row, service in enumerate(self._services):
            if not stopped[row]:
                self._targets[service] = {
                    pool: {
                        "replicas": int(decision.settled.replicas[row, column]),
                        "batch_cap": int(decision.settled.batch_cap[row, column]),
                        "time_s": now_s,
                    }
                    for column, pool in enumerate(self._pools[row])
                }
        try:
            with suppress(FileExistsError):  # a file, which the next line names
                self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(self._targets))
            self.problem = ""
        except OSError as error:
            self.problem = str(error)
