from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from untrained import untrained_manifest

from autoscaler.versions.registry import BUNDLE_FILE
from envs.autoscaling_env import action_space, observation_space
from policies.action import ACTIONS
from policies.learned import BundleMismatch, load_bundle, write_bundle
from policies.observation import FEATURES
from training.learning.export import TOLERANCE, ExportMismatch, check_equal, export, probe_observations, to_onnx


class Spaces(gym.Env[Any, Any]):
    """The real spaces without a cluster behind them."""

    observation_space = observation_space()
    action_space = action_space()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return np.zeros(len(FEATURES), np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(len(FEATURES), np.float32), 0.0, False, True, {}


def fresh(**policy_kwargs: Any) -> PPO:
    torch.set_num_threads(1)
    model = PPO("MlpPolicy", DummyVecEnv([Spaces]), policy_kwargs=policy_kwargs, seed=3, device="cpu")
    with torch.no_grad():  # an untrained head answers with almost nothing: make the answers fill and leave -1..1
        model.policy.action_net.weight.mul_(200.0)
    return model


@pytest.fixture(scope="module")
def model() -> PPO:
    return fresh(net_arch=[64, 64])


@pytest.fixture
def run(tmp_path: Path, model: PPO) -> Path:
    """What a finished seed leaves behind."""
    folder = tmp_path / "seed-0"
    folder.mkdir()
    model.save(folder / "best.zip")
    write_bundle(folder / BUNDLE_FILE, untrained_manifest(1.0, seed=0), to_onnx(model))
    return folder


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_the_graph_answers_like_predict_on_ten_thousand_observations(activation: type[nn.Module]) -> None:
    model = fresh(net_arch=[64, 32], activation_fn=activation)
    observations = probe_observations(10_000)
    assert check_equal(model, to_onnx(model), observations) <= TOLERANCE == 1e-5
    answers = model.predict(observations, deterministic=True)[0]
    assert (np.abs(answers) == 1.0).mean() > 0.01
    assert (np.abs(answers) < 1.0).mean() > 0.1


def test_the_graph_holds_only_the_actor_and_any_number_of_rows(model: PPO) -> None:
    weights = to_onnx(model)
    parameters = sum(layer.numel() for layer in model.policy.mlp_extractor.policy_net.parameters())
    parameters += sum(layer.numel() for layer in model.policy.action_net.parameters())
    assert len(weights) < 4 * parameters + 2000
    session = onnxruntime.InferenceSession(weights, providers=["CPUExecutionProvider"])
    for n in (1, 7, 1000):
        (actions,) = session.run(["actions"], {"features": probe_observations(n)})
        assert np.shape(actions) == (n, len(ACTIONS))


def test_another_network_is_told_apart(model: PPO) -> None:
    weights = to_onnx(model)
    other = fresh(net_arch=[64, 64])
    with torch.no_grad():
        other.policy.action_net.bias[1] += 1e-3
    with pytest.raises(ExportMismatch, match="differs"):
        check_equal(other, weights, probe_observations(1000))


def test_layers_that_the_graph_cannot_hold_are_refused() -> None:
    with pytest.raises(ExportMismatch, match="ELU"):
        to_onnx(fresh(net_arch=[8], activation_fn=nn.ELU))


def test_feature_extractors_that_the_graph_cannot_hold_are_refused() -> None:
    class Doubled(BaseFeaturesExtractor):
        def __init__(self, space: gym.Space[Any]) -> None:
            super().__init__(space, len(FEATURES))

        def forward(self, observations: torch.Tensor) -> torch.Tensor:
            return 2.0 * observations

    with pytest.raises(ExportMismatch, match="Doubled"):
        to_onnx(fresh(net_arch=[8], features_extractor_class=Doubled))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_of_a_diverged_training_are_refused(value: float) -> None:
    model = fresh(net_arch=[8])
    with torch.no_grad():
        model.policy.action_net.bias[0] = value
    with pytest.raises(ExportMismatch, match="diverged"):
        to_onnx(model)


def test_a_finished_run_is_exported_again_to_the_same_bundle(run: Path, tmp_path: Path) -> None:
    digest, difference = export(run, tmp_path / "again.zip")
    assert digest == load_bundle(run / BUNDLE_FILE).digest == load_bundle(tmp_path / "again.zip").digest
    assert difference <= TOLERANCE
    assert (tmp_path / "again.zip").read_bytes() == (run / BUNDLE_FILE).read_bytes()


@pytest.mark.parametrize("missing", ["best.zip", BUNDLE_FILE])
def test_an_unfinished_run_cannot_be_exported(run: Path, tmp_path: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        export(run, tmp_path / "again.zip")
    assert not (tmp_path / "again.zip").exists()


def test_a_run_whose_bundle_was_altered_is_not_exported(run: Path, tmp_path: Path) -> None:
    content = bytearray((run / BUNDLE_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    (run / BUNDLE_FILE).write_bytes(content)
    with pytest.raises(BundleMismatch):
        export(run, tmp_path / "again.zip")
    assert not (tmp_path / "again.zip").exists()
