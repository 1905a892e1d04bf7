"""The Dynamo planner's load scaling, for engines that both prefill and decode.

Source: ai-dynamo/dynamo 1.6.1, `components/src/dynamo/planner/core/load_scaling.py`. Every 5 s (here: every control
interval) one replica more or less, and nothing while the last step is still under way.
Easy modes look at the KV load ``u = (scheduled + queued KV + queued prefill tokens) / capacity``: any above 1.0 adds,
all below 0.6 remove (mode ``latency``: 0.4 and 0.1; mode ``load``: the user's own), unless the load spread over one
replica less would reach the upper threshold. Mode ``sla`` estimates TTFT (prefill of the queue and a mean prompt in
chunks) and ITL from the step-time model: if either is too slow, it adds one; it removes one only if the load that the
others would then have, higher by a factor of ``N / (N - 1)``, leaves ``TTFT - own prefill`` below 80 % of what the
objective leaves, ITL below 80 %, and the cache not full.
One mean replica stands for all, where the planner asks each. Left out: the regression on forward-pass metrics
(the engine profile is its result), cancelling a start, the budget of eight GPUs, separate prefill and decode fleets.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.parameters import SPOT_SHARE, Parameter
from policies.baselines.single_pool import Service, SinglePoolPolicy
from policies.contract import Bools, Floats, Observation
from policies.fleet import Fleet
from policies.pool_arrays import sum_pools

THRESHOLDS = {"throughput": (1.0, 0.6), "latency": (0.4, 0.1)}
SENSITIVITY = 0.8
MAX_NUM_BATCHED_TOKENS = 8192.0
"""The engine's default; a snapshot does not carry it."""


class Lengths:
    """Mean prompt, output and computed share of prompts of a service, from the last windows that had any."""

    def __init__(self, n: int) -> None:
        self.prompt = np.full(n, np.nan)
        self.output = np.full(n, np.nan)
        self.computed = np.ones(n)

    def reset(self, rows: Bools) -> None:
        """Forget the masked services."""
        self.prompt[rows] = self.output[rows] = np.nan
        self.computed[rows] = 1.0

    def update(self, service: Service) -> None:
        """Fold in one window."""
        snapshot = service.snapshot
        self.prompt = np.where(np.isnan(snapshot.prompt_tokens_mean), self.prompt, snapshot.prompt_tokens_mean)
        self.output = np.where(np.isnan(snapshot.output_tokens_mean), self.output, snapshot.output_tokens_mean)
        arrived = snapshot.prompt_tps > 1e-6
        share = np.divide(
            snapshot.prefill_tps, snapshot.prompt_tps, out=np.full_like(self.prompt, np.nan), where=arrived
        )
        self.computed = np.where(np.isnan(share), self.computed, np.clip(share, 0.01, 1.0))


class Replica:
    """Step times of a mean replica of a service: the pools' own, weighted by what is ready."""

    def __init__(self, service: Service, fleet: Fleet) -> None:
        ready = np.nan_to_num(service.snapshot.replicas_ready)
        weight = np.where(sum_pools(ready)[:, np.newaxis] >= 0.5, ready, fleet.exists)
        weight = weight / np.maximum(sum_pools(weight), 1e-9)[:, np.newaxis]
        self.a, self.b, self.c, self.d = (sum_pools(weight * each) for each in (fleet.a, fleet.b, fleet.c, fleet.d))
        self.max_num_seqs = sum_pools(weight * fleet.max_num_seqs)
        self.kv_capacity = service.kv_capacity

    def itl_s(self, batch: Floats, context_tokens: Floats) -> Floats:
        """Seconds of an iteration of `batch` decodes over `context_tokens` in all."""
        seconds: Floats = self.a + self.c * batch + self.d * context_tokens
        return seconds

    def prefill_s(self, tokens: Floats, batch: Floats, context_tokens: Floats) -> Floats:
        """Seconds to prefill `tokens` in chunks, each in an iteration that also decodes."""
        chunks = np.ceil(np.maximum(tokens, 1.0) / MAX_NUM_BATCHED_TOKENS)
        return tokens * self.b + chunks * self.itl_s(batch, context_tokens)


