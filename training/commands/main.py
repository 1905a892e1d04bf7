"""``jevons``: the command line.

Only typer is imported at the top; everything heavy is imported inside the commands, so that
``jevons --help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaler.commands import bundle, check, control, decisions, emulate
from envs.traffic import commands as trace
from policies.atomic_files import write_whole
from training.commands import profile, record, robustness, steadiness, sweep, train, what_if
from training.commands.console import (
    check_writable,
    comma_separated,
    one_sentence_errors,
    progress_bar,
    say,
    write_json,
)

if TYPE_CHECKING:
    from training.judging.evaluate import Evaluation

app = typer.Typer(
    help="Jevons: an autoscaler for LLM inference fleets that learns cost per token.",
    no_args_is_help=True,
    rich_markup_mode=None,  # drawing the help with rich would double the time to the first line
    pretty_exceptions_show_locals=False,
)
app.add_typer(trace.app, name="trace")
app.add_typer(profile.app, name="profile")

QUICK_SLICE_S = (12 * 3600.0, 15 * 3600.0)
"""The part of the demo's day that ``--quick`` replays, around the maximum of the day."""
DEFAULT_CACHE = Path("runs/cache")
Cache = Annotated[Path, typer.Option(help="Folder where plans and tuned settings are kept.")]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Run on this Ray cluster (auto, ray://HOST:10001); local starts one on this machine."),
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; as many as there are CPU cores when left out.")]


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"jevons {importlib.metadata.version('jevons')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Jevons: an autoscaler for LLM inference fleets that learns cost per token."""


@app.command()
@one_sentence_errors
def evaluate(
    suite: Annotated[
        str,
        typer.Option(
            help="Suite: a YAML file, or the name of a shipped one (demo, dev, full, gate, pools, smoke, standing)."
        ),
    ] = "smoke",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies, comma-separated or repeated: learned, reactive, hpa, keda and more (all: every one, see "
            "docs/peers.md), with parameters as in hpa:target_share=0.6, self-tuned as in hpa+self, a bundle file, "
            "or models:/NAME@ALIAS.  [default: the suite's]",
            show_default=False,
        ),
    ] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; repeatable.")] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings of the policies, comma-separated or repeated: default, train (tuned on the train slice), "
            "self (these, moved at run time by the measured attainment), hindsight (tuned on the test slice).  "
            "[default: default]",
            show_default=False,
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write one flat row per scenario, policy and seed to this file.")
    ] = None,
    details: Annotated[Path | None, typer.Option(help="Write everything that was found as JSON to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report to this file.")] = None,
    cache: Cache = DEFAULT_CACHE,
    jobs: Jobs = None,
    ray_address: RayAddress = None,
) -> None:
    """Judge policies: attainment, cost, plots.

    Every policy runs on every scenario and seed of a suite, through the controller that ships. `all` stands for every
    policy there is and for the references: the fluid bound, the clairvoyant plan and the best static fleet.
    """
    from policies.lineup import split_references
    from training.replaying.scenarios import load_suite

    chosen = load_suite(suite)
    references = split_references(policy or chosen.policies)
    if scenario:
        chosen = chosen.only(scenario)
    check_writable(json_file, details, report)
    for skipped in chosen.skipped:
        say(f"note: scenario {skipped.name!r} is skipped: {skipped.reason}")
    evaluation = _evaluate(chosen, references, jobs, _words(tuned), cache, ray_address)
    from training.pages.results import show_evaluation

    show_evaluation(evaluation)
    if json_file is not None:
        from training.judging.standings import flat_rows

        write_json(json_file, flat_rows(evaluation))
    _write_results(evaluation, details, report)


@app.command()
@one_sentence_errors
def tune(
    suite: Annotated[str, typer.Option(help="Suite: a YAML file, or the name of a shipped one.")] = "smoke",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Policies, comma-separated or repeated.  [default: all]", show_default=False),
    ] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; repeatable.")] = None,
    hindsight: Annotated[
        bool, typer.Option("--hindsight", help="Tune on the test slice itself: what nobody can do beforehand.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found as JSON to this file.")] = None,
    cache: Cache = DEFAULT_CACHE,
    jobs: Jobs = None,
    ray_address: RayAddress = None,
) -> None:
    """Find the settings of policies that hold the SLO at the lowest cost.

    On the train slice of every scenario. Studies are kept in the cache folder; a run that was cut off goes on.
    """
    import os
    from dataclasses import asdict

    from envs.cluster.warm_up import warm_up
    from policies.lineup import REFERENCES, resolve, split_references
    from training.replaying.result_cache import ResultCache
    from training.replaying.scenarios import load_suite
    from training.replaying.workers import open_workers
    from training.tuning.tuner import Part, TuningTask
    from training.tuning.tuner import tune as search

    chosen = load_suite(suite)
    if scenario:
        chosen = chosen.only(scenario)
    policies = [name for name in split_references(policy or ["all"]) if name not in REFERENCES]
    check_writable(json_file)
    for name in policies:
        resolve(name)
    part: Part = "hindsight" if hindsight else "train"
    tasks = [TuningTask(item, name, part) for item in chosen.scenarios for name in policies]
    warm_up(say)
    with (
        progress_bar("tuning") as on_progress,
        open_workers(jobs or len(os.sched_getaffinity(0)), ray_address) as workers,
    ):
        found = search(tasks, workers, ResultCache(cache), on_progress)
    from training.pages.results import show_tunings

    show_tunings(found)
    if json_file is not None:
        write_json(json_file, [asdict(item) for item in found])


