"""A live controller, or one shard of it: all parts put together, and its loop.

`run` ticks until it is told to stop. Whoever hosts it (a Ray actor, a plain process) only calls `run` and `stop`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server

from autoscaler.actuators.base import LiveActuator, Router
from autoscaler.actuators.build import build_actuator
from autoscaler.actuators.state_watch import StateWatch
from autoscaler.authority.controls import Controls
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.kubernetes_leases import KubernetesLeases
from autoscaler.authority.leases import DatabaseLeases, Leases, holder_name
from autoscaler.authority.supervision import LiveSupervisor
from autoscaler.clocks import SteadyWallClock
from autoscaler.controller import Clock, Controller, MetricsSource, RecordsUnavailable, following_tick_s
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.decision_log import DecisionLog
from autoscaler.hosting.exposition import Exposition
from autoscaler.hosting.presence import Presence
from autoscaler.hosting.targets_file import TargetsFile
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.records.database import Database
from autoscaler.records.decisions import Records
from autoscaler.records.memory import Memory, bring_back
from autoscaler.records.ticks import unconcluded
from autoscaler.stages import Stages
from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.follower import is_learned
from autoscaler.versions.ladder import FallbackLadder
from autoscaler.versions.lifecycle import Lifecycle
from policies.contract import ActuationFailed, Bools, Decision, Outcome, Reason
from policies.cost_meter import CostMeter
from policies.decider import Decider
from policies.fleet import Fleet
from policies.lineup import make_policy
from policies.objective import Objective

LOG = logging.getLogger("jevons")
MAX_FAULTS = 10
"""Ticks in a row that may end in an error of the program before the loop gives up."""
MAX_PROBLEMS = 5
"""Of the metrics, in `status` and in the log."""


class ServiceClock(Clock, Protocol):
    """A clock whose waits can be ended."""

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        ...

    def stop(self) -> None:
        """End the present wait and every later one."""
        ...


class LiveService:
    """One shard of a live controller.

    Args:
        config: the whole controller's configuration.
        shard: which of its shards.
        source: where snapshots come from; Prometheus when left out. It must ask `state` as Prometheus does.
        actuator: what carries targets out; as configured when left out.
        clock: time; the wall's when left out.

    Raises:
        ConfigError: when the configuration names what is not there.
        RecordsUnavailable: when the database cannot be used.
    """

    def __init__(
        self,
        config: LiveConfig,
        shard: int = 0,
        source: MetricsSource | None = None,
        actuator: LiveActuator | None = None,
        clock: ServiceClock | None = None,
    ) -> None:
        specs = config.shard(shard)
        self.config = config
        self.shard = shard
        self.name = config.name if config.shards == 1 else f"{config.name}-{shard}"
        self.services = tuple(spec.service for spec in specs)
        self.clock = clock or SteadyWallClock()
        self.database = Database(config.database_url)
        self.database.create()
        self._presence = Presence(self.database, self.name)
        fleet = Fleet.from_specs(specs)
        interface, guardrails = specs[0].interface, specs[0].guardrails
        overhead_rate = np.array([spec.objective.overhead_rate for spec in specs])
        pools = tuple(tuple(pool.label for pool in spec.pools) for spec in specs)

        self.decider = Decider(fleet, interface.window, guardrails)
        self.ladder = FallbackLadder(fleet, make_policy(config.fallback, fleet, specs), config.ladder)
        peers = {reference: make_policy(reference, fleet, specs) for reference in config.counterfactuals}
        self.counterfactuals = Counterfactuals(peers, fleet, overhead_rate)
        if not is_learned(config.policy):
            self.ladder.baseline = make_policy(config.policy.reference, fleet, specs)
        self.lifecycle = Lifecycle.of(
            config.policy, self.services, fleet, interface, self.ladder, self.counterfactuals, overhead_rate
        )

        self.leases = self._leases()
        self.heartbeat = Heartbeat(
            self.services, self.leases, Controls(self.database), config.mode, config.kill_file, config.lease.duration_s
        )
        self.stages = Stages(config.limits.by_stage())
        self.log = DecisionLog(self.services, pools)
        self.registry = CollectorRegistry()
        self.actuator = actuator or build_actuator(config.actuator, specs, self._loads, self.registry)
        self._state = StateWatch(self.actuator, specs)
        self.source = source or PrometheusSource(config.metrics, specs, self._state)
        self.supervisor = LiveSupervisor(
            self.services,
            self.decider,
            self.heartbeat,
            self.ladder,
            self.counterfactuals,
            lambda: self._state.last,
            self.clock,
            config.supervision,
            self._finish,
        )
        self.exposition = Exposition(
            self.services,
            pools,
            fleet,
            overhead_rate,
            CostMeter(Objective.of(specs, fleet), overhead_rate),
            lambda: self.lifecycle.version,
            lambda: self.stages.failures,
            self.registry,
        )
        self.memory = Memory(
            {
                "decider": self.decider,
                "ladder": self.ladder,
                "supervisor": self.supervisor,
                "counterfactuals": self.counterfactuals,
                "bill": self.exposition.meter,
            },
            [",".join(names) for names in pools],
        )
        self.records = Records(
            self.database,
            self.name,
            self.services,
            self.memory.state,
            lambda: self.lifecycle.version,
            config.records.keep_days,
            fenced=config.lease.kind == "database",
            seconds=self.stages.spent,
            now=lambda: self.clock.now_s,
        )
        self.controller = Controller(
            self.decider,
            self.ladder,
            self.source,
            self.actuator,
            self.clock,
            self.records,
            config.interval_s,
            self.supervisor,
            self.stages,
            self.services,
        )
        self.targets = TargetsFile(config.targets_file, self.services, pools) if config.targets_file else None
        self.last: Decision | None = None
        self._ended_s: float | None = None  # stamp of the order to end that was there before this controller
        self.problem = ""
        self._server: Any = None
        self._stopped = threading.Event()

    @property
    def state(self) -> StateWatch:
        """Asks the actuator what is in force; a source of one's own must call it once per read."""
        return self._state

    def start(self) -> None:
        """Serve /metrics, load the policy, beat once, and keep beating."""
        exposition = self.config.exposition
        if exposition.port is not None:
            port = exposition.port + self.shard if exposition.port else 0
            self._server, _ = start_http_server(port, exposition.host, self.registry)
        for follower in self.lifecycle.followers:
            follower.look()
            follower.start()
        self.lifecycle.before_tick()
        self.heartbeat.beat()
        self._ended_s = self.heartbeat.ended_s(self.config.name)
        self.heartbeat.start(min(self.config.lease.duration_s / 6.0, 5.0))

    @property
    def metrics_port(self) -> int | None:
        """Port of /metrics while it is served."""
        return None if self._server is None else int(self._server.server_port)

    def run(self) -> None:
        """Tick once per interval until `stop`, at once at first.

        Raises:
            Exception: the error of the program that has ended too many ticks in a row.
        """
        self.start()
        faults, next_s = 0, self.clock.now_s
        while not self.clock.stopped:
            try:
                self.step()
                faults = 0
            except Exception as error:
                faults += 1
                self.problem = f"{type(error).__name__}: {error}"
                LOG.exception("tick failed; nothing was carried out")
                if faults >= MAX_FAULTS:
                    raise
            next_s = following_tick_s(next_s, self.clock.now_s, self.config.interval_s)
            self.clock.wait_until(next_s)
        self.close()

    def step(self) -> Decision | None:
        """One tick; None while no service is this controller's, or it was told to end."""
        ended_s = self.heartbeat.ended_s(self.config.name)
        if self._ended_s is None:
            self._ended_s = ended_s
        elif ended_s != self._ended_s:
            self.stop()
            return None
        decision = None
        try:
            if self._bring_back().any():
                self.lifecycle.before_tick()
                decision = self.controller.tick()
        finally:
            self._route()
        self.log.troubled(self.problems())
        self._tell("stands by" if decision is None else "acts")
        return decision

    def stop(self) -> None:
        """End the loop after the present tick."""
        self.clock.stop()

    def close(self) -> None:
        """Hand the leases back and let go of everything."""
        for follower in self.lifecycle.followers:
            follower.stop()
        self.heartbeat.stop(release=True)
        self._tell("stopped")
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self.actuator.close()
        if isinstance(self.source, PrometheusSource):
            self.source.close()
        self.database.close()
        self._stopped.set()

    def status(self) -> dict[str, Any]:
        """What `jevons status` shows of this controller."""
        decision = self.last
        held: dict[str, int] = {}
        if decision is not None:
            for reasons in decision.reasons[decision.outcome == Outcome.HELD].tolist():
                for word in Reason(reasons).words():
                    held[word] = held.get(word, 0) + 1
        return {
            "services": len(self.services),
            "leads": int(self.supervisor.leading().sum()),
            "policy": self.lifecycle.version,
            "held": held,
            "killed": next((reason for reason in self.heartbeat.killed() if reason), ""),
            "events": self.lifecycle.events[-5:],
            "problems": self.problems(),
            "stages": self.stages.spent(),
            "metrics_port": self.metrics_port,
        }

    def problems(self) -> list[str]:
        """What is wrong now, in words."""
        found = [self.problem, self.heartbeat.pulse.problem, *(one.problem for one in self.lifecycle.followers)]
        found += [f"{stage}: {error}" for stage, error in self.stages.errors.items()]
        if "read" not in self.stages.errors:  # what the last reading that went well said is old by now
            found += list(getattr(self.source, "problems", ()))[:MAX_PROBLEMS]
        if self.targets is not None:
            found.append(self.targets.problem)
        return [problem for problem in found if problem]

    def _bring_back(self) -> Bools:
        """The services to act on: a lease is held, and what its last holder remembered is here."""
        leading, supervisor = self.heartbeat.leading(), self.supervisor
        supervisor.brought_back = supervisor.brought_back & leading
        new = leading & ~supervisor.brought_back
        if new.any():
            try:
                restored = bring_back(self.database, self.memory, self.services, new)
                pending = unconcluded(self.database, [self.services[row] for row in np.flatnonzero(new)])
            except RecordsUnavailable as error:
                self.problem = str(error)
                return supervisor.leading()
            self.problem = ""
            self.decider.reset(new & ~restored)
            supervisor.forget_applied(np.array([name in pending for name in self.services], bool) & new)
            supervisor.brought_back = leading
        return supervisor.leading()

    def _route(self) -> None:
        """Routing follows the replicas at every tick, in every mode: it scales nothing."""
        actuator, leading = self.actuator, self.heartbeat.leading()
        if not isinstance(actuator, Router) or not leading.any():
            return
        with suppress(ActuationFailed):  # named among the problems, and tried again at the next tick
            self.stages.run("route", lambda: actuator.route(leading), ActuationFailed)

    def _loads(self) -> Mapping[str, float]:
        """Running requests by replica name, where the source knows them."""
        return self.source.replica_loads() if isinstance(self.source, PrometheusSource) else {}

    def _finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        self.last = decision
        self.log.decided(decision)
        self.exposition.publish(decision, seconds, self.clock.now_s)
        self.lifecycle.after_tick(decision)
        if self.targets is not None:
            self.targets.publish(decision, self.clock.now_s)

    def _tell(self, doing: str) -> None:
        """Say in the database that this controller lives; nothing depends on it."""
        try:
            self._presence.tell({"doing": doing, **self.status()})
        except RecordsUnavailable as error:
            self.problem = str(error)

    def _leases(self) -> Leases:
        lease = self.config.lease
        if lease.kind == "kubernetes":
            return KubernetesLeases(lease, self.services, holder_name())
        return DatabaseLeases(self.database, self.services, holder_name(), lease.duration_s)
