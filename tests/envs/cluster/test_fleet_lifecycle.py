"""Starts, nodes, storage, draining, reclaims and bills, against figures worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference_cluster import ReferencePool, simulate
from test_cluster_exact import assert_equal_times, profile

from envs.cluster.simulation import SimulatedCluster
from envs.cluster.state import DRAINING, GONE, READY, RECLAIMED, STARTING
from envs.traffic.trace import Trace
from policies.contract import Target
from policies.engine import ColdStart, EngineProfile
from policies.spec import InterfaceSpec, PoolSpec, ScalingSpec, Slo, Spot, WindowSpec

# 10 ms an iteration, whatever is in it: a request with n output tokens takes n times that.
ROUND = profile(a_ms=10.0, b=0.0, c=0.0, d=0.0, e=0.0, kv=100_000)
START = ColdStart(node_s=100.0, image_s=20.0, weights_s=30.0, warmup_s=10.0)
LOADS = ColdStart(node_s=0.0, image_s=0.0, weights_s=30.0, warmup_s=0.0)
NEVER = ColdStart(node_s=1e7, image_s=0.0, weights_s=0.0, warmup_s=0.0)
CALM = Spot(reclaims_per_replica_day=0.0, storms_per_day=0.0, notice_s=30.0)


def engine(gpus_per_node: int = 1, **overrides: Any) -> EngineProfile:
    return ROUND.model_copy(update={"gpus_per_node": gpus_per_node, **overrides})


def pool(**overrides: Any) -> PoolSpec:
    defaults: dict[str, Any] = {
        "engine": engine(),
        "min_replicas": 0,
        "max_replicas": 10,
        "initial_replicas": 1,
        "cold_start": START,
        "cold_start_cv": 0.0,
        "spot": CALM,
    }
    return PoolSpec(**{**defaults, **overrides})


def requests(*rows: tuple[float, int]) -> Trace:
    """Requests by arrival and output tokens."""
    return Trace.from_arrays(
        arrival_s=[arrival for arrival, _ in rows],
        prompt_tokens=[1] * len(rows),
        output_tokens=[output for _, output in rows],
    )


def replay(*pools: PoolSpec, trace: Trace | None = None, seed: int = 0) -> SimulatedCluster:
    """A cluster whose measurements are not delayed."""
    window = WindowSpec(control_interval_s=15.0, metrics_delay_s=0.0)
    spec = ScalingSpec(slo=Slo(ttft_s=1.0, tpot_s=0.05), pools=pools, interface=InterfaceSpec(window=window))
    return SimulatedCluster.replay([spec], [requests() if trace is None else trace], [seed])


def scale(cluster: SimulatedCluster, *replicas: int, cap: int = 8) -> None:
    cluster.apply(Target(replicas=np.array([replicas]), batch_cap=np.full((1, len(replicas)), cap)))


def counts(cluster: SimulatedCluster) -> tuple[int, int, int]:
    """Replicas starting, ready, draining (or under notice) in the first pool."""
    seen = cluster.read()
    return int(seen.replicas_starting[0, 0]), int(seen.replicas_ready[0, 0]), int(seen.replicas_draining[0, 0])


def life(cluster: SimulatedCluster) -> list[int]:
    """Status of the replica rows that were ever used."""
    used = int(cluster.arrays.service[0]["live_end"])
    return cluster.arrays.status[:used].tolist()


def reclaim_at(cluster: SimulatedCluster, replica: int, time_s: float) -> None:
    """The provider takes a replica: notice is given at `time_s`."""
    cluster.arrays.replica["reclaim_s"][replica] = time_s
    due = cluster.arrays.service["next_event_s"]
    due[0] = min(due[0], time_s)


# Starts


def test_stages_of_a_start_add_up_and_billing_begins_with_the_node() -> None:
    cluster = replay(pool())
    cluster.wait_until(50.0)
    scale(cluster, 2)
    cluster.wait_until(209.99)
    assert counts(cluster) == (1, 1, 0)
    cluster.wait_until(210.01)
    assert counts(cluster) == (0, 2, 0)
    assert cluster.arrays.replica["ready_at_s"][1] == pytest.approx(50 + 100 + 20 + 30 + 10, abs=1e-9)
    cluster.wait_until(250.0)
    assert cluster.usage().replica_s[0, 0] == pytest.approx(250 + (250 - 150), abs=1e-9)
    assert cluster.usage().ready_s[0, 0] == pytest.approx(250 + (250 - 210), abs=1e-9)


def test_boot_pipeline_counts_starting_replicas_by_the_time_that_is_left() -> None:
    cluster = replay(pool())
    scale(cluster, 3)
    seen = []
    for now_s in (10.0, 50.0, 140.0, 170.0):
        cluster.wait_until(now_s)
        seen.append(cluster.read().boot_pipeline[0, 0].tolist())
    assert seen == [[0, 0, 2], [0, 2, 0], [2, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(("full_speed_loads", "ready_at_s"), [(1.0, 60.0), (2.0, 30.0), (0.5, 120.0)])
def test_two_weight_loads_share_the_storage_bandwidth(full_speed_loads: float, ready_at_s: float) -> None:
    cluster = replay(pool(cold_start=LOADS, full_speed_loads=full_speed_loads))
    scale(cluster, 3)
    cluster.wait_until(200.0)
    assert cluster.arrays.replica["ready_at_s"][:3] == pytest.approx([0.0, ready_at_s, ready_at_s], abs=1e-6)


def test_a_load_that_joins_another_slows_it_only_while_they_overlap() -> None:
    """10 s alone leave 20 s of work: 40 s at half speed; then the other one's last 10 s at full speed."""
    cluster = replay(pool(cold_start=LOADS, full_speed_loads=1.0))
    scale(cluster, 2)
    cluster.wait_until(10.0)
    scale(cluster, 3)
    cluster.wait_until(200.0)
    assert cluster.arrays.replica["ready_at_s"][:3] == pytest.approx([0.0, 50.0, 60.0], abs=1e-6)


