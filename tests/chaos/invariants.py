"""What must hold after every tick, in either world.

This module must not know how a world finds out what it reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from policies.spec import GuardrailSpec
from tests.chaos.schedule import Schedule

RECOVERY_TICKS = 2
"""After the end of a fault and of what follows from it."""
UNEXPLAINED = {"missing_metrics", "actuation_failed", "not_recorded", "owner_unknown"}
"""Reasons that say what was missing and not why: the cause must be among the problems."""
STOPS = {
    *("missing_metrics", "policy_failed", "actuation_failed", "not_recorded", "overdue", "not_leader", "paused"),
    *("kill_switch", "foreign_edit", "other_autoscaler", "owner_unknown"),
}
"""Reasons that something is wrong or ordered; a service that waits for its second look is held without one."""
DOLLARS_WITHIN, UNKNOWN_WITHIN = 0.01, 0.25
"""Of the bill; and of what ran while replicas could not be counted, which is billed as it was last seen."""


@dataclass(frozen=True)
class Write:
    """A replica count that the controller wrote.

    Attributes:
        before: in force until then; None where nobody knows.
        after: written.
        recorded: whether a decision with this count stood in the database by then.
    """

    before: int | None
    after: int
    recorded: bool


@dataclass(frozen=True)
class ServiceLook:
    """One service at one tick.

    Attributes:
        outcome: of its decision; empty where there was none.
        reasons: of its decision, in words.
        writes: counts written since the last tick.
        forbidden: why no controller may write it now, throughout the tick; empty where one may.
        blind: nothing could be measured throughout the tick.
        burning: the window that the decision saw missed the objectives.
        low: fewest replicas.
        high: most replicas.
    """

    outcome: str
    reasons: tuple[str, ...]
    writes: tuple[Write, ...]
    forbidden: str
    blind: bool
    burning: bool
    low: int
    high: int


@dataclass(frozen=True)
class Look:
    """All that was seen of one tick.

    Attributes:
        tick: its number.
        services: by name, in the order of the schedule's rows.
        problems: what the controller says is wrong.
        error: what ended the tick, empty where nothing did.
        foreign: objects of somebody else that the controller wrote, in words.
        lost: requests that were lost although a replica could have served them, in words.
    """

    tick: int
    services: dict[str, ServiceLook]
    problems: tuple[str, ...] = ()
    error: str = ""
    foreign: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass
class Invariants:
    """Judges the ticks of one run.

    Args:
        schedule: the faults.
        guardrails: whose step limits hold.
        recovery_ticks: after a fault; more where ticks are seen late.
    """

    schedule: Schedule
    guardrails: GuardrailSpec
    recovery_ticks: int = RECOVERY_TICKS
    found: list[str] = field(default_factory=list)
    """Every violation, in words, with its tick."""

    def judge(self, look: Look) -> list[str]:
        """The violations of one tick."""
        new = [f"the tick ended in an error: {look.error}"] if look.error else []
        new += [f"somebody else's object was written: {what}" for what in look.foreign]
        new += [f"a request was lost: {what}" for what in look.lost]
        for row, (name, service) in enumerate(look.services.items()):
            new += [f"{name}: {what}" for what in self._service(row, service, look)]
        new = [f"tick {look.tick}: {what}" for what in new]
        self.found += new
        return new

    def judge_dollars(self, billed: float, truth: float, unknown: float, what: str) -> None:
        """The bill against what ran, and what of it ran while nobody could count it."""
        if not abs(billed - truth) <= DOLLARS_WITHIN * truth + UNKNOWN_WITHIN * unknown:
            self.found.append(
                f"{what}: billed {billed:.4f} $, ran for {truth:.4f} $ ({billed / truth - 1:+.1%}), "
                f"{unknown:.4f} $ of it unseen"
            )

    def _service(self, row: int, service: ServiceLook, look: Look) -> list[str]:
        found = []
        for write in service.writes:
            found += self._write(service, write)
        if service.outcome == "held":
            if not service.reasons:
                found.append("held without a reason")
            if UNEXPLAINED & set(service.reasons) and not look.problems:
                found.append(f"held for {', '.join(service.reasons)}, and no problem names the cause")
        if not self.schedule.trouble(look.tick, row, self.recovery_ticks) and look.tick > self.recovery_ticks:
            if not service.outcome:
                found.append(f"no decision although nothing is wrong; problems: {list(look.problems)}")
            elif service.outcome == "held" and ("revalidating" not in service.reasons or STOPS & set(service.reasons)):
                found.append(f"held ({', '.join(service.reasons)}) although nothing is wrong: {list(look.problems)}")
        return found

    def _write(self, service: ServiceLook, write: Write) -> list[str]:
        change = f"{write.before} -> {write.after}"
        found = []
        if service.forbidden:
            found.append(f"wrote {change} although {service.forbidden}")
        if not write.recorded:
            found.append(f"wrote {change} without a recorded decision")
        if write.before is None:
            return found
        by_maximum = write.before > service.high and write.after >= service.high
        if write.after < write.before and not by_maximum:
            if service.blind:
                found.append(f"scaled down {change} while blind")
            if service.burning:
                found.append(f"scaled down {change} while burning")
        if write.after < service.low or (write.after > service.high and write.after >= write.before):
            found.append(f"wrote {change}, bounds {service.low} to {service.high}")
        rails = self.guardrails
        step_down = max(math.ceil(write.before * rails.max_scale_down_share), 1)
        top = max(math.floor(write.before * rails.max_scale_up_factor), write.before + rails.max_scale_up_step)
        if write.after < write.before - step_down or write.after > max(top, service.low):
            found.append(f"wrote {change} in one step")
        return found
