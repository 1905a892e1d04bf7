from dataclasses import replace

import pytest

from policies.spec import GuardrailSpec
from tests.chaos.invariants import Invariants, Look, ServiceLook, Write
from tests.chaos.schedule import Event, Schedule

WELL = ServiceLook("scaled", ("backlog",), (Write(2, 3, True),), "", False, False, 1, 10)
TROUBLED = Schedule(0, 100, (Event("metrics down", -1, 40, 10, 0.5),))


def judged(tick: int = 45, service: ServiceLook = WELL, **look: object) -> list[str]:
    return Invariants(TROUBLED, GuardrailSpec()).judge(Look(tick, {"chat": service}, **look))  # type: ignore[arg-type]


def wrote(before: int, after: int, **changes: object) -> ServiceLook:
    return replace(WELL, writes=(Write(before, after, True),), **changes)  # type: ignore[arg-type]


def held(*reasons: str) -> ServiceLook:
    return replace(WELL, outcome="held", reasons=reasons, writes=())


def test_what_is_well_breaks_nothing() -> None:
    for tick in (30, 45, 80):
        assert judged(tick) == []
    assert judged(45, held("missing_metrics"), problems=("read: HTTP 401",)) == []
    assert judged(51, held("missing_metrics"), problems=("read: HTTP 401",)) == []
    assert judged(80, held("revalidating", "cooldown")) == []
    assert judged(45, wrote(4, 2)) == []
    assert judged(45, wrote(40, 20, blind=True, burning=True)) == []  # the maximum alone takes them away


@pytest.mark.parametrize(
    ("said", "service", "look"),
    [
        ("the tick ended in an error", WELL, {"error": "KeyError: 'value'"}),
        ("somebody else's object was written", WELL, {"foreign": ("Deployment other 1 -> 2",)}),
        ("a request was lost", WELL, {"lost": ("chat: status 503",)}),
        ("although the kill file is there", replace(WELL, forbidden="the kill file is there"), {}),
        ("without a recorded decision", replace(WELL, writes=(Write(2, 3, False),)), {}),
        ("while blind", wrote(4, 3, blind=True), {}),
        ("while burning", wrote(4, 3, burning=True), {}),
        ("bounds 1 to 10", wrote(1, 0), {}),
        ("bounds 1 to 10", wrote(9, 11), {}),
        ("in one step", wrote(1, 6), {}),
        ("in one step", wrote(9, 3), {}),
        ("held without a reason", held(), {}),
        ("no problem names the cause", held("missing_metrics", "bounds"), {}),
    ],
)
def test_each_breach_is_named(said: str, service: ServiceLook, look: dict[str, object]) -> None:
    (found,) = judged(45, service, **look)
    assert said in found
    assert found.startswith("tick 45: ")


def test_two_ticks_after_a_fault_nothing_may_be_held_for_it() -> None:
    assert judged(52, held("missing_metrics"), problems=("read: HTTP 401",)) != []
    assert judged(52, held("paused")) != []
    assert judged(52, replace(WELL, outcome="", reasons=(), writes=())) != []


def test_dollars_are_those_of_what_ran_within_a_per_cent() -> None:
    invariants = Invariants(TROUBLED, GuardrailSpec())
    invariants.judge_dollars(100.9, 100.0, 0.0, "dollars")
    invariants.judge_dollars(95.0, 100.0, 20.0, "dollars")
    assert invariants.found == []
    invariants.judge_dollars(98.9, 100.0, 0.0, "dollars")
    invariants.judge_dollars(float("nan"), 100.0, 0.0, "dollars")
    assert len(invariants.found) == 2
