"""The report of an evaluation: one HTML file that needs no network.

This module must not know how the figures came about.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from policies.atomic_files import write_text
from policies.contract import Floats
from training.judging.evaluate import Evaluation
from training.judging.scenario_runs import label
from training.judging.standings import scenario_rows
from training.pages.report_plots import is_sweep, scatter, styled, swept
from training.pages.results import cheapest_holding, columns_for, not_servable
from training.replaying.scores import REFERENCE
from training.replaying.timeline import Timeline

MAX_POINTS = 800
POINTS_IN_ALL = 400_000
"""Points over all plots: what keeps the file small enough to mail."""
PALETTE = ("#3556c8", "#1f9d7a", "#d9822b", "#7d8590", "#9b4fc0", "#c23b5a", "#4aa3c7", "#8a6d3b")
FIXED = {
    "learned": "#3556c8",
    "token-demand": "#1f9d7a",
    "hpa": "#d9822b",
    "static": "#7d8590",
    "plan": "#111827",
    "bound": "#b3261e",
    "best-static": "#a3acb9",
}
STATES = (("ready", "#8fb3e8"), ("starting", "#f3c66b"), ("draining", "#c9ced6"))
MAX_TIMELINES = 6
"""Policies whose replicas are plotted over time, per scenario."""
ROW_PX = 165
SERIES_PER_POLICY = 9
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c2230; margin: 0;
  background: #f6f7f9; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 40px 0 6px; }
p { margin: 6px 0; } .quiet { color: #5b6475; }
.card { background: #fff; border: 1px solid #e2e5ea; border-radius: 10px; padding: 14px 16px; margin: 14px 0;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: #5b6475; border-bottom: 1px solid #cfd4dc; white-space: nowrap; }
th, td { text-align: right; padding: 5px 9px; } th:first-child, td:first-child { text-align: left; }
tr.group td { text-align: left; font-weight: 600; padding-top: 14px; border-bottom: 1px solid #e2e5ea; }
tr.best td { background: #e9f5ef; font-weight: 600; }
td.miss { color: #b3261e; font-weight: 600; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
footer { margin-top: 40px; font-size: 13px; color: #5b6475; overflow-wrap: anywhere; }
"""


def write_report(evaluation: Evaluation, path: Path) -> None:
    """Write the report; the file appears whole or not at all.

    Args:
        evaluation: what to show.
        path: HTML file to write.

    Raises:
        OSError: when it cannot be written.
    """
    page = render(evaluation)
    write_text(path, page)


def render(evaluation: Evaluation) -> str:
    """The page, plotly.js included once."""
    summary = [{**row, "label": label(row["policy"], row["tuned"])} for row in scenario_rows(evaluation)]
    colours = _colours(list(dict.fromkeys(row["policy"] for row in summary)))
    shown = min(len(evaluation.timelines), MAX_TIMELINES * len(evaluation.scenarios))
    plots = max(1, shown) * SERIES_PER_POLICY
    points = int(np.clip(POINTS_IN_ALL // plots, 60, MAX_POINTS))
    sections = [_section(evaluation, scenario, summary, colours, points) for scenario in evaluation.scenarios]
    title = f"Evaluation: {evaluation.suite}"
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style>",
            f"<script>{get_plotlyjs()}</script></head><body><main>",
            f"<h1>{html.escape(title)}</h1>",
            '<p class="quiet">Every policy ran through the controller that ships, on the simulated cluster. '
            "Costs are provisioned dollars, overhead included.</p>",
            _table(evaluation, summary, colours),
            _skipped(evaluation),
            *([_card("Cost over the sweep", swept(evaluation, summary, colours))] if is_sweep(evaluation) else []),
            _card("Cost against attainment", scatter(evaluation, summary, colours)),
            *sections,
            _footer(evaluation),
            "</main></body></html>",
        ]
    )


def _colours(policies: Sequence[str]) -> dict[str, str]:
    """A colour per policy; the usual ones keep theirs from report to report."""
    spare = [colour for colour in PALETTE if colour not in {FIXED.get(policy) for policy in policies}]
    chosen = {}
    for policy in policies:
        if policy in FIXED:
            chosen[policy] = FIXED[policy]
        else:
            chosen[policy] = spare.pop(0) if spare else "#444b59"
    return chosen


