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


def test_tokens_are_those_of_finished_requests_within_what_the_window_covers() -> None:
    bill = meter()
    load = {"finished_rps": 2.0, "prompt_tokens_mean": 100.0, "output_tokens_mean": 50.0, "arrival_rps": 90.0}
    bill.add(seen(1, window_s=60.0, **load), 1000.0)
    bill.add(seen(1, window_s=15.0, **load), 1015.0)
    bill.add(seen(1, window_s=60.0, **load), 1915.0)  # a quarter of an hour of which the window tells a minute
    assert bill.tokens.sum() == pytest.approx(2.0 * 150.0 * (15 + 60))
    bill.add(seen(1, window_s=15.0, **{**load, "finished_rps": 0.0, "prompt_tokens_mean": np.nan}), 1930.0)
    assert bill.tokens.sum() == pytest.approx(2.0 * 150.0 * (15 + 60))


def test_a_pool_that_is_billed_by_the_node_pays_for_whole_nodes() -> None:
    bill = meter(billing="node")
    by_gpu = bill._fleet.usd_per_replica_s[0, 0] / bill._fleet.gpus[0, 0] * 1.15
    node_gpus = bill._objective.node_gpus[0, 0]
    bill.add(seen(1), 1000.0)
    bill.add(seen(1), 1100.0)
    assert bill.usd.sum() == pytest.approx(by_gpu * node_gpus * 100)