def test_a_cancelled_load_gives_its_bandwidth_back() -> None:
    """Two loads at half speed for 10 s leave 25 s of work to the one that goes on alone."""
    cluster = replay(pool(cold_start=LOADS, full_speed_loads=1.0))
    scale(cluster, 3)
    cluster.wait_until(10.0)
    scale(cluster, 2)
    cluster.wait_until(200.0)
    assert cluster.arrays.replica["ready_at_s"][1] == pytest.approx(35.0, abs=1e-6)


# Nodes and bills


def test_a_replica_on_a_granted_node_skips_the_node_stage_and_is_billed_at_once() -> None:
    cluster = replay(pool(engine=engine(gpus_per_node=2)))
    cluster.wait_until(50.0)
    scale(cluster, 3)  # the first of the two finds room beside the initial replica, the other needs a node
    cluster.wait_until(300.0)
    assert cluster.arrays.replica["node"][:3].tolist() == [0, 0, 1]
    assert cluster.arrays.replica["bill_start_s"][:3] == pytest.approx([0.0, 50.0, 150.0], abs=1e-9)
    assert cluster.arrays.replica["ready_at_s"][:3] == pytest.approx([0.0, 110.0, 210.0], abs=1e-6)


def test_a_replica_on_a_node_that_is_on_its_way_waits_for_it_and_no_longer() -> None:
    cluster = replay(pool(engine=engine(gpus_per_node=2), initial_replicas=0))
    scale(cluster, 1)
    cluster.wait_until(60.0)
    scale(cluster, 2)
    cluster.wait_until(300.0)
    assert cluster.arrays.replica["node"][:2].tolist() == [0, 0]
    assert cluster.arrays.replica["bill_start_s"][:2] == pytest.approx([100.0, 100.0], abs=1e-9)
    assert cluster.arrays.replica["ready_at_s"][:2] == pytest.approx([160.0, 160.0], abs=1e-6)


