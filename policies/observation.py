"""From snapshots to the features that a learned policy reads: one encoder, in training and in production.

Features are free of scale: demand and capacity in replicas of the service's own pools, times relative to objectives and
control windows, prices as ratios. Scalings are fixed (no running statistics beside the weights).
This module must not know about any particular policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.columns import any_pool, known, least, most, total
from policies.contract import Bools, Features, Floats, Ints, Observation, Snapshot, take_rows
from policies.demand import Demand, RequestMix, RunningContext, estimate_demand
from policies.fleet import Fleet
from policies.spec import WindowSpec

MEMORIES_S = (60.0, 300.0, 1800.0)
"""Time constants of the demand means."""
PEAK_MEMORY_S = 900.0
"""Decay of the remembered demand peak."""
MISS_MEMORY_S = 300.0
MISSING_STREAK = 10.0

FEATURES: tuple[str, ...] = (
    "log_demand_tokens_over_provisioned",
    "log_demand_occupancy_over_provisioned",
    "log_demand_over_mean_60s",
    "log_mean_60s_over_mean_300s",
    "log_mean_300s_over_mean_1800s",
    "log_peak_over_mean_300s",
    "demand_variation_300s",
    "log_provisioned",
    "provisioned_over_maximum",
    "ready_over_provisioned",
    "starting_soon_over_provisioned",
    "starting_mid_over_provisioned",
    "starting_late_over_provisioned",
    "draining_over_provisioned",
    "spot_share_of_capacity",
    "spot_offered",
    "spot_price_ratio",
    "queue_over_limit",
    "oldest_wait_over_ttft_slo",
    "occupancy_of_cap",
    "kv_cache_usage",
    "batch_cap_over_limit",
    "limit_over_max_num_seqs",
    "ttft_miss_rate",
    "tpot_miss_rate",
    "log_recent_miss_rate_over_allowed",
    "latency_unknown",
    "blind_streak",
    "prefill_share_of_work",
    "log_request_seconds",
    "log_cold_start",
    "log_ttft_slo",
    "log_tpot_slo_over_step",
    "log_miss_price",
    "log_allowed_miss_rate",
    "since_scale_up",
    "since_scale_down",
)

STATIC_FEATURES = (
    "spot_offered",
    "spot_price_ratio",
    "log_cold_start",
    "log_ttft_slo",
    "log_tpot_slo_over_step",
    "log_miss_price",
    "log_allowed_miss_rate",
)
_COLUMN = {name: column for column, name in enumerate(FEATURES)}
_STATIC_ROWS = [_COLUMN[name] for name in STATIC_FEATURES]


def _log(ratio: Floats, limit: float = 4.0) -> Floats:
    return np.clip(np.log(np.maximum(ratio, 1e-6)), -limit, limit)


def encode_miss_price(log_miss_price: Floats) -> Floats:
    """The feature `log_miss_price`, which a policy's error budget may overwrite."""
    return (log_miss_price - 3.0) / 2.0


