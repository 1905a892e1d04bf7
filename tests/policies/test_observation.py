"""The encoder: finite whatever comes, free of scale, row by row the same at any width, gaps told from zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes import (
    SNAPSHOT_FIELDS,
    engine,
    fleet,
    missing,
    pool,
    random_snapshot,
    rows_of,
    snapshot,
    snapshots,
    spec,
    spot,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Observation, Snapshot, take_rows
from policies.engine import StepModel
from policies.fleet import Fleet
from policies.observation import FEATURES, ObservationBuilder
from policies.spec import WindowSpec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

SLOW = engine(
    step=StepModel(
        a_ms=20, b_us_per_prefill_token=200, c_us_per_seq=200, d_us_per_1k_kv_tokens=200, e_ns_per_prefill_token2=0
    )
)
MIXED = (spec(pool()), spec(pool(), spot()), spec(spot(max_replicas=5)), spec(pool(), pool(engine=SLOW), spot()))


def builder(services: Fleet | None = None) -> ObservationBuilder:
    return ObservationBuilder(fleet() if services is None else services, WindowSpec())


def named(observation: Observation, row: int = 0) -> dict[str, float]:
    return dict(zip(FEATURES, observation.features[row].tolist(), strict=True))


def differing(one: dict[str, float], other: dict[str, float]) -> set[str]:
    return {name for name in FEATURES if one[name] != pytest.approx(other[name], abs=1e-6)}


def after(encoder: ObservationBuilder, *windows: Snapshot) -> dict[str, float]:
    return [named(encoder.observe(window)) for window in windows][-1]


def assert_sound(observation: Observation, n: int) -> None:
    assert observation.features.shape == (n, len(FEATURES))
    assert observation.features.dtype == np.float32
    assert np.isfinite(observation.features).all()
    for name in ("demand", "demand_tokens", "demand_occupancy", "batch_limit"):
        assert np.isfinite(getattr(observation, name)).all(), name


def test_feature_names_are_unique() -> None:
    assert len(set(FEATURES)) == len(FEATURES)


@settings(max_examples=25, deadline=None)
@given(st.lists(snapshots(n=2, pools=2), min_size=1, max_size=3))
def test_features_are_finite_whatever_is_seen(windows: list[Snapshot]) -> None:
    encoder = builder(Fleet.from_specs([spec(pool()), spec(pool(), spot())]))
    for window in windows:
        assert_sound(encoder.observe(window), 2)


def test_a_window_of_which_nothing_is_known_is_encoded() -> None:
    nothing: dict[str, Any] = dict.fromkeys(SNAPSHOT_FIELDS, np.nan)
    encoder = builder(fleet(n=3))
    assert_sound(encoder.observe(snapshot(n=3, **nothing)), 3)
    assert_sound(encoder.observe(snapshot(n=3)), 3)
    assert_sound(encoder.observe(snapshot(n=3, **nothing)), 3)


def test_service_without_pools_is_encoded() -> None:
    assert_sound(builder(Fleet.empty(2, 2)).observe(snapshot(n=2, pools=2)), 2)


def test_demand_is_the_larger_of_both_estimates() -> None:
    seen = builder().observe(snapshot())
    assert seen.demand.tolist() == np.maximum(seen.demand_tokens, seen.demand_occupancy).tolist()


DOUBLED = (
    "arrival_rps",
    "prompt_tps",
    "prefill_tps",
    "generation_tps",
    "finished_rps",
    "queue_requests",
    "replicas_target",
    "replicas_starting",
    "replicas_ready",
    "replicas_draining",
    "boot_pipeline",
    "running",
    "waiting",
)


def busy(scale: float, load: float = 1.0) -> Snapshot:
    """Two replicas and a third on its way, times the scale; the load times another factor."""
    values = {
        "arrival_rps": 20.0 * load,
        "prompt_tps": 2000.0 * load,
        "prefill_tps": 1500.0 * load,
        "generation_tps": 4000.0 * load,
        "finished_rps": 20.0 * load,
        "queue_requests": 5.0 * load,
        "replicas_target": 3.0,
        "replicas_starting": 1.0,
        "replicas_ready": 2.0,
        "replicas_draining": 1.0,
        "boot_pipeline": [0.0, 1.0, 0.0],
        "running": 80.0 * load,
        "waiting": 4.0 * load,
    }
    assert set(values) == set(DOUBLED)
    scaled: dict[str, Any] = {name: np.asarray(value) * scale for name, value in values.items()}
    return snapshot(**scaled, oldest_wait_s=0.5, ttft_attainment=0.9)


def test_twice_the_load_on_twice_the_replicas_looks_the_same_but_for_the_size() -> None:
    loads = (1.0, 1.5, 0.5, 1.0)
    one = after(builder(), *(busy(1.0, load) for load in loads))
    two = after(builder(), *(busy(2.0, load) for load in loads))
    assert differing(one, two) == {"log_provisioned", "provisioned_over_maximum"}


def test_twice_the_load_on_the_same_replicas_looks_different() -> None:
    changed = differing(after(builder(), busy(1.0)), after(builder(), busy(1.0, load=2.0)))
    assert {
        "log_demand_tokens_over_provisioned",
        "log_demand_occupancy_over_provisioned",
        "queue_over_limit",
        "occupancy_of_cap",
    } <= changed


def test_demand_is_compared_with_what_unlike_pools_can_do() -> None:
    """One slow replica, which does half the work, is worth half of a fast one."""
    services = fleet(pool(), pool(name="slow", engine=SLOW))
    load: dict[str, Any] = {"generation_tps": 4000.0, "running": [[64.0, 0.0]], "kv_cache_usage": np.nan}
    fast = after(builder(services), snapshot(pools=2, replicas_ready=[[2.0, 0.0]], **load))
    mixed_seen = builder(services).observe(snapshot(pools=2, replicas_ready=[[1.0, 2.0]], **load))
    exchange = mixed_seen.demand[0, 0] / mixed_seen.demand[0, 1]
    mixed = named(mixed_seen)
    name = "log_demand_tokens_over_provisioned"
    assert mixed[name] - fast[name] == pytest.approx(np.log(2.0 / (1.0 + 2.0 * exchange)), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("missing_share", [0.0, 0.1])
def test_each_row_of_a_wide_builder_is_what_it_would_be_alone(seed: int, missing_share: float) -> None:
    rng = np.random.default_rng(seed)
    services = Fleet.from_specs(MIXED)
    wide = builder(services)
    alone = [builder(Fleet.from_specs([single])) for single in MIXED]
    for tick in range(12):
        window = random_snapshot(rng, services, 15.0 * tick, missing_share)
        together = wide.observe(window)
        for row, single in enumerate(MIXED):
            pools = len(single.pools)
            own = alone[row].observe(rows_of(window, row, pools))
            np.testing.assert_allclose(together.features[row], own.features[0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(together.demand[row, :pools], own.demand[0], rtol=1e-12)
            assert not together.demand[row, pools:].any()


def histories(rng: np.random.Generator, services: Fleet, ticks: int) -> list[Snapshot]:
    return [random_snapshot(rng, services, 15.0 * tick, 0.1) for tick in range(ticks)]


def test_reset_of_a_row_makes_it_new_and_leaves_the_others() -> None:
    rng = np.random.default_rng(3)
    services = Fleet.from_specs(MIXED)
    encoder, untouched, fresh = builder(services), builder(services), builder(services)
    for window in histories(rng, services, 8):
        encoder.observe(window)
        untouched.observe(window)
    encoder.reset(np.array([False, True, False, False]))
    for window in histories(rng, services, 4):
        features = encoder.observe(window).features
        expected = untouched.observe(window).features
        expected[1] = fresh.observe(window).features[1]
        np.testing.assert_array_equal(features, expected)


def test_reset_forgets_the_last_known_misses() -> None:
    encoder = builder()
    after(encoder, snapshot(ttft_attainment=0.5, tpot_attainment=0.5))
    encoder.reset()
    seen = after(encoder, snapshot(ttft_attainment=np.nan, tpot_attainment=np.nan))
    assert (seen["ttft_miss_rate"], seen["tpot_miss_rate"]) == (0.0, 0.0)


def test_reset_of_everything_is_a_new_builder() -> None:
    rng = np.random.default_rng(4)
    services = Fleet.from_specs(MIXED)
    encoder, fresh = builder(services), builder(services)
    for window in histories(rng, services, 8):
        encoder.observe(window)
    encoder.reset()
    for window in histories(rng, services, 4):
        np.testing.assert_array_equal(encoder.observe(window).features, fresh.observe(window).features)


def test_rows_begun_anew_are_new_and_leave_the_others() -> None:
    rng = np.random.default_rng(5)
    services = Fleet.from_specs(MIXED)
    encoder, untouched = builder(services), builder(services)
    for window in histories(rng, services, 6):
        encoder.observe(window)
        untouched.observe(window)
    listed = np.array([3, 1])
    fresh = builder(take_rows(services, listed))
    first, *later = histories(rng, services, 4)
    started = encoder.observe_rows(take_rows(first, listed), listed).features
    np.testing.assert_array_equal(started, fresh.observe(take_rows(first, listed)).features)
    for window in later:
        features = encoder.observe(window).features
        expected = untouched.observe(window).features
        expected[listed] = fresh.observe(take_rows(window, listed)).features
        np.testing.assert_array_equal(features, expected)


def test_an_observation_is_not_changed_by_what_comes_later() -> None:
    encoder = builder(fleet(n=2))
    seen = encoder.observe(snapshot(n=2))
    kept = {name: getattr(seen, name).copy() for name in ("features", "demand", "demand_tokens", "batch_limit")}
    encoder.observe(snapshot(n=2, running=50.0))
    encoder.reset(np.array([True, False]))
    for name, value in kept.items():
        np.testing.assert_array_equal(getattr(seen, name), value)


def test_unknown_latency_has_its_own_feature_and_keeps_the_last_known_misses() -> None:
    encoder = builder()
    known = after(encoder, snapshot(ttft_attainment=0.7, tpot_attainment=0.9))
    unknown = after(encoder, snapshot(ttft_attainment=np.nan, tpot_attainment=np.nan))
    assert (known["latency_unknown"], unknown["latency_unknown"]) == (0.0, 1.0)
    assert unknown["ttft_miss_rate"] == known["ttft_miss_rate"] == pytest.approx(0.3)
    assert unknown["tpot_miss_rate"] == known["tpot_miss_rate"] == pytest.approx(0.1)
    assert unknown["log_recent_miss_rate_over_allowed"] == known["log_recent_miss_rate_over_allowed"]


def test_blind_windows_are_counted_and_sight_ends_the_count() -> None:
    encoder = builder()
    streaks = [
        after(encoder, window)["blind_streak"] for window in (snapshot(), *[missing()] * 12, snapshot(), missing())
    ]
    assert streaks == pytest.approx([0.0, *[0.1 * k for k in range(1, 11)], 1.0, 1.0, 0.0, 0.1])


def test_nothing_known_is_not_nothing_there() -> None:
    zeros: dict[str, Any] = dict.fromkeys(set(SNAPSHOT_FIELDS) - {"time_s", "window_s"}, 0.0)
    assert {"blind_streak", "latency_unknown"} <= differing(
        after(builder(), missing()), after(builder(), snapshot(**zeros))
    )


def test_demand_stands_while_blind() -> None:
    encoder = builder()
    seen = encoder.observe(busy(1.0))
    for window in (missing(), snapshot(running=np.nan), snapshot(replicas_ready=np.nan)):
        blind = encoder.observe(window)
        for name in ("demand", "demand_tokens", "demand_occupancy", "batch_limit"):
            assert getattr(blind, name).tolist() == getattr(seen, name).tolist(), name
    assert encoder.observe(busy(2.0)).demand[0, 0] > 1.5 * seen.demand[0, 0]


def test_blind_windows_leave_no_trace_in_the_demand_means() -> None:
    names = [name for name in FEATURES if "mean" in name or "variation" in name or "peak" in name]
    assert len(names) == 5
    gaps, whole = builder(), builder()
    with_gaps = after(gaps, missing(), busy(1.0), missing(), missing(), busy(2.0))
    without = after(whole, busy(1.0), busy(2.0))
    assert [with_gaps[name] for name in names] == pytest.approx([without[name] for name in names])


def test_demand_means_follow_at_their_own_pace() -> None:
    encoder = builder()
    calm = after(encoder, busy(1.0))
    rise = after(encoder, busy(4.0))
    assert [calm[name] for name in FEATURES[2:7]] == [0.0] * 5
    share = 1 - np.exp(-15 / np.array([60.0, 300.0, 1800.0]))
    means = 1 + 3 * share
    expected = np.log([4 / means[0], means[0] / means[1], means[1] / means[2], 4 / means[1]])
    assert [rise[name] for name in FEATURES[2:6]] == pytest.approx(expected.tolist(), abs=1e-6)
    assert rise["demand_variation_300s"] == pytest.approx(np.sqrt(share[1]) * (4 - means[1]) / means[1], abs=1e-6)


def test_peak_is_remembered_and_decays() -> None:
    encoder = builder()
    after(encoder, busy(1.0), busy(4.0))
    later = after(encoder, *[busy(1.0)] * 240)
    assert later["log_peak_over_mean_300s"] == pytest.approx(0.0, abs=1e-2)
    encoder.reset()
    soon = after(encoder, busy(1.0), busy(4.0), busy(1.0))
    assert soon["log_peak_over_mean_300s"] > 0.5


def test_scale_events_fade_over_two_minutes() -> None:
    encoder = builder()
    first = after(encoder, snapshot(replicas_target=2.0))
    up = after(encoder, snapshot(replicas_target=3.0))
    later = after(encoder, snapshot(replicas_target=3.0))
    down = after(encoder, snapshot(replicas_target=1.0))
    assert [(tick["since_scale_up"], tick["since_scale_down"]) for tick in (first, up, later, down)] == [
        (0.0, 0.0),
        (1.0, 0.0),
        (pytest.approx(np.exp(-15 / 120)), 0.0),
        (pytest.approx(np.exp(-30 / 120)), 1.0),
    ]


def test_an_unknown_target_is_no_scale_event() -> None:
    seen = after(builder(), snapshot(replicas_target=2.0), snapshot(replicas_target=np.nan), snapshot())
    assert (seen["since_scale_up"], seen["since_scale_down"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("specs", "offered", "ratio", "share"),
    [
        ((pool(),), 0.0, 1.0, 0.0),
        ((pool(), spot()), 1.0, 0.5, 0.5),
        ((spot(),), 1.0, 1.0, 1.0),
        ((pool(usd_per_gpu_hour=7.2), pool(), spot(usd_per_gpu_hour=0.9), spot()), 1.0, 0.25, 0.5),
    ],
    ids=["on demand", "both", "spot alone", "cheapest of each"],
)
def test_spot_is_seen_as_offered_price_ratio_and_share(
    specs: tuple[Any, ...], offered: float, ratio: float, share: float
) -> None:
    seen = after(builder(fleet(*specs, width=5)), snapshot(pools=5, replicas_ready=fleet(*specs, width=5).exists * 1.0))
    assert [seen[name] for name in ("spot_offered", "spot_price_ratio", "spot_share_of_capacity")] == [
        offered,
        ratio,
        share,
    ]


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("log_provisioned", {"replicas_ready": 2, "replicas_starting": 1}, 0.5 * np.log(4)),
        ("provisioned_over_maximum", {"replicas_ready": 4, "replicas_starting": 1}, 0.25),
        ("ready_over_provisioned", {"replicas_ready": 3, "replicas_starting": 1}, 0.75),
        ("starting_soon_over_provisioned", {"replicas_ready": 4, "boot_pipeline": [1, 0, 0]}, 0.25),
        ("starting_mid_over_provisioned", {"replicas_ready": 4, "boot_pipeline": [0, 1, 0]}, 0.25),
        ("starting_late_over_provisioned", {"replicas_ready": 4, "boot_pipeline": [0, 0, 1]}, 0.25),
        ("draining_over_provisioned", {"replicas_ready": 4, "replicas_draining": 1}, 0.25),
        ("queue_over_limit", {"replicas_ready": 2, "queue_requests": 100, "waiting": 28}, np.log(2)),
        ("oldest_wait_over_ttft_slo", {"oldest_wait_s": 1.0}, 0.5),
        ("occupancy_of_cap", {"replicas_ready": 2, "running": 32, "batch_cap": 64}, 0.25),
        ("kv_cache_usage", {"kv_cache_usage": 0.6}, 0.6),
        ("batch_cap_over_limit", {"batch_cap": 32}, np.log(0.5)),
        ("limit_over_max_num_seqs", {}, 1.0),
        ("ttft_miss_rate", {"ttft_attainment": 0.75}, 0.25),
        ("tpot_miss_rate", {"tpot_attainment": 0.75}, 0.25),
        ("prefill_share_of_work", {"generation_tps": 0, "prefill_tps": 10}, 1.0),
        ("log_request_seconds", {}, np.log(200 * 0.05 / 10)),
        ("log_cold_start", {}, np.log(130 / 120)),
        ("log_ttft_slo", {}, np.log(2.0)),
        ("log_tpot_slo_over_step", {}, np.log(5.0)),
        ("log_miss_price", {}, (np.log(20) - 3) / 2),
        ("log_allowed_miss_rate", {}, 0.0),
    ],
)
def test_feature_by_hand(name: str, overrides: dict[str, Any], expected: float) -> None:
    assert after(builder(), snapshot(**overrides))[name] == pytest.approx(expected, abs=1e-6)


def test_recent_misses_are_compared_with_what_is_allowed() -> None:
    encoder = builder()
    name = "log_recent_miss_rate_over_allowed"
    assert after(encoder, snapshot())[name] == pytest.approx(np.log(0.1))
    worst = after(encoder, snapshot(ttft_attainment=0.9, tpot_attainment=0.5))[name]
    missed = 0.5 * (1 - np.exp(-15 / 300))
    assert worst == pytest.approx(np.log(missed / 0.01 + 0.1))


@pytest.mark.parametrize("counted", [True, False])
def test_offered_load_follows_what_arrives_or_what_is_served_where_nobody_counts_arrivals(counted: bool) -> None:
    unknown: dict[str, Any] = {} if counted else {"arrival_rps": np.nan, "prompt_tps": np.nan}
    half: dict[str, Any] = {
        "arrival_rps": 1,
        "prompt_tps": 100,
        "prefill_tps": 100,
        "generation_tps": 200,
        "finished_rps": 1,
    }
    encoder = builder()
    busy = encoder.observe(snapshot(**unknown)).offered_load
    for _ in range(200):
        last = encoder.observe(snapshot(**{**half, **unknown}))
    assert last.offered_load == pytest.approx(busy / 2, rel=0.01)
    # 1 request a second over twice 300 s, each as different as chat's.
    assert last.offered_load_error == (pytest.approx(1.5 / 600**0.5, rel=0.01) if counted else np.inf)


def test_offered_load_does_not_know_what_waits() -> None:
    calm = builder().observe(snapshot())
    crowded = builder().observe(snapshot(queue_requests=500, waiting=40))
    assert crowded.offered_load == calm.offered_load
    assert crowded.demand > 2 * calm.demand
