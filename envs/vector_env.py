"""The environment as a native Stable-Baselines3 `VecEnv`: one kernel call steps all episodes.

This module must not know how episodes work, see `envs.episodes`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from envs.autoscaling_env import action_space, observation_space
from envs.episodes import Episodes, EpisodeSpec
from envs.randomization import ScenarioBank


class AutoscalingVecEnv(VecEnv):
    """`num_envs` episodes side by side; see `envs.autoscaling_env.AutoscalingEnv` for spaces and rewards.

    ``infos[i]`` holds ``TimeLimit.truncated`` and ``terminal_observation`` where an episode has just ended, and is
    empty elsewhere; the reward's terms of the last step for all environments are in `terms`.

    Args:
        bank: the worlds.
        num_envs: episodes side by side.
        episodes: how episodes are cut.
        seed: of all draws.
        part: share of every trace's time that slices come from.
        group: neighbours that live the same episode.
    """

    def __init__(
        self,
        bank: ScenarioBank,
        num_envs: int,
        episodes: EpisodeSpec | None = None,
        seed: int = 0,
        part: tuple[float, float] = (0.0, 1.0),
        group: int = 1,
    ) -> None:
        self.episodes = Episodes(bank, num_envs, episodes or EpisodeSpec(), seed, part, group)
        self.step_s = 0.0  # wall time spent in steps so far
        self.terms: dict[str, npt.NDArray[np.float64]] = {}
        self.render_mode = None
        # Made once: hundreds of dicts a step would be work for the garbage collector. Nobody writes into an info.
        self._empty_infos: list[dict[str, Any]] = [{} for _ in range(num_envs)]
        self._action = np.zeros((num_envs, *action_space().shape), np.float32)
        super().__init__(num_envs, observation_space(), action_space())

    def reset(self) -> VecEnvObs:
        """Start all episodes anew; a seed given by `seed` before takes effect here."""
        if self._seeds[0] is not None:
            self.episodes.rng = np.random.default_rng(self._seeds[0])
        self._reset_seeds()
        self._reset_options()
        return self.episodes.reset().features

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Take actions (n, 4)."""
        self._action = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Run one window of every episode and restart those that ended."""
        started_s = time.perf_counter()
        result = self.episodes.step(self._action)
        self.terms = result.terms
        features = result.observation.features
        infos = list(self._empty_infos)
        if result.truncated.any():
            features = features.copy()
            for row in np.flatnonzero(result.truncated):
                infos[row] = {"TimeLimit.truncated": True, "terminal_observation": features[row]}
            features = self.episodes.restart(result.truncated).features
        self.step_s += time.perf_counter() - started_s
        return features, result.reward.astype(np.float32), result.truncated, infos

    def close(self) -> None:
        """Nothing is held outside Python."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The attribute, once per environment."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the whole."""
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Environments have no methods of their own.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"AutoscalingVecEnv has no per-environment method {method_name!r}")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """No wrapper fits around one of the environments."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """There is nothing to draw."""
        return [None] * self.num_envs

    def _get_indices(self, indices: VecEnvIndices) -> Iterable[int]:
        return range(self.num_envs) if indices is None else [indices] if isinstance(indices, int) else indices
