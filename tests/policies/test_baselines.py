"""What every baseline promises, and each one's own rule by worked examples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, missing, observation, pool, random_snapshot, rows_of, snapshot, snapshots, spec, spot
from hypothesis import given, settings

from policies.action import allocate, reference_batch_cap
from policies.baselines.hpa import HpaPolicy
from policies.baselines.static import StaticPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Observation, Policy, Snapshot
from policies.fleet import Fleet
from policies.lineup import BASELINES
from policies.observation import ObservationBuilder
from policies.self_tuned import SelfTunedPolicy
from policies.spec import WindowSpec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

CHOICES: dict[str, Callable[[Fleet], Policy]] = {
    f"{name}:{item.name}={choice}": lambda services, make=make, item=item, choice=choice: make(
        services, **{item.name: choice}
    )
    for name, make in BASELINES.items()
    for item in make.PARAMETERS
    for choice in item.choices
    if choice != item.default
}
POLICIES: dict[str, Callable[[Fleet], Policy]] = {
    **BASELINES,
    **CHOICES,
    "static of 30": lambda services: StaticPolicy(services, np.full(services.pools, 30), batch_cap=1000),
    "hpa without stabilisation": lambda services: HpaPolicy(services, stabilization_s=0.0),
    **{
        f"{name}+self": lambda services, make=BASELINES[name]: SelfTunedPolicy(make(services), services)
        for name in ("reactive", "hpa", "llm-d-slo", "wva-v2")
    },
}
every_baseline = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES.keys())
SPECS = (spec(pool()), spec(pool(min_replicas=2), spot()), spec(spot(max_replicas=5)))


def observed(services: Fleet, ticks: int, seed: int = 0, missing_share: float = 0.02) -> list[Observation]:
    """Windows of SPECS, which is what `services` must be of; encoded once for all policies."""
    return list(_observed(services.pools, ticks, seed, missing_share))


@functools.cache
def _observed(pools: int, ticks: int, seed: int, missing_share: float) -> tuple[Observation, ...]:
    rng = np.random.default_rng(seed)
    services = Fleet.from_specs(SPECS, pools)
    encoder = ObservationBuilder(services, WindowSpec())
    return tuple(encoder.observe(random_snapshot(rng, services, 15.0 * tick, missing_share)) for tick in range(ticks))


def row_of(seen: Observation, row: int, pools: int) -> Observation:
    at = slice(row, row + 1)
    pool_arrays = ("demand_tokens", "demand_occupancy", "demand", "demand_mean", "batch_limit")
    return Observation(
        snapshot=rows_of(seen.snapshot, row, pools),
        blind=seen.blind[at],
        features=seen.features[at],
        **{name: getattr(seen, name)[at, :pools] for name in pool_arrays},
        offered_load=seen.offered_load[at],
        offered_load_error=seen.offered_load_error[at],
    )


Replicas = list[list[list[int]]]


def wishes(policy: Policy, seen: list[Observation]) -> Replicas:
    return [policy.propose(window).replicas.tolist() for window in seen]


@every_baseline
def test_proposals_have_the_fleets_shape_in_whole_numbers(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS, 3)
    wish = make(services).propose(observed(services, 1)[0])
    assert wish.replicas.shape == wish.batch_cap.shape == (3, 3)
    assert wish.replicas.dtype == wish.batch_cap.dtype == np.int64


@settings(max_examples=15, deadline=None)
@given(seen=snapshots(n=3, pools=2))
def test_proposals_are_within_bounds_whatever_is_seen(seen: Snapshot) -> None:
    services = Fleet.from_specs(SPECS)
    encoder = ObservationBuilder(services, WindowSpec())
    windows = [
        encoder.observe(window) for window in (seen, snapshot(n=3, pools=2, running=200.0), missing(n=3, pools=2), seen)
    ]
    for name, make in POLICIES.items():
        policy = make(services)
        for window in windows:
            wish = policy.propose(window)
            assert (wish.replicas >= services.min_replicas).all(), name
            assert (wish.replicas <= services.max_replicas).all(), name
            assert (wish.batch_cap >= 1).all(), name
            assert (wish.batch_cap <= services.max_num_seqs).all(), name


@every_baseline
def test_same_history_gives_the_same_proposals(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS)
    seen = observed(services, 30)
    assert wishes(make(services), seen) == wishes(make(services), seen)


@every_baseline
def test_reset_policy_is_a_new_one(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS)
    policy = make(services)
    wishes(policy, observed(services, 30, seed=1))
    policy.reset()
    again = observed(services, 30, seed=2)
    assert wishes(policy, again) == wishes(make(services), again)


@every_baseline
def test_reset_row_is_new_and_the_others_go_on(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS)
    policy, untouched, fresh = make(services), make(services), make(services)
    for one in (policy, untouched):
        wishes(one, observed(services, 25, seed=1))
    policy.reset(np.array([False, True, False]))
    later = observed(services, 60, seed=2)[25:]
    after, others, new = (wishes(one, later) for one in (policy, untouched, fresh))
    assert [tick[1] for tick in after] == [tick[1] for tick in new]
    assert [(tick[0], tick[2]) for tick in after] == [(tick[0], tick[2]) for tick in others]


@every_baseline
def test_each_service_is_scaled_as_if_alone(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS, 3)
    seen = observed(services, 40)
    together = wishes(make(services), seen)
    for row, single in enumerate(SPECS):
        width = len(single.pools)
        alone = wishes(make(Fleet.from_specs([single])), [row_of(window, row, width) for window in seen])
        assert alone == [[tick[row][:width]] for tick in together]


@every_baseline
def test_proposal_is_not_changed_by_what_comes_later(make: Callable[[Fleet], Policy]) -> None:
    services = Fleet.from_specs(SPECS)
    policy, seen = make(services), observed(services, 2)
    first = policy.propose(seen[0])
    kept = first.replicas.tolist()
    policy.propose(seen[1]).replicas[:] = 99
    policy.reset()
    assert first.replicas.tolist() == kept


@every_baseline
def test_policies_name_themselves_for_the_record(make: Callable[[Fleet], Policy]) -> None:
    assert make(fleet()).name.removesuffix("+self") in BASELINES


@every_baseline
def test_blind_windows_never_shrink_the_fleet(make: Callable[[Fleet], Policy]) -> None:
    services = fleet(pool(max_replicas=50), n=2)
    policy, encoder = make(services), ObservationBuilder(services, WindowSpec())
    for tick in range(30):
        seen = snapshot(n=2, time_s=15.0 * tick, replicas_target=12.0, replicas_ready=12.0, running=200.0)
        policy.propose(encoder.observe(seen))
    for tick in range(30, 60):
        wish = policy.propose(encoder.observe(missing(n=2, time_s=15.0 * tick)))
        assert (wish.replicas >= 12).all(), tick
    for tick in range(60, 90):  # the counts are known, nothing of the load is
        known = {"replicas_target": 12.0, "replicas_ready": 12.0, "replicas_starting": 0.0, "batch_cap": 64.0}
        wish = policy.propose(encoder.observe(missing(n=2, time_s=15.0 * tick, **known)))
        assert (wish.replicas >= 12).all(), tick


@every_baseline
def test_each_parameter_is_an_argument_with_that_default(make: Callable[[Fleet], Policy]) -> None:
    if not isinstance(make, type):
        return
    arguments = inspect.signature(make).parameters
    for item in make.PARAMETERS:
        assert arguments[item.name].default == item.default, item.name
        if not item.choices:
            assert item.low < item.high, item.name
            assert item.low > 0 or not item.log, item.name
            assert item.parse(str(item.default)) == item.default


# Static


def test_static_is_the_maximum_or_what_it_was_told() -> None:
    services = fleet(pool(max_replicas=7), spot(max_replicas=3), width=3)
    seen = observation(snapshot(pools=3))
    assert StaticPolicy(services).propose(seen).replicas.tolist() == [[7, 3, 0]]
    assert StaticPolicy(services).propose(seen).batch_cap.tolist() == [[64, 64, 1]]
    told = StaticPolicy(services, np.array([4, 9, 9]), batch_cap=16).propose(seen)
    assert (told.replicas.tolist(), told.batch_cap.tolist()) == ([[4, 3, 0]], [[16, 16, 1]])


def test_static_follows_a_fleet_whose_rows_are_overwritten() -> None:
    services = fleet()
    policy = StaticPolicy(services)
    services.set_row(0, spec(pool(max_replicas=5)))
    assert policy.propose(observation(snapshot())).replicas.tolist() == [[5]]


# Token demand


def test_token_demand_is_demand_times_headroom_over_the_pools() -> None:
    services = fleet(pool(), spot())
    seen = observation(snapshot(pools=2), 4.0, 32.0)
    wish = TokenDemandPolicy(services, headroom=2.0, spot_share=0.25).propose(seen)
    expected = allocate(seen.demand, np.array([2.0]), np.array([0.25]), services)
    assert wish.replicas.tolist() == expected.tolist() == [[6, 2]]
    assert wish.batch_cap.tolist() == reference_batch_cap(seen, services).tolist()


def test_token_demand_rises_at_once_and_falls_slowly() -> None:
    policy = TokenDemandPolicy(fleet(), headroom=1.0, memory_s=300.0)
    replicas = [
        int(policy.propose(observation(snapshot(window_s=15.0), demand)).replicas[0, 0])
        for demand in (10.0, 20.0, 1.0, *[1.0] * 100)
    ]
    mean = 10 + 10 * (1 - np.exp(-0.05))
    assert replicas[:3] == [10, 20, int(np.ceil(mean + (1 - mean) * (1 - np.exp(-0.05)) - 0.02))]
    assert replicas[2:] == sorted(replicas[2:], reverse=True)
    assert replicas[-1] in (1, 2)


def test_token_demand_does_not_take_a_blind_window_for_a_quiet_one() -> None:
    gaps, whole = TokenDemandPolicy(fleet(), headroom=1.0), TokenDemandPolicy(fleet(), headroom=1.0)
    assert wishes(gaps, [observation(missing(), 0.0)] * 3) == [[[1]]] * 3
    wishes(gaps, [observation(snapshot(), 10.0), *[observation(missing(), 0.0)] * 40])
    wishes(whole, [observation(snapshot(), 10.0)])
    quiet = [observation(snapshot(), 1.0)]
    assert wishes(gaps, quiet) == wishes(whole, quiet) == [[[10]]]


# HPA: 64 sequences at a target share of a half are 32 requests per replica


def window(time_s: float, load: float, current: float, ready: float | None = None, **overrides: Any) -> Observation:
    """`load` in replicas that run exactly at the target."""
    counts = {
        "running": 32.0 * load,
        "replicas_target": current,
        "replicas_ready": current if ready is None else ready,
    }
    return observation(snapshot(time_s=time_s, **{**counts, **overrides}))


def hpa(**options: Any) -> HpaPolicy:
    return HpaPolicy(fleet(pool(max_replicas=100)), **{"stabilization_s": 0.0, **options})


def desired(policy: HpaPolicy, *windows: Observation) -> list[int]:
    return [int(policy.propose(seen).replicas[0, 0]) for seen in windows]


@pytest.mark.parametrize(
    ("current", "load", "expected"),
    [
        (4, 8.0, 8),  # 200m over 100m: the ratio 2.0 doubles
        (4, 2.0, 2),  # 50m over 100m: the ratio 0.5 halves
        (3, 4.0, 4),  # 1.33 of 3
        (3, 3.4, 4),  # 1.13 of 3, rounded up
        (10, 11.0, 10),  # 1.1 is within the tolerance
        (10, 9.0, 10),  # and so is 0.9
        (10, 11.01, 12),
        (10, 8.99, 9),
        (7, 7 * 1.1, 7),  # whatever the rounding
        (9, 9 * 0.9, 9),
        (4, 0.0, 1),  # the minimum
    ],
)
def test_hpa_scales_by_the_ratio_outside_the_tolerance(current: int, load: float, expected: int) -> None:
    assert desired(hpa(), window(0, load, current)) == [expected]


@pytest.mark.parametrize(("current", "expected"), [(1, 5), (3, 7), (4, 8), (5, 10), (30, 60), (60, 100)])
def test_hpa_adds_at_most_four_or_all_over_again(current: int, expected: int) -> None:
    assert desired(hpa(), window(0, 1000.0, current)) == [expected]


def test_hpa_never_caps_the_batch() -> None:
    assert hpa().propose(window(0, 1, 1)).batch_cap.tolist() == [[64]]


def test_hpa_takes_the_highest_recommendation_of_its_window() -> None:
    """The example of the enhancement proposal: ten minutes of recommendations, one a minute, on ten replicas."""
    policy = hpa(stabilization_s=600.0, tolerance=0.0)
    recommendations = [10, 9, 8, 9, 9, 8, 9, 8, 9, 8, 7]
    windows = [window(60.0 * minute, load, 10) for minute, load in enumerate(recommendations)]
    assert desired(policy, *windows) == [10] * 10 + [9]


def test_hpa_scales_down_after_five_minutes_of_less() -> None:
    policy = HpaPolicy(fleet(pool(max_replicas=100)))
    ticks = desired(policy, *(window(15.0 * tick, 8.0 if tick == 0 else 2.0, 8) for tick in range(22)))
    assert ticks == [8] * 20 + [2, 2]


def test_hpa_does_not_scale_down_a_fleet_that_it_has_just_found() -> None:
    policy = HpaPolicy(fleet(pool(max_replicas=100)))
    ticks = desired(policy, *(window(15.0 * tick, 2.0, 8) for tick in range(21)))
    assert ticks == [8] * 20 + [2]


def test_hpa_scales_up_without_waiting() -> None:
    policy = HpaPolicy(fleet(pool(max_replicas=100)))
    assert desired(policy, window(0, 4, 4), window(15, 8, 4)) == [4, 8]


def test_hpa_evaluates_every_fifteen_seconds() -> None:
    assert desired(hpa(), *(window(time_s, 8, 4) for time_s in (0, 5, 10, 15))) == [8, 4, 4, 8]


def test_hpa_on_a_faster_clock_still_scales_down() -> None:
    """Ticks between two evaluations are no recommendations."""
    policy = HpaPolicy(fleet(pool(max_replicas=100)))
    ticks = desired(policy, *(window(5.0 * tick, 2.0, 8) for tick in range(70)))
    assert ticks[60] == 2
    assert set(ticks[:60]) == {8}


def test_hpa_sees_the_pools_as_one_and_fills_the_cheapest_first() -> None:
    dear = pool(name="dear", max_replicas=100, engine=engine(usd_per_gpu_hour=9.0))
    services = fleet(dear, pool(max_replicas=6))
    counts = {"replicas_target": [3, 1], "replicas_ready": [3, 1]}
    seen = observation(snapshot(pools=2, **counts, running=0, waiting=[64, 0], queue_requests=192))
    # 256 requests at 32 a replica: eight, of which the minimum of the dear pool and then six of the cheap one.
    assert HpaPolicy(services, stabilization_s=0).propose(seen).replicas.tolist() == [[2, 6]]


@pytest.mark.parametrize(
    ("load", "current", "ready", "expected"),
    [
        (6.0, 4, 2, 6),  # up: those that start count as idle: 1.5 of 4
        (4.2, 4, 2, 4),  # up by 2.1 of the ready ones, but only 1.05 of all: within the tolerance
        (3.0, 4, 2, 4),  # up by the ready ones, down by all: no change
        (1.0, 4, 2, 3),  # down: those that start count as at the target: 0.75 of 4
        (1.9, 4, 2, 4),  # down by 0.95 of the ready ones: within the tolerance
        (0.0, 4, 0, 4),  # nothing is ready: nothing is known
    ],
)
def test_hpa_is_careful_with_replicas_that_are_not_ready(load: float, current: int, ready: int, expected: int) -> None:
    assert desired(hpa(), window(0, load, current, ready)) == [expected]


@pytest.mark.parametrize("gap", [{"running": np.nan}, {"arrival_rps": np.nan, "generation_tps": np.nan}])
def test_hpa_without_metrics_changes_nothing(gap: dict[str, float]) -> None:
    assert desired(hpa(), window(0, 9.0, 4), window(15, 9.0, 4, **gap)) == [8, 4]


def test_hpa_does_not_remember_windows_without_metrics() -> None:
    policy = HpaPolicy(fleet(pool(max_replicas=100)))
    windows = [window(15.0 * tick, 2.0, 8, **({"running": np.nan} if tick == 15 else {})) for tick in range(21)]
    assert desired(policy, *windows)[-1] == 2


def test_hpa_history_stays_short_through_any_number_of_restarts() -> None:
    """Services whose clocks start again at different times: what was before a restart is let go."""
    policy = HpaPolicy(fleet(n=2))
    clocks = np.array([0.0, 1000.0])
    for tick in range(300):
        clocks += 15.0
        restarted = clocks > 2000.0
        if restarted.any():
            clocks[restarted] = 0.0
            policy.reset(restarted)
        policy.propose(observation(snapshot(n=2, time_s=clocks)))
        assert len(policy.behavior) <= 24, tick