class ObservationBuilder:
    """Encodes snapshots of `n` services; keeps the short history that the features need.

    Args:
        fleet: the services. Rows may be overwritten between episodes; call `reset` for them.
        window: control interval and metrics delay.
    """

    def __init__(self, fleet: Fleet, window: WindowSpec) -> None:
        n = len(fleet)
        self.fleet = fleet
        self.window = window
        self._mix = RequestMix(n)
        self._context = RunningContext(n)
        self._means = np.full((len(MEMORIES_S), n), np.nan)
        self._variance = np.zeros(n)
        self._peak = np.zeros(n)
        self._misses = np.zeros(n)
        self._latency = np.zeros((2, n))
        self._blind_streak = np.zeros(n)
        self._last_target = np.full(n, np.nan)
        self._since_up_s = np.full(n, 1e6)
        self._since_down_s = np.full(n, 1e6)
        self._demand = np.full((len(Demand._fields), fleet.pools, n), np.nan)  # last known; services last
        self._demand_mean = np.full((fleet.pools, n), np.nan)
        self._static = _static_features(fleet)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the masked services, of all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        self._mix.reset(rows)
        self._context.reset(rows)
        self._means[:, rows] = np.nan
        for history in (self._variance, self._peak, self._misses, self._blind_streak):
            history[rows] = 0.0
        self._latency[:, rows] = 0.0
        self._demand[..., rows] = np.nan
        self._demand_mean[:, rows] = np.nan
        self._static = _static_features(self.fleet)
        self._last_target[rows] = np.nan
        self._since_up_s[rows] = 1e6
        self._since_down_s[rows] = 1e6

    def observe(self, snapshot: Snapshot) -> Observation:
        """Encode one window. Must be called exactly once per tick and snapshot."""
        fleet = self.fleet
        self._mix.update(snapshot)
        self._context.update(snapshot, fleet)
        # In a blind window the last known demand stands.
        blind = snapshot.blind()
        new = np.stack([estimate.T for estimate in estimate_demand(snapshot, fleet, self._mix, self._context.tokens)])
        used = np.where(blind & ~np.isnan(self._demand), self._demand, new)
        self._demand = np.where(blind, self._demand, new)
        demand = Demand(*used.transpose(0, 2, 1))
        larger = np.maximum(demand.tokens, demand.occupancy)
        share = 1.0 - np.exp(-known(snapshot.window_s) / MEMORIES_S[1])
        moved = self._demand_mean + share * (larger.T - self._demand_mean)
        self._demand_mean = np.where(np.isnan(moved), larger.T, moved)
        self._remember(snapshot, larger[:, 0], blind)
        features = self._encode(snapshot, demand, larger)
        return Observation(
            snapshot=snapshot,
            features=features,
            demand_tokens=demand.tokens,
            demand_occupancy=demand.occupancy,
            demand=larger,
            demand_mean=self._demand_mean.T,
            batch_limit=demand.batch_limit,
        )

    def observe_rows(self, snapshot: Snapshot, rows: Ints) -> Observation:
        """Start the listed services (k,) anew with the first window of each; the others keep their history.

        Args:
            snapshot: of the listed services only.
            rows: which services they are.
        """
        fresh = ObservationBuilder(take_rows(self.fleet, rows), self.window)
        observation = fresh.observe(snapshot)
        for name, history in vars(self).items():
            if isinstance(history, np.ndarray):
                history[..., rows] = getattr(fresh, name)
        self._mix.adopt(fresh._mix, rows)
        self._context.adopt(fresh._context, rows)
        return observation

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The history, as arrays with leading axis n."""
        return {f"{part}.{name}": np.moveaxis(array, -1, 0) for part, name, array in self._histories()}

    def restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` returned."""
        for part, name, array in self._histories():
            array[...] = np.moveaxis(state[f"{part}.{name}"], 0, -1)

    def _histories(self) -> list[tuple[str, str, npt.NDArray[Any]]]:
        """Every array that changes from tick to tick, services last."""
        parts = {"observation": self, "mix": self._mix, "context": self._context}
        return [
            (part, name.lstrip("_"), array)
            for part, owner in parts.items()
            for name, array in vars(owner).items()
            if isinstance(array, np.ndarray) and name != "_static"
        ]

    def _remember(self, snapshot: Snapshot, first: Floats, blind: Bools) -> None:
        """Update the memories; `first` (n,) is the demand in replicas of each service's first pool."""
        interval_s = known(snapshot.window_s)
        self._blind_streak = np.where(blind, self._blind_streak + 1.0, 0.0)
        for row, memory_s in enumerate(MEMORIES_S):
            old = self._means[row]
            share = 1.0 - np.exp(-interval_s / memory_s)
            moved = old + share * (first - old)
            self._means[row] = np.where(blind, old, np.where(np.isnan(old), first, moved))
        share = 1.0 - np.exp(-interval_s / MEMORIES_S[1])
        spread = (first - self._means[1]) ** 2
        self._variance = np.where(blind, self._variance, self._variance + share * (spread - self._variance))
        self._peak = np.where(blind, self._peak, np.maximum(first, self._peak * np.exp(-interval_s / PEAK_MEMORY_S)))

        ttft_miss = 1.0 - snapshot.ttft_attainment
        tpot_miss = 1.0 - snapshot.tpot_attainment
        for row, miss in enumerate((ttft_miss, tpot_miss)):
            self._latency[row] = np.where(np.isnan(miss), self._latency[row], miss)
        worst = np.fmax(ttft_miss, tpot_miss)
        share = 1.0 - np.exp(-interval_s / MISS_MEMORY_S)
        self._misses = np.where(np.isnan(worst), self._misses, self._misses + share * (worst - self._misses))

        wanted = total(snapshot.replicas_target)
        up, down = wanted > self._last_target, wanted < self._last_target
        self._since_up_s = np.where(up, 0.0, self._since_up_s + interval_s)
        self._since_down_s = np.where(down, 0.0, self._since_down_s + interval_s)
        self._last_target = np.where(np.isnan(wanted), self._last_target, wanted)

    def _encode(self, snapshot: Snapshot, demand: Demand, needs: Floats) -> Features:
        tokens, occupancy, batch_limit = demand
        first = needs[:, 0]
        fleet = self.fleet
        ready = known(snapshot.replicas_ready)
        starting = known(snapshot.replicas_starting)
        provisioned = total(ready + starting)
        base = np.maximum(provisioned, 0.5)
        # The same in replicas of the first pool, the unit of the demand.
        worth = np.divide(needs[:, :1], needs, out=np.ones_like(needs), where=needs > 1e-6)
        capacity = np.maximum(total((ready + starting) * worth), 0.5)
        maximum = np.maximum(total(fleet.max_replicas), 1)
        boot = total(known(snapshot.boot_pipeline))
        spot = total(np.where(fleet.is_spot, ready + starting, 0.0))
        mean_60, mean_300, mean_1800 = np.fmax(self._means, 1e-3)
        limit = batch_limit[:, 0]
        cap = known(snapshot.batch_cap[:, 0], 1.0)
        running = total(known(snapshot.running))
        queue = known(snapshot.queue_requests) + total(known(snapshot.waiting))
        ready_sum = total(ready)
        ready_all = np.maximum(ready_sum, 0.5)
        allowed = 1.0 - fleet.attainment_target
        decode_s = known(snapshot.generation_tps) * (fleet.a[:, 0] / limit + fleet.c[:, 0])
        prefill_s = known(snapshot.prefill_tps) * fleet.b[:, 0]
        output = known(self._mix.output_tokens, 200.0)
        row = _COLUMN
        encoded = np.empty((len(FEATURES), len(fleet)))
        ratios = (
            ("log_demand_tokens_over_provisioned", tokens[:, 0] / capacity),
            ("log_demand_occupancy_over_provisioned", occupancy[:, 0] / capacity),
            ("log_demand_over_mean_60s", np.maximum(first, 1e-3) / mean_60),
            ("log_mean_60s_over_mean_300s", mean_60 / mean_300),
            ("log_mean_300s_over_mean_1800s", mean_300 / mean_1800),
            ("log_peak_over_mean_300s", np.maximum(self._peak, 1e-3) / mean_300),
            ("batch_cap_over_limit", cap / limit),
            ("log_recent_miss_rate_over_allowed", (self._misses + 0.1 * allowed) / allowed),
            ("log_request_seconds", output * fleet.tpot_slo_s / 10.0),
        )
        logs = _log(np.array([ratio for _, ratio in ratios]))
        for (name, _), values in zip(ratios, logs, strict=True):
            encoded[row[name]] = values
        for name, values, limit_at in (
            ("demand_variation_300s", np.sqrt(self._variance) / mean_300, 3.0),
            ("log_provisioned", 0.5 * np.log1p(provisioned), 4.0),
            ("provisioned_over_maximum", provisioned / maximum, 2.0),
            ("ready_over_provisioned", ready_sum / base, 1.0),
            ("starting_soon_over_provisioned", boot[:, 0] / base, 2.0),
            ("starting_mid_over_provisioned", boot[:, 1] / base, 2.0),
            ("starting_late_over_provisioned", boot[:, 2] / base, 2.0),
            ("draining_over_provisioned", total(known(snapshot.replicas_draining)) / base, 2.0),
            ("spot_share_of_capacity", spot / base, 1.0),
            ("queue_over_limit", np.log1p(queue / (limit * ready_all)), 4.0),
            ("oldest_wait_over_ttft_slo", known(snapshot.oldest_wait_s) / fleet.ttft_slo_s, 4.0),
            ("occupancy_of_cap", running / np.maximum(cap * ready_all, 1.0), 1.5),
            ("kv_cache_usage", most(known(np.where(fleet.exists, snapshot.kv_cache_usage, 0.0))), 1.0),
            ("limit_over_max_num_seqs", limit / fleet.max_num_seqs[:, 0], 1.0),
            ("blind_streak", self._blind_streak / MISSING_STREAK, 1.0),
            ("prefill_share_of_work", prefill_s / np.maximum(prefill_s + decode_s, 1e-9), 1.0),
        ):
            np.minimum(values, limit_at, out=encoded[row[name]])
        encoded[row["ttft_miss_rate"]] = self._latency[0]
        encoded[row["tpot_miss_rate"]] = self._latency[1]
        encoded[row["latency_unknown"]] = np.isnan(snapshot.ttft_attainment)
        encoded[row["since_scale_up"]] = np.exp(-self._since_up_s / 120.0)
        encoded[row["since_scale_down"]] = np.exp(-self._since_down_s / 120.0)
        encoded[_STATIC_ROWS] = self._static
        return np.ascontiguousarray(encoded.T, np.float32)


def _static_features(fleet: Fleet) -> Floats:
    """Rows of STATIC_FEATURES (k, n): what does not change within an episode."""
    on_demand, spot = fleet.exists & ~fleet.is_spot, fleet.exists & fleet.is_spot
    offered = any_pool(spot)
    on_demand_price = least(np.where(on_demand, fleet.usd_per_replica_s, np.inf))
    spot_price = least(np.where(spot, fleet.usd_per_replica_s, np.inf))
    both = offered & any_pool(on_demand)
    ratio = np.divide(spot_price, on_demand_price, out=np.ones(len(fleet)), where=both)
    return np.stack(
        [
            offered.astype(float),
            np.clip(ratio, 0.0, 2.0),
            _log((fleet.cold_start_s[:, 0] + 10.0) / 120.0),
            _log(fleet.ttft_slo_s),
            _log(fleet.tpot_slo_s / fleet.a[:, 0]),
            encode_miss_price(fleet.log_miss_price),
            _log((1.0 - fleet.attainment_target) / 0.01),
        ]
    )
