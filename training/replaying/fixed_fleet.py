"""Replay a trace on a fixed fleet, request by request: the cluster model without any policy.

This module must not know about policies or the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace, TraceError
from policies.contract import Floats
from policies.engine import ConfigError, EngineProfile
from policies.spec import PoolSpec, ScalingSpec, Slo
from training.replaying.scores import judge

NO_OBJECTIVE_S = 1e12
"""Stands for an objective that was not given."""
FIRST_STEP_S = 600.0


@dataclass(frozen=True, eq=False)
class Replay:
    """One row per request of the trace, in its order.

    Attributes:
        trace: the requests.
        first_token_s: (requests,) seconds from the start of the trace; NaN for a rejected request.
        finish_s: (requests,) likewise.
        preemptions: times that a request lost its place in an engine.
        busy_s: replica-seconds in which an engine ran.
        replicas: size of the fleet.
    """

    trace: Trace
    first_token_s: Floats
    finish_s: Floats
    preemptions: int
    busy_s: float
    replicas: int

    @property
    def ttft_s(self) -> Floats:
        """(requests,) seconds from arrival to first token."""
        return self.first_token_s - self.trace.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """(requests,) seconds per token after the first; NaN for one-token outputs."""
        gaps = self.trace.output_tokens - 1
        return np.where(gaps > 0, (self.finish_s - self.first_token_s) / np.maximum(gaps, 1), np.nan)

    def summary(self, ttft_s: float | None = None, tpot_s: float | None = None) -> dict[str, Any]:
        """Totals, percentiles and, against the objectives given, attainment; NaN is None.

        Args:
            ttft_s: objective on the time to first token, seconds.
            tpot_s: objective on the time per output token, seconds.
        """
        finished = ~np.isnan(self.finish_s)
        makespan_s = float(np.nanmax(self.finish_s)) if finished.any() else 0.0
        slo = Slo(ttft_s=ttft_s or NO_OBJECTIVE_S, tpot_s=tpot_s or NO_OBJECTIVE_S)
        verdicts = judge(self.trace.arrival_s, self.first_token_s, self.finish_s, self.trace.output_tokens, slo)
        found: dict[str, Any] = {
            "requests": len(self.trace),
            "finished": int(finished.sum()),
            "rejected": int((~finished).sum()),
            "preemptions": self.preemptions,
            "prompt_tokens": int(self.trace.prompt_tokens[finished].sum()),
            "output_tokens": int(self.trace.output_tokens[finished].sum()),
            "makespan_s": makespan_s,
            "busy_share": self.busy_s / (self.replicas * makespan_s) if makespan_s else None,
        }
        for name, values in (("ttft", self.ttft_s), ("tpot", self.tpot_s)):
            known = values[~np.isnan(values)]
            for level in (50, 90, 99):
                found[f"{name}_p{level}_s"] = float(np.percentile(known, level)) if len(known) else None
        if ttft_s is not None:
            found["ttft_attainment"] = float(verdicts.ttft_ok.mean())
        if tpot_s is not None:
            found["tpot_attainment"] = float(verdicts.tpot_ok.mean())
        if ttft_s is not None and tpot_s is not None:
            found["attainment"] = float(verdicts.good.mean())
        return found

    def write_requests(self, path: Path) -> None:
        """Write one Parquet row per request; latencies that do not exist are null."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "arrival_s": pa.array(self.trace.arrival_s),
            "prompt_tokens": pa.array(self.trace.prompt_tokens),
            "output_tokens": pa.array(self.trace.output_tokens),
            **{
                name: pa.array(values, mask=np.isnan(values))
                for name, values in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s), ("finish_s", self.finish_s))
            },
        }
        pq.write_table(pa.table(columns), path, compression="zstd")


def simulate(trace: Trace, engine: EngineProfile, replicas: int, batch_cap: int | None = None) -> Replay:
    """Replay `trace` on `replicas` replicas that are all ready at time 0, until the last request is served.

    Args:
        trace: the requests.
        engine: what each replica is.
        replicas: 1 to 1,000.
        batch_cap: concurrent requests admitted per replica; the engine's `max_num_seqs` when None.

    Raises:
        ConfigError: when a count is out of range.
        TraceError: when the trace has no request.
    """
    cap = engine.max_num_seqs if batch_cap is None else batch_cap
    if not 1 <= replicas <= 1000:
        raise ConfigError(f"replicas: expected 1 to 1000, got {replicas}")
    if not 1 <= cap <= engine.max_num_seqs:
        raise ConfigError(
            f"batch cap: expected 1 to {engine.max_num_seqs}, the max_num_seqs of {engine.name}, got {cap}"
        )
    if not len(trace):
        raise TraceError(f"trace {trace.name!r}: has no request to replay")
    pool = PoolSpec(
        engine=engine,
        min_replicas=replicas,
        max_replicas=replicas,
        initial_replicas=replicas,
        initial_batch_cap=cap,
    )
    spec = ScalingSpec(slo=Slo(ttft_s=NO_OBJECTIVE_S, tpot_s=NO_OBJECTIVE_S), pools=(pool,))
    cluster = SimulatedCluster.replay([spec], [trace], [0])
    cluster.wait_until(trace.duration_s + cluster.window.metrics_delay_s)
    step_s = FIRST_STEP_S
    while int(cluster.usage().finished[0] + cluster.usage().rejected[0]) < len(trace):
        cluster.wait_until(cluster.now_s + step_s)
        step_s *= 2.0
    return Replay(
        trace=trace,
        first_token_s=cluster.arrays.first_token_s.copy(),
        finish_s=cluster.arrays.finish_s.copy(),
        preemptions=int(cluster.counter("preemptions")[0]),
        busy_s=float(cluster.usage().busy_s.sum()),
        replicas=replicas,
    )
