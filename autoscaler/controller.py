"""The loop: read, decide, record, act, once per control interval.

The same class runs on a simulated cluster (evaluation) and on a real one; its ports differ, and in production a
supervisor says which settled targets may be carried out. Errors from outside the process are caught here and nowhere
else: they become held decisions with a reason. Where stages have limits, so do errors of the program.
This module must not know what is behind its ports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from autoscaler.actuators.base import DrainsFirst, PartlyFailed
from autoscaler.stages import Stages
from policies.contract import (
    BOOT_BINS,
    LEAVE_ALONE,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
    ActuationFailed,
    Bools,
    Decision,
    MetricsUnavailable,
    Observation,
    Outcome,
    Policy,
    Reason,
    Snapshot,
    Target,
)
from policies.decider import Decider
from policies.pool_arrays import any_pool


class RecordsUnavailable(OSError):  # noqa: N818 - reads as the state that it reports
    """Raised by a recorder that could not keep a decision; what is not recorded is not carried out."""


class PermissionUnknown(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when nobody could be asked in time who may act; what is not permitted is not carried out."""


class MetricsSource(Protocol):
    """Where snapshots come from."""

    def read(self) -> Snapshot:
        """The latest window of every service.

        Raises:
            MetricsUnavailable: when there is no answer in time.
        """
        ...


class Actuator(Protocol):
    """What carries targets out."""

    def apply(self, target: Target) -> None:
        """Carry out an absolute target; repeating it is harmless. Services with `LEAVE_ALONE` counts are not touched.

        Raises:
            ActuationFailed: when it could not be carried out.
        """
        ...


class Clock(Protocol):
    """Time, real or virtual."""

    @property
    def now_s(self) -> float:
        """Seconds on this clock."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Return when the clock reads `time_s`."""
        ...


class Recorder(Protocol):
    """Keeps decisions."""

    def record(self, decision: Decision) -> None:
        """Keep one decision; called before it is carried out.

        Raises:
            RecordsUnavailable: when it could not be kept.
        """
        ...

    def conclude(self, decision: Decision) -> None:
        """Keep what became of the decision that was recorded last; called after it was carried out.

        Raises:
            RecordsUnavailable: when it could not be kept.
        """
        ...


class Supervisor(Protocol):
    """Says which settled targets may be carried out."""

    def begin(self, snapshot: Snapshot) -> Bools | None:
        """(n,) services whose target in force is not ours to set: it is taken from the snapshot."""
        ...

    def judge(self, decision: Decision, observation: Observation) -> Decision:
        """The decision, with the rows that must not be carried out marked as advised or held, and why."""
        ...

    def permitted(self, decision: Decision) -> Decision:
        """The same check again immediately before it is carried out: who may act can have changed meanwhile."""
        ...

    def finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        """What became of the decision, and how long each stage took."""
        ...


class Unsupervised:
    """Every settled target is carried out: simulation."""

    def begin(self, snapshot: Snapshot) -> Bools | None:
        """No service is anybody else's."""
        return None

    def judge(self, decision: Decision, observation: Observation) -> Decision:
        """The decision itself."""
        return decision

    def permitted(self, decision: Decision) -> Decision:
        """The decision itself."""
        return decision

    def finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        """Nothing to keep."""


