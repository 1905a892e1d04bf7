"""The text of ``docs/robustness.md`` from what ``jevons robustness`` and ``jevons ablate`` found.

This module must not know how the figures came about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from training.judging.scenario_runs import label
from training.pages.tables import shown_points, shown_ratio, table

Row = dict[str, Any]


def page(disturbed: Row, ablated: Row) -> str:
    """The whole page, Markdown, from the JSON of both commands."""
    parts = [
        _HEAD,
        f"## Under disturbance: suite `{disturbed['suite']}`",
        _meanings(disturbed["treatments"]),
        _runs(disturbed),
        "### Scenarios held",
        _matrix(disturbed, lambda row: f"{row['held']}/{row['scenarios']}"),
        "Scenarios whose SLO the policy holds, of those that the disturbance concerns.",
        "### Cost",
        _matrix(disturbed, lambda row: shown_ratio(row["cost_ratio"])),
        "Dollars over the same policy's dollars without the disturbance, geometric mean over the scenarios that it "
        "holds both times; `-` where there is none.",
        "### SLO met",
        _matrix(disturbed, lambda row: shown_points(row["attainment_change"])),
        "Change of the share of requests served in time, in percentage points, mean over the scenarios.",
        "### Scale events per hour",
        _matrix(disturbed, lambda row: f"{row['scale_events_per_hour']:.1f}"),
        "Changes of a pool's target, mean over the scenarios that the disturbance concerns.",
        f"## Joint control: suite `{ablated['suite']}`",
        _ABLATED,
        _meanings(ablated["treatments"]),
        *_groups(ablated),
        "Cost over that of the whole policy, on the scenarios that both hold; `-` where there is none.",
        _runs(ablated),
        "---",
        f"Written by `make robustness`; {_bundle(disturbed)}; "
        + ", ".join(f"{name} {version}" for name, version in disturbed["versions"].items())
        + ".",
    ]
    return "\n\n".join(parts) + "\n"


_HEAD = """# Robustness

What policies do where the world is not as they were told, and what each part of the learned policy's decision is worth.
Figures in brackets are bootstrap intervals over scenarios and seeds, 2.5 to 97.5 %.
[evaluation.md](evaluation.md) says how a run is counted; `make robustness` writes this page."""

_ABLATED = """The learned policy sets replicas, batch caps and the share of each kind of pool in one decision.
Here it decides only what the row is named after.
The rest is left to the reference that its outputs are residuals on, to a rule of our own, or to the engine."""


def _meanings(treatments: Sequence[Row]) -> str:
    return "\n".join(f"- *{item['name']}*: {item['meaning']}." for item in treatments)


def _matrix(found: Row, show: Any) -> str:
    """Policies as rows, treatments as columns."""
    names = [item["name"] for item in found["treatments"]]
    by_policy: dict[str, dict[str, Row]] = {}
    for row in found["comparisons"]:
        by_policy.setdefault(label(row["policy"], row["tuned"]), {})[row["treatment"]] = row
    lines = [
        (policy, *(show(rows[name]) if name in rows else "" for name in names)) for policy, rows in by_policy.items()
    ]
    return table(("policy", *names), lines)


def _groups(found: Row) -> list[str]:
    """A table per group of scenarios: one row per treatment."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in found["comparisons"]):
        lines = [
            (
                row["treatment"],
                f"{row['held']}/{row['scenarios']}",
                shown_ratio(row["cost_ratio"]),
                shown_points(row["attainment_change"]),
                f"{row['scale_events_per_hour']:.1f}",
            )
            for row in found["comparisons"]
            if row["group"] == group
        ]
        headings = ("decided by the policy", "held", "cost", "SLO met, points", "scale events per hour")
        parts += [f"### {group[:1].upper()}{group[1:]}", table(headings, lines)]
    return parts


def _runs(found: Row) -> str:
    """Which scenarios ran, with how many seeds."""
    names = (f"{item['name']} ({len(item['seeds'])})" for item in found["scenarios"])
    return f"Scenarios, with seeds: {', '.join(names)}."


def _bundle(found: Row) -> str:
    digests = [item["bundle_digest"] for item in found["policies"] if item["bundle_digest"]]
    return f"bundle {digests[0][:12]}" if digests else "no learned policy"
