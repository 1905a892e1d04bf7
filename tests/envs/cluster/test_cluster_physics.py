"""Laws that hold whatever the traffic and the fleet do: conservation, Little's law, queueing theory, determinism."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cluster_exact import profile

from envs.cluster.simulation import SimulatedCluster
from envs.cluster.state import AT_BOUNDARY, GONE, READY, SLOT_BITS
from envs.traffic.trace import Trace
from policies.contract import Target
from policies.engine import ColdStart
from policies.spec import InterfaceSpec, PoolSpec, ScalingSpec, Slo, Spot, WindowSpec

SLOT_MASK = (1 << SLOT_BITS) - 1
NO_DELAY = InterfaceSpec(window=WindowSpec(control_interval_s=15.0, metrics_delay_s=0.0))


def pool_of(**overrides: Any) -> PoolSpec:
    return PoolSpec(**{"engine": profile(), "min_replicas": 0, "max_replicas": 4, "initial_replicas": 1, **overrides})


def spec_of(*pools: PoolSpec) -> ScalingSpec:
    return ScalingSpec(slo=Slo(ttft_s=1.0, tpot_s=0.05), pools=pools, interface=NO_DELAY)


def poisson_trace(requests: int, rps: float, seed: int = 0, longest: int = 150) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(1.0 / rps, requests)),
        prompt_tokens=rng.integers(1, 300, requests),
        output_tokens=rng.integers(1, longest, requests),
        prefix_hit_tokens=np.zeros(requests, np.int64),
    )


def target(*replicas: int, cap: int = 8) -> Target:
    return Target(replicas=np.array([replicas]), batch_cap=np.full((1, len(replicas)), cap))


def chain(cluster: SimulatedCluster, replica: int, head: int) -> list[int]:
    """Slots of a linked list of one replica."""
    slots = []
    while head >= 0:
        slots.append(head)
        head = int(cluster.arrays.slot[replica * cluster.arrays.slots + head]["next"])
    return slots


def assert_conserved(cluster: SimulatedCluster) -> None:
    """Every request is in exactly one place, every token and every KV token is accounted for."""
    arrays, service = cluster.arrays, cluster.arrays.service[0]
    places: list[int] = np.flatnonzero(~np.isnan(arrays.finish_s)).tolist()
    emitted_in_flight = 0
    for g in np.flatnonzero(arrays.status != GONE).tolist():
        replica, base = arrays.replica[g], g * arrays.slots
        heap = arrays.heap[base : base + replica["decoding"]]
        decoding = (heap & SLOT_MASK).tolist()
        prefilling, waiting = chain(cluster, g, replica["prefill_head"]), chain(cluster, g, replica["waiting_head"])
        free = arrays.free_slots[base : base + replica["free_count"]].tolist()
        assert sorted(decoding + prefilling + waiting + free) == list(range(arrays.slots))
        assert replica["waiting"] == len(waiting)
        assert replica["outstanding"] == len(decoding) + len(prefilling) + len(waiting)
        slot = arrays.slot[base : base + arrays.slots]
        emitted = slot["output"][decoding] - ((heap >> SLOT_BITS) - replica["iteration"])
        contexts = slot["prompt"][decoding] + emitted - 1
        assert replica["kv_decode"] == contexts.sum()
        assert replica["kv_used"] == contexts.sum() + slot["target"][prefilling].sum()
        pool = arrays.pool[replica["pool"]]
        assert replica["kv_used"] <= pool["kv_capacity"]
        accepts = arrays.status[g] == READY and replica["outstanding"] < pool["batch_cap"]
        assert np.isfinite(arrays.load[g]) == accepts
        emitted_in_flight += int(emitted.sum() + slot["emitted"][prefilling + waiting].sum())
        places += slot["request"][decoding + prefilling + waiting].tolist()
    total = arrays.prompt_tokens.astype(np.int64) + arrays.output_tokens
    rows = np.arange(service["next_arrival"])
    refused = total[rows] > service["max_kv"]
    first = int(service["returned_head"])
    queue = arrays.returned[first : first + service["returned_count"]].tolist()
    if service["queued"] > len(queue):
        later = np.arange(service["queue_head"], service["next_arrival"])
        queue += later[total[later] <= service["max_kv"]].tolist()
    assert queue == sorted(queue)
    assert service["queued"] == len(queue)
    assert sorted(places + queue) == rows[~refused].tolist()
    assert service["arrived"] == len(rows)
    assert service["rejected"] == refused.sum()
    assert service["arrived_prompt_tokens"] == arrays.prompt_tokens[rows].sum()
    assert service["boundaries"] == (arrays.run_kind == AT_BOUNDARY).sum()
    lost = service["generated_tokens"] - service["finished_output_tokens"] - emitted_in_flight
    assert lost >= 0
    if service["reclaimed"] == 0:
        assert lost == 0


def assert_packed(cluster: SimulatedCluster) -> None:
    """Nodes hold the live replicas that point to them, and no more than fit."""
    arrays = cluster.arrays
    held = np.bincount(arrays.replica["node"][arrays.status != GONE], minlength=len(arrays.node))
    np.testing.assert_array_equal(arrays.node["used"], held)
    slots = np.repeat(arrays.pool["slots_per_node"], arrays.pool["replica_rows"])
    assert (held[: len(slots)] <= slots).all()


operation = st.tuples(
    st.floats(0.01, 8.0),  # seconds to run
    st.integers(0, 4),  # on-demand replicas
    st.integers(0, 4),  # spot replicas
    st.integers(1, 8),  # batch cap
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=st.lists(operation, min_size=1, max_size=20),
    rps=st.floats(1.0, 12.0),
    kv=st.integers(440, 2000),
    reclaims_per_replica_day=st.sampled_from([0.0, 86400.0 / 20]),
    storms_per_day=st.sampled_from([0.0, 86400.0 / 15]),
    notice_s=st.floats(0.0, 3.0),
    seed=st.integers(0, 2**32),
)
def test_requests_tokens_and_kv_are_conserved_under_scaling_caps_and_reclaims(
    operations: list[tuple[float, int, int, int]],
    rps: float,
    kv: int,
    reclaims_per_replica_day: float,
    storms_per_day: float,
    notice_s: float,
    seed: int,
) -> None:
    spot = Spot(
        reclaims_per_replica_day=reclaims_per_replica_day,
        storms_per_day=storms_per_day,
        storm_share=0.7,
        notice_s=notice_s,
    )
    engine = profile(kv=kv).model_copy(update={"gpus_per_node": 2})
    start = ColdStart(node_s=1.0, image_s=0.5, weights_s=1.0, warmup_s=0.5)
    shared: dict[str, Any] = {"engine": engine, "cold_start": start, "full_speed_loads": 1.0}
    spec = spec_of(pool_of(name="steady", **shared), pool_of(name="spot", price_class="spot", spot=spot, **shared))
    cluster = SimulatedCluster.replay([spec], [poisson_trace(150, rps, seed)], [seed])
    now_s = 0.0
    for span_s, steady, spots, cap in operations:
        cluster.apply(target(steady, spots, cap=cap))
        now_s += span_s
        cluster.wait_until(now_s)
        assert_conserved(cluster)
        assert_packed(cluster)
    cluster.apply(target(4, 0))
    cluster.wait_until(now_s + 600.0)
    assert_conserved(cluster)
    service = cluster.arrays.service[0]
    assert service["finished"] + service["rejected"] == 150


def test_requests_in_the_system_are_the_arrival_rate_times_the_time_in_the_system() -> None:
    """Little's law, which knows nothing of engines; sampling every 0.1 s is worth about 0.1 % here."""
    requests, sample_s = 2000, 0.1
    trace = poisson_trace(requests, 8.0)
    cluster = SimulatedCluster.replay([spec_of(pool_of(initial_replicas=2))], [trace], [0])
    inside, samples = 0.0, 0
    while cluster.counter("finished")[0] < requests:
        samples += 1
        cluster.wait_until(samples * sample_s)
        seen = cluster.read()
        inside += float(seen.queue_requests[0] + seen.running.sum() + seen.waiting.sum())
    time_s = samples * sample_s
    sojourn_s = float((cluster.arrays.finish_s - trace.arrival_s).mean())
    assert inside / samples == pytest.approx(requests / time_s * sojourn_s, rel=0.01)


