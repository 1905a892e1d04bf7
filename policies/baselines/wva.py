"""The workload-variant autoscaler (WVA): saturation (V1) and token capacity (V2), by variant.

Source: llm-d-workload-variant-autoscaler, `internal/saturation` and its V2. Every 60 s, on the highest KV cache usage
and queue length of the last minute. A *variant* is a pool: WVA knows prices and several pools by itself, so the usual
placement is not used. Behind each variant stands an HPA with 240 s of stabilisation both ways and 10 replicas per
150 s; as long as the replicas asked for differ from the last answer, that answer stands.
A pool's mean over its replicas stands for each of them, and requests at the gateway for those in the endpoint picker's
queue, shared out by ready replicas.
Left out: polling at zero replicas every 100 ms; conditions on stale metrics (a window without metrics holds).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from policies.baselines.hpa_behavior import Behavior, ScalingRules
from policies.baselines.parameters import Parameter
from policies.baselines.single_pool import Placement
from policies.baselines.windows import SlidingWindow, Tick
from policies.contract import Bools, Floats, Observation, Snapshot, Target
from policies.durable import Durable
from policies.fleet import Fleet
from policies.pool_arrays import sum_pools

ENGINE_S = 60.0
IDLE_S = 600.0
MAX_NUM_BATCHED_TOKENS = 8192.0
"""The engine's default; a snapshot does not carry it."""
SHORT_OUTPUT, MEDIUM_OUTPUT = 100.0, 500.0
CAPACITY_SAMPLES = 10


class VariantPolicy(Durable):
    """Base of the WVA analyses: the tick, the HPA behind each variant, the hold.

    Args:
        fleet: the services.
        stabilization_s: of the HPA behind, both ways, seconds.
    """

    name = ""
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = ()

    def __init__(self, fleet: Fleet, stabilization_s: float = 240.0) -> None:
        n = len(fleet)
        self.fleet = fleet
        self._placement = Placement(fleet)
        self._tick = Tick(n, ENGINE_S)
        rules = ScalingRules(stabilization_s=stabilization_s, replicas=10, share=0.0, period_s=150.0)
        self._behavior = Behavior(n, fleet.pools, up=rules, down=rules)
        self._kv = SlidingWindow(n, ENGINE_S, fleet.pools)
        self._queue = SlidingWindow(n, ENGINE_S, fleet.pools)
        self._desired = np.full(fleet.exists.shape, np.nan)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the masked services, of all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        for part in (self._placement, self._tick, self._behavior, self._kv, self._queue):
            part.reset(rows)
        self._desired[rows] = np.nan
        self.forget(rows)

    def propose(self, observation: Observation) -> Target:
        """The analysis once a minute, its answer through the HPA in between."""
        snapshot, fleet = observation.snapshot, self.fleet
        placed = self._placement.current(snapshot)
        time_s = snapshot.time_s
        ready = snapshot.replicas_ready
        share = np.divide(ready, sum_pools(ready)[:, np.newaxis], out=np.zeros_like(ready), where=ready > 0)
        queue = (snapshot.waiting + snapshot.queue_requests[:, np.newaxis] * share) / np.maximum(ready, 1.0)
        queue = np.where(fleet.exists, queue, 0.0)
        self._kv.add(time_s, snapshot.kv_cache_usage)
        self._queue.add(time_s, queue)
        kv_max, queue_max = self._kv.max(time_s), self._queue.max(time_s)
        known = ~(observation.blind | np.isnan(snapshot.kv_cache_usage + queue + ready).any(axis=1))
        due = self._tick.due(time_s, known)
        settled = np.isnan(self._desired).any(axis=1) | (self._desired == placed).all(axis=1)
        if (due & settled).any():
            desired = self.analyse(snapshot, placed, kv_max, queue_max)
            desired = np.where(fleet.exists, np.clip(desired, fleet.min_replicas, fleet.max_replicas), 0.0)
            fresh = (due & settled & ~np.isnan(desired).any(axis=1))[:, np.newaxis]
            self._desired = np.where(fresh, desired, self._desired)
        desired = np.where(np.isnan(self._desired), placed, self._desired)
        answer = self._behavior.settle(time_s, known, placed, desired)
        return self._placement.target(np.where(known[:, np.newaxis], answer, placed))

    def analyse(self, snapshot: Snapshot, placed: Floats, kv: Floats, queue: Floats) -> Floats:
        """The desired replicas (n, P) for the highest KV usage and queue per replica (n, P) of the last minute."""
        raise NotImplementedError

    def forget(self, rows: Bools) -> None:
        """Begin anew with the masked services."""


