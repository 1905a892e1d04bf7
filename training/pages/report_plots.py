"""Plots over policies and scenarios for the report: cost against attainment, and cost over a sweep.

This module must not know how the figures came about.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from training.judging.evaluate import Evaluation

SYMBOLS = {"default": "circle", "train": "square", "self": "diamond", "hindsight": "star", "reference": "cross"}
MISS = "-open"
"""A policy that misses the SLO has the hollow symbol."""


def scatter(evaluation: Evaluation, summary: list[dict[str, Any]], colours: dict[str, str]) -> go.Figure:
    """Cost against attainment, a panel per scenario: the frontier of all policies, the bound and the target.

    Args:
        evaluation: what to show.
        summary: rows of `training.judging.standings.scenario_rows`, with their labels.
        colours: by policy.
    """
    names = [scenario["name"] for scenario in evaluation.scenarios]
    columns = min(3, len(names))
    figure = make_subplots(
        rows=math.ceil(len(names) / columns), cols=columns, subplot_titles=names, horizontal_spacing=0.09
    )
    labelled: set[str] = set()
    for index, scenario in enumerate(evaluation.scenarios):
        at = {"row": index // columns + 1, "col": index % columns + 1}
        rows = [row for row in summary if row["scenario"] == scenario["name"]]
        for row in rows:
            if math.isnan(row["attainment"]):
                if not math.isnan(row["usd_per_mtok"]):
                    line = {"dash": "dash", "color": colours[row["policy"]], "width": 1}
                    figure.add_vline(x=row["usd_per_mtok"], line=line, annotation_text=row["label"], **at)
                continue
            figure.add_trace(_point(row, colours[row["policy"]], row["label"] not in labelled), **at)
            labelled.add(row["label"])
        figure.add_trace(_frontier([row for row in rows if row["tuned"] != "reference"]), **at)
        figure.add_hline(y=scenario["slo"]["attainment"], line={"dash": "dot", "color": "#b3261e", "width": 1}, **at)
        figure.update_xaxes(title_text="dollars per million tokens", rangemode="tozero", **at)
        figure.update_yaxes(title_text="SLO met", tickformat=".0%", **at)
    return styled(figure, 360 * math.ceil(len(names) / columns))


def _point(row: dict[str, Any], colour: str, legend: bool) -> go.Scatter:
    low, high = row["attainment_low"], row["attainment_high"]
    spread = None
    if low is not None:
        up, down = [high - row["attainment"]], [row["attainment"] - low]
        spread = {"type": "data", "symmetric": False, "array": up, "arrayminus": down}
    return go.Scatter(
        x=[row["usd_per_mtok"]],
        y=[row["attainment"]],
        name=row["label"],
        legendgroup=row["label"],
        showlegend=legend,
        mode="markers",
        marker={
            "size": 11,
            "color": colour,
            "symbol": SYMBOLS[row["tuned"]] + ("" if row["holds_slo"] else MISS),
        },
        error_y=spread,
        hovertemplate="%{fullData.name}<br>$%{x:.4f} per Mtok<br>%{y:.2%} of arrivals<extra></extra>",
    )


def _frontier(rows: list[dict[str, Any]]) -> go.Scatter:
    """The highest attainment that any policy reaches at a cost or below it."""
    ordered = sorted(rows, key=lambda row: row["usd_per_mtok"])
    highest = np.maximum.accumulate(np.array([row["attainment"] for row in ordered], np.float64))
    return go.Scatter(
        x=[row["usd_per_mtok"] for row in ordered],
        y=highest,
        mode="lines",
        line={"shape": "hv", "width": 1, "color": "#9aa3b2"},
        showlegend=False,
        hoverinfo="skip",
    )


def is_sweep(evaluation: Evaluation) -> bool:
    """True where the scenarios are one service over several cold starts."""
    digests = {tuple(scenario["trace_digests"]) for scenario in evaluation.scenarios}
    starts = {_start_s(scenario) for scenario in evaluation.scenarios}
    return len(digests) == 1 and len(starts) > 1


def _start_s(scenario: dict[str, Any]) -> float:
    start: float = scenario["pools"][0]["cold_start_s"]
    return start


def swept(evaluation: Evaluation, summary: list[dict[str, Any]], colours: dict[str, str]) -> go.Figure:
    """Cost over the cold start, a panel per objective; hollow where the SLO is missed."""
    panels: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for scenario in evaluation.scenarios:
        panels.setdefault((scenario["slo"]["ttft_s"], scenario["slo"]["tpot_s"]), []).append(scenario)
    titles = [f"TTFT {ttft:g} s, TPOT {tpot * 1000:g} ms" for ttft, tpot in panels]
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=titles, shared_yaxes=True)
    for column, scenarios in enumerate(panels.values(), start=1):
        ordered = sorted(scenarios, key=_start_s)
        for name in dict.fromkeys(row["label"] for row in summary):
            found = {row["scenario"]: row for row in summary if row["label"] == name}
            rows = [found[scenario["name"]] for scenario in ordered if scenario["name"] in found]
            symbols = [SYMBOLS[row["tuned"]] + ("" if row["holds_slo"] else MISS) for row in rows]
            figure.add_trace(
                go.Scatter(
                    x=[_start_s(scenario) for scenario in ordered if scenario["name"] in found],
                    y=[row["usd_per_mtok"] for row in rows],
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1,
                    mode="lines+markers",
                    line={"color": colours[rows[0]["policy"]], "width": 1.4},
                    marker={"size": 10, "symbol": symbols},
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(title_text="cold start, seconds", row=1, col=column)
    figure.update_yaxes(title_text="dollars per million tokens", rangemode="tozero", row=1, col=1)
    return styled(figure, 420)


def styled(figure: go.Figure, height: int) -> go.Figure:
    """The look that all plots share; `height` in pixels."""
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 56, "r": 16, "t": 64, "b": 44},
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 0.995, "xanchor": "right", "x": 1.0},
        font={"size": 12, "color": "#1c2230"},
        hovermode="closest",
    )
    figure.update_annotations(font_size=13)
    return figure
