"""How many replicas the measured load needs, from the step-time model.

An iteration with `B` decodes and `p` prefill tokens takes `a + b*p + c*B + d*KV + attention`. Per generated token, a
replica that runs batches of `B` over contexts of `L` tokens therefore spends `a/B + c + d*L` seconds, and per prefilled
token `b + e*(its position in the prompt)` seconds. Rates times these costs are replica-seconds per second: replicas.

Two estimates are made, because either alone breaks on some traffic: from measured token rates (blind to work that has
not been served yet, so the backlog is added) and from the requests in the system over the batch that the TPOT objective
allows (blind to prefill, so the prefill rate is added). Only what a live system can measure is used: never a request's
output length before it has ended.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policies.columns import known, total
from policies.contract import Floats, Ints, Snapshot
from policies.fleet import Fleet

BACKLOG_DRAIN_S = 30.0
"""The backlog should be worked off in this time."""
DEFAULT_PROMPT_TOKENS = 1000.0
DEFAULT_OUTPUT_TOKENS = 200.0
MIN_REQUEST_SECONDS = 30.0
"""Request-seconds in the engines before the measured context counts."""


class Demand(NamedTuple):
    """Replicas needed, per pool as if it served everything. All (n, P), all at least 0 and finite."""

    tokens: Floats
    occupancy: Floats
    batch_limit: Floats


class RequestMix:
    """Remembers the mean lengths of finished requests, so that a window without any still has a mix.

    The memory is an exponential mean over about ten minutes, weighted by finished requests. The share of a prompt that
    is computed (the rest hits the prefix cache) compares computed with finished prompt tokens, not with arrived ones:
    a backlog, which has arrived and is not computed yet, must not look like cache hits.
    """

    MEMORY_S = 600.0

    def __init__(self, n: int) -> None:
        self.prompt_tokens = np.full(n, np.nan)
        self.output_tokens = np.full(n, np.nan)
        self._weight = np.zeros(n)
        self._computed = np.zeros(n)  # prompt tokens, with the same memory
        self._completed = np.zeros(n)

    def reset(self, services: np.ndarray) -> None:
        """Forget the mix of the masked services."""
        self.prompt_tokens[services] = np.nan
        self.output_tokens[services] = np.nan
        for sums in (self._weight, self._computed, self._completed):
            sums[services] = 0.0

    @property
    def uncached(self) -> Floats:
        """(n,) share of prompt tokens that is computed, 0.02..1; 1 until a request has finished."""
        share = self._computed / np.maximum(self._completed, 1e-9)
        return np.where(self._completed > 0, np.clip(share, 0.02, 1.0), 1.0)

    def adopt(self, other: RequestMix, rows: Ints) -> None:
        """Take over the whole memory of `other` as the listed services (k,)."""
        self.prompt_tokens[rows] = other.prompt_tokens
        self.output_tokens[rows] = other.output_tokens
        self._weight[rows] = other._weight
        self._computed[rows] = other._computed
        self._completed[rows] = other._completed

    def update(self, snapshot: Snapshot) -> None:
        """Fold in the requests that finished in the window."""
        window_s = known(snapshot.window_s)
        keep = np.exp(-window_s / self.MEMORY_S)
        count = snapshot.finished_rps * window_s
        seen = (count > 0) & ~np.isnan(snapshot.prompt_tokens_mean + snapshot.output_tokens_mean)
        count = np.where(seen, count, 0.0)
        # Computed and finished tokens are summed over the same windows: those in which both are known.
        both = (seen | (snapshot.finished_rps == 0)) & ~np.isnan(snapshot.prefill_tps)
        computed = np.where(both, snapshot.prefill_tps * window_s, 0.0)
        completed = np.where(both & seen, count * snapshot.prompt_tokens_mean, 0.0)
        self._computed = self._computed * keep + computed
        self._completed = self._completed * keep + completed
        self._weight = self._weight * keep + count
        share = np.where(seen, count / np.maximum(self._weight, 1e-12), 0.0)
        for name in ("prompt_tokens", "output_tokens"):
            old = getattr(self, name)
            new = getattr(snapshot, f"{name}_mean")
            blended = old + share * (new - old)
            setattr(self, name, np.where(seen, np.where(np.isnan(old), new, blended), old))


class RunningContext:
    """Remembers the mean context of a running request: KV tokens over running requests, summed over about ten minutes.

    Batches are filled by requests in proportion to the time they stay. The mean over finished requests is far too low
    where a few long requests run among many short ones.
    """

    MEMORY_S = 600.0

    def __init__(self, n: int) -> None:
        self._kv_tokens = np.zeros(n)  # token-seconds
        self._running = np.zeros(n)  # request-seconds

    @property
    def tokens(self) -> Floats:
        """(n,) mean context, tokens; NaN until enough has been measured."""
        enough = self._running > MIN_REQUEST_SECONDS
        return np.where(enough, np.maximum(self._kv_tokens / np.maximum(self._running, 1e-9), 1.0), np.nan)

    def reset(self, services: np.ndarray) -> None:
        """Forget the masked services."""
        self._kv_tokens[services] = 0.0
        self._running[services] = 0.0

    def adopt(self, other: RunningContext, rows: Ints) -> None:
        """Take over the whole memory of `other` as the listed services (k,)."""
        self._kv_tokens[rows] = other._kv_tokens
        self._running[rows] = other._running

    def update(self, snapshot: Snapshot, fleet: Fleet) -> None:
        """Fold in one window; one without a measurement changes nothing."""
        kv_tokens = total(snapshot.kv_cache_usage * fleet.kv_capacity * snapshot.replicas_ready)
        running = total(snapshot.running)
        seconds = known(snapshot.window_s)
        keep = np.exp(-seconds / self.MEMORY_S)
        measured = ~np.isnan(kv_tokens + running)
        self._kv_tokens = self._kv_tokens * keep + np.where(measured, kv_tokens * seconds, 0.0)
        self._running = self._running * keep + np.where(measured, running * seconds, 0.0)


def estimate_demand(snapshot: Snapshot, fleet: Fleet, mix: RequestMix, context: Floats | None = None) -> Demand:
    """Both demand estimates for every pool, from one window. Missing rates count as unknown, see `Snapshot.blind`.

    Args:
        snapshot: the window.
        fleet: the services.
        mix: lengths of finished requests.
        context: (n,) measured mean context of running requests, tokens; from the mix where it is NaN.
    """
    column = np.newaxis
    prompt = np.maximum(_first_known(mix.prompt_tokens, DEFAULT_PROMPT_TOKENS), 1.0)
    output = np.maximum(_first_known(mix.output_tokens, DEFAULT_OUTPUT_TOKENS), 1.0)
    uncached = mix.uncached
    # A rate that is missing is taken from its nearest relative, never as 0.
    generated_tps = _first_known(snapshot.generation_tps, snapshot.arrival_rps * output, 0.0)
    started_tps = generated_tps * prompt / output
    computed_tps = _first_known(
        snapshot.prefill_tps, snapshot.prompt_tps * uncached, snapshot.arrival_rps * prompt * uncached, started_tps
    )
    arrived_load_tps = _first_known(
        snapshot.prompt_tps * uncached, snapshot.arrival_rps * prompt * uncached, computed_tps
    )
    expected_context = prompt + 0.5 * output
    context = expected_context if context is None else _first_known(context, expected_context)
    position = prompt * (1.0 - 0.5 * uncached)

    prefill_s = fleet.b + fleet.e * position[:, column]
    read_s = fleet.c + fleet.d * context[:, column]
    # The batch at which an iteration, with the prefills that come along, takes the TPOT objective.
    expected = prompt * uncached / output
    measured = np.minimum(computed_tps / np.maximum(generated_tps, 1e-9), 4 * expected)
    prefills_per_token = np.where(generated_tps > 0, measured, expected)
    per_sequence_s = read_s + prefill_s * prefills_per_token[:, column]
    batch_limit = (fleet.tpot_slo_s[:, column] - fleet.a) / np.maximum(per_sequence_s, 1e-9)
    batch_limit = np.minimum(batch_limit, fleet.kv_capacity / context[:, column])
    batch_limit = np.clip(batch_limit, 1.0, fleet.max_num_seqs)

    token_s = fleet.a / batch_limit + read_s
    waiting = known(snapshot.queue_requests) + total(known(snapshot.waiting))
    request_s = token_s * output[:, column] + prefill_s * (prompt * uncached)[:, column]
    prefill_load = prefill_s * computed_tps[:, column]
    by_tokens = token_s * generated_tps[:, column] + prefill_load + request_s * (waiting / BACKLOG_DRAIN_S)[:, column]

    in_system = waiting + total(known(snapshot.running))
    arrived_load = prefill_s * arrived_load_tps[:, column]
    by_occupancy = in_system[:, column] / batch_limit + arrived_load
    return Demand(
        tokens=np.where(fleet.exists, by_tokens, 0.0),
        occupancy=np.where(fleet.exists, by_occupancy, 0.0),
        batch_limit=batch_limit,
    )


def _first_known(*candidates: Floats | float) -> Floats:
    """Element by element, the first candidate that is not NaN."""
    known = np.asarray(candidates[0], np.float64)
    for candidate in candidates[1:]:
        known = np.where(np.isnan(known), candidate, known)
    return known
