"""What fine-tuning needs beside a training run: where it starts, what it is tuned on, and how carefully."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from policies.engine import Positive, StrictModel
from policies.spec import ScalingSpec


class Origin(StrictModel):
    """The policy to start from and the traffic to tune it on; `jevons train --from` fills it in."""

    source: str = Field(min_length=1, description="Reference of the policy to start from.")
    bundle_digest: str = Field(description="SHA-256 of its bundle.")
    trace: Path = Field(description="Request log.")
    trace_digest: str = Field(description="SHA-256 of its requests.")
    service: ScalingSpec = Field(description="Objectives, pools and limits of the service.")


class FineTuneSpec(StrictModel):
    """How a policy is tuned on one service's own traffic."""

    origin: Origin | None = Field(default=None, description="Set by the command line.")
    train_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.5, description="First part of the trace's time, to learn on."
    )
    validation_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.25, description="Part after it that decides when to stop; the rest judges the result."
    )
    own_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.7, description="Share of the episodes on the own trace; the others are random worlds."
    )
    critic_steps: int = Field(
        default=65_536, ge=0, description="Environment steps at the start in which only the new critic learns."
    )
    validation_seeds: int = Field(default=2, ge=1, description="Replays of the validation part.")
    judge_seeds: int = Field(default=5, ge=3, description="Replays of the held-out part.")
    max_seconds: Positive = Field(default=420.0, description="Wall time after which learning stops, seconds.")

    @model_validator(mode="after")
    def _leaves_a_part(self) -> FineTuneSpec:
        if self.train_share + self.validation_share >= 1:
            raise ValueError("train_share and validation_share must leave a part of the trace to judge on")
        return self
