"""What a fit or a validation shows: tables for the terminal, an HTML page of plots.

This module must not know how the figures came about.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from policies.atomic_files import write_text
from policies.contract import Floats
from training.profiling.errors import ErrorRow
from training.profiling.fit import Fit, coefficients_of
from training.profiling.measurements import COEFFICIENTS, QUANTITIES
from training.profiling.validation import LatencyComparison

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2230; margin: 0; background: #f6f7f9; }
main { max-width: 1000px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 32px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: #fff; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid #e2e5ea; }
th:first-child, td:first-child { text-align: left; }
"""
COLOURS = ("#3556c8", "#d9822b", "#1f9d7a", "#9b4fc0", "#c23b5a", "#4aa3c7")
Cells = Sequence[Sequence[str]]

ERROR_HEADINGS = ("quantity", "rows", "median", "mean", "90 % interval", "p90", "worst")
REPLAY_HEADINGS = ("quantity", "batch cap", "measured", "simulated", "error", "repeats differ by")


def error_cells(errors: Sequence[tuple[str, ErrorRow]]) -> list[list[str]]:
    """One line per (label, error) pair, under `ERROR_HEADINGS`."""
    return [
        [
            f"{QUANTITIES.get(error.quantity, error.quantity)}{label}",
            str(error.rows),
            f"{error.median:.1%}",
            f"{error.mean:.1%}",
            f"{error.mean_low:.1%} to {error.mean_high:.1%}",
            f"{error.p90:.1%}",
            f"{error.worst:.1%}",
        ]
        for label, error in errors
    ]


def fit_errors(fit: Fit) -> list[tuple[str, ErrorRow]]:
    """In-sample and held-out errors of a fit, labelled."""
    rows = [(", in sample", error) for error in fit.errors(held_out=False)]
    if fit.folds:
        rows += [(f", held out ({fit.folds} folds)", error) for error in fit.errors(held_out=True)]
    return rows


def coefficient_cells(fit: Fit) -> list[list[str]]:
    """Name, value and interval of each coefficient."""
    return [
        [name, f"{value:.4g}", "-" if np.isnan(low) else f"{low:.4g} to {high:.4g}"]
        for name, value, low, high in zip(COEFFICIENTS, coefficients_of(fit.step), fit.low, fit.high, strict=True)
    ]


def replay_cells(comparisons: Sequence[LatencyComparison]) -> list[list[str]]:
    """One line per quantity and batch cap, under `REPLAY_HEADINGS`."""
    cells = []
    for comparison in comparisons:
        for row in comparison.rows():
            spread = row["repeat_spread"]
            cells.append(
                [
                    str(row["quantity"]),
                    str(row["batch_cap"]),
                    f"{row['measured']:.4g}",
                    f"{row['simulated']:.4g}",
                    f"{row['error']:+.1%}",
                    "-" if spread is None else f"{spread:.1%}",
                ]
            )
    return cells


def show(title: str, headings: Sequence[str], cells: Cells) -> None:
    """Print one table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="left" if column == 0 else "right", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(f"\n{title}", highlight=False, markup=False)
    console.print(table)


def scatter(predictions: Mapping[str, Mapping[str, Floats]], measured: Mapping[str, Floats]) -> list[go.Figure]:
    """Predicted against measured, one figure per quantity, milliseconds on logarithmic axes.

    Args:
        predictions: per series (such as "held out"), per quantity, (rows,) seconds.
        measured: per quantity, (rows,) seconds.
    """
    figures = []
    for quantity, known in measured.items():
        figure = go.Figure()
        for colour, (series, values) in zip(COLOURS, predictions.items(), strict=False):
            figure.add_scatter(
                x=known * 1e3,
                y=values[quantity] * 1e3,
                mode="markers",
                name=series,
                marker={"color": colour, "size": 7, "opacity": 0.75},
            )
        ends = np.array([np.nanmin(known), np.nanmax(known)]) * 1e3
        for factor, dash in ((1.0, "solid"), (0.9, "dot"), (1.1, "dot")):
            figure.add_scatter(
                x=ends,
                y=ends * factor,
                mode="lines",
                line={"color": "#7d8590", "width": 1, "dash": dash},
                showlegend=factor == 1.0,
                name="equal, 10 % beside it dotted",
            )
        name = QUANTITIES.get(quantity, quantity)
        figure.update_xaxes(type="log", title=f"measured {name}, ms")
        figure.update_yaxes(type="log", title=f"predicted {name}, ms")
        figure.update_layout(title=name, height=460, template="plotly_white")
        figures.append(figure)
    return figures


def distributions(comparisons: Sequence[LatencyComparison]) -> list[go.Figure]:
    """Share of requests below each latency, live and simulated, one figure per quantity."""
    figures = []
    for attribute, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "end to end")):
        figure = go.Figure()
        for colour, comparison in zip(COLOURS, comparisons, strict=False):
            pooled = np.concatenate([getattr(one, attribute) for one in comparison.live])
            for values, label, dash in (
                (pooled, "live", "solid"),
                (getattr(comparison.simulated, attribute), "simulated", "dot"),
            ):
                known = np.sort(values[~np.isnan(values)])
                figure.add_scatter(
                    x=known * 1e3,
                    y=(np.arange(len(known)) + 1) / len(known),
                    mode="lines",
                    name=f"cap {comparison.batch_cap}, {label}",
                    line={"color": colour, "dash": dash},
                )
        figure.update_xaxes(type="log", title=f"{name}, ms")
        figure.update_yaxes(title="share of requests", range=[0, 1])
        figure.update_layout(title=name, height=420, template="plotly_white")
        figures.append(figure)
    return figures


def write_page(
    path: Path, title: str, tables: Sequence[tuple[str, Sequence[str], Cells]], figures: Sequence[go.Figure]
) -> None:
    """Write one HTML file that needs no network.

    Args:
        path: file to write.
        title: heading.
        tables: (heading, column headings, cells) each.
        figures: below the tables.

    Raises:
        OSError: when it cannot be written.
    """
    parts = [
        "<!DOCTYPE html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>',
        f"<script>{get_plotlyjs()}</script></head><body><main><h1>{html.escape(title)}</h1>",
    ]
    for heading, columns, cells in tables:
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
        parts.append(f"<h2>{html.escape(heading)}</h2><table><tr>{head}</tr>{body}</table>")
    parts += [figure.to_html(full_html=False, include_plotlyjs=False) for figure in figures]
    parts.append("</main></body></html>")
    page = "\n".join(parts)
    write_text(path, page)
