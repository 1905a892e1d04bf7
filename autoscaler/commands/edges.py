"""`jevons check` and `jevons emulate`.

Importing this module must stay cheap: the work is imported inside the commands.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def check(
    config: Annotated[Path, typer.Option("--config", help="Live configuration, YAML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove a live configuration on the real servers; change nothing.

    Every query is asked, the objectives are compared with histogram buckets, and the actuator's objects and rights are
    read. Exits with 1 when something is wrong.
    """
    from autoscaler.actuators.base import Access
    from autoscaler.actuators.build import build_actuator
    from autoscaler.actuators.kube_api import KubeError
    from autoscaler.check import check_metrics
    from autoscaler.hosting.config import load_live_config

    live = load_live_config(config)
    lines = check_metrics(live.metrics, live.services)
    try:
        # A port is not opened to look whether it could be.
        quiet = (
            live.actuator.model_copy(update={"port": None}) if live.actuator.kind == "metric_only" else live.actuator
        )
        actuator = build_actuator(quiet, live.services)
        try:
            lines += actuator.check()
        finally:
            actuator.close()
    except KubeError as error:
        lines.append(Access("Kubernetes", False, str(error)))
    if as_json:
        typer.echo(json.dumps([vars(line) for line in lines], indent=1))
    else:
        for line in lines:
            typer.echo(f"{'ok     ' if line.ok else 'PROBLEM'} {line.subject}: {line.detail}".rstrip(": "))
    wrong = sum(not line.ok for line in lines)
    typer.echo(f"{len(lines)} checks, {wrong} problem{'' if wrong == 1 else 's'}", err=True)
    if wrong:
        raise typer.Exit(1)


def emulate(
    engine: Annotated[str, typer.Option(help="Engine profile: a shipped name or a YAML file.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    batch_cap: Annotated[int | None, typer.Option(min=1, help="Concurrent requests; the profile's when unset.")] = None,
    batch_cap_file: Annotated[Path | None, typer.Option(help="File with the batch cap, looked at each second.")] = None,
    speedup: Annotated[float, typer.Option(min=0.01, help="How many times faster than the real engine.")] = 1.0,
    start_s: Annotated[float, typer.Option(min=0, help="Seconds until it is ready.")] = 0.0,
    model: Annotated[str | None, typer.Option(help="Name of the served model.")] = None,
) -> None:
    """Serve an emulated engine: OpenAI's streaming API and vLLM's metrics at the pace of a profile, without a GPU."""
    from autoscaler.emulation.engine import EmulatedEngine
    from autoscaler.emulation.server import EngineServer, serve
    from policies.spec import find_engine

    profile = find_engine(engine, Path())
    emulated = EmulatedEngine(profile, batch_cap, speedup, model)
    typer.echo(f"emulating {profile.name} on http://{host}:{port}", err=True)
    serve(EngineServer(emulated, start_s, batch_cap_file), host, port)


COMMANDS: tuple[Callable[..., None], ...] = (check, emulate)
"""What the root adds."""
