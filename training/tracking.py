"""Where MLflow keeps runs and policy versions: embedded by default, any tracking server by configuration."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

DEFAULT_STORE = Path("runs/mlflow")
"""Folder of the embedded store: `mlflow.db` (SQLite) and `artifacts`."""
EXPERIMENT = "jevons"


def connect(tracking_uri: str | None = None) -> Any:
    """An MLflow client on `tracking_uri`, the environment's MLFLOW_TRACKING_URI, or the embedded store; in this order.

    The embedded store is created when it does not exist.
    """
    import mlflow

    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        DEFAULT_STORE.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{(DEFAULT_STORE / 'mlflow.db').resolve()}"
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    if client.get_experiment_by_name(EXPERIMENT) is None:
        embedded = uri.startswith("sqlite")
        location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri() if embedded else None
        client.create_experiment(EXPERIMENT, artifact_location=location)
    return client


def experiment_id(client: Any) -> str:
    """Identifier of the experiment that `connect` made sure of."""
    return str(client.get_experiment_by_name(EXPERIMENT).experiment_id)


def code_version() -> str:
    """Version of the package, with the commit where the code is a git checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("jevons")
    return f"{version('jevons')}+{commit}"
