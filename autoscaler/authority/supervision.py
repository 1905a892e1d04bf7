"""What becomes of a decision at a tick: which rows may be carried out, and why the others are held or advised.

Who may act is `autoscaler.authority.permission`'s to say; it is asked when the decision is made, and again immediately
before it is carried out. A scale-down is looked at twice. Nothing here reads metrics or changes a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from autoscaler.actuators.base import FleetState
from autoscaler.authority.controls import Mode
from autoscaler.authority.foreign_edits import ForeignEdits
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.leases import NOT_HELD
from autoscaler.authority.permission import Authority, Clocks, Hold, World
from autoscaler.authority.revalidation import Revalidation, RevalidationSpec
from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.ladder import FallbackLadder, Rung
from policies.contract import Bools, Decision, Floats, Observation, Outcome, Reason, Snapshot
from policies.decider import Decider
from policies.engine import NonNegative, Positive, StrictModel
from policies.guardrails import burning
from policies.pool_arrays import any_pool, sum_pools


class SupervisionSpec(StrictModel):
    """What must be so before a target is carried out."""

    edit_hold_s: NonNegative = Field(
        default=900.0, description="A manual edit is left alone for this long after the last one, seconds."
    )
    edit_hold_yields_to_slo: bool = Field(
        default=True,
        description="The hold of an edit ends early when objectives are missed and more replicas are asked for than "
        "somebody has set. A pause never ends by itself.",
    )
    revert_s: Positive = Field(
        default=300.0,
        description="A count of ours that somebody replaces within this time was put back; the second in a row makes "
        "an owner of them, and the service is held until an order, seconds.",
    )
    max_reading_age_s: NonNegative = Field(
        default=2.0,
        description="What is in force, and who owns it, is read again before acting when it is older, seconds.",
    )
    max_decision_age_s: Positive = Field(
        default=30.0, description="A decision that is older than this when its turn comes is not carried out, seconds."
    )
    revalidation: RevalidationSpec = Field(default=RevalidationSpec(), description="The second look at a scale-down.")


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
        world: World,
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
        self._began_s = -np.inf
        self._readings = 0  # of the world, as of the end of the last tick
        self._edits = ForeignEdits(decider.fleet.exists, spec.edit_hold_s, spec.revert_s)
        self.authority = Authority(heartbeat, self._edits, world, clock, spec.max_decision_age_s)

    # Supervisor

    def begin(self, snapshot: Snapshot) -> Bools:
        """Look for edits by others; the services on which this controller does not act."""
        self._began_s = self._clock.now_s
        untold = self._edits.untold() & (not self._look().edits_put_back)
        return ~self.authority.ask(self._began_s).granted | untold

    def judge(self, decision: Decision, observation: Observation) -> Decision:
        """Hold what must not be written or is due a second look, and mark what is only advised."""
        peers = self._counterfactuals.of_peers(observation, self._decider)
        held = (decision.outcome == Outcome.HELD) | (self._ladder.rung == Rung.HOLD)
        yielded = self._yield(decision, observation, ~held)
        permission = self.authority.ask(self._began_s)
        modes = permission.modes
        reasons = decision.reasons | self._ladder.reasons | permission.reasons
        # The core names a rule only where it changed the proposal; a held row must say why it is held in any case.
        reasons = np.where(observation.blind, reasons | int(Reason.MISSING_METRICS), reasons)
        held = held | permission.stopped
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
        holds = self.authority.holds(permission)
        details: dict[str, npt.NDArray[Any]] = {
            "mode": modes,
            "token": np.where(self.leading(), self._heartbeat.pulse.tokens, NOT_HELD),
            "rung": self._ladder.rung.copy(),
            "distance": self._ladder.distance.copy(),
            "in_force": self._decider.before().replicas.copy(),
            "demand": observation.demand,
            **_told(holds, yielded, np.full(len(holds), np.nan)),
            **self._counterfactuals.own(settled, observation),
            **peers,
        }
        return replace(decision, settled=settled, reasons=reasons, outcome=outcome, details=details)

    def permitted(self, decision: Decision) -> Decision:
        """The same question again at the last moment, with the newest orders and a recent look at the world.

        What was only advised stays so. The world is looked at in every tick, also in one that could not measure
        anything: who edits, who owns and what is paid for does not hang on measurements.
        """
        self._heartbeat.hear()
        asked = decision.outcome != Outcome.ADVISED
        acts, seen = (asked & (decision.outcome != Outcome.HELD)).any(), self._world.readings != self._readings
        if acts or not seen:
            self._world.recent(self.spec.max_reading_age_s if seen else 0.0)
            self._look()
        permission = self.authority.ask(self._began_s)
        reasons = np.where(asked, decision.reasons | permission.reasons, decision.reasons)
        outcome = np.where(asked & permission.stopped, Outcome.HELD, decision.outcome)
        outcome = np.where((outcome != Outcome.HELD) & (permission.modes == Mode.ADVISE), Outcome.ADVISED, outcome)
        told = _told(self.authority.holds(permission), decision.details["hold"], decision.details["hold_until_s"])
        return replace(decision, outcome=outcome, reasons=reasons, details={**decision.details, **told})

    def finish(self, decision: Decision, seconds: dict[str, float]) -> None:
        """Remember what was carried out."""
        self._readings = self._world.readings
        done = (decision.outcome == Outcome.SCALED) | (decision.outcome == Outcome.UNCHANGED)
        failed = (decision.reasons & int(Reason.ACTUATION_FAILED)) != 0
        self.revalidation.keep(failed | ((decision.reasons & int(Reason.DRAINING)) != 0))
        in_force, wrote = self._world.last.replicas_target, self._world.wrote()
        self._edits.carried_out(decision.settled.replicas, in_force, wrote, done, failed, self._clock.now_s)
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

    # Who acts

    def leading(self) -> Bools:
        """(n,) services that are this controller's to act on."""
        return self.authority.leading()

    def holds(self) -> list[Hold | None]:
        """(n,) what forbids each service to be written now; None where nothing does."""
        return self.authority.holds()

    def _look(self) -> FleetState:
        """Look for edits in the last reading; what it said."""
        world = self._world.last
        self._edits.look(world.replicas_target, self._clock.now_s, self.authority.orders(), world.edits_put_back)
        return world

    def _yield(self, decision: Decision, observation: Observation, decided: Bools) -> list[str]:
        """End the holds of edits that leave objectives missed where more is asked for; (n,) which were, in words."""
        ended = np.zeros(len(self.services), bool)
        if self.spec.edit_hold_yields_to_slo:
            standing = self._edits.standing(self._clock.now_s, self.authority.orders())
            snapshot = observation.snapshot
            unserved = (sum_pools(snapshot.replicas_ready) == 0) & (snapshot.arrival_rps > 0)
            missed = (burning(observation, self._decider.fleet) | unserved) & ~observation.blind
            more = any_pool(decision.settled.replicas > self._decider.before().replicas)
            ended = standing & missed & more & decided
            self._edits.end(ended)
        return [
            f"replicas were set to {self._edits.value(row)}, which is left alone no longer: objectives are missed"
            if yields
            else ""
            for row, yields in enumerate(ended.tolist())
        ]


def _told(holds: Sequence[Hold | None], words: Iterable[str], until_s: Floats) -> dict[str, npt.NDArray[Any]]:
    """Holds for the record, (n,) each; `words` and `until_s` where there is none."""
    return {
        "hold": np.array([word if hold is None else hold.detail for hold, word in zip(holds, words, strict=True)]),
        "hold_until_s": np.array(
            [
                end if hold is None else np.nan if hold.until_s is None else hold.until_s
                for hold, end in zip(holds, until_s, strict=True)
            ]
        ),
    }
