"""Policy versions in MLflow: registered, compared, promoted.

A version is a bundle, the run that made it, and its judgement: the rows of an evaluation. The alias `champion` marks
the version that may go live; it only moves to a challenger that holds every SLO and is cheaper beyond doubt.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.learned import BundleMismatch, load_bundle
from training.tracking import connect

CHAMPION = "champion"
CHALLENGER = "challenger"
BUNDLE_FILE = "policy.zip"
EVALUATION_FILE = "evaluation.json"
BOOTSTRAP_DRAWS = 4000


class RegistryError(ValueError):
    """Raised when a version, a model or its judgement is not in the registry."""


@dataclass(frozen=True)
class Verdict:
    """Whether a challenger may become champion, and why."""

    promote: bool
    reasons: tuple[str, ...]
    cost_ratio: float | None = None
    interval: tuple[float, float] | None = None


def store_judgement(client: Any, run_id: str, evaluation: dict[str, Any], digest: str) -> None:
    """Keep an evaluation (`training.evaluate.Evaluation.to_json`) with a run, and the bundle's means as metrics."""
    client.log_text(run_id, json.dumps(evaluation, indent=1), EVALUATION_FILE)
    names = {policy["policy"] for policy in evaluation["policies"] if policy["bundle_digest"] == digest}
    own = [row for row in evaluation["rows"] if row["policy"] in names]
    for column in ("attainment", "usd_per_mtok", "usd_per_good_mtok", "replica_hours"):
        values = [row[column] for row in own if row[column] is not None]
        if values:
            client.log_metric(run_id, f"evaluation/{column}", float(np.mean(values)))
    client.log_metric(run_id, "evaluation/holds_slo_share", float(np.mean([row["holds_slo"] for row in own])))