@app.command()
@one_sentence_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and summary.json.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option("--quick", help="Replay three hours instead of the whole day.")] = False,
    jobs: Jobs = None,
) -> None:
    """Judge the shipped policy on a generated day.

    The baselines run beside it; the results go to report.html and summary.json.
    """
    from policies.lineup import SHIPPED_BUNDLE, split_references
    from training.replaying.scenarios import load_suite

    suite = load_suite("demo")
    if quick:
        cut = tuple(scenario.model_copy(update={"slice": QUICK_SLICE_S}) for scenario in suite.scenarios)
        suite = suite.model_copy(update={"scenarios": cut})
    out.mkdir(parents=True, exist_ok=True)
    references = split_references(suite.policies)
    if not SHIPPED_BUNDLE.is_file():
        references.remove("learned")
        say("note: no pretrained policy ships with this checkout; the demo shows the baselines only")
    evaluation = _evaluate(suite, references, jobs)
    from training.pages.results import show_evaluation

    show_evaluation(evaluation)
    _write_results(evaluation, out / "summary.json", out / "report.html")


@app.command()
@one_sentence_errors
def simulate(
    trace: Annotated[Path, typer.Option(help="Trace; any format that `jevons trace import` reads.")],
    engine: Annotated[str, typer.Option(help="Engine profile: a shipped name or a YAML file.")],
    replicas: Annotated[int, typer.Option(min=1, help="Size of the fleet, ready from the start.")],
    batch_cap: Annotated[
        int | None, typer.Option(min=1, help="Concurrent requests per replica; the engine's limit when left out.")
    ] = None,
    ttft: Annotated[float | None, typer.Option(help="Objective on the time to first token, seconds.")] = None,
    tpot: Annotated[float | None, typer.Option(help="Objective on the time per output token, seconds.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary as JSON to this file.")] = None,
    requests: Annotated[Path | None, typer.Option(help="Write one Parquet row per request to this file.")] = None,
) -> None:
    """Replay a trace on a fixed fleet.

    All replicas are ready from the start; there is one row of latencies per request.
    """
    for name, value in (("--ttft", ttft), ("--tpot", tpot)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a number of seconds above 0, got {value:g}")
    check_writable(json_file, requests)

    from envs.cluster.warm_up import warm_up
    from envs.traffic.formats import import_trace
    from policies.spec import find_engine
    from training.replaying.fixed_fleet import simulate as replay_fixed

    profile = find_engine(engine, Path())
    imported = import_trace(trace)
    for note in imported.notes:
        say(f"note: {trace}: {note}")
    warm_up(say)
    replay = replay_fixed(imported.trace, profile, replicas, batch_cap)
    summary = {
        "trace": str(trace),
        "engine": profile.name,
        "replicas": replicas,
        "batch_cap": batch_cap or profile.max_num_seqs,
        **replay.summary(ttft, tpot),
    }
    _show_summary(summary)
    if requests is not None:
        write_whole(requests, replay.write_requests)
        say(f"wrote {requests}")
    if json_file is not None:
        write_json(json_file, summary)


def _words(texts: list[str] | None) -> tuple[str, ...]:
    """The words of a comma-separated, repeatable option, `default` when there is none."""
    return tuple(comma_separated(texts or ["default"]))


def _evaluate(
    suite: Any,
    references: list[str],
    jobs: int | None,
    tuned: tuple[str, ...] = ("default",),
    cache: Path | None = None,
    ray_address: str | None = None,
) -> Evaluation:
    import os

    from envs.cluster.warm_up import warm_up
    from training.judging.evaluate import evaluate as judge
    from training.replaying.result_cache import ResultCache

    warm_up(say)
    with progress_bar("evaluating") as on_progress:
        return judge(
            suite,
            references,
            jobs or len(os.sched_getaffinity(0)),
            on_progress,
            tuned=tuned,
            cache=ResultCache(cache),
            ray_address=ray_address,
        )


def _write_results(evaluation: Evaluation, json_file: Path | None, report: Path | None) -> None:
    if json_file is not None:
        write_json(json_file, evaluation.to_json())
    if report is not None:
        from training.pages.report import write_report

        write_report(evaluation, report)
        say(f"wrote {report}")


def _show_summary(summary: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "", show_header=False)
    for name, value in summary.items():
        shown = (
            "-"
            if value is None
            else f"{value:,.6g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else value
        )
        table.add_row(name, shown)
    Console().print(table)


for group in (train, sweep, what_if, record, robustness, steadiness):
    group.register(app)
LIVE: list[Callable[..., None]] = [*control.COMMANDS, *decisions.COMMANDS, check.check, emulate.emulate]
for command in LIVE:
    app.command()(one_sentence_errors(command))
bundles = typer.Typer(help="Keys and signatures of policy bundles.", no_args_is_help=True)
for command in bundle.COMMANDS:
    bundles.command()(one_sentence_errors(command))
app.add_typer(bundles, name="bundle")
