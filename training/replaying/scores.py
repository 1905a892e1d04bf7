"""How one replay is scored: attainment per arrival, dollars, tokens and time, from what the cluster recorded.

The formulas are documented in ``docs/evaluation.md``.
This module must not know about policies or suites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.randomization import steady_demand
from envs.traffic.trace import Trace
from policies.contract import Bools, Floats
from policies.fleet import Fleet
from policies.objective import Objective, Usage
from policies.spec import ScalingSpec, Slo

HOUR_S = 3600.0
MIN_REQUESTS_PER_HOUR = 30
"""An hour with fewer arrivals says nothing about attainment and is no candidate for the worst one."""
UNLABELLED = "(none)"
REFERENCE = "reference"
"""`tuned` of the rows that no policy made: bound, plan, best static fleet."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """Each request judged; arrays of shape (requests,). An unfinished or rejected request misses everything.

    Attributes:
        finished: True for requests that were served to the end, however late.
        ttft_s: seconds from arrival to first token; NaN when unfinished.
        tpot_s: seconds per output token after the first; NaN when unfinished or for a one-token output.
        ttft_ok: finished, with the first token in time.
        tpot_ok: finished at the promised pace; a one-token output has no pace to miss.
    """

    finished: Bools
    ttft_s: Floats
    tpot_s: Floats
    ttft_ok: Bools
    tpot_ok: Bools

    @property
    def good(self) -> Bools:
        """Both objectives met."""
        return self.ttft_ok & self.tpot_ok


def judge(
    arrival_s: Floats, first_token_s: Floats, finish_s: Floats, output_tokens: npt.NDArray[np.integer], slo: Slo
) -> Verdicts:
    """Judge every arrival; times in seconds, shape (requests,), NaN for what never happened."""
    finished = ~np.isnan(finish_s)
    ttft_s = first_token_s - arrival_s
    several = output_tokens > 1
    spoken_s = finish_s - first_token_s
    return Verdicts(
        finished=finished,
        ttft_s=ttft_s,
        tpot_s=np.where(several, spoken_s / np.maximum(output_tokens - 1, 1), np.nan),
        ttft_ok=finished & (ttft_s <= slo.ttft_s),
        # As the cluster model counts it: without a division, so that both agree to the last bit.
        tpot_ok=finished & (~several | (spoken_s <= slo.tpot_s * (output_tokens - 1))),
    )


@dataclass(frozen=True)
class Score:
    """One scenario, policy, tuning and seed: a row of the result. NaN where a figure is not defined.

    Dollars, tokens, replica time and `preemptions` are as of the horizon, the end of the trace; attainment, latencies,
    `finished` and `rejected` are over every arrival, including those served after the horizon.
    """

    scenario: str
    policy: str
    tuned: str
    seed: int
    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    worst_hour_attainment: float
    holds_slo: bool
    usd: float
    usd_per_mtok: float
    usd_per_mtok_output: float
    usd_per_good_mtok: float
    replica_hours: float
    gpu_hours: float
    gpu_utilization: float
    scheduling_efficiency: float
    overprovisioning_ratio: float
    scale_events: int
    scale_events_per_hour: float
    requests: int
    finished: int
    rejected: int
    preemptions: int
    served_tokens: int
    good_tokens: int
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    horizon_s: float
    wall_s: float
    gpu_usd_by_pool: dict[str, float] = field(default_factory=dict)
    usd_by_tenant: dict[str, float] = field(default_factory=dict)
    usd_by_model: dict[str, float] = field(default_factory=dict)
    guardrail_ticks: dict[str, int] = field(default_factory=dict)

    def with_cost(self, usd: float, usd_per_mtok: float, replica_hours: float, wall_s: float) -> Score:
        """This row with a cost that holds the SLO."""
        return replace(
            self,
            usd=usd,
            usd_per_mtok=usd_per_mtok,
            usd_per_good_mtok=usd_per_mtok,
            replica_hours=replica_hours,
            holds_slo=True,
            wall_s=wall_s,
        )

    def row(self) -> dict[str, Any]:
        """The fields as JSON has them: NaN is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


