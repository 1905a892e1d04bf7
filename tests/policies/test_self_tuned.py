"""A headroom that follows the error budget, on any policy."""

from __future__ import annotations

import numpy as np
import pytest
from fakes import ScriptedPolicy, fleet, observation, pool, snapshot, target

from policies.baselines.hpa import HpaPolicy
from policies.baselines.llm_d import LlmdSloPolicy
from policies.baselines.token_demand import TokenDemandPolicy
from policies.contract import Snapshot
from policies.latency import ttft_quantile_s
from policies.self_tuned import HeadroomDial, SelfTunedPolicy, heavier

SERVICES = fleet(pool(max_replicas=100))


def run(policy: SelfTunedPolicy, windows: int, **overrides: object) -> float:
    for tick in range(windows):
        policy.propose(observation(snapshot(time_s=15.0 * tick, **overrides)))
    return float(policy.headroom[0])


def idle() -> SelfTunedPolicy:
    return SelfTunedPolicy(ScriptedPolicy(target(4)), SERVICES)


def test_headroom_falls_slowly_and_rises_fast() -> None:
    fallen = run(idle(), 240)
    assert fallen == pytest.approx(np.exp(-0.2))  # an hour without a miss
    assert run(idle(), 20, ttft_attainment=0.5) > 1.0 / fallen  # five minutes of misses


def test_headroom_stays_between_a_half_and_three() -> None:
    assert run(idle(), 3000) == pytest.approx(0.5)
    assert run(idle(), 400, ttft_attainment=0.0) == pytest.approx(3.0)


def test_misses_in_bursts_leave_half_of_the_allowance_unspent() -> None:
    """One window in 200 misses everything: 0.5 % of the requests, half of what may, so the dial stays where it is."""
    policy = idle()
    for tick in range(4000):
        attained = 0.9 if tick % 20 == 0 else 1.0  # 10 % of one window in twenty
        policy.propose(observation(snapshot(time_s=15.0 * tick, ttft_attainment=attained)))
    assert float(policy.headroom[0]) == pytest.approx(1.0, abs=0.08)


def test_two_windows_by_hand() -> None:
    dial = HeadroomDial(SERVICES)
    # 60 requests, 0.6 missed, which is what 1 % allows: a burn rate of 1, 0.5 above the aim, at 0.4 an hour.
    first = dial.update(snapshot(ttft_attainment=0.99, finished_rps=4.0)).copy()
    assert first == pytest.approx([0.4 * 0.5 * 15.0 / 3600.0])
    short, long = np.exp(-15.0 / 300.0), np.exp(-15.0 / 3600.0)
    missed_rps = (short * 0.6 + 0.3) / (short * 15.0 + 15.0)  # then 15 requests, 0.3 missed
    allowed_rps = 0.01 * (long * 60.0 + 15.0) / (long * 15.0 + 15.0)
    second = dial.update(snapshot(tpot_attainment=0.98, finished_rps=1.0))
    assert second == pytest.approx(first + 0.4 * (missed_rps / allowed_rps - 0.5) * 15.0 / 3600.0)


def test_misses_are_remembered_for_minutes_after_they_end() -> None:
    policy = idle()
    burnt = run(policy, 10, ttft_attainment=0.5)
    assert run(policy, 10) > burnt


def test_a_window_without_a_measurement_does_not_move_the_headroom() -> None:
    with_gap, without = idle(), idle()
    before = run(with_gap, 20, ttft_attainment=0.97), run(without, 20, ttft_attainment=0.97)
    assert run(with_gap, 1, ttft_attainment=np.nan, tpot_attainment=np.nan) == before[0] == before[1]
    assert run(with_gap, 20, ttft_attainment=0.98) == run(without, 20, ttft_attainment=0.98)


def test_a_restored_headroom_goes_on_as_if_nothing_had_happened() -> None:
    policy, other = idle(), idle()
    run(policy, 20, ttft_attainment=0.7)
    other.restore({name: array.copy() for name, array in policy.state().items()})
    assert run(other, 20, ttft_attainment=0.9) == run(policy, 20, ttft_attainment=0.9) > 1.0


def test_it_does_not_wind_up_where_a_rise_can_change_nothing() -> None:
    at_maximum = {"ttft_attainment": 0.94, "replicas_target": 100.0}  # a burn rate of 6: 2.2 an hour, of which 1.6
    assert run(idle(), 120, **at_maximum) == pytest.approx(np.exp(1.6 * 0.5))  # half an hour, and then no more
    assert run(idle(), 400, **at_maximum) == pytest.approx(np.exp(1.6 * 0.5))
    waiting = run(idle(), 20, ttft_attainment=0.0, replicas_starting=1.0)
    assert 1.0 < waiting == pytest.approx(np.exp(1.6 / 12.0))  # a fifth of the fastest rise


def test_a_stall_counts_before_anything_has_finished() -> None:
    stalled = {"finished_rps": 0.0, "ttft_attainment": np.nan, "tpot_attainment": np.nan, "oldest_wait_s": 60.0}
    assert run(idle(), 20, **stalled) > 1.2


def test_heavier_load_is_a_lower_target_for_a_rule_on_concurrency() -> None:
    seen = observation(snapshot(replicas_target=4.0, replicas_ready=4.0, running=40.0))
    tighter = HpaPolicy(SERVICES, target_share=10.0 / 64 / 1.5).propose(seen)
    assert HpaPolicy(SERVICES, target_share=10.0 / 64).propose(heavier(seen, np.array([1.5]))).replicas.tolist() == [
        [6]
    ]
    assert tighter.replicas.tolist() == [[6]]


def test_heavier_load_multiplies_a_demand() -> None:
    seen = observation(snapshot(), 4.0)
    policy = TokenDemandPolicy(SERVICES, headroom=1.0)
    assert policy.propose(heavier(seen, np.array([1.5]))).replicas.tolist() == [[6]]


def test_heavier_load_slows_what_is_measured_and_leaves_the_verdict_and_the_fleet() -> None:
    seen = snapshot(ttft_attainment=0.97)
    loaded = heavier(observation(seen), np.array([2.0])).snapshot
    assert ttft_quantile_s(loaded, 0.9)[0] == pytest.approx(2.0 * ttft_quantile_s(seen, 0.9)[0], rel=0.1)
    untouched = ("time_s", "window_s", "ttft_attainment", "replicas_ready", "replicas_target", "batch_cap")
    for name in untouched:
        assert getattr(loaded, name).tolist() == getattr(seen, name).tolist()


def test_nothing_compounds_inside_a_tolerance() -> None:
    policy = SelfTunedPolicy(HpaPolicy(SERVICES, target_share=10.0 / 64, stabilization_s=0.0), SERVICES)
    policy._dial.log_headroom[:] = np.log(1.5)
    current = 4.0
    for tick in range(20):
        seen: Snapshot = snapshot(
            time_s=15.0 * tick, replicas_target=current, replicas_ready=current, running=40.0, finished_rps=0.0
        )
        current = float(policy.propose(observation(seen)).replicas[0, 0])
    assert current == 6.0


def test_reset_forgets_budget_and_policy() -> None:
    policy = SelfTunedPolicy(LlmdSloPolicy(SERVICES), SERVICES)
    assert run(policy, 50, ttft_attainment=0.5) > 1.0
    policy.reset()
    assert policy.headroom.tolist() == [1.0]
    assert policy.name == "llm-d-slo+self"