def _table(evaluation: Evaluation, summary: list[dict[str, Any]], colours: dict[str, str]) -> str:
    columns = columns_for(summary)
    lines = ['<div class="card"><table><thead><tr><th>policy</th>']
    lines += [f"<th>{html.escape(name)}</th>" for name in columns]
    lines.append("</tr></thead><tbody>")
    for scenario in evaluation.scenarios:
        rows = [row for row in summary if row["scenario"] == scenario["name"]]
        slo = scenario["slo"]
        promise = f"TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s'] * 1000:g} ms for {slo['attainment']:.1%} of arrivals"
        lines.append(
            f'<tr class="group"><td colspan="{len(columns) + 1}">{html.escape(scenario["name"])} '
            f'<span class="quiet">{promise}{not_servable(scenario)}</span></td></tr>'
        )
        lowest = cheapest_holding(rows)
        for row in rows:
            best = row["holds_slo"] and row["usd_per_mtok"] == lowest and row["tuned"] != REFERENCE
            shown = [show(row) for show in columns.values()]
            first = shown[0].replace("*", " &#10007;")
            lines.append(
                f'<tr class="{"best" if best else ""}"><td><span class="dot" style="background:'
                f'{colours[row["policy"]]}"></span>{html.escape(row["label"])}</td>'
                f'<td class="{"" if row["holds_slo"] else "miss"}">{first}</td>'
                + "".join(f"<td>{html.escape(text)}</td>" for text in shown[1:])
                + "</tr>"
            )
    lines.append(
        '</tbody></table><p class="quiet">&#10007; misses the SLO. Shaded: the cheapest policy that holds it. '
        "$/Mtok: dollars per million tokens served, prompt and output. Means over seeds.</p></div>"
    )
    return "".join(lines)


def _section(
    evaluation: Evaluation,
    scenario: dict[str, Any],
    summary: list[dict[str, Any]],
    colours: dict[str, str],
    points: int,
) -> str:
    name = scenario["name"]
    timelines = _worth_plotting(evaluation, name, summary)
    pools = "; ".join(
        f"{pool['name']}: {pool['min_replicas']} to {pool['max_replicas']} replicas of {pool['engine']} on "
        f"{pool['gpus_per_replica']} x {pool['gpu']}, ${pool['usd_per_gpu_hour']:.2f} per GPU-hour, "
        f"{pool['price_class'].replace('_', '-')}, cold start {pool['cold_start_s']:.0f} s"
        for pool in scenario["pools"]
    )
    requests = next((row["requests"] for row in summary if row["scenario"] == name), 0.0)
    head = (
        f"<h2>{html.escape(name)}</h2><p>{html.escape(scenario['description'])}</p>"
        f'<p class="quiet">{requests:,.0f} requests a seed, {len(scenario["seeds"])} seed(s); plots show the first. '
        f"{html.escape(pools)}.</p>"
    )
    if not timelines:
        return head + '<p class="quiet">Too short for a single decision: nothing to plot.</p>'
    return f'{head}<div class="card">{_embed(_over_time(timelines, scenario, colours, points))}</div>'


def _worth_plotting(evaluation: Evaluation, scenario: str, summary: list[dict[str, Any]]) -> dict[str, Timeline]:
    """Timelines by label: all where there are few, else the plan, the learned policy and the cheapest that hold."""
    lines = {name: line for (at, name), line in evaluation.timelines.items() if at == scenario and len(line)}
    if len(lines) <= MAX_TIMELINES:
        return lines
    rows = [row for row in summary if row["scenario"] == scenario and row["label"] in lines]
    rows.sort(key=lambda row: (row["policy"] not in {"plan", "learned"}, not row["holds_slo"], row["usd"]))
    chosen = {row["label"] for row in rows[:MAX_TIMELINES]}
    return {name: line for name, line in lines.items() if name in chosen}


def _skipped(evaluation: Evaluation) -> str:
    names = "".join(
        f"<p>{html.escape(item['name'])}: skipped, {html.escape(item['reason'])}.</p>" for item in evaluation.skipped
    )
    return f'<div class="card">{names}</div>' if names else ""


def _card(title: str, figure: go.Figure) -> str:
    return f'<h2>{title}</h2><div class="card">{_embed(figure)}</div>'


