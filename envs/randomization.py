"""The worlds that a policy is trained in: random traffic, engines, starts, objectives and prices, drawn once.

A `ScenarioBank` holds the draws as arrays, so that starting an episode is a copy of rows.
This module must not know about actions or rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from envs.cluster.library import RequestLibrary
from envs.cluster.pools import pack_pools, pool_rows
from envs.cluster.state import Records
from envs.traffic.generator import GeneratorSpec, Profile, generate
from envs.traffic.trace import Trace
from policies.contract import BOOT_BINS, Floats, Ints, Snapshot
from policies.demand import RequestMix, estimate_demand
from policies.engine import ColdStart, EngineProfile, Positive, StrictModel
from policies.fleet import Fleet
from policies.spec import (
    GuardrailSpec,
    InterfaceSpec,
    ObjectiveSpec,
    PoolSpec,
    ScalingSpec,
    Share,
    Slo,
    Spot,
    find_engine,
    shipped_configs,
)

Range = tuple[Positive, Positive]
"""Lowest and highest value."""
PROBE_S = 1200.0
"""Length of the trace that a profile's mean lengths are read from."""


class Randomization(StrictModel):
    """Ranges that the worlds are drawn from; log-uniform where it says so."""

    profiles: dict[Profile, Annotated[float, Field(gt=0)]] = Field(
        default={
            "chat": 1.0,
            "code": 1.0,
            "reasoning": 1.0,
            "agentic": 1.0,
            "diurnal_mix": 1.0,
            "flash_crowd": 0.5,
            "regime_change": 0.5,
        },
        description="Weights of the traffic profiles.",
    )
    traces: int = Field(default=48, ge=1, description="Traces generated.")
    trace_s: Positive = Field(default=4 * 3600.0, description="Length of each trace, seconds.")
    scenarios: int = Field(default=768, ge=1, description="Scenarios drawn over these traces.")
    engines: tuple[str, ...] = Field(
        default=("llama-3.1-8b-h100", "llama-3.1-8b-l40s", "qwen3-32b-h100-tp2", "llama-3.1-70b-h100-tp4"),
        min_length=1,
        description="Shipped engine profiles.",
    )
    engine_spread: Share = Field(default=0.25, description="Relative spread of every step coefficient.")
    mean_replicas: Range = Field(default=(1.0, 12.0), description="Mean demand of a trace, in replicas; log-uniform.")
    max_rps: Positive = Field(default=30.0, description="Most requests per second of a trace: keeps windows cheap.")
    max_over_peak: Range = Field(default=(2.0, 5.0), description="Most replicas over the ten-minute demand peak.")
    max_replicas: int = Field(default=40, ge=1, le=1000, description="Hard limit on replicas per pool.")
    cold_start_s: Range = Field(default=(60.0, 600.0), description="Whole start of a replica, seconds; log-uniform.")
    ttft_slo_s: Range = Field(default=(1.0, 6.0), description="TTFT objective, seconds; log-uniform.")
    ttft_slo_over_prefill: Positive = Field(
        default=2.0, description="Least TTFT objective over the bare prefill of the trace's 99.5th percentile prompt."
    )
    tpot_slo_over_step: Range = Field(
        default=(3.0, 12.0), description="TPOT objective over the engine's fixed iteration time; log-uniform."
    )
    attainment: tuple[float, ...] = Field(default=(0.95, 0.98, 0.99), description="Attainment targets.")
    price_spread: Share = Field(default=0.5, description="Relative spread of the price.")
    spot_scenarios: Share = Field(default=0.3, description="Share of scenarios with a spot pool beside on-demand.")
    spot_price_ratio: Range = Field(default=(0.3, 0.6), description="Spot price over on-demand.")
    reclaims_per_replica_day: Range = Field(default=(0.2, 6.0), description="Independent reclaims; log-uniform.")
    storms_per_day: Range = Field(default=(0.2, 4.0), description="Correlated reclaims; log-uniform.")

    @model_validator(mode="after")
    def _ordered(self) -> Randomization:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], str) and value[0] > value[1]:
                raise ValueError(f"{name}: the lowest value {value[0]} is above the highest {value[1]}")
        return self


