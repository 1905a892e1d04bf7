"""Closed-loop load on one replica: a fixed number of clients, each sending its next request when the last one returns.

That is how engines are measured, so it is how a profile is fitted: the cluster model itself runs at that concurrency.
All requests are given to the gateway at time 0 with the batch cap at the number of clients; the gateway hands over the
next one at the instant one finishes, which is when a client would send it. So request ``k`` was *sent* at the
``k - clients``-th finish, and time to first token counts from there.
This module must not know about measurements or fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from envs.cluster.pools import pack_pools
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import Floats
from policies.engine import ColdStart, EngineProfile, NonNegative, StepModel, StrictModel
from policies.spec import PoolSpec, ScalingSpec, Slo

NO_OBJECTIVE_S = 1e12
FIRST_SPAN_S = 600.0
LONGEST_RUN_S = 1e9
LENGTH_SEED = 2_024


class LoadProtocol(StrictModel):
    """How a closed-loop measurement was run, as far as it changes the mean latencies."""

    requests_per_client: int = Field(default=10, ge=1, le=1000, description="Requests sent per client.")
    max_requests: int | None = Field(
        default=None, ge=1, description="Requests of a run at most, however many clients; each sends at least one."
    )
    start: Literal["burst", "steady"] = Field(
        default="burst",
        description="burst: all clients start together and every request counts; steady: clients are spread over a "
        "request's life and the first request of each is left out.",
    )
    waiting: int = Field(
        default=0, ge=0, le=64, description="Clients beyond the engine's batch limit: requests that always wait."
    )
    cached_share: float = Field(
        default=0.0, ge=0.0, le=1.0, description="Share of every prompt that the engine finds in its prefix cache."
    )
    length_spread: NonNegative = Field(
        default=0.0, le=0.9, description="Output lengths are uniform within this share of their mean, 0: all equal."
    )


class LoopLatencies(NamedTuple):
    """Per run, (runs,), seconds: what a load generator reports."""

    ttft_mean_s: Floats
    ttft_p90_s: Floats
    tpot_mean_s: Floats


def loop_lengths(protocol: LoadProtocol, output_tokens: int, concurrency: int) -> NDArray[np.int64]:
    """Output length of every request of a run, in the order they are sent, (requests,).

    The load generator and the simulation both call this, so they serve the same requests.
    """
    requests = concurrency * protocol.requests_per_client
    if protocol.max_requests is not None:
        requests = max(concurrency, min(requests, protocol.max_requests))
    if protocol.length_spread > 0.0:
        rng = np.random.default_rng((LENGTH_SEED, output_tokens, concurrency))
        factors = 1.0 + protocol.length_spread * rng.uniform(-1.0, 1.0, requests)
        lengths = np.maximum(np.rint(output_tokens * factors), 1).astype(np.int64)
    else:
        lengths = np.full(requests, output_tokens, np.int64)
    if protocol.start == "steady":
        rng = np.random.default_rng((LENGTH_SEED, concurrency))
        shares = (rng.permutation(concurrency) + 1) / concurrency
        lengths[:concurrency] = np.maximum((output_tokens * shares).astype(np.int64), 1)
    return lengths


class ClosedLoops:
    """Runs of several closed loops side by side, again and again with other coefficients.

    Args:
        prompt_tokens: (runs,) of every request of a run.
        output_tokens: (runs,) mean of a run.
        concurrency: (runs,) clients within the engine's batch limit.
        protocols: one per run.
        max_num_batched_tokens: token budget of an iteration.
        max_num_seqs: largest batch; a run with more clients waits for it. None: no limit.

    Raises:
        ValueError: when a run needs more than 4,096 sequences at once.
    """

    def __init__(
        self,
        prompt_tokens: Sequence[int] | NDArray[np.int64],
        output_tokens: Sequence[int] | NDArray[np.int64],
        concurrency: Sequence[int] | NDArray[np.int64],
        protocols: Sequence[LoadProtocol],
        max_num_batched_tokens: int,
        max_num_seqs: int | None = None,
    ) -> None:
        self.concurrency = np.asarray(concurrency, np.int64)
        self.protocols = tuple(protocols)
        self.outputs = [
            loop_lengths(protocol, int(mean), int(clients))
            for protocol, mean, clients in zip(protocols, output_tokens, concurrency, strict=True)
        ]
        self.largest_request = np.array(
            [int(prompt) + int(outputs.max()) for prompt, outputs in zip(prompt_tokens, self.outputs, strict=True)]
        )
        traces = [
            Trace.from_arrays(
                arrival_s=np.zeros(len(outputs)),
                prompt_tokens=np.full(len(outputs), int(prompt)),
                output_tokens=outputs,
                prefix_hit_tokens=np.full(len(outputs), int(prompt * protocol.cached_share)),
                name="closed loop",
            )
            for prompt, outputs, protocol in zip(prompt_tokens, self.outputs, self.protocols, strict=True)
        ]
        limit = int(self.concurrency.max()) if max_num_seqs is None else max_num_seqs
        engine = _blank_engine(limit, max_num_batched_tokens)
        specs = [
            ScalingSpec(
                slo=Slo(ttft_s=NO_OBJECTIVE_S, tpot_s=NO_OBJECTIVE_S),
                pools=(
                    PoolSpec(
                        engine=engine,
                        min_replicas=1,
                        max_replicas=1,
                        initial_replicas=1,
                        initial_batch_cap=min(int(clients), limit),
                    ),
                ),
            )
            for clients in self.concurrency
        ]
        self._cluster = SimulatedCluster.replay(specs, traces, [0] * len(specs))
        self._records = pack_pools(specs, 1)

    def __len__(self) -> int:
        return len(self.outputs)

    def run(self, step_s: Sequence[float] | Floats, kv_capacity_tokens: int) -> LoopLatencies:
        """Serve every run's requests to the last and report its latencies.

        Args:
            step_s: (5,) coefficients a, b, c, d, e in seconds per unit, see `StepModel.seconds`.
            kv_capacity_tokens: of the replica.

        Raises:
            ValueError: when a request can never fit the KV cache.
        """
        if (self.largest_request > kv_capacity_tokens).any():
            raise ValueError(
                f"a request of {int(self.largest_request.max()):,} tokens can never fit a KV cache of "
                f"{kv_capacity_tokens:,} tokens"
            )
        for name, value in zip("abcde", step_s, strict=True):
            self._records[name] = value
        self._records["kv_capacity"] = kv_capacity_tokens
        cluster, runs = self._cluster, len(self)
        cluster.arrays.first_token_s[:] = np.nan
        cluster.arrays.finish_s[:] = np.nan
        cluster.begin(
            np.arange(runs),
            self._records,
            ttft_slo_s=np.full(runs, NO_OBJECTIVE_S),
            tpot_slo_s=np.full(runs, NO_OBJECTIVE_S),
            origin_s=np.zeros(runs),
            first_row=cluster.library.first[:-1],
            end_row=cluster.library.first[1:],
            seeds=np.zeros(runs, np.int64),
            replicas=np.ones((runs, 1), np.int64),
        )
        until_s = FIRST_SPAN_S
        while np.isnan(cluster.arrays.finish_s).any():
            if until_s > LONGEST_RUN_S:
                raise ValueError("the step times are so long that the closed loops do not finish")
            cluster.wait_until(until_s)
            until_s *= 4.0
        rows = [self._latencies(run) for run in range(runs)]
        return LoopLatencies(*(np.array(column) for column in zip(*rows, strict=True)))

    def _latencies(self, run: int) -> tuple[float, float, float]:
        cluster, protocol = self._cluster, self.protocols[run]
        clients = int(self.concurrency[run])
        rows = slice(cluster.library.first[run], cluster.library.first[run + 1])
        first_s, finish_s = cluster.arrays.first_token_s[rows], cluster.arrays.finish_s[rows]
        at_once = min(clients + protocol.waiting, len(first_s))
        sent_s = np.concatenate([np.zeros(at_once), np.sort(finish_s)[: len(first_s) - at_once]])
        counted = slice(clients if protocol.start == "steady" else 0, None)
        ttft_s = (first_s - sent_s)[counted]
        gaps = self.outputs[run][counted] - 1
        long = gaps > 0
        tpot_s = (finish_s - first_s)[counted][long] / gaps[long]
        return float(ttft_s.mean()), float(np.percentile(ttft_s, 90)), float(tpot_s.mean()) if long.any() else np.nan


def _blank_engine(max_num_seqs: int, max_num_batched_tokens: int) -> EngineProfile:
    """An engine whose coefficients and KV capacity are filled in at each run."""
    return EngineProfile(
        name="closed-loop",
        model="-",
        gpu="-",
        backend="-",
        precision="-",
        gpus_per_replica=1,
        gpus_per_node=1,
        step=StepModel(
            a_ms=1.0, b_us_per_prefill_token=0, c_us_per_seq=0, d_us_per_1k_kv_tokens=0, e_ns_per_prefill_token2=0
        ),
        kv_capacity_tokens=16,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        cold_start=ColdStart(node_s=0, image_s=0, weights_s=0, warmup_s=0),
        usd_per_gpu_hour=1.0,
        fitted_on="nothing",
    )