AVERAGED: tuple[str, ...] = tuple(
    item.name for item in fields(Score) if item.type in {"float", "int"} and item.name != "seed"
)
"""Columns that are averaged over seeds."""


def unscored(scenario: str, name: str, seed: int, trace: Trace, horizon_s: float) -> Score:
    """The row of what was computed and not run: figures that only a replay has are NaN or 0."""
    blank: dict[str, Any] = {
        item.name: float("nan") if item.type == "float" else 0 for item in fields(Score) if item.name in AVERAGED
    }
    return Score(
        **{**blank, "requests": len(trace), "horizon_s": horizon_s, "wall_s": 0.0},
        scenario=scenario,
        policy=name,
        tuned=REFERENCE,
        seed=seed,
        holds_slo=False,
    )


def score(
    spec: ScalingSpec,
    trace: Trace,
    usage: Usage,
    row: int,
    verdicts: Verdicts,
    finish_s: Floats,
    preemptions: int,
    horizon_s: float,
    label: tuple[str, str, str, int],
) -> Score:
    """Score one service of a replay.

    Args:
        spec: the service.
        trace: its requests.
        usage: cumulative usage of all services of the replay as of the horizon.
        row: which of them.
        verdicts: every arrival judged.
        finish_s: (requests,) when each finished, NaN when never.
        preemptions: as of the horizon.
        horizon_s: end of the billed time.
        label: scenario, policy, how it was tuned, and seed.
    """
    replica_s = usage.replica_s[row]
    bill = Bill(spec, len(replica_s))
    usd = bill.total_usd(usage, row)
    live_gpu_s, billed_gpu_s = bill.gpu_s(usage, row)
    gpus = bill.fleet.gpus[0]
    served = float(usage.served_tokens[row])
    ttft_s, tpot_s = verdicts.ttft_s[verdicts.finished], verdicts.tpot_s[verdicts.finished]
    tpot_s = tpot_s[~np.isnan(tpot_s)]
    attained = float(verdicts.good.mean())
    events = int(usage.scale_events[row])
    in_time = finish_s <= horizon_s
    tokens = np.where(in_time, trace.prompt_tokens.astype(np.float64) + trace.output_tokens, 0.0)
    return Score(
        scenario=label[0],
        policy=label[1],
        tuned=label[2],
        seed=label[3],
        attainment=attained,
        ttft_attainment=float(verdicts.ttft_ok.mean()),
        tpot_attainment=float(verdicts.tpot_ok.mean()),
        worst_hour_attainment=worst_hour(trace.arrival_s, verdicts.good),
        holds_slo=attained >= spec.slo.attainment,
        usd=usd,
        usd_per_mtok=_ratio(usd * 1e6, served),
        usd_per_mtok_output=_ratio(usd * 1e6, float(usage.output_tokens[row])),
        usd_per_good_mtok=_ratio(usd * 1e6, float(usage.good_tokens[row])),
        replica_hours=float(replica_s.sum()) / HOUR_S,
        gpu_hours=billed_gpu_s / HOUR_S,
        gpu_utilization=_ratio(float((usage.busy_s[row] * gpus).sum()), float((usage.ready_s[row] * gpus).sum())),
        scheduling_efficiency=_ratio(live_gpu_s, billed_gpu_s),
        overprovisioning_ratio=overprovisioning(spec, trace, replica_s, horizon_s),
        scale_events=events,
        scale_events_per_hour=events / (horizon_s / HOUR_S),
        requests=len(trace),
        finished=int(verdicts.finished.sum()),
        rejected=int(usage.rejected[row]),
        preemptions=preemptions,
        served_tokens=int(served),
        good_tokens=int(usage.good_tokens[row]),
        ttft_p50=_percentile(ttft_s, 50),
        ttft_p90=_percentile(ttft_s, 90),
        ttft_p99=_percentile(ttft_s, 99),
        tpot_p50=_percentile(tpot_s, 50),
        tpot_p99=_percentile(tpot_s, 99),
        horizon_s=horizon_s,
        wall_s=0.0,
        gpu_usd_by_pool={
            pool.label: float(cost) for pool, cost in zip(spec.pools, bill.pool_usd(usage, row), strict=False)
        },
        usd_by_tenant=split_bill(usd, tokens, trace.tenant, trace.tenants),
        usd_by_model=split_bill(usd, tokens, trace.model, trace.models),
    )


