"""Who may act on which service at a tick, and why not: leases, modes, the kill switch, other people's edits.

A scale-down is looked at twice. Nothing here reads metrics or touches a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from autoscaler.actuators.base import FleetState
from autoscaler.authority.controls import Mode
from autoscaler.authority.foreign_edits import ForeignEdits
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.leases import NOT_HELD
from autoscaler.authority.revalidation import Revalidation, RevalidationSpec
from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.ladder import FallbackLadder, Rung
from policies.contract import Bools, Decision, Floats, Observation, Outcome, Reason, Snapshot
from policies.decider import Decider
from policies.engine import NonNegative, Positive, StrictModel
from policies.pool_arrays import any_pool


class SupervisionSpec(StrictModel):
    """What must be so before a target is carried out."""

    edit_hold_s: NonNegative = Field(
        default=900.0, description="A manual edit is left alone for this long after the last one, seconds."
    )
    max_decision_age_s: Positive = Field(
        default=30.0, description="A decision that is older than this when its turn comes is not carried out, seconds."
    )
    revalidation: RevalidationSpec = Field(default=RevalidationSpec(), description="The second look at a scale-down.")


class Clocks(Protocol):
    """The controller's clock."""

    @property
    def now_s(self) -> float:
        """Seconds; Unix time that never jumps while the process lives."""
        ...


