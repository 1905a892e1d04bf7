"""What the learned policy costs beside one opponent at a time, on the scenarios that both hold.

An opponent is one policy with one way of tuning, or the cheapest of a group *per scenario*: nobody runs that one, and
nobody knows beforehand which it will be, so it is the hardest to beat.
This module must not know how figures are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from policies.lineup import is_peer, is_rule
from training.judging.scenario_runs import DEFAULT, label
from training.judging.standings import cheapest, geometric_mean
from training.replaying.scores import REFERENCE

Row = dict[str, Any]
Interval = tuple[float, float, float]
LEARNED = "learned"
PARTS: dict[str, Callable[[Row, Collection[str]], bool]] = {
    "generated traffic": lambda scenario, _: scenario["source"] == "generated",
    "recorded traffic": lambda scenario, _: scenario["source"] == "real",
    "engines of its training": lambda scenario, trained: _engines(scenario) <= set(trained),
    "other engines": lambda scenario, trained: bool(trained) and not _engines(scenario) <= set(trained),
}
"""Parts of the scenarios, by their traffic and by whether the learned policy was trained on their engines."""


def _engines(scenario: Row) -> set[str]:
    return {pool["engine"] for pool in scenario["pools"]}


def _tuned(*modes: str) -> Callable[[Row], bool]:
    return lambda row: row["tuned"] in modes and row["policy"] != LEARNED


def _only(policy: str, tuned: str) -> Callable[[Row], bool]:
    return lambda row: row["policy"] == policy and row["tuned"] == tuned


_shipped, _trained = _only(LEARNED, DEFAULT), _only(LEARNED, "train")
GROUPS: dict[str, Callable[[Row], bool]] = {
    "the best peer as it ships": lambda row: row["tuned"] == DEFAULT and is_peer(row["policy"]),
    "the best tuned peer": lambda row: _tuned("train")(row) and is_peer(row["policy"]),
    "the best self-tuned peer or rule": _tuned("self"),
    "the best tuned rule of our own": lambda row: _tuned("train")(row) and is_rule(row["policy"]),
    "the best peer in hindsight": lambda row: _tuned("hindsight")(row) and is_peer(row["policy"]),
    "the best static fleet in hindsight": _only("best-static", REFERENCE),
    "the clairvoyant plan": _only("plan", REFERENCE),
}


@dataclass(frozen=True)
class HeadToHead:
    """The learned policy against one opponent.

    Attributes:
        opponent: in words.
        held: scenarios whose SLO the opponent holds.
        both: scenarios whose SLO both hold.
        cost: of the learned policy over the opponent's there, geometric mean and bootstrap interval over scenarios;
            None where there are none.
        by_part: the same on each of `PARTS` alone.
        cost_tuned: the same where the learned policy, too, was tuned on the train slice; None where it was not.
    """

    opponent: str
    held: int
    both: int
    cost: Interval | None
    by_part: dict[str, Interval | None]
    cost_tuned: Interval | None


@dataclass(frozen=True)
class Miss:
    """A scenario whose SLO the learned policy misses.

    Attributes:
        scenario: its name.
        attainment: of the learned policy, a share.
        target: what the SLO asks for, a share.
        opponent: the cheapest that holds it without foresight, in words; empty where none does.
        opponent_cost: its dollars over the learned policy's; None where none holds.
        plan_cost: dollars of the clairvoyant plan over the learned policy's; None where it was not searched.
    """

    scenario: str
    attainment: float
    target: float
    opponent: str
    opponent_cost: float | None
    plan_cost: float | None


def head_to_heads(rows: Sequence[Row], scenarios: Sequence[Row], trained: Collection[str] = ()) -> list[HeadToHead]:
    """Against the best of every group first, then one by one; empty where the learned policy was not judged.

    Args:
        rows: `Evaluation.by_scenario`.
        scenarios: as an `Evaluation` describes them.
        trained: engines that the learned policy was trained on.
    """
    singles = sorted({(row["policy"], row["tuned"]) for row in rows if _tuned("train", "self")(row)})
    opponents = GROUPS | {label(policy, tuned): _only(policy, tuned) for policy, tuned in singles}
    if not any(_shipped(row) for row in rows):
        return []
    found = (_against(name, belongs, rows, scenarios, trained) for name, belongs in opponents.items())
    return [item for item in found if item.held]


def misses(rows: Sequence[Row], scenarios: Sequence[Row]) -> list[Miss]:
    """Where the learned policy misses, and who holds there."""
    found = []
    for scenario in scenarios:
        own = [row for row in rows if row["scenario"] == scenario["name"]]
        learned = next(filter(_shipped, own), None)
        if learned is None or learned["holds_slo"]:
            continue
        opponent = cheapest(row for row in own if _tuned("default", "train", "self")(row))
        plan = cheapest(row for row in own if GROUPS["the clairvoyant plan"](row))
        found.append(
            Miss(
                scenario["name"],
                learned["attainment"],
                scenario["slo"]["attainment"],
                "" if opponent is None else label(opponent["policy"], opponent["tuned"]),
                None if opponent is None else opponent["usd"] / learned["usd"],
                None if plan is None else plan["usd"] / learned["usd"],
            )
        )
    return found


def _against(
    name: str,
    belongs: Callable[[Row], bool],
    rows: Sequence[Row],
    scenarios: Sequence[Row],
    trained: Collection[str],
) -> HeadToHead:
    held = 0
    shipped_ratios: list[float] = []
    tuned_ratios: list[float] = []
    by_part: dict[str, list[float]] = {part: [] for part in PARTS}
    for scenario in scenarios:
        own = [row for row in rows if row["scenario"] == scenario["name"]]
        opponent = cheapest(filter(belongs, own))
        if opponent is None:
            continue
        held += 1
        shipped, on_train = cheapest(filter(_shipped, own)), cheapest(filter(_trained, own))
        if shipped is not None:
            shipped_ratios.append(shipped["usd"] / opponent["usd"])
            for part, contains in PARTS.items():
                if contains(scenario, trained):
                    by_part[part].append(shipped_ratios[-1])
        if on_train is not None:
            tuned_ratios.append(on_train["usd"] / opponent["usd"])
    return HeadToHead(
        opponent=name,
        held=held,
        both=len(shipped_ratios),
        cost=geometric_mean(shipped_ratios),
        by_part={part: geometric_mean(ratios) for part, ratios in by_part.items()},
        cost_tuned=geometric_mean(tuned_ratios),
    )
