"""In which state each service is, in one word, why, and until when: what an on-call engineer looks for first.

This module must not know where decisions are kept, nor how a state is shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from autoscaler.authority.controls import Mode
from autoscaler.records.explain import LACKING, MEANINGS, meaning, missing
from policies.contract import Decision, Floats, Outcome, Reason

GENERAL_FIRST = (
    Reason.NOT_LEADER,
    Reason.OTHER_AUTOSCALER,
    Reason.OWNER_UNKNOWN,
    Reason.FOREIGN_EDIT,
    Reason.NOT_RECORDED,
    Reason.OVERDUE,
    Reason.ACTUATION_FAILED,
    Reason.REVALIDATING,
)
"""Which of several reasons to hold is named: the one that must end before the others matter."""


class State(StrEnum):
    """What a service's scaling is doing."""

    READY = "ready"
    """Decided on; a target is carried out, or advised in advise mode."""
    BLIND = "blind"
    """Held, as what must be measured is missing."""
    HELD = "held"
    """Held for another reason."""
    PAUSED = "paused"
    """Held, as somebody ordered."""


@dataclass(frozen=True)
class ServiceState:
    """The state of one service.

    Attributes:
        state: in one word.
        reason: in one sentence; of a ready service what is worth knowing, else empty.
        until_s: Unix time at which it ends by itself, None where it does not or nobody knows.
    """

    state: State
    reason: str = ""
    until_s: float | None = None


def states_of(
    decision: Decision,
    services: Sequence[str],
    modes: Sequence[Mode],
    killed: Sequence[str],
    stage_errors: Mapping[str, str],
    failures: Mapping[str, str],
    problems: Sequence[str],
    cooldown_ends_s: Floats,
) -> list[ServiceState]:
    """(n,) states after a decision.

    Args:
        decision: the last one.
        services: names.
        modes: (n,) in force.
        killed: (n,) why the kill switch is engaged, empty where it is not.
        stage_errors: what went wrong in each stage of its tick.
        failures: why it could not be carried out, by service, where that is known of one.
        problems: what the last reading lacked, in words that name the service.
        cooldown_ends_s: (n,) Unix time from which on the next scale-down is allowed.
    """
    found = []
    for row, name in enumerate(services):
        reasons = Reason(int(decision.reasons[row]))
        if killed[row]:
            state = ServiceState(State.PAUSED, f"kill switch: {killed[row]}")
        elif modes[row] == Mode.PAUSED:
            state = ServiceState(State.PAUSED, f"paused by an order; `jevons resume {name}` ends it")
        elif decision.outcome[row] != Outcome.HELD:
            until_s = float(cooldown_ends_s[row]) if Reason.COOLDOWN in reasons else None
            measured = decision.snapshot.row(row) if reasons & LACKING else {}
            state = ServiceState(State.READY, "; ".join(meaning(one, measured) for one in reasons), until_s)
        elif Reason.MISSING_METRICS in reasons and not _about_owners(decision, row, reasons):
            state = ServiceState(State.BLIND, _blindness(decision, row, name, stage_errors, problems))
        else:
            own = {"act": failures[name]} if name in failures else {}
            state = _held(decision, row, reasons, {**stage_errors, **own})
        found.append(state)
    return found


def _about_owners(decision: Decision, row: int, reasons: Reason) -> bool:
    """Whether who may write matters first; where not even the counts could be read, an unread owner does not."""
    first = [one for one in GENERAL_FIRST[:4] if one in reasons]
    return bool(first) and (
        first != [Reason.OWNER_UNKNOWN] or "replicas_target" not in missing(decision.snapshot.row(row))
    )


def _blindness(
    decision: Decision, row: int, service: str, stage_errors: Mapping[str, str], problems: Sequence[str]
) -> str:
    """Why a service is blind: the stage that failed, else what its last reading says about it, and what it lacks."""
    if "read" in stage_errors:
        return stage_errors["read"]
    own = re.compile(rf"(?<![\w-]){re.escape(service)}(?![\w-])")
    about = [problem for problem in problems if own.search(problem)]
    said, lacks = about or list(problems)[:1], missing(decision.snapshot.row(row))
    return "; ".join([*(said or [MEANINGS[Reason.MISSING_METRICS]]), *([lacks] if lacks else [])])


def _held(decision: Decision, row: int, reasons: Reason, stage_errors: Mapping[str, str]) -> ServiceState:
    first = next((one for one in GENERAL_FIRST if one in reasons), next(iter(reasons), Reason.NONE))
    stage = {Reason.NOT_RECORDED: "record", Reason.ACTUATION_FAILED: "act", Reason.OVERDUE: "permit"}.get(first, "")
    detail = str(decision.details["hold"][row]) if "hold" in decision.details else ""
    until_s = float(decision.details["hold_until_s"][row]) if "hold_until_s" in decision.details else math.nan
    reason = stage_errors.get(stage) or detail or MEANINGS.get(first, "nobody has said why")
    return ServiceState(State.HELD, reason, until_s if math.isfinite(until_s) else None)
