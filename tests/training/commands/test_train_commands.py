import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result
from untrained import untrained_manifest

import training.learning.train
from autoscaler.versions.registry import BUNDLE_FILE
from policies.learned import load_bundle, write_bundle
from training.commands import train as train_cli
from training.learning.monitor import RunState
from training.versions.registry import EVALUATION_FILE, register, resolve_bundle
from training.versions.tracking import connect, experiment_id

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "total_steps": 256,
    "train_share": 0.5,
    "evaluation_suite": None,
    "worlds": {"traces": 1, "scenarios": 1, "trace_s": 1200.0, "mean_replicas": [1.0, 2.0], "profiles": {"chat": 1.0}},
    "episodes": {"steps": 20},
    "ppo": {"num_envs": 8, "steps_per_rollout": 16, "batch_size": 64, "hidden": [8]},
    "validation": {"every_steps": 128, "episodes": 2},
}

app = typer.Typer()
train_cli.register(app)


def jevons(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, **overrides: Any) -> Path:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **overrides}))
    return path


def version(uri: str, folder: Path, name: str, cost: float, holds: bool = True) -> str:
    """Register a policy that nobody trained, with a judgement."""
    digest = write_bundle(folder / BUNDLE_FILE, untrained_manifest(cost=cost), b"weights")
    rows = [
        {
            "scenario": "chat",
            "policy": "bundle",
            "seed": seed,
            "attainment": 0.99,
            "holds_slo": holds,
            "usd_per_mtok": cost,
            "usd_per_good_mtok": cost,
            "replica_hours": 1.0,
        }
        for seed in range(4)
    ]
    client = connect(uri)
    run_id = client.create_run(experiment_id(client)).info.run_id
    client.log_artifact(run_id, str(folder / BUNDLE_FILE))
    stored = {"rows": rows, "policies": [{"policy": "bundle", "bundle_digest": digest}]}
    client.log_text(run_id, json.dumps(stored), EVALUATION_FILE)
    return register(client, name, run_id, digest)


def refused(result: Result, *expected: str) -> None:
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for words in expected:
        assert words in result.stderr