def erlang_c(servers: int, offered: float) -> float:
    """Probability that an arrival has to wait in an M/M/c queue."""
    terms = [offered**k / math.factorial(k) for k in range(servers)]
    last = offered**servers / math.factorial(servers) * servers / (servers - offered)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("servers", "load"), [(1, 0.5), (4, 0.8), (10, 0.7)])
def test_waiting_times_follow_erlang_c_when_service_is_exponential(servers: int, load: float) -> None:
    """Batch cap 1, iterations of constant length and geometric outputs: an M/M/c queue.

    Tolerance: a geometric output of mean 100 has a squared coefficient of variation of 0.99 (0.5 % less waiting), and
    waits of neighbours are correlated, which leaves about 0.7 % of noise in the mean of 2 million.
    """
    requests, iteration_s, mean_output = 2_000_000, 0.01, 100.0
    service_s = iteration_s * mean_output
    rng = np.random.default_rng(1)
    trace = Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(service_s / (servers * load), requests)),
        prompt_tokens=np.ones(requests, np.int64),
        output_tokens=rng.geometric(1.0 / mean_output, requests),
    )
    engine = profile(a_ms=1e3 * iteration_s, kv=100_000, b=0.0, c=0.0, d=0.0, e=0.0)
    pool = pool_of(engine=engine, max_replicas=servers, initial_replicas=servers, initial_batch_cap=1)
    cluster = SimulatedCluster.replay([spec_of(pool)], [trace], [0])
    cluster.wait_until(trace.duration_s + 1000.0)
    waited_s = cluster.arrays.first_token_s - trace.arrival_s - iteration_s
    must_wait = erlang_c(servers, servers * load)
    assert (waited_s > 1e-6).mean() == pytest.approx(must_wait, rel=0.01)
    assert waited_s.mean() == pytest.approx(must_wait * service_s / (servers - servers * load), rel=0.03)


