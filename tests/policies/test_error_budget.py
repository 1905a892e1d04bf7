import numpy as np
import pytest
from fakes import fleet, missing, pool, random_snapshot, snapshot, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import take_rows
from policies.error_budget import ErrorBudget
from policies.fleet import Fleet
from policies.spec import Slo

WINDOWS_PER_HOUR = 240


def budget(n: int = 1, span: float = 1.5) -> ErrorBudget:
    return ErrorBudget(fleet(n=n), -span, span)


def after(dial: ErrorBudget, windows: int, attained: float) -> float:
    for _ in range(windows):
        dial.update(snapshot(ttft_attainment=attained))
    return float(dial.dial[0])


def test_one_window_by_hand() -> None:
    # 30 requests finish, half of the allowed 1 % miss, then a burn rate of 0.8: 0.3 above half, at 2 an hour.
    dial = budget()
    assert dial.update(snapshot(ttft_attainment=0.995)) == pytest.approx([0.0], abs=1e-12)
    dial = budget()
    assert dial.update(snapshot(ttft_attainment=0.992)) == pytest.approx([2.0 * 0.3 * 15.0 / 3600.0])


def test_two_windows_by_hand() -> None:
    dial = budget()
    first = dial.update(snapshot(ttft_attainment=0.99, finished_rps=4.0))  # 60 requests, 0.6 missed: burn 1
    assert first == pytest.approx([2.0 * 0.5 * 15.0 / 3600.0])
    keep = np.exp(-15.0 / 3600.0)
    burn = (keep * 0.6 + 0.3) / ((keep * 60.0 + 15.0) * 0.01)  # then 15 requests, 0.3 missed
    second = dial.update(snapshot(tpot_attainment=0.98, finished_rps=1.0))
    assert second == pytest.approx(first + 2.0 * (burn - 0.5) * 15.0 / 3600.0)


def test_without_misses_the_dial_falls_slowly() -> None:
    assert after(budget(), WINDOWS_PER_HOUR, 1.0) == pytest.approx(-1.0)


def test_under_heavy_misses_it_rises_four_times_as_fast_as_it_falls() -> None:
    fallen = after(budget(span=10.0), 60, 1.0)
    assert after(budget(span=10.0), 60, 0.5) == pytest.approx(-4.0 * fallen)


def test_misses_are_remembered_after_they_end() -> None:
    dial = budget(span=10.0)
    burnt = after(dial, 10, 0.5)
    assert after(dial, 10, 1.0) > burnt


def test_the_worse_of_both_latencies_counts() -> None:
    by_ttft, by_tpot, both = budget(), budget(), budget()
    by_ttft.update(snapshot(ttft_attainment=0.9, tpot_attainment=1.0))
    by_tpot.update(snapshot(ttft_attainment=1.0, tpot_attainment=0.9))
    both.update(snapshot(ttft_attainment=np.nan, tpot_attainment=0.9))
    assert by_ttft.dial[0] == by_tpot.dial[0] == both.dial[0] > 0


def test_the_allowance_is_the_services_own() -> None:
    services = Fleet.from_specs([spec(pool(), slo=Slo(ttft_s=2.0, tpot_s=0.05, attainment=a)) for a in (0.9, 0.999)])
    dial = ErrorBudget(services, -1.0, 1.0).update(snapshot(2, ttft_attainment=0.99))
    assert dial[0] < 0 < dial[1]


def test_it_stays_within_its_bounds() -> None:
    assert after(budget(), 2 * WINDOWS_PER_HOUR, 1.0) == -1.5
    assert after(budget(), 2 * WINDOWS_PER_HOUR, 0.0) == 1.5
    assert after(budget(span=0.0), 50, 0.0) == 0.0


@pytest.mark.parametrize(
    "window",
    [
        missing(),
        snapshot(ttft_attainment=np.nan, tpot_attainment=np.nan),
        snapshot(finished_rps=0.0, ttft_attainment=0.0),
        snapshot(finished_rps=np.nan, ttft_attainment=0.0),
        snapshot(window_s=np.nan, ttft_attainment=0.0),
    ],
    ids=["nothing known", "no latency", "none finished", "finishes unknown", "window unknown"],
)
def test_a_window_without_a_measurement_changes_nothing(window: object) -> None:
    with_gap, without = budget(), budget()
    for dial in (with_gap, without):
        after(dial, 20, 0.97)
    before = with_gap.dial.copy()
    assert (with_gap.update(window) == before).all()  # type: ignore[arg-type]
    assert after(with_gap, 20, 0.98) == after(without, 20, 0.98)


