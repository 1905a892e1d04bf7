"""What the operator decides: objectives, pools, prices, windows, guardrails. One YAML, one digest.

This module must not know how any of it is measured or carried out.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from policies.engine import (
    ColdStart,
    ConfigError,
    EngineProfile,
    NonNegative,
    Positive,
    StrictModel,
    load_engine,
    parse_model,
    read_yaml,
)
from policies.names import Line, OptionalName

Share = Annotated[float, Field(ge=0, le=1)]

MAX_POOLS = 8


class Slo(StrictModel):
    """Latency objectives and the share of arrivals that must meet both."""

    ttft_s: Positive = Field(description="Time to first token, seconds, measured at the gateway.")
    tpot_s: Positive = Field(description="Time per output token, seconds.")
    attainment: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.99, description="Share of arrivals that must meet both objectives."
    )


class Spot(StrictModel):
    """How a provider takes spot capacity back."""

    reclaims_per_replica_day: NonNegative = Field(default=1.0, description="Independent reclaims per replica-day.")
    storms_per_day: NonNegative = Field(default=0.0, description="Correlated reclaims of the pool per day.")
    storm_share: Share = Field(default=0.5, description="Share of the pool that a correlated reclaim takes.")
    notice_s: NonNegative = Field(default=30.0, description="Notice before a replica is taken, seconds.")


class PoolSpec(StrictModel):
    """Replicas of one engine profile on one GPU type and price class."""

    name: OptionalName = Field(default="", description="Name of the pool; the engine profile's name when empty.")
    engine: EngineProfile = Field(description="Engine profile: a YAML file's path or its contents.")
    min_replicas: int = Field(default=1, ge=0, description="Fewest replicas.")
    max_replicas: int = Field(ge=1, le=1000, description="Most replicas.")
    initial_replicas: int | None = Field(default=None, ge=0, description="Replicas ready at the start of a replay.")
    initial_batch_cap: int | None = Field(
        default=None, ge=1, description="Batch cap at the start; max_num_seqs when unset."
    )
    price_class: Literal["on_demand", "spot"] = Field(default="on_demand", description="How the GPUs are rented.")
    usd_per_gpu_hour: Positive | None = Field(default=None, description="Price; the engine profile's when unset.")
    billing: Literal["gpu", "node"] = Field(default="gpu", description="Billed per GPU of live replicas, or per node.")
    cold_start: ColdStart | None = Field(
        default=None, description="Stages of a start; the engine profile's when unset."
    )
    cold_start_cv: Annotated[float, Field(ge=0, le=2)] = Field(
        default=0.1, description="Coefficient of variation of each stage's duration."
    )
    full_speed_loads: Positive = Field(default=4.0, description="Weight loads that storage serves at full speed.")
    spot: Spot = Field(default=Spot(), description="Reclaims; used when price_class is spot.")

    @model_validator(mode="after")
    def _bounds(self) -> PoolSpec:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        if self.engine.gpus_per_replica > self.engine.gpus_per_node:
            raise ValueError("a replica must fit on one node: gpus_per_replica is above gpus_per_node")
        return self

    @property
    def label(self) -> str:
        """The pool's name."""
        return self.name or self.engine.name

    @property
    def start(self) -> ColdStart:
        """Stages of a start."""
        return self.cold_start or self.engine.cold_start

    @property
    def gpu_usd_per_hour(self) -> float:
        """Price per GPU-hour, before overhead."""
        return self.usd_per_gpu_hour or self.engine.usd_per_gpu_hour

    @property
    def usd_per_replica_hour(self) -> float:
        """Price per replica-hour, before overhead."""
        return self.gpu_usd_per_hour * self.engine.gpus_per_replica


class WindowSpec(StrictModel):
    """When the controller looks and acts."""

    control_interval_s: Positive = Field(default=15.0, description="Seconds between two decisions.")
    metrics_delay_s: NonNegative = Field(default=5.0, description="Age of the newest measurement at a decision.")

    @model_validator(mode="after")
    def _delay_fits(self) -> WindowSpec:
        if self.metrics_delay_s >= self.control_interval_s:
            raise ValueError("metrics_delay_s must be below control_interval_s")
        return self


class ActionSpec(StrictModel):
    """What a learned policy's outputs in -1..1 mean; the middle is the reference rule."""

    headroom_reference: Positive = Field(
        default=1.3, description="Fewest replicas over the five-minute mean of the demand at output 0."
    )
    headroom_span: Annotated[float, Field(gt=1)] = Field(default=3.0, description="Factor between output 0 and 1.")
    slack_reference: Positive = Field(
        default=0.3, description="Replicas above the fewest, as a share of them, that are kept at output 0."
    )
    slack_span: Annotated[float, Field(gt=1)] = Field(
        default=10.0, description="Factor on the slack between output 0 and 1."
    )
    batch_cap_span: Annotated[float, Field(gt=1)] = Field(
        default=2.0, description="Factor on the batch limit between output 0 and 1."
    )
    spot_share_reference: Share = Field(
        default=0.5, description="Share of capacity on spot at output 0, where offered."
    )
    spot_share_span: Share = Field(default=0.5, description="Change of that share between output 0 and 1.")


