"""Peers that compute with a model of the engine: WVA, Dynamo's planner, the two-level bandit; and our reactive rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, missing, observation, pool, snapshot

from policies.baselines.autothrottle import TARGETS, AutothrottlePolicy
from policies.baselines.dynamo import DynamoLoadPolicy
from policies.baselines.dynamo_throughput import DynamoThroughputPolicy, KalmanTrend
from policies.baselines.reactive import ReactivePolicy
from policies.baselines.wva import WvaSaturationPolicy, WvaTokensPolicy
from policies.baselines.wva_queueing import Queue, WvaQueueingPolicy, highest_rate, latencies
from policies.contract import Policy

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def asked(policy: Policy, time_s: float, current: float, demand: float = 1.0, **overrides: Any) -> int:
    counts = {"replicas_target": current, "replicas_ready": current, "running": 1.0}
    seen = snapshot(time_s=time_s, **{**counts, **overrides})
    return int(policy.propose(observation(seen, demand)).replicas.sum())


# WVA, saturation


def analysed(policy: WvaSaturationPolicy, kv: float, queue: float, current: float, pending: float = 0.0) -> float:
    seen = snapshot(replicas_ready=current - pending)
    wish = policy.analyse(seen, np.array([[current]]), np.array([[kv]]), np.array([[queue]]))
    return float(wish.sum())


@pytest.mark.parametrize(
    ("kv", "queue", "current", "expected"),
    [
        (0.69, 0.0, 4, 4),  # spare 0.11: enough, but not on one replica less (0.80 - 0.92)
        (0.71, 0.0, 4, 5),  # spare 0.09
        (0.70, 0.0, 4, 4),  # spare 0.10 exactly
        (0.10, 2.1, 4, 5),  # spare queue 2.9
        (0.10, 2.0, 4, 4),  # spare queue 3; on one less 5 - 2.67
        (0.10, 1.5, 4, 3),  # 5 - 2 = 3 on one less
        (0.50, 0.0, 4, 3),  # 0.80 - 2 / 3 = 0.13
        (0.80, 0.0, 4, 5),  # all saturated
        (0.10, 5.0, 4, 5),
        (0.10, 0.0, 1, 1),  # never the last one
    ],
)
def test_wva_saturation_keeps_spare_capacity(kv: float, queue: float, current: float, expected: float) -> None:
    assert analysed(WvaSaturationPolicy(fleet()), kv, queue, current) == expected


def test_wva_saturation_adds_the_cheapest_variant_and_removes_the_dearest() -> None:
    services = fleet(pool(engine=engine(usd_per_gpu_hour=9.0)), pool(), pool(engine=engine(usd_per_gpu_hour=5.0)))
    policy, placed = WvaSaturationPolicy(services), np.array([[3.0, 3.0, 3.0]])
    seen = snapshot(pools=3, replicas_ready=3.0)
    full, idle = np.full((1, 3), 0.75), np.full((1, 3), 0.05)
    assert policy.analyse(seen, placed, full, full * 0).tolist() == [[3, 4, 3]]
    assert policy.analyse(seen, placed, idle, idle * 0).tolist() == [[2, 3, 3]]
    pending = snapshot(pools=3, replicas_ready=[3.0, 2.0, 3.0])
    assert policy.analyse(pending, placed, full, full * 0).tolist() == [[3, 3, 4]]


def test_wva_goes_through_an_hpa_of_four_minutes_both_ways() -> None:
    policy = WvaSaturationPolicy(fleet(pool(max_replicas=50)))
    counts = [asked(policy, 15.0 * tick, 4, kv_cache_usage=0.9) for tick in range(24)]
    # What was found counts for 240 s; then the recommendation made since is all there is.
    assert counts.index(5) == 16
    assert max(counts) == 5  # what is asked for is not there yet: the last answer stands


def test_wva_takes_the_highest_usage_of_a_minute() -> None:
    policy = WvaSaturationPolicy(fleet(pool(max_replicas=50)), stabilization_s=0.0)
    usage = [0.4, 0.4, 0.75, 0.4, 0.4]
    assert [asked(policy, 15.0 * tick, 2, kv_cache_usage=value) for tick, value in enumerate(usage)][-1] == 3


# WVA, tokens


def tokens_wish(kv: float, current: float, **overrides: Any) -> int:
    policy = WvaTokensPolicy(fleet(pool(max_replicas=50)), stabilization_s=0.0)
    lengths = {"prompt_tokens_mean": 2000.0, "output_tokens_mean": 400.0}
    return asked(policy, 0.0, current, **{**lengths, "kv_cache_usage": kv, **overrides})


def test_wva_tokens_capacity_follows_the_cache_or_the_batch() -> None:
    # k1 = 80,000 of 100,000 tokens; k2 = min(8192 * 400 / 2400, 64) * (2000 + 200) = 64 * 2200 = 140,800.
    # Demand 0.75 * 100,000 * 4 = 300,000; over 0.85 that is 352,941, beyond the supply of 320,000: one more.
    assert tokens_wish(0.75, 4) == 5
    # 0.65: 260,000 / 0.85 = 305,882 fits; 260,000 / 0.70 = 371,429 leaves nothing to spare.
    assert tokens_wish(0.65, 4) == 4
    # 0.40: 160,000 / 0.70 = 228,571 leaves 91,429: one less.
    assert tokens_wish(0.40, 4) == 3
    # Short prompts and 4-token outputs: k2 = (8192 * 4 / 104) * 102 = 64 * 102 tokens is what a replica can compute.
    assert tokens_wish(0.065, 4, prompt_tokens_mean=100.0, output_tokens_mean=4.0) == 5


def test_wva_tokens_counts_those_that_wait() -> None:
    # 40 in the engines' queues at 2,000 each: 160,000 + 80,000 over 0.85 is 282,353, still within 320,000.
    assert tokens_wish(0.40, 4, waiting=16.0) == 4
    # 60 at the gateway at 2,000 * (1 - 0.5) + 400: 84,000 more; with 160,000 of use 244,000 leaves nothing to spare.
    half = {"prompt_tps": 400.0, "prefill_tps": 200.0}
    assert tokens_wish(0.40, 4, queue_requests=16.0, **half) == 4


def test_wva_tokens_sleeps_after_ten_minutes_without_a_request() -> None:
    policy = WvaTokensPolicy(fleet(pool(min_replicas=0)), stabilization_s=0.0)
    idle = {"arrival_rps": 0.0, "kv_cache_usage": 0.0}
    counts = [asked(policy, 15.0 * tick, 1, **({} if tick == 0 else idle)) for tick in range(44)]
    assert counts.index(0) == 40


# WVA, queueing core


def curve(batch: float = 32.0) -> Queue:
    one = np.ones(1)
    return Queue(500.0 * one, 100.0 * one, 0.01 * one, 1e-4 * one, 1e-7 * one, batch * one)


def test_service_times_of_the_queueing_model() -> None:
    queue, batch = curve(), np.array([8.0])
    step = 0.01 + 8 * (1e-4 * 600 / 101 + 1e-7 * 550)
    assert queue.prefill_s(batch).tolist() == pytest.approx([step + (1e-4 + 1e-7) * 500])
    assert queue.decode_s(batch).tolist() == pytest.approx([step + 1e-4 + 1e-7 * 550])
    prefill_s, decode_s = queue.prefill_s(batch)[0], queue.decode_s(batch)[0]
    assert queue.rates()[0, 7] == pytest.approx(8 / (prefill_s + 100 * decode_s))


@pytest.mark.parametrize("load", [0.1, 0.7, 0.95, 0.999])
def test_queueing_model_in_closed_form_is_the_chain_summed_state_by_state(load: float) -> None:
    queue = curve(8.0)
    rates = queue.rates()[0]
    rate = load * rates[-1]
    weights = [1.0]
    for state in range(1, 89):  # room for 8 + 80
        weights.append(weights[-1] * rate / rates[min(state, 8) - 1])
    shares = np.array(weights) / sum(weights)
    accepted = rate * (1.0 - shares[-1])
    wait_s = sum(max(state - 8, 0) * share for state, share in enumerate(shares)) / accepted
    batch = np.array([max(sum(min(state, 8) * share for state, share in enumerate(shares)), 1.0)])
    ttft_s, tpot_s = latencies(queue, np.array([rate]))
    assert ttft_s[0] == pytest.approx(wait_s + queue.prefill_s(batch)[0] + queue.decode_s(batch)[0], rel=1e-6)
    assert tpot_s[0] == pytest.approx(queue.decode_s(batch)[0], rel=1e-6)


def test_highest_rate_just_meets_the_tighter_objective() -> None:
    queue, slo = curve(), np.array([0.02])
    rate = highest_rate(queue, np.array([5.0]), slo)
    assert latencies(queue, rate)[1] <= slo < latencies(queue, rate * 1.01)[1]
    assert highest_rate(queue, np.array([1e-3]), slo).tolist() == [0.0]


def test_wva_queueing_divides_the_rate_of_a_minute_by_what_a_replica_serves() -> None:
    services = fleet(pool(max_replicas=500))
    policy = WvaQueueingPolicy(services, stabilization_s=0.0)
    one = np.ones(1)
    queue = Queue(100.0 * one, 200.0 * one, 0.01 * one, 1e-4 * one, 1e-7 * one, 64.0 * one)
    rate = highest_rate(queue, services.ttft_slo_s, services.tpot_slo_s)[0]
    assert asked(policy, 0.0, 4, arrival_rps=5.5 * rate) == 6
    assert asked(policy, 15.0, 6, arrival_rps=missing().arrival_rps) == 6


# Dynamo


@pytest.mark.parametrize(
    ("mode", "kv", "current", "expected"),
    [
        ("throughput", 1.01, 4, 5),
        ("throughput", 1.00, 4, 4),
        ("throughput", 0.60, 4, 4),
        ("throughput", 0.59, 4, 3),
        ("throughput", 0.59, 2, 2),  # 1.18 on one replica less would add it again
        ("latency", 0.41, 4, 5),
        ("latency", 0.09, 4, 3),
        ("latency", 0.11, 4, 4),
        ("throughput", 0.1, 1, 1),
    ],
)
def test_dynamo_easy_modes_move_one_replica_by_the_load(mode: str, kv: float, current: int, expected: int) -> None:
    assert asked(DynamoLoadPolicy(fleet(), mode), 0.0, current, kv_cache_usage=kv) == expected


def test_dynamo_waits_for_its_last_step() -> None:
    assert asked(DynamoLoadPolicy(fleet()), 0.0, 4, replicas_ready=3.0, kv_cache_usage=1.2) == 4


def test_dynamo_adds_queued_prefill_to_the_load() -> None:
    # 0.5 of the cache and, on each of four replicas, 6 prompts of 10,000 of 100,000 tokens.
    waiting = {"queue_requests": 24.0, "prompt_tokens_mean": 10_000.0}
    assert asked(DynamoLoadPolicy(fleet()), 0.0, 4, kv_cache_usage=0.5, **waiting) == 5


@pytest.mark.parametrize(
    ("running", "queued", "expected"),
    [
        (4.0 * 410, 0.0, 5),  # 10 + 41 ms of sequences: over 50 ms
        (4.0 * 250, 0.0, 4),  # 35 ms; 43 on one replica less
        (4.0 * 60, 0.0, 3),
        (4.0, 4.0 * 300, 5),  # 30,000 queued tokens a replica are 3 s
        (4.0, 4.0 * 130, 4),  # 1.3 s, but 1.74 on one replica less
    ],
)
def test_dynamo_sla_mode_estimates_both_latencies(running: float, queued: float, expected: int) -> None:
    seen = {"running": running, "queue_requests": queued, "kv_cache_usage": 0.0}
    assert asked(DynamoLoadPolicy(fleet(), "sla"), 0.0, 4, **seen) == expected


def test_kalman_gives_the_last_value_until_five_points_then_the_trend() -> None:
    series, predicted = KalmanTrend(1), []
    for point in range(60):
        series.add(np.array([10.0 * point]), np.array([True]))
        predicted.append(float(series.predict()[0]))
    assert predicted[:4] == [0.0, 10.0, 20.0, 30.0]
    assert predicted[-1] == pytest.approx(600.0, abs=3.0)
    series.add(np.array([np.nan]), np.array([True]))
    assert series.predict()[0] == predicted[-1]


def test_dynamo_throughput_scales_every_three_minutes_by_eight_at_most() -> None:
    policy = DynamoThroughputPolicy(fleet(pool(max_replicas=500)), predictor="constant")
    counts = [asked(policy, 15.0 * tick, 4, arrival_rps=1000.0) for tick in range(13)]
    assert [tick for tick, count in enumerate(counts) if count == 12] == [0, 12]
    assert set(counts) == {4, 12}


def test_dynamo_throughput_is_a_floor_under_the_load_scaling() -> None:
    services = fleet(pool(max_replicas=500))
    alone = asked(DynamoThroughputPolicy(services, "constant"), 0.0, 4, arrival_rps=60.0, kv_cache_usage=0.9)
    both = DynamoThroughputPolicy(services, "constant", load_scaling="throughput")
    assert asked(both, 0.0, alone, arrival_rps=60.0, kv_cache_usage=0.1) == alone
    assert asked(both, 15.0, alone, arrival_rps=60.0, kv_cache_usage=0.1) == alone
    assert asked(both, 30.0, alone, arrival_rps=60.0, kv_cache_usage=1.1) == alone + 1


def test_dynamo_throughput_holds_until_it_knows_lengths() -> None:
    unknown = {"prompt_tokens_mean": np.nan, "output_tokens_mean": np.nan}
    assert asked(DynamoThroughputPolicy(fleet()), 0.0, 4, **unknown) == 4


# Two-level bandit


def test_autothrottle_captain_grows_at_a_spike_and_shrinks_to_the_peak_of_its_use() -> None:
    policy = AutothrottlePolicy(fleet(pool(max_replicas=100)), explore=0.0)
    assert asked(policy, 0.0, 10, demand=9.5) == 10  # above nine tenths of ten: stays
    assert asked(policy, 15.0, 10, demand=20.0) == 15  # half of it cannot be taken: 10 * 1.5
    policy = AutothrottlePolicy(fleet(pool(max_replicas=100)), explore=0.0)
    assert [asked(policy, 15.0 * tick, 10, demand=use) for tick, use in enumerate((6.2, 6.0))] == [7, 7]
    assert asked(AutothrottlePolicy(fleet(), explore=0.0), 0.0, 10, demand=0.5) == 5  # at most half at a time


def test_autothrottle_takes_back_a_step_down_that_was_followed_by_a_spike() -> None:
    policy = AutothrottlePolicy(fleet(pool(max_replicas=100)), explore=0.0)
    assert asked(policy, 0.0, 10, demand=5.0) == 5
    assert asked(policy, 15.0, 5, demand=5.5) == 10


def test_autothrottle_learns_which_set_point_is_cheap() -> None:
    policy = AutothrottlePolicy(fleet(), explore=0.0)
    asked(policy, 0.0, 10)
    policy._costs[0, policy._bucket[0]] = np.linspace(2.0, 0.4, len(TARGETS))[:, np.newaxis]
    asked(policy, 60.0, 10)
    assert policy._choice.tolist() == [len(TARGETS) - 1]


def test_autothrottle_draws_its_own_numbers() -> None:
    rows = np.arange(1)
    first, again, other = (AutothrottlePolicy(fleet(), seed=seed) for seed in (1, 1, 2))
    drawn = [[float(policy._uniform(rows)[0]) for _ in range(200)] for policy in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert 0.4 < np.mean(drawn[0]) < 0.6
    assert all(0.0 <= number < 1.0 for number in drawn[0])


# Our reactive rule


def reactive(seen_demand: list[float], **options: Any) -> list[int]:
    policy = ReactivePolicy(fleet(pool(max_replicas=100)), **{"headroom": 1.0, "backlog_boost": 0.0, **options})
    return [asked(policy, 15.0 * tick, 4, demand=value) for tick, value in enumerate(seen_demand)]


def test_reactive_takes_the_larger_of_two_windows() -> None:
    counts = reactive([10.0, *[2.0] * 8], short_s=15.0, long_s=60.0)
    assert counts == [10, 6, 5, 4, 2, 2, 2, 2, 2]  # the long mean: 10, 6, 4.67, 4, then 2
    assert reactive([2.0, 8.0], short_s=15.0, long_s=60.0) == [2, 8]


@pytest.mark.parametrize(("estimate", "expected"), [("tokens", 9), ("occupancy", 4), ("larger", 9), ("geometric", 6)])
def test_reactive_knows_four_estimates(estimate: str, expected: int) -> None:
    seen = observation(snapshot(replicas_target=4.0))
    seen.demand_tokens[:], seen.demand_occupancy[:] = 9.0, 4.0
    policy = ReactivePolicy(fleet(pool(max_replicas=100)), headroom=1.0, estimate=estimate)
    assert policy.propose(seen).replicas.tolist() == [[expected]]


@pytest.mark.parametrize(("oldest_wait_s", "expected"), [(0.9, 2), (1.1, 13)])
def test_reactive_rises_above_what_is_ready_when_the_oldest_wait_passes_half_the_objective(
    oldest_wait_s: float, expected: int
) -> None:
    policy = ReactivePolicy(fleet(pool(max_replicas=100)), headroom=1.0, backlog_boost=0.25)
    assert asked(policy, 0.0, 10, demand=2.0, oldest_wait_s=oldest_wait_s) == expected
