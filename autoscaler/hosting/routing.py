"""Routing follows the replicas at every tick, in every mode: it scales nothing.

This module must not know who routes, nor to what.
"""

from __future__ import annotations

from contextlib import suppress

from autoscaler.actuators.base import LiveActuator, Router
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.stages import Stages
from policies.contract import ActuationFailed


class Routing:
    """Routes the requests of the services that are this controller's, where its actuator does that.

    Args:
        actuator: what may route.
        heartbeat: whose the services are.
        stages: bounds the time that it may take.
    """

    def __init__(self, actuator: LiveActuator, heartbeat: Heartbeat, stages: Stages) -> None:
        self._actuator = actuator
        self._heartbeat = heartbeat
        self._stages = stages

    def follow(self) -> None:
        """What fails is named among the problems, and tried again at the next tick."""
        actuator, leading, adrift = self._actuator, self._heartbeat.leading(), self._heartbeat.adrift()
        if not isinstance(actuator, Router) or not (leading | adrift).any():
            return
        with suppress(ActuationFailed):
            self._stages.run("route", lambda: actuator.route(leading, adrift), ActuationFailed)
