"""The text of ``docs/fidelity.md`` from its figures.

This module must not know how they were found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.pages.tables import table
from training.profiling.conditions import BUDGETS, CACHED_SHARES, KV_SHARES
from training.profiling.errors import ErrorRow
from training.profiling.fidelity import SetResult

Cells = list[str]
NOTES_FROM, NOTES_TO = "<!-- notes:begin -->", "<!-- notes:end -->"
"""The part of the page that people write stands between these lines; it is kept."""
BARS = (
    ("TPOT, median", "tpot", "median", 0.05),
    ("TPOT, mean", "tpot", "mean", 0.08),
    ("TTFT mean, unsaturated rows", "ttft", "mean", 0.15),
)
PUBLISHED = (
    (
        "BLIS (inference-sim)",
        "6.7 % median",
        "17.6 % mean",
        "end to end; 36 held-out runs, 8B to 141B, three GPU types",
    ),
    ("Vidur", "under 9 %", "-", "request latency percentiles of replayed traces, one model and GPU at a time"),
    ("LLMServingSim 2.0", "1.9 %", "-", "throughput and latency on one GPU server whose operators it profiled first"),
)
SPEEDS = (
    ("BLIS (inference-sim), Go", "every iteration", "2.9 (1 replica), 5.7 (4)"),
    ("Vidur, Python, event loop alone", "every iteration", "5.5 (1 replica), 6.5 (4)"),
    ("vllm-sr-sim, Python", "every request, its service time frozen at admission", "0.016 (1 replica), 0.025 (4)"),
)
JUDGED = (("tpot_p50_s", "median TPOT"), ("ttft_p90_s", "TTFT p90"))
BENCH_FIGURE = "simulator_requests_per_s_200000"
WORST_LISTED = 12
SET_HEADINGS = (
    "set",
    "rows",
    "TPOT held out, median / mean (90 % interval)",
    "in sample",
    "TTFT held out, unsaturated",
    "in sample",
)
CLIENT_BINS = (
    ("up to 16 clients", 1, 16),
    ("17 to 64", 17, 64),
    ("65 to 127", 65, 127),
    ("128 and more", 128, 1 << 30),
)

INTRODUCTION = """\
# Fidelity: how far the cluster model is from measured engines

Written by `make fidelity REFERENCE=FOLDER`: every table comes from the command; only "Where it misses" and "Terms that
were tried" are written by people, and kept. Errors are |predicted / measured - 1|.

