"""Policy versions in MLflow: registered, compared, promoted.

A version is a bundle, the run that made it, and its judgement: the rows of an evaluation. The alias `champion` marks
the version that may go live; it only moves to a challenger that holds every SLO and is cheaper beyond doubt.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.versions import signatures
from autoscaler.versions.registry import BUNDLE_FILE, download
from policies.learned import BundleMismatch, parse_bundle
from policies.lineup import REGISTRY_PREFIX
from training.versions.tracking import connect

CHAMPION = "champion"
CHALLENGER = "challenger"
EVALUATION_FILE = "evaluation.json"
BOOTSTRAP_DRAWS = 4000
MIN_PAIRS = 3
"""Fewer pairs of costs say nothing about doubt: the interval of a single one has no width."""


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
    """Keep an evaluation (`Evaluation.to_json`) with a run, and the bundle's means as metrics.

    Raises:
        RegistryError: when the bundle is not among the policies that were evaluated.
    """
    own = _rows_of(evaluation, digest)
    if not own:
        raise RegistryError(f"the evaluation has no row of the bundle {digest[:12]}")
    client.log_text(run_id, json.dumps(evaluation, indent=1), EVALUATION_FILE)
    for column in ("attainment", "usd_per_mtok", "usd_per_good_mtok", "replica_hours"):
        values = [row[column] for row in own if row[column] is not None]
        if values:
            client.log_metric(run_id, f"evaluation/{column}", float(np.mean(values)))
    client.log_metric(run_id, "evaluation/holds_slo_share", float(np.mean([row["holds_slo"] for row in own])))


def register(client: Any, name: str, run_id: str, digest: str) -> str:
    """Make the bundle of a run the next version of model `name`, alias `challenger`; the version.

    A bundle that is a version of this run already stays that version.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for known in client.search_model_versions(f"name='{name}'"):
        if known.run_id == run_id and known.tags.get("bundle_digest") == digest:
            client.set_registered_model_alias(name, CHALLENGER, known.version)
            return str(known.version)
    uri = client.get_run(run_id).info.artifact_uri
    version = client.create_model_version(name, f"{uri}/{BUNDLE_FILE}", run_id, tags={"bundle_digest": digest})
    client.set_registered_model_alias(name, CHALLENGER, version.version)
    return str(version.version)


def resolve_bundle(reference: str, tracking_uri: str | None = None) -> Path:
    """Local path of the bundle that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names, its digest verified.

    Raises:
        RegistryError: when there is no such version, or its bundle is not stored any more.
        BundleMismatch: when the bundle is not the one that was registered.
    """
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri)
    version = find_version(client, reference)
    try:
        content = download(client, version.run_id)
        digest = parse_bundle(content, "its bundle").digest
    except (MlflowException, OSError) as error:
        raise RegistryError(f"{reference}: its bundle is not in the store ({error})") from None
    except BundleMismatch as error:
        raise BundleMismatch(f"{reference}: {error}") from None
    if version.tags.get("bundle_digest", digest) != digest:
        raise BundleMismatch(f"{reference}: the stored bundle is not the one that was registered")
    path = Path(tempfile.mkdtemp(prefix="jevons-")) / BUNDLE_FILE
    path.write_bytes(content)
    return path


def find_version(client: Any, reference: str) -> Any:
    """The model version that `models:/NAME/VERSION` or `models:/NAME@ALIAS` names.

    Raises:
        RegistryError: when there is none.
    """
    from mlflow.exceptions import MlflowException

    body = reference.removeprefix(REGISTRY_PREFIX)
    try:
        if "@" in body:
            name, alias = body.split("@", 1)
            return client.get_model_version_by_alias(name, alias)
        name, _, version = body.partition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise RegistryError(f"{reference}: not in the registry ({error.message})") from None


def judgement(client: Any, version: Any) -> list[dict[str, Any]]:
    """The evaluation rows that were stored with a version's run, each with the digests of its `world`.

    Raises:
        RegistryError: when the version was never judged.
    """
    if EVALUATION_FILE not in {item.path for item in client.list_artifacts(version.run_id)}:
        raise RegistryError(f"version {version.version} of {version.name} was never judged: its run has no evaluation")
    with tempfile.TemporaryDirectory(prefix="jevons-") as folder:
        path = client.download_artifacts(version.run_id, EVALUATION_FILE, folder)
        stored: dict[str, Any] = json.loads(Path(path).read_text())
    worlds = {
        scenario["name"]: (scenario.get("spec_digest"), *scenario.get("trace_digests", ()))
        for scenario in stored.get("scenarios", ())
    }
    rows = [
        {**row, "world": worlds.get(row["scenario"])} for row in _rows_of(stored, version.tags.get("bundle_digest"))
    ]
    if not rows:
        raise RegistryError(f"version {version.version} of {version.name} was never judged: no row of it is stored")
    return rows


