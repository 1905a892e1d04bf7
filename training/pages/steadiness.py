"""The tables of steadiness in ``docs/evaluation.md`` from what ``jevons steadiness`` found.

This module must not know how the figures came about.
"""

from __future__ import annotations

from typing import Any

from training.pages.tables import shown, table

Row = dict[str, Any]


def constant_table(found: Row) -> str:
    """Changes an hour at each load and mix, of the first policy: mean, worst seed, caps; Markdown."""
    policy = found["constant"][0]["policy"]
    cells: dict[float, dict[str, str]] = {}
    for row in found["constant"]:
        if row["policy"] == policy:
            fleet = f"{row['changes_per_hour']:.2f} ({row['most_changes_per_hour']:.2f})"
            missed = "" if row["holds_slo"] else "*"
            cells.setdefault(row["load"], {})[row["mix"]] = f"{fleet}, {row['cap_changes_per_hour']:.1f}{missed}"
    mixes = list(dict.fromkeys(row["mix"] for row in found["constant"]))
    lines = [(f"{load:g}", *(by_mix.get(mix, "") for mix in mixes)) for load, by_mix in cells.items()]
    return table(("replicas that the load needs", *mixes), lines)


def cost_table(found: Row) -> str:
    """What the guardrails cost the first policy on every suite, Markdown."""
    lines = []
    for suite in found["suites"]:
        row = next(item for item in suite["comparisons"] if item["treatment"] == "steady")
        lines.append(
            (
                f"`{suite['suite']}`",
                f"{row['held_before']} of {row['scenarios']}",
                f"{row['held']} of {row['scenarios']}",
                "-" if row["cost_ratio"] is None else shown(row["cost_ratio"], ".3f"),
                f"{row['scale_events_per_hour_before']:.1f} to {row['scale_events_per_hour']:.1f}",
            )
        )
    return table(("suite", "held without", "held with", "bill", "scale events an hour"), lines)
