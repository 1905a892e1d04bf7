"""The account of misses and allowed misses."""

import numpy as np
import pytest
from fakes import fleet, missing, pool, random_snapshot, snapshot, spec
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.contract import Snapshot, take_rows
from policies.error_budget import ErrorBudget, Fading
from policies.fleet import Fleet
from policies.spec import Slo


def budget(n: int = 1) -> ErrorBudget:
    return ErrorBudget(fleet(n=n))


def test_one_window_by_hand() -> None:
    # 30 requests in 15 seconds, of which 1 % may miss and 2 % do.
    missed, allowed_rps, seconds, known = budget().account(snapshot(ttft_attainment=0.98))
    assert missed == pytest.approx([0.6])
    assert allowed_rps == pytest.approx([0.02])
    assert (seconds.tolist(), known.tolist()) == ([15.0], [True])


def test_what_is_allowed_follows_the_traffic_of_the_last_hour() -> None:
    account = budget()
    account.account(snapshot(finished_rps=4.0))
    keep = np.exp(-15.0 / 3600.0)
    allowed_rps = account.account(snapshot(finished_rps=1.0)).allowed_rps
    assert allowed_rps == pytest.approx([0.01 * (keep * 60.0 + 15.0) / (keep * 15.0 + 15.0)])


def test_the_worse_of_both_latencies_counts() -> None:
    cases = [(0.9, 1.0), (1.0, 0.9), (np.nan, 0.9), (0.9, np.nan)]
    for ttft, tpot in cases:
        missed = budget().account(snapshot(ttft_attainment=ttft, tpot_attainment=tpot)).missed
        assert missed == pytest.approx([3.0])


def test_the_allowance_is_the_services_own() -> None:
    services = Fleet.from_specs([spec(pool(), slo=Slo(ttft_s=2.0, tpot_s=0.05, attainment=a)) for a in (0.9, 0.999)])
    assert ErrorBudget(services).account(snapshot(2)).allowed_rps == pytest.approx([0.2, 0.002])


def test_requests_that_wait_too_long_while_nothing_finishes_are_missed() -> None:
    stalled = budget().account(snapshot(finished_rps=0.0, ttft_attainment=np.nan, oldest_wait_s=60.0))
    assert stalled.known.tolist() == [True]
    assert stalled.missed.tolist() == [15.0 * float(snapshot().arrival_rps[0])]


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
def test_a_window_without_a_measurement_is_not_known_and_changes_nothing(window: Snapshot) -> None:
    with_gap, without = budget(), budget()
    for account in (with_gap, without):
        account.account(snapshot(finished_rps=4.0))
    assert with_gap.account(window).known.tolist() == [False]
    assert with_gap.account(snapshot()).allowed_rps == without.account(snapshot()).allowed_rps


def test_reset_forgets_the_traffic_of_the_masked_services() -> None:
    account = budget(3)
    account.account(snapshot(3, finished_rps=8.0))
    account.reset(np.array([True, False, True]))
    forgot, kept, also = account.account(snapshot(3)).allowed_rps.tolist()
    assert forgot == also == budget().account(snapshot()).allowed_rps[0] < kept
    account.reset()
    assert account.account(snapshot(3)).allowed_rps.tolist() == [forgot] * 3


def test_a_fading_rate_forgets_with_its_time_constant() -> None:
    rate, everywhere = Fading(1, 300.0), np.array([True])
    rate.add(np.array([30.0]), np.array([10.0]), everywhere)
    faded = rate.add(np.array([0.0]), np.array([300.0]), everywhere)
    assert faded == pytest.approx([30.0 * np.exp(-1) / (10.0 * np.exp(-1) + 300.0)])
    assert rate.add(np.array([99.0]), np.array([10.0]), ~everywhere) == faded


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000))
def test_services_do_not_touch_each_other(seed: int) -> None:
    rng = np.random.default_rng(seed)
    wide, alone = budget(3), [budget() for _ in range(3)]
    for tick in range(6):
        seen = random_snapshot(rng, fleet(n=3), 15.0 * tick, missing_share=0.2)
        together = wide.account(seen)
        for row, one in enumerate(alone):
            apart = one.account(take_rows(seen, np.array([row])))
            for wide_values, own in zip(together, apart, strict=True):
                assert float(wide_values[row]) == pytest.approx(float(own[0]), abs=1e-12)
