import sys
import types

import numpy as np
import pytest
from stable_baselines3 import PPO

from envs.autoscaling_env import small_bank
from envs.vector_env import AutoscalingVecEnv
from training.learning.checkpoint import load_checkpoint
from training.learning.group_baseline import GroupRolloutBuffer


def test_a_checkpoint_from_before_a_module_moved_is_read(tmp_path, monkeypatch):
    env = AutoscalingVecEnv(small_bank(), 4)
    elsewhere = types.ModuleType("training.where_it_was")
    elsewhere.GroupRolloutBuffer = GroupRolloutBuffer
    model = PPO("MlpPolicy", env, n_steps=2, batch_size=8, device="cpu", rollout_buffer_class=GroupRolloutBuffer,
                rollout_buffer_kwargs={"group": 2})  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, elsewhere.__name__, elsewhere)
        patch.setattr(GroupRolloutBuffer, "__module__", elsewhere.__name__)
        model.save(tmp_path / "old.zip")
    with pytest.raises(ModuleNotFoundError, match="where_it_was"):
        PPO.load(tmp_path / "old.zip", device="cpu")
    found = load_checkpoint(tmp_path / "old.zip", env)
    assert isinstance(found.rollout_buffer, GroupRolloutBuffer)
    observations = np.zeros((3, *env.observation_space.shape), np.float32)
    answers = [each.predict(observations, deterministic=True)[0] for each in (model, found)]
    np.testing.assert_array_equal(*answers)
