"""``jevons trace``: look at, import, generate and rescale request traces.

The heavy modules are imported inside the commands, so that ``jevons --help`` stays fast.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from policies.atomic_files import write_text

if TYPE_CHECKING:
    from envs.traffic.arrival_clock import Unit
    from envs.traffic.trace import Trace

app = typer.Typer(help="Look at, import, generate and rescale request traces.", no_args_is_help=True)

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)?")
_DURATION_HELP = "such as 90s, 30m, 24h, 7d or 1h30m"
P = ParamSpec("P")

Source = Annotated[Path, typer.Argument(help="Trace file; any format that `import` reads, recognised by content.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
ColumnMap = Annotated[
    str | None,
    typer.Option("--map", help="Columns of other CSV and JSONL files: arrival_s=ts,prompt_tokens=in,..."),
]
UnitName = Annotated[
    str | None, typer.Option("--unit", help="Unit of times from a start in other CSV and JSONL files: s, ms, us or ns.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed; the same seed gives the same result.")]


def _parse_duration(text: str, option: str) -> float:
    """Seconds of an option's duration such as ``90``, ``30m`` or ``1h30m``."""
    compact = text.strip().lower()
    if not re.fullmatch(rf"(?:{_DURATION.pattern}\s*)+", compact):
        raise typer.BadParameter(f"expected a duration {_DURATION_HELP}, got {text!r}", param_hint=option)
    return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION.findall(compact))


def _plain_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn bad input into one sentence on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        from envs.traffic.trace import TraceError
        from policies.engine import ConfigError
        from policies.redaction import shown

        try:
            command(*args, **kwargs)
        except (TraceError, ConfigError) as error:
            typer.echo(f"error: {shown(error)}", err=True)
            raise typer.Exit(2) from None
        except MemoryError:
            typer.echo("error: the trace needs more memory than there is", err=True)
            raise typer.Exit(2) from None

    return wrapped