**Protocol.** The measured rows are closed loops on real GPUs: a fixed number of clients, each sending its next request
when the last one returns; mean TTFT and TPOT by prompt length, output length and concurrency (dense models, a subset
of aiconfigurator's `silicon_sample.csv`, Apache-2.0). The prediction is the cluster model itself, run at that
concurrency, not a formula. *Held out*: the rows are dealt at random into {folds} folds; five coefficients, and the
unknown conditions of the measurement (next paragraph), are fitted on the other folds and predict the fold.
*Saturated* rows are those whose requests in flight, at full length, exceed the KV capacity: their TTFT is the length
of a queue.

**What the files do not say** is chosen by the rows that are fitted, one unknown after the other: requests per client
(10 or 20 from a common start, or a steady state), whether one client more than the batch always waits, whether a run
ends after 1,000 requests, tokens per iteration ({budgets}), the share of each prompt that a prefix cache
holds ({cached}), and for sets with saturated rows the share of the estimated KV capacity ({kv}). The first of each
list is the most usual and stays, unless another lowers the cost of the fitted rows by more than the standard error of
its gain over the rows. That is information about the load generator and the engine's flags; who measures with
`jevons profile measure` has it.

## Measured sets"""


def page(
    sets: Sequence[SetResult],
    thin: Sequence[tuple[str, int]],
    fresh: Sequence[SetResult],
    steps: Sequence[tuple[str, ErrorRow, ErrorRow]],
    shipped: Sequence[tuple[str, str, ErrorRow, ErrorRow]],
    bench: Path | None,
    live: Sequence[Path],
    notes: str,
) -> str:
    """The whole page; `notes` is the part that people write, kept as it stands."""
    parts = [
        INTRODUCTION.format(
            folds=sets[0].fit.folds,
            budgets=", ".join(f"{budget:,}" for budget in BUDGETS),
            cached=", ".join(f"{share:.0%}" for share in CACHED_SHARES),
            kv=", ".join(f"{share:g}" for share in KV_SHARES),
        ),
        table(SET_HEADINGS, [_set_cells(result) for result in sets]),
        *(f"{label}: {rows} row, too few to fit." for label, rows in thin),
        "## Against the bars",
        table(("over all sets, held out", "error", "rows", "bar", ""), _bar_cells(sets)),
        *(_fresh(fresh) if fresh else []),
        "## What was fitted, under which conditions",
        table(
            ("set", "a ms", "b us/token", "c us/seq", "d us/1k KV", "e ns/token²", "conditions"),
            [_coefficient_cells(result) for result in sets],
        ),
        f"## The {WORST_LISTED} worst rows, held out",
        table(("set", "prompt + output", "clients", "quantity", "measured ms", "predicted ms", "error"), _worst(sets)),
        "## TTFT by number of clients",
        "Mean error, held out, unsaturated rows; in brackets the rows.",
        table(("set", *(label for label, _, _ in CLIENT_BINS)), [_client_cells(result) for result in sets]),
        notes.strip(),
        "## Shipped profiles against measured rows",
        "The shipped profiles were fitted on aiconfigurator's estimates, on no measured row.\n"
        "Here they predict the measured sets, whose engine, version or flags may differ:",
        table(
            ("profile", "measured set", "TPOT median / mean", "TTFT median / mean"),
            [[name, label, _two(tpot), _two(ttft)] for name, label, tpot, ttft in shipped],
        ),
        "## Estimated step times",
        "One iteration's time by prefill tokens, batch and context, estimated by\n"
        f"aiconfigurator for {len(steps)} pairs of model and engine, and how well the five coefficients follow.",
        _step_table(steps),
        *(_live(live) if live else []),
        "## Beside published simulators",
        table(("simulator", "error", "TTFT", "what the figure covers"), [_ours(sets), *map(list, PUBLISHED)]),
        "The figures are not of the same experiment: they cover other rows, quantities and engines, and are cited\n"
        "from their authors.",
        "## Speed",
        table(("simulator", "simulates", "CPU ms per request"), _speeds(bench)),
        "Ours: one core, `make bench`, Poisson arrivals on 8 replicas of an 8B model; theirs: single runs of "
        "other traffic.\nThe figures say by what order of magnitude they differ, no more.",
    ]
    return "\n\n".join(parts) + "\n"


def _two(error: ErrorRow) -> str:
    return f"{error.median:.1%} / {error.mean:.1%}"


def _three(error: ErrorRow) -> str:
    return f"{_two(error)} ({error.mean_low:.1%} to {error.mean_high:.1%})"


def _set_cells(result: SetResult) -> Cells:
    calm = ~result.saturated
    held = {error.quantity: error for error in result.fit.errors(held_out=True)}
    seen = {error.quantity: error for error in result.fit.errors(held_out=False)}
    calm_held = {error.quantity: error for error in result.fit.errors(held_out=True, rows=calm)}
    calm_seen = {error.quantity: error for error in result.fit.errors(held_out=False, rows=calm)}
    rows = f"{result.rows}" + (f" ({int(result.saturated.sum())} saturated)" if result.saturated.any() else "")
    return [
        result.label,
        rows,
        _three(held["tpot"]),
        _two(seen["tpot"]),
        _three(calm_held["ttft"]),
        _two(calm_seen["ttft"]),
    ]


def _pooled(sets: Sequence[SetResult], quantity: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.concatenate(
        [result.held_out(quantity, ~result.saturated if quantity == "ttft" else None) for result in sets]
    )


def _bar_cells(sets: Sequence[SetResult]) -> list[Cells]:
    cells = []
    for label, quantity, statistic, bar in BARS:
        errors = _pooled(sets, quantity)
        value = float(np.median(errors) if statistic == "median" else errors.mean())
        cells.append([label, f"{value:.1%}", str(len(errors)), f"{bar:.0%}", "met" if value <= bar else "**missed**"])
    for result in sets:
        for label, quantity, statistic, bar in BARS:
            errors = result.held_out(quantity, ~result.saturated if quantity == "ttft" else None)
            value = float(np.median(errors) if statistic == "median" else errors.mean())
            if value > bar:
                cells.append([f"{label}: {result.label}", f"{value:.1%}", str(len(errors)), f"{bar:.0%}", "**missed**"])
    return cells


def _fresh(sets: Sequence[SetResult]) -> list[str]:
    """The sets that had no part in any choice."""
    return [
        "## Sets that nobody had looked at",
        "The model form, the lists of unknown conditions and the rule that chooses were settled on the sets above.\n"
        "These sets, from the same collection, were chosen by model, GPU and engine alone and opened after that:\n"
        "the clean test.",
        table(SET_HEADINGS, [_set_cells(result) for result in sets]),
        table(("over these sets, held out", "error", "rows", "bar", ""), _bar_cells(sets)),
        table(("set", "conditions chosen on all rows"), [[one.label, str(one.fit.conditions)] for one in sets]),
    ]


def _coefficient_cells(result: SetResult) -> Cells:
    return [
        result.label,
        *(f"{value:.4g}" for value in result.fit.step.model_dump().values()),
        str(result.fit.conditions),
    ]


def _client_cells(result: SetResult) -> Cells:
    cells = [result.label]
    for _, low, high in CLIENT_BINS:
        clients = result.table.concurrency
        rows = (clients >= low) & (clients <= high) & ~result.saturated
        cells.append(f"{result.held_out('ttft', rows).mean():.1%} ({int(rows.sum())})" if rows.any() else "-")
    return cells


def _worst(sets: Sequence[SetResult]) -> list[Cells]:
    found = []
    for result in sets:
        points = result.table
        for quantity, label in (("tpot", "TPOT"), ("ttft", "TTFT")):
            errors = result.held_out(quantity)
            for row in np.argsort(errors)[-WORST_LISTED:]:
                prompt, output, clients = (
                    int(values[row]) for values in (points.prompt_tokens, points.output_tokens, points.concurrency)
                )
                mark = ", saturated" if result.saturated[row] else ""
                found.append(
                    (
                        float(errors[row]),
                        [
                            result.label,
                            f"{prompt:,} + {output:,}",
                            f"{clients}{mark}",
                            label,
                            f"{points.measured[quantity][row] * 1e3:,.1f}",
                            f"{result.fit.held_out[quantity][row] * 1e3:,.1f}",
                            f"{errors[row]:.0%}",
                        ],
                    )
                )
    return [cells for _, cells in sorted(found, key=lambda entry: -entry[0])[:WORST_LISTED]]


def _step_table(steps: Sequence[tuple[str, ErrorRow, ErrorRow]]) -> str:
    seen = np.array([error.mean for _, error, _ in steps])
    held = np.array([error.mean for _, _, error in steps])
    best, worst = int(held.argmin()), int(held.argmax())
    rows = [
        ["mean of the sets", f"{seen.mean():.1%}", f"{held.mean():.1%}"],
        [f"best: {steps[best][0]}", f"{seen[best]:.1%}", f"{held[best]:.1%}"],
        [f"worst: {steps[worst][0]}", f"{seen[worst]:.1%}", f"{held[worst]:.1%}"],
    ]
    return table(("sets", "in sample, mean", "held out, mean"), rows)


def _live(files: Sequence[Path]) -> list[str]:
    rows, summaries = [], []
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        judged = [_extremes(data["rows"], quantity, label) for quantity, label in JUDGED]
        summaries.append(f"{data['profile']}: {'; '.join(judged)}.")
        for row in data["rows"]:
            if row["quantity"] in ("ttft_p50_s", "ttft_p90_s", "tpot_p50_s", "tpot_p90_s", "e2e_p50_s", "output_tps"):
                spread = row["repeat_spread"]
                rows.append(
                    [
                        data["profile"],
                        str(row["batch_cap"]),
                        row["quantity"],
                        f"{row['measured']:.4g}",
                        f"{row['simulated']:.4g}",
                        f"{row['error']:+.1%}",
                        "-" if spread is None else f"{spread:.1%}",
                    ]
                )
    return [
        "## A real engine, replayed",
        "A slice of traffic that the fit never saw, on a live engine and through the cluster model.",
        "\n".join(summaries),
        table(("profile", "batch cap", "quantity", "live", "simulated", "error", "live repeats differ by"), rows),
    ]


def _extremes(rows: Sequence[dict[str, Any]], quantity: str, label: str) -> str:
    """How far a quantity is off at the best and the worst batch cap, and how far live repeats differ."""
    chosen = [row for row in rows if row["quantity"] == quantity]
    errors = [abs(row["error"]) for row in chosen]
    spreads = [row["repeat_spread"] for row in chosen if row["repeat_spread"] is not None]
    found = f"{label} off by {min(errors):.1%} to {max(errors):.1%} over {len(chosen)} batch caps"
    return found + (f" (live repeats differ by {min(spreads):.0%} to {max(spreads):.0%})" if spreads else "")


def _ours(sets: Sequence[SetResult]) -> Cells:
    tpot, ttft = _pooled(sets, "tpot"), _pooled(sets, "ttft")
    return [
        "Jevons",
        f"{np.median(tpot):.1%} median, {tpot.mean():.1%} mean (TPOT)",
        f"{ttft.mean():.1%} mean",
        f"held out; {len(tpot)} closed-loop rows of {len(sets)} sets, unsaturated ones for TTFT",
    ]


def _speeds(bench: Path | None) -> list[Cells]:
    rows = [list(row) for row in SPEEDS]
    if bench is not None:
        figures = {
            figure["name"]: figure["value"]
            for figure in map(json.loads, bench.read_text(encoding="utf-8").splitlines())
        }
        milliseconds = f"{1e3 / figures[BENCH_FIGURE]:.5f} (8 replicas)"
        rows.insert(0, ["Jevons", "every iteration, exactly, macro-stepped", milliseconds])
    return rows


def notes_of(page: Path) -> str:
    """The written part of an existing page, with its marks; only the marks for a new page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    start, end = text.find(NOTES_FROM), text.find(NOTES_TO)
    return text[start : end + len(NOTES_TO)] if 0 <= start < end else f"{NOTES_FROM}\n{NOTES_TO}"
