"""The loop: read, decide, act, record, once per control interval.

The same class runs on a simulated cluster (evaluation) and on a real one; only its ports differ.
Errors of the world are caught here and nowhere else: they become held decisions with a reason.
This module must not know what is behind its ports.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from policies.contract import (
    BOOT_BINS,
    LEAVE_ALONE,
    TPOT_EDGES_S,
    TTFT_EDGES_S,
    ActuationFailed,
    Bools,
    Decision,
    MetricsUnavailable,
    Outcome,
    Policy,
    Reason,
    Snapshot,
    Target,
)
from policies.decider import Decider


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
        """Keep one decision; called before it is carried out."""
        ...


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
    ) -> None:
        self.decider = decider
        self.policy = policy
        self.source = source
        self.actuator = actuator
        self.clock = clock
        self.recorder = recorder
        self.interval_s = interval_s

    def run(self, until_s: float) -> None:
        """Tick once per interval until the clock reads `until_s`."""
        next_s = self.clock.now_s + self.interval_s
        while next_s <= until_s + 1e-9:
            self.clock.wait_until(next_s)
            self.tick()
            next_s += self.interval_s

    def tick(self) -> Decision:
        """One whole decision: read, decide, record, act."""
        decision = self.decider.tick(self._read(), self.policy)
        self.recorder.record(decision)
        held = decision.outcome == Outcome.HELD
        if not held.all():
            try:
                self.actuator.apply(without(decision.settled, held))
            except ActuationFailed:
                failed = np.full(len(decision.outcome), Outcome.HELD)
                decision = replace(decision, outcome=failed, reasons=decision.reasons | Reason.ACTUATION_FAILED)
                self.recorder.record(decision)
        return decision

    def _read(self) -> Snapshot:
        try:
            return self.source.read()
        except MetricsUnavailable:
            return nothing_known(self.clock.now_s, self.interval_s, self.decider)


def without(target: Target, held: Bools) -> Target:
    """The target that leaves the services where `held` (n,) is True alone."""
    return replace(target, replicas=np.where(held[:, np.newaxis], LEAVE_ALONE, target.replicas))


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
