"""Scenarios and suites: what a policy is judged on.

A suite is one YAML file, described in ``docs/evaluation.md``. Everything that can be wrong with it is said before the
first simulation starts.
This module must not know about policies.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from envs.generator import GeneratorSpec, generate
from envs.trace_formats import import_trace
from envs.trace_scaling import scale, spread_ticks
from envs.traces import Trace, TraceError
from policies.engine import ConfigError, Positive, StrictModel, parse_model, read_yaml
from policies.spec import (
    MAX_POOLS,
    GuardrailSpec,
    InterfaceSpec,
    ObjectiveSpec,
    PoolSpec,
    ScalingSpec,
    Slo,
    WindowSpec,
    resolve_engines,
    shipped_configs,
)

_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)\s*")
_MERGED = ("slo", "objective", "guardrails")
"""Fields of `defaults` that are merged key by key; any other field of a scenario replaces the default's."""


def parse_duration(value: object) -> object:
    """Seconds of text such as ``90s``, ``20m`` or ``1h30m``; anything else is left to the field's own check."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    parts = _DURATION.findall(text)
    if not parts or _DURATION.sub("", text):
        raise ValueError("expected seconds or a duration such as 90s, 20m, 2h or 1h30m")
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)


def _seed_list(value: object) -> object:
    """A count of seeds as 0, 1, .. ; a list stays as it is."""
    return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value


Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
PositiveDuration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]


class TraceSource(StrictModel):
    """Where the requests come from: a recorded file or the built-in generator."""

    file: Path | None = Field(default=None, description="Request log in any format that `jevons trace import` reads.")
    columns: dict[str, str] | None = Field(default=None, description="Columns of other CSV and JSONL files.")
    generator: GeneratorSpec | None = Field(default=None, description="Traffic to generate, anew for every seed.")

    @model_validator(mode="after")
    def _one_source(self) -> TraceSource:
        if (self.file is None) == (self.generator is None):
            raise ValueError("expected either file or generator")
        if self.columns is not None and self.file is None:
            raise ValueError("columns apply to a file")
        return self


class Scenario(StrictModel):
    """One service on one trace: what arrives, on what it is served, and what is promised."""

    name: str = Field(min_length=1, description="Unique name in the suite.")
    description: str = Field(default="", description="What the scenario is about, for the report.")
    trace: TraceSource = Field(description="Requests.")
    spread_ticks: Positive | None = Field(
        default=None, description="Width in seconds of the ticks that arrivals were recorded on, to be spread (3)."
    )
    slice: tuple[Duration, Duration] | None = Field(
        default=None, description="Start and end in the trace, seconds or durations such as 2h."
    )
    scale: Positive | None = Field(
        default=None, description="Factor on the mean rate, by shifted copies and thinning; bursts keep their shape."
    )
    pools: Annotated[tuple[PoolSpec, ...], Field(min_length=1, max_length=MAX_POOLS)] = Field(description="Pools.")
    slo: Slo = Field(description="Latency objectives and the share of arrivals that must meet them.")
    control_interval_s: PositiveDuration = Field(
        default=WindowSpec().control_interval_s, description="Seconds between two decisions."
    )
    metrics_delay_s: Duration = Field(
        default=WindowSpec().metrics_delay_s, description="Age of the newest measurement at a decision."
    )
    guardrails: GuardrailSpec = Field(default=GuardrailSpec(), description="Limits on every target.")
    objective: ObjectiveSpec = Field(default=ObjectiveSpec(), description="What counts as cost.")
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_seed_list), Field(min_length=1, max_length=1000)] = Field(
        default=(0,), description="Seeds of generated traffic, cold starts and reclaims; a number counts from 0."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.metrics_delay_s >= self.control_interval_s:
            raise ValueError("metrics_delay_s must be below control_interval_s")
        if self.slice is not None and self.slice[0] >= self.slice[1]:
            raise ValueError("slice must end after its start")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        labels = [pool.label for pool in self.pools]
        if len(set(labels)) != len(labels):
            raise ValueError("pools need different names")
        return self

    @property
    def spec(self) -> ScalingSpec:
        """What the decision core needs to know."""
        window = WindowSpec(control_interval_s=self.control_interval_s, metrics_delay_s=self.metrics_delay_s)
        return ScalingSpec(
            service=self.name,
            slo=self.slo,
            pools=self.pools,
            interface=InterfaceSpec(window=window),
            guardrails=self.guardrails,
            objective=self.objective,
        )

    def requests(self, seed: int) -> Trace:
        """The trace of one seed: loaded or generated, spread, sliced, scaled, in this order.

        A recorded trace differs between seeds only where it is scaled or spread.

        Raises:
            TraceError: when the file cannot be used, or no request is left.
        """
        source = self.trace
        try:
            if source.generator is not None:
                trace = generate(source.generator, seed)
            else:
                assert source.file is not None, "checked when the scenario was made"
                trace = import_trace(source.file, source.columns, seed=seed).trace
            if self.spread_ticks is not None:
                trace = spread_ticks(trace, seed, self.spread_ticks)
            if self.slice is not None:
                trace = trace.slice(*self.slice)
            if self.scale is not None:
                trace = scale(trace, self.scale, seed)
        except TraceError as error:
            raise TraceError(f"scenario {self.name!r}: {error}") from None
        if not len(trace):
            raise TraceError(f"scenario {self.name!r}: trace {trace.name!r}: no request is left to replay")
        return trace


class Suite(StrictModel):
    """Scenarios that are judged together."""

    name: str = Field(min_length=1, description="Name of the suite.")
    description: str = Field(default="", description="What it is for.")
    policies: tuple[str, ...] = Field(
        default=("all",), description="Policies to judge when none is asked for, see `policies.lineup`."
    )
    scenarios: Annotated[tuple[Scenario, ...], Field(min_length=1)] = Field(description="Scenarios.")

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        names = [scenario.name for scenario in self.scenarios]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two scenarios are named {name!r}")
        return self

    def only(self, names: list[str]) -> Suite:
        """The named scenarios, in the suite's order.

        Raises:
            ConfigError: when there is no scenario of a name.
        """
        known = [scenario.name for scenario in self.scenarios]
        for name in names:
            if name not in known:
                raise ConfigError(f"suite {self.name!r} has no scenario {name!r}; it has: {', '.join(known)}")
        return self.model_copy(update={"scenarios": tuple(s for s in self.scenarios if s.name in names)})


def shipped_suites() -> list[str]:
    """Names of the suites that ship with Jevons."""
    return sorted(path.stem for path in (shipped_configs() / "suites").glob("*.yaml"))


def find_suite(reference: str) -> Path:
    """The file of a suite: a path that ends in .yaml or .yml, or the name of a shipped suite.

    Raises:
        ConfigError: when there is no suite of this name; the message lists those that exist.
    """
    if reference.endswith((".yaml", ".yml")):
        return Path(reference)
    path = shipped_configs() / "suites" / f"{reference}.yaml"
    if reference not in shipped_suites():
        names = ", ".join(shipped_suites())
        raise ConfigError(f"no suite named {reference!r}; shipped suites: {names}; or give a .yaml path")
    return path


def load_suite(reference: str | Path) -> Suite:
    """Read a suite by path or shipped name; relative paths in it start at its folder.

    Raises:
        ConfigError: with the file, the scenario, the field and what was expected; also when a trace file is missing.
    """
    path = find_suite(str(reference))
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping with name and scenarios")
    data = {str(key): value for key, value in data.items()}
    defaults = data.pop("defaults", None) or {}
    raw = data.get("scenarios")
    if not isinstance(defaults, dict):
        raise ConfigError(f"{path}: field defaults: expected a mapping")
    if not isinstance(raw, list) or not raw:
        raise ConfigError(f"{path}: field scenarios: expected a list of at least one scenario")
    scenarios = [_scenario(entry, defaults, index, path) for index, entry in enumerate(raw)]
    return parse_model({"name": path.stem, **data, "scenarios": scenarios}, Suite, str(path))


def _scenario(entry: object, defaults: dict[str, Any], index: int, path: Path) -> Scenario:
    if not isinstance(entry, dict):
        raise ConfigError(f"{path}: field scenarios.{index}: expected a mapping")
    where = f"{path}: scenario {str(entry.get('name', f'number {index + 1}'))!r}"
    merged: dict[str, Any] = {**defaults, **entry}
    for field in _MERGED:
        if isinstance(defaults.get(field), dict) and isinstance(entry.get(field), dict):
            merged[field] = {**defaults[field], **entry[field]}
    try:
        merged["pools"] = resolve_engines(merged.get("pools"), path.parent)
    except ConfigError as error:
        raise ConfigError(f"{where}: field pools: {error}") from None
    source = merged.get("trace")
    if isinstance(source, dict) and isinstance(source.get("file"), str):
        merged["trace"] = {**source, "file": path.parent / source["file"]}
    scenario = parse_model(merged, Scenario, where)
    file = scenario.trace.file
    if file is not None and not file.is_file():
        raise ConfigError(f"{where}: field trace.file: {file}: no such file")
    return scenario