class WvaSaturationPolicy(VariantPolicy):
    """V1: one replica more or less, by the spare capacity of replicas that are not saturated.

    Saturated: KV usage of 0.80 or 5 waiting. Up when the mean spare KV usage of the others is below 0.1 or the mean
    spare queue below 3: one on the cheapest variant that has no replica pending. Down when the load spread over one
    replica less leaves both: one off the most expensive variant.

    Args:
        fleet: the services.
        kv_threshold: KV usage of a saturated replica.
        queue_threshold: waiting requests of a saturated replica.
        kv_spare: spare KV usage that is kept.
        queue_spare: spare queue that is kept.
        stabilization_s: of the HPA behind, both ways, seconds.
    """

    name = "wva-v1"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("kv_threshold", 0.80, 0.02, 1.0, log=True, meaning="KV usage of a saturated replica"),
        Parameter("queue_threshold", 5.0, 0.5, 100.0, log=True, meaning="waiting requests of a saturated replica"),
        Parameter("kv_spare", 0.1, 0.005, 0.5, log=True, zero=True, meaning="spare KV usage that is kept"),
        Parameter("queue_spare", 3.0, 0.1, 50.0, log=True, zero=True, meaning="spare queue that is kept"),
        Parameter("stabilization_s", 240.0, 0.0, 1800.0, zero=True, meaning="of the HPA behind, both ways"),
    )

    def __init__(
        self,
        fleet: Fleet,
        kv_threshold: float = 0.80,
        queue_threshold: float = 5.0,
        kv_spare: float = 0.1,
        queue_spare: float = 3.0,
        stabilization_s: float = 240.0,
    ) -> None:
        super().__init__(fleet, stabilization_s)
        self.kv_threshold = kv_threshold
        self.queue_threshold = queue_threshold
        self.kv_spare = kv_spare
        self.queue_spare = queue_spare

    def analyse(self, snapshot: Snapshot, placed: Floats, kv: Floats, queue: Floats) -> Floats:
        """One step."""
        fleet, ready = self.fleet, snapshot.replicas_ready
        free = np.where((kv < self.kv_threshold) & (queue < self.queue_threshold), ready, 0.0)
        count = sum_pools(free)
        at_least = np.maximum(count, 1.0)
        kv_spare = sum_pools(free * (self.kv_threshold - kv)) / at_least
        queue_spare = sum_pools(free * (self.queue_threshold - queue)) / at_least
        any_ready = sum_pools(ready) > 0
        up = any_ready & ((count == 0) | (kv_spare < self.kv_spare - 1e-9) | (queue_spare < self.queue_spare - 1e-9))
        fewer = np.maximum(count - 1.0, 1.0)
        down = (
            (count >= 2)
            & (self.kv_threshold - sum_pools(free * kv) / fewer >= self.kv_spare - 1e-9)
            & (self.queue_threshold - sum_pools(free * queue) / fewer >= self.queue_spare - 1e-9)
            & ~up
        )
        pending = placed > ready
        price = np.where(fleet.exists, fleet.usd_per_replica_s, np.inf)
        growable = fleet.exists & ~pending & (placed < fleet.max_replicas)
        shrinkable = fleet.exists & (placed > fleet.min_replicas)
        rows = np.arange(len(fleet))
        cheapest = np.where(growable, price, np.inf).argmin(axis=1)
        dearest = np.where(shrinkable, price, -np.inf).argmax(axis=1)
        desired = placed.copy()
        desired[rows, cheapest] += up & growable[rows, cheapest]
        desired[rows, dearest] -= down & shrinkable[rows, dearest] & ~pending.any(axis=1)
        return desired