class Bill:
    """Prices one service's share of a replay's usage.

    Args:
        spec: the service.
        pools: pools per service of the replay, padding included.
    """

    def __init__(self, spec: ScalingSpec, pools: int) -> None:
        self.spec = spec
        self.fleet = Fleet.from_specs([spec], pools=pools)
        self._objective = Objective.of([spec], self.fleet)
        self.by_node, self.node_gpus = self._objective.bill_per_node[0], self._objective.node_gpus[0]

    def pool_usd(self, usage: Usage, row: int) -> Floats:
        """(P,) GPU dollars by pool of service `row`, without overhead."""
        alone = replace(usage, replica_s=usage.replica_s[row : row + 1], node_s=usage.node_s[row : row + 1])
        cost: Floats = self._objective.pool_usd(alone)[0]
        return cost

    def total_usd(self, usage: Usage, row: int) -> float:
        """Dollars of service `row`, network, storage and CPU included."""
        return float(self.pool_usd(usage, row).sum()) * (1.0 + self.spec.objective.overhead_rate)

    def gpu_s(self, usage: Usage, row: int) -> tuple[float, float]:
        """GPU-seconds of live replicas, and GPU-seconds billed, of service `row`."""
        live = usage.replica_s[row] * self.fleet.gpus[0]
        billed = np.where(self.by_node, usage.node_s[row] * self.node_gpus, live)
        return float(live.sum()), float(billed.sum())


def overprovisioning(spec: ScalingSpec, trace: Trace, replica_s: Floats, horizon_s: float) -> float:
    """Mean replicas billed over the mean demand of the whole trace served evenly.

    With several pools both are counted in shares of the work: a replica counts for what it could do of all of it.
    """
    computed = np.maximum(trace.prompt_tokens - trace.prefix_hit_tokens, 1)
    totals = [len(trace), trace.prompt_tokens.sum(), computed.sum(), trace.output_tokens.sum()]
    fleet = Fleet.from_specs([spec], pools=len(replica_s))
    demand = steady_demand(fleet, np.array([totals], np.float64), np.array([horizon_s]))[0]
    covered = np.where(fleet.exists[0], replica_s / horizon_s / np.maximum(demand, 1e-9), 0.0)
    return float(covered.sum())


def worst_hour(arrival_s: Floats, good: Bools) -> float:
    """Lowest attainment of the arrivals of any hour of the trace that has at least 30; of all when no hour has."""
    hour = (arrival_s // HOUR_S).astype(np.int64)
    arrivals = np.bincount(hour)
    met = np.bincount(hour, weights=good.astype(np.float64))
    enough = arrivals >= MIN_REQUESTS_PER_HOUR
    return float((met[enough] / arrivals[enough]).min()) if enough.any() else float(good.mean())


def split_bill(usd: float, tokens: Floats, codes: npt.NDArray[np.int32], labels: Sequence[str]) -> dict[str, float]:
    """Dollars by tenant or model, in proportion to the tokens (requests,) served; empty where the trace has no labels.

    The parts sum to `usd`, requests without a label included.
    """
    total = float(tokens.sum())
    if not labels or not total:
        return {}
    sums = np.bincount(codes + 1, weights=tokens, minlength=len(labels) + 1)
    return {
        name: float(usd * part / total)
        for name, part in zip((UNLABELLED, *labels), sums, strict=True)
        if part or name != UNLABELLED
    }


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else float("nan")


def _percentile(values: Floats, level: float) -> float:
    return float(np.percentile(values, level)) if len(values) else float("nan")