def risky_spec() -> ScalingSpec:
    spot = Spot(reclaims_per_replica_day=2000.0, storms_per_day=500.0, notice_s=2.0)
    return spec_of(
        pool_of(cold_start=ColdStart(node_s=5.0, image_s=1.0, weights_s=4.0, warmup_s=1.0), cold_start_cv=0.5),
        pool_of(name="spot", price_class="spot", spot=spot, cold_start_cv=0.5, initial_replicas=2),
    )


def run_risky(seeds: list[int]) -> tuple[SimulatedCluster, list[npt.NDArray[np.float64]]]:
    """One service per seed under the same scaling; finish times by service."""
    n = len(seeds)
    traces = [poisson_trace(400, 6.0, seed) for seed in seeds]
    cluster = SimulatedCluster.replay([risky_spec()] * n, traces, seeds)
    for step in range(12):
        wish = np.array([[1 + step % 3, 3 - step % 2]])
        cluster.apply(Target(replicas=np.repeat(wish, n, axis=0), batch_cap=np.full((n, 2), 4 + step % 4)))
        cluster.wait_until(5.0 * (step + 1))
    first = cluster.library.first
    return cluster, [cluster.arrays.finish_s[first[i] : first[i + 1]] for i in range(n)]


def test_a_seed_repeats_a_run_and_another_one_does_not() -> None:
    """Nor does it matter how many other services run beside it."""
    wide, wide_finish_s = run_risky([3, 4, 5])
    for row, seed in enumerate([3, 4, 5]):
        alone, (finish_s,) = run_risky([seed])
        np.testing.assert_array_equal(wide_finish_s[row], finish_s)
        assert wide.arrays.pool["reclaims"][2 * row + 1] == alone.arrays.pool["reclaims"][1] > 0
        for name in ("generated_tokens", "reclaimed", "scale_ups", "rng", "good_tokens"):
            assert wide.arrays.service[name][row] == alone.arrays.service[name][0]
        np.testing.assert_array_equal(wide.usage().replica_s[row], alone.usage().replica_s[0])
    same_trace = [SimulatedCluster.replay([risky_spec()], [poisson_trace(400, 6.0)], [seed]) for seed in (0, 1)]
    for cluster in same_trace:
        cluster.wait_until(60.0)
    assert not np.array_equal(same_trace[0].arrays.finish_s, same_trace[1].arrays.finish_s, equal_nan=True)


def test_more_replicas_never_make_the_mean_first_token_later() -> None:
    trace = poisson_trace(3000, 40.0)
    means_s = []
    for replicas in range(1, 9):
        spec = spec_of(pool_of(max_replicas=replicas, initial_replicas=replicas))
        cluster = SimulatedCluster.replay([spec], [trace], [0])
        cluster.wait_until(5000.0)
        assert cluster.counter("finished")[0] == len(trace)
        means_s.append(float((cluster.arrays.first_token_s - trace.arrival_s).mean()))
    assert means_s == sorted(means_s, reverse=True)
    assert means_s[0] > 100 * means_s[-1]  # from a standing queue to none
