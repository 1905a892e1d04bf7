"""The table over scenarios: what every policy costs beside the bound, the plan and the best peer.

A policy that misses the SLO has no such ratio: its cost says nothing. A scenario whose SLO not even the plan holds
counts for nobody.
This module must not know how figures are shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.lineup import REFERENCES, is_peer
from training.judging.evaluate import BOOTSTRAP_RESAMPLES, Evaluation
from training.judging.scenario_runs import DEFAULT
from training.replaying.scores import REFERENCE

FLAT_FIELDS = (
    "scenario",
    "policy",
    "tuned",
    "seed",
    "attainment",
    "usd_per_mtok",
    "usd_per_good_mtok",
    "replica_hours",
    "holds_slo",
    "cost_vs_plan",
    "cost_vs_bound",
    "cost_vs_best_peer",
)
RATIOS = ("cost_vs_plan", "cost_vs_bound", "cost_vs_best_peer")
MODES = (DEFAULT, "train", "self", "hindsight")
WITHOUT_FORESIGHT = (DEFAULT, "train", "self")


def flat_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One row of `FLAT_FIELDS` per scenario, policy, tuning and seed; what is not defined is None."""
    rows = [row.row() for row in evaluation.rows]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["seed"]), []).append(row)
    for group in groups.values():
        add_ratios(group)
    return [{name: row[name] for name in FLAT_FIELDS} for row in rows]


def scenario_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """`Evaluation.by_scenario` with the ratios, of means over seeds."""
    rows = evaluation.by_scenario()
    for scenario in evaluation.scenarios:
        add_ratios([row for row in rows if row["scenario"] == scenario["name"]])
    return rows


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add the ratios to the rows of one scenario: dollars over dollars, for the same traffic."""
    below = {
        "cost_vs_plan": _usd(rows, "plan"),
        "cost_vs_bound": _usd(rows, "bound"),
        "cost_vs_best_peer": None,
    }
    peer = best_peer(rows)
    if peer is not None:
        below["cost_vs_best_peer"] = peer["usd"]
    for row in rows:
        for name in RATIOS:
            known = row["holds_slo"] and row["usd"] is not None and below[name]
            row[name] = row["usd"] / below[name] if known else None


def _usd(rows: Iterable[dict[str, Any]], reference: str) -> float | None:
    found = (row for row in rows if row["policy"] == reference and row["tuned"] == REFERENCE and row["holds_slo"])
    return next((row["usd"] for row in found), None)


def best_peer(rows: Sequence[dict[str, Any]], tuned: Sequence[str] = ()) -> dict[str, Any] | None:
    """The row of the cheapest peer that holds the SLO, None when none does.

    Args:
        rows: of one scenario.
        tuned: ways of tuning to choose among; when empty, those that need no foresight, or all where there are none.
    """
    peers = [row for row in rows if is_peer(row["policy"])]
    allowed = tuned or [mode for mode in WITHOUT_FORESIGHT if any(row["tuned"] == mode for row in peers)]
    return cheapest([row for row in peers if not allowed or row["tuned"] in allowed])


def cheapest(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The cheapest row that holds the SLO, None when none does."""
    return min((row for row in rows if row["holds_slo"]), key=lambda row: row["usd"], default=None)


@dataclass(frozen=True)
class Standing:
    """One policy over the scenarios of one kind of traffic.

    Attributes:
        policy: reference as asked for.
        tuned: how its settings came about.
        source: ``real`` or ``generated``.
        held: scenarios whose SLO it held.
        scenarios: that can be held at all.
        cost_vs_plan: geometric mean over those held, None for none; then the bootstrap interval of it, 2.5 to 97.5 %.
        cost_vs_bound: the same.
        cost_vs_best_peer: the same.
    """

    policy: str
    tuned: str
    source: str
    held: int
    scenarios: int
    cost_vs_plan: tuple[float, float, float] | None
    cost_vs_bound: tuple[float, float, float] | None
    cost_vs_best_peer: tuple[float, float, float] | None


def standings_of(summary: Sequence[dict[str, Any]], scenarios: Sequence[dict[str, Any]], source: str) -> list[Standing]:
    """Every policy over the scenarios of one source, those that hold most scenarios first, then by cost.

    Args:
        summary: rows of `scenario_rows`.
        scenarios: as an `Evaluation` describes them.
        source: ``real`` or ``generated``.
    """
    names = {
        scenario["name"] for scenario in scenarios if scenario["source"] == source and scenario["servable"] is not False
    }
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in summary:
        if row["scenario"] in names:
            groups.setdefault((row["policy"], row["tuned"]), []).append(row)
    found = [
        Standing(
            policy,
            tuned,
            source,
            sum(row["holds_slo"] for row in rows),
            len(names),
            *(geometric_mean([row[name] for row in rows if row[name] is not None]) for name in RATIOS),
        )
        for (policy, tuned), rows in groups.items()
    ]
    references = {name: place for place, name in enumerate(REFERENCES)}
    return sorted(
        found,
        key=lambda item: (
            references.get(item.policy, len(references)),
            -item.held,
            (item.cost_vs_plan or item.cost_vs_best_peer or (math.inf,))[0],
        ),
    )


def geometric_mean(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Geometric mean and its bootstrap interval over scenarios, 2.5 and 97.5 %; None of nothing.

    >>> geometric_mean([2.0, 8.0])[0]
    4.0
    """
    if not values:
        return None
    logs = np.log(np.asarray(values, np.float64))
    rng = np.random.default_rng(0)
    means = logs[rng.integers(len(logs), size=(BOOTSTRAP_RESAMPLES, len(logs)))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(np.exp(logs.mean())), float(np.exp(low)), float(np.exp(high))
