import math

import pytest
from judged_rows import ROWS, scenario_of, scored

from training.judging.evaluate import Evaluation
from training.judging.head_to_head import head_to_heads, misses
from training.judging.standings import FLAT_FIELDS, best_peer, flat_rows, geometric_mean, scenario_rows, standings_of
from training.pages.scoreboard import page
from training.replaying.scores import REFERENCE


@pytest.fixture
def judged() -> Evaluation:
    return Evaluation("toy", ROWS, (scenario_of(),), (), {"jevons": "1"})


def test_flat_rows_have_exactly_the_documented_fields_and_ratios_of_dollars(judged):
    rows = flat_rows(judged)
    assert {tuple(row) for row in rows} == {FLAT_FIELDS}
    assert [(row["policy"], row["tuned"], row["cost_vs_plan"], row["cost_vs_best_peer"]) for row in rows] == [
        ("hpa", "default", 3.0, 30 / 18),
        ("hpa", "train", 1.8, 1.0),
        ("hpa", "hindsight", 1.2, 12 / 18),
        ("knative", "default", None, None),
        ("reactive", "self", 1.5, 15 / 18),
        ("bound", "reference", 0.8, 8 / 18),
        ("plan", "reference", 1.0, 10 / 18),
    ]


def test_a_row_that_misses_the_slo_is_not_compared(judged):
    missed = flat_rows(judged)[3]
    assert (missed["holds_slo"], missed["cost_vs_plan"], missed["cost_vs_bound"]) == (False, None, None)


def test_the_best_peer_needs_no_foresight_unless_asked(judged):
    rows = scenario_rows(judged)
    assert best_peer(rows)["tuned"] == "train"
    assert best_peer(rows, ("hindsight",))["usd"] == 12.0
    assert best_peer([row for row in rows if row["tuned"] == "self"]) is None


def test_over_scenarios_means_are_geometric_and_say_how_many_were_held():
    rows = [
        *(scored("plan", 10.0, tuned=REFERENCE, scenario=name) for name in ("one", "two", "three")),
        scored("hpa", 20.0, scenario="one"),
        scored("hpa", 80.0, scenario="two"),
        scored("hpa", 1.0, holds=False, scenario="three"),
    ]
    scenarios = tuple(scenario_of(name) for name in ("one", "two", "three"))
    judged = Evaluation("toy", tuple(rows), scenarios, ())
    plan, hpa = standings_of(scenario_rows(judged), scenarios, "generated")
    assert (plan.policy, hpa.held, hpa.scenarios) == ("plan", 2, 3)
    mean, low, high = hpa.cost_vs_plan
    assert (mean, low, high) == (pytest.approx(4.0), pytest.approx(2.0), pytest.approx(8.0))


def test_a_scenario_that_not_even_the_plan_holds_counts_for_nobody():
    scenarios = (scenario_of(servable=False),)
    judged = Evaluation("toy", (scored("hpa", 1.0),), scenarios, ())
    assert standings_of(scenario_rows(judged), scenarios, "generated") == []


def test_the_mean_of_nothing_is_none():
    assert geometric_mean([]) is None


def test_the_page_names_the_best_peer_by_tuning_beside_plan_and_bound(judged):
    text = page(judged.to_json())
    assert "| one | 4.000 (0.80) | 5.000 (1.00) | 15.000 (3.00) hpa | 9.000 (1.80) hpa | 6.000 (1.20) hpa |" in text
    assert "| knative | peer | 0/1 |" in text


def test_the_page_labels_scenarios_that_cannot_be_held_or_were_skipped():
    details = Evaluation(
        "toy", ROWS, (scenario_of(servable=False),), (), skipped=({"name": "real", "reason": "needs recorded traces"},)
    ).to_json()
    text = page(details)
    assert "Not even the clairvoyant plan holds the SLO of: one." in text
    assert "| real | skipped: needs recorded traces |  |  |" in text


def against(rows, sources=("generated", "generated"), suite="toy"):
    names = ("one", "two")[: len(sources)]
    scenarios = tuple(scenario_of(name, source) for name, source in zip(names, sources, strict=True))
    named = dict.fromkeys(row.policy for row in rows)
    policies = tuple({"policy": name, "bundle_digest": None, "engines": ["e"]} for name in named)
    return Evaluation(suite, tuple(rows), scenarios, policies, {"jevons": "1"})