class DynamoLoadPolicy(SinglePoolPolicy):
    """One replica more or less by the load of each.

    Args:
        fleet: the services.
        mode: ``throughput``, ``latency``, ``load`` (with the thresholds below) or ``sla``.
        up: KV load above which a replica is added; mode ``load``.
        down: KV load below which one is removed; mode ``load``.
        spot_share: share of the replicas on spot where it is offered, 0..1.
    """

    name = "dynamo-load"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("mode", "throughput", choices=("throughput", "latency", "load", "sla"), meaning="what decides"),
        Parameter("up", 1.0, 0.02, 2.0, log=True, meaning="KV load that adds a replica, mode load"),
        Parameter("down", 0.6, 0.005, 1.5, log=True, meaning="KV load that removes one, mode load"),
        SPOT_SHARE,
    )
    tick_s = 5.0

    def __init__(
        self,
        fleet: Fleet,
        mode: str = "throughput",
        up: float = 1.0,
        down: float = 0.6,
        spot_share: float = 0.5,
    ) -> None:
        super().__init__(fleet, spot_share)
        self.mode = mode
        self.up, self.down = THRESHOLDS.get(mode, (up, down))
        self._lengths = Lengths(len(fleet))

    def forget(self, rows: Bools) -> None:
        """Forget lengths."""
        self._lengths.reset(rows)

    def desired(self, service: Service, observation: Observation, due: Bools) -> Floats:
        """One step, or none while the last one is under way."""
        self._lengths.update(service)
        replica = Replica(service, self.fleet)
        more, less, known = (self._by_sla if self.mode == "sla" else self._by_load)(service, replica)
        still = service.ready == service.current
        step = np.where(more, 1.0, np.where(less & (service.current > 1), -1.0, 0.0))
        step = np.where((service.current < 1) & (service.in_system > 0), 1.0, step)
        return np.where(known & (still | (service.current < 1)), service.current + step, np.nan)

    def _queued_tokens(self, service: Service) -> Floats:
        """Prompt tokens (n,) to compute per replica; none is waiting before a request has finished."""
        prompt = np.nan_to_num(self._lengths.prompt)
        tokens: Floats = service.waiting * prompt * self._lengths.computed / np.maximum(service.ready, 1.0)
        return tokens

    def _by_load(self, service: Service, replica: Replica) -> tuple[Bools, Bools, Bools]:
        load = service.kv_usage + self._queued_tokens(service) / replica.kv_capacity
        fewer = load * service.current / np.maximum(service.current - 1.0, 1.0)
        return load > self.up, (load < self.down) & (fewer < self.up), ~np.isnan(load)

    def _by_sla(self, service: Service, replica: Replica) -> tuple[Bools, Bools, Bools]:
        fleet, ready = self.fleet, np.maximum(service.ready, 1.0)
        batch, context = service.running / ready, service.kv_usage * replica.kv_capacity
        queued = self._queued_tokens(service)
        own = self._lengths.prompt * self._lengths.computed
        own_s = replica.prefill_s(own, np.zeros_like(own), np.zeros_like(own))

        def estimate(factor: Floats) -> tuple[Floats, Floats]:
            ttft_s = replica.prefill_s(queued * factor + own, batch * factor, context * factor)
            return ttft_s, replica.itl_s(batch * factor, context * factor)

        ttft_s, itl_s = estimate(np.ones_like(batch))
        more = (ttft_s > fleet.ttft_slo_s) | (itl_s > fleet.tpot_slo_s)
        factor = service.current / np.maximum(service.current - 1.0, 1.0)
        ttft_s, itl_s = estimate(factor)
        less = (
            (ttft_s - own_s < (fleet.ttft_slo_s - own_s) * SENSITIVITY)
            & (context * factor < replica.kv_capacity)
            & (itl_s < SENSITIVITY * fleet.tpot_slo_s)
        )
        return more, less & ~more, ~np.isnan(ttft_s + itl_s)
