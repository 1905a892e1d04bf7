"""Metrics of the controller itself: who leads, what is ordered, what holds each service, whether its loop goes on.

Values are those of the moment at which Prometheus asks, so that a loop that stands still is seen. What is not known is
left out, never 0.
This module must not know how decisions are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from prometheus_client.core import CollectorRegistry, CounterMetricFamily, GaugeMetricFamily, Metric

from autoscaler.actuators.base import FleetState
from autoscaler.authority.controls import Mode
from autoscaler.background import Background
from autoscaler.hosting.progress import Progress
from autoscaler.hosting.states import ServiceState, State
from policies.contract import Bools, Decision, Floats, Reason


class Vitals:
    """A prometheus_client collector.

    Args:
        services: names.
        progress: of the loop.
        leading: (n,) services that are this controller's to act on.
        modes: (n,) in force.
        killed: (n,) why the kill switch is engaged, empty where it is not.
        world: what is in force, and who else acts on it.
        stuck: (n, P) or one for all: replicas that never come, of those that `world` does not count.
        last: the last decision, None where nothing is decided.
        states: of the services that this controller decides on, by name.
        problems: what is wrong now, in words.
        threads: what works in the background.
        registry: where to register.
    """

    def __init__(
        self,
        services: Sequence[str],
        progress: Progress,
        leading: Callable[[], Bools],
        modes: Callable[[], Sequence[Mode]],
        killed: Callable[[], Sequence[str]],
        world: Callable[[], FleetState],
        stuck: Callable[[], Floats | float],
        last: Callable[[], Decision | None],
        states: Callable[[], Mapping[str, ServiceState]],
        problems: Callable[[], Sequence[str]],
        threads: Callable[[], Sequence[Background]],
        registry: CollectorRegistry,
    ) -> None:
        self._services = tuple(services)
        self._progress = progress
        self._leading = leading
        self._modes = modes
        self._killed = killed
        self._world = world
        self._stuck = stuck
        self._last = last
        self._states = states
        self._problems = problems
        self._threads = threads
        registry.register(self)

    def collect(self) -> Iterable[Metric]:
        """The families, as of now."""
        yield _one("jevons_tick_age_seconds", "Time since a tick came to its end.", self._progress.age_s)
        yield _one("jevons_tick_stall_seconds", "Age from which on the loop stands still.", self._progress.stall_s)
        yield _one("jevons_problems", "Problems that status names.", float(len(self._problems())))
        yield self._flags("jevons_leader", "1 where this controller acts.", self._leading().tolist())
        yield self._flags("jevons_kill_switch", "1 where the kill switch is engaged.", self._killed())
        yield self._flags(
            "jevons_owner_conflict", "1 where somebody else acts on the same target, or may.", self._conflicts()
        )
        modes = GaugeMetricFamily("jevons_mode", "1 for the mode in force.", labels=["service", "mode"])
        for service, mode in zip(self._services, self._modes(), strict=True):
            for one in Mode:
                modes.add_metric([service, one.value], float(one == mode))
        yield modes
        states = GaugeMetricFamily("jevons_service_state", "1 for the state in force.", labels=["service", "state"])
        until = GaugeMetricFamily(
            "jevons_hold_until_timestamp_seconds", "Unix time at which a hold ends by itself.", labels=["service"]
        )
        stuck = GaugeMetricFamily(
            "jevons_stuck_replicas",
            "Replicas that have been starting for too long to be on their way.",
            labels=["service"],
        )
        world = self._world()
        late = np.broadcast_to(world.replicas_stuck + self._stuck(), world.replicas_ready.shape).sum(axis=1)
        for service, found in self._states().items():
            stuck.add_metric([service], float(late[self._services.index(service)]))
            for state in State:
                states.add_metric([service, state.value], float(state == found.state))
            if found.state is not State.READY and found.until_s is not None:
                until.add_metric([service], found.until_s)
        yield states
        yield until
        yield stuck
        restarts = CounterMetricFamily(
            "jevons_thread_restarts", "Failures of background threads, which were begun again.", labels=["thread"]
        )
        for thread in self._threads():
            restarts.add_metric([thread.name], float(thread.restarts))
        yield restarts

    def _conflicts(self) -> list[bool]:
        """(n,) where somebody else acts on the same target, or nobody knows."""
        world, decision = self._world(), self._last()
        flags = [0] * len(self._services) if decision is None else decision.reasons.tolist()
        # An API server that is away is no conflict: there not even the counts are read.
        counted = [bool((~np.isnan(counts)).any()) for counts in world.replicas_target]
        return [
            bool(owner)
            or bool(flags[row] & Reason.OTHER_AUTOSCALER)
            or bool(counted[row] and (row in world.owners_unread or flags[row] & Reason.OWNER_UNKNOWN))
            for row, owner in enumerate(world.owners)
        ]

    def _flags(self, name: str, text: str, values: Sequence[object]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["service"])
        for service, value in zip(self._services, values, strict=True):
            family.add_metric([service], float(bool(value)))
        return family


def _one(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