@dataclass(frozen=True, eq=False)
class ScenarioBank:
    """Drawn worlds as arrays; row `i` of every array is scenario `i`."""

    library: RequestLibrary
    traces: tuple[Trace, ...]
    specs: tuple[ScalingSpec, ...]
    fleet: Fleet  # (scenarios, P)
    pools: Records  # (scenarios, P) kernel records
    trace: Ints  # (scenarios,) which trace of the library
    interface: InterfaceSpec
    guardrails: GuardrailSpec
    objective: ObjectiveSpec

    def __len__(self) -> int:
        """Number of scenarios."""
        return len(self.specs)

    def joined(self, specs: Sequence[ScalingSpec], traces: Sequence[Trace], trace_of: Sequence[int]) -> ScenarioBank:
        """This bank and more scenarios; interface, guardrails and objective stay this bank's."""
        shared = {"interface": self.interface, "guardrails": self.guardrails, "objective": self.objective}
        offset = len(self.traces)
        return ScenarioBank.of(
            [*self.specs, *(spec.model_copy(update=shared) for spec in specs)],
            [*self.traces, *traces],
            [*self.trace.tolist(), *(index + offset for index in trace_of)],
        )

    @property
    def rows(self) -> int:
        """Replica rows that the widest scenario needs."""
        return max(sum(pool_rows(pool) for pool in spec.pools) for spec in self.specs)

    @property
    def slots(self) -> int:
        """Requests that one replica may hold."""
        return int(self.pools["max_num_seqs"].max())

    @classmethod
    def of(cls, specs: Sequence[ScalingSpec], traces: Sequence[Trace], trace_of: Sequence[int]) -> ScenarioBank:
        """Stack specs, each with the index of its trace; interface, guardrails and objective are the first spec's."""
        fleet = Fleet.from_specs(specs)
        return cls(
            library=RequestLibrary.of(traces),
            traces=tuple(traces),
            specs=tuple(specs),
            fleet=fleet,
            pools=pack_pools(specs, fleet.pools),
            trace=np.array(trace_of, np.int64),
            interface=specs[0].interface,
            guardrails=specs[0].guardrails,
            objective=specs[0].objective,
        )


def draw_bank(
    ranges: Randomization,
    interface: InterfaceSpec,
    guardrails: GuardrailSpec,
    objective: ObjectiveSpec,
    seed: int,
    on_trace: Callable[[int, int], None] = lambda done, total: None,
) -> ScenarioBank:
    """Draw traces and scenarios; the same arguments give the same bank.

    Args:
        ranges: what to draw from.
        interface: observation, window and action of the policy to train.
        guardrails: limits in force during training.
        objective: prices of misses and churn.
        seed: of all draws.
        on_trace: called with (traces done, traces in all) for a progress bar.
    """
    rng = np.random.default_rng(seed)
    engines = [find_engine(name, shipped_configs()) for name in ranges.engines]
    names = list(ranges.profiles)
    weights = np.array([ranges.profiles[name] for name in names])
    traces: list[Trace] = []
    specs: list[ScalingSpec] = []
    trace_of: list[int] = []
    for index in range(ranges.traces):
        # Every profile and engine gets its share even in a small bank.
        profile = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        engine = engines[index % len(engines)]
        trace = _draw_trace(ranges, profile, engine, rng)
        traces.append(trace)
        share = range(index, ranges.scenarios, ranges.traces)
        for _ in share:
            base = _draw_spec(ranges, engine, rng)
            spec = _fit_bounds(_fit_ttft(base, trace, ranges), trace, ranges, rng)
            specs.append(
                spec.model_copy(update={"interface": interface, "guardrails": guardrails, "objective": objective})
            )
            trace_of.append(index)
        on_trace(index + 1, ranges.traces)
    return ScenarioBank.of(specs, traces, trace_of)


def _log_uniform(rng: np.random.Generator, span: tuple[float, float]) -> float:
    return float(np.exp(rng.uniform(np.log(span[0]), np.log(span[1]))))


def _draw_trace(ranges: Randomization, profile: Profile, engine: EngineProfile, rng: np.random.Generator) -> Trace:
    """A trace whose mean demand, on this engine, is a random number of replicas."""
    seed = int(rng.integers(1 << 31))
    probe = generate(GeneratorSpec(profile=profile, duration_s=PROBE_S, mean_rps=5.0), seed)
    slo = Slo(ttft_s=2.0, tpot_s=6.0 * engine.step.a_ms / 1000.0)
    spec = ScalingSpec(slo=slo, pools=(PoolSpec(engine=engine, max_replicas=1),))
    per_rps = mean_demand(spec, probe, 0.0, PROBE_S) / max(len(probe) / PROBE_S, 1e-9)
    wanted = _log_uniform(rng, ranges.mean_replicas)
    crowd = 4.0 if profile == "flash_crowd" else 1.0
    return generate(
        GeneratorSpec(
            profile=profile,
            duration_s=ranges.trace_s,
            mean_rps=float(np.clip(wanted / crowd / max(per_rps, 1e-9), 0.02, ranges.max_rps / crowd)),
            start_hour=float(rng.uniform(0, 24)),
            crowd_peak=float(rng.uniform(3.0, 20.0)),
        ),
        seed,
    )


