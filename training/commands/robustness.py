"""``jevons robustness`` and ``jevons ablate``: policies under disturbance, and the learned policy in parts.

Only typer is imported at the top, so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.commands.console import (
    check_writable,
    comma_separated,
    one_sentence_errors,
    progress_bar,
    say,
    write_json,
)

if TYPE_CHECKING:
    from training.replaying.scenarios import Scenario, Suite

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
    disturbance: Annotated[list[str] | None, typer.Option(help="Only this disturbance; repeatable.")] = None,
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
    """Judge policies under disturbance: wrong profiles, late or missing metrics, storms.

    Every policy runs on every scenario as it is and under each disturbance: the SLOs that it still holds, its cost
    over its own cost without the disturbance, and how often it scales.
    """
    import os

    from envs.cluster.warm_up import warm_up
    from policies.lineup import REFERENCES, resolve, split_references
    from training.judging.comparisons import Treatment, Work, run_treatments
    from training.judging.evaluate import variants
    from training.pages.results import show_comparisons
    from training.replaying.disturbances import named
    from training.replaying.result_cache import ResultCache
    from training.replaying.workers import open_workers
    from training.versions.registry import resolve_bundle

    chosen = runnable(suite, scenario, seeds)
    references = split_references(policy or ["learned,reactive,hpa"])
    entries = [resolve(name, resolve_bundle) for name in references if name not in REFERENCES]
    disturbances = named(disturbance or [])
    check_writable(json_file)
    warm_up(say)
    with (
        progress_bar("disturbing") as on_progress,
        open_workers(jobs or len(os.sched_getaffinity(0)), ray_address) as workers,
    ):
        found = variants(chosen, entries, comma_separated([tuned]), workers, ResultCache(cache), on_progress)
        work = [
            Work(Treatment(item.name, item.meaning, disturbance=item), where, variant)
            for where, variant in found
            for item in disturbances
            if item.concerns(where.spec)
        ]
        comparisons = run_treatments(chosen, work, workers, on_progress)
    show_comparisons(comparisons)
    if json_file is not None:
        write_json(json_file, comparisons.to_json())


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

    from envs.cluster.warm_up import warm_up
    from policies.fleet import Fleet
    from policies.lineup import resolve
    from training.judging.ablations import ABLATIONS
    from training.judging.comparisons import Treatment, Work, run_treatments
    from training.judging.scenario_runs import DEFAULT, Variant
    from training.pages.results import show_comparisons
    from training.replaying.workers import open_workers
    from training.versions.registry import resolve_bundle

    chosen = runnable(suite, scenario, seeds)
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
        comparisons = run_treatments(chosen, work, workers, on_progress, group_of_pools)
    show_comparisons(comparisons)
    if json_file is not None:
        write_json(json_file, comparisons.to_json())


def group_of_pools(scenario: Scenario) -> str:
    """Scenarios with as many pools are summed up together."""
    return f"{len(scenario.pools)} pool{'s' if len(scenario.pools) > 1 else ''}"


def runnable(reference: str, only: list[str] | None = None, seeds: int | None = None) -> Suite:
    """A suite, or some scenarios of it; says which cannot run here."""
    from training.replaying.scenarios import load_suite

    suite = load_suite(reference)
    suite = suite.only(only) if only else suite
    for skipped in suite.skipped:
        say(f"note: scenario {skipped.name!r} is skipped: {skipped.reason}")
    if seeds is None:
        return suite
    seeded = tuple(item.model_copy(update={"seeds": tuple(range(seeds))}) for item in suite.scenarios)
    return suite.model_copy(update={"scenarios": seeded})


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(robustness)
    app.command()(ablate)
