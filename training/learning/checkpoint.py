"""Checkpoints of a training run, read back.

Stable-Baselines3 stores the class of the rollout buffer by its module path. A checkpoint has to survive a move of that
module, so the class is passed in instead of being looked up.
"""

from __future__ import annotations

from pathlib import Path

from stable_baselines3 import PPO

from envs.vector_env import AutoscalingVecEnv
from training.learning.group_baseline import GroupRolloutBuffer


def load_checkpoint(path: Path, env: AutoscalingVecEnv | None = None) -> PPO:
    """The model of a checkpoint, on the CPU.

    Args:
        path: archive that Stable-Baselines3 wrote.
        env: to go on learning in; None for a model that only answers.
    """
    return PPO.load(path, env, device="cpu", custom_objects={"rollout_buffer_class": GroupRolloutBuffer})
