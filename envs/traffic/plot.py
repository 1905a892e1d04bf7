"""A trace as one HTML page that works offline."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from envs.traffic.summary import counts, dispersion, summarize
from envs.traffic.trace import Trace, TraceError

_MAX_BINS = 2_000
_ROUND_WINDOWS_S = (1, 5, 10, 30, 60, 300, 600, 1_800, 3_600, 21_600, 86_400)


def plot_html(trace: Trace, window_s: float | None = None) -> str:
    """Arrivals per window, the dispersion curve and token counts, with plotly inlined.

    Args:
        trace: what to plot.
        window_s: width of the arrival bins, seconds; by default the smallest round one of at most 2,000 bins.

    Raises:
        TraceError: when the trace is empty, or is shorter than two windows.
    """
    if not len(trace):
        raise TraceError(f"trace {trace.name!r}: has no requests to plot")
    if window_s is None:
        fitting = (width for width in _ROUND_WINDOWS_S if trace.duration_s / width <= _MAX_BINS)
        window_s = float(next(fitting, trace.duration_s / _MAX_BINS))
        window_s = min(window_s, trace.duration_s / 2) or 1.0
    if not 0 < window_s <= trace.duration_s / 2:
        raise TraceError(
            f"trace {trace.name!r}: window of {window_s:g} s: expected at most half of the {trace.duration_s:g} s"
        )
    figure = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        subplot_titles=(f"Arrivals per second, bins of {window_s:g} s", "Index of dispersion", "Tokens per request"),
    )
    per_window = counts(trace, window_s) / window_s
    hours = np.arange(len(per_window)) * window_s / 3600
    figure.add_trace(go.Scatter(x=hours, y=per_window, mode="lines", name="arrivals", showlegend=False), 1, 1)
    windows_s = np.geomspace(0.1, max(0.2, trace.duration_s / 10), 25)
    curve = [dispersion(trace, float(width)) for width in windows_s]
    figure.add_trace(go.Scatter(x=windows_s, y=curve, mode="lines+markers", name="this trace", showlegend=False), 2, 1)
    flat = {"x": windows_s[[0, -1]], "y": [1.0, 1.0], "line_dash": "dot", "line_color": "gray"}
    figure.add_trace(go.Scatter(mode="lines", name="a Poisson process", **flat), 2, 1)
    for label, tokens in (("prompt", trace.prompt_tokens), ("output", trace.output_tokens)):
        share, edges = _log_histogram(tokens)
        figure.add_trace(go.Scatter(x=edges, y=share, mode="lines", line_shape="hv", name=label), 2, 2)
    figure.update_xaxes(title_text="hours", row=1, col=1)
    figure.update_yaxes(title_text="requests/s", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="window, seconds", type="log", row=2, col=1)
    figure.update_yaxes(type="log", row=2, col=1)
    figure.update_xaxes(title_text="tokens", type="log", row=2, col=2)
    figure.update_yaxes(title_text="share of requests", rangemode="tozero", row=2, col=2)
    summary = summarize(trace)
    figure.update_layout(
        template="plotly_white",
        height=800,
        # plotly renders a subset of HTML in titles, and a trace's name comes from a file.
        title=f"{html.escape(trace.name)}: {summary.requests:,} requests, {summary.mean_rps:,.3f} req/s, "
        f"CV of inter-arrival times {summary.iat_cv:.2f}",
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page


def _log_histogram(tokens: NDArray[np.int32]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Share of requests per bin, and the bins' left edges, 60 bins equally wide in log tokens."""
    edges = np.geomspace(max(1.0, float(tokens.min())) * 0.999, float(tokens.max()) * 1.001, 61)
    found, _ = np.histogram(tokens, edges)
    return found / len(tokens), edges[:-1]