def test_the_learned_policy_is_compared_where_both_hold_and_with_the_cheapest_of_each_group():
    judged = against(
        [
            scored("learned", 8.0),
            scored("hpa", 20.0),
            scored("hpa", 10.0, tuned="train"),
            scored("static", 16.0, tuned="train"),
            scored("reactive", 3.0),
            scored("reactive", 4.0, tuned="self"),
            scored("plan", 5.0, tuned=REFERENCE),
            scored("learned", 9.0, scenario="two"),
            scored("hpa", 1.0, holds=False, tuned="train", scenario="two"),
            scored("static", 18.0, tuned="train", scenario="two"),
        ],
        sources=("generated", "real"),
    )
    found = {item.opponent: item for item in head_to_heads(judged.by_scenario(), judged.scenarios)}
    best = found["the best tuned peer"]
    assert (best.held, best.both) == (2, 2)
    assert best.cost[0] == pytest.approx(math.sqrt(0.8 * 0.5))
    assert (best.by_part["generated traffic"][0], best.by_part["recorded traffic"][0]) == pytest.approx((0.8, 0.5))
    assert found["the best peer as it ships"].cost[0] == pytest.approx(0.4)  # the rule of our own is no peer
    assert found["hpa (train)"].cost[0] == pytest.approx(0.8)
    assert (found["hpa (train)"].held, found["static (train)"].held) == (1, 2)
    assert found["the best self-tuned peer or rule"].cost[0] == pytest.approx(2.0)
    assert found["the clairvoyant plan"].cost[0] == pytest.approx(1.6)
    assert "the best peer in hindsight" not in found  # nothing was tuned so
    assert "learned" not in found


def test_engines_of_the_training_are_told_from_others_and_a_page_without_plans_compares_with_the_best_peer():
    rows = [scored("learned", 8.0), scored("hpa", 10.0, tuned="train"), scored("learned", 9.0, scenario="two")]
    judged = against([*rows, scored("hpa", 6.0, tuned="train", scenario="two")], ("real", "real"))
    judged.scenarios[1]["pools"][0]["engine"] = "new"
    best = head_to_heads(judged.by_scenario(), judged.scenarios, trained=["e"])[0]
    assert best.by_part["engines of its training"][0] == pytest.approx(0.8)
    assert best.by_part["other engines"][0] == pytest.approx(1.5)
    text = page(judged.to_json())
    assert "| over | it holds | both hold | cost | cost, tuned | engines of its training | other engines |" in text
    assert "the best of each kind" in text
    assert "| hpa | peer |  | 2/2: 1.00 (1.00 to 1.00) |" in text
    assert "plan" not in text.partition("## Recorded")[0]
    assert all(item.by_part["other engines"] is None for item in head_to_heads(judged.by_scenario(), judged.scenarios))


def test_the_tuned_learned_policy_has_a_column_of_its_own_and_stands_in_for_nobody():
    rows = [scored("learned", 8.0), scored("learned", 2.0, tuned="train"), scored("hpa", 10.0, tuned="train")]
    judged = against(rows, ("generated",))
    best, single = head_to_heads(judged.by_scenario(), judged.scenarios)
    assert (best.opponent, single.opponent) == ("the best tuned peer", "hpa (train)")
    assert (best.cost[0], best.cost_tuned[0]) == pytest.approx((0.8, 0.2))
    text = page(judged.to_json())
    assert "| cost, tuned |" in text
    assert "| hpa (train) | 1 | 1 | 0.80 | 0.20 |" in text
    missing = against([scored("learned", 8.0, holds=False), scored("learned", 2.0, tuned="train")], ("generated",))
    assert [item.scenario for item in misses(missing.by_scenario(), missing.scenarios)] == ["one"]


def test_a_scenario_that_the_learned_policy_misses_is_named_and_not_compared():
    judged = against(
        [
            scored("learned", 8.0, holds=False),
            scored("hpa", 10.0, tuned="train"),
            scored("hpa", 2.0, tuned="hindsight"),
            scored("learned", 9.0, holds=False, scenario="two"),
        ]
    )
    (best, hindsight, single) = head_to_heads(judged.by_scenario(), judged.scenarios)
    assert (best.held, best.both, best.cost) == (1, 0, None)
    assert (hindsight.opponent, single.opponent) == ("the best peer in hindsight", "hpa (train)")
    first, second = misses(judged.by_scenario(), judged.scenarios)
    assert (first.scenario, first.opponent, first.opponent_cost, first.plan_cost) == ("one", "hpa (train)", 1.25, None)
    assert (second.scenario, second.opponent, second.opponent_cost) == ("two", "", None)


def test_the_page_shows_opponents_and_misses_only_with_a_learned_policy(judged):
    assert "beside the others" not in page(judged.to_json())
    rows = [scored("learned", 8.0, holds=False), scored("hpa", 10.0, tuned="train")]
    text = page(against(rows, ("real",), "full").to_json())
    assert "| one | 50.0% of 95% | hpa (train) at 1.25 of its cost | - |" in text
    assert "Written by `make scoreboard SUITE=full TUNED=default,train POLICY=learned,hpa`" in text
