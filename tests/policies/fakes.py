"""Hand-made specs, snapshots and observations with round numbers, and policies that answer from a script."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from policies.contract import BOOT_BINS, TPOT_EDGES_S, TTFT_EDGES_S, Bools, Floats, Observation, Snapshot, Target
from policies.engine import ColdStart, EngineProfile, StepModel
from policies.fleet import Fleet
from policies.observation import FEATURES
from policies.spec import PoolSpec, ScalingSpec, Slo

SNAPSHOT_FIELDS = tuple(field.name for field in fields(Snapshot))
POOL_FIELDS = (
    "replicas_target",
    "replicas_starting",
    "replicas_ready",
    "replicas_draining",
    "boot_pipeline",
    "running",
    "waiting",
    "kv_cache_usage",
    "batch_cap",
)
HISTOGRAMS = {"ttft_histogram_rps": len(TTFT_EDGES_S) + 1, "tpot_histogram_rps": len(TPOT_EDGES_S) + 1}
SHARES = ("ttft_attainment", "tpot_attainment", "kv_cache_usage")
# A healthy service: 2 requests a second of 100 prompt and 200 output tokens on two replicas per pool.
HEALTHY: dict[str, Any] = {
    "time_s": 100.0,
    "window_s": 15.0,
    "arrival_rps": 2.0,
    "prompt_tps": 200.0,
    "prefill_tps": 200.0,
    "generation_tps": 400.0,
    "finished_rps": 2.0,
    "prompt_tokens_mean": 100.0,
    "output_tokens_mean": 200.0,
    "queue_requests": 0.0,
    "oldest_wait_s": 0.0,
    "ttft_attainment": 1.0,
    "tpot_attainment": 1.0,
    "ttft_histogram_rps": [0.0, 2.0] + [0.0] * (len(TTFT_EDGES_S) - 1),  # 50 to 100 ms
    "tpot_histogram_rps": [0.0, 0.0, 2.0] + [0.0] * (len(TPOT_EDGES_S) - 2),  # 10 to 15 ms
    "replicas_target": 2.0,
    "replicas_starting": 0.0,
    "replicas_ready": 2.0,
    "replicas_draining": 0.0,
    "boot_pipeline": 0.0,
    "running": 8.0,
    "waiting": 0.0,
    "kv_cache_usage": 0.008,  # 200 tokens a request, the mean context of the lengths above
    "batch_cap": 64.0,
}


def engine(**overrides: Any) -> EngineProfile:
    """10 ms an iteration, 100 us a prefill token, 100 us a sequence, 0.1 us a context token; 0.001 $ a second."""
    profile: dict[str, Any] = {
        "name": "round",
        "model": "model",
        "gpu": "gpu",
        "backend": "engine",
        "precision": "bf16",
        "gpus_per_replica": 1,
        "gpus_per_node": 8,
        "step": StepModel(
            a_ms=10.0,
            b_us_per_prefill_token=100.0,
            c_us_per_seq=100.0,
            d_us_per_1k_kv_tokens=100.0,
            e_ns_per_prefill_token2=0.0,
        ),
        "kv_capacity_tokens": 100_000,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "cold_start": ColdStart(node_s=60.0, image_s=20.0, weights_s=30.0, warmup_s=10.0),
        "usd_per_gpu_hour": 3.6,
        "fitted_on": "round numbers",
    }
    return EngineProfile(**{**profile, **overrides})


def pool(**overrides: Any) -> PoolSpec:
    return PoolSpec(**{"engine": engine(), "min_replicas": 1, "max_replicas": 20, **overrides})


def spot(**overrides: Any) -> PoolSpec:
    return pool(**{"name": "spot", "price_class": "spot", "usd_per_gpu_hour": 1.8, "min_replicas": 0, **overrides})


def spec(*pools: PoolSpec, **overrides: Any) -> ScalingSpec:
    return ScalingSpec(**{"slo": Slo(ttft_s=2.0, tpot_s=0.05), "pools": pools or (pool(),), **overrides})


def fleet(*pools: PoolSpec, n: int = 1, width: int | None = None, **overrides: Any) -> Fleet:
    return Fleet.from_specs([spec(*pools, **overrides)] * n, width)


def shape_of(name: str, n: int, pools: int) -> tuple[int, ...]:
    if name == "boot_pipeline":
        return (n, pools, BOOT_BINS)
    if name in HISTOGRAMS:
        return (n, HISTOGRAMS[name])
    return (n, pools) if name in POOL_FIELDS else (n,)


def snapshot(n: int = 1, pools: int = 1, **overrides: Any) -> Snapshot:
    """A healthy service, `n` times; every override is broadcast to its field's shape."""
    unknown = set(overrides) - set(SNAPSHOT_FIELDS)
    assert not unknown, unknown
    return Snapshot(
        **{
            name: np.broadcast_to(np.asarray(overrides.get(name, value), np.float64), shape_of(name, n, pools)).copy()
            for name, value in HEALTHY.items()
        }
    )


