"""``jevons what-if``: sweeps over one trace of the user's own.

Only typer is imported at the top, so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from training.commands.console import check_writable, one_sentence_errors, progress_bar, say, write_json


@one_sentence_errors
def what_if(
    trace: Annotated[Path, typer.Option(help="Trace; any format that `jevons trace import` reads.")],
    policy: Annotated[list[str] | None, typer.Option(help="Policies, comma-separated or repeated.")] = None,
    engine: Annotated[str, typer.Option(help="Engine profile: a shipped name or a YAML file.")] = "llama-3.1-8b-h100",
    cold_start: Annotated[
        str | None,
        typer.Option(help="Seconds from asking for a replica to its first request, as in 60,300; else the profile's."),
    ] = None,
    ttft: Annotated[str | None, typer.Option(help="Objectives on the time to first token, seconds, as in 1,3.")] = None,
    tpot: Annotated[str | None, typer.Option(help="Objectives on the time per output token, seconds.")] = None,
    attainment: Annotated[float, typer.Option(help="Share of requests that must meet both.")] = 0.95,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="Most replicas; by the busiest five minutes when left out.")
    ] = None,
    train: Annotated[
        float | None,
        typer.Option(help="Tune the policies on this share of the trace, from its start, and judge on the rest."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one flat row per result to this file.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report with plots here.")] = None,
    cache: Annotated[Path, typer.Option(help="Folder where plans and tuned settings are kept.")] = Path("runs/cache"),
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; as many as CPU cores when left out.")] = None,
) -> None:
    """Ask what policies would cost on a trace of your own.

    Over cold starts and objectives: one table for every combination, and a plot of the cost over them.
    """
    import os

    from envs.cluster.warm_up import warm_up
    from policies.lineup import split_references
    from policies.spec import find_engine
    from training.judging.evaluate import evaluate
    from training.judging.standings import flat_rows
    from training.judging.what_if import DEFAULT_TPOT_S, DEFAULT_TTFT_S, Sweep, numbers, suite_of
    from training.pages.results import show_evaluation
    from training.replaying.result_cache import ResultCache

    check_writable(json_file, report)
    if not 0 < attainment < 1:
        raise ValueError(f"--attainment: expected a share between 0 and 1, got {attainment:g}")
    references = split_references(policy or ["token-demand,hpa,static"])
    sweep = Sweep(
        cold_start_s=numbers("--cold-start", cold_start, []) or (None,),
        ttft_s=numbers("--ttft", ttft, [DEFAULT_TTFT_S]),
        tpot_s=numbers("--tpot", tpot, [DEFAULT_TPOT_S]),
        attainment=attainment,
    )
    suite = suite_of(trace, find_engine(engine, Path()), sweep, max_replicas, train)
    warm_up(say)
    with progress_bar("evaluating") as on_progress:
        evaluation = evaluate(
            suite,
            references,
            jobs or len(os.sched_getaffinity(0)),
            on_progress,
            tuned=("default",) if train is None else ("default", "train"),
            cache=ResultCache(cache),
        )
    show_evaluation(evaluation)
    if json_file is not None:
        write_json(json_file, flat_rows(evaluation))
    if report is not None:
        from training.pages.report import write_report

        write_report(evaluation, report)
        say(f"wrote {report}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("what-if")(what_if)
