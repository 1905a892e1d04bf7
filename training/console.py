"""What the command line prints: tables on stdout, progress and errors on stderr; and how it ends.

Only typer is imported at the top (rich alone takes a tenth of a second), so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

import functools
import json
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from policies.files import write_text

if TYPE_CHECKING:
    from training.evaluate import Evaluation, Progress
    from training.tuning import Tuning

P = ParamSpec("P")
BAD_INPUT, INTERRUPTED = 2, 130
PIPED_WIDTH = 120
"""Width of the tables where stdout is no terminal, characters."""


def say(sentence: str) -> None:
    """One line on stderr."""
    typer.echo(sentence, err=True)


def one_sentence_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn bad input into one sentence on stderr and exit code 2, and Ctrl-C into one line and exit code 130."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from policies.learned import BundleMismatch

        try:
            command(*args, **kwargs)
        except (ValueError, BundleMismatch, OSError) as error:  # ConfigError and TraceError are ValueErrors
            sentence = " ".join(str(error).split())
            say(f"error: {sentence or type(error).__name__}")
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end a worker process without a traceback; its parent reports."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all, and say so.

    Raises:
        OSError: when it cannot be written.
    """
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    write_text(path, text)
    say(f"wrote {path}")


def check_writable(*paths: Path | None, inputs: Sequence[Path | None] = ()) -> None:
    """Refuse before any work is done.

    Args:
        paths: files to write; None stands for none.
        inputs: files that must not be overwritten by them.

    Raises:
        ValueError: when a path's folder does not exist or cannot be written to, when the path is a folder, or when
            two results, or a result and an input, would be the same file.
    """
    taken = {path.resolve() for path in inputs if path is not None}
    for path in paths:
        if path is None:
            continue
        if not path.parent.is_dir():
            raise ValueError(f"{path}: the folder {path.parent} does not exist")
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected a file to write")
        if path.resolve() in taken:
            raise ValueError(f"{path}: is named twice, and would overwrite what another option or argument names")
        taken.add(path.resolve())
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def progress_bar(doing: str) -> Iterator[Progress]:
    """A bar on stderr that long work can tell its progress; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(doing),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, step: bar.update(task, completed=done, total=total, description=step)


@contextmanager
def training_bars() -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], None]]]:
    """What training tells its progress: a function for messages, and one for bars (label, done, total), on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def bar(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=total)
            progress.update(tasks[label], completed=min(done, total))

        yield progress.console.print, bar


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "SLO met": lambda row: f"{_figure(row['attainment'], '.2%')}{' ' if row['holds_slo'] else '*'}",
    "worst hour": lambda row: _figure(row["worst_hour_attainment"], ".1%"),
    "$ /Mtok": lambda row: _figure(row["usd_per_mtok"], ".4f"),
    "$ /good": lambda row: _figure(row["usd_per_good_mtok"], ".4f"),
    "$ in all": lambda row: _figure(row["usd"], ",.0f" if row["usd"] >= 1000 else ".2f"),
    "repl. hours": lambda row: _figure(row["replica_hours"], ",.1f"),
    "GPU use": lambda row: _figure(row["gpu_utilization"], ".0%"),
    "over- size": lambda row: _figure(row["overprovisioning_ratio"], ".2f"),
    "scale per h": lambda row: _figure(row["scale_events_per_hour"], ".1f"),
}
"""Headings of the headline table and what stands below them; 80 characters wide with a policy name of 12."""


COST_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "vs plan": lambda row: ratio(row["cost_vs_plan"]),
    "vs bound": lambda row: ratio(row["cost_vs_bound"]),
    "vs peer": lambda row: ratio(row["cost_vs_best_peer"]),
}
"""Further headings where references or peers stand in the table."""


def ratio(value: float | None) -> str:
    """A cost over another; a dash where that says nothing."""
    return "-" if value is None else f"{value:.2f}"


def _figure(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)


def cheapest_holding(rows: list[dict[str, Any]]) -> float | None:
    """Dollars per million tokens of the cheapest policy that holds the SLO, None when none does.

    References are no policies: nobody can run them.
    """
    return min((row["usd_per_mtok"] for row in rows if row["holds_slo"] and row["tuned"] != "reference"), default=None)


def show_evaluation(evaluation: Evaluation) -> None:
    """Print one table per scenario; a missed SLO is marked, and so is the cheapest policy that holds it."""
    from rich.console import Console
    from rich.table import Table

    from training.cells import label
    from training.standings import scenario_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    summary = scenario_rows(evaluation)
    columns = columns_for(summary)
    for scenario in evaluation.scenarios:
        rows = [row for row in summary if row["scenario"] == scenario["name"]]
        slo = scenario["slo"]
        console.print(
            f"\n{scenario['name']}: TTFT {slo['ttft_s']:g} s, TPOT {slo['tpot_s'] * 1000:g} ms "
            f"for {slo['attainment']:.1%} of {rows[0]['requests']:,.0f} requests{not_servable(scenario)}",
            highlight=False,
            markup=False,
        )
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
        table.add_column("policy", overflow="fold", min_width=12)
        for heading in columns:
            table.add_column("\n".join(heading.split(" ", 1)), justify="right", no_wrap=True)
        best = cheapest_holding(rows)
        for row in rows:
            style = "bold" if row["holds_slo"] and row["usd_per_mtok"] == best else None
            table.add_row(label(row["policy"], row["tuned"]), *(show(row) for show in columns.values()), style=style)
        console.print(table)
    for skipped in evaluation.skipped:
        console.print(f"\n{skipped['name']}: skipped, {skipped['reason']}", highlight=False, markup=False)
    console.print(
        "\n$/Mtok, $/good: provisioned dollars per million tokens served, and served within the SLO.\n"
        "*: misses the SLO. Bold: the cheapest policy that holds it.",
        highlight=False,
    )


def columns_for(rows: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """The headline columns, and those of the ratios where any row has one."""
    compared = any(row["cost_vs_plan"] is not None or row["cost_vs_bound"] is not None for row in rows)
    return {**COLUMNS, **COST_COLUMNS} if compared else COLUMNS


def not_servable(scenario: dict[str, Any]) -> str:
    """What to add to a scenario's heading where not even the clairvoyant plan holds its SLO."""
    return "; not even the clairvoyant plan holds this" if scenario["servable"] is False else ""


def show_tunings(tunings: Sequence[Tuning]) -> None:
    """Print one line per policy and scenario: settings, and what they cost on the slice that they were tuned on."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for heading in ("scenario", "policy", "settings", "SLO met", "$", "runs", "on an edge"):
        table.add_column(heading, overflow="fold", justify="right" if heading in {"SLO met", "$", "runs"} else "left")
    for item in tunings:
        settings = ", ".join(f"{name}={value}" for name, value in item.settings.items())
        met = f"{item.attainment:.2%}{' ' if item.holds_slo else '*'}"
        edges = ", ".join(item.edges)
        table.add_row(item.scenario, item.policy, settings, met, f"{item.usd:.2f}", str(item.trials), edges)
    console.print(table)
