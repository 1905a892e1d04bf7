"""The macro-stepped kernel against the iteration-by-iteration reference, request by request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_cluster import ReferencePool, simulate

from envs.cluster.library import RequestLibrary
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Target
from policies.engine import ColdStart, EngineProfile, StepModel
from policies.spec import PoolSpec, ScalingSpec, Slo, WindowSpec

TOLERANCE_S = 1e-9


def profile(
    a_ms: float = 6.0,
    kv: int = 2000,
    seqs: int = 8,
    budget: int = 128,
    b: float = 27.0,
    c: float = 20.0,
    d: float = 440.0,
    e: float = 1.0,
) -> EngineProfile:
    return EngineProfile(
        name="test",
        model="m",
        gpu="g",
        backend="b",
        precision="bf16",
        gpus_per_replica=1,
        gpus_per_node=8,
        step=StepModel(
            a_ms=a_ms,
            b_us_per_prefill_token=b,
            c_us_per_seq=c,
            d_us_per_1k_kv_tokens=d,
            e_ns_per_prefill_token2=e,
        ),
        kv_capacity_tokens=kv,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        cold_start=ColdStart(node_s=0, image_s=0, weights_s=0, warmup_s=0),
        usd_per_gpu_hour=1.0,
        fitted_on="nothing: a test",
    )


def cluster_of(pools: list[ReferencePool], trace: Trace) -> SimulatedCluster:
    spec = ScalingSpec(
        slo=Slo(ttft_s=1.0, tpot_s=0.05),
        pools=tuple(
            PoolSpec(
                name=f"pool{i}",
                engine=pool.profile,
                min_replicas=0,
                max_replicas=max(pool.replicas, 1),
                initial_replicas=pool.replicas,
                initial_batch_cap=pool.batch_cap,
            )
            for i, pool in enumerate(pools)
        ),
    )
    return SimulatedCluster.replay([spec], [trace], [0])


def trace_of(arrival_s: list[float], prompt: list[int], output: list[int], hit: list[int]) -> Trace:
    return Trace.from_arrays(
        arrival_s=np.array(arrival_s, float),
        prompt_tokens=np.array(prompt),
        output_tokens=np.array(output),
        prefix_hit_tokens=np.array(hit),
        name="test",
    )


def assert_equal_times(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE_S)


request = st.tuples(
    st.floats(0.0, 0.5),  # gap
    st.integers(1, 400),  # prompt
    st.integers(1, 120),  # output
    st.floats(0.0, 1.0),  # share of the prompt that hits
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.lists(request, min_size=1, max_size=60),
    same_instant=st.booleans(),
    replicas=st.integers(1, 3),
    cap=st.integers(1, 8),
    kv=st.integers(530, 3000),
    budget=st.integers(16, 512),
    second=st.one_of(st.none(), st.tuples(st.integers(1, 2), st.integers(1, 8), st.integers(300, 2000))),
    window_s=st.floats(0.05, 5.0),
)
def test_kernel_equals_the_reference_on_random_workloads(
    requests: list[tuple[float, int, int, float]],
    same_instant: bool,
    replicas: int,
    cap: int,
    kv: int,
    budget: int,
    second: tuple[int, int, int] | None,
    window_s: float,
) -> None:
    """Times equal to 1e-9 s whatever the load, KV pressure, prefix hits, caps, pools and measurement instants."""
    gaps = [0.0 if same_instant and i % 3 else gap for i, (gap, *_) in enumerate(requests)]
    arrival_s = list(np.cumsum(gaps) - gaps[0])
    trace = trace_of(
        arrival_s,
        [prompt for _, prompt, _, _ in requests],
        [output for _, _, output, _ in requests],
        [int(prompt * share) for _, prompt, _, share in requests],
    )
    pools = [ReferencePool(profile(kv=kv, budget=budget), replicas, cap)]
    if second is not None:
        pools.append(ReferencePool(profile(a_ms=9.0, kv=second[2], budget=64), second[0], second[1]))
    reference = simulate(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.prefix_hit_tokens, pools)
    cluster = cluster_of(pools, trace)
    end_s = float(np.nan_to_num(reference.finish_s).max()) + 1.0
    now_s = 0.0
    while now_s < end_s:  # measuring in between must not change anything
        now_s += window_s
        cluster.wait_until(now_s)
    arrays = cluster.arrays
    assert_equal_times(arrays.finish_s, reference.finish_s)
    assert_equal_times(arrays.first_token_s, reference.first_token_s)
    service = arrays.service[0]
    assert service["preemptions"] == reference.preemptions.sum()
    assert service["rejected"] == reference.rejected.sum()
    assert service["generated_tokens"] == reference.tokens_generated
    np.testing.assert_allclose(arrays.pool["busy_s"].sum() + arrays.replica["busy_s"].sum(), reference.busy_s.sum())


@pytest.mark.parametrize("seed", range(3))
def test_kernel_equals_the_reference_on_a_long_contended_run(seed: int) -> None:
    """A thousand requests with standing queues, so that rounding and rare paths have time to show."""
    rng = np.random.default_rng(seed)
    n = 1000
    trace = trace_of(
        list(np.cumsum(rng.exponential(0.02, n)) - 0.0),
        list(rng.integers(1, 300, n)),
        list(rng.integers(1, 150, n)),
        [0] * n,
    )
    pools = [ReferencePool(profile(kv=1200), 3, 8)]
    reference = simulate(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, trace.prefix_hit_tokens, pools)
    cluster = cluster_of(pools, trace)
    cluster.wait_until(float(reference.finish_s.max()) + 1.0)
    assert reference.preemptions.sum() > 0
    np.testing.assert_allclose(cluster.arrays.finish_s, reference.finish_s, rtol=0, atol=1e-8)
    np.testing.assert_allclose(cluster.arrays.first_token_s, reference.first_token_s, rtol=0, atol=1e-8)


def test_drained_replicas_finish_what_they_have_and_equal_the_reference() -> None:
    """Scale-down in mid-flight: the drained replica takes nothing new, the rest go on as in the reference."""
    rng = np.random.default_rng(5)
    n = 200
    trace = trace_of(
        list(np.cumsum(rng.exponential(0.05, n))),
        list(rng.integers(1, 200, n)),
        list(rng.integers(20, 100, n)),
        [0] * n,
    )
    pools = [ReferencePool(profile(kv=3000), 3, 8)]
    cluster = cluster_of(pools, trace)
    cluster.wait_until(4.0)
    outstanding = cluster.arrays.replica["outstanding"].copy()
    least = int(np.flatnonzero(outstanding == outstanding.min())[-1])
    cluster.apply(Target(replicas=np.array([[2]]), batch_cap=np.array([[8]])))
    cluster.wait_until(200.0)
    reference = simulate(
        trace.arrival_s,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.prefix_hit_tokens,
        pools,
        drain_at={least: 4.0},
    )
    assert_equal_times(cluster.arrays.finish_s, reference.finish_s)


def test_histograms_count_every_first_token_and_finish_in_its_window() -> None:
    rng = np.random.default_rng(5)
    trace = Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(0.05, 400)),
        prompt_tokens=rng.integers(1, 300, 400),
        output_tokens=rng.integers(1, 60, 400),
        name="histograms",
    )
    cluster = cluster_of([ReferencePool(profile(), 2, 8)], trace)
    ttft, tpot = np.zeros(len(TTFT_EDGES_S) + 1), np.zeros(len(TPOT_EDGES_S) + 1)
    for tick in range(1, 20):
        cluster.wait_until(15.0 * tick)
        window = cluster.read()
        ttft += window.ttft_histogram_rps[0] * window.window_s[0]
        tpot += window.tpot_histogram_rps[0] * window.window_s[0]
    first_s, finish_s = cluster.arrays.first_token_s, cluster.arrays.finish_s
    assert np.isfinite(finish_s).all()
    steps = np.maximum(trace.output_tokens - 1, 1)
    for counted, values, edges in (
        (ttft, first_s - trace.arrival_s, TTFT_EDGES_S),
        (tpot, (finish_s - first_s) / steps, TPOT_EDGES_S),
    ):
        assert counted.round(6).tolist() == np.bincount(np.searchsorted(edges, values), minlength=21).tolist()


def test_training_clusters_keep_no_histograms() -> None:
    library = RequestLibrary.of([trace_of([0.0], [1], [1], [0])])
    assert SimulatedCluster(library, 2, 1, 1, 4, WindowSpec()).read().ttft_histogram_rps.shape == (2, 0)
