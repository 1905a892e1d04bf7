"""A live controller, or one shard of it: all parts put together, and its loop.

`run` ticks until it is told to stop; nothing else ends it. Whoever hosts it (a Ray actor, a plain process) only calls
`run`, with the watchdog of the process, and `stop`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry

from autoscaler.actuators.base import LiveActuator
from autoscaler.actuators.build import build_actuator
from autoscaler.actuators.state_watch import StateWatch
from autoscaler.authority.announcements import Announcer
from autoscaler.authority.build import build_leases
from autoscaler.authority.controls import Controls, DownWatch
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.supervision import LiveSupervisor
from autoscaler.background import Background
from autoscaler.clocks import SteadyWallClock, StoppableClock
from autoscaler.controller import Controller, MetricsSource, following_tick_s
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.decision_log import DecisionLog
from autoscaler.hosting.exposition import Exposition
from autoscaler.hosting.presence import Doing, Presence
from autoscaler.hosting.progress import Progress, Watchdog
from autoscaler.hosting.routing import Routing
from autoscaler.hosting.server import StatusServer
from autoscaler.hosting.states import ServiceState, states_of
from autoscaler.hosting.succession import Succession
from autoscaler.hosting.targets_file import TargetsFile
from autoscaler.hosting.vitals import Vitals
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.records.database import Database
from autoscaler.records.decisions import Records
from autoscaler.records.memory import Memory
from autoscaler.stages import Stages
from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.follower import is_learned
from autoscaler.versions.ladder import FallbackLadder
from autoscaler.versions.lifecycle import Lifecycle
from autoscaler.versions.timed_answers import TimedAnswers
from policies.contract import Decision
from policies.cost_meter import CostMeter
from policies.decider import Decider
from policies.fleet import Fleet
from policies.lineup import make_policy
from policies.objective import Objective
from policies.redaction import in_short

LOG = logging.getLogger("jevons")
FIRST_LOOK_S = 30.0
"""Longest wait for the policies at the start, seconds; the baseline decides until it is there."""
MAX_PROBLEMS = 5  # of the metrics, in `status` and in the log


class LiveService:
    """One shard of a live controller.

    Args:
        config: the whole controller's configuration.
        shard: which of its shards.
        source: where snapshots come from; Prometheus when left out. It must ask `state` as Prometheus does.
        actuator: what carries targets out; as configured when left out.
        clock: time; the wall's when left out.
        down: hears `jevons down` for the run that this is a part of; a run of its own when left out.

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
        clock: StoppableClock | None = None,
        down: DownWatch | None = None,
    ) -> None:
        specs = config.shard(shard)
        self.config = config
        self.shard = shard
        self.name = config.shard_name(shard)
        self.services = tuple(spec.service for spec in specs)
        self.clock = clock or SteadyWallClock()
        self.database = Database(config.database_url)
        self.database.create()
        self._presence = Presence(self.database, self.name)
        fleet = Fleet.from_specs(specs)
        interface, guardrails = specs[0].interface, specs[0].guardrails
        overhead_rate = np.array([spec.objective.overhead_rate for spec in specs])
        pools = tuple(tuple(pool.label for pool in spec.pools) for spec in specs)
        self.progress = Progress(config.stall_s)
        self.decider = Decider(fleet, interface.window, guardrails)
        self._answers = TimedAnswers(config.limits.decide_s)
        baseline = make_policy(config.fallback, fleet, specs)
        self.ladder = FallbackLadder(fleet, baseline, config.ladder, self._answers)
        peers = {reference: make_policy(reference, fleet, specs) for reference in config.counterfactuals}
        self.counterfactuals = Counterfactuals(peers, fleet, overhead_rate, self._answers)
        if not is_learned(config.policy):
            self.ladder.baseline = make_policy(config.policy.reference, fleet, specs)
        self.lifecycle = Lifecycle.of(
            config.policy, self.services, fleet, interface, self.ladder, self.counterfactuals, overhead_rate
        )

        self.leases = build_leases(config.lease, self.database, self.services, self.name)
        self.heartbeat = Heartbeat(
            self.services,
            self.leases,
            Controls(self.database),
            config.mode,
            config.kill_file,
            config.lease.duration_s,
            stalled=self.progress.stalled,
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
            self._state,
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
            self.supervisor.leading,
            lambda: self.lifecycle.version,
            lambda: self.stages.failures,
            lambda: getattr(self.source, "implausible", {}),
            self.registry,
        )
        self.vitals = Vitals(
            self.services,
            self.progress,
            self.supervisor.leading,
            lambda: self.heartbeat.pulse.modes,
            self.heartbeat.killed,
            lambda: self._state.last,
            lambda: getattr(self.source, "replicas_stuck", 0.0),
            lambda: self.last,
            self.states,
            self.problems,
            self.threads,
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
        self.succession = Succession(self.heartbeat, self.supervisor, self.decider, self.memory, self.database)
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
        self._routing = Routing(self.actuator, self.heartbeat, self.stages)
        self._announcer = Announcer(
            fleet.exists, self.actuator, self.stages, self.services, lambda: self.controller.failures
        )
        self._down = down or DownWatch(config.name)
        self.doing = Doing.STARTS
        """As of the last tick."""
        self._fault = ""  # the error of the program that ended the last tick
        self._server: StatusServer | None = None

    @property
    def state(self) -> StateWatch:
        """Asks the actuator what is in force; a source of one's own must call it once per read."""
        return self._state

    def start(self) -> None:
        """Serve /metrics and the probes, load the policy, beat once, and keep beating."""
        exposition = self.config.exposition
        if exposition.port is not None:
            port = exposition.port + self.shard if exposition.port else 0
            stalled, unready, said = self.progress.stalled, self.progress.unready, self._said
            self._server = StatusServer(exposition.host, port, self.registry, stalled, unready, said)
        for follower in self.lifecycle.followers:
            follower.thread.start()
        until_s = time.monotonic() + FIRST_LOOK_S
        for follower in self.lifecycle.followers:
            follower.looked.wait(max(0.0, until_s - time.monotonic()))
        self.lifecycle.before_tick()
        self.heartbeat.beat()
        self.heartbeat.start(self.config.lease.period_s)

    @property
    def metrics_port(self) -> int | None:
        """Port of /metrics while it is served."""
        return None if self._server is None else self._server.port

    def run(self, watchdog: Watchdog) -> None:
        """Tick once per interval until `stop`, at once at first. An error of the program ends its tick and no more.

        Args:
            watchdog: of this process, which it ends when no tick comes to its end for too long.
        """
        try:
            watchdog.fed(self.name, self.config.stall_s + FIRST_LOOK_S)
            self.start()
            next_s = self.clock.now_s
            while not self.clock.stopped:
                try:
                    self.step()
                except Exception as error:
                    self._failed(error)
                watchdog.fed(self.name, self.config.stall_s)
                next_s = following_tick_s(next_s, self.clock.now_s, self.config.interval_s)
                self.clock.wait_until(next_s)
        finally:
            watchdog.forget(self.name)
        try:
            self.close()
        except Exception as error:  # the loop has ended as it was told: nobody may begin it again
            LOG.error("%s has ended, and could not let go of everything", self.name, exc_info=error)

    def step(self) -> Decision | None:
        """One tick; None while no service is this controller's, or it was told to end."""
        orders = self.heartbeat.orders
        told = self._down.told(orders) if orders is not None else ""
        if told:
            LOG.info("%s ends: %s", self.name, told)
            self.stop()
            return None
        decision = None
        try:
            if self.succession.take_over().any():
                self.lifecycle.before_tick()
                decision = self.controller.tick()
            else:
                self._forget()
            self.progress.completed()
        finally:
            self._routing.follow()
            self.progress.ended()
        self._announcer.tell(decision, self.clock.now_s)
        self._fault = ""
        self.log.troubled(self.problems())
        self._tell(Doing.STANDS_BY if decision is None else Doing.ACTS)
        return decision

    def _forget(self) -> None:
        """What was so while it led is not known any more: another controller may have changed all of it."""
        self.last = None
        self.stages.forget()
        self.exposition.forget()

    def _failed(self, error: Exception) -> None:
        """A tick has ended in an error of the program: it is named, and what is in force is read from the world."""
        words = f"{type(error).__name__}: {error}"
        fault = "" if words in self.stages.errors.values() else f"tick: {words}"  # a stage names and counts its own
        if fault:
            self.stages.count("tick")
        if fault != self._fault:
            LOG.error("a tick failed, and nothing more of it is carried out", exc_info=error)
        self._fault = fault
        self.last = None
        self.exposition.forget()
        self.decider.release(np.ones(len(self.services), bool))
        if failing := self.progress.failing():
            self.heartbeat.give_way(f"{failing} ({words})")
        self.log.troubled(self.problems())
        self._tell(Doing.FAILS)

    def stop(self) -> None:
        """End the loop after the present tick."""
        self.clock.stop()

    def close(self) -> None:
        """Hand the leases back and let go of everything."""
        for follower in self.lifecycle.followers:
            follower.thread.stop()
        self.heartbeat.stop(release=True)
        self.leases.close()
        self._tell(Doing.ENDED)
        if self._server is not None:
            self._server.close()
        self.actuator.close()
        if isinstance(self.source, PrometheusSource):
            self.source.close()
        self.database.close()

    def status(self) -> dict[str, Any]:
        """What `jevons status` shows of this controller."""
        return {
            "controller": self.name,
            "services": len(self.services),
            "leads": int(self.supervisor.leading().sum()),
            "policy": self.lifecycle.version,
            "states": {name: asdict(found) for name, found in self.states().items()},
            "leases": dict(self.heartbeat.pulse.unread),
            "killed": next((reason for reason in self.heartbeat.killed() if reason), ""),
            "events": self.lifecycle.events[-5:],
            "problems": self.problems(),
            "stages": self.stages.spent(),
            "metrics_port": self.metrics_port,
        }

    def problems(self) -> list[str]:
        """What is wrong now, in words."""
        found = [self._fault, self.succession.problem, self._presence.problem, self.heartbeat.pulse.problem]
        found += [self.targets.problem if self.targets else ""]
        found += [follower.problem for follower in self.lifecycle.followers]
        found += [thread.problem for thread in self.threads()]
        found += [*self._answers.problems, *self.counterfactuals.failed.values()]
        found += [f"{stage}: {error}" for stage, error in self.stages.errors.items()]
        # What the last reading that went well said is old by now; what is in force was read nevertheless.
        old = "read" in self.stages.errors
        found += list(self._state.last.problems if old else getattr(self.source, "problems", ()))[:MAX_PROBLEMS]
        return [in_short(problem) for problem in dict.fromkeys(found) if problem]

    def states(self) -> dict[str, ServiceState]:
        """Of the services that this controller decides on, by name."""
        decision, leading = self.last, self.supervisor.leading()
        if decision is None:
            return {}
        found = states_of(
            decision,
            self.services,
            self.heartbeat.pulse.modes,
            self.heartbeat.killed(),
            self.stages.errors,
            self.controller.failures,
            getattr(self.source, "problems", ()),
            self.decider.cooldown_ends_s(),
        )
        return {self.services[row]: found[row] for row in np.flatnonzero(leading).tolist()}

    def threads(self) -> list[Background]:
        """What works in the background."""
        found = [follower.thread for follower in self.lifecycle.followers]
        return found if self.heartbeat.thread is None else [self.heartbeat.thread, *found]

    def _loads(self) -> Mapping[str, float]:
        """Running requests by replica name, where the source knows them."""
        return self.source.replica_loads() if isinstance(self.source, PrometheusSource) else {}

    def _finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        self.last = decision
        self.log.decided(decision)
        self.exposition.publish(decision, seconds, self.clock.now_s, self._state.last)
        self.lifecycle.after_tick(decision)
        if self.targets is not None:
            self.targets.publish(decision, self.clock.now_s)

    def _said(self) -> dict[str, Any]:
        return self._presence.signed({"doing": self.doing, **self.status()})

    def _tell(self, doing: Doing) -> None:
        """Say in the database that this controller lives, and what it does."""
        self.doing = doing
        self._presence.tell({"doing": doing, **self.status()})
