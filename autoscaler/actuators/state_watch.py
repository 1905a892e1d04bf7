"""What an actuator last said is in force."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from autoscaler.actuators.base import FleetState, LiveActuator, TellsWrites, pools_of
from policies.contract import Floats
from policies.spec import ScalingSpec

LOG = logging.getLogger("jevons")


class StateWatch:
    """Remembers what the actuator last said is in force, for those who must not ask again.

    Args:
        actuator: what is asked.
        specs: the services.
        now: a clock that never jumps, seconds.
    """

    def __init__(
        self, actuator: LiveActuator, specs: Sequence[ScalingSpec], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._actuator = actuator
        self._specs = tuple(specs)
        self._now = now
        self._read_s = -np.inf
        self.readings = 0
        """How often it has been asked."""
        self.last = FleetState.unknown(pools_of(specs))

    def __call__(self) -> FleetState:
        """Ask the actuator. Where it fails altogether nothing is known, and whoever may act neither."""
        began_s = self._now()
        self.readings += 1
        try:
            state = self._actuator.state()
        except Exception as error:  # an answer that nobody foresaw must not blind what does not depend on it
            problems = (f"actuator: {type(error).__name__}: {error}",)
            if problems != self.last.problems:
                LOG.error("the actuator cannot say what is in force", exc_info=error)
            unknown = FleetState.unknown(pools_of(self._specs), problems)
            state = replace(unknown, owners_unread=tuple(range(len(self._specs))))
        if began_s >= self._read_s:  # a call that a tick has left behind must not undo a newer one
            self.last, self._read_s = state, began_s
        return self.last

    def recent(self, age_s: float) -> FleetState:
        """What it last said, or says now where that is older than `age_s` seconds."""
        return self.last if self._now() - self._read_s <= age_s else self()

    def wrote(self) -> Floats:
        """(n, P) counts that the last `apply` wrote; NaN where it wrote none or does not tell."""
        if isinstance(self._actuator, TellsWrites):
            return self._actuator.wrote()
        return np.full(self.last.replicas_target.shape, np.nan)