def test_bills_per_replica_and_per_node_and_the_emptiest_node_is_emptied_first() -> None:
    """Replicas 0 and 1 share a node, replica 2 has one for itself; it goes at 100 s."""
    cluster = replay(pool(engine=engine(gpus_per_node=2), initial_replicas=3))
    cluster.wait_until(100.0)
    assert (cluster.usage().replica_s[0, 0], cluster.usage().node_s[0, 0]) == (300.0, 200.0)
    scale(cluster, 2)
    cluster.wait_until(200.0)
    assert life(cluster) == [READY, READY]
    assert (cluster.usage().replica_s[0, 0], cluster.usage().node_s[0, 0]) == (500.0, 300.0)
    scale(cluster, 1)  # half of a node is left: billed by replica it costs half, by node all of it
    cluster.wait_until(300.0)
    assert (cluster.usage().replica_s[0, 0], cluster.usage().node_s[0, 0]) == (600.0, 400.0)


def test_a_replica_needs_as_many_slots_of_a_node_as_it_has_gpus() -> None:
    big = engine(gpus_per_node=8, gpus_per_replica=4)
    cluster = replay(pool(engine=big, initial_replicas=5))
    assert cluster.arrays.replica["node"][:5].tolist() == [0, 0, 1, 1, 2]


def test_readings_are_kept_when_time_goes_on() -> None:
    cluster = replay(pool())
    cluster.wait_until(100.0)
    usage = cluster.usage()
    cluster.wait_until(200.0)
    assert (usage.span_s[0], usage.replica_s[0, 0]) == (100.0, 100.0)


# Scaling


def test_scale_down_cancels_the_latest_requested_start_and_before_the_grant_it_costs_nothing() -> None:
    cluster = replay(pool(initial_replicas=1))
    scale(cluster, 2)
    cluster.wait_until(20.0)
    scale(cluster, 3)
    cluster.wait_until(50.0)
    scale(cluster, 2)
    cluster.wait_until(90.0)
    assert life(cluster) == [READY, STARTING]
    assert cluster.usage().replica_s[0, 0] == 90.0
    assert cluster.usage().node_s[0, 0] == 90.0


def test_a_start_cancelled_after_the_grant_is_billed_until_then() -> None:
    cluster = replay(pool())
    scale(cluster, 2)
    cluster.wait_until(130.0)
    scale(cluster, 1)
    cluster.wait_until(200.0)
    assert life(cluster) == [READY]
    assert cluster.usage().replica_s[0, 0] == pytest.approx(200 + 30, abs=1e-9)
    assert cluster.usage().node_s[0, 0] == pytest.approx(200 + 30, abs=1e-9)


def test_a_draining_replica_takes_nothing_new_and_is_billed_until_it_is_empty() -> None:
    """Requests of 10, 5 and 10 s: replica 1 has one, so it drains at 1 s and is gone at 5 s."""
    trace = requests((0.0, 1000), (0.0, 500), (0.0, 1000), (2.0, 100))
    cluster = replay(pool(initial_replicas=2), trace=trace)
    cluster.wait_until(1.0)
    scale(cluster, 1)
    cluster.wait_until(2.5)
    assert life(cluster) == [READY, DRAINING]
    assert cluster.arrays.replica["outstanding"][:2].tolist() == [3, 1]  # the last request, despite the load
    cluster.wait_until(20.0)
    assert life(cluster) == [READY]
    assert cluster.arrays.finish_s == pytest.approx([10.0, 5.0, 10.0, 3.0], abs=0.011)
    finished_s = cluster.arrays.finish_s[1]
    assert cluster.usage().replica_s[0, 0] == pytest.approx(20.0 + finished_s, abs=1e-9)
    assert cluster.usage().ready_s[0, 0] == pytest.approx(20.0 + finished_s, abs=1e-9)


def test_an_idle_replica_that_is_scaled_down_is_gone_at_once() -> None:
    cluster = replay(pool(initial_replicas=3))
    cluster.wait_until(10.0)
    scale(cluster, 1)
    assert (cluster.arrays.status[:3] != GONE).tolist() == [True, False, False]


