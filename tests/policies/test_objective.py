"""Dollars by hand: provisioned time, misses, churn; attainment; cost per million tokens."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, pool, spot

from policies.objective import Cost, Objective, Usage, attainment, usd_per_mtok
from policies.spec import ObjectiveSpec

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

POOL_FIELDS = ("replica_s", "node_s", "ready_s", "busy_s")


def usage(n: int = 1, pools: int = 1, **overrides: Any) -> Usage:
    """Nothing provisioned and nothing served, but for the overrides."""
    return Usage(
        **{
            field.name: np.broadcast_to(
                np.asarray(overrides.get(field.name, 0.0), float), (n, pools) if field.name in POOL_FIELDS else (n,)
            ).copy()
            for field in fields(Usage)
        }
    )


def terms(cost: Cost, row: int = 0) -> dict[str, float]:
    return {field.name: float(getattr(cost, field.name)[row]) for field in fields(cost)}


def test_every_term_by_hand() -> None:
    services = fleet(pool(engine=engine(gpus_per_replica=2)), spot(), width=3)  # 0.002 and 0.0005 $ per replica-second
    span = usage(
        pools=3, replica_s=[1000.0, 2000.0, 0.0], finished=10.0, good=7.0, rejected=2.0, overdue=4.0, scale_events=3.0
    )
    cost = Objective(ObjectiveSpec(), services).cost(span, request_usd=np.array([0.01]), interval_s=15.0)
    assert terms(cost) == pytest.approx(
        {
            "gpu_usd": 3.0,
            "overhead_usd": 0.45,
            "miss_usd": 20.0 * 0.01 * 5,  # three late and two rejected
            "churn_usd": 0.02 * 15 * 0.0005 * 3,  # intervals of the cheapest replica
        }
    )
    assert cost.provisioned_usd == pytest.approx([3.45])
    assert cost.total_usd == pytest.approx([sum(terms(cost).values())])


def test_prices_of_the_spec_are_used() -> None:
    spec = ObjectiveSpec(overhead_rate=0.0, miss_price=5.0, scale_event_price=1.0)
    services = fleet(objective={"miss_price": 5.0})
    span = usage(replica_s=100.0, finished=2.0, scale_events=1.0)
    cost = Objective(spec, services).cost(span, np.array([0.1]), interval_s=10.0)
    assert terms(cost) == pytest.approx({"gpu_usd": 0.1, "overhead_usd": 0.0, "miss_usd": 1.0, "churn_usd": 0.01})


def test_price_of_a_miss_is_each_services_own() -> None:
    services = fleet(n=2)
    services.log_miss_price[:] = np.log([1.0, 100.0])
    cost = Objective(ObjectiveSpec(), services).cost(usage(n=2, finished=1.0), np.array([0.1, 0.1]), 15.0)
    assert cost.miss_usd == pytest.approx([0.1, 10.0])


def test_pool_billed_per_node_costs_its_nodes_whole() -> None:
    services = fleet(pool(engine=engine(gpus_per_replica=2)), pool())
    objective = Objective(ObjectiveSpec(), services, np.array([[True, False]]), np.array([[8.0, 8.0]]))
    span = usage(pools=2, replica_s=[100.0, 100.0], node_s=[60.0, 60.0])
    assert objective.pool_usd(span).tolist() == [pytest.approx([60 * 8 * 0.001, 100 * 0.001])]


def test_nothing_used_costs_nothing() -> None:
    cost = Objective(ObjectiveSpec(), fleet()).cost(usage(), np.array([0.1]), 15.0)
    assert set(terms(cost).values()) == {0.0}


def test_costs_of_windows_add_up_to_the_cost_of_the_whole() -> None:
    objective = Objective(ObjectiveSpec(), fleet())
    early = usage(replica_s=30.0, finished=4.0, good=3.0, rejected=1.0, scale_events=1.0)
    late = usage(replica_s=90.0, finished=9.0, good=5.0, rejected=1.0, scale_events=2.0)
    between = usage(replica_s=60.0, finished=5.0, good=2.0, rejected=0.0, scale_events=1.0)
    whole, first, second = (objective.cost(span, np.array([0.1]), 15.0).total_usd for span in (late, early, between))
    assert first + second == pytest.approx(whole)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"finished": 10, "good": 10}, 1.0),
        ({"finished": 10, "good": 7}, 0.7),
        ({"finished": 7, "good": 7, "rejected": 3}, 0.7),
        ({"finished": 7, "good": 7, "overdue": 3}, 0.7),
        ({"arrivals": 20, "finished": 10, "good": 10}, 1.0),  # ten are still in time
        ({"rejected": 1}, 0.0),
        ({"overdue": 1}, 0.0),
        ({"arrivals": 5}, np.nan),
        ({}, np.nan),
    ],
)
def test_attainment_counts_shed_and_overdue_requests_as_misses(counts: dict[str, Any], expected: float) -> None:
    assert attainment(usage(**counts)).tolist() == pytest.approx([expected], nan_ok=True)


def test_cost_per_million_tokens_is_unknown_where_none_were_served() -> None:
    assert usd_per_mtok(np.array([3.0, 3.0]), np.array([2e6, 0.0])).tolist() == pytest.approx(
        [1.5, np.nan], nan_ok=True
    )


def test_served_tokens_are_prompt_and_output() -> None:
    assert usage(prompt_tokens=3.0, output_tokens=4.0, good_tokens=5.0).served_tokens.tolist() == [7.0]
