"""How far the cluster model is from measured engines: every measured set fitted, with rows held out.

Reads a folder with the closed-loop measurements of real GPUs (``silicon_e2e_ttft_tpot.csv``, the columns of
aiconfigurator's ``silicon_sample.csv``), KV capacities (``aic_kv_capacity.csv``) and estimated step times
(``aic_forward_pass_steps.csv``). Every figure of ``docs/fidelity.md`` comes from here.
This module must not know how they are shown.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.contract import Floats
from policies.engine import ConfigError, load_engine
from policies.spec import shipped_configs
from training.profiling.conditions import unknown_conditions
from training.profiling.errors import ErrorRow, relative_errors
from training.profiling.fit import Fit, coefficients_of, fit_profile
from training.profiling.measurements import SET_COLUMNS, Limits, LoopLatencyTable, read_measurements

LOOPS, STEPS, CAPACITIES = "silicon_e2e_ttft_tpot.csv", "aic_forward_pass_steps.csv", "aic_kv_capacity.csv"
MIN_ROWS = 8
"""Sets with fewer rows cannot fit five coefficients with rows held out."""
FOLDS = 5
FAMILIES = ("Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-32B")


@dataclass(frozen=True, eq=False)
class SetResult:
    """One measured set."""

    label: str
    rows: int
    fit: Fit
    table: LoopLatencyTable
    saturated: NDArray[np.bool_]

    def held_out(self, quantity: str, rows: NDArray[np.bool_] | None = None) -> Floats:
        """Absolute relative errors of the rows, (chosen,)."""
        errors = relative_errors(self.fit.held_out[quantity], self.fit.table.measured[quantity])
        return errors if rows is None else errors[rows]


def measured_sets(reference: Path, say: Callable[[str], None]) -> tuple[list[SetResult], list[tuple[str, int]]]:
    """Fit every set that has the rows for it; and the sets that have not, with their row counts.

    Args:
        reference: folder with the measured tables.
        say: told about each set before it is fitted.

    Raises:
        ConfigError: when a table does not say what is needed.
        OSError: when a table cannot be read.
    """
    path = reference / LOOPS
    found: list[SetResult] = []
    thin: list[tuple[str, int]] = []
    for where, label, rows in _sets(path):
        if rows < MIN_ROWS:
            thin.append((label, rows))
            continue
        table = read_measurements(path, Limits(_capacity(reference, where), 8192), where)
        if not isinstance(table, LoopLatencyTable):
            raise ConfigError(f"{path}: expected closed-loop latencies, found step times")
        say(f"fitting {label}, {len(table)} rows")
        unknowns = unknown_conditions(saturated=bool(table.saturated.any()))
        fit = fit_profile(table, unknowns=unknowns, folds=FOLDS, bootstrap=0)
        found.append(SetResult(label, len(table), fit, table, table.saturated))
    return found, thin


def step_sets(reference: Path, say: Callable[[str], None]) -> list[tuple[str, ErrorRow, ErrorRow]]:
    """Per set of estimated step times: label, in-sample and held-out error; `say` is told when all are fitted."""
    path = reference / STEPS
    found = []
    for where, label, _ in _sets(path):
        table = read_measurements(path, Limits(1, 1), where)
        fit = fit_profile(table, folds=FOLDS, bootstrap=0)
        found.append((label, fit.errors(held_out=False)[0], fit.errors(held_out=True)[0]))
    say(f"fitted {len(found)} sets of estimated step times")
    return found


def shipped_rows(sets: Sequence[SetResult]) -> list[tuple[str, str, ErrorRow, ErrorRow]]:
    """Shipped profiles, fitted on estimates alone, against the measured set of the same model and GPU."""
    pairs = (
        ("llama-3.1-8b-h100", "Llama-3.1-8B-Instruct, H100 x 1"),
        ("qwen3-32b-h100-tp2", "Qwen3-32B, H100 x 2"),
        ("llama-3.1-70b-h100-tp4-fp8", "Llama-3.1-70B, H100 x 4"),
    )
    rows = []
    for name, start in pairs:
        profile = load_engine(shipped_configs() / "engines" / f"{name}.yaml")
        for result in sets:
            if result.label.startswith(start):
                predicted = result.fit.table.predict(coefficients_of(profile.step))
                errors = [ErrorRow.of(key, predicted[key], result.fit.table.measured[key]) for key in ("tpot", "ttft")]
                rows.append((name, result.label, errors[0], errors[1]))
    return rows


def _sets(path: Path) -> Iterator[tuple[dict[str, str], str, int]]:
    """Conditions that choose one engine's rows, its label and its number of rows."""
    with path.open(newline="", encoding="utf-8") as lines:
        reader = csv.DictReader(lines)
        columns = [column for column in SET_COLUMNS if column in (reader.fieldnames or ())]
        keys = Counter(tuple(row[column] for column in columns) for row in reader)
    for key, rows in keys.items():
        where = dict(zip(columns, key, strict=True))
        yield where, _label(where), rows


def _label(where: dict[str, str]) -> str:
    model = (where.get("model_path") or where.get("model") or "").split("/")[-1]
    tp = int(float(where.get("tp_size") or where.get("tp") or 1))
    gpu = where["system"].split("_")[0].upper()
    precision = where.get("precision") or where.get("weight_dtype") or "bf16"
    return f"{model}, {gpu} x {tp}, {where['backend']} {where['backend_version']}".strip() + f", {precision}"


def _capacity(reference: Path, where: dict[str, str]) -> int:
    """Estimated KV capacity of the engine, tokens; in proportion from another tensor parallel size where need be."""
    family = next(name for name in FAMILIES if name in where["model_path"])
    precision = where.get("precision") or "bf16"
    tp = float(where.get("tp_size") or 1)
    with (reference / CAPACITIES).open(newline="", encoding="utf-8") as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if family in row["model"] and row["system"] == where["system"] and row["weight_dtype"] == precision
        ]
    if not rows:
        raise ConfigError(f"{reference / CAPACITIES}: no KV capacity of {family} in {precision} on {where['system']}")
    rows.sort(key=lambda row: (float(row["tp"]) != tp, row["backend"] != where["backend"]))
    return round(float(rows[0]["kv_tokens"]) * tp / float(rows[0]["tp"]))
