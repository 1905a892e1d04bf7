from __future__ import annotations

import numpy as np
import pytest
from fakes import missing, pool, snapshot, spec

from policies.cost_meter import CostMeter
from policies.fleet import Fleet
from policies.objective import Objective


def meter(**changes: object) -> CostMeter:
    one = spec(pool(**changes))
    return CostMeter(Objective.of([one], Fleet.from_specs([one])), np.array([0.15]))


def seen(ready: float, starting: float = 0.0, **fields: object):
    return snapshot(replicas_ready=ready, replicas_starting=starting, replicas_draining=0, **fields)


def test_dollars_follow_the_time_that_passed_and_not_the_window_of_the_rates() -> None:
    bill = meter()
    price = bill._fleet.usd_per_replica_s[0, 0] * 1.15
    for now_s, ready in ((1000.0, 2), (1015.0, 2), (1030.0, 3), (1090.0, 1)):
        bill.add(seen(ready, window_s=60.0), now_s)
    assert bill.usd.sum() == pytest.approx(price * (2 * 15 + 3 * 15 + 1 * 60))


def test_what_was_last_seen_is_billed_through_blindness_and_a_restart() -> None:
    bill = meter()
    price = bill._fleet.usd_per_replica_s[0, 0] * 1.15
    bill.add(seen(4), 1000.0)
    bill.add(missing(), 1015.0)
    after = meter()
    after.restore(bill.state())
    after.add(missing(), 1600.0)
    after.add(seen(2), 1615.0)
    assert after.usd.sum() == pytest.approx(price * (4 * 600 + 2 * 15))


def test_a_clock_that_goes_back_bills_nothing_twice() -> None:
    bill = meter()
    price = bill._fleet.usd_per_replica_s[0, 0] * 1.15
    for now_s in (1000.0, 1015.0, 900.0, 915.0):
        bill.add(seen(1), now_s)
    assert bill.usd.sum() == pytest.approx(price * 30)


LOAD = {"finished_rps": 2.0, "prompt_tokens_mean": 100.0, "output_tokens_mean": 50.0, "arrival_rps": 90.0}
HALF = {**LOAD, "finished_rps": 1.0}
"""300 and 150 tokens a second."""


def test_tokens_are_those_of_finished_requests_however_late_a_tick_comes() -> None:
    bill, now_s, rng = meter(), 1000.0, np.random.default_rng(0)
    bill.add(seen(1, window_s=5.0, **LOAD), now_s)
    while now_s < 2000.0:
        now_s += rng.uniform(5.0, 9.0)  # an interval of 5 seconds on a busy machine
        bill.add(seen(1, window_s=5.0, **LOAD), now_s)
    assert bill.tokens.sum() == pytest.approx(300.0 * (now_s - 1000.0))
    before = bill.tokens.sum()
    idle = {**LOAD, "finished_rps": 0.0, "prompt_tokens_mean": np.nan}
    for _ in range(3):
        now_s += 5.0
        bill.add(seen(1, window_s=5.0, **idle), now_s)
    assert bill.tokens.sum() == pytest.approx(before + 150.0 * 5.0)


def test_tokens_of_a_blind_time_are_made_good_when_the_rate_is_known_again_even_after_a_restart() -> None:
    bill = meter()
    bill.add(seen(1, **LOAD), 1000.0)
    bill.add(missing(), 1015.0)
    bill.add(missing(), 1030.0)
    assert bill.tokens.sum() == 0.0
    after = meter()
    after.restore(bill.state())
    after.add(missing(), 1300.0)
    after.add(seen(1, **HALF), 1600.0)
    assert after.tokens.sum() == pytest.approx((300.0 + 150.0) / 2 * 600.0)
    after.add(seen(1, **HALF), 1500.0)  # a clock that goes back
    after.add(seen(1, **HALF), 1510.0)
    assert after.tokens.sum() == pytest.approx((300.0 + 150.0) / 2 * 600.0 + 1500.0)


def test_a_pool_that_is_billed_by_the_node_pays_for_whole_nodes() -> None:
    bill = meter(billing="node")
    by_gpu = bill._fleet.usd_per_replica_s[0, 0] / bill._fleet.gpus[0, 0] * 1.15
    node_gpus = bill._objective.node_gpus[0, 0]
    bill.add(seen(1), 1000.0)
    bill.add(seen(1), 1100.0)
    assert bill.usd.sum() == pytest.approx(by_gpu * node_gpus * 100)


def test_what_was_asked_for_runs_while_nothing_can_be_read() -> None:
    """The API server goes away right after a write: the count before it is not what runs."""
    bill = meter()
    bill.add(seen(2), 1000.0)
    usd_per_replica_s = bill._fleet.usd_per_replica_s[0, 0] * 1.15
    bill.asked(np.array([[5.0]]))
    bill.add(missing(), 1060.0)
    assert bill.usd.sum() == pytest.approx(usd_per_replica_s * 5 * 60)
    after = meter()
    after.restore(bill.state())
    after.asked(np.array([[np.nan]]))
    after.add(missing(), 1100.0)
    assert after.usd.sum() == pytest.approx(usd_per_replica_s * 5 * 100)
    after.add(seen(3), 1110.0)  # two of them have not been made
    after.add(missing(), 1120.0)
    assert after.usd.sum() == pytest.approx(usd_per_replica_s * (5 * 100 + 3 * 20))
