"""What is worth telling those who watch the scaled objects: counts that change, and holds that begin.

Once per change and not once per tick; a hold that comes and goes is told now and then only. Nothing depends on it: what
cannot be told is a problem of its stage, and tried again.
This module must not know where it is told.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import numpy as np

from autoscaler.actuators.base import Announcement, Announces, LiveActuator
from autoscaler.authority.controls import Mode
from autoscaler.records.explain import MEANINGS, meaning
from autoscaler.stages import Stages, left_behind
from policies.contract import ActuationFailed, Bools, Decision, Ints, Outcome, Reason

TOLD = (
    Reason.KILL_SWITCH,
    Reason.OTHER_AUTOSCALER,
    Reason.OWNER_UNKNOWN,
    Reason.FOREIGN_EDIT,
    Reason.ACTUATION_FAILED,
    Reason.NOT_RECORDED,
    Reason.MISSING_METRICS,
)
"""Holds that are told, the most general first; what people have ordered for one service they know."""
UPWARDS = Reason.BACKLOG | Reason.GPU_BUDGET
KEPT = Reason.SLO_BURNING | Reason.REPLICAS_STARTING | Reason.COOLDOWN
"""Rules that only raise or limit a count, and rules that let nothing be given back: none explains a scale-down."""
LIMITS = Reason.STEP_LIMIT | Reason.STEADY_TRAFFIC | Reason.GPU_BUDGET | Reason.BOUNDS
"""Rules of which a pool that got what was proposed has felt nothing."""
AGAIN_S = 600.0
"""Shortest time between two announcements of the same hold of the same service."""

MAX_UNTOLD = 100
"""Announcements that wait for a server which does not take them; older ones are dropped."""


class Announcer:
    """Finds what to tell, and tells it where the actuator can.

    Args:
        exists: (n, P) True where a service has such a pool.
        actuator: what has objects to tell it beside.
        stages: bounds the time that telling may take.
        services: names.
        failures: why the last target of a service could not be carried out, by name, where that is known of one.
    """

    def __init__(
        self,
        exists: Bools,
        actuator: LiveActuator,
        stages: Stages,
        services: Sequence[str],
        failures: Callable[[], Mapping[str, str]],
    ) -> None:
        self._exists = exists
        self._actuator = actuator
        self._stages = stages
        self._services = tuple(services)
        self._failures = failures
        self._untold: deque[Announcement] = deque(maxlen=MAX_UNTOLD)
        self._lock = threading.Lock()  # of what is untold: a call that was left behind may come back at any time
        self._last: Ints = np.zeros(len(exists), np.int64)
        self._told_s: dict[tuple[int, Reason], float] = {}
        self._over_s: dict[tuple[int, str], float] = {}  # when a hold ended, by service and what it is told as

    def tell(self, decision: Decision | None, now_s: float) -> None:
        """Tell what is new in a decision that was carried out or held, and what could not be told before."""
        actuator = self._actuator
        if not isinstance(actuator, Announces):
            return
        if decision is not None:
            with self._lock:
                self._untold += self._new(decision, now_s)
        if self._untold:
            with suppress(Exception):  # named among the problems, whatever it is
                self._stages.run("announce", lambda: self._tell(actuator), ActuationFailed)

    def _tell(self, actuator: Announces) -> None:
        """All of it, one after the other; who has been left behind tells nothing more."""
        while not left_behind():
            with self._lock:
                if not self._untold:
                    return
                one = self._untold[0]
            actuator.announce(self._as_of_now(one))
            with self._lock:  # it may have been dropped meanwhile
                if self._untold and self._untold[0] is one:
                    self._untold.popleft()

    def _new(self, decision: Decision, now_s: float) -> list[Announcement]:
        # Of a standby's services the leader tells, and what is only advised changes nothing.
        acting = (decision.details["mode"] == Mode.ACT) & (decision.reasons & int(Reason.NOT_LEADER) == 0)
        held = np.where(acting & (decision.outcome == Outcome.HELD), decision.reasons, 0)
        begun, over, self._last = held & ~self._last, self._last & ~held, held
        for row in np.flatnonzero(begun | over).tolist():
            for reason in TOLD:
                if reason & int(over[row]):
                    self._over_s[row, _name(reason)] = now_s
                elif reason & int(begun[row]):
                    self._over_s.pop((row, _name(reason)), None)
        found = [one for row in np.flatnonzero(acting).tolist() for one in self._scaled(decision, row, now_s)]
        for row in np.flatnonzero(begun).tolist():
            for reason in TOLD:
                if reason & int(begun[row]) and now_s - self._told_s.get((row, reason), -np.inf) >= AGAIN_S:
                    self._told_s[row, reason] = now_s
                    failure = self._failures().get(self._services[row]) or self._stages.errors.get("act", "")
                    found.append(_hold(decision, row, reason, failure)._replace(at_s=now_s))
                    break
        return found

    def _as_of_now(self, one: Announcement) -> Announcement:
        """What could not be told while it lasted says until when it did."""
        over_s = self._over_s.get((one.row, one.reason)) if one.warning else None
        if over_s is None or over_s < one.at_s:
            return one
        return one._replace(note=f"{one.note}; it was so from {_clock(one.at_s)} to {_clock(over_s)} UTC")

    def _scaled(self, decision: Decision, row: int, now_s: float) -> list[Announcement]:
        if decision.outcome[row] != Outcome.SCALED:
            return []
        before, after = decision.details["in_force"][row], decision.settled.replicas[row]
        found = []
        for column in np.flatnonzero(self._exists[row] & (after != before)).tolist():
            up = bool(after[column] > before[column])
            # What was done in one pool has not all the reasons of the whole decision.
            silent = KEPT | (Reason.STEADY_TRAFFIC if up else UPWARDS)
            if after[column] == decision.proposed.replicas[row, column]:
                silent |= LIMITS
            told = int(decision.reasons[row]) & ~int(silent)
            measured = decision.snapshot.row(row)
            why = "; ".join(meaning(reason, measured) for reason in MEANINGS if reason & told)
            note = f"from {before[column]} to {after[column]} replicas by {decision.policy}" + (
                f": {why}" if why else ""
            )
            found.append(Announcement(row, column, False, "ScaledUp" if up else "ScaledDown", note, now_s))
        return found


def _hold(decision: Decision, row: int, reason: Reason, failure: str) -> Announcement:
    detail = str(decision.details["hold"][row])
    if reason is Reason.ACTUATION_FAILED:
        detail = failure
    return Announcement(row, None, True, _name(reason), detail or meaning(reason, decision.snapshot.row(row)))


def _name(reason: Reason) -> str:
    return "".join(part.capitalize() for part in reason.words()[0].split("_"))


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%H:%M:%S")
