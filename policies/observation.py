"""From snapshots to the features that a learned policy reads: one encoder, in training and in production.

Features are free of scale: demand and capacity in replicas of the service's own pools, times relative to objectives and
control windows, prices as ratios. Scalings are fixed (no running statistics beside the weights).
This module must not know about any particular policy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from policies.contract import Bools, Features, Floats, Ints, Observation, Snapshot, take_rows
from policies.demand import Demand, RequestMix, estimate_demand
from policies.fleet import Fleet
from policies.pool_arrays import any_pool, clip, max_pools, min_pools, nan_to_zero, sum_pools
from policies.spec import WindowSpec

MEMORIES_S = (60.0, 300.0, 1800.0)
"""Time constants of the demand means; the second one is also that of the variation and of the miss rate."""
PEAK_MEMORY_S = 900.0
"""Decay of the remembered demand peak."""
SCALING_MEMORY_S = 120.0
"""Decay of the remembrance of a scale-up or scale-down."""
MISSING_STREAK = 10.0
WORK_SPREAD = 1.5
"""Standard deviation of the work that a Poisson process brings, over that of its count: the root of 1 plus the square
of the work's coefficient of variation, which is about 1.1 in chat, code and reasoning."""

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
LOGS = (
    "log_demand_tokens_over_provisioned",
    "log_demand_occupancy_over_provisioned",
    "log_demand_over_mean_60s",
    "log_mean_60s_over_mean_300s",
    "log_mean_300s_over_mean_1800s",
    "log_peak_over_mean_300s",
    "batch_cap_over_limit",
    "log_recent_miss_rate_over_allowed",
    "log_request_seconds",
)
"""Features that are the natural log of a ratio, within -4..4."""
MIN_RATIO, MAX_RATIO = math.exp(-4.0), math.exp(4.0)
CEILINGS = {
    "demand_variation_300s": 3.0,
    "log_provisioned": 4.0,
    "provisioned_over_maximum": 2.0,
    "ready_over_provisioned": 1.0,
    "starting_soon_over_provisioned": 2.0,
    "starting_mid_over_provisioned": 2.0,
    "starting_late_over_provisioned": 2.0,
    "draining_over_provisioned": 2.0,
    "spot_share_of_capacity": 1.0,
    "queue_over_limit": 4.0,
    "oldest_wait_over_ttft_slo": 4.0,
    "occupancy_of_cap": 1.5,
    "kv_cache_usage": 1.0,
    "limit_over_max_num_seqs": 1.0,
    "blind_streak": 1.0,
    "prefill_share_of_work": 1.0,
}
"""Upper limits of the features that are no logs."""
_LOG_ROWS = [FEATURES.index(name) for name in LOGS]
_CEILINGS = np.array([[CEILINGS.get(name, np.inf)] for name in FEATURES], np.float32)
_DECAY_S = np.array([*MEMORIES_S, PEAK_MEMORY_S, SCALING_MEMORY_S])[:, np.newaxis]