def missing(n: int = 1, pools: int = 1, **overrides: Any) -> Snapshot:
    """A window of which nothing is known but its time."""
    blank = dict.fromkeys(SNAPSHOT_FIELDS, np.nan)
    return snapshot(n, pools, **{**blank, "time_s": 100.0, "window_s": 15.0, **overrides})


def observation(seen: Snapshot, demand: npt.ArrayLike = 1.0, batch_limit: npt.ArrayLike = 64.0) -> Observation:
    """A snapshot with a given demand, nothing encoded."""
    shape = seen.replicas_ready.shape
    wanted: Floats = np.broadcast_to(np.asarray(demand, np.float64), shape).copy()
    limit: Floats = np.broadcast_to(np.asarray(batch_limit, np.float64), shape).copy()
    features = np.zeros((shape[0], len(FEATURES)), np.float32)
    return Observation(
        snapshot=seen,
        blind=seen.blind(),
        features=features,
        demand_tokens=wanted,
        demand_occupancy=wanted.copy(),
        demand=wanted.copy(),
        demand_mean=wanted.copy(),
        batch_limit=limit,
        offered_load=wanted[:, 0].copy(),
        offered_load_error=np.full(shape[0], 0.01),
    )


def target(replicas: npt.ArrayLike, batch_cap: npt.ArrayLike = 64) -> Target:
    """Rows of replicas (a flat list is one row); the cap is broadcast."""
    wanted = np.atleast_2d(np.asarray(replicas, np.int64))
    return Target(replicas=wanted, batch_cap=np.broadcast_to(np.asarray(batch_cap, np.int64), wanted.shape).copy())


def rows_of(seen: Snapshot, row: int, pools: int) -> Snapshot:
    """One service of a snapshot as its own snapshot with its own number of pools."""
    taken = {name: getattr(seen, name)[row : row + 1] for name in SNAPSHOT_FIELDS}
    return Snapshot(**{name: value[:, :pools] if name in POOL_FIELDS else value for name, value in taken.items()})


def random_snapshot(
    rng: np.random.Generator, services: Fleet, time_s: float, missing_share: float = 0.0, window_s: float = 15.0
) -> Snapshot:
    """Any plausible or implausible window; each number missing with the given chance, absent pools hold 0."""
    n, pools = services.exists.shape
    values: dict[str, Floats] = {}
    for name in SNAPSHOT_FIELDS:
        shape = shape_of(name, n, pools)
        drawn = rng.random(shape) if name in SHARES else np.floor(rng.exponential(20.0, shape))
        drawn[rng.random(shape) < missing_share] = np.nan
        if name in POOL_FIELDS:
            drawn = np.where(services.exists.reshape(n, pools, *([1] * (drawn.ndim - 2))), drawn, 0.0)
        values[name] = drawn
    values["time_s"] = np.full(n, time_s)
    values["window_s"] = np.full(n, window_s)
    return Snapshot(**values)


@st.composite
def snapshots(draw: st.DrawFn, n: int, pools: int) -> Snapshot:
    """Any window: zeros, huge values and missing ones in every field, time included."""
    values: dict[str, Floats] = {}
    for name in SNAPSHOT_FIELDS:
        most = 1.0 if name in SHARES else 1e6
        elements = st.sampled_from([0.0, np.nan, most]) | st.floats(0.0, most)
        values[name] = draw(hnp.arrays(np.float64, shape_of(name, n, pools), elements=elements))
    return Snapshot(**values)


class ScriptedPolicy:
    """Proposes the targets of a list, one after the other, the last one for ever."""

    name = "scripted"

    def __init__(self, *script: Target) -> None:
        self._script = list(script)

    def reset(self, services: Bools | None = None) -> None:
        """Nothing to forget."""

    def propose(self, observation: Observation) -> Target:
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]