def _draw_spec(ranges: Randomization, engine: EngineProfile, rng: np.random.Generator) -> ScalingSpec:
    def spread(value: float) -> float:
        return value * float(rng.uniform(1.0 - ranges.engine_spread, 1.0 + ranges.engine_spread))

    step = engine.step.model_copy(update={name: spread(value) for name, value in engine.step.model_dump().items()})
    start = engine.cold_start
    factor = _log_uniform(rng, ranges.cold_start_s) / max(start.total_s, 1e-9)
    cold_start = ColdStart(**{name: value * factor for name, value in start.model_dump().items()})
    price = engine.usd_per_gpu_hour * float(rng.uniform(1.0 - ranges.price_spread, 1.0 + ranges.price_spread))
    pool = PoolSpec(
        name="on-demand",
        engine=engine.model_copy(update={"step": step}),
        max_replicas=ranges.max_replicas,
        usd_per_gpu_hour=price,
        cold_start=cold_start,
    )
    pools = [pool]
    if rng.random() < ranges.spot_scenarios:
        spot = Spot(
            reclaims_per_replica_day=_log_uniform(rng, ranges.reclaims_per_replica_day),
            storms_per_day=_log_uniform(rng, ranges.storms_per_day),
        )
        pools.append(
            pool.model_copy(
                update={
                    "name": "spot",
                    "price_class": "spot",
                    "usd_per_gpu_hour": price * float(rng.uniform(*ranges.spot_price_ratio)),
                    "min_replicas": 0,
                    "spot": spot,
                }
            )
        )
    slo = Slo(
        ttft_s=_log_uniform(rng, ranges.ttft_slo_s),
        tpot_s=_log_uniform(rng, ranges.tpot_slo_over_step) * step.a_ms / 1000.0,
        attainment=float(rng.choice(ranges.attainment)),
    )
    return ScalingSpec(slo=slo, pools=tuple(pools))


def _fit_ttft(spec: ScalingSpec, trace: Trace, ranges: Randomization) -> ScalingSpec:
    """An objective that an idle replica misses on long prompts is none: raise it where it is below."""
    computed = np.quantile(trace.prompt_tokens - trace.prefix_hit_tokens, 0.995)
    longest = np.quantile(trace.prompt_tokens, 0.995)
    a, b, _, _, e = spec.pools[0].engine.step.seconds
    iterations = np.ceil(computed / spec.pools[0].engine.max_num_batched_tokens)
    prefill_s = iterations * a + computed * (b + e * (longest - 0.5 * computed))
    min_s = ranges.ttft_slo_over_prefill * float(prefill_s)
    return spec.model_copy(update={"slo": spec.slo.model_copy(update={"ttft_s": max(spec.slo.ttft_s, min_s)})})


def _fit_bounds(spec: ScalingSpec, trace: Trace, ranges: Randomization, rng: np.random.Generator) -> ScalingSpec:
    """Bound every pool by a random multiple of the trace's demand peak."""
    step_s = 600.0
    peak = max(mean_demand(spec, trace, at, at + step_s) for at in np.arange(0.0, trace.duration_s, step_s))
    max_replicas = int(np.clip(np.ceil(peak * rng.uniform(*ranges.max_over_peak)) + 1, 2, ranges.max_replicas))
    return spec.model_copy(
        update={"pools": tuple(pool.model_copy(update={"max_replicas": max_replicas}) for pool in spec.pools)}
    )


def mean_demand(spec: ScalingSpec, trace: Trace, start_s: float, end_s: float) -> float:
    """Replicas of the first pool that the requests of [start_s, end_s) need on average, in a steady state."""
    low, high = np.searchsorted(trace.arrival_s, (start_s, end_s))
    prompt, output = trace.prompt_tokens[low:high], trace.output_tokens[low:high]
    hit = trace.prefix_hit_tokens[low:high]
    totals = np.array([[high - low, prompt.sum(), np.maximum(prompt - hit, 1).sum(), output.sum()]], float)
    return float(steady_demand(Fleet.from_specs([spec]), totals, np.array([end_s - start_s]))[0, 0])


def steady_demand(fleet: Fleet, totals: Floats, span_s: Floats) -> Floats:
    """Replicas (n, P) for request totals (n, 4) as of `RequestLibrary.totals` served evenly over `span_s` (n,)."""
    n, pools = fleet.exists.shape
    requests = np.maximum(totals[:, 0], 1.0)
    zeros, none = np.zeros(n), np.zeros((n, pools))
    snapshot = Snapshot(
        time_s=span_s,
        window_s=span_s,
        arrival_rps=totals[:, 0] / span_s,
        prompt_tps=totals[:, 1] / span_s,
        prefill_tps=totals[:, 2] / span_s,
        generation_tps=totals[:, 3] / span_s,
        finished_rps=totals[:, 0] / span_s,
        prompt_tokens_mean=totals[:, 1] / requests,
        output_tokens_mean=totals[:, 3] / requests,
        queue_requests=zeros,
        oldest_wait_s=zeros,
        ttft_attainment=zeros + 1.0,
        tpot_attainment=zeros + 1.0,
        ttft_histogram_rps=np.zeros((n, 0)),
        tpot_histogram_rps=np.zeros((n, 0)),
        replicas_target=none,
        replicas_starting=none,
        replicas_ready=none,
        replicas_draining=none,
        boot_pipeline=np.zeros((n, pools, BOOT_BINS)),
        running=none,
        waiting=none,
        kv_cache_usage=none,
        batch_cap=none + 1.0,
    )
    mix = RequestMix(n)
    mix.update(snapshot, fleet)
    return estimate_demand(snapshot, fleet, mix).tokens
