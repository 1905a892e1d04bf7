"""What happens between rollouts: validation, checkpoints, curves.

This module must not know where worlds come from or where policies go.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from envs.episodes import Episodes
from envs.vector_env import AutoscalingVecEnv
from policies.atomic_files import PARTIAL, write_text, write_whole
from policies.contract import Floats
from training.learning.train_config import TrainConfig

STATE_FILE = "state.json"
Log = Callable[[dict[str, float], int], None]


@dataclass
class RunState:
    """What a resumed run needs beside the network; `state.json` in the run's folder.

    It names the networks that belong to it. They are written before it and under new names, so that a run killed at any
    moment leaves a state with its own networks.
    """

    steps: int = 0
    checkpoint: str = ""
    best: str = ""
    best_score: float = float("inf")
    best_steps: int = 0
    stale_validations: int = 0
    seconds: float = 0.0
    mlflow_run_id: str = ""
    finished: bool = False
    bundle_digest: str = ""
    feature_low: list[float] = field(default_factory=list)
    feature_high: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write the state; whole or not at all."""
        write_text(folder / STATE_FILE, json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> RunState:
        """Read the state of a run.

        Raises:
            ValueError: when the file is not one.
        """
        path = folder / STATE_FILE
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not the state of a training run: {error}") from None

    def best_point(self) -> dict[str, float]:
        """The validation of the best network."""
        return next(point for point in self.curve if point["score"] == self.best_score)

    def finish(self, folder: Path) -> None:
        """Keep the best network as `best.zip`, mark the run as finished, and drop what is no longer needed."""
        if self.best != "best.zip":
            write_whole(folder / "best.zip", lambda partial: shutil.copyfile(folder / self.best, partial))
        self.best, self.finished = "best.zip", True
        self.save(folder)
        self.drop_unused(folder)

    def drop_unused(self, folder: Path) -> None:
        """Delete the networks that this state does not name, and what a killed run left half written."""
        for pattern in ("checkpoint-*.zip", "best-*.zip", PARTIAL):
            for path in folder.glob(pattern):
                if path.name not in {self.checkpoint, self.best}:
                    path.unlink()


class Validator:
    """Judges a network on the same held-out episodes every time.

    The score is the mean weighted cost (provisioned, misses, churn), each episode at a price of a miss of its own, so
    the whole frontier counts: lower is better. Training reward is useless as a measure of progress: it is noisy, and
    explores.

    Args:
        episodes: held-out episodes.
        seed: of their draws.
    """

    def __init__(self, episodes: Episodes, seed: int) -> None:
        self.episodes = episodes
        self.seed = seed

    def run(self, act: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        """Run all episodes with `act`, features (n, F) -> outputs (n, 4)."""
        episodes = self.episodes
        episodes.rng = np.random.default_rng(self.seed)
        features = episodes.reset(stagger=False).features
        totals = dict.fromkeys(("provisioned", "misses", "churn"), 0.0)
        attained: Floats = np.ones(len(episodes))
        for _ in range(episodes.spec.steps):
            result = episodes.step(act(features))
            features = result.observation.features
            attained = result.terms["attainment"]
            for name in totals:
                totals[name] += float((episodes.reward.weight * result.terms[name]).mean()) / episodes.spec.steps
        known = ~np.isnan(attained)
        target = episodes.fleet.attainment_target
        return {
            "score": sum(totals.values()),
            **totals,
            "attainment": float(attained[known].mean()),
            "holds_slo_share": float((attained >= target)[known].mean()),
        }


class TrainingMonitor(BaseCallback):
    """Validates, keeps the best network, checkpoints, logs; stops without progress.

    Args:
        config: of the run.
        folder: of the run.
        state: new or resumed.
        validator: held-out episodes.
        log: receives metrics and the step they belong to.
        on_progress: called with the environment steps done.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        state: RunState,
        validator: Validator,
        log: Log,
        on_progress: Callable[[int], None],
    ) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.state = state
        self.validator = validator
        self.log = log
        self.on_progress = on_progress
        self._terms: dict[str, float] = {}
        self._windows = 0
        self._started_s = time.perf_counter() - state.seconds
        self._rollout_started_s = time.perf_counter()
        self._env_s = 0.0
        self._next_validation = 0
        self._next_checkpoint = 0

    @property
    def stopped(self) -> bool:
        """Whether validation has seen no progress for too long."""
        return self.state.stale_validations >= self.config.validation.patience

    @property
    def env(self) -> AutoscalingVecEnv:
        """The environment being learned in."""
        env = self.model.get_env()
        assert isinstance(env, AutoscalingVecEnv)
        return env

    def _on_training_start(self) -> None:
        every = self.config.validation.every_steps
        validated = int(self.state.curve[-1]["steps"]) if self.state.curve else 0
        self._next_validation = (validated // every + 1) * every
        every = self.config.checkpoint_every_steps
        self._next_checkpoint = (self.state.steps // every + 1) * every
        self._env_s, self._rollout_started_s = self.env.step_s, time.perf_counter()

    def _on_step(self) -> bool:
        env = self.env
        for name in ("provisioned", "misses", "churn"):
            self._terms[name] = self._terms.get(name, 0.0) + float(env.terms[name].mean())
        self._windows += 1
        self.on_progress(self.model.num_timesteps)
        return not self.stopped

    def _on_rollout_end(self) -> None:
        state, model = self.state, self.model
        assert isinstance(model, BaseAlgorithm)
        state.steps = model.num_timesteps
        state.seconds = time.perf_counter() - self._started_s
        self._remember_range(model.rollout_buffer.observations)  # type: ignore[attr-defined]
        now_s = time.perf_counter()
        metrics = {f"train/{name}": value / self._windows for name, value in self._terms.items()}
        metrics |= {
            "train/env_time_share": (self.env.step_s - self._env_s) / (now_s - self._rollout_started_s),
            "train/steps_per_second": self._windows * self.env.num_envs / (now_s - self._rollout_started_s),
        }
        self._env_s, self._rollout_started_s = self.env.step_s, now_s
        self._terms, self._windows = {}, 0
        self.log(metrics, state.steps)

    def _on_training_end(self) -> None:
        self.checkpoint()

    def _on_rollout_start(self) -> None:
        # The update on the last rollout is over here.
        if self.state.steps >= self._next_validation:
            self._next_validation += self.config.validation.every_steps
            self.validate()
        if self.state.steps >= self._next_checkpoint:
            self._next_checkpoint += self.config.checkpoint_every_steps
            self.checkpoint()

    def judge(self) -> dict[str, float]:
        """Validate the network; `score` decides, lower is better."""
        return self.validator.run(lambda features: self.model.predict(features, deterministic=True)[0])

    def validate(self) -> dict[str, float]:
        """Judge the network; keep it when it is the best so far."""
        state = self.state
        started_s = time.perf_counter()
        result = self.judge()
        state.curve.append({"steps": float(state.steps), **result})
        if result["score"] < state.best_score:
            state.best_score, state.best_steps, state.stale_validations = result["score"], state.steps, 0
            state.best = self._save_network("best")
            self.checkpoint()
        else:
            state.stale_validations += 1
        self.log({f"validation/{name}": value for name, value in result.items()}, state.steps)
        self._rollout_started_s += time.perf_counter() - started_s
        return result

    def checkpoint(self) -> None:
        """Write the network, then the state that names it; what is there before stays until then."""
        state = self.state
        state.steps = self.model.num_timesteps
        state.checkpoint = self._save_network("checkpoint")
        state.save(self.folder)
        state.drop_unused(self.folder)

    def _save_network(self, kind: str) -> str:
        name = f"{kind}-{self.model.num_timesteps}.zip"
        write_whole(self.folder / name, self.model.save)
        return name

    def _remember_range(self, observations: np.ndarray) -> None:
        flat = observations.reshape(-1, observations.shape[-1])
        low, high = flat.min(axis=0), flat.max(axis=0)
        state = self.state
        if state.feature_low:
            low = np.minimum(low, state.feature_low)
            high = np.maximum(high, state.feature_high)
        state.feature_low, state.feature_high = low.tolist(), high.tolist()