class Controller:
    """Drives one `Decider` and one policy on a metrics source, an actuator, a clock and a recorder.

    Args:
        decider: the decision core.
        policy: what proposes targets.
        source: where snapshots come from.
        actuator: what carries targets out.
        clock: time.
        recorder: keeps decisions.
        interval_s: seconds between ticks.
        supervisor: who may act; every service when left out.
        stages: time limits of what waits for something outside: read, record, permit, act; none when left out.
        services: names, for errors that name services.
    """

    def __init__(
        self,
        decider: Decider,
        policy: Policy,
        source: MetricsSource,
        actuator: Actuator,
        clock: Clock,
        recorder: Recorder,
        interval_s: float,
        supervisor: Supervisor | None = None,
        stages: Stages | None = None,
        services: Sequence[str] = (),
    ) -> None:
        self.decider = decider
        self.policy = policy
        self.source = source
        self.actuator = actuator
        self.clock = clock
        self.recorder = recorder
        self.interval_s = interval_s
        self.supervisor = supervisor or Unsupervised()
        self.stages = stages or Stages()
        self._rows = {name: row for row, name in enumerate(services)}
        self.failures: Mapping[str, str] = {}
        """Why the last target of a service could not be carried out, by name, where it is known of that one."""

    def run(self, until_s: float) -> None:
        """Tick once per interval until the clock reads `until_s`. Ticks that a slow one has run over are left out."""
        next_s = self.clock.now_s + self.interval_s
        while next_s <= until_s + 1e-9:
            self.clock.wait_until(next_s)
            self.tick()
            next_s = following_tick_s(next_s, self.clock.now_s, self.interval_s)

    def tick(self) -> Decision:
        """One whole decision: read, decide, record, act, and keep what became of it."""
        snapshot = self._read()
        decision = self.stages.run("decide", lambda: self._decide(snapshot), RuntimeError)
        decision = self._act(self._record(decision))
        self.supervisor.finish(decision, self.stages.spent())  # before what it remembers is written down
        try:
            self.stages.run("conclude", lambda: self.recorder.conclude(decision), RecordsUnavailable)
        except RecordsUnavailable:
            decision = replace(decision, reasons=decision.reasons | int(Reason.NOT_RECORDED))
        return decision

    def _read(self) -> Snapshot:
        try:
            return self.stages.run("read", self.source.read, MetricsUnavailable)
        except MetricsUnavailable:
            return nothing_known(self.clock.now_s, self.interval_s, self.decider)

    def _decide(self, snapshot: Snapshot) -> Decision:
        elsewhere = self.supervisor.begin(snapshot)
        if elsewhere is not None and elsewhere.any():
            self.decider.release(elsewhere)
        observation = self.decider.observe(snapshot)
        settled = self.decider.decide(observation, self.policy)
        decision = self.supervisor.judge(settled, observation)
        if decision.settled is not settled.settled:
            self.decider.amend(decision.settled, snapshot.time_s)
        self.decider.retract(not_acted(decision))
        return decision

    def _record(self, decision: Decision) -> Decision:
        try:
            self.stages.run("record", lambda: self.recorder.record(decision), RecordsUnavailable)
        except RecordsUnavailable:
            return self._held(decision, np.ones(len(decision.outcome), bool), Reason.NOT_RECORDED)
        return decision

    def _act(self, decision: Decision) -> Decision:
        permitted = self._permitted(decision)
        stopped = not_acted(permitted)
        if (stopped & ~not_acted(decision)).any():
            self.decider.retract(stopped)
        if stopped.all():
            return permitted
        self.failures = {}
        try:
            target = without(permitted.settled, stopped)
            self.stages.run("act", lambda: self.actuator.apply(target), ActuationFailed)
        except PartlyFailed as error:
            self.failures, failed = error.failures, np.zeros(len(stopped), bool)
            failed[[self._rows[name] for name in error.failures if name in self._rows]] = True
            permitted = self._held(permitted, failed if failed.any() else ~stopped, Reason.ACTUATION_FAILED)
        except ActuationFailed:
            permitted = self._held(permitted, ~stopped, Reason.ACTUATION_FAILED)
        return self._drained_first(permitted)

    def _drained_first(self, decision: Decision) -> Decision:
        """A count that waits for a drain is no change yet: what was in force before still is."""
        if not isinstance(self.actuator, DrainsFirst):
            return decision
        waits = self.actuator.draining() & ~not_acted(decision)[:, np.newaxis]
        if not waits.any():
            return decision
        self.decider.defer(waits)
        before, settled, rows = self.decider.before(), decision.settled, any_pool(waits)
        replicas = np.where(waits, before.replicas, settled.replicas)
        moved = any_pool((replicas != before.replicas) | (settled.batch_cap != before.batch_cap))
        return replace(
            decision,
            settled=replace(settled, replicas=replicas),
            outcome=np.where(rows & ~moved, Outcome.UNCHANGED, decision.outcome),
            reasons=np.where(rows, decision.reasons | int(Reason.DRAINING), decision.reasons),
        )

    def _permitted(self, decision: Decision) -> Decision:
        try:
            return self.stages.run("permit", lambda: self.supervisor.permitted(decision), PermissionUnknown)
        except PermissionUnknown:
            return self._held(decision, decision.outcome != Outcome.ADVISED, Reason.OVERDUE)

    def _held(self, decision: Decision, rows: Bools, reason: Reason) -> Decision:
        """The masked rows held for `reason`."""
        if reason is Reason.ACTUATION_FAILED:  # it may have been carried out in part: the next window tells
            self.decider.doubt(rows)
        else:
            self.decider.retract(rows)
        return replace(
            decision,
            outcome=np.where(rows, Outcome.HELD, decision.outcome),
            reasons=np.where(rows, decision.reasons | int(reason), decision.reasons),
        )


def following_tick_s(tick_s: float, now_s: float, interval_s: float) -> float:
    """The next time on the grid of ticks that is not past, seconds.

    >>> following_tick_s(30.0, 34.0, 15.0), following_tick_s(30.0, 61.0, 15.0)
    (45.0, 75.0)
    """
    behind = math.ceil((now_s - tick_s) / interval_s - 1e-9)
    return tick_s + interval_s * max(behind, 1)


def not_acted(decision: Decision) -> Bools:
    """(n,) rows that are not carried out: held or advised."""
    stopped: Bools = (decision.outcome == Outcome.HELD) | (decision.outcome == Outcome.ADVISED)
    return stopped


def without(target: Target, stopped: Bools) -> Target:
    """The target that leaves the services where `stopped` (n,) is True alone."""
    return replace(target, replicas=np.where(stopped[:, np.newaxis], LEAVE_ALONE, target.replicas))


def nothing_known(time_s: float, window_s: float, decider: Decider) -> Snapshot:
    """A snapshot in which every measurement is missing, so that the guardrails hold."""
    shape = decider.fleet.exists.shape
    service, pool = np.full(shape[0], np.nan), np.full(shape, np.nan)
    return Snapshot(
        time_s=np.full(shape[0], time_s),
        window_s=np.full(shape[0], window_s),
        arrival_rps=service,
        prompt_tps=service,
        prefill_tps=service,
        generation_tps=service,
        finished_rps=service,
        prompt_tokens_mean=service,
        output_tokens_mean=service,
        queue_requests=service,
        oldest_wait_s=service,
        ttft_attainment=service,
        tpot_attainment=service,
        ttft_histogram_rps=np.full((shape[0], len(TTFT_EDGES_S) + 1), np.nan),
        tpot_histogram_rps=np.full((shape[0], len(TPOT_EDGES_S) + 1), np.nan),
        replicas_target=pool,
        replicas_starting=pool,
        replicas_ready=pool,
        replicas_draining=pool,
        boot_pipeline=np.full((*shape, BOOT_BINS), np.nan),
        running=pool,
        waiting=pool,
        kv_cache_usage=pool,
        batch_cap=pool,
    )
