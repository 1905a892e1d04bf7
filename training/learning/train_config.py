"""What a training run is made of: one YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from envs.episodes import EpisodeSpec
from envs.randomization import Randomization
from policies.engine import NonNegative, Positive, StrictModel, load_model
from policies.spec import GuardrailSpec, InterfaceSpec, ObjectiveSpec, Share
from training.learning.fine_tune_config import FineTuneSpec


class PpoSpec(StrictModel):
    """Hyper-parameters of Stable-Baselines3's PPO."""

    num_envs: int = Field(default=256, ge=1, description="Episodes side by side.")
    group: int = Field(
        default=4,
        ge=1,
        description="Environments that live the same episode: the mean advantage of the others is a baseline.",
    )
    steps_per_rollout: int = Field(default=64, ge=2, description="Windows per episode and rollout.")
    batch_size: int = Field(default=4096, ge=2, description="Minibatch.")
    epochs: int = Field(default=4, ge=1, description="Passes over a rollout.")
    learning_rate: Positive = Field(default=3e-4, description="Adam's step size; falls linearly to a tenth.")
    gamma: Share = Field(default=0.98, description="Discount per window.")
    gae_lambda: Share = Field(default=0.95, description="Generalised advantage estimation.")
    clip_range: Positive = Field(default=0.2, description="Clipping of the probability ratio.")
    entropy: NonNegative = Field(default=0.0, description="Entropy bonus.")
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(64, 64), min_length=1, description="Widths of the hidden layers."
    )
    log_std: float = Field(
        default=-1.2, allow_inf_nan=False, description="Initial log standard deviation of the outputs."
    )
    target_kl: Positive | None = Field(default=0.03, description="Stop a rollout's epochs beyond this divergence.")

    @model_validator(mode="after")
    def _batches_fit(self) -> PpoSpec:
        if (self.num_envs * self.steps_per_rollout) % self.batch_size:
            raise ValueError(f"batch_size {self.batch_size} must divide num_envs * steps_per_rollout")
        if self.num_envs % self.group:
            raise ValueError(f"group {self.group} must divide num_envs")
        return self


class ValidationSpec(StrictModel):
    """Progress on worlds and times kept out of training."""

    every_steps: int = Field(default=100_000, ge=1, description="Environment steps between two validations.")
    episodes: int = Field(default=192, ge=1, description="Episodes of each validation; always the same ones.")
    patience: int = Field(default=8, ge=1, description="Validations without improvement before stopping.")


class WarmStartSpec(StrictModel):
    """Behaviour cloning of a guarded rule before learning; the rule is a constant output of the network."""

    headroom: Positive = Field(default=1.5, description="Headroom of the rule to start from.")


class TrainConfig(StrictModel):
    """One training run."""

    name: str = Field(default="jevons-policy", min_length=1, description="Registered model name in MLflow.")
    total_steps: int = Field(default=1_000_000, ge=1, description="Environment steps per seed.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1, description="One run each.")
    train_share: Share = Field(default=0.7, description="First share of every trace's time, for training.")
    suite: str | None = Field(default=None, description="Suite whose traces and pools are trained on as well.")
    suite_copies: int = Field(default=8, ge=1, description="Weight of each of its scenarios.")
    evaluation_suite: str | None = Field(default="gate", description="Suite that the finished policy is judged on.")
    tracking_uri: str | None = Field(default=None, description="MLflow server; embedded store when unset.")
    checkpoint_every_steps: int = Field(default=200_000, ge=1, description="Environment steps between checkpoints.")
    worlds: Randomization = Field(default=Randomization(), description="Randomised worlds.")
    episodes: EpisodeSpec = Field(default=EpisodeSpec(), description="How episodes are cut.")
    interface: InterfaceSpec = Field(default=InterfaceSpec(), description="Observation and action.")
    guardrails: GuardrailSpec = Field(default=GuardrailSpec(), description="Limits in force during training.")
    objective: ObjectiveSpec = Field(default=ObjectiveSpec(), description="What counts as cost.")
    ppo: PpoSpec = Field(default=PpoSpec(), description="The learner.")
    validation: ValidationSpec = Field(default=ValidationSpec(), description="Progress and early stopping.")
    warm_start: WarmStartSpec | None = Field(default=WarmStartSpec(), description="Start from a guarded rule.")
    fine_tune: FineTuneSpec | None = Field(default=None, description="Start from a policy, on a service's own traffic.")

    @model_validator(mode="after")
    def _trainable(self) -> TrainConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: every seed must be given once")
        if self.objective.miss_price == 0:
            raise ValueError("objective.miss_price must be above 0: training moves it by factors")
        return self


def load_train_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Raises:
        ConfigError: with the file, the field and what was expected.
    """
    return load_model(path, TrainConfig)
