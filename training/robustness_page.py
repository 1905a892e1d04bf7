"""Writes ``docs/robustness.md`` from what ``jevons robustness`` and ``jevons ablate`` found: ``make robustness``.

This module must not know how the figures came about.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.cells import label
from training.contrasts import shown

Row = dict[str, Any]


def page(abused: Row, ablated: Row) -> str:
    """The whole page, Markdown, from the JSON of both commands."""
    parts = [
        _HEAD,
        f"## Under abuse: suite `{abused['suite']}`",
        _meanings(abused["treatments"]),
        _runs(abused),
        "### Scenarios held",
        _matrix(abused, lambda row: f"{row['held']}/{row['scenarios']}"),
        "Scenarios whose SLO the policy holds, of those that the abuse concerns.",
        "### Cost",
        _matrix(abused, _cost),
        "Dollars over the same policy's dollars without the abuse, geometric mean over the scenarios that it holds "
        "both times; `-` where there is none.",
        "### SLO met",
        _matrix(abused, _change),
        "Change of the share of requests served in time, in percentage points, mean over the scenarios.",
        "### Scale events per hour",
        _matrix(abused, lambda row: f"{row['scale_events_per_hour']:.1f}"),
        "Changes of a pool's target, mean over the scenarios that the abuse concerns.",
        f"## Joint control: suite `{ablated['suite']}`",
        _ABLATED,
        _meanings(ablated["treatments"]),
        *_groups(ablated),
        "Cost over that of the whole policy, on the scenarios that both hold; `-` where there is none.",
        _runs(ablated),
        "---",
        f"Written by `make robustness`; {_bundle(abused)}; "
        + ", ".join(f"{name} {version}" for name, version in abused["versions"].items())
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
    for row in found["contrasts"]:
        by_policy.setdefault(label(row["policy"], row["tuned"]), {})[row["treatment"]] = row
    lines = [f"| policy | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for policy, rows in by_policy.items():
        cells = [show(rows[name]) if name in rows else "" for name in names]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _groups(found: Row) -> list[str]:
    """A table per group of scenarios: one row per treatment."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in found["contrasts"]):
        lines = [
            "| decided by the policy | held | cost | SLO met, points | scale events per hour |",
            "|---|---|---|---|---|",
        ]
        for row in found["contrasts"]:
            if row["group"] == group:
                held = f"{row['held']}/{row['scenarios']}"
                lines.append(
                    f"| {row['treatment']} | {held} | {_cost(row)} | {_change(row)} "
                    f"| {row['scale_events_per_hour']:.1f} |"
                )
        parts += [f"### {group[:1].upper()}{group[1:]}", "\n".join(lines)]
    return parts


def _runs(found: Row) -> str:
    """Which scenarios ran, with how many seeds."""
    names = (f"{item['name']} ({len(item['seeds'])})" for item in found["scenarios"])
    return f"Scenarios, with seeds: {', '.join(names)}."


def _cost(row: Row) -> str:
    return "-" if row["cost_ratio"] is None else shown(row["cost_ratio"], ".2f")


def _change(row: Row) -> str:
    return shown([100 * value for value in row["attainment_change"]], "+.1f")


def _bundle(found: Row) -> str:
    digests = [item["bundle_digest"] for item in found["policies"] if item["bundle_digest"]]
    return f"bundle {digests[0][:12]}" if digests else "no learned policy"


def main(abused: Path, ablated: Path, target: Path) -> None:
    """``python -m training.robustness_page ROBUSTNESS.json ABLATION.json PAGE.md``."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (abused, ablated)]
    target.write_text(page(*found), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
