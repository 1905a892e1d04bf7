import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from stable_baselines3 import PPO
from typer.testing import CliRunner, Result

from envs.traffic.generator import GeneratorSpec, generate
from envs.traffic.trace_files import write_trace
from envs.vector_env import AutoscalingVecEnv
from policies.learned import BundleMismatch, load_bundle, write_bundle
from policies.lineup import SHIPPED_BUNDLE
from training.commands import train as train_cli
from training.commands.fine_tune import find_bundle
from training.learning.export import check_equal, probe_observations
from training.learning.fine_tune import SOURCE_FILE, FineTuning, OwnReplay, prepared
from training.learning.monitor import RunState
from training.learning.network import actor_layers, freeze_actor, hidden_widths
from training.learning.train import new_model
from training.learning.train_config import TrainConfig
from training.versions.registry import CHALLENGER, CHAMPION, RegistryError, promote_over, versus
from training.versions.tracking import connect

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "total_steps": 512,
    "evaluation_suite": None,
    "worlds": {"traces": 1, "scenarios": 2, "trace_s": 1200.0, "mean_replicas": [1.0, 2.0], "profiles": {"chat": 1.0}},
    "episodes": {"steps": 60},
    "ppo": {"num_envs": 8, "steps_per_rollout": 16, "batch_size": 64},
    "validation": {"every_steps": 256, "episodes": 2},
    "fine_tune": {"critic_steps": 256, "judge_seeds": 3},
}
SERVICE: dict[str, Any] = {
    "service": "mine",
    "slo": {"ttft_s": 2.0, "tpot_s": 0.08, "attainment": 0.9},
    "pools": [
        {
            "engine": "llama-3.1-8b-l40s",
            "max_replicas": 5,
            "cold_start": {"node_s": 0, "image_s": 5, "weights_s": 10, "warmup_s": 15},
        }
    ],
}
app = typer.Typer()
train_cli.register(app)


