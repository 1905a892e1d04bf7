"""The baseline of those who live the same episode: what they share is not credited to an action."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.buffers import RolloutBuffer

from training.learning.group_baseline import GroupRolloutBuffer

STEPS, ENVS = 6, 6


def filled(group: int, rewards: np.ndarray) -> GroupRolloutBuffer:
    space = Box(-1, 1, (2,))
    buffer = GroupRolloutBuffer(STEPS, space, space, gamma=0.9, gae_lambda=0.8, n_envs=ENVS, group=group)
    return fill(buffer, rewards)


def fill(buffer: RolloutBuffer, rewards: np.ndarray) -> RolloutBuffer:
    draw = np.random.default_rng(1)
    for step in range(STEPS):
        buffer.add(
            draw.normal(size=(ENVS, 2)),
            draw.normal(size=(ENVS, 2)),
            rewards[step],
            np.zeros(ENVS),
            torch.as_tensor(draw.normal(size=ENVS)),
            torch.zeros(ENVS),
        )
    buffer.compute_returns_and_advantage(torch.zeros(ENVS), np.zeros(ENVS))
    return buffer


def rewards(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(STEPS, ENVS))


def test_each_is_measured_against_the_mean_of_the_others():
    alone, grouped = filled(1, rewards()), filled(3, rewards())
    expected = np.empty_like(alone.advantages)
    for first in (0, 3):
        for one in range(first, first + 3):
            others = [other for other in range(first, first + 3) if other != one]
            expected[:, one] = alone.advantages[:, one] - alone.advantages[:, others].mean(axis=1)
    np.testing.assert_allclose(grouped.advantages, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(grouped.returns, alone.returns)  # the critic learns what it learned before


def test_what_all_of_a_group_share_is_not_credited_to_anyone():
    own = rewards()
    crowd = np.repeat(10.0 * np.random.default_rng(5).normal(size=(STEPS, ENVS // 3)), 3, axis=1)
    np.testing.assert_allclose(filled(3, own + crowd).advantages, filled(3, own).advantages, atol=1e-4)
    assert np.abs(filled(1, own + crowd).advantages - filled(1, own).advantages).max() > 5.0


def test_a_group_of_one_is_the_plain_buffer():
    space = Box(-1, 1, (2,))
    plain = fill(RolloutBuffer(STEPS, space, space, gamma=0.9, gae_lambda=0.8, n_envs=ENVS), rewards())
    np.testing.assert_array_equal(filled(1, rewards()).advantages, plain.advantages)


def test_environments_that_are_no_whole_groups_are_refused():
    with pytest.raises(ValueError, match="6 environments cannot be divided into groups of 4"):
        filled(4, rewards())
