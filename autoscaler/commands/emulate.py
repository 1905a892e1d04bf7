"""`jevons emulate`: an engine without a GPU.

Importing this module must stay cheap: the work is imported inside the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