def test_scale_up_takes_back_the_most_loaded_draining_replica_before_it_starts_any() -> None:
    """Three replicas with 1, 2 and 1 requests drain; one is wanted again, then four."""
    cluster = replay(
        pool(initial_replicas=3), trace=requests((0.0, 900), (0.0, 900), (0.0, 900), (0.0, 5), (0.0, 900), (1.0, 5))
    )
    cluster.wait_until(0.5)
    assert cluster.arrays.replica["outstanding"][:3].tolist() == [1, 2, 1]
    scale(cluster, 0)
    assert life(cluster) == [DRAINING, DRAINING, DRAINING]
    scale(cluster, 1)
    assert life(cluster) == [DRAINING, READY, DRAINING]
    cluster.wait_until(1.02)
    assert cluster.arrays.replica["outstanding"][:3].tolist() == [1, 3, 1]
    scale(cluster, 4)
    assert life(cluster) == [READY, READY, READY, STARTING]


def test_an_absolute_target_repeated_is_harmless() -> None:
    trace = requests(*[(0.1 * i, 200) for i in range(40)])
    cluster = replay(pool(initial_replicas=3, engine=engine(gpus_per_node=2)), trace=trace)
    cluster.wait_until(3.0)
    scale(cluster, 5, cap=4)
    scale(cluster, 2, cap=4)
    once = {name: np.copy(value) for name, value in cluster.arrays._asdict().items() if isinstance(value, np.ndarray)}
    for _ in range(3):
        scale(cluster, 2, cap=4)
    for name, value in once.items():
        np.testing.assert_array_equal(getattr(cluster.arrays, name), value, err_msg=name)


def test_scale_events_count_changes_of_the_target_only() -> None:
    cluster = replay(pool(initial_replicas=3))
    for wanted in (3, 5, 5, 2, 2, 4):
        scale(cluster, wanted)
        cluster.wait_until(cluster.now_s + 1.0)
    assert (cluster.counter("scale_ups")[0], cluster.counter("scale_downs")[0]) == (2, 1)
    assert cluster.usage().scale_events[0] == 3


def test_a_negative_wish_leaves_the_pool_alone() -> None:
    cluster = replay(pool(initial_replicas=2), pool(name="second", initial_replicas=3))
    scale(cluster, -1, -1)
    scale(cluster, 1, -1)
    assert cluster.arrays.pool["replicas_target"].tolist() == [1, 3]
    assert (cluster.arrays.status == READY).sum() == 4


def test_a_lower_batch_cap_holds_back_new_requests_and_a_higher_one_lets_them_in_at_once() -> None:
    trace = requests(*[(0.0, 100)] * 4, *[(0.5, 100)] * 2)
    cluster = replay(pool(), trace=trace)
    cluster.wait_until(0.2)
    scale(cluster, 1, cap=2)
    cluster.wait_until(0.6)
    assert (cluster.read().running[0, 0], cluster.read().queue_requests[0]) == (4, 2)
    scale(cluster, 1, cap=5)
    cluster.wait_until(0.8)
    assert (cluster.read().running[0, 0], cluster.read().queue_requests[0]) == (5, 1)


def test_measuring_at_an_instant_of_an_arrival_changes_nothing() -> None:
    """An iteration boundary, a measurement and an arrival at the same instant: the request joins at that boundary."""
    exact = engine(step=ROUND.step.model_copy(update={"a_ms": 125.0}))  # exact in binary
    times = []
    for measured in (False, True):
        cluster = replay(pool(engine=exact), trace=requests((0.0, 100), (2.0, 3)))
        if measured:
            cluster.wait_until(2.0)
        cluster.wait_until(60.0)
        times.append(cluster.arrays.finish_s.tolist())
    assert times == [[12.5, 2.375]] * 2


def test_running_to_the_present_does_nothing() -> None:
    """What is due now waits until time goes on, so that a target applied now comes first."""
    cluster = replay(pool(initial_replicas=2), trace=requests((1.0, 10)))
    for _ in range(2):
        cluster.wait_until(1.0)
    assert cluster.counter("arrived")[0] == 0
    cluster.wait_until(1.5)
    assert cluster.counter("finished")[0] == 1


# Spot