class WvaTokensPolicy(VariantPolicy):
    """V2: tokens of demand against token capacity per variant.

    ``demand = tokens in the caches + engine queue * prompt + gateway queue * (prompt * (1 - hit) + output)``;
    capacity of a replica ``min(0.8 * KV tokens, k2)``, where ``k2`` is what is in use when 5 wait, else the mean of
    the last ten such measurements for outputs of this length (below 100, below 500, longer), else ``N * (prompt +
    output / 2)`` with ``N = min(token budget * output / (prompt + output), max_num_seqs)``. ``demand / 0.85`` beyond
    the supply, starts included, is added cheapest per token first; supply beyond ``demand / 0.70`` is removed most
    expensive first, to one. A service that may have no replica has none after ten minutes without a request.

    Args:
        fleet: the services.
        scale_up_at: demand over supply above which replicas are added.
        scale_down_at: demand over supply below which they are removed.
        kv_threshold: share of the KV cache that counts as capacity.
        queue_threshold: waiting requests per replica that show a full replica.
        stabilization_s: of the HPA behind, both ways, seconds.
    """

    name = "wva-v2"
    PARAMETERS: ClassVar[tuple[Parameter, ...]] = (
        Parameter("scale_up_at", 0.85, 0.02, 1.0, log=True, meaning="demand over supply that adds replicas"),
        Parameter("scale_down_at", 0.70, 0.01, 1.0, log=True, meaning="demand over supply that removes them"),
        Parameter("kv_threshold", 0.8, 0.02, 1.0, log=True, meaning="share of the KV cache that is capacity"),
        Parameter("queue_threshold", 5.0, 0.5, 100.0, log=True, meaning="waiting that show a full replica"),
        Parameter("stabilization_s", 240.0, 0.0, 1800.0, zero=True, meaning="of the HPA behind, both ways"),
    )

    def __init__(
        self,
        fleet: Fleet,
        scale_up_at: float = 0.85,
        scale_down_at: float = 0.70,
        kv_threshold: float = 0.8,
        queue_threshold: float = 5.0,
        stabilization_s: float = 240.0,
    ) -> None:
        super().__init__(fleet, stabilization_s)
        n, pools = fleet.exists.shape
        self.scale_up_at = scale_up_at
        self.scale_down_at = scale_down_at
        self.kv_threshold = kv_threshold
        self.queue_threshold = queue_threshold
        self._prompt = np.full(n, np.nan)
        self._output = np.full(n, np.nan)
        self._measured = np.full((n, pools, 3, CAPACITY_SAMPLES), np.nan)
        self._busy_s = np.full(n, np.nan)

    def forget(self, rows: Bools) -> None:
        """Forget lengths and measured capacities."""
        self._prompt[rows] = self._output[rows] = self._busy_s[rows] = np.nan
        self._measured[rows] = np.nan

    def propose(self, observation: Observation) -> Target:
        """Remember lengths, then as the base."""
        snapshot = observation.snapshot
        self._prompt = np.where(np.isnan(snapshot.prompt_tokens_mean), self._prompt, snapshot.prompt_tokens_mean)
        self._output = np.where(np.isnan(snapshot.output_tokens_mean), self._output, snapshot.output_tokens_mean)
        busy = (snapshot.arrival_rps > 0) | np.isnan(snapshot.arrival_rps) | np.isnan(self._busy_s)
        self._busy_s = np.where(busy, snapshot.time_s, self._busy_s)
        return super().propose(observation)

    def analyse(self, snapshot: Snapshot, placed: Floats, kv: Floats, queue: Floats) -> Floats:
        """Capacity against demand; NaN, which holds, until a request has finished."""
        fleet, ready = self.fleet, snapshot.replicas_ready
        prompt, output = self._prompt, np.maximum(self._output, 1.0)
        in_use = kv * fleet.kv_capacity
        capacity = self._capacity(in_use, queue, prompt, output, ready)
        hit = 1.0 - np.divide(
            snapshot.prefill_tps, snapshot.prompt_tps, out=np.ones_like(prompt), where=snapshot.prompt_tps > 1e-6
        )
        hit = np.clip(np.nan_to_num(hit), 0.0, 1.0)
        gateway = snapshot.queue_requests * (prompt * (1.0 - hit) + output)
        demand = sum_pools(in_use * ready) + sum_pools(snapshot.waiting) * prompt + gateway
        supply = sum_pools(placed * capacity)
        price = np.where(fleet.exists, fleet.usd_per_replica_s / np.maximum(capacity, 1e-9), np.inf)
        idle = (snapshot.time_s - self._busy_s >= IDLE_S) & (sum_pools(placed) > 0)
        desired = _fill(placed, demand / self.scale_up_at - supply, capacity, price, fleet)
        desired = _drain(desired, supply - demand / self.scale_down_at, capacity, price, fleet)
        desired = np.where(idle[:, np.newaxis], fleet.min_replicas, desired)
        return np.where(np.isnan(demand)[:, np.newaxis], np.nan, desired)

    def _capacity(self, in_use: Floats, queue: Floats, prompt: Floats, output: Floats, ready: Floats) -> Floats:
        """Tokens (n, P) that a replica of each pool can hold, by the three ways to know."""
        fleet, rows = self.fleet, np.arange(len(self.fleet))
        bucket = np.where(output < SHORT_OUTPUT, 0, np.where(output < MEDIUM_OUTPUT, 1, 2))
        full = (queue >= self.queue_threshold) & (ready > 0) & (in_use > 0)
        history = self._measured[rows, :, bucket]
        self._measured[rows, :, bucket] = np.where(
            full[..., np.newaxis], np.concatenate([history[..., 1:], in_use[..., np.newaxis]], axis=-1), history
        )
        samples = (~np.isnan(history)).sum(axis=-1)
        remembered = np.nansum(history, axis=-1) / np.maximum(samples, 1)
        column = np.newaxis
        by_budget = MAX_NUM_BATCHED_TOKENS * output / np.maximum(prompt + output, 1.0)
        batch = np.minimum(by_budget[:, column], fleet.max_num_seqs)
        expected = batch * (prompt + output / 2.0)[:, column]
        compute = np.where(full, in_use, np.where(samples > 0, remembered, expected))
        return np.minimum(self.kv_threshold * fleet.kv_capacity, np.maximum(compute, 1.0))


