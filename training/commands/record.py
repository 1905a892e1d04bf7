"""`jevons record`.

Importing this module must stay cheap: the work is imported inside the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from autoscaler.commands.configuration import Config
from training.commands.console import one_sentence_errors, say


def register(app: typer.Typer) -> None:
    """Add the command to the root."""
    app.command()(one_sentence_errors(record))


def record(
    config: Config,
    out: Annotated[Path, typer.Option("--out", help="Trace to write, Parquet.")],
    service: Annotated[str | None, typer.Option(help="Service; the only one when left out.")] = None,
    last: Annotated[float, typer.Option(min=0.01, help="Length of the recording, hours before --end.")] = 24.0,
    end: Annotated[
        str | None, typer.Option(help="End as ISO 8601, such as 2026-01-31T12:00:00Z; now when unset.")
    ] = None,
    access_log: Annotated[Path | None, typer.Option(help="HAProxy's log (option httplog): exact arrivals.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what the metrics do not tell.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out.")] = False,
) -> None:
    """Build a replayable trace of your own traffic from Prometheus.

    Says what resolution was lost on the way.
    """
    import time
    from datetime import UTC, datetime

    from autoscaler.hosting.config import load_live_config
    from autoscaler.metrics.client import PrometheusQueryError
    from autoscaler.metrics.traffic_recording import record as read_traffic
    from envs.traffic.trace import TraceError
    from envs.traffic.trace_files import write_trace
    from training.replaying.recording import trace_from_recording

    live = load_live_config(config)
    names = [spec.service for spec in live.services]
    chosen = service or (names[0] if len(names) == 1 else None)
    if chosen not in names:
        raise ValueError(f"--service: expected one of {', '.join(names)}, got {service}")
    if out.exists() and not force:
        raise TraceError(f"{out}: exists already; choose another name or pass --force")
    if not out.parent.is_dir():
        raise TraceError(f"{out}: the folder {out.parent} does not exist")
    if end is None:
        end_s = time.time()
    else:
        moment = datetime.fromisoformat(end)
        end_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    try:
        recording = read_traffic(live.metrics, chosen, end_s - last * 3600.0, end_s, access_log)
    except PrometheusQueryError as error:
        raise ValueError(f"{live.metrics.url}: {error}") from None
    trace = trace_from_recording(recording, out.stem, seed)
    write_trace(trace, out)
    for sentence in recording.lost:
        say(f"note: {sentence}")
    say(f"wrote {out}: {len(trace):,} requests in {trace.duration_s / 3600:,.2f} h, {trace.mean_rps:,.3f} req/s")