def test_a_reclaimed_replica_stops_at_the_notice_and_its_requests_return_in_arrival_order() -> None:
    """Cap 2 and one survivor: requests 0 and 2 are on the reclaimed replica and go ahead of 4 and 5, which came later.

    Notice at 1 s, end at 31 s. Each request needs 40 s alone or in a batch.
    """
    trace = requests(*[(0.001 * i, 4000) for i in range(4)], (2.0, 4000), (3.0, 4000))
    spot = pool(price_class="spot", initial_replicas=2, initial_batch_cap=2, cold_start=NEVER)
    cluster = replay(spot, trace=trace)
    reclaim_at(cluster, 0, 1.0)
    cluster.wait_until(30.9)
    assert cluster.arrays.status[:2].tolist() == [RECLAIMED, READY]
    assert counts(cluster) == (1, 1, 1)
    assert (cluster.read().running[0, 0], cluster.read().queue_requests[0]) == (4, 2)
    cluster.wait_until(31.1)
    assert cluster.arrays.status[:2].tolist() == [GONE, READY]
    assert (cluster.counter("reclaimed")[0], cluster.counter("queued")[0]) == (2, 4)
    assert cluster.read().oldest_wait_s[0] == pytest.approx(31.1, abs=1e-9)
    assert cluster.usage().overdue[0] == 4
    cluster.wait_until(300.0)
    assert np.argsort(cluster.arrays.finish_s, kind="stable").tolist() == [1, 3, 0, 2, 4, 5]
    assert cluster.arrays.finish_s == pytest.approx([80, 40, 80, 40, 120, 120], abs=0.05)
    assert cluster.arrays.first_token_s == pytest.approx([40, 0, 40, 0, 80, 80], abs=0.05)
    assert cluster.arrays.pool["reclaims"][0] == 1
    # 31 s of the lost replica, all of the survivor; the replacement's node never comes.
    assert cluster.usage().replica_s[0, 0] == pytest.approx(31 + 300, abs=1e-9)
    # Whole iterations of 10 ms that the lost replica ran for its two requests count as work done.
    generated = int(cluster.counter("generated_tokens")[0])
    assert generated - 6 * 4000 == pytest.approx(2 * 3100, abs=3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("notice_s", [0.0, 0.25])
def test_reclaims_equal_the_reference(seed: int, notice_s: float) -> None:
    rng = np.random.default_rng(seed)
    n = 300
    trace = Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(0.03, n)),
        prompt_tokens=rng.integers(1, 300, n),
        output_tokens=rng.integers(1, 200, n),
    )
    tight = profile(kv=1500, budget=256).model_copy(update={"gpus_per_node": 1})
    calm = CALM.model_copy(update={"notice_s": notice_s})
    cluster = replay(
        pool(engine=tight, price_class="spot", initial_replicas=4, spot=calm, cold_start=NEVER), trace=trace
    )
    notices = {int(g): float(t) for g, t in zip(rng.permutation(4)[:3], rng.uniform(1.0, 9.0, 3), strict=True)}
    for replica, time_s in notices.items():
        reclaim_at(cluster, replica, time_s)
    cluster.wait_until(500.0)
    reference = simulate(
        trace.arrival_s,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.prefix_hit_tokens,
        [ReferencePool(tight, 4, 8)],
        drain_at=notices,
        kill_at={replica: time_s + notice_s for replica, time_s in notices.items()},
    )
    assert reference.tokens_lost > 0
    assert_equal_times(cluster.arrays.finish_s, reference.finish_s)
    assert_equal_times(cluster.arrays.first_token_s, reference.first_token_s)
    assert cluster.counter("generated_tokens")[0] == reference.tokens_generated
    assert cluster.counter("preemptions")[0] == reference.preemptions.sum()
    assert cluster.usage().busy_s[0, 0] == pytest.approx(reference.busy_s.sum(), abs=1e-6)


def test_a_lost_replica_is_replaced_without_a_new_target() -> None:
    cluster = replay(pool(price_class="spot", initial_replicas=3))
    reclaim_at(cluster, 1, 10.0)
    cluster.wait_until(10.5)
    assert counts(cluster) == (1, 2, 0)  # it was idle: no notice needed
    cluster.wait_until(170.5)
    assert counts(cluster) == (0, 3, 0)
    assert cluster.counter("scale_ups")[0] == 0