def test_reset_forgets_the_masked_services() -> None:
    dial = budget(3)
    for _ in range(50):
        dial.update(snapshot(3, ttft_attainment=0.9))
    kept = float(dial.dial[1])
    dial.reset(np.array([True, False, True]))
    assert dial.dial.tolist() == [0.0, kept, 0.0]
    moved = dial.update(snapshot(3, ttft_attainment=1.0))
    assert moved[0] == budget().update(snapshot(ttft_attainment=1.0))[0] < 0
    assert moved[1] > kept  # its misses are still in memory
    dial.reset()
    assert dial.dial.tolist() == [0.0, 0.0, 0.0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_services_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wide, alone = budget(3), [budget() for _ in range(3)]
    for tick in range(6):
        seen = random_snapshot(rng, fleet(n=3), 15.0 * tick, missing_share=0.2)
        together = wide.update(seen)
        apart = [one.update(take_rows(seen, np.array([row])))[0] for row, one in enumerate(alone)]
        assert together.tolist() == pytest.approx(apart, abs=1e-12)
        assert (np.abs(together) <= 1.5).all()


def lasting(**changes: float) -> ErrorBudget:
    return ErrorBudget(fleet(), -10.0, 10.0, **{"memory_s": 0.0, "most": np.inf, "aim": 0.9, **changes})


def test_without_a_memory_every_miss_counts_once() -> None:
    # 120 requests a minute; 72 of 7,200 may miss in an hour. 36 that miss in one window are half of that.
    steady, burst = lasting(aim=0.0), lasting(aim=0.0)
    after(steady, WINDOWS_PER_HOUR, 0.995)
    after(burst, WINDOWS_PER_HOUR // 2, 1.0)
    burst.update(snapshot(ttft_attainment=0.0, finished_rps=2.4))
    after(burst, WINDOWS_PER_HOUR // 2, 1.0)
    assert steady.dial == pytest.approx([1.0])
    assert burst.dial == pytest.approx([1.0], rel=0.01)


@pytest.mark.parametrize(("attained", "expected"), [(1.0, -1.8), (0.991, 0.0), (0.98, 2.2)])
def test_it_rests_where_the_aim_is_missed(attained: float, expected: float) -> None:
    assert after(lasting(), WINDOWS_PER_HOUR, attained) == pytest.approx(expected, abs=1e-9)


def test_it_starts_where_it_is_told_within_its_bounds_and_returns_there() -> None:
    inside, outside = lasting(start=-0.5), lasting(start=40.0)
    assert (inside.dial.tolist(), outside.dial.tolist()) == ([-0.5], [10.0])
    after(inside, 10, 0.9)
    inside.reset()
    assert inside.dial.tolist() == [-0.5]


def test_requests_that_wait_too_long_while_nothing_finishes_are_missed() -> None:
    dial = lasting()
    for _ in range(100):
        position = dial.update(snapshot(finished_rps=0.0, ttft_attainment=np.nan, oldest_wait_s=60.0))
    assert position.tolist() == [10.0]


def test_a_restored_dial_goes_on_between_its_own_ends() -> None:
    dial, other, narrow = lasting(), lasting(), ErrorBudget(fleet(), -1.0, 1.0)
    after(dial, 50, 0.95)
    kept = {name: array.copy() for name, array in dial.state().items()}
    other.restore(kept)
    narrow.restore(kept)
    assert narrow.dial.tolist() == [1.0] < dial.dial.tolist()
    assert after(other, 5, 1.0) == after(dial, 5, 1.0)


FALL_OF_A_WINDOW = 2.0 * 0.9 * 15.0 / 3600.0


def test_one_crowd_adds_the_crest_at_most_whatever_it_misses() -> None:
    for windows in (2, 40):
        assert after(lasting(crest=0.5), windows, 0.2) == pytest.approx(0.5, abs=1.5 * FALL_OF_A_WINDOW)
    assert after(lasting(), 40, 0.2) == 10.0


def test_a_small_miss_counts_as_without_a_crest() -> None:
    assert after(lasting(crest=0.5), 3, 0.9) == after(lasting(), 3, 0.9) < 0.5


@pytest.mark.parametrize(("quiet_windows", "expected"), [(30, 0.5), (60, 1.0 - 60 * FALL_OF_A_WINDOW)])
def test_the_next_crowd_adds_its_own_crest_after_ten_quiet_minutes(quiet_windows: int, expected: float) -> None:
    dial = lasting(crest=0.5)
    after(dial, 4, 0.2)
    after(dial, quiet_windows, 1.0)
    assert after(dial, 4, 0.2) == pytest.approx(expected, abs=3 * FALL_OF_A_WINDOW)


def test_misses_that_do_not_end_are_no_crowd_and_raise_the_dial_on() -> None:
    dial = lasting(crest=0.5)
    assert after(dial, WINDOWS_PER_HOUR // 2, 0.2) == pytest.approx(0.5, abs=2 * FALL_OF_A_WINDOW)
    assert after(dial, 2 * WINDOWS_PER_HOUR, 0.2) == pytest.approx(2.5, abs=0.1)
    assert after(dial, 20 * WINDOWS_PER_HOUR, 0.2) == pytest.approx(10.0, abs=FALL_OF_A_WINDOW)


def test_where_a_crowd_struck_it_falls_reluctantly_and_elsewhere_as_usual() -> None:
    dial = lasting(crest=0.5, reluctance=0.25)
    after(dial, 4, 0.2)
    assert after(dial, 10, 1.0) == pytest.approx(0.5 - 10 * FALL_OF_A_WINDOW, abs=1.5 * FALL_OF_A_WINDOW)
    hours = 0.2 / 1.8 + 0.3 / 0.45  # down to the edge, then to where the crowd struck
    assert after(dial, round(hours * WINDOWS_PER_HOUR) - 10, 1.0) == pytest.approx(0.0, abs=2 * FALL_OF_A_WINDOW)
    never_struck = lasting(crest=0.5, reluctance=0.25)
    assert after(never_struck, 10, 1.0) == pytest.approx(-10 * FALL_OF_A_WINDOW)


def test_reset_forgets_the_edge() -> None:
    dial, fresh = (lasting(crest=0.5, reluctance=0.25) for _ in range(2))
    after(dial, 4, 0.2)
    dial.reset()
    assert after(dial, 20, 1.0) == after(fresh, 20, 1.0)
    assert after(dial, 4, 0.2) == after(fresh, 4, 0.2)


def test_the_edge_outlives_a_restart() -> None:
    dial, other = (lasting(crest=0.5, reluctance=0.25) for _ in range(2))
    after(dial, 4, 0.2)
    other.restore({name: array.copy() for name, array in dial.state().items()})
    assert after(other, 60, 1.0) == after(dial, 60, 1.0)
    assert after(other, 4, 0.2) == after(dial, 4, 0.2)
