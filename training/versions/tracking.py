"""Where MLflow keeps runs and policy versions: embedded by default, any tracking server by configuration."""

from __future__ import annotations

import os
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from policies.telemetry import turn_off

turn_off()

DEFAULT_STORE = Path("runs/mlflow")
"""Folder of the embedded store: `mlflow.db` (SQLite) and `artifacts`."""
EXPERIMENT = "jevons"


def store_uri(tracking_uri: str | None = None) -> str:
    """`tracking_uri`, the environment's MLFLOW_TRACKING_URI, or the embedded store as an absolute path; in this order.

    The folder of the embedded store is created when it does not exist.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        DEFAULT_STORE.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{(DEFAULT_STORE / 'mlflow.db').resolve()}"
    return uri


def ensure_store(tracking_uri: str | None = None) -> str:
    """`store_uri`, of a store that is there: workers that create one at once get in each other's way.

    Raises:
        ConnectionError: when the store does not answer.
    """
    uri = store_uri(tracking_uri)
    connect(uri)
    return uri


def connect(tracking_uri: str | None = None) -> Any:
    """An MLflow client on the store that `store_uri` names, which is created when it does not exist.

    Raises:
        ConnectionError: when the store does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = store_uri(tracking_uri)
    # Not mlflow.set_tracking_uri: it sets an environment variable, which would decide for later calls without a URI.
    client = mlflow.MlflowClient(uri)
    try:
        known = client.get_experiment_by_name(EXPERIMENT) is not None
    except MlflowException as error:
        raise ConnectionError(f"the MLflow store {uri} cannot be used: {error.message}") from None
    if not known:
        embedded = uri.startswith("sqlite")
        location = (Path(uri.removeprefix("sqlite:///")).parent / "artifacts").resolve().as_uri() if embedded else None
        client.create_experiment(EXPERIMENT, artifact_location=location)
    return client


def experiment_id(client: Any) -> str:
    """Identifier of the experiment that `connect` made sure of."""
    return str(client.get_experiment_by_name(EXPERIMENT).experiment_id)


class RunLog:
    """Metrics of one run, written in the background so that learning does not wait; `end` waits for all of them.

    Args:
        client: as `connect` gives it.
        run_id: of the run.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._pending: list[Any] = []

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics at a step."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        batch = [Metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._pending.append(self._client.log_batch(self._run_id, batch, synchronous=False))

    def end(self, status: str = "FINISHED") -> None:
        """Wait for what was logged, then close the run as FINISHED, FAILED or KILLED."""
        try:
            while self._pending:
                self._pending.pop(0).wait()
        finally:
            self._client.set_terminated(self._run_id, status)


def run_exists(client: Any, run_id: str) -> bool:
    """Whether the store has the run, and nobody has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(run_id) and client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException:
        return False


def code_version() -> str:
    """Version of the package, with the commit where the code is a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version("jevons")
    return f"{version('jevons')}+{commit}"
