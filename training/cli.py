"""``jevons``: the command line.

Only typer is imported at the top; everything heavy is imported inside the commands, so that
``jevons --help`` answers at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaler import edge_cli, run_cli
from envs import trace_cli
from training import record_cli, train_cli
from training.console import check_writable, one_sentence_errors, progress_bar, say, show_evaluation, write_whole

if TYPE_CHECKING:
    from training.evaluate import Evaluation

app = typer.Typer(
    help="Jevons: an autoscaler for LLM inference fleets that learns cost per token.",
    no_args_is_help=True,
    rich_markup_mode=None,  # drawing the help with rich would double the time to the first line
    pretty_exceptions_show_locals=False,
)
app.add_typer(trace_cli.app, name="trace")

QUICK_SLICE_S = (12 * 3600.0, 15 * 3600.0)
"""The part of the demo's day that ``--quick`` replays, around the maximum of the day."""
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
        str, typer.Option(help="Suite: a YAML file, or the name of a shipped one (demo, gate, smoke).")
    ] = "smoke",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Policies, comma-separated or repeated: learned, token-demand, hpa, static (all: all four), with "
            "parameters as in hpa:target_share=0.6, a bundle file, or models:/NAME@ALIAS.  [default: the suite's]",
            show_default=False,
        ),
    ] = None,
    scenario: Annotated[list[str] | None, typer.Option(help="Only this scenario; repeatable.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every row as JSON to this file.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a self-contained HTML report to this file.")] = None,
    jobs: Jobs = None,
) -> None:
    """Judge policies: attainment, cost, plots.

    Every policy runs on every scenario and seed of a suite, through the controller that ships.
    """
    from policies.lineup import split_references
    from training.scenarios import load_suite

    chosen = load_suite(suite)
    references = split_references(policy or chosen.policies)
    if scenario:
        chosen = chosen.only(scenario)
    check_writable(json_file, report)
    evaluation = _evaluate(chosen, references, jobs)
    show_evaluation(evaluation)
    _write_results(evaluation, json_file, report)


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
    from training.scenarios import load_suite

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

    from envs.kernel_cache import warm_up
    from envs.trace_formats import import_trace
    from policies.spec import find_engine
    from training.simulate import simulate as replay_fixed

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
        _write_json(json_file, summary)


def _evaluate(suite: Any, references: list[str], jobs: int | None) -> Evaluation:
    import os

    from envs.kernel_cache import warm_up
    from training.evaluate import evaluate as judge

    warm_up(say)
    with progress_bar() as on_progress:
        return judge(suite, references, jobs or len(os.sched_getaffinity(0)), on_progress)


def _write_results(evaluation: Evaluation, json_file: Path | None, report: Path | None) -> None:
    if json_file is not None:
        _write_json(json_file, evaluation.to_json())
    if report is not None:
        from training.report import write_report

        write_report(evaluation, report)
        say(f"wrote {report}")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    say(f"wrote {path}")


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


train_cli.register(app)
record_cli.register(app)
for command in run_cli.COMMANDS:
    app.command()(one_sentence_errors(command))
for command in edge_cli.COMMANDS:
    app.command()(one_sentence_errors(command))
