"""What is measured of a simulated cluster at one time, and what a window between two readings says.

This module must not know when it is measured, nor how the state evolves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from envs.cluster.state import BOOT_BINS
from envs.cluster.window_step import POOL_COLUMNS, SERVICE_COLUMNS
from policies.contract import TTFT_EDGES_S, Floats, Ints, Snapshot
from policies.objective import Usage

S = {name: column for column, name in enumerate(SERVICE_COLUMNS)}
P = {name: column for column, name in enumerate(POOL_COLUMNS)}
_RATES = [S[name] for name in ("arrived", "arrived_prompt_tokens", "prefill_tokens", "generated_tokens", "finished")]
_SUMS = [S[name] for name in ("finished_prompt_tokens", "finished_output_tokens", "ttft_ok", "tpot_ok")]
_COUNTS = [S[name] for name in ("finished", "finished", "first_tokens", "finished")]
SPENT = slice(P["billed_replica_s"], P["busy_s"] + 1)  # replica, node, ready and busy seconds


class Reading(NamedTuple):
    """Measurements at one time, by column: services are many, columns few. Never changed once read."""

    read_s: Floats  # (n,)
    services: Floats  # (SERVICE_COLUMNS, n)
    pools: Floats  # (POOL_COLUMNS, P, n)
    histograms: Floats  # (TTFT bins then TPOT bins, n), or (0, n)

    def renewed(self, services: Ints) -> Reading:
        """A copy in which the listed services (k,) are to be written; they are 0 until then."""
        if len(services) == len(self.read_s):
            return Reading(*(np.zeros_like(array) for array in self))
        renewed = Reading(*(array.copy() for array in self))
        for array in renewed:
            array[..., services] = 0.0
        return renewed

    def patched(self, services: Ints, other: Reading) -> Reading:
        """This reading with the listed services (k,) as in `other`."""
        if len(services) == len(self.read_s):
            return other
        patched = Reading(*(array.copy() for array in self))
        for array, new in zip(patched, other, strict=True):
            array[..., services] = new[..., services]
        return patched


def snapshot_of(latest: Reading, previous: Reading, moved: Floats, kv_capacity: Floats) -> Snapshot:
    """The window between two readings.

    Args:
        latest: at its end.
        previous: at its start.
        moved: (SERVICE_COLUMNS, n) how far every counter moved in it.
        kv_capacity: (n, P) tokens per replica.
    """
    span_s = np.maximum(latest.read_s - previous.read_s, 1e-9)
    rates = moved[_RATES] / span_s
    with np.errstate(invalid="ignore"):  # nothing over nothing is unknown: NaN
        means = moved[_SUMS] / moved[_COUNTS]

    def pool(name: str) -> Floats:
        column: Floats = latest.pools[P[name]].T
        return column

    per_bin = ((latest.histograms - previous.histograms) / span_s).T
    ttft_bins = min(len(TTFT_EDGES_S) + 1, per_bin.shape[1])
    ready = pool("replicas_ready")
    return Snapshot(
        time_s=latest.read_s,
        window_s=span_s,
        arrival_rps=rates[0],
        prompt_tps=rates[1],
        prefill_tps=rates[2],
        generation_tps=rates[3],
        finished_rps=rates[4],
        prompt_tokens_mean=means[0],
        output_tokens_mean=means[1],
        queue_requests=latest.services[S["queued"]],
        oldest_wait_s=latest.services[S["oldest_wait_s"]],
        ttft_attainment=means[2],
        tpot_attainment=means[3],
        ttft_histogram_rps=per_bin[:, :ttft_bins],
        tpot_histogram_rps=per_bin[:, ttft_bins:],
        replicas_target=pool("replicas_target"),
        replicas_starting=pool("replicas_starting"),
        replicas_ready=ready,
        replicas_draining=pool("replicas_draining"),
        boot_pipeline=latest.pools[P["boot_soon"] : P["boot_soon"] + BOOT_BINS].T,
        running=pool("running"),
        waiting=pool("waiting"),
        kv_cache_usage=pool("kv_used_tokens") / (np.maximum(ready, 1.0) * kv_capacity),
        batch_cap=pool("batch_cap"),
    )


def usage_of(span_s: Floats, services: Floats, spent: Floats, overdue: Floats) -> Usage:
    """Columns of services and of `SPENT` as usage over `span_s`; `overdue` is a level and no counter."""
    replica_s, node_s, ready_s, busy_s = spent.transpose(0, 2, 1)
    return Usage(
        span_s=span_s,
        arrivals=services[S["arrived"]],
        rejected=services[S["rejected"]],
        finished=services[S["finished"]],
        ttft_ok=services[S["ttft_ok"]],
        tpot_ok=services[S["tpot_ok"]],
        good=services[S["good"]],
        overdue=overdue,
        prompt_tokens=services[S["finished_prompt_tokens"]],
        output_tokens=services[S["finished_output_tokens"]],
        good_tokens=services[S["good_tokens"]],
        scale_events=services[S["scale_ups"]] + services[S["scale_downs"]],
        replica_s=replica_s,
        node_s=node_s,
        ready_s=ready_s,
        busy_s=busy_s,
    )
