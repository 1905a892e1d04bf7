"""Steadiness: how often a policy changes the fleet while requests arrive at a constant rate, and what that costs.

Arrivals are a Poisson process and lengths one mix, so nothing changes but noise. Each load is a service of its own, and
all of them are replayed side by side through the controller that ships. What the guardrails of steadiness cost
shows where traffic changes: on a suite, with them and without.
This module must not know how results are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from envs.randomization import mean_demand
from envs.traffic.shapes import SHAPES, Shape, SteadyProfile
from envs.traffic.trace import Trace
from policies.contract import Decision, Floats, Ints
from policies.engine import ColdStart
from policies.lineup import Entry, build
from policies.spec import GuardrailSpec, PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs
from training.judging.comparisons import Treatment, Work
from training.judging.scenario_runs import Variant
from training.replaying.scenarios import Suite
from training.replaying.workers import Progress
from training.replaying.world import World

LOADS = (0.3, 0.6, 1.0, 1.5, 2.5, 4.0, 6.5, 10.0, 16.0, 25.0, 40.0)
"""Replicas that a service's arrivals need."""
SETTLING_S = 1800.0
"""Changes count from here on: a fleet may first find its size."""
PROBE_S, PROBE_RPS = 40_000.0, 5.0
FREE = {"scale_down_window_s": 0.0, "scale_down_worth_s": 0.0, "batch_cap_band": 0.0}
"""What turns the guardrails of steadiness off."""


@dataclass(frozen=True)
class Mix:
    """Lengths of one profile, and the service that they are sent to."""

    profile: SteadyProfile
    engine: str
    slo: Slo
    cold_start_s: float


MIXES = {
    "chat": Mix("chat", "llama-3.1-8b-l40s", Slo(ttft_s=3.0, tpot_s=0.08, attainment=0.95), 120.0),
    "code": Mix("code", "llama-3.1-8b-h100", Slo(ttft_s=2.0, tpot_s=0.08, attainment=0.95), 60.0),
    "reasoning": Mix("reasoning", "qwen3-32b-h100-tp2", Slo(ttft_s=4.0, tpot_s=0.06, attainment=0.95), 300.0),
}


