"""Scenarios and suites: what a policy is judged on.

A suite is one YAML file, described in ``docs/evaluation.md``. Every mistake in it is reported before the first
simulation starts.
This module must not know about policies.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from envs.traffic.formats import import_trace
from envs.traffic.generator import GeneratorSpec, generate
from envs.traffic.scaling import regenerate_from_rates, scale, spread_ticks
from envs.traffic.trace import Trace, TraceError
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


TRACES_VARIABLE = "JEVONS_TRACES"
"""Environment variable that names the folder of recorded traces, where a suite asks for it."""
TRAIN_SEED_OFFSET = 1_000_003
"""Seeds of the generated traffic that policies are tuned on, above those that they are judged on."""

Duration = Annotated[float, BeforeValidator(parse_duration), Field(ge=0, allow_inf_nan=False)]
PositiveDuration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=1 << 62)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_seed_list), Field(min_length=1, max_length=1000)]


class RatesSource(StrictModel):
    """Traffic at native scale, made anew for every seed from the measured rates of a service's clients."""

    file: Path = Field(description="Parquet table of client rates: window_start_s, client_id, rate_rps, iat_cv.")
    lengths: Path = Field(description="Trace to draw prompt and output lengths from, by client where it names them.")
    clients: tuple[int, ...] | None = Field(default=None, description="Clients to keep; all when left out.")


class TraceSource(StrictModel):
    """Where the requests come from: a recorded file, measured client rates, or the built-in generator."""

    file: Path | None = Field(default=None, description="Request log in any format that `jevons trace import` reads.")
    columns: dict[str, str] | None = Field(default=None, description="Columns of other CSV and JSONL files.")
    rates: RatesSource | None = Field(default=None, description="Measured client rates to make requests from.")
    generator: GeneratorSpec | None = Field(default=None, description="Traffic to generate, anew for every seed.")

    @model_validator(mode="after")
    def _one_source(self) -> TraceSource:
        if sum(source is not None for source in (self.file, self.rates, self.generator)) != 1:
            raise ValueError("expected one of file, rates and generator")
        if self.columns is not None and self.file is None:
            raise ValueError("columns apply to a file")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it reads."""
        if self.rates is not None:
            return self.rates.file, self.rates.lengths
        return () if self.file is None else (self.file,)

    @property
    def kind(self) -> Literal["real", "generated"]:
        """Recorded or measured traffic, or made by the generator."""
        return "generated" if self.generator is not None else "real"


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
    train_slice: tuple[Duration, Duration] | None = Field(
        default=None,
        description="Start and end of the part to tune policies on; must not overlap what they are judged on.",
    )
    train_seeds: (
        Annotated[tuple[Seed, ...], BeforeValidator(_seed_list), Field(min_length=1, max_length=1000)] | None
    ) = Field(default=None, description="Seeds to tune on; others than `seeds`, of generated traffic, when left out.")
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
    seeds: Seeds = Field(
        default=(0,), description="Seeds of generated traffic, cold starts and reclaims; a number counts from 0."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.metrics_delay_s >= self.control_interval_s:
            raise ValueError("metrics_delay_s must be below control_interval_s")
        if self.slice is not None and self.slice[0] >= self.slice[1]:
            raise ValueError("slice must end after its start")
        if self.train_slice is not None:
            if self.train_slice[0] >= self.train_slice[1]:
                raise ValueError("train_slice must end after its start")
            start, end = self.slice or (0.0, float("inf"))
            if self.train_slice[0] < end and start < self.train_slice[1]:
                raise ValueError("train_slice must not overlap what policies are judged on; set slice beside it")
        elif self.train_seeds is not None and set(self.train_seeds) & set(self.seeds):
            raise ValueError("train_seeds must differ from seeds, or train_slice from slice")
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

        A recorded trace differs between seeds only where it is scaled or spread. What is made from client rates is made
        for the slice alone.

        Raises:
            TraceError: when the file cannot be used, or no request is left.
        """
        source = self.trace
        try:
            if source.generator is not None:
                trace = generate(source.generator, seed)
            elif source.rates is not None:
                start_s, end_s = self.slice or (0.0, None)
                lengths = import_trace(source.rates.lengths).trace
                trace = regenerate_from_rates(
                    source.rates.file, lengths, seed, start_s=start_s, end_s=end_s, clients=source.rates.clients
                )
            else:
                assert source.file is not None, "checked when the scenario was made"
                trace = import_trace(source.file, source.columns, seed=seed).trace
            if self.spread_ticks is not None:
                trace = spread_ticks(trace, seed, self.spread_ticks)
            if self.slice is not None and source.rates is None:
                trace = trace.slice(*self.slice)
            if self.scale is not None:
                trace = scale(trace, self.scale, seed)
        except TraceError as error:
            raise TraceError(f"scenario {self.name!r}: {error}") from None
        if not len(trace):
            raise TraceError(f"scenario {self.name!r}: trace {trace.name!r}: no request is left to replay")
        return trace

    def training(self) -> Scenario:
        """The scenario on the traffic that policies are tuned on: another part of the trace, other seeds, or both.

        Raises:
            ConfigError: when that is not said of a recorded trace.
        """
        if self.train_slice is None and self.trace.generator is None:
            raise ConfigError(
                f"scenario {self.name!r}: tuning on a recorded trace needs train_slice: the part of it to tune on"
            )
        other = self.trace.generator is not None and self.train_slice is None
        seeds = self.train_seeds or tuple(seed + TRAIN_SEED_OFFSET if other else seed for seed in self.seeds)
        part = self.slice if self.train_slice is None else self.train_slice
        return self.model_copy(update={"seeds": seeds, "slice": part, "train_slice": None, "train_seeds": None})


