import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from untrained import untrained_manifest

from autoscaler.versions.registry import BUNDLE_FILE
from autoscaler.versions.signatures import TAG, Trust, make_keys, signature_file
from policies.engine import ConfigError
from policies.learned import BundleMismatch, load_bundle, write_bundle
from policies.lineup import SHIPPED_BUNDLE
from training.versions.registry import (
    CHALLENGER,
    CHAMPION,
    RegistryError,
    compare,
    find_version,
    geometric_mean,
    judge,
    judgement,
    promote,
    register,
    resolve_bundle,
    store_judgement,
)
from training.versions.tracking import RunLog, connect, experiment_id

SCENARIOS, SEEDS = ("chat", "code"), (0, 1)


def rows(cost: float, holds: bool = True, **of_cell: float | None) -> list[dict[str, Any]]:
    """Rows of an evaluation; `of_cell` overrides the cost of single cells such as chat0."""
    return [
        {
            "scenario": scenario,
            "policy": "bundle",
            "seed": seed,
            "attainment": 0.995 if holds else 0.9,
            "holds_slo": holds,
            "usd_per_mtok": 0.9 * cost,
            "usd_per_good_mtok": of_cell.get(f"{scenario}{seed}", cost),
            "replica_hours": 10.0,
        }
        for scenario in SCENARIOS
        for seed in SEEDS
    ]


def evaluation(judged: list[dict[str, Any]], digest: str, spec_digest: str = "s") -> dict[str, Any]:
    """As `jevons evaluate --json` writes it: the bundle's rows beside those of a rule that misses everything."""
    rule = [{**row, "policy": "hpa", "holds_slo": False, "attainment": 0.5} for row in judged]
    return {
        "rows": [*rule, *judged],
        "policies": [{"policy": "hpa", "bundle_digest": None}, {"policy": "bundle", "bundle_digest": digest}],
        "scenarios": [{"name": name, "spec_digest": spec_digest, "trace_digests": ["t"]} for name in SCENARIOS],
    }


