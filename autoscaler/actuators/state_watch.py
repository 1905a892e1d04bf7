"""What an actuator last said is in force."""

from __future__ import annotations

from collections.abc import Sequence

from autoscaler.actuators.base import FleetState, LiveActuator, pools_of
from policies.spec import ScalingSpec


class StateWatch:
    """Remembers what the actuator last said is in force, for those who must not ask again."""

    def __init__(self, actuator: LiveActuator, specs: Sequence[ScalingSpec]) -> None:
        self._actuator = actuator
        self.last = FleetState.unknown(pools_of(specs))

    def __call__(self) -> FleetState:
        """Ask the actuator."""
        self.last = self._actuator.state()
        return self.last