def compare(name: str, tracking_uri: str | None = None) -> list[dict[str, Any]]:
    """One row per registered version of `name`, newest first: judgement over all scenarios and seeds.

    Raises:
        RegistryError: when there is no such model.
    """
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri)
    try:
        model = client.get_registered_model(name)
    except MlflowException:
        raise RegistryError(f"no registered model named {name!r}") from None
    versions = sorted(client.search_model_versions(f"name='{name}'"), key=lambda v: -int(v.version))
    aliases: dict[str, list[str]] = {}
    for alias, version in model.aliases.items():
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
                "attainment": _mean([item["attainment"] for item in judged]),
                "usd_per_mtok": geometric_mean([item["usd_per_mtok"] for item in judged]),
                "usd_per_good_mtok": geometric_mean([item["usd_per_good_mtok"] for item in judged]),
                "replica_hours": float(np.sum([item["replica_hours"] for item in judged])),
            }
        table.append(row)
    return table


def promote(name: str, version: str, tracking_uri: str | None = None, key: Path | None = None) -> Verdict:
    """Move `champion` to `version` when its judgement allows it; with a private key, sign it first.

    Raises:
        RegistryError: when the version or a judgement is missing.
        ConfigError: when the key cannot be used.
    """
    client = connect(tracking_uri)
    challenger = find_version(client, f"{REGISTRY_PREFIX}{name}/{version}")
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) == str(challenger.version):
        return Verdict(False, (f"version {version} is the champion already",))
    current = None
    if champion is not None:
        current = judgement(client, find_version(client, f"{REGISTRY_PREFIX}{name}/{champion}"))
    verdict = judge(judgement(client, challenger), current)
    if verdict.promote:
        if key is not None:  # first: from the alias on, controllers ask for it
            bundle = resolve_bundle(f"{REGISTRY_PREFIX}{name}/{version}", tracking_uri)
            signature = signatures.sign(bundle.read_bytes(), key, f"{name}/{challenger.version}")
            client.set_model_version_tag(name, challenger.version, signatures.TAG, signature)
        client.set_registered_model_alias(name, CHAMPION, challenger.version)
    client.set_model_version_tag(name, challenger.version, "verdict", "; ".join(verdict.reasons))
    return verdict


def versus(evaluation: dict[str, Any], digest: str, other: str) -> Verdict:
    """Whether the bundle `digest` wins an evaluation against the bundle `other`: one that misses the SLO has lost.

    Args:
        evaluation: `training.judging.evaluate.Evaluation.to_json` of both.
        digest: SHA-256 of the bundle that wants to win.
        other: SHA-256 of its opponent.
    """
    opponent = _rows_of(evaluation, other)
    held = all(held_scenarios(opponent).values())
    verdict = judge(_rows_of(evaluation, digest), opponent if held else None)
    if verdict.promote and not held:
        return replace(verdict, reasons=("holds the SLO, which the policy that it came from misses",))
    return replace(verdict, reasons=tuple(reason.replace("the champion", "the former") for reason in verdict.reasons))


def promote_over(client: Any, name: str, version: str, former: str) -> str:
    """Make a version that has won against the bundle `former` the champion of `name`, unless another holds that place.

    Returns:
        Its place, in words.
    """
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is not None and str(champion) != str(version):  # a run that is resumed after its end wins again
        digest = client.get_model_version(name, champion).tags.get("bundle_digest")
        if digest != former:
            return f"as challenger: its champion, version {champion}, is not the policy that this one has beaten"
    client.set_registered_model_alias(name, CHAMPION, version)
    return "as champion"


def judge(challenger: Sequence[dict[str, Any]], champion: Sequence[dict[str, Any]] | None) -> Verdict:
    """The rule: hold the SLO on every scenario, and cost less than the champion with an interval that excludes 1.

    Args:
        challenger: evaluation rows, one per scenario and seed.
        champion: the same of the champion, None when there is none yet.
    """
    if not challenger:
        return Verdict(False, ("it was never judged",))
    failing = [scenario for scenario, holds in held_scenarios(challenger).items() if not holds]
    if failing:
        return Verdict(False, (f"misses the SLO on {', '.join(failing)}",))
    if champion is None:
        return Verdict(True, ("holds the SLO on every scenario; there is no champion yet",))
    ours, theirs = _costs(challenger), _costs(champion)
    if ours.keys() != theirs.keys():
        return Verdict(False, ("the champion was judged on other scenarios or seeds: judge both on the same suite",))
    if len(ours) < MIN_PAIRS:
        return Verdict(False, (f"judged on {len(ours)} pairs of scenario and seed: {MIN_PAIRS} are needed at least",))
    undefined = sorted({key[0] for costs in (ours, theirs) for key, cost in costs.items() if not cost or cost <= 0})
    if undefined:
        return Verdict(False, (f"cost per good token is not defined on {', '.join(undefined)}",))
    ratios = np.log([ours[key] / theirs[key] for key in sorted(ours, key=repr)])
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


def _rows_of(evaluation: dict[str, Any], digest: str | None) -> list[dict[str, Any]]:
    names = {policy["policy"] for policy in evaluation["policies"] if digest and policy["bundle_digest"] == digest}
    return [row for row in evaluation["rows"] if row["policy"] in names]


def _costs(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], Any]:
    return {(row["scenario"], row["seed"], row.get("world")): row["usd_per_good_mtok"] for row in rows}


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean; None when any is missing."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if values and len(known) == len(values) else None
