"""The price of a miss follows the error budget."""

import numpy as np
import pytest
from fakes import fleet, missing, pool, random_snapshot, snapshot, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import take_rows
from policies.fleet import Fleet
from policies.miss_price_dial import (
    AIM,
    EDGE,
    KNOWN_RISE,
    MAX_RISE_PER_BURST,
    MISS_PRICES,
    RISE,
    SLOW_FALL,
    MissPriceDial,
)
from policies.spec import Slo

WINDOWS_PER_HOUR = 240
FALL_OF_A_WINDOW = RISE * AIM / WINDOWS_PER_HOUR
ALLOWED = 0.05
FIRST = np.log(0.8 / ALLOWED)
LOW, HIGH = np.log(MISS_PRICES)


def services(n: int = 1, attainment: float = 1.0 - ALLOWED) -> Fleet:
    slo = Slo(ttft_s=2.0, tpot_s=0.05, attainment=attainment)
    return Fleet.from_specs([spec(pool(), slo=slo)] * n)


def dial(n: int = 1) -> MissPriceDial:
    return MissPriceDial(services(n), -10.0, 10.0)


def after(price: MissPriceDial, windows: int, attained: float) -> float:
    for _ in range(windows):
        price.update(snapshot(ttft_attainment=attained))
    return float(price.log_price[0])


def test_all_allowed_misses_cost_the_same_at_first_whatever_the_target() -> None:
    for attainment in (0.9, 0.95, 0.98):
        first = MissPriceDial(services(attainment=attainment), -10.0, 10.0).log_price
        assert np.exp(first) * (1.0 - attainment) == pytest.approx([0.8])


def test_it_starts_at_a_known_price_and_moves_slowly_from_there() -> None:
    known = MissPriceDial(services(), -10.0, 10.0, first_price=6.0)
    assert known.log_price == pytest.approx(np.log([6.0]))
    assert after(known, WINDOWS_PER_HOUR, 1.0) == pytest.approx(np.log(6.0) - KNOWN_RISE * AIM)
    known.reset()
    assert known.log_price == pytest.approx(np.log([6.0]))
    assert after(known, 30, 0.2) > np.log(6.0)  # and still learns from misses


def test_services_without_a_known_price_are_as_if_none_were() -> None:
    mixed = MissPriceDial(services(2), -10.0, 10.0, first_price=np.array([np.nan, 6.0]))
    alone = dial()
    for _ in range(20):
        moved = mixed.update(snapshot(2, ttft_attainment=0.9))
        apart = alone.update(snapshot(ttft_attainment=0.9))
    assert moved[0] == apart[0]
    assert MissPriceDial(services(), -10.0, 10.0, first_price=1e6).log_price == pytest.approx([HIGH])


def test_a_dial_that_is_told_another_price_begins_anew_there_after_a_restart() -> None:
    known, same, other = (MissPriceDial(services(), -10.0, 10.0, first_price=price) for price in (6.0, 6.0, 30.0))
    after(known, 50, 0.9)
    kept = {name: array.copy() for name, array in known.state().items()}
    same.restore(kept)
    other.restore(kept)
    assert same.log_price == known.log_price != pytest.approx(np.log([6.0]))
    assert other.log_price == pytest.approx(np.log([30.0]))
    moved = after(other, 10, 0.9)
    other.restore({name: array.copy() for name, array in other.state().items()})
    assert float(other.log_price[0]) == moved


def test_it_stays_within_what_the_network_was_trained_for_and_within_the_prices() -> None:
    assert (dial().low, dial().high) == pytest.approx((LOW, HIGH))
    narrow = MissPriceDial(services(), 1.0, 2.0)
    assert narrow.log_price.tolist() == [2.0]
    assert after(narrow, 3 * WINDOWS_PER_HOUR, 1.0) == 1.0
    assert after(dial(), 10 * WINDOWS_PER_HOUR, 1.0) == pytest.approx(LOW)
    assert after(dial(), 10 * WINDOWS_PER_HOUR, 0.0) == pytest.approx(HIGH)


def test_every_miss_counts_once() -> None:
    # 120 requests a minute, of which 360 may miss in an hour. A window has 30; a fifth of one is below the bound.
    steady, burst = dial(), dial()
    after(steady, 20, 1.0 - 0.01)
    after(burst, 10, 1.0)
    after(burst, 1, 1.0 - 0.2)
    after(burst, 9, 1.0)
    assert steady.log_price == pytest.approx(burst.log_price)
    assert steady.log_price == pytest.approx([FIRST - 20 * FALL_OF_A_WINDOW + RISE * 6.0 / 360.0])


@pytest.mark.parametrize(("spent", "moved"), [(0.0, -0.9), (0.9, 0.0), (0.95, 0.05)])
def test_it_rests_where_the_aim_is_missed(spent: float, moved: float) -> None:
    assert after(dial(), WINDOWS_PER_HOUR, 1.0 - spent * ALLOWED) == pytest.approx(FIRST + moved, abs=1e-9)


