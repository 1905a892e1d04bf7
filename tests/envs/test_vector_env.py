"""The native vector environment is the single one, many times over."""

from __future__ import annotations

from functools import cache

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecMonitor

from envs.autoscaling_env import AutoscalingEnv
from envs.episodes import EpisodeSpec
from envs.randomization import Randomization, ScenarioBank, draw_bank
from envs.vector_env import AutoscalingVecEnv
from policies.observation import FEATURES
from policies.spec import GuardrailSpec, InterfaceSpec, ObjectiveSpec

STEPS = 8
SPEC = EpisodeSpec(steps=STEPS)


@cache
def bank() -> ScenarioBank:
    ranges = Randomization(
        traces=4, scenarios=16, trace_s=1800.0, mean_replicas=(1.0, 3.0), max_replicas=8, spot_scenarios=0.5
    )
    return draw_bank(ranges, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 1)


def actions(n: int, steps: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).uniform(-1, 1, (steps, n, 4)).astype(np.float32)


def vector_env(n: int, seed: int = 0) -> AutoscalingVecEnv:
    return AutoscalingVecEnv(bank(), n, SPEC, seed)


def test_one_wide_it_is_the_single_environment_step_by_step() -> None:
    """Over three episodes: features, rewards, ends and terminal observations."""
    wide, single = vector_env(1), AutoscalingEnv(bank(), SPEC)
    wide.seed(11)
    features = wide.reset()
    expected, _ = single.reset(seed=11)
    np.testing.assert_array_equal(features, [expected])
    for action in actions(1, 3 * STEPS):
        features, rewards, dones, infos = wide.step(action)
        expected, reward, terminated, truncated, info = single.step(action[0])
        assert not terminated
        assert dones.tolist() == [truncated]
        assert rewards.tolist() == [np.float32(reward)]
        assert repr({name: float(value[0]) for name, value in wide.terms.items()}) == repr(info["terms"])
        if truncated:
            assert set(infos[0]) == {"TimeLimit.truncated", "terminal_observation"}
            assert infos[0]["TimeLimit.truncated"] is True
            np.testing.assert_array_equal(infos[0]["terminal_observation"], expected)
            expected, _ = single.reset()
            assert not np.array_equal(infos[0]["terminal_observation"], expected)
        else:
            assert infos == [{}]
        np.testing.assert_array_equal(features, [expected])


def test_a_seed_repeats_a_run_and_episodes_end_in_groups() -> None:
    n, runs = 16, []
    for seed in (5, 5, 6):
        env = vector_env(n, seed)
        first = env.reset()
        steps = [env.step(action) for action in actions(n, 2 * STEPS)]
        runs.append((first, [step[0] for step in steps], [step[1] for step in steps], [step[2] for step in steps]))
    for left, right in zip(runs[0], runs[1], strict=True):
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(runs[0][0], runs[2][0])
    assert np.sum(runs[0][3], axis=1).tolist() == [2, 2, 2, 2, 2, 2, 2, 2] * 2


def test_shapes_types_and_bounds_are_what_the_spaces_say() -> None:
    n = 64
    env = vector_env(n)
    assert env.observation_space == gym.spaces.Box(-10.0, 10.0, (len(FEATURES),), np.float32)
    assert env.action_space == gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
    env.reset()
    for action in actions(n, 2 * STEPS):
        features, rewards, dones, infos = env.step(action)
        assert (features.shape, features.dtype) == ((n, len(FEATURES)), np.float32)
        assert (rewards.shape, rewards.dtype) == ((n,), np.float32)
        assert (dones.shape, dones.dtype, len(infos)) == ((n,), bool, n)
        assert np.isfinite(rewards).all()
        assert all(env.observation_space.contains(row) for row in features)
    assert env.step_s > 0.0


def test_observations_handed_out_earlier_are_not_overwritten() -> None:
    env = vector_env(8)
    handed_out = [env.reset()]
    copies = [handed_out[0].copy()]
    for action in actions(8, STEPS):
        features = env.step(action)[0]
        handed_out.append(features)
        copies.append(features.copy())
    np.testing.assert_array_equal(handed_out, copies)


def test_a_reset_without_a_seed_goes_on_drawing() -> None:
    env = vector_env(4)
    assert not np.array_equal(env.reset(), env.reset())


def test_parts_of_the_traces_are_kept_apart() -> None:
    origins = []
    for part in ((0.0, 0.5), (0.5, 1.0)):
        env = AutoscalingVecEnv(bank(), 64, SPEC, part=part)
        env.reset()
        origins.append(env.episodes.cluster.arrays.service["origin_s"].copy())
    assert origins[0].max() + env.episodes.length_s <= 900.0 <= origins[1].min()


def test_the_rest_of_the_vector_interface() -> None:
    env = vector_env(3)
    assert env.get_attr("num_envs") == [3, 3, 3]
    assert env.get_attr("num_envs", 1) == [3]
    env.set_attr("step_s", 2.0)
    assert env.get_attr("step_s", [0, 2]) == [2.0, 2.0]
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    assert env.get_images() == [None] * 3
    with pytest.raises(AttributeError, match="no per-environment method 'jump'"):
        env.env_method("jump")
    env.close()


def test_ppo_learns_on_it() -> None:
    """That is: runs through rollouts with ends of episodes in them and changes its weights."""
    env = VecMonitor(vector_env(16))
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=64, n_epochs=1, device="cpu", seed=0)
    before = model.predict(np.zeros((1, len(FEATURES)), np.float32), deterministic=True)[0]
    model.learn(512)
    assert model.num_timesteps == 512
    assert {round(episode["l"]) for episode in model.ep_info_buffer or ()} >= {STEPS}
    assert not np.array_equal(before, model.predict(np.zeros((1, len(FEATURES)), np.float32), deterministic=True)[0])
