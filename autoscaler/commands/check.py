"""`jevons check`: a live configuration proved on the real servers.

Importing this module must stay cheap: the work is imported inside the command.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def check(
    config: Annotated[Path, typer.Option("--config", help="Live configuration, YAML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Prove a live configuration on the real servers; change nothing.

    Every query is asked, the objectives are compared with histogram buckets, and the objects and rights of actuator and
    leases are read. Exits with 1 when something is wrong.
    """
    from autoscaler.actuators.base import Access
    from autoscaler.actuators.build import build_actuator
    from autoscaler.actuators.kube_api import KubeError
    from autoscaler.authority.kubernetes_leases import KubernetesLeases
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
    if live.lease.kind == "kubernetes":
        try:
            leases = KubernetesLeases(live.lease, [spec.service for spec in live.services], "")
            lines += leases.check()
            leases.close()
        except KubeError as error:
            lines.append(Access("leases", False, str(error)))
    if as_json:
        typer.echo(json.dumps([vars(line) for line in lines], indent=1))
    else:
        for line in lines:
            typer.echo(f"{'ok     ' if line.ok else 'PROBLEM'} {line.subject}: {line.detail}".rstrip(": "))
    wrong = sum(not line.ok for line in lines)
    typer.echo(f"{len(lines)} checks, {wrong} problem{'' if wrong == 1 else 's'}", err=True)
    if wrong:
        raise typer.Exit(1)