def test_one_burst_adds_a_bounded_rise_whatever_it_misses() -> None:
    for windows in (24, 40):
        assert after(dial(), windows, 0.2) == pytest.approx(FIRST + MAX_RISE_PER_BURST, abs=1.5 * FALL_OF_A_WINDOW)


def test_a_small_miss_counts_in_full() -> None:
    # 3 of 30 requests miss, three times: 9 of the 360 that an hour allows.
    expected = FIRST + RISE * 9.0 / 360.0 - 3 * FALL_OF_A_WINDOW
    assert after(dial(), 3, 0.9) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("quiet_windows", "rises"), [(30, 1), (60, 2)])
def test_the_next_burst_adds_its_own_rise_after_ten_quiet_minutes(quiet_windows: int, rises: int) -> None:
    price = dial()
    after(price, 30, 0.2)
    quiet = after(price, quiet_windows, 1.0)
    expected = FIRST + MAX_RISE_PER_BURST if rises == 1 else quiet + MAX_RISE_PER_BURST
    assert after(price, 30, 0.2) == pytest.approx(expected, abs=3 * FALL_OF_A_WINDOW)


def test_misses_that_do_not_end_are_no_burst_and_raise_it_on() -> None:
    price = dial()
    assert after(price, WINDOWS_PER_HOUR // 2, 0.2) == pytest.approx(
        FIRST + MAX_RISE_PER_BURST, abs=2 * FALL_OF_A_WINDOW
    )
    assert after(price, WINDOWS_PER_HOUR // 2, 0.2) == pytest.approx(FIRST + 2 * MAX_RISE_PER_BURST, abs=0.05)
    assert after(price, 20 * WINDOWS_PER_HOUR, 0.2) == pytest.approx(HIGH, abs=FALL_OF_A_WINDOW)


def test_where_a_burst_struck_it_falls_slowly_and_elsewhere_as_usual() -> None:
    price = dial()
    top = after(price, 30, 0.2)
    assert after(price, 20, 1.0) == pytest.approx(top - 20 * FALL_OF_A_WINDOW)
    hours = (MAX_RISE_PER_BURST - EDGE) / (RISE * AIM) + EDGE / (
        RISE * AIM * SLOW_FALL
    )  # to the edge, then to where it struck
    windows = round(hours * WINDOWS_PER_HOUR) - 20
    assert after(price, windows, 1.0) == pytest.approx(FIRST, abs=3 * FALL_OF_A_WINDOW)
    assert after(dial(), 10, 1.0) == pytest.approx(FIRST - 10 * FALL_OF_A_WINDOW)


def test_a_window_without_a_measurement_changes_nothing() -> None:
    with_gap, without = dial(), dial()
    for price in (with_gap, without):
        after(price, 20, 0.7)
    before = with_gap.log_price.copy()
    assert (with_gap.update(missing()) == before).all()
    assert after(with_gap, 100, 1.0) == after(without, 100, 1.0)


def test_reset_forgets_the_masked_services() -> None:
    price = dial(3)
    for _ in range(30):
        price.update(snapshot(3, ttft_attainment=0.2))
    kept = float(price.log_price[1])
    price.reset(np.array([True, False, True]))
    assert price.log_price.tolist() == [pytest.approx(FIRST), kept, pytest.approx(FIRST)]
    for _ in range(100):
        price.update(snapshot(3, ttft_attainment=1.0))
    fresh = after(dial(), 100, 1.0)  # and no edge is left
    assert price.log_price.tolist() == [fresh, price.log_price[1], fresh]
    assert fresh < price.log_price[1] < kept
    price.reset()
    assert price.log_price == pytest.approx([FIRST] * 3)


def test_a_restored_dial_goes_on_between_its_own_ends_edge_included() -> None:
    price, other, narrow = dial(), dial(), MissPriceDial(services(), -1.0, 1.0)
    after(price, 30, 0.2)
    kept = {name: array.copy() for name, array in price.state().items()}
    other.restore(kept)
    narrow.restore(kept)
    assert narrow.log_price.tolist() == [1.0] < price.log_price.tolist()
    assert after(other, 100, 1.0) == after(price, 100, 1.0)
    assert after(other, 4, 0.2) == after(price, 4, 0.2)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_services_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wide, alone = dial(3), [dial() for _ in range(3)]
    for tick in range(6):
        seen = random_snapshot(rng, fleet(n=3), 15.0 * tick, missing_share=0.2)
        together = wide.update(seen)
        apart = [one.update(take_rows(seen, np.array([row])))[0] for row, one in enumerate(alone)]
        assert together.tolist() == pytest.approx(apart, abs=1e-12)
        assert ((together >= wide.low) & (together <= wide.high)).all()