def test_train_registers_a_challenger_that_can_be_exported_again(uri: str, tmp_path: Path, recipe: Path) -> None:
    result = jevons("train", "--config", str(recipe), "--out", "run", "--tracking-uri", uri, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "registered as version 1 of tiny (alias challenger)" in result.stdout
    bundle = load_bundle(tmp_path / "run/seed-3" / BUNDLE_FILE)
    assert bundle.manifest.provenance["seed"] == 3
    assert load_bundle(resolve_bundle("models:/tiny@challenger", uri)).digest == bundle.digest
    assert not (tmp_path / "runs").exists()  # another store was named

    exported = jevons("export", "run/seed-3", "--out", "again.zip")
    assert exported.exit_code == 0, exported.output
    assert bundle.digest[:16] in exported.stdout
    assert load_bundle(tmp_path / "again.zip").digest == bundle.digest

    again = jevons("train", "--config", str(recipe), "--out", "run", "--tracking-uri", uri, "--seed", "3", "--resume")
    assert again.exit_code == 0, again.output
    assert "registered as version 1 of tiny" in again.stdout


def test_an_existing_run_is_not_overwritten_without_resume(recipe: Path) -> None:
    kept = Path("run/seed-0/state.json")
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    refused(jevons("train", "--config", str(recipe), "--out", "run"), "run: holds a run already", "--resume")
    assert kept.read_text() == "kept"


def test_ctrl_c_says_how_to_go_on_and_marks_the_run(
    uri: str, tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.learning.train, "_learn", interrupted)
    options = ["--config", str(recipe), "--out", "a run", "--steps", "512", "--seed", "7", "--tracking-uri", uri]
    result = jevons("train", *options)
    assert result.exit_code == 130
    hint = f"jevons train --config {recipe} --out 'a run' --steps 512 --seed 7 --tracking-uri {uri} --resume"
    assert result.stderr.rstrip().endswith(hint)
    run_id = RunState.load(tmp_path / "a run/seed-7").mlflow_run_id
    run = connect(uri).get_run(run_id)
    assert run.info.status == "KILLED"
    assert run.data.params["total_steps"] == "512"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"total_step": 5}, "field total_step"),
        ({"ppo": {"batch_size": 1000}}, "must divide"),
        ({"evaluation_suite": "absent"}, "no suite named 'absent'"),
        ({"evaluation_suite": "smoke", "interface": {"window": {"control_interval_s": 29.0}}}, "another interface"),
        ({"episodes": {"steps": 2000}}, "fewer steps per episode"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_training(
    uri: str, tmp_path: Path, overrides: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learn(*_: object, **__: object) -> None:
        raise AssertionError("training has begun")

    monkeypatch.setattr("stable_baselines3.PPO.learn", learn)
    path = written(tmp_path, **overrides)
    result = jevons("train", "--config", str(path), "--out", "run", "--tracking-uri", uri)
    assert result.exit_code == 2
    assert expected in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.output


def test_a_missing_recipe_is_named() -> None:
    refused(jevons("train", "--config", "absent.yaml"), "absent.yaml: no such file")
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [("train", "--steps", "0"), ("train", "--seed", "x"), ("promote",), ("export",)])
def test_wrong_options_are_usage_errors(words: tuple[str, ...]) -> None:
    assert jevons(*words).exit_code == 2


def test_export_of_something_else_is_refused(tmp_path: Path) -> None:
    refused(jevons("export", str(tmp_path)), "no finished training run here")
    refused(jevons("export", str(tmp_path), "--out", "absent/policy.zip"), "the folder absent does not exist")


def test_promote_says_why_not_and_exits_with_1(uri: str, tmp_path: Path) -> None:
    missing = version(uri, tmp_path, "rule", 1.0, holds=False)
    result = jevons("promote", missing, "--name", "rule", "--tracking-uri", uri)
    assert result.exit_code == 1
    assert "version 1 of rule: not promoted: misses the SLO on chat" in result.stdout

    first = version(uri, tmp_path, "rule", 1.0)
    result = jevons("promote", first, "--name", "rule", "--tracking-uri", uri)
    assert result.exit_code == 0
    assert "version 2 of rule: promoted" in result.stdout

    dearer = version(uri, tmp_path, "rule", 1.1)
    result = jevons("promote", dearer, "--name", "rule", "--tracking-uri", uri)
    assert result.exit_code == 1
    assert "not cheaper beyond doubt" in result.stdout


def test_promote_of_an_unknown_version_is_refused(uri: str) -> None:
    refused(jevons("promote", "1", "--name", "nobody", "--tracking-uri", uri), "models:/nobody/1: not in the registry")


def test_compare_shows_a_table_and_writes_json(uri: str, tmp_path: Path) -> None:
    first = version(uri, tmp_path, "table", 2.0)
    jevons("promote", first, "--name", "table", "--tracking-uri", uri)
    version(uri, tmp_path, "table", 3.0, holds=False)
    result = jevons("compare", "--name", "table", "--json", "table.json", "--tracking-uri", uri)
    assert result.exit_code == 0, result.output
    assert "table: registered versions" in result.stdout
    rows = json.loads(Path("table.json").read_text())
    assert [(row["version"], row["aliases"], row["holds_slo"]) for row in rows] == [
        (2, ["challenger"], 0),
        (1, ["champion"], 1),
    ]
    assert [row["usd_per_good_mtok"] for row in rows] == pytest.approx([3.0, 2.0])
    assert {path.name for path in tmp_path.iterdir()} == {BUNDLE_FILE, "table.json"}


def test_compare_of_an_unknown_model_or_into_a_missing_folder_is_refused(uri: str) -> None:
    refused(jevons("compare", "--name", "nobody", "--tracking-uri", uri), "no registered model named 'nobody'")
    refused(jevons("compare", "--json", "absent/table.json", "--tracking-uri", uri), "the folder absent does not exist")