def _fill(placed: Floats, required: Floats, capacity: Floats, price: Floats, fleet: Fleet) -> Floats:
    """Add replicas (n, P) until `required` (n,) tokens are covered, the lowest price per token first."""
    desired, left, rows = placed.copy(), np.maximum(required, 0.0), np.arange(len(fleet))
    order = np.argsort(price, axis=1, kind="stable")
    for rank in range(fleet.pools):
        pool = order[:, rank]
        room = np.maximum(fleet.max_replicas[rows, pool] - desired[rows, pool], 0.0)
        added = np.clip(np.ceil(left / capacity[rows, pool] - 1e-9), 0.0, room)
        added = np.where(fleet.exists[rows, pool], np.nan_to_num(added), 0.0)
        desired[rows, pool] += added
        left = np.maximum(left - added * capacity[rows, pool], 0.0)
    return desired


def _drain(placed: Floats, spare: Floats, capacity: Floats, price: Floats, fleet: Fleet) -> Floats:
    """Remove replicas (n, P) worth `spare` (n,) tokens at most, the highest price per token first; one stays."""
    desired, left, rows = placed.copy(), np.maximum(spare, 0.0), np.arange(len(fleet))
    order = np.argsort(np.where(fleet.exists, -price, np.inf), axis=1, kind="stable")
    for rank in range(fleet.pools):
        pool = order[:, rank]
        room = np.minimum(desired[rows, pool] - fleet.min_replicas[rows, pool], sum_pools(desired) - 1.0)
        removed = np.clip(np.floor(left / capacity[rows, pool] + 1e-9), 0.0, np.maximum(room, 0.0))
        removed = np.where(fleet.exists[rows, pool], np.nan_to_num(removed), 0.0)
        desired[rows, pool] -= removed
        left = left - removed * capacity[rows, pool]
    return desired
