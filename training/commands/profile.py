"""`jevons profile`: engine profiles from measurements, estimates and live engines; and how far off they are.

Importing this module must stay cheap: the work is imported inside the commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.commands import profile_options as options
from training.commands.console import check_writable, one_sentence_errors, progress_bar, say, write_json
from training.commands.fitted_profile import deliver, error_rows, fitted, limits_of, profile_of, unknowns_of

if TYPE_CHECKING:
    from policies.engine import EngineProfile

app = typer.Typer(help="Make engine profiles, and see how far they are from measurements.", no_args_is_help=True)

REQUESTS_PER_CLIENT = 10
"""Assumed by `validate` where neither the file nor an option says it."""
MAX_CLIENTS = 4096
"""Of a sweep: the largest batch that a profile may have."""


@app.command()
@one_sentence_errors
def fit(
    data: Annotated[Path, typer.Argument(help="CSV of step times, or of closed-loop TTFT and TPOT.")],
    base: options.Base,
    out: options.Out,
    name: options.Name = None,
    where: options.Where = None,
    fix: options.Fix = None,
    kv_tokens: options.KvTokens = None,
    max_num_batched_tokens: options.Budget = None,
    max_num_seqs: options.Seqs = None,
    requests_per_client: options.PerClient = None,
    folds: options.Folds = 5,
    bootstrap: options.Bootstrap = 40,
    seed: options.Seed = 0,
    report: options.Report = None,
    json_file: options.Json = None,
) -> None:
    """Fit a profile to measured step times or closed-loop latencies.

    Closed loops are fitted by running the cluster model at the measured concurrency. Where the file does not say how
    they were run, the ways they may have been run are tried, and the held-out rows never help to choose.
    """
    from policies.spec import find_engine
    from training.profiling.measurements import read_measurements

    options.check_outputs(out, report, json_file, inputs=[data])
    profile = find_engine(base, Path())
    limits = limits_of(profile, kv_tokens, max_num_batched_tokens, None)
    fixed = options.numbers(fix)
    table = read_measurements(data, limits, options.pairs(where, "--where"))
    unknowns = unknowns_of(table, max_num_batched_tokens, requests_per_client)
    found = fitted(table, unknowns, profile, fixed, folds, bootstrap, seed)
    changes = {
        "kv_capacity_tokens": kv_tokens,
        "max_num_batched_tokens": max_num_batched_tokens or found.conditions.max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
    }
    made = profile_of(profile, name or out.stem, found, changes, f"{data.name}{_chosen(where)}")
    deliver(made, found, out, report, json_file)


@app.command("from-aiconfigurator")
@one_sentence_errors
def from_aiconfigurator(
    model: Annotated[str, typer.Option("--model", help="Model, such as meta-llama/Llama-3.1-8B.")],
    system: Annotated[str, typer.Option("--system", help="GPU system, such as h100_sxm.")],
    base: options.Base,
    out: options.Out,
    backend: Annotated[str, typer.Option("--backend", help="vllm, sglang or trtllm.")] = "vllm",
    backend_version: Annotated[
        str | None, typer.Option("--backend-version", help="Version of the tables; the current one when left out.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Tensor parallel size.")] = 1,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="Of the matrix products, such as fp8; the model's own if left out."),
    ] = None,
    name: options.Name = None,
    max_num_batched_tokens: options.Budget = None,
    max_num_seqs: options.Seqs = None,
    folds: options.Folds = 5,
    seed: options.Seed = 0,
    report: options.Report = None,
    json_file: options.Json = None,
) -> None:
    """Make a profile from aiconfigurator's estimates, for any pair that it covers.

    Needs the extra: pip install 'jevons[aiconfigurator]'. Its operator timings were measured; the sum is an estimate.
    """
    from policies.spec import find_engine
    from training.profiling.aiconfigurator import estimate

    options.check_outputs(out, report, json_file)
    profile = find_engine(base, Path())
    seqs = max_num_seqs or profile.max_num_seqs
    budget = max_num_batched_tokens or profile.max_num_batched_tokens
    estimated = estimate(model, system, backend, backend_version, tp, precision, seqs, budget)
    found = fitted(estimated.steps, None, profile, {}, folds, 40, seed)
    changes = {
        "model": model,
        "gpu": system,
        "backend": f"{backend} {estimated.backend_version}",
        "precision": precision or profile.precision,
        "gpus_per_replica": tp,
        "gpus_per_node": max(tp, profile.gpus_per_node),
        "kv_capacity_tokens": estimated.kv_capacity_tokens,
        "max_num_seqs": seqs,
        "max_num_batched_tokens": budget,
    }
    made = profile_of(profile, name or out.stem, found, changes, f"{estimated.source}, estimates")
    deliver(made, found, out, report, json_file)


@app.command()
@one_sentence_errors
def measure(
    url: options.Url,
    base: options.Base,
    out: options.Out,
    model: options.Model = None,
    name: options.Name = None,
    rows: Annotated[
        Path | None, typer.Option("--rows", help="CSV that keeps the measured points; OUT with .csv if left out.")
    ] = None,
    concurrency: Annotated[str, typer.Option("--concurrency", help="Clients, comma-separated.")] = "1,2,4,8,16,32",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt tokens, comma-separated.")] = "64,256,1024",
    output: Annotated[str, typer.Option("--output", help="Mean output tokens, comma-separated.")] = "32,128",
    max_minutes: Annotated[float, typer.Option("--max-minutes", min=0.01, help="Stop sending after this.")] = 20.0,
    max_num_batched_tokens: options.Budget = None,
    max_num_seqs: options.Seqs = None,
    kv_tokens: options.KvTokens = None,
    fix: options.Fix = None,
    folds: options.Folds = 5,
    bootstrap: options.Bootstrap = 40,
    seed: options.Seed = 0,
    report: options.Report = None,
    json_file: options.Json = None,
) -> None:
    """Measure a live engine and fit its profile.

    A sweep of closed loops, at most the largest concurrency at once. Every point is kept as it is measured: after
    an interruption the same command goes on, and then fits all points.
    """
    from policies.spec import find_engine
    from training.profiling.load_client import REQUEST_TIMEOUT_S, Engine
    from training.profiling.measure import Sweep
    from training.profiling.measure import measure as sweep_engine
    from training.profiling.measurements import read_measurements

    rows = rows or out.with_suffix(".csv")
    options.check_outputs(out, rows, report, json_file)
    profile = find_engine(base, Path())
    fixed = options.numbers(fix)
    sweep = Sweep(
        options.whole_numbers(prompt, "--prompt"),
        options.whole_numbers(output, "--output", low=2),
        options.whole_numbers(concurrency, "--concurrency", high=MAX_CLIENTS),
        max_minutes,
    )
    if not rows.exists():
        sweep.check(fixed)
    engine = Engine(url, model, request_timeout_s=min(REQUEST_TIMEOUT_S, max_minutes * 60.0))
    with progress_bar("measuring") as tell:
        result = sweep_engine(engine, sweep, rows, tell)
    if not result.done:
        raise ValueError(f"no point was measured within {max_minutes:g} minutes; give it more with --max-minutes")
    say(f"{result.done} of {result.points} points measured, in {rows}")
    if result.done < result.points:
        say(f"note: the time of {max_minutes:g} minutes is over; the same command goes on with the other points")
    capacity = kv_tokens or result.kv_capacity_tokens
    if capacity is None:
        say(f"note: the engine does not tell its KV capacity; --kv-tokens sets it, taken from {profile.name} here")
    limits = limits_of(profile, capacity, max_num_batched_tokens, max_num_seqs)
    table = read_measurements(rows, limits)
    found = fitted(table, None, None, fixed, folds, bootstrap, seed)
    changes = {
        "model": result.model,
        "kv_capacity_tokens": capacity,
        "max_num_seqs": max_num_seqs or max(profile.max_num_seqs, *sweep.concurrency),
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    made = profile_of(profile, name or out.stem, found, changes, f"{rows.name}, closed loops on a live engine")
    deliver(made, found, out, report, json_file)


@app.command()
@one_sentence_errors
def validate(
    profile: Annotated[str, typer.Argument(help="Engine profile: a shipped name or a YAML file.")],
    data: Annotated[Path | None, typer.Option("--data", help="CSV of measured rows, as for `fit`.")] = None,
    where: options.Where = None,
    max_num_batched_tokens: options.Budget = None,
    requests_per_client: options.PerClient = None,
    replay: Annotated[
        Path | None, typer.Option("--replay", help="Trace to replay on a live engine, with --url.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Address of the engine, one replica.")] = None,
    model: options.Model = None,
    start: Annotated[float, typer.Option("--from", min=0, help="Start of the slice, seconds into the trace.")] = 0.0,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Length of the slice.")] = 60.0,
    batch_cap: Annotated[
        list[int] | None, typer.Option("--batch-cap", min=1, help="Concurrent requests admitted; repeatable.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Live runs per batch cap.")] = 1,
    max_requests: Annotated[int, typer.Option("--max-requests", min=1, help="Refuse longer slices.")] = 2000,
    report: options.Report = None,
    json_file: options.Json = None,
) -> None:
    """Compare a profile with measured rows, or its simulation with a live engine.

    With --data: error table over the rows. With --replay and --url: a slice of a trace runs on the engine and through
    the cluster model, and the distributions of TTFT, TPOT and end-to-end latency are compared.
    """
    from policies.spec import find_engine

    if (data is None) == (replay is None):
        raise ValueError("expected --data, or --replay with --url")
    check_writable(report, json_file, inputs=[Path(profile), data, replay])
    engine = find_engine(profile, Path())
    if data is not None:
        _validate_rows(
            engine,
            data,
            options.pairs(where, "--where"),
            max_num_batched_tokens,
            requests_per_client,
            report,
            json_file,
        )
        return
    if url is None or replay is None:
        raise ValueError("--replay needs --url")
    from envs.traffic.formats import import_trace
    from training.pages.profiles import REPLAY_HEADINGS, distributions, replay_cells, show, write_page
    from training.profiling.load_client import Engine
    from training.profiling.validation import replay as replay_live

    sliced = import_trace(replay).trace.slice(start, start + seconds)
    if len(sliced) > max_requests:
        raise ValueError(
            f"{replay}: the slice holds {len(sliced):,} requests, more than --max-requests {max_requests:,}"
        )
    caps = batch_cap or [engine.max_num_seqs]
    with progress_bar("replaying") as tell:
        comparisons = replay_live(Engine(url, model), sliced, engine, caps, repeats, tell)
    cells = replay_cells(comparisons)
    show(f"{engine.name}: {len(sliced)} requests of {replay.name}", REPLAY_HEADINGS, cells)
    if report is not None:
        write_page(
            report, f"{engine.name}: replay", [("Latencies", REPLAY_HEADINGS, cells)], distributions(comparisons)
        )
        say(f"wrote {report}")
    if json_file is not None:
        rows = [row for comparison in comparisons for row in comparison.rows()]
        write_json(json_file, {"profile": engine.name, "trace": replay.name, "rows": rows})


def _validate_rows(
    engine: EngineProfile,
    data: Path,
    where: dict[str, str],
    budget: int | None,
    per_client: int | None,
    report: Path | None,
    json_file: Path | None,
) -> None:
    from training.pages.profiles import ERROR_HEADINGS, error_cells, scatter, show, write_page
    from training.profiling.errors import ErrorRow
    from training.profiling.fit import coefficients_of
    from training.profiling.measurements import read_measurements

    table = read_measurements(data, limits_of(engine, None, budget, None), where)
    unknowns = unknowns_of(table, budget or engine.max_num_batched_tokens, per_client or REQUESTS_PER_CLIENT)
    table = unknowns.usual.apply(table)
    predicted = table.predict(coefficients_of(engine.step))
    errors = [("", ErrorRow.of(quantity, values, table.measured[quantity])) for quantity, values in predicted.items()]
    cells = error_cells(errors)
    show(f"{engine.name} against {data.name}", ERROR_HEADINGS, cells)
    if report is not None:
        plots = scatter({engine.name: predicted}, table.measured)
        write_page(report, f"{engine.name} against {data.name}", [("Errors", ERROR_HEADINGS, cells)], plots)
        say(f"wrote {report}")
    if json_file is not None:
        write_json(json_file, {"profile": engine.name, "errors": error_rows(errors)})


def _chosen(where: list[str] | None) -> str:
    return f" ({', '.join(where)})" if where else ""