def _log(ratio: npt.NDArray[Any]) -> Floats:
    logs: Floats = np.log(clip(ratio, MIN_RATIO, MAX_RATIO))
    return logs


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
        # The services are the last axis of every memory.
        self._demand = np.full((len(Demand._fields), fleet.pools, n), np.nan)  # last known
        self._means = np.full((len(MEMORIES_S), fleet.pools, n), np.nan)
        self._offered = np.full((2, n), np.nan)  # means of the offered load and of the arrivals per second
        self._variance = np.zeros(n)
        self._peak = np.zeros(n)
        self._miss_rate = np.zeros((2, n))  # last known, of TTFT and TPOT
        self._recent_misses = np.zeros(n)
        self._blind_streak = np.zeros(n)
        self._last_target = np.full(n, np.nan)
        self._recent_scaling = np.zeros((2, n))  # up and down: 1 at the event, fading
        self._static = _static_features(fleet)

    def reset(self, services: Bools | None = None) -> None:
        """Forget the history of the masked services, of all when None."""
        rows = np.ones(len(self.fleet), bool) if services is None else services
        self._mix.reset(rows)
        for unknown in (self._demand, self._means, self._offered, self._last_target):
            unknown[..., rows] = np.nan
        for history in (
            self._variance,
            self._peak,
            self._miss_rate,
            self._recent_misses,
            self._blind_streak,
            self._recent_scaling,
        ):
            history[..., rows] = 0.0
        self._static = _static_features(self.fleet)

    def observe(self, snapshot: Snapshot) -> Observation:
        """Encode one window. Must be called exactly once per tick and snapshot."""
        self._mix.update(snapshot, self.fleet)
        blind = snapshot.blind()
        new = np.array([estimate.T for estimate in estimate_demand(snapshot, self.fleet, self._mix)])
        if blind.any():
            # In a blind window the last known demand stands.
            used = np.where(blind & ~np.isnan(self._demand), self._demand, new)
            self._demand = np.where(blind, self._demand, new)
        else:
            used = self._demand = new
        larger = np.maximum(used[0], used[1])
        self._remember(snapshot, larger, blind)
        self._remember_offered(snapshot, used[3, 0])
        features = self._encode(snapshot, used, larger)
        tokens, occupancy, batch_limit, _ = used
        demand_mean = self._means[1]
        if blind.any():
            demand_mean = np.where(np.isnan(demand_mean), larger, demand_mean)
        return Observation(
            snapshot=snapshot,
            blind=blind,
            features=features,
            demand_tokens=tokens.T,
            demand_occupancy=occupancy.T,
            demand=larger.T,
            demand_mean=demand_mean.T,
            batch_limit=batch_limit.T,
            offered_load=self._offered[0],
            offered_load_error=self._offered_error(),
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
        parts = {"observation": self, "mix": self._mix}
        return [
            (part, name.lstrip("_"), array)
            for part, owner in parts.items()
            for name, array in vars(owner).items()
            if isinstance(array, np.ndarray) and name != "_static"
        ]

    def _remember(self, snapshot: Snapshot, demand: Floats, blind: Bools) -> None:
        """Update the memories; `demand` (P, n) is in replicas."""
        decay = np.exp(nan_to_zero(snapshot.window_s) / -_DECAY_S)
        share = 1.0 - decay[: len(MEMORIES_S)]
        first, share_300 = demand[0], share[1]
        moved = self._means + share[:, np.newaxis] * (demand - self._means)
        means = np.where(np.isnan(moved), demand, moved)
        spread = first - means[1, 0]
        variance = self._variance + share_300 * (spread * spread - self._variance)
        peak = np.maximum(first, self._peak * decay[3])
        self._blind_streak = (self._blind_streak + 1.0) * blind
        if blind.any():
            for new, old in ((means, self._means), (variance, self._variance), (peak, self._peak)):
                new[..., blind] = old[..., blind]
        self._means, self._variance, self._peak = means, variance, peak

        missed = 1.0 - np.array([snapshot.ttft_attainment, snapshot.tpot_attainment])
        self._miss_rate = np.where(np.isnan(missed), self._miss_rate, missed)
        moved = self._recent_misses + share_300 * (np.fmax(missed[0], missed[1]) - self._recent_misses)
        self._recent_misses = np.where(np.isnan(moved), self._recent_misses, moved)

        wanted = sum_pools(snapshot.replicas_target)
        change = wanted - self._last_target
        self._recent_scaling = np.where(np.array([change > 0, change < 0]), 1.0, self._recent_scaling * decay[4])
        self._last_target = np.where(np.isnan(wanted), self._last_target, wanted)

    def _remember_offered(self, snapshot: Snapshot, offered: Floats) -> None:
        """Update the means of the offered load (n,) and of the arrivals, each by the windows in which it is known.

        Where nothing counts arrivals, the offered load is what is served, and its error stays unknown.
        """
        new = np.array([offered, snapshot.arrival_rps])
        moved = self._offered + (1.0 - np.exp(nan_to_zero(snapshot.window_s) / -MEMORIES_S[1])) * (new - self._offered)
        first = np.where(np.isnan(self._offered), new, self._offered)
        self._offered = np.where(np.isnan(moved), first, moved)

    def _offered_error(self) -> Floats:
        """(n,) relative standard error of the mean offered load, were its arrivals a Poisson process.

        An exponential mean with time constant `t` is as good as the plain one over `2 t`.
        """
        requests = 2.0 * MEMORIES_S[1] * self._offered[1]
        return np.where(requests > 0, WORK_SPREAD / np.sqrt(np.fmax(requests, 1e-12)), np.inf)

    def _encode(self, snapshot: Snapshot, estimates: Floats, demand: Floats) -> Features:
        """Features (n, F) from the `estimates` (4, P, n) of a `Demand` and the larger `demand` (P, n)."""
        fleet = self.fleet
        tokens, occupancy, limit, _ = estimates[:, 0]
        first = demand[0]
        by_pool = nan_to_zero(
            np.array(
                [
                    snapshot.replicas_ready.T,
                    snapshot.replicas_starting.T,
                    snapshot.replicas_draining.T,
                    snapshot.running.T,
                    snapshot.waiting.T,
                    *snapshot.boot_pipeline.transpose(2, 1, 0),
                ]
            )
        )
        held = by_pool[0] + by_pool[1]  # (P, n) ready or on their way
        ready, starting, draining, running, waiting, *boot = sum_pools(by_pool)
        queue, oldest_wait_s, generation_tps, prefill_tps = nan_to_zero(
            np.array([snapshot.queue_requests, snapshot.oldest_wait_s, snapshot.generation_tps, snapshot.prefill_tps])
        )
        provisioned = ready + starting
        # Shares of the fleet; half a replica stands for none.
        shares = np.array([ready, *boot, draining, sum_pools((held * fleet.is_spot.T).T)]) / np.maximum(
            provisioned, 0.5
        )
        # The same in replicas of the first pool, the unit of the demand.
        worth = np.maximum(first, 1e-6) / np.maximum(demand, 1e-6)
        capacity = np.maximum(sum_pools((held * worth).T), 0.5)
        mean_60, mean_300, mean_1800 = np.fmax(self._means[:, 0], 1e-3)
        cap = np.fmax(snapshot.batch_cap[:, 0], 1.0)
        servers = np.maximum(ready, 0.5)
        allowed = 1.0 - fleet.attainment_target
        decode_s = generation_tps * (fleet.a[:, 0] / limit + fleet.c[:, 0])
        prefill_s = prefill_tps * fleet.b[:, 0]
        values = dict(zip(STATIC_FEATURES, self._static, strict=True))
        values |= {
            "log_demand_tokens_over_provisioned": tokens / capacity,
            "log_demand_occupancy_over_provisioned": occupancy / capacity,
            "log_demand_over_mean_60s": np.maximum(first, 1e-3) / mean_60,
            "log_mean_60s_over_mean_300s": mean_60 / mean_300,
            "log_mean_300s_over_mean_1800s": mean_300 / mean_1800,
            "log_peak_over_mean_300s": np.maximum(self._peak, 1e-3) / mean_300,
            "demand_variation_300s": np.sqrt(self._variance) / mean_300,
            "log_provisioned": 0.5 * np.log1p(provisioned),
            "provisioned_over_maximum": provisioned / np.maximum(sum_pools(fleet.max_replicas), 1),
            "ready_over_provisioned": shares[0],
            "starting_soon_over_provisioned": shares[1],
            "starting_mid_over_provisioned": shares[2],
            "starting_late_over_provisioned": shares[3],
            "draining_over_provisioned": shares[4],
            "spot_share_of_capacity": shares[5],
            "queue_over_limit": np.log1p((queue + waiting) / (limit * servers)),
            "oldest_wait_over_ttft_slo": oldest_wait_s / fleet.ttft_slo_s,
            "occupancy_of_cap": running / np.maximum(cap * servers, 1.0),
            "kv_cache_usage": max_pools(nan_to_zero(snapshot.kv_cache_usage)),
            "batch_cap_over_limit": cap / limit,
            "limit_over_max_num_seqs": limit / fleet.max_num_seqs[:, 0],
            "ttft_miss_rate": self._miss_rate[0],
            "tpot_miss_rate": self._miss_rate[1],
            "log_recent_miss_rate_over_allowed": (self._recent_misses + 0.1 * allowed) / allowed,
            "latency_unknown": np.isnan(snapshot.ttft_attainment),
            "blind_streak": self._blind_streak / MISSING_STREAK,
            "prefill_share_of_work": prefill_s / np.maximum(prefill_s + decode_s, 1e-9),
            "log_request_seconds": self._mix.lengths()[1] * (0.1 * fleet.tpot_slo_s),
            "since_scale_up": self._recent_scaling[0],
            "since_scale_down": self._recent_scaling[1],
        }
        encoded = np.array([values[name] for name in FEATURES], np.float32)
        encoded[_LOG_ROWS] = _log(encoded[_LOG_ROWS])
        return np.minimum(encoded, _CEILINGS).T.copy()


def _static_features(fleet: Fleet) -> Floats:
    """Rows of STATIC_FEATURES (k, n): what does not change within an episode."""
    on_demand, spot = fleet.exists & ~fleet.is_spot, fleet.exists & fleet.is_spot
    offered = any_pool(spot)
    on_demand_price = min_pools(np.where(on_demand, fleet.usd_per_replica_s, np.inf))
    spot_price = min_pools(np.where(spot, fleet.usd_per_replica_s, np.inf))
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