@dataclass(frozen=True)
class Steadiness:
    """One load under one policy, means over the seeds.

    Attributes:
        load: replicas that the arrivals need.
        changes_per_hour: of the fleet's settled target, after `SETTLING_S`.
        most_changes_per_hour: of one seed.
        reversals_per_hour: changes against the direction of the one before.
        cap_changes_per_hour: of the settled batch cap.
        attainment: share of requests in time, 0..1, of the whole replay.
        holds_slo: that is at least the target.
        replicas: mean settled target.
        usd: bill.
    """

    load: float
    changes_per_hour: float
    most_changes_per_hour: float
    reversals_per_hour: float
    cap_changes_per_hour: float
    attainment: float
    holds_slo: bool
    replicas: float
    usd: float

    def row(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class _Targets:
    """Records the settled total target and the batch caps of every service, tick by tick."""

    def __init__(self) -> None:
        self.time_s: list[float] = []
        self.totals: list[Ints] = []
        self.caps: list[Ints] = []

    def record(self, decision: Decision) -> None:
        self.time_s.append(float(decision.snapshot.time_s[0]))
        self.totals.append(decision.settled.replicas.sum(axis=1))
        self.caps.append(decision.settled.batch_cap)

    def conclude(self, decision: Decision) -> None:
        pass


def measure(
    entry: Entry,
    mix: Mix,
    loads: Sequence[float] = LOADS,
    seeds: int = 10,
    hours: float = 6.0,
    guardrails: GuardrailSpec | None = None,
    on_progress: Progress = lambda done, total, label: None,
) -> list[Steadiness]:
    """Replay every load and seed at a constant rate; one row per load."""
    shape, counted_h = SHAPES[mix.profile], hours - SETTLING_S / 3600.0
    specs = [_service(mix, load, guardrails or GuardrailSpec()) for load in loads]
    probe = poisson(shape, PROBE_RPS, PROBE_S, 0)
    rates_rps = [
        load * PROBE_RPS / mean_demand(spec, probe, 0.0, PROBE_S) for load, spec in zip(loads, specs, strict=True)
    ]
    parts = []
    for seed in range(seeds):  # one at a time: the requests of ten seeds of a short mix take gigabytes
        traces = [poisson(shape, rate_rps, hours * 3600.0, seed + 1) for rate_rps in rates_rps]
        parts.append(_replay(entry, specs, traces, seed))
        on_progress(seed + 1, seeds, f"seed {seed + 1}")
    counts = {name: np.stack([part[name] for part in parts]) for name in parts[0]}  # (seeds, loads)
    rows = []
    for index, load in enumerate(loads):
        of = {name: values[:, index] for name, values in counts.items()}
        attained = float(of["attainment"].mean())
        rows.append(
            Steadiness(
                load=load,
                changes_per_hour=float(of["changes"].mean() / counted_h),
                most_changes_per_hour=float(of["changes"].max() / counted_h),
                reversals_per_hour=float(of["reversals"].mean() / counted_h),
                cap_changes_per_hour=float(of["cap_changes"].mean() / counted_h),
                attainment=attained,
                holds_slo=attained >= mix.slo.attainment,
                replicas=float(of["replicas"].mean()),
                usd=float(of["usd"].mean()),
            )
        )
    return rows


def _replay(entry: Entry, specs: Sequence[ScalingSpec], traces: Sequence[Trace], seed: int) -> dict[str, Floats]:
    """What one seed gives, (loads,) by name: counts after `SETTLING_S`, attainment and bill of the whole replay."""
    world = World(specs, traces, [seed] * len(specs))
    targets = _Targets()
    replay = world.run(build(entry, world.fleet, specs[0].interface), targets)
    counted = np.array(targets.time_s) >= SETTLING_S
    settled = np.array(targets.totals)[counted]  # (ticks, loads)
    steps = np.diff(settled, axis=0)
    return {
        "changes": (steps != 0).sum(axis=0),
        "reversals": np.array([_reversals(column) for column in steps.T]),
        "cap_changes": np.any(np.diff(np.array(targets.caps)[counted], axis=0), axis=2).sum(axis=0),
        "replicas": settled.mean(axis=0),
        "attainment": replay.attainment(),
        "usd": replay.usd(),
    }


def cost_work(suite: Suite, variant: Variant) -> list[Work]:
    """Every scenario of a suite without the guardrails and with them, for `run_treatments`."""
    work = []
    for scenario in suite.scenarios:
        free = scenario.model_copy(update={"guardrails": scenario.guardrails.model_copy(update=FREE)})
        work += [Work(Treatment("free", "without the guardrails of steadiness"), free, variant)]
        work += [Work(Treatment("steady", "with them"), scenario, variant)]
    return work


def poisson(shape: Shape, rate_rps: float, duration_s: float, seed: int) -> Trace:
    """Requests at a constant rate with the lengths of one profile."""
    rng = np.random.default_rng(seed)
    requests = rng.poisson(rate_rps * duration_s)
    arrival_s = np.sort(rng.uniform(0.0, duration_s, requests))
    prompt, output = shape.prompt.sample(requests, rng), shape.output.sample(requests, rng)
    return Trace.from_arrays(arrival_s, prompt, output, duration_s=duration_s)


def _service(mix: Mix, load: float, guardrails: GuardrailSpec) -> ScalingSpec:
    stage_s = mix.cold_start_s / 4
    pool = PoolSpec(
        engine=find_engine(mix.engine, shipped_configs()),
        min_replicas=1,
        max_replicas=max(8, round(4 * load)),
        initial_replicas=max(1, round(1.5 * load)),
        cold_start=ColdStart(node_s=stage_s, image_s=stage_s, weights_s=stage_s, warmup_s=stage_s),
    )
    return ScalingSpec(service=f"steady at {load:g}", slo=mix.slo, pools=(pool,), guardrails=guardrails)


def _reversals(steps: Ints) -> int:
    """Changes of direction in a row of steps; those of 0 are left out."""
    directions = np.sign(steps[steps != 0])
    return int((np.diff(directions) != 0).sum())
