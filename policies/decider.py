"""The pure core: a snapshot becomes an observation, a policy proposes, guardrails settle, a decision records.

`n` wide, no I/O, no clock: time comes with the snapshot. The training environment and the live controller both drive
this class, so nothing can be decided differently in the two.
"""

from __future__ import annotations

import numpy as np

from policies.columns import any_pool, least, total
from policies.contract import Bools, Decision, Ints, Observation, Outcome, Policy, Snapshot, Target
from policies.fleet import Fleet
from policies.guardrails import Situation, settle
from policies.observation import ObservationBuilder
from policies.spec import GuardrailSpec, WindowSpec


class Decider:
    """Observes and settles for `n` services; remembers the targets in force and when they last changed.

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
        self._changed_s = np.full(n, -np.inf)
        self._strangers = True  # whether any target in force is unknown

    def reset(self, services: Bools | None = None) -> None:
        """Forget the masked services, all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        self._builder.reset(rows)
        self._replicas[rows] = -1
        self._strangers = True
        self._batch_cap[rows] = 1
        self._changed_s[rows] = -np.inf

    def observe(self, snapshot: Snapshot) -> Observation:
        """Encode one window; once per tick."""
        self._adopt(snapshot)
        return self._builder.observe(snapshot)

    def observe_rows(self, snapshot: Snapshot, rows: Ints) -> Observation:
        """Begin anew with the listed services (k,), whose first window `snapshot` is; the others are left alone."""
        self._replicas[rows] = snapshot.replicas_target.astype(np.int64)
        self._batch_cap[rows] = snapshot.batch_cap.astype(np.int64)
        self._changed_s[rows] = -np.inf
        return self._builder.observe_rows(snapshot, rows)

    def settle(self, proposed: Target, observation: Observation) -> tuple[Target, Ints]:
        """Apply the guardrails and remember the result as the target in force; also the (n,) reason flags."""
        snapshot = observation.snapshot
        situation = Situation(
            observation=observation,
            fleet=self.fleet,
            spec=self.guardrails,
            current=np.maximum(self._replicas, 0) if self._strangers else self._replicas,
            current_cap=self._batch_cap,
            quiet_s=snapshot.time_s - self._changed_s,
        )
        settled, reasons = settle(proposed, situation)
        moved = total(settled.replicas) != total(situation.current)
        # Copies: a later reset must not reach into decisions already made.
        replicas = settled.replicas.copy(order="F")
        if self._strangers:  # what is unknown stays so
            unknown = least(self._replicas) < 0
            moved &= ~unknown
            replicas[unknown] = -1
        self._changed_s = np.where(moved, snapshot.time_s, self._changed_s)
        self._replicas = replicas
        self._batch_cap = settled.batch_cap.copy(order="F")
        return settled, reasons

    def tick(self, snapshot: Snapshot, policy: Policy) -> Decision:
        """One whole decision: observe, propose, settle."""
        observation = self.observe(snapshot)
        replicas, batch_cap = self._replicas, self._batch_cap
        proposed = policy.propose(observation)
        settled, reasons = self.settle(proposed, observation)
        differs = (settled.replicas != replicas) | (settled.batch_cap != batch_cap)
        moved = any_pool(differs & self.fleet.exists)
        known = least(replicas) >= 0
        still = np.where(observation.blind, Outcome.HELD, Outcome.UNCHANGED)
        outcome = np.where(known & moved, Outcome.SCALED, still)
        return Decision(snapshot, proposed, settled, reasons, outcome, policy.name)

    def _adopt(self, snapshot: Snapshot) -> None:
        """Take the targets that are in force in the world for services seen for the first time.

        An unknown target is what runs or starts, an unknown cap the engine's own; without replica counts, wait.
        """
        if not self._strangers:
            return
        running = snapshot.replicas_ready + snapshot.replicas_starting
        target = np.where(np.isnan(snapshot.replicas_target), running, snapshot.replicas_target)
        new = (least(self._replicas) < 0) & ~any_pool(np.isnan(target))
        cap = np.where(np.isnan(snapshot.batch_cap), self.fleet.max_num_seqs, snapshot.batch_cap)
        self._replicas[new] = target[new].astype(np.int64)
        self._batch_cap[new] = cap[new].astype(np.int64)
        self._strangers = bool((self._replicas < 0).any())
