"""What carries targets out: one module per place where replicas or batch caps are set.

`build_actuator` makes the one that a live configuration names. All of them obey one contract, written down in
`autoscaler.actuators.base` and tested by one suite.
"""

from autoscaler.actuators.base import (
    Access,
    FleetState,
    LiveActuator,
    PartlyFailed,
    PoolName,
)
from autoscaler.actuators.build import ActuatorConfig, build_actuator

__all__ = [
    "Access",
    "ActuatorConfig",
    "FleetState",
    "LiveActuator",
    "PartlyFailed",
    "PoolName",
    "build_actuator",
]