def _over_time(
    timelines: dict[str, Timeline], scenario: dict[str, Any], colours: dict[str, str], points: int
) -> go.Figure:
    """Traffic, replicas by state for each policy, queue, attainment and cost on one time axis."""
    policies = list(timelines)
    titles = ["Traffic, requests per second", *(f"Replicas: {policy}" for policy in policies)]
    titles += ["Waiting requests", "SLO met in the last minutes", "Dollars per hour", "Dollars so far"]
    figure = make_subplots(
        rows=len(titles), cols=1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.25 / len(titles)
    )
    scale_s, unit = (
        (3600.0, "hours") if max(line.time_s[-1] for line in timelines.values()) > 7200 else (60.0, "minutes")
    )
    first = timelines[policies[0]]
    time = _thin(first.time_s, points) / scale_s
    _line(figure, 1, time, _thin(first.arrival_rps, points), "arrivals", "#444b59", legend=False)
    for index, policy in enumerate(policies):
        _replicas(figure, index + 2, timelines[policy], scale_s, points, legend=index == 0)
    base = len(policies) + 2
    target = scenario["slo"]["attainment"]
    for policy in policies:
        line = timelines[policy]
        time = _thin(line.time_s, points) / scale_s
        colour = colours[policy.split(" (")[0]]
        _line(figure, base, time, _thin(line.queue_requests, points, np.nanmax), policy, colour, legend=True)
        met = rolling_mean(np.fmin(line.ttft_attainment, line.tpot_attainment), line.time_s, 300.0)
        _line(figure, base + 1, time, _thin(met, points), policy, colour)
        _line(figure, base + 2, time, _thin(line.usd_per_hour, points), policy, colour)
        _line(figure, base + 3, time, _thin(line.usd, points), policy, colour)
    figure.update_annotations(x=0.0, xanchor="left")
    figure.add_hline(y=target, line={"dash": "dot", "color": "#b3261e", "width": 1}, row=base + 1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.03], row=base + 1, col=1)
    figure.update_xaxes(title_text=unit, row=len(titles), col=1)
    return styled(figure, ROW_PX * len(titles) + 60)


def _replicas(figure: go.Figure, row: int, line: Timeline, scale_s: float, points: int, legend: bool) -> None:
    time = _thin(line.time_s, points) / scale_s
    for state, colour in STATES:
        figure.add_trace(
            go.Scatter(
                x=time,
                y=_thin(getattr(line, state).sum(axis=1), points),
                name=state,
                legendgroup=state,
                showlegend=legend,
                stackgroup=str(row),
                mode="lines",
                line={"width": 0, "color": colour, "shape": "hv"},
                fillcolor=colour,
            ),
            row=row,
            col=1,
        )
    target = _thin(line.target.sum(axis=1).astype(np.float64), points)
    figure.add_trace(
        go.Scatter(
            x=time,
            y=target,
            name="target",
            legendgroup="target",
            showlegend=legend,
            mode="lines",
            line={"width": 1.2, "color": "#1c2230", "shape": "hv"},
        ),
        row=row,
        col=1,
    )
    figure.update_yaxes(rangemode="tozero", row=row, col=1)


def _line(figure: go.Figure, row: int, x: Floats, y: Floats, name: str, colour: str, legend: bool = False) -> None:
    figure.add_trace(
        go.Scatter(
            x=x,
            y=y,
            name=name,
            legendgroup=name,
            showlegend=legend,
            mode="lines",
            line={"width": 1.4, "color": colour},
        ),
        row=row,
        col=1,
    )


def _thin(values: Floats, points: int, reduce: Any = np.nanmean) -> np.ndarray:
    """At most `points` float32 values: means (or what `reduce` says) of equal runs of ticks, NaN where all are."""
    run = max(1, math.ceil(len(values) / points))
    padded = np.full(math.ceil(len(values) / run) * run, np.nan)
    padded[: len(values)] = values
    runs = padded.reshape(-1, run)
    known = ~np.isnan(runs).all(axis=1)
    thinned = np.full(len(runs), np.nan, np.float32)
    thinned[known] = reduce(runs[known], axis=1)
    return np.round(thinned, 4)


def rolling_mean(values: Floats, time_s: Floats, span_s: float) -> Floats:
    """Mean of what is known in the last `span_s` seconds, NaN where nothing is."""
    step_s = float(np.median(np.diff(time_s))) if len(time_s) > 1 else span_s
    width = max(1, round(span_s / max(step_s, 1e-9)))
    known = ~np.isnan(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    count = counts[end] - counts[start]
    mean: Floats = np.where(count > 0, (sums[end] - sums[start]) / np.maximum(count, 1), np.nan)
    return mean


def _embed(figure: go.Figure) -> str:
    config = {"displayModeBar": False, "responsive": True}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=config)
    return text


def _footer(evaluation: Evaluation) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    digests = "; ".join(
        f"{scenario['name']}: spec {scenario['spec_digest'][:12]}, trace {scenario['trace_digests'][0][:12]}"
        for scenario in evaluation.scenarios
    )
    bundles = "; ".join(
        f"{policy['policy']}: bundle {policy['bundle_digest'][:12]}"
        for policy in evaluation.policies
        if policy["bundle_digest"]
    )
    lines = [line for line in (versions, digests, bundles) if line]
    return f"<footer>{'<br>'.join(html.escape(line) for line in lines)}</footer>"
