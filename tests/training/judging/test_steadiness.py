"""The learned policy that ships at a constant load, through the controller that ships."""

from __future__ import annotations

from policies.lineup import resolve
from policies.spec import GuardrailSpec
from training.judging.scenario_runs import DEFAULT, Variant
from training.judging.steadiness import FREE, MIXES, cost_work, measure
from training.replaying.scenarios import load_suite


def test_fleet_settles_at_a_constant_load_and_holds_its_objectives() -> None:
    learned = resolve("learned")
    loads = (1.0, 1.5, 2.5, 4.0)
    rows = measure(learned, MIXES["chat"], loads, seeds=2, hours=4.0)
    free = measure(learned, MIXES["chat"], loads, seeds=2, hours=4.0, guardrails=GuardrailSpec(**FREE))
    assert [row.load for row in rows if row.changes_per_hour > 1.0 or not row.holds_slo] == []
    assert [row.load for row in rows if row.cap_changes_per_hour > 12.0] == []
    assert max(row.changes_per_hour for row in free) > 4.0
    assert max(row.cap_changes_per_hour for row in free) > 120.0
    assert max(row.reversals_per_hour for row in free) > 4.0


def test_cost_on_a_suite_is_that_of_the_guardrail_alone() -> None:
    suite = load_suite("smoke")
    entry = resolve("hpa")
    work = cost_work(suite, Variant("hpa", DEFAULT, entry))
    assert [item.treatment.name for item in work] == ["free", "steady"] * len(suite.scenarios)
    for free, steady in zip(work[::2], work[1::2], strict=True):
        assert steady.scenario in suite.scenarios
        changed = {
            name
            for name, value in free.scenario.guardrails.model_dump().items()
            if value != getattr(steady.scenario.guardrails, name)
        }
        assert changed == set(FREE)
        assert free.scenario.model_copy(update={"guardrails": steady.scenario.guardrails}) == steady.scenario
