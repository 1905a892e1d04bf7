"""The fallback ladder: the learned policy, below it a model-based baseline, below that hold.

Row by row, a service falls to the lowest rung that one of its triggers asks for, and climbs back when it is gone.
An exception from a policy is caught here rather than in the controller, so that the others go on.
This module must not know how policies are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from autoscaler.versions.timed_answers import TimedAnswers
from policies.contract import Bools, Floats, Ints, Observation, Policy, Reason, Snapshot, Target
from policies.durable import restore_each, states_of
from policies.engine import NonNegative, StrictModel
from policies.fleet import Fleet
from policies.learned import LearnedPolicy
from policies.pool_arrays import nan_to_num, sum_pools

ALWAYS_MEASURED = (
    *("arrival_rps", "prefill_tps", "generation_tps", "queue_requests"),
    *("running", "waiting", "kv_cache_usage", "batch_cap"),
)
"""Of a snapshot, what learned policies always had in training."""


class LadderSpec(StrictModel):
    """When a service falls from its learned policy to the baseline."""

    max_distance: NonNegative = Field(
        default=0.5,
        description="Largest excess of an observation over the training range, in widths of a feature's range.",
    )
    burning_ticks: int = Field(
        default=4, ge=1, description="Ticks of missed objectives while the policy asks for less, before it is dropped."
    )


class Rung(IntEnum):
    """Who made a proposal."""

    LEARNED = 0
    BASELINE = 1
    HOLD = 2


class FallbackLadder:
    """A policy made of a learned one, which may be exchanged between ticks, and a baseline.

    Args:
        fleet: the services.
        baseline: the second rung; it sees every observation, so that its memory is warm when it is needed.
        spec: the triggers.
        answers: asks the policies.
    """

    def __init__(self, fleet: Fleet, baseline: Policy, spec: LadderSpec, answers: TimedAnswers) -> None:
        self.name = baseline.name
        """Of the rung that is asked first."""
        self.learned: LearnedPolicy | None = None
        self.baseline = baseline
        self.spec = spec
        self._fleet = fleet
        self._answers = answers
        n = len(fleet)
        self._burning_ticks = np.zeros(n, np.int64)
        self.wanted_learned = False
        self.reasons: Ints = np.zeros(n, np.int64)
        self.rung: Ints = np.zeros(n, np.int64)
        self.distance: Floats = np.full(n, np.nan)

    @property
    def version(self) -> str:
        """Digest of the learned policy's bundle, the baseline's name without one."""
        return self.learned.bundle.digest if self.learned is not None else self.baseline.name

    def exchange(self, learned: LearnedPolicy | None) -> LearnedPolicy | None:
        """Put another learned policy, or none, on the first rung; returns the one before. Passes error budgets on."""
        before = self.learned
        if learned is not None and before is not None:
            learned.restore(before.state())
        self.learned = learned
        self.name = self.baseline.name if learned is None else learned.name
        return before

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the masked services, all when None."""
        self._burning_ticks[slice(None) if services is None else services] = 0
        self.baseline.reset(services)
        if self.learned is not None:
            self.learned.reset(services)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {"burning_ticks": self._burning_ticks, **states_of(self._rungs())}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self._burning_ticks = np.array(state["burning_ticks"], np.int64)
        restore_each(self._rungs(), state)

    def propose(self, observation: Observation) -> Target:
        """The proposal of each service's rung. `reasons`, `rung` and `distance` say how it came about."""
        snapshot = observation.snapshot
        n = len(snapshot)
        self.reasons, self.rung = np.zeros(n, np.int64), np.full(n, int(Rung.LEARNED))
        held = in_force(snapshot)
        target = self._attempt(self.baseline, observation)
        if target is None:
            self._fall(np.ones(n, bool), Rung.HOLD, Reason.POLICY_FAILED)
            target = held
        learned = self._learned(observation)
        if learned is None:
            return target
        self._judge(learned, observation)
        # Where the baseline has failed, the learned policy still may speak; where neither may, hold.
        rung = self.rung[:, np.newaxis]
        return Target(
            replicas=np.where(rung == Rung.LEARNED, learned.replicas, target.replicas),
            batch_cap=np.where(rung == Rung.LEARNED, learned.batch_cap, target.batch_cap),
        )

    def _rungs(self) -> dict[str, object]:
        return {"learned": self.learned, f"baseline {self.baseline.name}": self.baseline}

    def _learned(self, observation: Observation) -> Target | None:
        n = len(observation.snapshot)
        self.distance = np.full(n, np.nan)
        failed_baseline = self.rung == Rung.HOLD
        if self.learned is None:
            reason = Reason.BUNDLE_REFUSED if self.wanted_learned else Reason.NONE
            self._fall(~failed_baseline, Rung.BASELINE, reason)
            return None
        self.distance = self.learned.distance(observation.features)
        target = self._attempt(self.learned, observation)
        if target is None:
            self._fall(~failed_baseline, Rung.BASELINE, Reason.POLICY_FAILED)
            return None
        self.rung = np.full(n, int(Rung.LEARNED))
        return target

    def _judge(self, learned: Target, observation: Observation) -> None:
        """Drop the learned policy where a trigger fires."""
        snapshot = observation.snapshot
        below = Rung.BASELINE if not (self.reasons & Reason.POLICY_FAILED).any() else Rung.HOLD
        far = self.distance > self.spec.max_distance
        self._fall(far, below, Reason.OUT_OF_RANGE)
        self._fall(partly_blind(snapshot) & ~observation.blind, below, Reason.PARTLY_BLIND)
        attained = np.fmin(snapshot.ttft_attainment, snapshot.tpot_attainment)
        burning = attained < self._fleet.attainment_target
        shrinking = sum_pools(learned.replicas) < sum_pools(nan_to_num(snapshot.replicas_target))
        unknown = np.isnan(attained)
        again = burning & (shrinking | (self._burning_ticks >= self.spec.burning_ticks))
        self._burning_ticks = np.where(again, self._burning_ticks + 1, np.where(unknown, self._burning_ticks, 0))
        self._fall(self._burning_ticks >= self.spec.burning_ticks, below, Reason.BURNING_WHILE_SHRINKING)

    def _attempt(self, policy: Policy, observation: Observation) -> Target | None:
        """The proposal, None when the policy fails in any way."""
        try:
            target = self._answers.propose(policy, observation)
        except Exception:  # a policy is a plug-in: whatever it raises, the ladder goes on one rung lower
            return None
        shape = observation.snapshot.replicas_ready.shape
        sound = target.replicas.shape == shape and target.batch_cap.shape == shape
        return target if sound else None

    def _fall(self, rows: Bools, rung: Rung, reason: Reason) -> None:
        self.rung = np.where(rows, np.maximum(self.rung, int(rung)), self.rung)
        self.reasons = np.where(rows, self.reasons | int(reason), self.reasons)


def in_force(snapshot: Snapshot) -> Target:
    """What the world is at, as a target; zeros where that is unknown, which the guardrails hold."""
    running = nan_to_num(snapshot.replicas_ready) + nan_to_num(snapshot.replicas_starting)
    replicas = np.where(np.isnan(snapshot.replicas_target), running, snapshot.replicas_target)
    return Target(replicas=replicas.astype(np.int64), batch_cap=nan_to_num(snapshot.batch_cap, 1.0).astype(np.int64))


def partly_blind(snapshot: Snapshot) -> Bools:
    """(n,) True where one of `ALWAYS_MEASURED` is missing."""
    values: list[Floats] = [getattr(snapshot, name) for name in ALWAYS_MEASURED]
    blind: Bools = np.isnan(sum(one if one.ndim == 1 else sum_pools(one) for one in values))
    return blind
