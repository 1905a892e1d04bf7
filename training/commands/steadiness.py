"""``jevons steadiness``: how often policies change the fleet at a constant load.

Only typer is imported at the top, so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.console import (
    check_writable,
    comma_separated,
    one_sentence_errors,
    progress_bar,
    say,
    write_json,
)


@one_sentence_errors
def steadiness(
    policy: Annotated[list[str] | None, typer.Option(help="Policies, comma-separated or repeated.")] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(help="Lengths and service, comma-separated or repeated: chat (when left out), code, reasoning."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of every load.")] = 10,
    hours: Annotated[float, typer.Option(min=1.0, max=48.0, help="Length of each replay.")] = 6.0,
    cost_on: Annotated[
        list[str] | None,
        typer.Option(
            help="Suites, comma-separated or repeated: also replay each without the guardrails of steadiness and "
            "with them, as they ship, and tell what they cost."
        ),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON to this file.")] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes for the suites; as many as CPU cores when left out.")
    ] = None,
) -> None:
    """Count the changes of the fleet at a constant load, 0.3 to 40 replicas, after the first half hour."""
    import os

    from envs.cluster.warm_up import warm_up
    from policies.engine import ConfigError
    from policies.lineup import REFERENCES, resolve, split_references
    from training.commands.robustness import runnable
    from training.judging.comparisons import run_treatments
    from training.judging.scenario_runs import DEFAULT, Variant
    from training.judging.steadiness import MIXES, cost_work, measure
    from training.pages.results import show_comparisons
    from training.replaying.workers import open_workers
    from training.versions.registry import resolve_bundle

    mixes = comma_separated(mix or ["chat"])
    for name in mixes:
        if name not in MIXES:
            raise ConfigError(f"mix {name!r}: expected {', '.join(MIXES)}")
    names = [name for name in split_references(policy or ["learned"]) if name not in REFERENCES]
    if not names:
        raise ConfigError(f"{', '.join(REFERENCES)} decide nothing tick by tick: expected a policy")
    entries = [resolve(name, resolve_bundle) for name in names]
    suites = [runnable(name) for name in comma_separated(cost_on or [])]
    check_writable(json_file)
    warm_up(say)
    rows, costs = [], []
    for chosen in mixes:
        headings = (
            f"{'load':>6}{'changes/h':>11}{'most':>7}{'reversals/h':>13}{'caps/h':>8}{'in time':>9}{'replicas':>10}"
        )
        typer.echo(f"{chosen:16}{headings}")
        for entry in entries:
            with progress_bar(f"{chosen}, {entry.reference}") as on_progress:
                measured = measure(entry, MIXES[chosen], seeds=seeds, hours=hours, on_progress=on_progress)
            for row in measured:
                held = "" if row.holds_slo else "*"
                typer.echo(
                    f"{entry.reference:16}{row.load:6g}{row.changes_per_hour:11.2f}{row.most_changes_per_hour:7.2f}"
                    f"{row.reversals_per_hour:13.2f}{row.cap_changes_per_hour:8.2f}{row.attainment:9.2%}{row.replicas:10.2f}{held}"
                )
                rows.append({"policy": entry.reference, "mix": chosen, **row.row()})
    for suite in suites:
        work = [one for entry in entries for one in cost_work(suite, Variant(entry.reference, DEFAULT, entry))]
        with (
            progress_bar(f"suite {suite.name}") as on_progress,
            open_workers(jobs or len(os.sched_getaffinity(0)), None) as workers,
        ):
            found = run_treatments(suite, work, workers, on_progress)
        typer.echo(f"\nsuite {suite.name}")
        show_comparisons(found)
        costs.append(found.to_json())
    if json_file is not None:
        write_json(json_file, {"constant": rows, "suites": costs, "seeds": seeds, "hours": hours})


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(steadiness)
