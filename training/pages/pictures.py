"""The pictures of ``docs/images``: bursts under several policies, and learning curves.

This module must not know how the figures came about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from policies.atomic_files import write_whole
from training.pages.report import rolling_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from training.replaying.timeline import Timeline


class Picture(NamedTuple):
    """A scenario to show and the policies to show on it."""

    suite: str
    scenario: str
    policies: tuple[str, ...]


PICTURES = {
    "burst": Picture("dev", "flash crowd", ("learned", "reactive", "llm-d-tokens", "plan")),
    "standing": Picture("standing", "bursts, then calm", ("learned", "reactive", "llm-d-tokens", "hpa")),
}
"""By the name of the file."""
COLOURS = ("#3556c8", "#d9822b", "#1f9d7a", "#111827", "#9b4fc0")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "jevons",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
"""A fixed salt, so that the same figures give the same file."""
ATTAINED_OVER_S = 120.0
CURVES = {
    "score": "cost",
    "attainment": "in time",
    "holds_slo_share": "hold the SLO",
}


def burst(timelines: dict[str, Timeline], title: str, target: float) -> Figure:
    """Arrivals, replicas, batch caps, waiting requests and attainment over time, a line per policy.

    Args:
        timelines: by the name of the policy, of the same traffic.
        title: of the picture.
        target: share of requests that must be in time.
    """
    figure, axes = _panels(5, title)
    arrivals, replicas, caps, waiting, attained = axes
    first = next(iter(timelines.values()))
    arrivals.plot(first.time_s / 60, first.arrival_rps, color="#5b6475", linewidth=1)
    for (name, line), colour in zip(timelines.items(), COLOURS, strict=False):
        minutes = line.time_s / 60
        style: dict[str, Any] = {
            "color": colour,
            "label": name,
            "linestyle": "--" if name == "plan" else "-",
            "linewidth": 1.2,
        }
        met = rolling_mean(np.fmin(line.ttft_attainment, line.tpot_attainment), line.time_s, ATTAINED_OVER_S)
        replicas.step(minutes, line.ready.sum(axis=1), where="post", **style)
        caps.step(minutes, line.batch_cap[:, 0], where="post", **style)
        waiting.plot(minutes, line.queue_requests, **style)
        attained.plot(minutes, met, **style)
    waiting.set_yscale("symlog", linthresh=10)
    attained.axhline(target, color="#b3261e", linewidth=0.8, linestyle=":")
    for axis, text in zip(
        axes,
        ("requests/s", "ready replicas", "batch cap", "waiting requests", f"in time, {ATTAINED_OVER_S / 60:g} min"),
        strict=True,
    ):
        axis.set_ylabel(text)
    replicas.legend(loc="upper right", fontsize=8, frameon=False)
    attained.set_xlabel("minutes")
    return figure


def learning(curves: Sequence[Sequence[dict[str, float]]], title: str) -> Figure:
    """What validation said over the steps of training: the mean over seeds and the band from lowest to highest.

    Args:
        curves: validations of each seed, in order; each with its steps and figures.
        title: of the picture.
    """
    figure, axes = _panels(len(CURVES), title)
    until = min(curve[-1]["steps"] for curve in curves)
    steps = np.linspace(0.0, until, 200)
    for axis, (name, text) in zip(axes, CURVES.items(), strict=True):
        seeds = np.array(
            [np.interp(steps, [p["steps"] for p in curve], [p[name] for p in curve]) for curve in curves], np.float64
        )
        axis.fill_between(steps / 1e6, seeds.min(axis=0), seeds.max(axis=0), color=COLOURS[0], alpha=0.2, linewidth=0)
        axis.plot(steps / 1e6, seeds.mean(axis=0), color=COLOURS[0], linewidth=1.4)
        axis.set_ylabel(text)
    axes[-1].set_xlabel("million steps")
    return figure


def read_curves(run: Path) -> list[list[dict[str, float]]]:
    """The validations of every seed of a training run's folder.

    Raises:
        ValueError: when there is none, or a file is not the state of a run.
    """
    curves = []
    for path in sorted(run.glob("seed-*/state.json")):
        try:
            curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
            if not all({"steps", *CURVES} <= point.keys() for point in curve):
                raise KeyError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: not the state of a training run") from None
        if curve:
            curves.append(curve)
    if not curves:
        raise ValueError(f"{run}: no validation of any seed here: expected seed-*/state.json")
    return curves


def _panels(count: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure of panels above each other, on one horizontal axis."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 1.5 * count + 0.6), layout="constrained")
        axes = list(np.atleast_1d(figure.subplots(count, 1, sharex=True)))
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.align_ylabels(axes)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    """Write an SVG, whole or not at all, without a date.

    Raises:
        OSError: when it cannot be written.
    """
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        write_whole(path, lambda partial: figure.savefig(partial, format="svg", metadata={"Date": None}))
