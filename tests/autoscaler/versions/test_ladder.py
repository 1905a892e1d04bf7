"""The fallback ladder: which rung speaks for a service, and why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from live_fakes import service_spec

from autoscaler.controller import nothing_known
from autoscaler.versions.ladder import FallbackLadder, LadderSpec, Rung
from autoscaler.versions.timed_answers import TimedAnswers
from policies.contract import Bools, Floats, Observation, Reason, Snapshot, Target
from policies.decider import Decider
from policies.fleet import Fleet
from policies.spec import WindowSpec

SPEC = service_spec()
LIMIT_S = 60.0


class Says:
    """Always the same number of replicas; raises when it is None."""

    def __init__(self, name: str, replicas: int | None, distance: float = 0.0) -> None:
        self.name = name
        self.replicas = replicas
        self.far = distance

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def distance(self, features: object) -> Floats:
        return np.array([self.far])

    def propose(self, observation: Observation) -> Target:
        if self.replicas is None:
            raise ZeroDivisionError
        return Target(np.array([[self.replicas]]), np.array([[64]]))


def seen(**values: float) -> Observation:
    """A healthy window of four replicas."""
    decider = Decider(Fleet.from_specs([SPEC]), WindowSpec(), SPEC.guardrails)
    blank = nothing_known(100.0, 15.0, decider)
    healthy = {"ttft_attainment": 1.0, "tpot_attainment": 1.0, "replicas_target": 4.0, "replicas_ready": 4.0}
    numbers = {**healthy, "batch_cap": 64.0, "time_s": 100.0, "window_s": 15.0, **values}
    snapshot = Snapshot(
        **{name: np.full_like(getattr(blank, name), numbers.get(name, 0.0)) for name in Snapshot.__dataclass_fields__}
    )
    return replace(decider.observe(snapshot), features=np.zeros((1, 1), np.float32))


def ladder(learned: Says | None, baseline: Says, **spec: float) -> FallbackLadder:
    made = FallbackLadder(Fleet.from_specs([SPEC]), baseline, LadderSpec(**spec), TimedAnswers(LIMIT_S))
    made.learned = learned  # type: ignore[assignment]
    made.wanted_learned = True
    return made


def answer(policy: FallbackLadder, observation: Observation) -> tuple[int, Rung, list[str]]:
    target = policy.propose(observation)
    return int(target.replicas[0, 0]), Rung(int(policy.rung[0])), Reason(int(policy.reasons[0])).words()


@pytest.mark.parametrize(
    ("learned", "baseline", "window", "expected"),
    [
        (Says("l", 6), Says("b", 5), {}, (6, Rung.LEARNED, [])),
        (None, Says("b", 5), {}, (5, Rung.BASELINE, ["bundle_refused"])),
        (Says("l", None), Says("b", 5), {}, (5, Rung.BASELINE, ["policy_failed"])),
        (Says("l", 6, distance=0.6), Says("b", 5), {}, (5, Rung.BASELINE, ["out_of_range"])),
        (Says("l", 6), Says("b", 5), {"kv_cache_usage": np.nan}, (5, Rung.BASELINE, ["partly_blind"])),
        (Says("l", None), Says("b", None), {}, (4, Rung.HOLD, ["policy_failed"])),
        (None, Says("b", None), {}, (4, Rung.HOLD, ["policy_failed"])),
        (Says("l", 6), Says("b", None), {}, (6, Rung.LEARNED, ["policy_failed"])),
        (Says("l", 6, distance=0.6), Says("b", None), {}, (4, Rung.HOLD, ["policy_failed", "out_of_range"])),
        # A blind window is the guardrails' business: they hold whoever proposes.
        (Says("l", 6), Says("b", 5), {"running": np.nan}, (6, Rung.LEARNED, [])),
    ],
)
def test_the_rung_and_its_reason(
    learned: Says | None, baseline: Says, window: dict[str, float], expected: tuple[int, Rung, list[str]]
) -> None:
    assert answer(ladder(learned, baseline), seen(**window)) == expected


def test_a_policy_that_shrinks_while_objectives_burn_is_dropped_until_they_stop() -> None:
    policy = ladder(Says("l", 2), Says("b", 8), burning_ticks=3)
    burning, healthy = seen(ttft_attainment=0.5), seen()
    found = [answer(policy, burning) for _ in range(5)] + [answer(policy, healthy) for _ in range(2)]
    dropped = (8, Rung.BASELINE, ["burning_while_shrinking"])
    kept = (2, Rung.LEARNED, [])
    assert found == [kept, kept, dropped, dropped, dropped, kept, kept]


def test_a_policy_that_grows_while_objectives_burn_is_kept() -> None:
    policy = ladder(Says("l", 9), Says("b", 8), burning_ticks=3)
    assert [answer(policy, seen(ttft_attainment=0.5))[1] for _ in range(6)] == [Rung.LEARNED] * 6


def test_the_streak_survives_a_restart() -> None:
    policy = ladder(Says("l", 2), Says("b", 8), burning_ticks=3)
    burning = seen(ttft_attainment=0.5)
    for _ in range(2):
        answer(policy, burning)
    again = ladder(Says("l", 2), Says("b", 8), burning_ticks=3)
    again.restore(policy.state())
    assert answer(again, burning) == (8, Rung.BASELINE, ["burning_while_shrinking"])


def test_an_answer_of_the_wrong_shape_is_a_failure() -> None:
    class Wide(Says):
        def propose(self, observation: Observation) -> Target:
            return Target(np.ones((2, 2), np.int64), np.ones((2, 2), np.int64))

    assert answer(ladder(Wide("l", 1), Says("b", 5)), seen()) == (5, Rung.BASELINE, ["policy_failed"])