class Registry:
    """An embedded store with policies that nobody trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = connect(self.uri)
        self._runs = 0

    def run(self, seed: int = 0) -> tuple[str, str]:
        """A finished run with a bundle of its own; run and digest."""
        self._runs += 1
        path = self.folder / f"run-{self._runs}" / BUNDLE_FILE
        digest = write_bundle(path, untrained_manifest(run=self._runs), load_bundle(SHIPPED_BUNDLE).weights)
        run_id = self.client.create_run(experiment_id(self.client)).info.run_id
        self.client.log_param(run_id, "seed", seed)
        self.client.log_artifact(run_id, str(path))
        self.client.log_metric(run_id, "validation/best_score", 1.5)
        self.client.set_terminated(run_id)
        return str(run_id), digest

    def version(self, name: str, judged: list[dict[str, Any]] | None, spec_digest: str = "s") -> str:
        run_id, digest = self.run()
        if judged is not None:
            store_judgement(self.client, run_id, evaluation(judged, digest, spec_digest), digest)
        return register(self.client, name, run_id, digest)

    def alias(self, name: str, alias: str) -> str | None:
        version = self.client.get_registered_model(name).aliases.get(alias)
        return None if version is None else str(version)

    def stored_bundle(self, run_id: str) -> Path:
        return Path(self.client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / BUNDLE_FILE


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    yield
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_the_first_that_holds_every_slo_is_promoted() -> None:
    assert judge(rows(1.0), None).promote


def test_without_rows_nothing_is_promoted() -> None:
    assert not judge([], None).promote


@pytest.mark.parametrize("champion", [None, rows(100.0)])
def test_one_missed_slo_on_one_seed_is_enough_to_refuse(champion: list[dict[str, Any]] | None) -> None:
    judged = rows(1.0)
    judged[3]["holds_slo"] = False  # code, seed 1
    verdict = judge(judged, champion)
    assert not verdict.promote
    assert verdict.reasons == ("misses the SLO on code",)


def test_cheaper_everywhere_is_promoted_with_its_interval() -> None:
    verdict = judge(rows(0.8, chat0=0.7, code1=0.85), rows(1.0))
    assert verdict.promote
    assert verdict.cost_ratio == pytest.approx((0.7 * 0.8 * 0.8 * 0.85) ** 0.25)
    assert verdict.interval is not None
    low, high = verdict.interval
    assert 0.7 <= low < verdict.cost_ratio < high < 1.0


def test_cheaper_on_average_but_not_beyond_doubt_is_refused_with_figures() -> None:
    verdict = judge(rows(0.95, chat0=0.5, code1=1.3), rows(1.0))
    assert not verdict.promote
    assert verdict.cost_ratio is not None
    assert verdict.cost_ratio < 1.0
    assert verdict.interval is not None
    assert verdict.interval[1] >= 1.0
    assert "not cheaper beyond doubt" in verdict.reasons[0]
    assert f"{verdict.cost_ratio:.3f}" in verdict.reasons[0]


@pytest.mark.parametrize("cost", [1.0, 1.2])
def test_as_expensive_or_more_is_refused(cost: float) -> None:
    assert not judge(rows(cost), rows(1.0)).promote


def test_pairs_are_compared_not_means() -> None:
    # Costs differ tenfold between scenarios; 5 % cheaper on each is beyond doubt all the same.
    champion = rows(1.0, code0=10.0, code1=11.0)
    challenger = rows(0.95, code0=9.5, code1=10.45)
    verdict = judge(challenger[::-1], champion)
    assert verdict.promote
    assert verdict.cost_ratio == pytest.approx(0.95)


def test_the_verdict_does_not_depend_on_chance() -> None:
    challenger, champion = rows(0.95, chat0=0.7, code1=1.02), rows(1.0)
    assert judge(challenger, champion) == judge(challenger, champion)


def test_other_scenarios_or_seeds_or_worlds_cannot_be_compared() -> None:
    others = (
        [{**row, "scenario": "agents"} for row in rows(9.0)],
        [{**row, "seed": row["seed"] + 1} for row in rows(9.0)],
        [{**row, "world": ("another",)} for row in rows(9.0)],
        rows(9.0)[:3],
    )
    for champion in others:
        verdict = judge(rows(1.0), champion)
        assert not verdict.promote
        assert "judge both on the same suite" in verdict.reasons[0]


def test_one_pair_leaves_doubt_however_cheap_it_is() -> None:
    verdict = judge(rows(0.1)[:1], rows(1.0)[:1])
    assert not verdict.promote
    assert "1 pair" in verdict.reasons[0]


@pytest.mark.parametrize("cost", [None, 0.0])
def test_a_cost_that_is_not_defined_is_no_cheaper_one(cost: float | None) -> None:
    for challenger, champion in ((rows(1.0, chat0=cost), rows(9.0)), (rows(1.0), rows(9.0, chat0=cost))):
        verdict = judge(challenger, champion)
        assert not verdict.promote
        assert verdict.reasons == ("cost per good token is not defined on chat",)


def test_geometric_mean_by_hand() -> None:
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert geometric_mean([1.0, None]) is geometric_mean([]) is geometric_mean([0.0]) is None


def test_champions_follow_one_another_through_the_registry(registry: Registry) -> None:
    name = "succession"
    first = registry.version(name, rows(1.0))
    assert (registry.alias(name, CHALLENGER), registry.alias(name, CHAMPION)) == (first, None)
    assert promote(name, first, registry.uri).promote
    assert registry.alias(name, CHAMPION) == first
    assert "champion already" in promote(name, first, registry.uri).reasons[0]

    dearer, cheaper = registry.version(name, rows(1.1)), registry.version(name, rows(0.8))
    assert not promote(name, dearer, registry.uri).promote
    assert registry.alias(name, CHAMPION) == first
    verdict = promote(name, cheaper, registry.uri)
    assert verdict.promote
    assert registry.alias(name, CHAMPION) == registry.alias(name, CHALLENGER) == cheaper
    assert registry.client.get_model_version(name, cheaper).tags["verdict"] == verdict.reasons[0]


def test_a_challenger_that_misses_an_slo_stays_challenger(registry: Registry) -> None:
    version = registry.version("missing", rows(0.1, holds=False))
    assert promote("missing", version, registry.uri).reasons == ("misses the SLO on chat, code",)
    assert registry.alias("missing", CHAMPION) is None


def test_a_suite_that_changed_under_the_same_names_is_noticed(registry: Registry) -> None:
    first = registry.version("changed", rows(1.0), spec_digest="old")
    promote("changed", first, registry.uri)
    second = registry.version("changed", rows(0.5), spec_digest="new")
    assert "judge both on the same suite" in promote("changed", second, registry.uri).reasons[0]


def test_a_version_without_a_judgement_cannot_be_promoted(registry: Registry) -> None:
    version = registry.version("unjudged", None)
    with pytest.raises(RegistryError, match=r"version 1 of unjudged was never judged"):
        promote("unjudged", version, registry.uri)
    assert registry.alias("unjudged", CHAMPION) is None


def test_only_rows_of_the_registered_bundle_count_as_its_judgement(registry: Registry) -> None:
    version = registry.version("own-rows", rows(1.0))
    found = judgement(registry.client, find_version(registry.client, f"models:/own-rows/{version}"))
    assert {row["policy"] for row in found} == {"bundle"}
    assert len(found) == 4
    run_id, digest = registry.run()
    with pytest.raises(RegistryError, match="no row"):
        store_judgement(registry.client, run_id, evaluation(rows(1.0), "f" * 64), digest)


def test_a_judgement_is_kept_with_means_as_metrics(registry: Registry) -> None:
    run_id, digest = registry.run()
    judged = rows(2.0, chat0=4.0)
    store_judgement(registry.client, run_id, evaluation(judged, digest), digest)
    metrics = registry.client.get_run(run_id).data.metrics
    assert metrics["evaluation/usd_per_good_mtok"] == pytest.approx(2.5)
    assert metrics["evaluation/attainment"] == pytest.approx(0.995)
    assert metrics["evaluation/holds_slo_share"] == 1.0
    path = registry.client.download_artifacts(run_id, "evaluation.json")
    assert json.loads(Path(path).read_text()) == evaluation(judged, digest)


def test_compare_lists_versions_newest_first_with_their_judgement(registry: Registry) -> None:
    first = registry.version("table", rows(1.0, chat0=16.0))
    promote("table", first, registry.uri)
    judged = rows(3.0)
    judged[0]["holds_slo"] = False
    registry.version("table", judged)
    registry.version("table", None)
    table = compare("table", registry.uri)
    assert [row["version"] for row in table] == [3, 2, 1]
    assert [row["aliases"] for row in table] == [[CHALLENGER], [], [CHAMPION]]
    assert "attainment" not in table[0]
    assert (table[1]["holds_slo"], table[1]["scenarios"]) == (1, 2)
    assert (table[2]["holds_slo"], table[2]["scenarios"]) == (2, 2)
    assert table[2]["usd_per_good_mtok"] == pytest.approx(2.0)
    assert table[2]["replica_hours"] == pytest.approx(40.0)
    assert {row["validation_score"] for row in table} == {1.5}
    json.dumps(table, allow_nan=False)


def test_a_champion_is_signed_before_it_becomes_one(registry: Registry, tmp_path: Path) -> None:
    make_keys(tmp_path / "key")
    version = registry.version("signed", rows(1.0))
    with pytest.raises(ConfigError, match="expected a private Ed25519 key"):
        promote("signed", version, registry.uri, tmp_path / "key.pub")
    with pytest.raises(RegistryError):
        resolve_bundle("models:/signed@champion", registry.uri)
    assert promote("signed", version, registry.uri, tmp_path / "key").promote
    bundle = resolve_bundle("models:/signed@champion", registry.uri)
    tags = registry.client.get_model_version_by_alias("signed", CHAMPION).tags
    signature_file(bundle).write_text(tags[TAG])
    load_bundle(bundle, Trust([tmp_path / "key.pub"]).check_of(bundle, "signed/1"))


def test_a_bundle_is_found_by_version_and_by_alias(registry: Registry) -> None:
    versions = [registry.version("found", rows(1.0)) for _ in range(2)]
    promote("found", versions[0], registry.uri)
    digests = [load_bundle(resolve_bundle(f"models:/found/{version}", registry.uri)).digest for version in versions]
    assert digests[0] != digests[1]
    assert load_bundle(resolve_bundle("models:/found@champion", registry.uri)).digest == digests[0]
    assert load_bundle(resolve_bundle("models:/found@challenger", registry.uri)).digest == digests[1]


@pytest.mark.parametrize("reference", ["nobody/1", "known/2", "known@champion", "nobody@champion", "known/x", "known"])
def test_an_unknown_reference_is_named(registry: Registry, reference: str) -> None:
    if not registry.client.search_model_versions("name='known'"):
        registry.version("known", None)
    with pytest.raises(RegistryError, match="not in the registry") as caught:
        resolve_bundle(f"models:/{reference}", registry.uri)
    assert f"models:/{reference}" in str(caught.value)


def test_an_unknown_model_has_no_table_and_no_champion(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="nobody"):
        compare("nobody", registry.uri)
    with pytest.raises(RegistryError, match="nobody"):
        promote("nobody", "1", registry.uri)


def test_a_stored_bundle_that_was_altered_is_refused(registry: Registry) -> None:
    run_id, digest = registry.run()
    register(registry.client, "altered", run_id, digest)
    stored = registry.stored_bundle(run_id)
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    with pytest.raises(BundleMismatch, match="models:/altered/1"):
        resolve_bundle("models:/altered/1", registry.uri)


def test_a_stored_bundle_that_was_exchanged_for_another_is_refused(registry: Registry) -> None:
    (run_id, digest), (other, _) = registry.run(), registry.run()
    register(registry.client, "exchanged", run_id, digest)
    registry.stored_bundle(run_id).write_bytes(registry.stored_bundle(other).read_bytes())
    with pytest.raises(BundleMismatch, match="not the one that was registered"):
        resolve_bundle("models:/exchanged@challenger", registry.uri)


def test_a_stored_bundle_that_is_gone_is_named(registry: Registry) -> None:
    run_id, digest = registry.run()
    register(registry.client, "gone", run_id, digest)
    registry.stored_bundle(run_id).unlink()
    with pytest.raises(RegistryError, match="not in the store"):
        resolve_bundle("models:/gone/1", registry.uri)


def test_registering_the_same_bundle_of_a_run_again_makes_no_second_version(registry: Registry) -> None:
    run_id, digest = registry.run()
    assert register(registry.client, "twice", run_id, digest) == "1"
    registry.version("twice", None)
    assert register(registry.client, "twice", run_id, digest) == "1"
    assert registry.alias("twice", CHALLENGER) == "1"
    assert len(compare("twice", registry.uri)) == 2


def test_metrics_logged_in_the_background_are_there_when_the_run_ends(registry: Registry) -> None:
    run_id = registry.client.create_run(experiment_id(registry.client)).info.run_id
    log = RunLog(registry.client, run_id)
    for step in range(50):
        log({"a": float(step), "b": -float(step)}, step)
    log.end("KILLED")
    assert registry.client.get_run(run_id).info.status == "KILLED"
    for name, sign in (("a", 1.0), ("b", -1.0)):
        history = registry.client.get_metric_history(run_id, name)
        assert sorted((item.step, item.value) for item in history) == [(step, sign * step) for step in range(50)]


def test_a_metric_that_cannot_be_stored_does_not_leave_the_run_open(registry: Registry) -> None:
    from mlflow.exceptions import MlflowException

    run_id = registry.client.create_run(experiment_id(registry.client)).info.run_id
    log = RunLog(registry.client, run_id)
    log({"no name can be this long" * 100: 1.0}, 0)
    with pytest.raises(MlflowException):
        log.end()
    assert registry.client.get_run(run_id).info.status == "FINISHED"


def test_the_store_is_embedded_by_default_and_an_address_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    run = client.create_run(experiment_id(client))
    assert (tmp_path / "runs/mlflow/mlflow.db").is_file()
    assert run.info.artifact_uri.startswith((tmp_path / "runs/mlflow/artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert connect(f"sqlite:///{tmp_path}/runs/mlflow/mlflow.db").get_run(run.info.run_id) is not None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9"):
        connect("http://127.0.0.1:9")