def test_replacements_that_found_no_place_start_when_the_notice_is_over() -> None:
    """Four busy replicas under notice keep their places: three replacements fit beside them, the fourth comes later."""
    cluster = replay(pool(price_class="spot", max_replicas=4, initial_replicas=4), trace=requests(*[(0.0, 9000)] * 4))
    for replica in range(4):
        reclaim_at(cluster, replica, 10.0)
    cluster.wait_until(20.0)
    assert counts(cluster) == (3, 0, 4)
    cluster.wait_until(40.5)
    assert counts(cluster) == (4, 0, 0)


def test_every_request_of_a_large_fleet_can_be_returned_at_once() -> None:
    """More requests than 16 bits can count, all back at the gateway in arrival order, none lost."""
    replicas, cap = 270, 256
    n = replicas * cap
    trace = requests(*[(1e-4 * i, 3000) for i in range(n)])
    wide = engine(max_num_seqs=cap, kv_capacity_tokens=10_000_000)
    start = ColdStart(node_s=10.0, image_s=0.0, weights_s=0.0, warmup_s=0.0)
    cluster = replay(
        pool(engine=wide, price_class="spot", max_replicas=replicas, initial_replicas=replicas, cold_start=start),
        trace=trace,
    )
    for replica in range(replicas):
        reclaim_at(cluster, replica, 8.0)
    cluster.arrays.pool["notice_s"] = 1.0
    cluster.wait_until(9.5)
    service = cluster.arrays.service[0]
    assert (service["queued"], service["returned_count"], service["reclaimed"]) == (n, n, n)
    np.testing.assert_array_equal(cluster.arrays.returned[:n], np.arange(n))
    cluster.wait_until(60.0)
    assert cluster.counter("finished")[0] == n


def test_storms_take_about_the_stated_share_of_the_pool() -> None:
    """1,000 replicas at 30 %: a binomial with a standard deviation of 14.5; four of them are allowed."""
    stormy = CALM.model_copy(update={"storms_per_day": 24.0, "storm_share": 0.3})
    cluster = replay(pool(price_class="spot", max_replicas=1000, initial_replicas=1000, spot=stormy))
    storm_s = float(cluster.arrays.pool["next_storm_s"][0])
    cluster.wait_until(storm_s - 0.1)
    assert cluster.arrays.pool["reclaims"][0] == 0
    cluster.wait_until(storm_s + 0.1)
    taken = int(cluster.arrays.pool["reclaims"][0])
    assert taken == pytest.approx(300, abs=4 * 14.5)
    assert counts(cluster) == (taken, 1000 - taken, 0)


def test_independent_reclaims_come_at_the_stated_rate_and_only_to_spot() -> None:
    """600 replicas, one reclaim per replica-hour, two hours: a Poisson count of 1,200 (standard deviation 35)."""
    hourly = CALM.model_copy(update={"reclaims_per_replica_day": 24.0})
    instant = ColdStart(node_s=0.0, image_s=0.0, weights_s=0.0, warmup_s=0.0)
    shared: dict[str, Any] = {"max_replicas": 600, "initial_replicas": 600, "spot": hourly, "cold_start": instant}
    cluster = replay(pool(price_class="spot", **shared), pool(name="on-demand", **shared))
    cluster.wait_until(7200.0)
    reclaims = cluster.arrays.pool["reclaims"].tolist()
    assert reclaims[0] == pytest.approx(1200, abs=4 * 35)
    assert reclaims[1] == 0
    assert cluster.read().replicas_ready.tolist() == [[600, 600]]


def test_stage_durations_spread_with_the_stated_mean_and_variation() -> None:
    """2,000 lognormal durations of mean 100 s and variation 0.5: the mean is within 4 of its 1.1 s errors."""
    start = ColdStart(node_s=100.0, image_s=0.0, weights_s=0.0, warmup_s=0.0)
    durations = []
    for seed in (0, 1):
        cluster = replay(pool(cold_start=start, cold_start_cv=0.5, max_replicas=1000, initial_replicas=0), seed=seed)
        scale(cluster, 1000)
        cluster.wait_until(3000.0)
        durations.append(cluster.arrays.replica["ready_at_s"][:1000])
    found = np.concatenate(durations)
    assert found.mean() == pytest.approx(100.0, abs=4.5)
    assert found.std() / found.mean() == pytest.approx(0.5, abs=0.06)
