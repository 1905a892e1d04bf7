"""Every rule by a hand-made case, their order and reasons, and what must hold for any situation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes import engine, fleet, missing, observation, pool, random_snapshot, rows_of, snapshot, spec, spot, target
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Reason, Snapshot, Target
from policies.engine import ColdStart
from policies.fleet import Fleet
from policies.guardrails import RULES, Situation, settle
from policies.spec import GuardrailSpec
from policies.steadiness import ScalingHistory

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

ONE = fleet()
TWO = fleet(pool(), pool(name="other", min_replicas=0))
LONG_S = 1000.0
"""A wait that outlasts any start here."""


def situation(
    current: npt.ArrayLike,
    services: Fleet = ONE,
    seen: Snapshot | None = None,
    demand: npt.ArrayLike = 1.0,
    quiet_s: float = 1e6,
    cap: int = 64,
    history: Mapping[str, npt.ArrayLike] | None = None,
    **guardrails: Any,
) -> Situation:
    """A calm one unless told: healthy window, little demand, long quiet, every wish long worth a change."""
    held = target(current, cap)
    window = seen or snapshot(n=len(services), pools=services.pools)
    return Situation(
        observation=observation(window, demand),
        fleet=services,
        spec=GuardrailSpec(**guardrails),
        current=held.replicas,
        current_cap=held.batch_cap,
        history=history_of(services, {"changed_s": window.time_s - quiet_s, "forgone_s": 1e9, **(history or {})}),
    )


def history_of(services: Fleet, changes: Mapping[str, npt.ArrayLike]) -> ScalingHistory:
    """A history in which nothing has happened but what is told, the same for all services."""
    nothing = ScalingHistory.none(len(services), services.pools)
    told = {
        name: np.broadcast_to(value, getattr(nothing, name).shape).astype(getattr(nothing, name).dtype)
        for name, value in changes.items()
    }
    return nothing._replace(**told)


def settled(replicas: npt.ArrayLike, at: Situation, cap: int = 64) -> tuple[list[list[int]], Reason]:
    """Settled replicas and the reasons of the first service."""
    result, reasons = settle(target(replicas, np.minimum(cap, at.fleet.max_num_seqs)), at)
    assert result.replicas.dtype == result.batch_cap.dtype == np.int64
    return result.replicas.tolist(), Reason(int(reasons[0]))


def test_rules_come_in_this_order() -> None:
    assert [reason for reason, _ in RULES] == [
        Reason.BACKLOG,
        Reason.SLO_BURNING,
        Reason.REPLICAS_STARTING,
        Reason.COOLDOWN,
        Reason.STEP_LIMIT,
        Reason.STEADY_TRAFFIC,
        Reason.STEADY_TRAFFIC,
        Reason.MISSING_METRICS,
        Reason.BOUNDS,
        Reason.GPU_BUDGET,
        Reason.BOUNDS,
    ]


@pytest.mark.parametrize("wish", [3, 4, 5])
def test_calm_wish_passes_unchanged(wish: int) -> None:
    proposed = target(wish, 32)
    result, reasons = settle(proposed, situation(4))
    assert (result.replicas.tolist(), result.batch_cap.tolist(), reasons.tolist()) == ([[wish]], [[32]], [0])


def test_settling_does_not_touch_the_proposal() -> None:
    proposed = target([[50, -3]], 1000)
    result, _ = settle(proposed, situation([2, 2], TWO, gpu_budget=3))
    assert (proposed.replicas.tolist(), proposed.batch_cap.tolist()) == ([[50, -3]], [[1000, 1000]])
    assert not np.shares_memory(result.replicas, proposed.replicas)
    assert not np.shares_memory(result.batch_cap, proposed.batch_cap)


# Blind


@pytest.mark.parametrize(
    "gap", [{"running": np.nan}, {"replicas_ready": np.nan}, {"arrival_rps": np.nan, "generation_tps": np.nan}]
)
@pytest.mark.parametrize("wish", [1, 20])
def test_blind_holds_replicas_and_caps(gap: dict[str, Any], wish: int) -> None:
    result, reasons = settle(target(wish, 8), situation(4, seen=snapshot(**gap), cap=50))
    assert (result.replicas.tolist(), result.batch_cap.tolist()) == ([[4]], [[50]])
    assert Reason.MISSING_METRICS in Reason(int(reasons[0]))


def test_blind_holds_against_every_other_rule() -> None:
    """All that could raise or lower: a long wait, a deep backlog, a burning objective, a proposal of nothing."""
    seen = missing(oldest_wait_s=100.0, queue_requests=1e6, ttft_attainment=0.0)
    assert settled(0, situation(4, seen=seen, demand=19.0))[0] == [[4]]


def test_blind_does_not_lift_the_hard_limits_but_keeps_the_step() -> None:
    assert settled(10, situation(50, seen=missing()))[0] == [[25]]
    assert settled(10, situation(25, seen=missing()))[0] == [[20]]


def test_blind_row_does_not_hold_the_others() -> None:
    services = fleet(n=2)
    seen = snapshot(n=2, running=[[np.nan], [8.0]])
    assert settled([[6], [6]], situation([[4], [4]], services, seen))[0] == [[4], [6]]


# Backlog


@pytest.mark.parametrize(("wait_s", "expected"), [(102.0, 2), (102.1, 8)])
def test_wait_past_a_start_and_the_objective_covers_the_demand_at_once(wait_s: float, expected: int) -> None:
    slow = pool(name="slow", min_replicas=0, cold_start=ColdStart(node_s=0, image_s=0, weights_s=500, warmup_s=0))
    fast = pool(cold_start=ColdStart(node_s=0, image_s=0, weights_s=100, warmup_s=0))
    services = fleet(slow, fast)
    at = situation([0, 4], services, snapshot(pools=2, oldest_wait_s=wait_s), 7.5, max_scale_up_step=20)
    reasons = Reason.BACKLOG if expected == 8 else Reason.NONE
    assert settled([0, 2], at) == ([[0, expected]], reasons)


@pytest.mark.parametrize(("wait_s", "expected"), [(1.0, 0), (1.01, 1)])
def test_fleet_of_nothing_waits_for_half_the_objective(wait_s: float, expected: int) -> None:
    services = fleet(pool(min_replicas=0))
    assert settled(0, situation(0, services, snapshot(oldest_wait_s=wait_s), 1.0))[0] == [[expected]]


def test_backlog_rule_never_lowers() -> None:
    at = situation(4, seen=snapshot(oldest_wait_s=LONG_S), demand=2.0)
    assert settled(6, at) == ([[6]], Reason.NONE)
    assert settled(2, at) == ([[4]], Reason.BACKLOG)


def test_backlog_rule_can_be_switched_off() -> None:
    at = situation(4, seen=snapshot(oldest_wait_s=LONG_S), demand=8.0, backlog_boost=False)
    assert settled(4, at) == ([[4]], Reason.NONE)


def test_backlog_grows_the_fleet_in_its_proportions() -> None:
    at = situation([2, 4], TWO, snapshot(pools=2, oldest_wait_s=LONG_S), 12.0, max_scale_up_step=20)
    assert settled([2, 4], at) == ([[4, 8]], Reason.BACKLOG)


def test_backlog_counts_each_pool_by_what_it_can_do() -> None:
    """Two of the first pool would do, or eight of the second: one and four together."""
    at = situation([1, 2], TWO, snapshot(pools=2, oldest_wait_s=LONG_S), [2.0, 8.0], max_scale_up_step=20)
    assert settled([1, 2], at) == ([[2, 3]], Reason.BACKLOG)
    assert settled([1, 4], at) == ([[1, 4]], Reason.NONE)


def test_backlog_goes_to_a_pool_with_room_when_one_is_full() -> None:
    services = fleet(pool(max_replicas=2), pool(name="other", min_replicas=0), width=3)
    at = situation([2, 0, 0], services, snapshot(pools=3, oldest_wait_s=LONG_S), 10.0, max_scale_up_step=20)
    assert settled([2, 0, 0], at) == ([[2, 8, 0]], Reason.BACKLOG)


def test_proposal_counts_against_the_backlog_only_for_what_its_limits_leave() -> None:
    services = fleet(pool(), pool(name="other", min_replicas=0, max_replicas=3))
    at = situation([2, 2], services, snapshot(pools=2, oldest_wait_s=LONG_S), 10.0, max_scale_up_step=20)
    assert settled([2, 12], at) == ([[7, 3]], Reason.BACKLOG | Reason.BOUNDS)


def test_proposal_that_only_a_later_step_can_reach_does_not_cover_the_backlog_now() -> None:
    at = situation([2, 2], TWO, snapshot(pools=2, oldest_wait_s=LONG_S), 12.0)
    assert settled([2, 12], at) == ([[6, 8]], Reason.BACKLOG | Reason.STEP_LIMIT)


@pytest.mark.parametrize("demand", [0.0, 0.01, 1.0])
def test_backlog_wakes_a_fleet_of_nothing(demand: float) -> None:
    services = fleet(pool(min_replicas=0), width=2)
    waking = snapshot(pools=2, oldest_wait_s=LONG_S)
    assert settled([0, 0], situation([0, 0], services, waking, demand)) == ([[1, 0]], Reason.BACKLOG)


def test_unknown_wait_is_no_backlog() -> None:
    assert settled(4, situation(4, seen=snapshot(oldest_wait_s=np.nan), demand=9.0)) == ([[4]], Reason.NONE)


# Objectives, starts, cooldown


@pytest.mark.parametrize(
    ("seen", "burning"),
    [
        ({}, False),
        ({"ttft_attainment": 0.99, "tpot_attainment": 0.99}, False),
        ({"ttft_attainment": 0.98}, True),
        ({"tpot_attainment": 0.98}, True),
        ({"ttft_attainment": np.nan, "tpot_attainment": 0.98}, True),
        ({"ttft_attainment": np.nan, "tpot_attainment": np.nan}, False),
        ({"ttft_attainment": np.nan, "tpot_attainment": np.nan, "queue_requests": 1}, True),
        ({"ttft_attainment": np.nan, "queue_requests": 1}, True),
        ({"ttft_attainment": np.nan, "waiting": 1}, True),
        ({"ttft_attainment": np.nan, "queue_requests": np.nan}, True),
        ({"ttft_attainment": 1.0, "queue_requests": 5}, False),
    ],
    ids=str,
)
def test_no_scale_down_while_objectives_are_missed_or_nobody_knows(seen: dict[str, Any], burning: bool) -> None:
    at = situation(4, seen=snapshot(**seen))
    assert settled(3, at) == (([[4]], Reason.SLO_BURNING) if burning else ([[3]], Reason.NONE))
    assert settled(6, at) == ([[6]], Reason.NONE)
    assert settled(3, situation(4, seen=snapshot(**seen), hold_down_while_burning=False)) == ([[3]], Reason.NONE)


def test_no_scale_down_while_replicas_start() -> None:
    starting = snapshot(replicas_starting=1.0)
    assert settled(3, situation(4, seen=starting)) == ([[4]], Reason.REPLICAS_STARTING)
    assert settled(6, situation(4, seen=starting)) == ([[6]], Reason.NONE)
    assert settled(3, situation(4, seen=starting, hold_down_while_starting=False)) == ([[3]], Reason.NONE)


def test_hold_is_by_pool() -> None:
    at = situation([4, 4], TWO, snapshot(pools=2, replicas_starting=[0.0, 1.0]))
    assert settled([2, 6], at) == ([[4, 6]], Reason.REPLICAS_STARTING)


@pytest.mark.parametrize(("quiet_s", "expected"), [(0.0, 4), (59.9, 4), (60.0, 3), (np.inf, 3), (np.nan, 4)])
def test_no_scale_down_soon_after_a_change(quiet_s: float, expected: int) -> None:
    reason = Reason.COOLDOWN if expected == 4 else Reason.NONE
    assert settled(3, situation(4, quiet_s=quiet_s)) == ([[expected]], reason)
    assert settled(6, situation(4, quiet_s=quiet_s)) == ([[6]], Reason.NONE)


def test_cooldown_of_nothing_never_holds() -> None:
    assert settled(3, situation(4, quiet_s=0.0, scale_down_cooldown_s=0)) == ([[3]], Reason.NONE)


# Steps


@pytest.mark.parametrize(
    ("current", "wish", "expected"),
    [(1, 20, 5), (2, 20, 8), (3, 20, 12), (4, 20, 16), (10, 1, 5), (3, 1, 1), (5, 1, 2), (2, 0, 1)],
)
def test_step_is_bounded_by_factor_and_count(current: int, wish: int, expected: int) -> None:
    result, reasons = settled(wish, situation(current))
    assert result == [[expected]]
    assert (Reason.STEP_LIMIT in reasons) == (expected != wish)


def test_step_down_is_never_less_than_one() -> None:
    assert settled(1, situation(4, max_scale_down_share=0.0))[0] == [[3]]


def test_step_limit_bounds_what_the_backlog_asks_for() -> None:
    at = situation(1, seen=snapshot(oldest_wait_s=LONG_S), demand=20.0)
    assert settled(1, at) == ([[5]], Reason.BACKLOG | Reason.STEP_LIMIT)


# Hard limits


def test_bounds_hold_for_replicas_and_caps() -> None:
    services = fleet(pool(min_replicas=3, max_replicas=5), width=2)
    result, reasons = settle(target([9, 2], 1000), situation([4, 0], services))
    assert (result.replicas.tolist(), result.batch_cap.tolist()) == ([[5, 0]], [[64, 1]])
    assert reasons.tolist() == [int(Reason.BOUNDS)]
    result, _ = settle(target([0, 0], 0), situation([4, 0], services))
    assert (result.replicas.tolist(), result.batch_cap.tolist()) == ([[3, 0]], [[1, 1]])


@pytest.mark.parametrize(("current", "expected"), [(40, 20), (21, 10), (11, 8), (9, 8)])
def test_a_maximum_below_the_fleet_is_reached_step_by_step_even_while_objectives_are_missed(
    current: int, expected: int
) -> None:
    services = fleet(pool(max_replicas=8))
    burning = snapshot(ttft_attainment=0.0, replicas_starting=[[2.0]])
    assert settled(current, situation(current, services, burning, quiet_s=0.0)) == ([[expected]], Reason.BOUNDS)


def test_growth_stops_at_the_gpu_budget_in_pool_order() -> None:
    at = situation([2, 2], TWO, gpu_budget=7)
    assert settled([4, 4], at) == ([[4, 3]], Reason.GPU_BUDGET)
    assert settled([3, 4], at) == ([[3, 4]], Reason.NONE)


def test_budget_counts_gpus_not_replicas() -> None:
    services = fleet(pool(engine=engine(gpus_per_replica=4)), pool(name="other", min_replicas=0))
    assert settled([3, 4], situation([1, 1], services, gpu_budget=10)) == ([[2, 2]], Reason.GPU_BUDGET)


def test_budget_that_is_exceeded_already_takes_nothing_away_but_lets_nothing_grow() -> None:
    at = situation([5, 5], TWO, gpu_budget=4)
    assert settled([6, 5], at) == ([[5, 5]], Reason.GPU_BUDGET)
    assert settled([4, 5], at) == ([[4, 5]], Reason.NONE)


def test_what_one_pool_gives_back_another_may_take() -> None:
    assert settled([2, 6], situation([4, 4], TWO, gpu_budget=8)) == ([[2, 6]], Reason.NONE)


def test_wish_past_a_pools_maximum_does_not_use_up_the_budget() -> None:
    services = fleet(pool(max_replicas=3), pool(name="other", min_replicas=0))
    at = situation([2, 2], services, gpu_budget=8)
    assert settled([8, 5], at) == ([[3, 5]], Reason.BOUNDS)


def test_minimum_holds_even_above_the_budget() -> None:
    services = fleet(pool(min_replicas=4))
    assert settled(0, situation(0, services, gpu_budget=2))[0] == [[4]]


def test_every_rule_that_changed_something_is_named() -> None:
    services = fleet(pool(), pool(name="other", min_replicas=0, max_replicas=5))
    seen = snapshot(pools=2, ttft_attainment=0.5)
    result, reasons = settled([1, 30], situation([4, 3], services, seen, gpu_budget=8))
    assert result == [[4, 4]]
    assert reasons == Reason.SLO_BURNING | Reason.STEP_LIMIT | Reason.BOUNDS | Reason.GPU_BUDGET


# Steady traffic: the offered load of a situation is its demand, 1; its relative error 0.01, so its noise band 0.05


def after(reversals: float = 0.0, highest_load: float = 1.0, **more: Any) -> dict[str, Any]:
    """A fleet of 4 that nobody wished to be larger than 3 for a while, a second ago in the way of a change."""
    return {
        "reversals": reversals,
        "span": 1,
        "highest_load": highest_load,
        "wish": 3,
        "last_wish": 3,
        "forgone_s": 0.0,
        **more,
    }


def test_steady_traffic_never_delays_a_scale_up() -> None:
    at = situation(4, quiet_s=60.0, history=after(reversals=5.0, wish=9))
    assert settled(7, at) == ([[7]], Reason.NONE)


def test_scale_down_goes_no_lower_than_what_was_wished_throughout_the_window() -> None:
    assert settled(1, situation(4, history=after(wish=3, last_wish=2))) == (
        [[3]],
        Reason.STEADY_TRAFFIC | Reason.STEP_LIMIT,
    )
    assert settled(2, situation(4, history=after(wish=6, last_wish=2))) == ([[4]], Reason.STEADY_TRAFFIC)
    assert settled(2, situation(4, history=after(wish=2, last_wish=6))) == ([[4]], Reason.STEADY_TRAFFIC)
    assert settled(2, situation(4, history=after(wish=6), scale_down_window_s=0.0)) == ([[2]], Reason.NONE)


@pytest.mark.parametrize(
    ("reversals", "forgone_s", "expected"),
    [(0.0, 0.0, 3), (1.0, 2159.0, 4), (1.0, 2161.0, 3), (2.0, 2161.0, 4), (2.0, 23_761.0, 3)],
)
def test_after_a_reversal_a_scale_down_must_be_worth_ten_times_as_much(
    reversals: float, forgone_s: float, expected: int
) -> None:
    # 240 s of the fleet times 10 to the power of the reversals, less the first of them
    at = situation(4, quiet_s=60.0, history=after(reversals, forgone_s=forgone_s), reversal_memory_s=1e9)
    assert settled(3, at) == ([[expected]], Reason.STEADY_TRAFFIC if expected == 4 else Reason.NONE)


def test_scale_down_larger_than_what_was_taken_back_does_not_wait() -> None:
    at = situation(4, quiet_s=60.0, history=after(9.0, wish=2, last_wish=2))
    assert settled(3, at) == ([[4]], Reason.STEADY_TRAFFIC)
    assert settled(2, at) == ([[2]], Reason.NONE)


def test_reversals_are_forgotten_with_time() -> None:
    at: dict[str, Any] = {"quiet_s": 14_400.0, "history": after(1.0, forgone_s=340.0)}  # left: 0.37 of one, 320 s
    assert settled(3, situation(4, **at)) == ([[3]], Reason.NONE)
    assert settled(3, situation(4, **at, reversal_memory_s=28_800.0)) == ([[4]], Reason.STEADY_TRAFFIC)


@pytest.mark.parametrize(("highest_load", "expected"), [(1.04, 4), (1.06, 2)])
def test_fall_of_the_offered_load_beyond_its_noise_waits_for_nothing(highest_load: float, expected: int) -> None:
    at = situation(4, quiet_s=60.0, history=after(9.0, highest_load, wish=9))
    assert settled(2, at)[0] == [[expected]]


def test_the_fewer_requests_arrive_the_larger_the_fall_must_be_up_to_a_limit() -> None:
    at = situation(4, quiet_s=60.0, history=after(9.0, 1.14))
    at.observation.offered_load_error[:] = 0.025
    assert settled(2, at)[0] == [[4]]
    at = situation(4, quiet_s=60.0, history=after(9.0, 1.2))
    at.observation.offered_load_error[:] = np.inf
    assert settled(2, at)[0] == [[2]]


@pytest.mark.parametrize(
    ("wish", "forgone_s", "expected"), [(39, 0.0, 40), (37, 239.0, 40), (37, 241.0, 37), (36, 0.0, 36)]
)
def test_small_scale_down_of_a_large_fleet_waits_until_it_was_worth_a_change(
    wish: int, forgone_s: float, expected: int
) -> None:
    at = situation(40, fleet(pool(max_replicas=60)), history=after(forgone_s=forgone_s))
    assert settled(wish, at) == ([[expected]], Reason.STEADY_TRAFFIC if expected == 40 else Reason.NONE)


def test_largest_step_that_is_allowed_is_not_small() -> None:
    at = situation(40, fleet(pool(max_replicas=60)), history=after(), max_scale_down_share=0.05)
    assert settled(10, at) == ([[38]], Reason.STEP_LIMIT)


@pytest.mark.parametrize(("wished", "expected"), [(40, 40), (44, 40), (47, 40), (48, 48), (33, 40), (32, 32), (1, 1)])
def test_batch_cap_moves_only_by_a_fifth_or_more(wished: int, expected: int) -> None:
    at = situation(4, cap=40)
    result, reasons = settle(target([[4]], wished), at)
    assert result.batch_cap.tolist() == [[expected]]
    assert reasons.tolist() == [0 if expected == wished else int(Reason.STEADY_TRAFFIC)]
    free, _ = settle(target([[4]], wished), situation(4, cap=40, batch_cap_band=0.0))
    assert free.batch_cap.tolist() == [[wished]]


def test_lower_maximum_is_reached_however_steady_the_traffic() -> None:
    at = situation(6, fleet(pool(max_replicas=4)), history=after(reversals=9.0, wish=9))
    assert settled(6, at)[0] == [[4]]


# What holds in any situation


def any_situation(seed: int, missing_share: float) -> tuple[Situation, Target]:
    """Three services of one to three pools in any state, and any wish."""
    rng = np.random.default_rng(seed)
    specs = []
    for _ in range(3):
        pools = []
        for column in range(rng.integers(1, 4)):
            fewest = int(rng.integers(0, 4))
            kind = spot if rng.random() < 0.5 else pool
            gpus = engine(gpus_per_replica=int(rng.choice([1, 2, 4])))
            bounds = {"min_replicas": fewest, "max_replicas": fewest + int(rng.integers(1, 12))}
            pools.append(kind(name=f"p{column}", engine=gpus, **bounds))
        specs.append(spec(*pools))
    services = Fleet.from_specs(specs, 3)
    seen = random_snapshot(rng, services, 100.0, missing_share)
    seen.ttft_attainment[rng.random(3) < 0.5] = 1.0
    seen.tpot_attainment[rng.random(3) < 0.5] = 1.0
    seen.oldest_wait_s[rng.random(3) < 0.5] = 0.0
    seen.replicas_starting[rng.random(3) < 0.5] = 0.0
    inside = rng.random() < 0.7
    least, most = (services.min_replicas, services.max_replicas) if inside else (0, 40 * services.exists)
    at = Situation(
        observation=observation(seen, np.where(services.exists, rng.exponential(6.0, (3, 3)), 0.0)),
        fleet=services,
        spec=GuardrailSpec(
            gpu_budget=None if rng.random() < 0.3 else int(rng.integers(1, 60)),
            max_scale_up_step=int(rng.integers(1, 6)),
            max_scale_up_factor=float(rng.uniform(1.1, 5)),
            max_scale_down_share=float(rng.random()),
            backlog_boost=bool(rng.random() < 0.8),
        ),
        current=rng.integers(least, np.asarray(most) + 1),
        current_cap=rng.integers(1, 65, (3, 3)),
        history=any_history(rng, services, seen.time_s),
    )
    return at, Target(replicas=rng.integers(-5, 40, (3, 3)), batch_cap=rng.integers(-5, 5000, (3, 3)))


def any_history(rng: np.random.Generator, services: Fleet, time_s: npt.NDArray[np.float64]) -> ScalingHistory:
    """Anything may have happened."""
    return ScalingHistory(
        changed_s=time_s - rng.exponential(80.0, 3),
        shrank=rng.random(3) < 0.5,
        reversals=rng.exponential(0.5, 3) * (rng.random(3) < 0.5),
        span=rng.integers(0, 9, 3),
        highest_load=rng.exponential(6.0, 3),
        load_at_fall=rng.exponential(6.0, 3),
        forgone_s=rng.exponential(300.0, 3),
        wish=rng.integers(0, 20, services.exists.shape),
        last_wish=rng.integers(0, 20, services.exists.shape),
        wish_since_s=time_s - rng.exponential(60.0, 3),
    )


situations = given(seed=st.integers(0, 2**32 - 1), missing_share=st.sampled_from([0.0, 0.02, 0.3, 1.0]))


@settings(max_examples=80, deadline=None)
@situations
def test_bounds_hold_in_any_situation(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    result, _ = settle(wish, at)
    assert (result.replicas >= at.fleet.min_replicas).all()
    step = np.maximum(np.ceil(at.current * at.spec.max_scale_down_share), 1)
    assert (result.replicas <= np.maximum(at.fleet.max_replicas, at.current - step)).all()
    assert (result.batch_cap >= 1).all()
    assert (result.batch_cap <= at.fleet.max_num_seqs).all()


@settings(max_examples=80, deadline=None)
@situations
def test_settling_twice_changes_nothing(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    once, _ = settle(wish, at)
    twice, _ = settle(once, at)
    assert twice.replicas.tolist() == once.replicas.tolist()
    assert twice.batch_cap.tolist() == once.batch_cap.tolist()


@settings(max_examples=80, deadline=None)
@situations
def test_budget_is_never_exceeded_by_growth(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    result, _ = settle(wish, at)
    budget = at.spec.gpu_budget or 10**6
    used = (result.replicas * at.fleet.gpus).sum(axis=1)
    held = (np.maximum(at.current, at.fleet.min_replicas) * at.fleet.gpus).sum(axis=1)
    assert (used <= np.maximum(budget, held)).all()


@settings(max_examples=60, deadline=None)
@situations
def test_blind_services_keep_what_is_within_bounds(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    result, _ = settle(wish, at)
    inside = ((at.current >= at.fleet.min_replicas) & (at.current <= at.fleet.max_replicas)).all(axis=1)
    held = at.observation.snapshot.blind() & inside
    assert result.replicas[held].tolist() == at.current[held].tolist()


@settings(max_examples=60, deadline=None)
@situations
def test_whatever_changed_has_a_reason(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    result, reasons = settle(wish, at)
    changed = ((result.replicas != wish.replicas) | (result.batch_cap != wish.batch_cap)).any(axis=1)
    assert (reasons[changed] != 0).all()
    assert reasons.shape == (3,)


@settings(max_examples=50, deadline=None)
@situations
def test_each_service_is_settled_as_if_alone(seed: int, missing_share: float) -> None:
    at, wish = any_situation(seed, missing_share)
    together, _ = settle(wish, at)
    for row in range(3):
        width = int(at.fleet.exists[row].sum())
        own = slice(row, row + 1)
        services = Fleet.empty(1, width)
        for name in ("ttft_slo_s", "attainment_target"):
            getattr(services, name)[:] = getattr(at.fleet, name)[own]
        for name in ("exists", "gpus", "min_replicas", "max_replicas", "max_num_seqs", "cold_start_s"):
            getattr(services, name)[:] = getattr(at.fleet, name)[own, :width]
        alone = Situation(
            observation=observation(rows_of(at.observation.snapshot, row, width), at.observation.demand[own, :width]),
            fleet=services,
            spec=at.spec,
            current=at.current[own, :width],
            current_cap=at.current_cap[own, :width],
            history=ScalingHistory._make(array[own] if array.ndim == 1 else array[own, :width] for array in at.history),
        )
        single, _ = settle(Target(wish.replicas[own, :width], wish.batch_cap[own, :width]), alone)
        assert single.replicas.tolist() == together.replicas[own, :width].tolist()
        assert single.batch_cap.tolist() == together.batch_cap[own, :width].tolist()