def register(client: Any, name: str, run_id: str, digest: str) -> str:
    """Make the bundle of a run the next version of model `name`, alias `challenger`; the version."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    uri = client.get_run(run_id).info.artifact_uri
    version = client.create_model_version(name, f"{uri}/{BUNDLE_FILE}", run_id, tags={"bundle_digest": digest})
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return str(version.version)


def resolve_bundle(reference: str, tracking_uri: str | None = None) -> Path:
    """Local path of the bundle that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names, its digest verified.

    Raises:
        RegistryError: when there is no such version.
        BundleMismatch: when the bundle is not the one that was registered.
    """
    client = connect(tracking_uri)
    version = find_version(client, reference)
    path = _download(client, version.run_id, BUNDLE_FILE)
    registered = version.tags.get("bundle_digest")
    if registered and load_bundle(path).digest != registered:
        raise BundleMismatch(f"{reference}: the stored bundle is not the one that was registered")
    return path


def find_version(client: Any, reference: str) -> Any:
    """The model version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names.

    Raises:
        RegistryError: when there is none.
    """
    from mlflow.exceptions import MlflowException

    body = reference.removeprefix("models:/")
    try:
        if "@" in body:
            name, alias = body.split("@", 1)
            return client.get_model_version_by_alias(name, alias)
        name, _, version = body.partition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise RegistryError(f"{reference}: not in the registry ({error.message})") from None


def judgement(client: Any, version: Any) -> list[dict[str, Any]]:
    """The evaluation rows that were stored with a version's run.

    Raises:
        RegistryError: when the version was never judged.
    """
    if EVALUATION_FILE not in {item.path for item in client.list_artifacts(version.run_id)}:
        raise RegistryError(f"version {version.version} of {version.name} was never judged: its run has no evaluation")
    stored: dict[str, Any] = json.loads(_download(client, version.run_id, EVALUATION_FILE).read_text())
    digest = version.tags.get("bundle_digest")
    names = {policy["policy"] for policy in stored["policies"] if policy["bundle_digest"] == digest}
    rows: list[dict[str, Any]] = [row for row in stored["rows"] if row["policy"] in names]
    if not rows:
        raise RegistryError(f"version {version.version} of {version.name} was never judged: no row of it is stored")
    return rows


def compare(name: str, tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """One row per registered version of `name`, newest first: judgement over all scenarios and seeds.

    Raises:
        RegistryError: when there is no such model.
    """
    client = connect(tracking_uri)
    versions = sorted(client.search_model_versions(f"name='{name}'"), key=lambda v: -int(v.version))
    if not versions:
        raise RegistryError(f"no registered model named {name!r}")
    aliases: dict[str, list[str]] = {}
    for alias, version in client.get_registered_model(name).aliases.items():
        aliases.setdefault(str(version), []).append(alias)
    table = []
    for version in versions:
        run = client.get_run(version.run_id)
        row: dict[str, Any] = {
            "version": int(version.version),
            "aliases": sorted(aliases.get(str(version.version), [])),
            "run_id": version.run_id,
            "seed": run.data.params.get("seed"),
            "validation_score": run.data.metrics.get("validation/best_score"),
            "bundle_digest": version.tags.get("bundle_digest", ""),
        }
        try:
            judged = judgement(client, version)
        except RegistryError:
            judged = []
        if judged:
            row |= {
                "scenarios": len({item["scenario"] for item in judged}),
                "holds_slo": sum(held_scenarios(judged).values()),
                "attainment": float(np.mean([item["attainment"] for item in judged])),
                "usd_per_mtok": geometric_mean([item["usd_per_mtok"] for item in judged]),
                "usd_per_good_mtok": geometric_mean([item["usd_per_good_mtok"] for item in judged]),
                "replica_hours": float(np.sum([item["replica_hours"] for item in judged])),
            }
        table.append(row)
    return table


def promote(name: str, version: str, tracking_uri: str | None = None) -> Verdict:
    """Move `champion` to `version` when its judgement allows it.

    Raises:
        RegistryError: when the version or a judgement is missing.
    """
    client = connect(tracking_uri)
    challenger = find_version(client, f"models:/{name}/{version}")
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) == str(challenger.version):
        return Verdict(False, (f"version {version} is the champion already",))
    current = None if champion is None else judgement(client, find_version(client, f"models:/{name}/{champion}"))
    verdict = judge(judgement(client, challenger), current)
    if verdict.promote:
        client.set_registered_model_alias(name, CHAMPION, challenger.version)
    client.set_model_version_tag(name, challenger.version, "verdict", "; ".join(verdict.reasons))
    return verdict


def judge(challenger: Sequence[dict[str, Any]], champion: Sequence[dict[str, Any]] | None) -> Verdict:
    """The rule: hold the SLO on every scenario, and cost less than the champion with an interval that excludes 1.

    Args:
        challenger: evaluation rows, one per scenario and seed.
        champion: the same of the champion, None when there is none yet.
    """
    failing = [scenario for scenario, holds in held_scenarios(challenger).items() if not holds]
    if failing:
        return Verdict(False, (f"misses the SLO on {', '.join(failing)}",))
    if champion is None:
        return Verdict(True, ("holds the SLO on every scenario; there is no champion yet",))
    ours = {(row["scenario"], row["seed"]): row["usd_per_good_mtok"] for row in challenger}
    theirs = {(row["scenario"], row["seed"]): row["usd_per_good_mtok"] for row in champion}
    if ours.keys() != theirs.keys():
        return Verdict(False, ("the champion was judged on other scenarios or seeds: judge both on the same suite",))
    ratios = np.log([ours[key] / theirs[key] for key in sorted(ours)])
    rng = np.random.default_rng(0)
    draws = rng.choice(ratios, (BOOTSTRAP_DRAWS, len(ratios))).mean(axis=1)
    low, high = (float(value) for value in np.exp(np.quantile(draws, (0.025, 0.975))))
    ratio = float(np.exp(ratios.mean()))
    words = f"cost per good token is {ratio:.3f} of the champion's (95 % interval {low:.3f} to {high:.3f})"
    if high < 1.0:
        return Verdict(True, (f"holds the SLO on every scenario; {words}",), ratio, (low, high))
    return Verdict(False, (f"not cheaper beyond doubt: {words}",), ratio, (low, high))


def held_scenarios(rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether each scenario's SLO was held on every seed."""
    held: dict[str, bool] = {}
    for row in rows:
        held[row["scenario"]] = held.get(row["scenario"], True) and bool(row["holds_slo"])
    return held


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Geometric mean of positive values; None when any is missing."""
    if not values or any(value is None or not value > 0 for value in values):
        return None
    return float(np.exp(np.mean(np.log(np.asarray(values, float)))))


def _download(client: Any, run_id: str, name: str) -> Path:
    return Path(client.download_artifacts(run_id, name, tempfile.mkdtemp(prefix="jevons-")))
