"""``jevons robustness`` and ``jevons ablate``: policies under abuse, and the learned policy in parts.

Only typer is imported at the top, so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.console import PIPED_WIDTH, check_writable, one_sentence_errors, progress_bar, say, write_json
from training.tables import shown_points, shown_ratio

if TYPE_CHECKING:
    from training.contrasts import Contrast, Contrasts
    from training.scenarios import Scenario, Suite

SuiteOption = Annotated[str, typer.Option(help="Suite: a YAML file, or the name of a shipped one.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this scenario; repeatable.")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds of every scenario, from 0; the suite's when left out.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write everything that was found as JSON to this file.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; as many as CPU cores when left out.")]
RayAddress = Annotated[str | None, typer.Option(help="Run on this Ray cluster; local starts one on this machine.")]


@one_sentence_errors
def robustness(
    suite: SuiteOption = "dev",
    policy: Annotated[list[str] | None, typer.Option(help="Policies, comma-separated or repeated.")] = None,
    abuse: Annotated[list[str] | None, typer.Option(help="Only this abuse; repeatable.")] = None,
    scenario: Only = None,
    seeds: Seeds = None,
    tuned: Annotated[
        str, typer.Option(help="Settings of the policies, comma-separated: default, train, self, hindsight.")
    ] = "default",
    json_file: Json = None,
    cache: Annotated[Path, typer.Option(help="Folder where tuned settings are kept.")] = Path("runs/cache"),
    jobs: Jobs = None,
    ray_address: RayAddress = None,
) -> None:
    """Judge policies under abuse: wrong profiles, late or missing metrics, storms.

    Every policy runs on every scenario as it is and under each abuse: the SLOs that it still holds, its cost over its
    own cost without the abuse, and how often it scales.
    """
    import os

    from envs.kernel_cache import warm_up
    from policies.lineup import REFERENCES, resolve, split_references
    from training.abuses import named
    from training.contrasts import Treatment, Work, run_treatments
    from training.evaluate import variants
    from training.registry import resolve_bundle
    from training.result_cache import ResultCache
    from training.workers import open_workers

    chosen = _suite(suite, scenario, seeds)
    references = split_references(policy or ["learned,reactive,hpa"])
    entries = [resolve(name, resolve_bundle) for name in references if name not in REFERENCES]
    abuses = named(abuse or [])
    check_writable(json_file)
    warm_up(say)
    with (
        progress_bar("abusing") as on_progress,
        open_workers(jobs or len(os.sched_getaffinity(0)), ray_address) as workers,
    ):
        modes = [word.strip() for word in tuned.split(",")]
        found = variants(chosen, entries, modes, workers, ResultCache(cache), on_progress)
        work = [
            Work(Treatment(item.name, item.meaning, abuse=item), where, variant)
            for where, variant in found
            for item in abuses
            if item.concerns(where.spec)
        ]
        contrasts = run_treatments(chosen, work, workers, on_progress)
    show_contrasts(contrasts)
    if json_file is not None:
        write_json(json_file, contrasts.to_json())


@one_sentence_errors
def ablate(
    suite: SuiteOption = "pools",
    policy: Annotated[str, typer.Option(help="Learned policy: learned, a bundle file, or one in the registry.")] = (
        "learned"
    ),
    scenario: Only = None,
    seeds: Seeds = None,
    json_file: Json = None,
    jobs: Jobs = None,
    ray_address: RayAddress = None,
) -> None:
    """Judge the learned policy in parts: replicas alone, batch cap alone, no choice of pool.

    What it does not decide is left to the rule that it learned from, to a rule of our own, or to the engine.
    """
    import os

    from envs.kernel_cache import warm_up
    from policies.fleet import Fleet
    from policies.lineup import resolve
    from training.ablations import ABLATIONS
    from training.cells import DEFAULT, Variant
    from training.contrasts import Treatment, Work, run_treatments
    from training.registry import resolve_bundle
    from training.workers import open_workers

    chosen = _suite(suite, scenario, seeds)
    entry = resolve(policy, resolve_bundle)
    check_writable(json_file)
    variant = Variant(policy, DEFAULT, entry)
    work = [
        Work(Treatment(part.name, part.meaning, make=part.make), where, variant)
        for where in chosen.scenarios
        for part in ABLATIONS
        if part.concerns(where.spec)
    ]
    for where in chosen.scenarios:
        ABLATIONS[0].make(entry, Fleet.from_specs([where.spec]), where.spec.interface)  # says what does not fit
    warm_up(say)
    with (
        progress_bar("ablating") as on_progress,
        open_workers(jobs or len(os.sched_getaffinity(0)), ray_address) as workers,
    ):
        contrasts = run_treatments(chosen, work, workers, on_progress, group_of_pools)
    show_contrasts(contrasts)
    if json_file is not None:
        write_json(json_file, contrasts.to_json())


def group_of_pools(scenario: Scenario) -> str:
    """Scenarios with as many pools are summed up together."""
    return f"{len(scenario.pools)} pool{'s' if len(scenario.pools) > 1 else ''}"


def _suite(reference: str, only: list[str] | None, seeds: int | None) -> Suite:
    from training.scenarios import load_suite

    suite = load_suite(reference)
    suite = suite.only(only) if only else suite
    for skipped in suite.skipped:
        say(f"note: scenario {skipped.name!r} is skipped: {skipped.reason}")
    if seeds is None:
        return suite
    seeded = tuple(item.model_copy(update={"seeds": tuple(range(seeds))}) for item in suite.scenarios)
    return suite.model_copy(update={"scenarios": seeded})


def show_contrasts(contrasts: Contrasts) -> None:
    """Print one table per policy and group."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table

    from training.cells import label

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    ordered = sorted(contrasts.contrasts, key=lambda item: (item.group, item.policy, item.tuned))
    for (group, policy, tuned), rows in groupby(ordered, key=lambda item: (item.group, item.policy, item.tuned)):
        title = label(policy, tuned) if group == "all" else f"{label(policy, tuned)}, {group}"
        console.print(f"\n{title}", highlight=False, markup=False)
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("", min_width=28)
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(row.treatment, *(show(row) for show in COLUMNS.values()))
        console.print(table)
    console.print(
        "\nheld: scenarios whose SLO is held, of those concerned. cost: over the same policy's cost in the first row, "
        "on scenarios held both times.\nIn brackets: bootstrap interval over scenarios and seeds, 2.5 to 97.5 %.",
        highlight=False,
    )


COLUMNS: dict[str, Callable[[Contrast], str]] = {
    "held": lambda row: f"{row.held}/{row.scenarios}",
    "before": lambda row: f"{row.held_before}/{row.scenarios}",
    "SLO met": lambda row: f"{row.attainment:.1%}",
    "change, points": lambda row: shown_points(row.attainment_change),
    "cost": lambda row: shown_ratio(row.cost_ratio),
    "scale per h": lambda row: f"{row.scale_events_per_hour:.1f}",
    "before ": lambda row: f"{row.scale_events_per_hour_before:.1f}",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(robustness)
    app.command()(ablate)
