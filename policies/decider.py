"""The pure core: a snapshot becomes an observation, a policy proposes, guardrails settle, a decision records.

`n` wide, no I/O, no clock: time comes with the snapshot. The training environment and the live controller both drive
this class, so nothing can be decided differently in the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Decision, Floats, Ints, Observation, Outcome, Policy, Snapshot, Target
from policies.fleet import Fleet
from policies.guardrails import Situation, settle
from policies.observation import ObservationBuilder
from policies.pool_arrays import any_pool, min_pools, sum_pools
from policies.spec import GuardrailSpec, WindowSpec
from policies.steadiness import ScalingHistory


class Decider:
    """Observes and settles for `n` services; remembers the targets in force and what became of them.

    Args:
        fleet: objectives, pools, prices and bounds of the services.
        window: control interval and metrics delay.
        guardrails: the limits on every target.
    """

    def __init__(self, fleet: Fleet, window: WindowSpec, guardrails: GuardrailSpec) -> None:
        self.fleet = fleet
        self.guardrails = guardrails
        self._builder = ObservationBuilder(fleet, window)
        n = len(fleet)
        self._replicas = np.full(
            (n, fleet.pools), -1, np.int64, order="F"
        )  # -1: not known yet, taken from the snapshot
        self._batch_cap = np.ones((n, fleet.pools), np.int64, order="F")
        self._history = ScalingHistory.none(n, fleet.pools)
        self._seen = self._history  # with the last window, without the last `settle`
        self._observed: Observation | None = None  # at the last `settle`
        self._before = (self._replicas, self._batch_cap, self._history)  # as they were before the last `settle`
        self._doubted: Bools | None = None  # services of whose last target nobody knows whether it was carried out
        self._any_unknown = True  # whether any target in force is unknown

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        self._builder.reset(rows)
        self._replicas[rows] = -1
        self._any_unknown = True
        self._batch_cap[rows] = 1
        self._history = self._history.forget(rows)

    def observe(self, snapshot: Snapshot) -> Observation:
        """Encode one window; once per tick."""
        # A clock that was set back must not make a cooldown longer than it is.
        self._history = self._history.not_after(snapshot.time_s)
        self._adopt(snapshot)
        return self._builder.observe(snapshot)

    def observe_rows(self, snapshot: Snapshot, rows: Ints) -> Observation:
        """Start the listed services (k,) anew with `snapshot` as their first window; the others are left alone."""
        self._replicas[rows] = snapshot.replicas_target.astype(np.int64)
        self._batch_cap[rows] = snapshot.batch_cap.astype(np.int64)
        listed = np.zeros(len(self.fleet), bool)
        listed[rows] = True
        self._history = self._history.forget(listed)
        return self._builder.observe_rows(snapshot, rows)

    def settle(self, proposed: Target, observation: Observation) -> tuple[Target, Ints]:
        """Apply the guardrails and remember the result as the target in force; also the (n,) reason flags."""
        self._before, self._doubted = (self._replicas, self._batch_cap, self._history), None
        situation = self._situation(proposed, observation)
        self._seen, self._observed = situation.history, observation
        settled, reasons = settle(proposed, situation)
        self._put_in_force(settled, observation.snapshot.time_s)
        return settled, reasons

    def what_if(self, proposed: Target, observation: Observation) -> Target:
        """What another proposal, made all along, would have become instead of the last one; nothing is remembered."""
        situation = self._situation(proposed, observation)
        return settle(proposed, replace(situation, history=situation.history.made_all_along(proposed)))[0]

    def before(self) -> Target:
        """What was in force before the last `settle`; -1 replicas where that is unknown."""
        replicas, batch_cap, _ = self._before
        return Target(replicas=replicas, batch_cap=batch_cap)

    def amend(self, settled: Target, time_s: Floats) -> None:
        """Put another target into force in place of the last one settled, as of the same time (n,)."""
        self._put_in_force(settled, time_s)

    def retract(self, services: Bools) -> None:
        """The last targets of the masked services were not carried out: what was in force before still is."""
        replicas, batch_cap, _ = self._before
        rows = services[:, np.newaxis]
        self._replicas = np.where(rows, replicas, self._replicas)
        self._batch_cap = np.where(rows, batch_cap, self._batch_cap)
        self._any_unknown = bool((self._replicas < 0).any())
        self._history = self._history.replaced(services, self._seen)

    def defer(self, pools: Bools) -> None:
        """The last counts of the masked pools (n, P) are not carried out yet: those before still are in force."""
        assert self._observed is not None, "what is deferred was settled first"
        before = self._before[0]
        self._replicas = np.where(pools, before, self._replicas)
        step = sum_pools(self._replicas) - sum_pools(before)
        time_s = self._observed.snapshot.time_s
        moved = self._seen.moved(step, time_s, self._observed, self.guardrails)
        self._history = self._history.replaced(any_pool(pools), moved)

    def doubt(self, services: Bools) -> None:
        """Nobody knows whether the last targets of the masked services were carried out.

        Where they are released, and the next window shows in force what was before, they were no change.
        """
        self._doubted = services

    def release(self, services: Bools) -> None:
        """Take what is in force for the masked services from the next window: somebody else has set it."""
        self._replicas = np.where(services[:, np.newaxis], -1, self._replicas)
        self._any_unknown = True

    def cooldown_ends_s(self) -> Floats:
        """(n,) time from which on the next scale-down is allowed, on the clock of the snapshots; -inf: at once."""
        ends: Floats = self._history.changed_s + self.guardrails.scale_down_cooldown_s
        return ends

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All that a restarted core needs to go on as if nothing had happened: arrays with leading axis n."""
        own = {"replicas": self._replicas, "batch_cap": self._batch_cap, **self._history._asdict()}
        return {**own, **self._builder.state()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned, for services and pools of the same shape."""
        self._replicas = np.asarray(state["replicas"], np.int64).copy(order="F")
        self._batch_cap = np.asarray(state["batch_cap"], np.int64).copy(order="F")
        self._history = self._seen = self._history.restored(state)
        self._before = (self._replicas, self._batch_cap, self._history)
        self._any_unknown = True
        self._builder.restore(state)

    def tick(self, snapshot: Snapshot, policy: Policy) -> Decision:
        """One whole decision: observe, propose, settle."""
        return self.decide(self.observe(snapshot), policy)

    def decide(self, observation: Observation, policy: Policy) -> Decision:
        """Propose and settle for what was observed."""
        snapshot = observation.snapshot
        replicas, batch_cap = self._replicas, self._batch_cap
        proposed = policy.propose(observation)
        settled, reasons = self.settle(proposed, observation)
        differs = (settled.replicas != replicas) | (settled.batch_cap != batch_cap)
        moved = any_pool(differs & self.fleet.exists)
        known = min_pools(replicas) >= 0
        still = np.where(observation.blind, Outcome.HELD, Outcome.UNCHANGED)
        outcome = np.where(known & moved, Outcome.SCALED, still)
        return Decision(snapshot, proposed, settled, reasons, outcome, policy.name)

    def _put_in_force(self, settled: Target, time_s: Floats) -> None:
        """Remember a target after `_before`."""
        assert self._observed is not None, "a target is put into force by `settle` first"
        before = self._before[0]
        step = sum_pools(settled.replicas) - sum_pools(before)
        # Copies: a later reset must not reach into decisions already made.
        replicas = settled.replicas.copy(order="F")
        if self._any_unknown:  # what is unknown stays so
            unknown = min_pools(before) < 0
            step[unknown] = 0
            replicas[unknown] = -1
        self._history = self._seen.moved(step, time_s, self._observed, self.guardrails)
        self._replicas = replicas
        self._batch_cap = settled.batch_cap.copy(order="F")

    def _situation(self, proposed: Target, observation: Observation) -> Situation:
        """What the guardrails look at, as it was before the last `settle` or will be at the next."""
        replicas, batch_cap, history = self._before
        current = np.maximum(replicas, 0) if self._any_unknown else replicas
        return Situation(
            observation=observation,
            fleet=self.fleet,
            spec=self.guardrails,
            current=current,
            current_cap=batch_cap,
            history=history.seen(proposed, current, observation, self.guardrails),
        )

    def _adopt(self, snapshot: Snapshot) -> None:
        """Take the targets that are in force in the world for services seen for the first time.

        An unknown target is what runs or starts, an unknown cap the engine's own; without replica counts, wait.
        """
        if not self._any_unknown:
            return
        running = snapshot.replicas_ready + snapshot.replicas_starting
        target = np.where(np.isnan(snapshot.replicas_target), running, snapshot.replicas_target)
        new = (min_pools(self._replicas) < 0) & ~any_pool(np.isnan(target))
        cap = np.where(np.isnan(snapshot.batch_cap), self.fleet.max_num_seqs, snapshot.batch_cap)
        self._replicas[new] = target[new].astype(np.int64)
        self._batch_cap[new] = cap[new].astype(np.int64)
        if self._doubted is not None:
            undone = self._doubted & new & ~any_pool((self._replicas != self._before[0]) & self.fleet.exists)
            self._history = self._history.replaced(undone, self._seen)
        self._any_unknown = bool((self._replicas < 0).any())
