"""Taking services over: with a lease comes what its last holder remembered.

This module must not know how leases are held, nor what is remembered.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.supervision import LiveSupervisor
from autoscaler.controller import RecordsUnavailable
from autoscaler.problem_texts import some_of
from autoscaler.records.database import Database
from autoscaler.records.memory import Memory, bring_back
from autoscaler.records.ticks import unconcluded
from policies.contract import Bools
from policies.decider import Decider


class Succession:
    """Brings back the memory of every service that becomes this controller's.

    Args:
        heartbeat: who holds the leases.
        supervisor: is told for which services the memory is here.
        decider: starts afresh where nothing was remembered.
        memory: what is remembered.
        database: where.
    """

    def __init__(
        self, heartbeat: Heartbeat, supervisor: LiveSupervisor, decider: Decider, memory: Memory, database: Database
    ) -> None:
        self.problem = ""
        """What went wrong at the last tick, in words: a memory that could not be read, or that was set aside."""
        self._heartbeat = heartbeat
        self._supervisor = supervisor
        self._decider = decider
        self._memory = memory
        self._database = database

    def take_over(self) -> Bools:
        """(n,) the services to act on: a lease is held, and what its last holder remembered is here."""
        services, authority, leading = self._heartbeat.services, self._supervisor.authority, self._heartbeat.leading()
        authority.brought_back = authority.brought_back & leading
        new = leading & ~authority.brought_back
        self.problem = ""
        if new.any():
            try:
                found = bring_back(self._database, self._memory, services, new)
                pending = unconcluded(self._database, [services[row] for row in np.flatnonzero(new)])
            except RecordsUnavailable as error:  # tried again at the next tick
                self.problem = str(error)
                return self._supervisor.leading()
            self._decider.reset(new & ~found.restored)
            unknown = np.array([name in pending or name in found.damaged for name in services], bool)
            self._supervisor.forget_applied(unknown & new)
            self.problem = _set_aside(found.damaged)
            authority.brought_back = leading
        return self._supervisor.leading()


def _set_aside(damaged: Mapping[str, str]) -> str:
    """What became of memories that cannot be read, in words; empty where there is none."""
    if not damaged:
        return ""
    names = list(damaged)
    return f"the memory of {some_of(names)} is set aside, and the fleet taken as it is: {damaged[names[0]]}"
