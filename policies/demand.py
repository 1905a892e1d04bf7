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

from policies.contract import Floats, Ints, Snapshot
from policies.fleet import Fleet
from policies.pool_arrays import clip, nan_to_zero, sum_pools

BACKLOG_DRAIN_S = 30.0
"""The backlog should be worked off in this time."""
DEFAULT_PROMPT_TOKENS = 1000.0
DEFAULT_OUTPUT_TOKENS = 200.0
MIN_REQUEST_SECONDS = 30.0
"""Request-seconds in the engines before the measured context counts."""
MIN_REQUESTS = 20.0
"""Finished requests before their lengths bound the measured context."""
LONGEST = 8.0
"""Context of a running request over the length of finished ones, at most: the longest run longest. In simulation it is
at most 2; and its inverse, at least 0.6."""
NEXT_TO_NOTHING = 1e-12
"""Weight of a default beside what was measured."""
_DEFAULT_LENGTHS = NEXT_TO_NOTHING * np.array([[DEFAULT_PROMPT_TOKENS], [DEFAULT_OUTPUT_TOKENS]])


class Demand(NamedTuple):
    """Replicas needed, per pool as if it served everything. All (n, P), all at least 0 and finite.

    `offered` is the offered load: arrivals times what one takes, or what is served where arrivals are unknown. Unlike
    the two estimates of the demand it knows neither what waits nor how many are in service, so it hardly depends on the
    fleet.
    """

    tokens: Floats
    occupancy: Floats
    batch_limit: Floats
    offered: Floats


class RequestMix:
    """Remembers what requests look like: their lengths, cache hits and context, so that a quiet window has a mix too.

    The memory is an exponential mean over about ten minutes. Lengths are weighted by finished requests. The share of a
    prompt that is computed (the rest hits the prefix cache) compares computed with finished prompt tokens, not with
    arrived ones: a backlog, which has arrived and is not computed yet, must not look like cache hits. The context of a
    running request is KV tokens over running requests: batches are filled by requests in proportion to the time they
    stay, so the mean over finished requests is far too low where a few long requests run among many short ones. It is
    within `LONGEST` of that mean all the same: a gauge that counts too few requests, or cached blocks, must not close
    the batches.
    """

    MEMORY_S = 600.0

    def __init__(self, n: int) -> None:
        # Decaying sums: finished requests, their prompt and their output tokens; prompt tokens computed and, over the
        # same windows, finished; KV token-seconds and request-seconds in the engines.
        self._sums = np.zeros((7, n))

    def reset(self, services: np.ndarray) -> None:
        """Forget the mix of the masked services."""
        self._sums[:, services] = 0.0

    def lengths(self) -> Floats:
        """(2, n) mean prompt and output tokens of finished requests, at least 1; defaults until one has finished."""
        lengths: Floats = np.maximum((self._sums[1:3] + _DEFAULT_LENGTHS) / (self._sums[0] + NEXT_TO_NOTHING), 1.0)
        return lengths

    def uncached(self) -> Floats:
        """(n,) share of prompt tokens that is computed, 0.02..1; 1 until a request has finished."""
        computed, completed = self._sums[3:5]
        return clip((computed + NEXT_TO_NOTHING) / (completed + NEXT_TO_NOTHING), 0.02, 1.0)

    def context(self, otherwise: Floats) -> Floats:
        """(n,) mean context of a running request, tokens; `otherwise` (n,) until enough has been measured."""
        kv_tokens, running = self._sums[5:]
        prompt, output = self.lengths()
        known = self._sums[0] >= MIN_REQUESTS
        shortest = np.where(known, (prompt * self.uncached() + 0.5 * output) / LONGEST, 1.0)
        longest = np.where(known, (prompt + output) * LONGEST, np.inf)
        measured = clip(kv_tokens / np.maximum(running, MIN_REQUEST_SECONDS), np.maximum(shortest, 1.0), longest)
        return np.where(running > MIN_REQUEST_SECONDS, measured, otherwise)

    def adopt(self, other: RequestMix, rows: Ints) -> None:
        """Take over the whole memory of `other` as the listed services (k,)."""
        self._sums[:, rows] = other._sums

    def update(self, snapshot: Snapshot, fleet: Fleet) -> None:
        """Fold in one window; what was not measured in it changes nothing."""
        window_s = nan_to_zero(snapshot.window_s)
        count = snapshot.finished_rps * window_s
        prompts, outputs = count * snapshot.prompt_tokens_mean, count * snapshot.output_tokens_mean
        seen = prompts + outputs > 0  # False where either is missing
        finished = np.where(seen, np.array([count, prompts, outputs]), 0.0)
        # Computed and finished tokens are summed over the same windows: those in which both are known.
        both = (seen | (count == 0)) & ~np.isnan(snapshot.prefill_tps)
        cached = np.where(both, np.array([snapshot.prefill_tps * window_s, finished[1]]), 0.0)
        kv_tokens = sum_pools(snapshot.kv_cache_usage * fleet.kv_capacity * snapshot.replicas_ready)
        held = np.array([kv_tokens, sum_pools(snapshot.running)]) * window_s
        held = np.where(np.isnan(held[0] + held[1]), 0.0, held)
        self._sums *= np.exp(window_s * (-1.0 / self.MEMORY_S))
        self._sums += np.concatenate((finished, cached, held))