@dataclass(frozen=True)
class Skipped:
    """A scenario of a suite that cannot run here, and why."""

    name: str
    reason: str


class Suite(StrictModel):
    """Scenarios that are judged together."""

    name: str = Field(min_length=1, description="Name of the suite.")
    description: str = Field(default="", description="What it is for.")
    policies: tuple[str, ...] = Field(
        default=("all",), description="Policies to judge when none is asked for, see `policies.lineup`."
    )
    scenarios: tuple[Scenario, ...] = Field(description="Scenarios that can run here.")
    skipped: tuple[Skipped, ...] = Field(
        default=(), description="Set by `load_suite`: scenarios whose files are absent."
    )

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        names = [*(scenario.name for scenario in self.scenarios), *(scenario.name for scenario in self.skipped)]
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
        return self.model_copy(update={"scenarios": tuple(s for s in self.scenarios if s.name in names), "skipped": ()})


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

    A path that starts with ``$JEVONS_TRACES`` is looked up in the folder that this environment variable names. Without
    it, or where the file is not there, the scenario is skipped, and `Suite.skipped` says so.

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
    if "skipped" in data:
        raise ConfigError(f"{path}: field skipped: is set when the suite is read")
    found = [_scenario(entry, defaults, index, path) for index, entry in enumerate(raw)]
    scenarios = [item for item in found if isinstance(item, Scenario)]
    skipped = [item for item in found if isinstance(item, Skipped)]
    if not scenarios:
        raise ConfigError(f"{path}: no scenario can run here: {skipped[0].reason}")
    return parse_model({"name": path.stem, **data, "scenarios": scenarios, "skipped": skipped}, Suite, str(path))


def _scenario(entry: object, defaults: dict[str, Any], index: int, path: Path) -> Scenario | Skipped:
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
        raise ConfigError(f"{where}: field {error}") from None
    source, optional = merged.get("trace"), False
    if isinstance(source, dict):
        merged["trace"], optional = _located(source, path.parent)
    scenario = parse_model(merged, Scenario, where)
    for file in scenario.trace.files:
        if file.is_file():
            continue
        if optional:
            folder = os.environ.get(TRACES_VARIABLE)
            told = f"{file.name} is not in {folder}" if folder else f"{TRACES_VARIABLE} is not set"
            return Skipped(scenario.name, f"needs recorded traces: {told}")
        raise ConfigError(f"{where}: field trace.file: {file}: no such file")
    return scenario


def _located(source: dict[str, Any], folder: Path) -> tuple[dict[str, Any], bool]:
    """A raw trace source with its paths resolved, and whether they are in the optional folder of recorded traces."""
    optional = False

    def resolved(value: object) -> object:
        nonlocal optional
        if not isinstance(value, str):
            return value
        first, *rest = Path(value).parts
        if first == f"${TRACES_VARIABLE}":
            optional = True
            return Path(os.environ.get(TRACES_VARIABLE) or ".", *rest)
        return folder / value

    located = {**source, **({"file": resolved(source["file"])} if "file" in source else {})}
    if isinstance(source.get("rates"), dict):
        rates = source["rates"]
        located["rates"] = {**rates, **{name: resolved(rates[name]) for name in ("file", "lengths") if name in rates}}
    return located, optional


@functools.lru_cache(maxsize=8)
def _traces(scenario_json: str) -> tuple[Trace, ...]:
    scenario = Scenario.model_validate_json(scenario_json)
    return tuple(scenario.requests(seed) for seed in scenario.seeds)


def traces_of(scenario: Scenario) -> tuple[Trace, ...]:
    """The traces of all seeds; the last few scenarios are remembered."""
    return _traces(scenario.model_dump_json())


def trace_digests(scenario: Scenario) -> dict[int, str]:
    """Digest of every seed's trace."""
    return {seed: trace.digest() for seed, trace in zip(scenario.seeds, traces_of(scenario), strict=True)}
