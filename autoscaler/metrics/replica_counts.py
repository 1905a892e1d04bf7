"""How many replicas there are: as the actuator says, else as Prometheus does, else as many as are scraped.

Where the actuator does not count those that start, it is told here which of them never come.
This module must not know how anything is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.actuators.starts import StartLedger, StartSpec
from policies.contract import Bools, Floats
from policies.spec import ScalingSpec


class ReplicaCounts:
    """Completes what an actuator says is in force, reading after reading.

    Args:
        specs: the services.
        spec: how long a start may take.
        clock: seconds that only go forward.
    """

    def __init__(
        self, specs: Sequence[ScalingSpec], spec: StartSpec, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pools = pools_of(specs)
        self._unknown = FleetState.unknown(self._pools)
        self._ledger = StartLedger(specs, spec, clock)
        self._came = np.zeros_like(self._unknown.replicas_target)  # of those asked for, how many there have been
        self.stuck = np.zeros_like(self._came)
        """(n, P) replicas that never come, of those that the actuator does not count."""

    def complete(
        self, state: FleetState | None, values: Mapping[str, Floats], scraped: Floats, problems: list[str]
    ) -> FleetState:
        """What is in force, with the counts that the actuator left open; NaN where nobody knows.

        Args:
            state: what the actuator says; None where there is none.
            values: signals by name, `replicas_target` and `replicas_ready` (n, P) among them where they are asked for.
            scraped: (n, P) targets that are scraped; NaN where none is.
            problems: told of replicas that never come, or do no longer answer, in words.
        """
        told, exists = state or self._unknown, np.isnan(self._unknown.replicas_target)

        def or_measured(count: Floats, name: str) -> Floats:
            return np.where(exists & np.isnan(count), values.get(name, np.nan), count)

        ready = or_measured(told.replicas_ready, "replicas_ready")
        target = or_measured(told.replicas_target, "replicas_target")
        # An actuator that failed leaves counts unknown; one that does not count replicas leaves it to the metrics:
        # what is scraped is ready, and what there is was asked for.
        by_scrapes = np.isnan(ready) & (not told.problems)
        ready = np.where(by_scrapes, scraped, ready)
        target = np.where(np.isnan(target) & (not told.problems), ready, target)
        missing, untold = np.maximum(target - ready, 0.0), np.isnan(told.replicas_starting)
        gone = self._gone(ready, target, by_scrapes & untold)
        settled = self._ledger.settle(
            replace(told, replicas_starting=np.where(untold, missing - gone, 0.0), problems=())
        )
        self.stuck = settled.replicas_stuck
        problems += settled.problems
        for pool in self._pools:
            at = (pool.row, pool.column)
            if gone[at] > 0:
                problems.append(
                    f"{pool.label}: {gone[at]:.0f} of {self._came[at]:.0f} replicas are not scraped any more; nobody"
                    " says whether they are gone, so they count as starting and none is given back (`metrics.replicas`"
                    " can say)"
                )
        return replace(
            told,
            replicas_target=target,
            replicas_ready=ready,
            replicas_starting=np.where(untold, missing - self.stuck, told.replicas_starting),
            replicas_draining=np.nan_to_num(told.replicas_draining),
            replicas_stuck=told.replicas_stuck + self.stuck,
        )

    def _gone(self, ready: Floats, target: Floats, by_scrapes: Bools) -> Floats:
        """(n, P) replicas that were scraped and are not any more, where nobody else counts them; NaN where unknown.

        Their scrapes may fail: what they serve would be unknown then, and to give them back would be blind.
        """
        came = np.minimum(np.where(by_scrapes, np.fmax(self._came, ready), ready), target)
        self._came = np.where(np.isnan(came), self._came, came)
        return np.where(by_scrapes, np.maximum(self._came - ready, 0.0), 0.0)
