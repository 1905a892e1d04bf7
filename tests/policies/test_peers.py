"""Numbers that each peer's own documentation or source gives, one section a peer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, missing, observation, pool, snapshot, spot

from policies.baselines.aibrix import AibrixPolicy, apa
from policies.baselines.keda import KedaPolicy
from policies.baselines.knative import KnativePolicy
from policies.baselines.llm_d import LlmdInFlightPolicy, LlmdSloPolicy, LlmdTokensPolicy, slo_law
from policies.baselines.ray_serve import RayServePolicy
from policies.baselines.single_pool import spread, token_price
from policies.baselines.skyserve import SkyServePolicy
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Policy
from policies.fleet import Fleet

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def wide(n: int = 1, **overrides: Any) -> Fleet:
    return fleet(pool(max_replicas=1000, **overrides), n=n)


def asked(policy: Policy, time_s: float, current: float, ready: float | None = None, **overrides: Any) -> int:
    """The count for one window of a service with `current` replicas."""
    seen = snapshot(
        time_s=time_s,
        replicas_target=current,
        replicas_ready=current if ready is None else ready,
        **{"running": 0.0, **overrides},
    )
    return int(policy.propose(observation(seen)).replicas.sum())


def steady(policy: Policy, ticks: int, current: float, **overrides: Any) -> list[int]:
    """The counts over windows of 15 s in which nothing changes, not even the fleet."""
    return [asked(policy, 15.0 * tick, current, **overrides) for tick in range(ticks)]


def followed(policy: Policy, loads: list[float], current: int, field: str = "running") -> list[int]:
    """The counts of a fleet that follows at once."""
    path = []
    for tick, load in enumerate(loads):
        current = asked(policy, 15.0 * tick, current, **{field: load})
        path.append(current)
    return path


# Placement


def test_counts_are_placed_cheapest_per_token_first_after_the_minima() -> None:
    big = engine(usd_per_gpu_hour=5.0, max_num_seqs=256)  # dearer by replica, cheaper by token
    services = fleet(pool(min_replicas=2, max_replicas=5), pool(engine=big, min_replicas=0, max_replicas=3))
    assert (token_price(services)[0, 1] < token_price(services)[0, 0]).all()
    placed = [spread(np.array([float(count)]), services, 0.5)[0].tolist() for count in range(10)]
    assert placed[:3] == [[2, 0], [2, 0], [2, 0]]
    assert placed[3:] == [[2, 1], [2, 2], [2, 3], [3, 3], [4, 3], [5, 3], [5, 3]]


def test_a_share_goes_to_spot_and_what_does_not_fit_to_the_other_class() -> None:
    services = fleet(pool(min_replicas=1, max_replicas=20), spot(max_replicas=3))
    placed = [spread(np.array([float(count)]), services, 0.5)[0].tolist() for count in (1, 2, 3, 5, 9)]
    assert placed == [[1, 0], [1, 1], [2, 1], [3, 2], [6, 3]]
    assert spread(np.array([4.0]), services, 1.0)[0].tolist() == [1, 3]
    assert spread(np.array([4.0]), services, 0.0)[0].tolist() == [4, 0]


def test_unchanged_count_leaves_the_pools_alone() -> None:
    services = fleet(pool(max_replicas=20), pool(name="other", max_replicas=20))
    policy = KnativePolicy(services, target=10.0, utilization=1.0)
    seen = snapshot(pools=2, replicas_target=[1.0, 3.0], replicas_ready=[1.0, 3.0], running=[10.0, 30.0])
    assert policy.propose(observation(seen)).replicas.tolist() == [[1, 3]]


# KEDA


@pytest.mark.parametrize(
    ("waiting", "current", "expected"), [(50.0, 5, 10), (26.0, 5, 5), (28.0, 5, 6), (1000.0, 5, 10)]
)
def test_keda_divides_the_sum_by_the_threshold_within_the_hpas_limits(
    waiting: float, current: int, expected: int
) -> None:
    assert asked(KedaPolicy(wide(), threshold=5.0), 0.0, current, queue_requests=waiting) == expected


def test_keda_on_its_queue_falls_to_one_when_the_queue_is_empty() -> None:
    assert steady(KedaPolicy(wide()), 22, 8)[19:] == [8, 1, 1]


def test_keda_wakes_at_a_poll_and_sleeps_after_its_cooldown() -> None:
    policy = KedaPolicy(wide(min_replicas=0))
    assert [asked(policy, 15.0 * tick, 0, queue_requests=float(tick >= 1)) for tick in range(3)] == [0, 0, 1]
    policy = KedaPolicy(wide(min_replicas=0))
    assert [asked(policy, 15.0 * tick, 1, running=float(tick == 0)) for tick in range(22)] == [1] * 20 + [0, 0]


# Knative


@pytest.mark.parametrize(("concurrency", "expected"), [(700.0, 10), (701.0, 11), (70.0, 5), (0.0, 5), (1330.0, 19)])
def test_knative_stable_count_is_the_total_over_seventy_and_at_most_halves(concurrency: float, expected: int) -> None:
    policy = KnativePolicy(wide())
    policy._fresh[:] = False  # a revision that was not just found, so not in panic
    assert asked(policy, 0.0, 10, running=concurrency) == expected


def test_knative_panics_at_twice_the_ready_replicas_and_calms_after_a_stable_window() -> None:
    policy = KnativePolicy(wide(), target=10.0, utilization=1.0)
    policy._fresh[:] = False  # a revision that was not just found, so not in panic
    seen = []
    for tick, load in enumerate([20.0, 30.0, 31.0, *[20.0] * 8]):
        count = asked(policy, 15.0 * tick, 2, running=load)
        seen.append((count, bool(policy.panicking[0])))
    # 31 over 10 make four for two ready replicas: panic, at its peak until more than 60 s have gone by without.
    assert seen[:3] == [(2, False), (3, False), (4, True)]
    assert [panicking for _, panicking in seen[3:]] == [True] * 4 + [False] * 4
    assert [count for count, _ in seen[3:]] == [4] * 4 + [2] * 4


def test_knative_panic_never_falls_below_its_peak() -> None:
    policy = KnativePolicy(wide(), target=10.0, utilization=1.0)
    counts = [asked(policy, 15.0 * tick, 2, running=load) for tick, load in enumerate([10.0, 200.0, 40.0, 5.0, 5.0])]
    assert counts == [2, 20, 20, 20, 20]


def test_knative_found_with_several_replicas_starts_in_panic() -> None:
    found, single = KnativePolicy(wide()), KnativePolicy(wide())
    assert steady(found, 6, 6) == [6, 6, 6, 6, 6, 3]
    assert found.panicking.tolist() == [False]
    assert steady(single, 2, 1) == [1, 1]


def test_knative_delay_keeps_the_highest_count() -> None:
    policy = KnativePolicy(wide(), target=10.0, utilization=1.0, scale_down_delay_s=120.0, stable_window_s=15.0)
    policy._fresh[:] = False
    loads = [25.0, *[15.0] * 9]
    assert [asked(policy, 15.0 * tick, 2, running=load) for tick, load in enumerate(loads)] == [3] * 8 + [2] * 2


# Ray Serve


def test_ray_serve_waits_thirty_seconds_up_and_ten_minutes_down() -> None:
    assert steady(RayServePolicy(wide()), 4, 4, running=16.0) == [4, 4, 8, 4]
    down = steady(RayServePolicy(wide()), 42, 4, running=2.0)
    assert [tick for tick, count in enumerate(down) if count != 4] == [40]
    assert down[40] == 1


def test_ray_serve_wish_that_turns_begins_anew() -> None:
    policy = RayServePolicy(wide(), look_back_period_s=15.0)
    loads = [16.0, 8.0, 16.0, 16.0, 16.0]
    assert [asked(policy, 15.0 * tick, 4, running=load) for tick, load in enumerate(loads)] == [4, 4, 4, 4, 8]


@pytest.mark.parametrize(
    ("factor", "load", "expected"),
    [(1.0, 14.0, 7), (0.5, 14.0, 9), (0.1, 16.0, 9), (0.1, 19.0, 10)],  # 0.1: ceil would stay at ten, so one less
)
def test_ray_serve_damps_a_step_down_without_getting_stuck(factor: float, load: float, expected: int) -> None:
    policy = RayServePolicy(wide(), downscaling_factor=factor, downscale_delay_s=0.0)
    assert asked(policy, 0.0, 10, running=load) == expected


def test_ray_serve_leaves_zero_at_once_and_reaches_it_from_one_only() -> None:
    services = wide(min_replicas=0)
    assert asked(RayServePolicy(services), 0.0, 0, queue_requests=5.0) == 3
    assert asked(RayServePolicy(services, downscale_delay_s=0.0), 0.0, 4) == 1
    assert asked(RayServePolicy(services, downscale_delay_s=0.0), 0.0, 1) == 0


# llm-d


@pytest.mark.parametrize(
    ("strain", "current", "ready", "expected"),
    [
        (1.1, 4, 4, 8),  # twice the upper threshold
        (0.55, 4, 4, 4),
        (0.56, 4, 4, 5),
        (1.1, 8, 4, 8),  # only half is ready: s * c is at the threshold
        (0.40, 8, 8, 8),
        (0.20, 8, 8, 4),
        (0.39, 8, 8, 8),  # 8 * 2.5 % is less than a replica
        (0.0, 8, 8, 0),
        (2.0, 8, 0, 30),  # nothing ready counts as all ready
    ],
)
def test_llm_d_slo_law(strain: float, current: float, ready: float, expected: float) -> None:
    wish = slo_law(np.array([strain]), np.array([current * 1.0]), np.array([ready * 1.0]))
    assert wish.tolist() == [expected]


def latency(ttft_bin: int, tpot_bin: int = 0, rps: float = 2.0) -> dict[str, Any]:
    return {
        "ttft_histogram_rps": rps * np.eye(len(TTFT_EDGES_S) + 1)[ttft_bin],
        "tpot_histogram_rps": rps * np.eye(len(TPOT_EDGES_S) + 1)[tpot_bin],
    }


def test_llm_d_slo_scales_on_the_ninetieth_percentile() -> None:
    # P90 TTFT in 1.5 .. 2 s is 1.95 s, 0.975 of the objective: 4 * (0.975 / 0.55) = 7.1, after 30 s of the same.
    assert steady(LlmdSloPolicy(wide()), 4, 4, **latency(10)) == [4, 4, 8, 8]
    # P90 TPOT in 50 .. 60 ms is 59 ms of 50: 8.6, at most twice what was there a minute ago.
    assert steady(LlmdSloPolicy(wide()), 4, 4, **latency(0, 8)) == [4, 4, 8, 8]


def test_llm_d_slo_takes_silence_for_ease_but_not_ignorance() -> None:
    idle = steady(LlmdSloPolicy(wide()), 30, 8, **latency(0, rps=0.0))
    assert idle == [8] * 12 + [7] * 18  # one replica at a time, after 180 s
    policy = LlmdSloPolicy(wide())
    unknown = {"ttft_histogram_rps": np.nan, "tpot_histogram_rps": np.nan}
    assert steady(policy, 30, 8, **unknown) == [8] * 30


def test_llm_d_slo_caps_and_smooths_its_signal() -> None:
    policy = LlmdSloPolicy(wide())
    seen = [asked(policy, 15.0 * tick, 1, **latency(20 if tick == 0 else 0)) for tick in range(6)]
    assert max(seen) <= 4  # 60 s count as twice the objective


@pytest.mark.parametrize(
    ("running", "waiting", "expected"),
    [(80.0, 0.0, 5), (64.0, 0.0, 4), (70.0, 0.0, 4), (0.0, 96.0, 6), (1000.0, 0.0, 8)],
)
def test_llm_d_in_flight_divides_by_sixteen_and_doubles_at_most(running: float, waiting: float, expected: int) -> None:
    assert asked(LlmdInFlightPolicy(wide()), 0.0, 4, running=running, queue_requests=waiting) == expected


def test_llm_d_tokens_adds_one_replica_in_three_minutes() -> None:
    # 60 requests of 1,000 tokens over 10,000 tokens/s are 6 s of prefill: four replicas of 1.5 s.
    policy = LlmdTokensPolicy(wide())
    path = followed(policy, [60.0] * 30, 1)
    assert path[0] == 1  # no request has finished: no length yet
    policy = LlmdTokensPolicy(wide())
    current, path = 1, []
    for tick in range(40):
        current = asked(policy, 15.0 * tick, current, running=60.0, prompt_tokens_mean=1000.0, kv_cache_usage=0.0)
        path.append(current)
    assert path == [2] * 12 + [3] * 12 + [4] * 16


def test_llm_d_tokens_holds_the_cache_at_four_fifths() -> None:
    assert asked(LlmdTokensPolicy(wide()), 0.0, 4, kv_cache_usage=0.95) == 5  # 3.8 / 0.8 = 4.75


# AIBrix


@pytest.mark.parametrize(
    ("ratio", "current", "expected"),
    [
        (1.1, 10, 10),
        (1.11, 10, 12),
        (0.9, 10, 10),
        (0.89, 10, 9),
        (3.0, 10, 20),
        (0.1, 10, 5),
        (0.1, 5, 2),
        (9.0, 1, 2),
    ],
)
def test_aibrix_scales_by_the_ratio_between_half_and_twice(ratio: float, current: float, expected: float) -> None:
    assert apa(np.array([ratio]), np.array([float(current)])).tolist() == [expected]


def test_aibrix_averages_over_three_minutes() -> None:
    policy = AibrixPolicy(wide())
    usage = [0.5] * 12 + [1.0] * 12
    counts = [asked(policy, 15.0 * tick, 10, kv_cache_usage=value) for tick, value in enumerate(usage)]
    # After k windows at 1.0 of twelve the mean is 0.5 + k / 24: the ratio leaves the tolerance at k = 2.
    assert counts[:15] == [10] * 13 + [12, 13]
    assert counts[-1] == 20


@pytest.mark.parametrize(("cooldown", "expected"), [("lowest", 5), ("highest", 10)])
def test_aibrix_cooldown_takes_the_lowest_recommendation_as_written(cooldown: str, expected: int) -> None:
    policy = AibrixPolicy(wide(), stable_window_s=15.0, cooldown=cooldown)
    usage = [0.5, 0.1, 0.4]  # ratios 1, 0.2, 0.8: ten, five, eight
    counts = [asked(policy, 15.0 * tick, 10, kv_cache_usage=value) for tick, value in enumerate(usage)]
    assert counts[-1] == expected


# SkyServe


def test_skyserve_needs_fifteen_wishes_up_and_sixty_down() -> None:
    up = steady(SkyServePolicy(wide(), target_qps=1.0), 40, 4, arrival_rps=8.0)
    assert up.index(8) * 15.0 == 285.0  # the fifteenth decision, at 280 s on its own clock
    down = steady(SkyServePolicy(wide(), target_qps=1.0), 90, 4, arrival_rps=2.0)
    assert down.index(2) * 15.0 == 1185.0  # the sixtieth, at 1180 s


def test_skyserve_forgets_its_wishes_at_one_contrary_sample() -> None:
    policy = SkyServePolicy(wide(), target_qps=1.0)
    policy._rate.span_s = 15.0
    rates = [8.0] * 15 + [4.0] * 2 + [8.0] * 30
    counts = [asked(policy, 15.0 * tick, 4, arrival_rps=rate) for tick, rate in enumerate(rates)]
    assert set(counts[:36]) == {4}
    assert 8 in counts


def test_skyserve_rate_is_of_a_minute_and_rounds_up() -> None:
    policy = SkyServePolicy(wide(), target_qps=2.5, upscale_delay_s=20.0)
    assert asked(policy, 0.0, 2, arrival_rps=7.6) == 4


def test_skyserve_leaves_zero_at_once() -> None:
    assert asked(SkyServePolicy(wide(min_replicas=0), target_qps=1.0), 0.0, 0, arrival_rps=3.0) == 3


def test_skyserve_fills_in_on_demand_for_spot_that_is_not_ready() -> None:
    services = fleet(pool(min_replicas=0), spot())
    policy = SkyServePolicy(services, target_qps=1.0, upscale_delay_s=20.0, base_ondemand=1)
    seen = snapshot(pools=2, arrival_rps=6.0, replicas_target=[1.0, 2.0], replicas_ready=[1.0, 2.0])
    # Six wanted: one on-demand for the base, five spot, of which two are ready: three more on-demand meanwhile.
    assert policy.propose(observation(seen)).replicas.tolist() == [[4, 5]]


# All of them


def test_peers_hold_through_a_window_without_metrics() -> None:
    policy = KnativePolicy(wide(), target=10.0, utilization=1.0)
    assert asked(policy, 0.0, 4, running=80.0) == 8
    assert policy.propose(observation(missing(time_s=15.0))).replicas.tolist() == [[4]]