@app.command()
@_plain_errors
def info(
    source: Source,
    column_map: ColumnMap = None,
    unit: UnitName = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print a trace's size, rate, burstiness and token counts."""
    from dataclasses import asdict

    from envs.traffic.summary import summarize

    summary = summarize(_read(source, column_map, unit))
    if as_json:
        typer.echo(json.dumps(_finite(asdict(summary)), indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from policies.redaction import shown as printable

    table = Table("", "", title=escape(printable(summary.name)), show_header=False)
    table.add_row("requests", f"{summary.requests:,}")
    table.add_row("duration", f"{summary.duration_s / 3600:,.2f} h")
    table.add_row("mean rate", f"{summary.mean_rps:,.3f} req/s")
    table.add_row("CV of inter-arrival times", f"{summary.iat_cv:.2f}")
    for window_s, value in summary.dispersion.items():
        table.add_row(f"index of dispersion, {window_s:g} s", f"{value:,.2f}")
    table.add_row("peak / mean, 10 s", f"{summary.peak_to_mean_10s:.2f}")
    table.add_row("empty 10-s bins", f"{summary.empty_10s_share:.1%}")
    for label, percentiles in (("prompt", summary.prompt_percentiles), ("output", summary.output_percentiles)):
        shown = " / ".join(f"{percentiles[level]:,.0f}" for level in (50, 90, 99))
        table.add_row(f"{label} tokens p50 / p90 / p99", shown)
    table.add_row("prompt tokens found in cache", f"{summary.prefix_hit_share:.1%}")
    table.add_row("sessions / tenants / models", f"{summary.sessions:,} / {summary.tenants:,} / {summary.models:,}")
    table.add_row("digest", summary.digest[:16])
    Console().print(table)


@app.command("import")
@_plain_errors
def import_(
    source: Annotated[Path, typer.Argument(help="Request log: Parquet, CSV or JSONL, gzip-compressed or not.")],
    out: Out,
    column_map: ColumnMap = None,
    unit: UnitName = None,
    skip_bad: Annotated[bool, typer.Option(help="Leave bad rows out and count them, instead of stopping.")] = False,
    seed: Seed = 0,
    force: Force = False,
    max_rows: Annotated[int, typer.Option(min=1, help="Most requests that are read.")] = 100_000_000,
    max_bytes: Annotated[int, typer.Option(min=1, help="Most bytes that are read, unpacked.")] = 16 * 2**30,
) -> None:
    """Turn a request log into a canonical Parquet trace."""
    from envs.traffic.formats import import_trace
    from envs.traffic.trace_files import TraceLimits

    _check_output(out, force, source)
    limits, known = TraceLimits(max_rows, max_bytes), _parse_unit(unit)
    result = import_trace(source, _parse_map(column_map), skip_bad=skip_bad, seed=seed, limits=limits, unit=known)
    _write(result.trace, out)
    typer.echo(f"read {result.rows_read:,} rows as {result.format}, skipped {result.rows_skipped:,}", err=True)
    for note in result.notes:
        typer.echo(f"note: {note}", err=True)
    for sentence in result.first_errors:
        typer.echo(f"skipped: {sentence}", err=True)


@app.command()
@_plain_errors
def generate(
    out: Out,
    profile: Annotated[
        str | None,
        typer.Option(help="chat, code, reasoning, agentic, diurnal_mix, flash_crowd or regime_change."),
    ] = None,
    duration: Annotated[str | None, typer.Option(help=f"Length of the trace, {_DURATION_HELP}.")] = None,
    rps: Annotated[float | None, typer.Option(help="Mean requests per second.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML generator spec with every parameter; the options above override it.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Generate a trace with the burst shape and lengths of published ones."""
    from envs.traffic.generator import GeneratorSpec
    from envs.traffic.generator import generate as generate_trace
    from policies.engine import ConfigError, parse_model, read_yaml

    _check_output(out, force)
    data = read_yaml(config) if config else {}
    if not isinstance(data, dict):
        raise ConfigError(f"{config}: expected a mapping of fields")
    options = {
        "profile": profile,
        "duration_s": None if duration is None else _parse_duration(duration, "--duration"),
        "mean_rps": rps,
    }
    data |= {field: value for field, value in options.items() if value is not None}
    where = str(config) if config else "--profile, --duration, --rps"
    _write(generate_trace(parse_model(data, GeneratorSpec, where), seed), out)


@app.command("slice")
@_plain_errors
def slice_(
    source: Source,
    out: Out,
    start: Annotated[str, typer.Option(help=f"Time that becomes 0, {_DURATION_HELP}.")] = "0s",
    end: Annotated[str | None, typer.Option(help="End, exclusive; default the end of the trace.")] = None,
    force: Force = False,
) -> None:
    """Cut a time range out of a trace."""
    _check_output(out, force, source)
    start_s = _parse_duration(start, "--start")
    end_s = float("inf") if end is None else _parse_duration(end, "--end")
    _write(_read(source).slice(start_s, end_s), out)


@app.command()
@_plain_errors
def scale(
    source: Source,
    out: Out,
    factor: Annotated[float | None, typer.Option(help="Factor on the mean rate.")] = None,
    rps: Annotated[float | None, typer.Option(help="Mean requests per second to reach, instead of a factor.")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Change a trace's mean rate without stretching its bursts."""
    from envs.traffic.scaling import scale as scale_trace

    _check_output(out, force, source)
    if (factor is None) == (rps is None):
        raise typer.BadParameter("expected either --factor or --rps")
    trace = _read(source)
    if factor is None:
        from envs.traffic.trace import TraceError

        if not trace.mean_rps:
            raise TraceError(f"{source}: has no mean rate to scale to --rps")
        factor = (rps or 0.0) / trace.mean_rps
    _write(scale_trace(trace, factor, seed), out)


@app.command()
@_plain_errors
def plot(
    source: Source,
    out: Out,
    window: Annotated[str | None, typer.Option(help="Width of the arrival bins; default by the duration.")] = None,
    force: Force = False,
) -> None:
    """Write a self-contained HTML page: arrivals, dispersion and token counts."""
    from envs.traffic.plot import plot_html
    from envs.traffic.trace import TraceError

    _check_output(out, force, source)
    html = plot_html(_read(source), None if window is None else _parse_duration(window, "--window"))
    try:
        write_text(out, html)
    except OSError as error:
        raise TraceError(str(error)) from None
    typer.echo(f"wrote {out}", err=True)


def _read(source: Path, column_map: str | None = None, unit: str | None = None) -> Trace:
    from envs.traffic.formats import import_trace

    result = import_trace(source, _parse_map(column_map), unit=_parse_unit(unit))
    for note in result.notes:
        typer.echo(f"note: {source}: {note}", err=True)
    return result.trace


def _write(trace: Trace, out: Path) -> None:
    from envs.traffic.trace_files import write_trace

    write_trace(trace, out)
    typer.echo(f"wrote {out}: {len(trace):,} requests in {trace.duration_s / 3600:,.2f} h, {trace.mean_rps:,.3f} req/s")


def _check_output(out: Path, force: bool, source: Path | None = None) -> None:
    """Refuse before any work is done."""
    from envs.traffic.trace import TraceError

    if source is not None and out.exists() and source.exists() and out.samefile(source):
        raise TraceError(f"{out}: is the source; choose another name")
    if out.exists() and not force:
        raise TraceError(f"{out}: exists already; choose another name or pass --force")
    if not out.parent.is_dir():
        raise TraceError(f"{out}: the folder {out.parent} does not exist")


def _parse_map(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    for field, equals, column in pairs:
        if not (field.strip() and equals and column.strip()):
            raise typer.BadParameter(f"expected --map field=column,field=column, got {text!r}")
    return {field.strip(): column.strip() for field, _, column in pairs}


def _parse_unit(text: str | None) -> Unit | None:
    from envs.traffic.arrival_clock import UNITS_S

    unit = next((one for one in UNITS_S if one == text), None)
    if text is not None and unit is None:
        raise typer.BadParameter(f"expected one of {', '.join(UNITS_S)}, got {text!r}", param_hint="--unit")
    return unit


def _finite(value: Any) -> Any:
    """NaN as null: JSON has no NaN."""
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, float) and value != value:
        return None
    return value
