"""An engine profile that was fitted: made, shown, and written with its report.

Heavy modules are imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.atomic_files import write_text
from training.commands.console import progress_bar, say, write_json

if TYPE_CHECKING:
    from policies.engine import EngineProfile
    from training.profiling.conditions import Unknowns
    from training.profiling.errors import ErrorRow
    from training.profiling.fit import Fit
    from training.profiling.measurements import Limits, Measured


def limits_of(profile: EngineProfile, kv_tokens: int | None, budget: int | None, seqs: int | None) -> Limits:
    """The engine's limits, the profile's where an option leaves them out."""
    from training.profiling.measurements import Limits

    return Limits(kv_tokens or profile.kv_capacity_tokens, budget or profile.max_num_batched_tokens, seqs)


def unknowns_of(table: Measured, budget: int | None, per_client: int | None) -> Unknowns:
    """Ways that a table may have been measured; none but the stated one where the file says it."""
    from training.profiling.conditions import AS_STATED, unknown_conditions
    from training.profiling.measurements import LoopLatencyTable

    if not isinstance(table, LoopLatencyTable) or table.protocols is not None:
        return AS_STATED
    return unknown_conditions(budget, per_client, saturated=bool(table.saturated.any()))


def fitted(
    table: Measured,
    unknowns: Unknowns | None,
    start: EngineProfile | None,
    fixed: dict[str, float],
    folds: int,
    bootstrap: int,
    seed: int,
) -> Fit:
    """`fit_profile` with a progress bar; `unknowns` None leaves the conditions as stated."""
    from envs.cluster.warm_up import warm_up
    from training.profiling.conditions import AS_STATED
    from training.profiling.fit import fit_profile

    warm_up(say)
    with progress_bar("fitting") as tell:
        return fit_profile(
            table,
            unknowns=unknowns or AS_STATED,
            start=None if start is None else start.step,
            fixed=fixed,
            folds=folds,
            bootstrap=bootstrap,
            seed=seed,
            on_progress=tell,
        )


def profile_of(base: EngineProfile, name: str, fit: Fit, changes: dict[str, Any], source: str) -> EngineProfile:
    """`base` with the fitted coefficients, another name, and what the fit was made from; `changes` of None are none."""
    from policies.engine import EngineProfile
    from training.pages.profiles import fit_errors

    errors = "; ".join(
        f"{error.quantity}{label}: mean error {error.mean:.1%} over {error.rows} rows"
        for label, error in fit_errors(fit)
    )
    data = base.model_dump() | {field: value for field, value in changes.items() if value is not None}
    data |= {"name": name, "step": fit.step.model_dump()}
    data["fitted_on"] = f"{source}. Conditions: {fit.conditions}. {errors}."
    return EngineProfile.model_validate(data)


def deliver(profile: EngineProfile, fit: Fit, out: Path, report: Path | None, json_file: Path | None) -> None:
    """Show a fit on stdout, and write its profile, its HTML report and its JSON."""
    from training.pages.profiles import (
        ERROR_HEADINGS,
        coefficient_cells,
        error_cells,
        fit_errors,
        scatter,
        show,
        write_page,
    )

    errors = fit_errors(fit)
    tables = [
        ("Errors", ERROR_HEADINGS, error_cells(errors)),
        ("Coefficients", ("coefficient", "value", "90 % interval"), coefficient_cells(fit)),
    ]
    for title, headings, cells in tables:
        show(title, headings, cells)
    say(f"conditions: {fit.conditions}")
    note = "Cold start, price and node size are the base profile's: set your own."
    write_profile(out, profile, ["Written by `jevons profile`.", note])
    say(f"wrote {out}")
    if report is not None:
        series = {"in sample": fit.in_sample} | ({"held out": fit.held_out} if fit.folds else {})
        write_page(report, f"{profile.name}: fit", tables, scatter(series, fit.table.measured))
        say(f"wrote {report}")
    if json_file is not None:
        write_json(
            json_file,
            {
                "profile": profile.model_dump(mode="json"),
                "conditions": str(fit.conditions),
                "errors": error_rows(errors),
                "coefficients": {row[0]: {"value": row[1], "interval": row[2]} for row in coefficient_cells(fit)},
            },
        )


def error_rows(errors: Sequence[tuple[str, ErrorRow]]) -> list[dict[str, Any]]:
    """Labelled errors as plain data for JSON."""
    from dataclasses import asdict

    return [{"label": label.strip(", "), **asdict(error)} for label, error in errors]


def write_profile(path: Path, profile: EngineProfile, notes: Sequence[str]) -> None:
    """Write a profile as YAML, `notes` above it as comments.

    Raises:
        OSError: when it cannot be written.
    """
    import yaml

    data: dict[str, Any] = profile.model_dump(mode="json")
    text = "".join(f"# {note}\n" for note in notes) + yaml.safe_dump(
        data, sort_keys=False, allow_unicode=True, width=110
    )
    write_text(path, text)