class GuardrailSpec(StrictModel):
    """Limits on every target, whichever policy proposes it. See `policies.guardrails`."""

    max_scale_up_factor: Annotated[float, Field(gt=1)] = Field(
        default=4.0, description="Most replicas after a step up."
    )
    max_scale_up_step: int = Field(default=4, ge=1, description="Replicas that may always be added in one step.")
    max_scale_down_share: Share = Field(default=0.5, description="Share of a pool that one step may remove.")
    scale_down_cooldown_s: NonNegative = Field(default=60.0, description="Quiet time before a scale-down, seconds.")
    scale_down_window_s: NonNegative = Field(
        default=60.0,
        description="At steady traffic a scale-down goes no lower than the highest proposal of the last one to two "
        "windows of this length, seconds; 0: no window.",
    )
    scale_down_worth_s: NonNegative = Field(
        default=240.0,
        description="At steady traffic, what a scale-down of less than a tenth of the fleet, or one no larger than "
        "what was taken back before, must have been able to save before it is made: seconds of the whole fleet; "
        "0: nothing.",
    )
    reversal_factor: Annotated[float, Field(ge=1, le=100)] = Field(
        default=10.0, description="Factor on that price per reversal: a scale-down that was taken back."
    )
    reversal_memory_s: Positive = Field(
        default=14_400.0, description="Time constant with which reversals are forgotten, seconds."
    )
    noise_band: Share = Field(
        default=0.15,
        description="Largest change of the offered load that may be noise; less, at least 0.05, where more requests "
        "make it surer. A larger fall is no steady traffic, and waits for nothing.",
    )
    batch_cap_band: Share = Field(
        default=0.2,
        description="A batch cap that would change by less than this share of itself stays; 0: every change.",
    )
    hold_down_while_burning: bool = Field(default=True, description="No scale-down while SLOs are missed.")
    hold_down_while_starting: bool = Field(default=True, description="No scale-down while replicas start.")
    backlog_boost: bool = Field(
        default=True, description="Cover the demand at once when the oldest wait outlasts a start."
    )
    gpu_budget: int | None = Field(default=None, ge=1, description="Most GPUs over all pools.")


class ObjectiveSpec(StrictModel):
    """What counts as cost."""

    overhead_rate: NonNegative = Field(
        default=0.15, description="Network, storage and CPU as a share of the GPU bill (total cost of ownership)."
    )
    miss_price: NonNegative = Field(
        default=20.0, description="Price of a missed request, in mean costs of serving a request."
    )
    scale_event_price: NonNegative = Field(
        default=0.02, description="Price of one scale event, in replica-intervals; discourages churn."
    )


class InterfaceSpec(StrictModel):
    """What a learned policy was trained to read and write; a bundle only runs where this matches."""

    feature_version: Literal[1] = Field(default=1, description="Version of the observation encoding.")
    window: WindowSpec = Field(default=WindowSpec(), description="When the controller looks and acts.")
    action: ActionSpec = Field(default=ActionSpec(), description="Meaning of the outputs.")

    def digest(self) -> str:
        """SHA-256 of the interface, hexadecimal."""
        return _digest(self)


class ScalingSpec(StrictModel):
    """Everything that one service's scaling needs to know."""

    service: Line = Field(
        default="service", description="Name of the service; a live one has letters, digits and -_. alone."
    )
    slo: Slo = Field(description="Latency objectives.")
    pools: Annotated[tuple[PoolSpec, ...], Field(min_length=1, max_length=MAX_POOLS)] = Field(description="Pools.")
    interface: InterfaceSpec = Field(default=InterfaceSpec(), description="Observation and action of learned policies.")
    guardrails: GuardrailSpec = Field(default=GuardrailSpec(), description="Limits on every target.")
    objective: ObjectiveSpec = Field(default=ObjectiveSpec(), description="What counts as cost.")

    @property
    def sleeps(self) -> bool:
        """Whether the service may have no replica at all."""
        return all(pool.min_replicas == 0 for pool in self.pools)

    def digest(self) -> str:
        """SHA-256 of the resolved spec, hexadecimal."""
        return _digest(self)


def _digest(model: StrictModel) -> str:
    canonical = json.dumps(model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def resolve_engines(pools: object, where: Path) -> object:
    """Replace the engine paths in a raw list of pools by their contents; paths are absolute or relative to `where`.

    A bare name without a suffix is looked up among the profiles that ship with Jevons.

    Raises:
        ConfigError: with the field, when a profile is missing or wrong.
    """
    if not isinstance(pools, list):
        return pools
    resolved = []
    for place, pool in enumerate(pools):
        if isinstance(pool, dict) and isinstance(pool.get("engine"), str):
            try:
                pool = {**pool, "engine": find_engine(pool["engine"], where).model_dump()}
            except ConfigError as error:
                raise ConfigError(f"pools.{place}.engine: {error}") from None
        resolved.append(pool)
    return resolved


def find_engine(reference: str, where: Path) -> EngineProfile:
    """Engine profile by path (absolute or relative to the folder `where`) or by shipped name.

    Raises:
        ConfigError: when there is no such profile; the message lists the shipped names.
    """
    if reference.endswith((".yaml", ".yml")):
        return load_engine(where / reference)
    shipped = {file.stem: file for file in sorted((shipped_configs() / "engines").glob("*.yaml"))}
    if reference not in shipped:
        names = ", ".join(shipped)
        raise ConfigError(f"no engine profile named {reference!r:.80}; shipped profiles: {names}; or give a .yaml path")
    return load_engine(shipped[reference])


def shipped_configs() -> Path:
    """The folder of the configuration files that ship with Jevons."""
    return Path(__file__).resolve().parent.parent / "configs"


def load_spec(path: Path) -> ScalingSpec:
    """Read a scaling spec.

    Raises:
        ConfigError: with the file, the field and what was expected.
    """
    data = read_yaml(path)
    if isinstance(data, dict):
        try:
            data = {**data, "pools": resolve_engines(data.get("pools"), path.parent)}
        except ConfigError as error:
            raise ConfigError(f"{path}: field {error}") from None
    return parse_model(data, ScalingSpec, str(path))
