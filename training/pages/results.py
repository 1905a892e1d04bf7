"""Results as tables for a terminal: evaluations, tunings and comparisons.

Rich is imported inside the functions: it takes a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from training.judging.comparisons import Comparison, Comparisons
from training.judging.evaluate import Evaluation
from training.judging.scenario_runs import label
from training.judging.standings import scenario_rows
from training.pages.tables import shown_points, shown_ratio
from training.tuning.tuner import Tuning

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 120
"""Width of the tables where stdout is no terminal, characters."""
COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "SLO met": lambda row: f"{_figure(row['attainment'], '.2%')}{' ' if row['holds_slo'] else '*'}",
    "worst hour": lambda row: _figure(row["worst_hour_attainment"], ".1%"),
    "$ /Mtok": lambda row: _figure(row["usd_per_mtok"], ".4f"),
    "$ /good": lambda row: _figure(row["usd_per_good_mtok"], ".4f"),
    "$ in all": lambda row: _figure(row["usd"], ",.0f" if row["usd"] >= 1000 else ".2f"),
    "repl. hours": lambda row: _figure(row["replica_hours"], ",.1f"),
    "GPU use": lambda row: _figure(row["gpu_utilization"], ".0%"),
    "over- size": lambda row: _figure(row["overprovisioning_ratio"], ".2f"),
    "scale per h": lambda row: _figure(row["scale_events_per_hour"], ".1f"),
}
"""Headings of the headline table and what stands below them; 80 characters wide with a policy name of 12."""


COST_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "vs plan": lambda row: ratio(row["cost_vs_plan"]),
    "vs bound": lambda row: ratio(row["cost_vs_bound"]),
    "vs peer": lambda row: ratio(row["cost_vs_best_peer"]),
}
"""Further headings where references or peers stand in the table."""


def ratio(value: float | None) -> str:
    """A cost over another; a dash where that says nothing."""
    return "-" if value is None else f"{value:.2f}"


def _figure(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)


def cheapest_holding(rows: list[dict[str, Any]]) -> float | None:
    """Dollars per million tokens of the cheapest policy that holds the SLO, None when none does.

    References are no policies: nobody can run them.
    """
    return min((row["usd_per_mtok"] for row in rows if row["holds_slo"] and row["tuned"] != "reference"), default=None)


def show_evaluation(evaluation: Evaluation) -> None:
    """Print one table per scenario; a missed SLO is marked, and so is the cheapest policy that holds it."""
    from rich.table import Table

    console = _terminal()
    summary = scenario_rows(evaluation)
    columns = columns_for(summary)
    for scenario in evaluation.scenarios:
        rows = [row for row in summary if row["scenario"] == scenario["name"]]
        slo = scenario["slo"]
        console.print(
            f"\n{scenario['name']}: TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s'] * 1000:g} ms "
            f"for {slo['attainment']:.1%} of {rows[0]['requests']:,.0f} requests{not_servable(scenario)}",
            highlight=False,
            markup=False,
        )
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("policy", overflow="fold", min_width=12)
        for heading in columns:
            table.add_column("\n".join(heading.split(" ", 1)), justify="right", no_wrap=True)
        best = cheapest_holding(rows)
        for row in rows:
            style = "bold" if row["holds_slo"] and row["usd_per_mtok"] == best else None
            table.add_row(label(row["policy"], row["tuned"]), *(show(row) for show in columns.values()), style=style)
        console.print(table)
    for skipped in evaluation.skipped:
        console.print(f"\n{skipped['name']}: skipped, {skipped['reason']}", highlight=False, markup=False)
    console.print(
        "\n$/Mtok, $/good: provisioned dollars per million tokens served, and served within the SLO.\n"
        "*: misses the SLO. Bold: the cheapest policy that holds it.",
        highlight=False,
    )


def columns_for(rows: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """The headline columns, and those of the ratios where any row has one."""
    compared = any(row["cost_vs_plan"] is not None or row["cost_vs_bound"] is not None for row in rows)
    return {**COLUMNS, **COST_COLUMNS} if compared else COLUMNS


def not_servable(scenario: dict[str, Any]) -> str:
    """What to add to a scenario's heading where not even the clairvoyant plan holds its SLO."""
    return "; not even the clairvoyant plan holds this" if scenario["servable"] is False else ""


def show_tunings(tunings: Sequence[Tuning]) -> None:
    """Print one line per policy and scenario: settings, and what they cost on the slice that they were tuned on."""
    from rich.table import Table

    console = _terminal()
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("scenario", "policy", "settings", "SLO met", "$", "runs", "on an edge"):
        table.add_column(heading, overflow="fold", justify="right" if heading in {"SLO met", "$", "runs"} else "left")
    for item in tunings:
        settings = ", ".join(f"{name}={value}" for name, value in item.settings.items())
        met = f"{item.attainment:.2%}{' ' if item.holds_slo else '*'}"
        edges = ", ".join(item.edges)
        table.add_row(item.scenario, item.policy, settings, met, f"{item.usd:.2f}", str(item.trials), edges)
    console.print(table)


COMPARISON_COLUMNS: dict[str, Callable[[Comparison], str]] = {
    "held": lambda row: f"{row.held}/{row.scenarios}",
    "before": lambda row: f"{row.held_before}/{row.scenarios}",
    "SLO met": lambda row: f"{row.attainment:.1%}",
    "change, points": lambda row: shown_points(row.attainment_change),
    "cost": lambda row: shown_ratio(row.cost_ratio),
    "scale per h": lambda row: f"{row.scale_events_per_hour:.1f}",
    "before ": lambda row: f"{row.scale_events_per_hour_before:.1f}",
}


def show_comparisons(comparisons: Comparisons) -> None:
    """Print one table per policy and group."""
    from rich.table import Table

    console = _terminal()
    ordered = sorted(comparisons.comparisons, key=lambda item: (item.group, item.policy, item.tuned))
    for (group, policy, tuned), rows in groupby(ordered, key=lambda item: (item.group, item.policy, item.tuned)):
        title = label(policy, tuned) if group == "all" else f"{label(policy, tuned)}, {group}"
        console.print(f"\n{title}", highlight=False, markup=False)
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", min_width=28)
        for heading in COMPARISON_COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row.treatment, *(show(row) for show in COMPARISON_COLUMNS.values()))
        console.print(table)
    console.print(
        "\nheld: scenarios whose SLO is held, of those concerned. cost: over the same policy's cost in the first row, "
        "on scenarios held both times.\nIn brackets: bootstrap interval over scenarios and seeds, 2.5 to 97.5 %.",
        highlight=False,
    )


def _terminal() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)
