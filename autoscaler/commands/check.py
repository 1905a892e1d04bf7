"""`jevons check`: a live configuration proved on the real servers.

Importing this module must stay cheap: the work is imported inside the command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from autoscaler.commands.configuration import Config


def check(
    config: Config,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove a live configuration on the real servers; scale nothing.

    Every query is asked, the objectives are compared with histogram buckets, the objects and rights of actuator and
    leases are read, and a controller is put together as `run` does it: records, policies, port and files. Exits with 1
    when something is wrong.
    """
    from autoscaler.actuators.base import Access, LiveActuator
    from autoscaler.actuators.build import build_actuator
    from autoscaler.actuators.kube_api import KubeError
    from autoscaler.authority.kubernetes_leases import KubernetesLeases
    from autoscaler.check import check_metrics
    from autoscaler.hosting.config import load_live_config
    from autoscaler.hosting.preflight import check_host
    from policies.engine import ConfigError
    from policies.redaction import scrubbed, shown

    live = load_live_config(config).located(Path.cwd())
    lines = check_metrics(live.metrics, live.services)
    actuator: LiveActuator | None = None
    try:
        # A port is not opened to look whether it could be.
        quiet = (
            live.actuator.model_copy(update={"port": None}) if live.actuator.kind == "metric_only" else live.actuator
        )
        actuator = build_actuator(quiet, live.services)
        lines += actuator.check()
    except (KubeError, ConfigError) as error:
        lines.append(Access(f"actuator {live.actuator.kind}", False, str(error)))
    if live.lease.kind == "kubernetes":
        try:
            leases = KubernetesLeases(live.lease, [spec.service for spec in live.services], "")
            lines += leases.check()
            leases.close()
        except KubeError as error:
            lines.append(Access("leases", False, str(error)))
    lines += check_host(live, actuator)
    if actuator is not None:
        actuator.close()
    if as_json:
        typer.echo(json.dumps(scrubbed([vars(line) for line in lines]), indent=1))
    else:
        for line in lines:
            word = "ok     " if line.ok else "PROBLEM"
            typer.echo(shown(f"{word} {line.subject}: {line.detail}".rstrip(": ")))
    wrong = sum(not line.ok for line in lines)
    typer.echo(f"{len(lines)} checks, {wrong} problem{'' if wrong == 1 else 's'}", err=True)
    if wrong:
        raise typer.Exit(1)