def estimate_demand(snapshot: Snapshot, fleet: Fleet, mix: RequestMix) -> Demand:
    """Both demand estimates for every pool, from one window. Missing rates count as unknown, see `Snapshot.blind`."""
    prompt, output = mix.lengths()
    uncached = mix.uncached()
    context = mix.context(otherwise=prompt + 0.5 * output)
    generated_tps, computed_tps, arrived_tps = _rates(snapshot, prompt, output, uncached)
    # Pool by pool from here: (P, n).
    base_s = fleet.a.T
    prefill_s = fleet.b.T + fleet.e.T * (prompt * (1.0 - 0.5 * uncached))
    read_s = fleet.c.T + fleet.d.T * context
    # The batch at which an iteration, with the prefills that come along, takes the TPOT objective.
    computed = prompt * uncached
    expected = computed / output
    prefills_per_token = np.minimum(computed_tps / np.maximum(generated_tps, 1e-9), 4 * expected)
    prefills_per_token = np.where(generated_tps > 0, prefills_per_token, expected)
    per_sequence_s = np.maximum(read_s + prefill_s * prefills_per_token, 1e-9)
    batch_limit = np.minimum((fleet.tpot_slo_s - base_s) / per_sequence_s, fleet.kv_capacity.T / context)
    batch_limit = clip(batch_limit, 1.0, fleet.max_num_seqs.T)

    token_s = base_s / batch_limit + read_s
    waiting = nan_to_zero(snapshot.queue_requests) + sum_pools(nan_to_zero(snapshot.waiting))
    request_s = token_s * output + prefill_s * computed
    served = token_s * generated_tps + prefill_s * computed_tps
    by_tokens = served + request_s * (waiting * (1.0 / BACKLOG_DRAIN_S))
    in_system = waiting + sum_pools(nan_to_zero(snapshot.running))
    by_occupancy = in_system / batch_limit + prefill_s * arrived_tps
    offered = _first_known(snapshot.arrival_rps * request_s, served)
    exists = fleet.exists.T
    return Demand(
        tokens=(by_tokens * exists).T,
        occupancy=(by_occupancy * exists).T,
        batch_limit=batch_limit.T,
        offered=(offered * exists).T,
    )


def _rates(snapshot: Snapshot, prompt: Floats, output: Floats, uncached: Floats) -> tuple[Floats, Floats, Floats]:
    """Tokens per second (n,): generated; prefilled; and, of prompts as they arrived, to be prefilled."""
    generated, computed = snapshot.generation_tps, snapshot.prefill_tps
    arrived = snapshot.prompt_tps * uncached
    if not np.isnan(generated + computed + arrived).any():
        return generated, computed, arrived
    # A rate that is missing is taken from its nearest relative, never as 0.
    expected = snapshot.arrival_rps * prompt * uncached
    generated = _first_known(generated, snapshot.arrival_rps * output, 0.0)
    computed = _first_known(computed, arrived, expected, generated * prompt / output)
    return generated, computed, _first_known(arrived, expected, computed)


def _first_known(*candidates: Floats | float) -> Floats:
    """Element by element, the first candidate that is not NaN."""
    known = np.asarray(candidates[0], np.float64)
    for candidate in candidates[1:]:
        known = np.where(np.isnan(known), candidate, known)
    return known
