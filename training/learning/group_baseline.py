"""A rollout buffer whose advantages are measured against other environments in the same episode.

Most of the cost of a window is caused by the traffic: a burst costs a lot under any policy. Where several environments
run the same episode, what they share says nothing about an action of one of them. So the mean of the others can be the
baseline, and an unbiased one, since the traffic does not depend on actions (Mao et al. 2019, "Variance Reduction for
Reinforcement Learning in Input-Driven Environments"; the leave-one-out mean is that of Kool et al. 2019).
This module must not know what an episode is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.buffers import RolloutBuffer


class GroupRolloutBuffer(RolloutBuffer):
    """Stable-Baselines3's buffer; each `group` neighbouring environments run the same episode.

    Args:
        args: as for `RolloutBuffer`.
        group: environments that run the same episode; 1: no baseline but the critic.
        kwargs: as for `RolloutBuffer`.

    Raises:
        ValueError: when the environments are no whole groups.
    """

    def __init__(self, *args: Any, group: int = 1, **kwargs: Any) -> None:
        self.group = group
        super().__init__(*args, **kwargs)
        if self.n_envs % group:
            raise ValueError(f"{self.n_envs} environments cannot be divided into groups of {group}")

    def compute_returns_and_advantage(self, last_values: torch.Tensor, dones: npt.NDArray[Any]) -> None:
        """Generalised advantages, less the mean of the others of the group; the critic's targets stay as they are."""
        super().compute_returns_and_advantage(last_values, dones)
        if self.group == 1:
            return
        advantages = self.advantages.reshape(self.buffer_size, -1, self.group)
        of_others = (advantages.sum(axis=2, keepdims=True) - advantages) / (self.group - 1)
        self.advantages = np.ascontiguousarray((advantages - of_others).reshape(self.buffer_size, self.n_envs))