class LiveSupervisor:
    """Marks the rows of a decision that must not be carried out.

    Args:
        services: names.
        decider: the decision core.
        heartbeat: leases, modes, the kill switch.
        ladder: who proposed, for the record.
        counterfactuals: what peers would have done.
        world: what was in force at the last reading.
        clock: time.
        spec: holds and ages.
        on_finish: told of every finished decision.
    """

    def __init__(
        self,
        services: Sequence[str],
        decider: Decider,
        heartbeat: Heartbeat,
        ladder: FallbackLadder,
        counterfactuals: Counterfactuals,
        world: Callable[[], FleetState],
        clock: Clocks,
        spec: SupervisionSpec,
        on_finish: Callable[[Decision, dict[str, float]], None] = lambda decision, seconds: None,
    ) -> None:
        self.services = tuple(services)
        self.spec = spec
        self.revalidation = Revalidation(decider.fleet, spec.revalidation)
        self._decider = decider
        self._heartbeat = heartbeat
        self._ladder = ladder
        self._counterfactuals = counterfactuals
        self._world = world
        self._clock = clock
        self._on_finish = on_finish
        self.brought_back: Bools = np.zeros(len(self.services), bool)
        """(n,) services whose memory is here; on the others this controller must not act yet."""
        self._began_s = -np.inf
        self._edits = ForeignEdits(decider.fleet.exists, spec.edit_hold_s)

    # Supervisor

    def begin(self, snapshot: Snapshot) -> Bools:
        """Look for edits by others; the services on which this controller does not act."""
        self._began_s = self._clock.now_s
        self._edits.look(self._world().replicas_target, self._began_s, self._ordered_s())
        return ~self._acting()

    def judge(self, decision: Decision, observation: Observation) -> Decision:
        """Hold what is not ours, killed, paused, edited by others, owned by another autoscaler or due a second look."""
        modes = self._modes()
        peers = self._counterfactuals.of(decision.settled, observation, self._decider)
        reasons = decision.reasons | self._ladder.reasons
        # The core names a rule only where it changed the proposal; a held row must say why it is held in any case.
        reasons = np.where(observation.blind, reasons | int(Reason.MISSING_METRICS), reasons)
        held = (decision.outcome == Outcome.HELD) | (self._ladder.rung == Rung.HOLD)
        for rows, reason in self._stops(modes):
            reasons = np.where(rows, reasons | int(reason), reasons)
            held = held | rows
        advised = ~held & (modes == Mode.ADVISE)
        settled = decision.settled
        looked_at = ~held & ~advised
        if looked_at.any():
            current = self._decider.before()
            settled, waiting = self.revalidation.judge(settled, current, looked_at, observation)
            reasons = np.where(waiting, reasons | int(Reason.REVALIDATING), reasons)
            same = ~any_pool(settled.replicas != current.replicas) & ~any_pool(settled.batch_cap != current.batch_cap)
            held = held | (waiting & same)
        outcome = np.where(held, Outcome.HELD, np.where(advised, Outcome.ADVISED, decision.outcome))
        details: dict[str, npt.NDArray[Any]] = {
            "mode": modes,
            "token": np.where(self.leading(), self._heartbeat.pulse.tokens, NOT_HELD),
            "rung": self._ladder.rung.copy(),
            "distance": self._ladder.distance.copy(),
            "in_force": self._decider.before().replicas.copy(),
            "demand": observation.demand,
            **peers,
        }
        return replace(decision, settled=settled, reasons=reasons, outcome=outcome, details=details)

    def permitted(self, decision: Decision) -> Decision:
        """Orders, kill switch, leases and the decision's age, asked again at the last moment."""
        self._heartbeat.hear()
        modes = self._modes()
        late = self._clock.now_s - self._began_s > self.spec.max_decision_age_s
        every = np.ones(len(self.services), bool)
        stops = (
            (self._killed(), Reason.KILL_SWITCH),
            (modes == Mode.PAUSED, Reason.PAUSED),
            (~self.leading(), Reason.NOT_LEADER),
            (every & late, Reason.OVERDUE),
        )
        outcome, reasons = decision.outcome, decision.reasons
        for rows, reason in stops:
            rows = rows & (outcome != Outcome.ADVISED)
            reasons = np.where(rows, reasons | int(reason), reasons)
            outcome = np.where(rows, Outcome.HELD, outcome)
        outcome = np.where((outcome != Outcome.HELD) & (modes == Mode.ADVISE), Outcome.ADVISED, outcome)
        return replace(decision, outcome=outcome, reasons=reasons)

    def finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        """Remember what was carried out."""
        done = (decision.outcome == Outcome.SCALED) | (decision.outcome == Outcome.UNCHANGED)
        failed = (decision.reasons & int(Reason.ACTUATION_FAILED)) != 0
        self._edits.carried_out(decision.settled.replicas, self._world().replicas_target, done, failed)
        self._on_finish(decision, seconds)

    # Durable state

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """What survives a restart: arrays with leading axis n."""
        return {**self._edits.state(), **self.revalidation.state()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        self._edits.restore(state)
        self.revalidation.restore(state)

    def forget_applied(self, rows: Bools) -> None:
        """Nobody knows whether the last targets of the masked services were carried out."""
        self._edits.forget(rows)

    # Reasons to stop

    def leading(self) -> Bools:
        """(n,) services that are this controller's to act on."""
        return self._heartbeat.leading() & self.brought_back

    def _modes(self) -> npt.NDArray[Any]:
        return np.array([mode.value for mode in self._heartbeat.pulse.modes])

    def _acting(self) -> Bools:
        acting = (
            (self._modes() == Mode.ACT)
            & self.leading()
            & ~self._killed()
            & ~self._edited()
            & ~self._owned()
            & ~self._unread()
        )
        return np.asarray(acting, bool)

    def _stops(self, modes: npt.NDArray[Any]) -> list[tuple[Bools, Reason]]:
        acting = modes == Mode.ACT
        return [
            (~self.leading(), Reason.NOT_LEADER),
            (self._killed(), Reason.KILL_SWITCH),
            (np.asarray(modes == Mode.PAUSED, bool), Reason.PAUSED),
            (self._owned() & acting, Reason.OTHER_AUTOSCALER),
            (self._unread() & acting, Reason.OWNER_UNKNOWN),
            (self._edited() & acting, Reason.FOREIGN_EDIT),
        ]

    def _killed(self) -> Bools:
        return np.array([bool(reason) for reason in self._heartbeat.killed()], bool)

    def _owned(self) -> Bools:
        return np.array([bool(owner) for owner in self._world().owners], bool)

    def _unread(self) -> Bools:
        """(n,) where nobody knows whether another autoscaler acts: what cannot be read forbids."""
        rows = np.zeros(len(self.services), bool)
        rows[list(self._world().owners_unread)] = True
        return rows

    def _edited(self) -> Bools:
        """(n,) where somebody's edit is to be left alone."""
        return self._edits.standing(self._clock.now_s, self._ordered_s())

    def _ordered_s(self) -> Floats:
        return np.asarray(self._heartbeat.pulse.ordered_s)