def jevons(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a service and its traffic."""
    folder = tmp_path_factory.mktemp("fine-tune")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "mine.yaml").write_text(yaml.safe_dump(SERVICE))
    trace = generate(GeneratorSpec(profile="chat", duration_s=1500.0, mean_rps=6.0), 0)
    write_trace(trace, folder / "mine.parquet")
    write_trace(trace.slice(0.0, 600.0), folder / "short.parquet")
    return folder


@pytest.fixture(scope="module")
def uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    from policies.spec import load_spec

    recipe = TrainConfig.model_validate(RECIPE)
    service = load_spec(folder / "mine.yaml")
    return prepared(recipe, "learned", load_bundle(SHIPPED_BUNDLE), folder / "mine.parquet", service)


@pytest.fixture(scope="module")
def course(config: TrainConfig, folder: Path) -> FineTuning:
    (folder / SOURCE_FILE).write_bytes(SHIPPED_BUNDLE.read_bytes())
    return FineTuning(config, folder, lambda *_: None)


@pytest.fixture
def model(config: TrainConfig, course: FineTuning) -> PPO:
    env = AutoscalingVecEnv(course.bank, config.ppo.num_envs, config.episodes)
    return course.first_model(new_model(config, env, 0))


def options(folder: Path, uri: str) -> list[object]:
    return ["--config", folder / "recipe.yaml", "--trace", folder / "mine.parquet", "--spec", folder / "mine.yaml",
            "--tracking-uri", uri]  # fmt: skip


def refused(result: Result, *expected: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for words in expected:
        assert words in result.stderr


# Where it starts.


def test_the_first_network_answers_like_the_bundle(model: PPO) -> None:
    assert check_equal(model, load_bundle(SHIPPED_BUNDLE).weights, probe_observations(1000)) <= 1e-5


def test_a_frozen_actor_stays_while_the_critic_learns(model: PPO) -> None:
    def weights(layers: Any) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten().clone() for parameter in layers.parameters()])

    policy: Any = model.policy
    actor, critic = weights(policy.mlp_extractor.policy_net), weights(policy.mlp_extractor.value_net)
    freeze_actor(model, True)
    model.learn(128)
    assert torch.equal(weights(policy.mlp_extractor.policy_net), actor)
    assert not torch.equal(weights(policy.mlp_extractor.value_net), critic)
    freeze_actor(model, False)
    model.learn(128)
    assert not torch.equal(weights(policy.mlp_extractor.policy_net), actor)


def test_episodes_are_of_the_service_and_of_random_worlds(config: TrainConfig, course: FineTuning) -> None:
    own = [spec for spec in course.bank.specs if spec.service == "mine"]
    assert 0.6 < len(own) / len(course.bank) < 0.8
    assert config.episodes.steps == 49  # what fits into half the trace
    assert course.bank.traces[-1].duration_s == 750.0
    assert config.ppo.hidden == hidden_widths(actor_layers(load_bundle(SHIPPED_BUNDLE)))
    assert config.objective.miss_price == pytest.approx(np.exp(load_bundle(SHIPPED_BUNDLE).manifest.log_miss_price))


def test_the_source_is_its_own_unit(course: FineTuning) -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    own = OwnReplay(course.origin.service, course._parts.validation, bundle, 2)
    assert own.replay(bundle.weights) == (own.source_usd, own.source_attainment)
    assert own.score(own.source_usd, 1.0)["score"] == 1.0
    assert own.score(0.5 * own.source_usd, 0.85)["score"] == pytest.approx(1.0)  # half of the allowance too much


# The command.


def test_a_policy_is_tuned_judged_and_resumed(folder: Path, uri: str, tmp_path: Path) -> None:
    words = ["train", "--from", "learned", "--out", tmp_path / "run", *options(folder, uri)]
    result = jevons(*words)
    assert result.exit_code == 0, result.output
    assert "before: " in result.stdout
    assert "after:  " in result.stdout
    assert ("not registered" in result.stdout) != ("registered as version 1 of tiny-mine" in result.stdout)
    state = RunState.load(tmp_path / "run/seed-0")
    assert [point["steps"] for point in state.curve] == [0, 256, 512]
    assert all(point["worlds_score"] > 0 for point in state.curve)
    manifest = load_bundle(tmp_path / "run/seed-0/policy.zip").manifest
    origin = manifest.provenance["config"]["fine_tune"]["origin"]
    assert origin["bundle_digest"] == load_bundle(SHIPPED_BUNDLE).digest
    shipped = load_bundle(SHIPPED_BUNDLE).manifest
    assert manifest.log_miss_price == pytest.approx(shipped.log_miss_price)
    assert (np.array(manifest.feature_low) <= np.array(shipped.feature_low)).all()
    assert (tmp_path / "run/report.html").is_file()
    client = connect(uri)
    stored = json.loads(client.download_artifacts(state.mlflow_run_id, "evaluation.json", str(tmp_path)) and
                        (tmp_path / "evaluation.json").read_text())  # fmt: skip
    assert [scenario["name"] for scenario in stored["scenarios"]] == ["mine"]

    refused(jevons(*words), "holds a run already")
    again = jevons(*words, "--resume")
    assert again.exit_code == 0, again.output
    assert again.stdout == result.stdout
    other = jevons("train", "--from", "learned", "--out", tmp_path / "run", *options(folder, uri), "--resume",
                   "--trace", folder / "short.parquet")  # fmt: skip
    refused(other, "too short")


def test_wrong_input_is_refused_before_any_training(folder: Path, uri: str, tmp_path: Path) -> None:
    common = options(folder, uri)
    out = ["--out", tmp_path / "run"]
    refused(jevons("train", "--from", "nobody", *out, *common), "--from nobody: expected champion, learned")
    refused(jevons("train", "--from", "champion", *out, *common), "models:/tiny@champion: not in the registry")
    refused(jevons("train", "--from", tmp_path, *out, *common), "no finished training run here")
    refused(jevons("train", "--from", "absent.zip", *out, *common), "absent.zip: no such policy bundle")
    refused(jevons("train", "--from", "learned", *out), "--from and --trace go together")
    refused(jevons("train", "--spec", folder / "mine.yaml", *out), "--spec")
    short = jevons("train", "--from", "learned", *out, *common, "--trace", folder / "short.parquet")
    refused(short, "lasts 600 s, too short", "needs 1,230 s at least")
    slow = tmp_path / "slow.yaml"
    slow.write_text(yaml.safe_dump({**SERVICE, "interface": {"window": {"control_interval_s": 30.0}}}))
    refused(jevons("train", "--from", "learned", *out, *common, "--spec", slow), "trained for another interface")
    assert not (tmp_path / "run").exists()


def test_another_bundle_or_trace_cannot_go_on_with_a_run(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(SHIPPED_BUNDLE)
    other = bundle.manifest.model_copy(update={"provenance": {"other": True}})
    write_bundle(tmp_path / SOURCE_FILE, other, bundle.weights)
    with pytest.raises(BundleMismatch, match="not the bundle that this run was started from"):
        FineTuning(config, tmp_path, lambda *_: None)


def test_the_best_seed_of_a_run_folder_is_found(tmp_path: Path) -> None:
    for seed, score in enumerate((2.0, 1.0, 3.0)):
        place = tmp_path / f"seed-{seed}"
        place.mkdir()
        (place / "policy.zip").touch()
        RunState(best_score=score).save(place)
    assert find_bundle(str(tmp_path), "any", None) == tmp_path / "seed-1/policy.zip"
    assert find_bundle(str(tmp_path / "seed-2"), "any", None) == tmp_path / "seed-2/policy.zip"


# The verdict.


def evaluation(ours: float, theirs: float, we_hold: bool = True, they_hold: bool = True) -> dict[str, Any]:
    def row(policy: str, seed: int, cost: float, holds: bool) -> dict[str, Any]:
        return {"scenario": "mine", "policy": policy, "seed": seed, "usd_per_good_mtok": cost, "holds_slo": holds}

    return {
        "rows": [row("a", seed, ours, we_hold) for seed in range(3)]
        + [row("b", seed, theirs, they_hold) for seed in range(3)],
        "policies": [{"policy": "a", "bundle_digest": "new"}, {"policy": "b", "bundle_digest": "old"}],
    }


def test_the_tuned_policy_wins_if_it_holds_and_is_cheaper_or_alone_in_holding() -> None:
    assert versus(evaluation(0.9, 1.0), "new", "old").promote
    assert not versus(evaluation(1.0, 1.0), "new", "old").promote
    assert "former" in versus(evaluation(1.1, 1.0), "new", "old").reasons[0]
    assert not versus(evaluation(0.5, 1.0, we_hold=False), "new", "old").promote
    alone = versus(evaluation(1.5, 1.0, they_hold=False), "new", "old")
    assert alone.promote
    assert "came from misses" in alone.reasons[0]


def test_a_winner_replaces_only_the_champion_that_it_has_beaten(uri: str, tmp_path: Path) -> None:
    from training.versions.tracking import experiment_id

    client = connect(uri)
    client.create_registered_model("place")

    def version(digest: str) -> str:
        run = client.create_run(experiment_id(client)).info
        made = client.create_model_version("place", "file:///x", run.run_id, tags={"bundle_digest": digest})
        return str(made.version)

    first = version("one")
    for _ in range(2):  # a run that is resumed after its end says what it said
        assert promote_over(client, "place", first, "shipped") == "as champion"
    second = version("two")
    assert "version 1, is not the policy" in promote_over(client, "place", second, "shipped")
    assert str(client.get_model_version_by_alias("place", CHAMPION).version) == "1"
    assert promote_over(client, "place", second, "one") == "as champion"
    assert str(client.get_model_version_by_alias("place", CHAMPION).version) == "2"
    with pytest.raises(RegistryError):
        find_bundle(f"models:/place@{CHALLENGER}", "any", uri)
