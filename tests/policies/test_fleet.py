"""Specs as arrays, padding included."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from fakes import engine, fleet, pool, spec, spot

from policies.fleet import Fleet

BIG = pool(engine=engine(name="big", gpus_per_replica=4, kv_capacity_tokens=50, max_num_seqs=7), max_replicas=3)


def rows(services: Fleet, row: int) -> dict[str, list[float]]:
    return {field.name: np.atleast_1d(getattr(services, field.name)[row]).tolist() for field in fields(services)}


def test_every_field_of_a_spec_lands_in_its_unit() -> None:
    services = fleet(pool(), spot(engine=BIG.engine, usd_per_gpu_hour=0.9), slo={"ttft_s": 2, "tpot_s": 0.05})
    expected = {
        "ttft_slo_s": [2.0],
        "tpot_slo_s": [0.05],
        "attainment_target": [0.99],
        "log_miss_price": [np.log(20.0)],
        "exists": [True, True],
        "is_spot": [False, True],
        "a": [0.01, 0.01],
        "b": [1e-4, 1e-4],
        "c": [1e-4, 1e-4],
        "d": [1e-7, 1e-7],
        "e": [0.0, 0.0],
        "kv_capacity": [100_000.0, 50.0],
        "max_num_seqs": [64.0, 7.0],
        "gpus": [1.0, 4.0],
        "usd_per_replica_s": [0.001, 0.001],
        "min_replicas": [1, 0],
        "max_replicas": [20, 20],
        "cold_start_s": [120.0, 120.0],
    }
    actual = rows(services, 0)
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        assert actual[name] == pytest.approx(values), name


def test_padding_is_a_pool_that_may_have_nothing() -> None:
    services = Fleet.from_specs([spec(pool()), spec(pool(), BIG)], pools=3)
    assert (len(services), services.pools) == (2, 3)
    assert services.exists.tolist() == [[True, False, False], [True, True, False]]
    absent = ~services.exists
    for name in ("min_replicas", "max_replicas", "gpus", "usd_per_replica_s"):
        assert not getattr(services, name)[absent].any(), name
    assert (services.a[absent] > 0).all()
    assert (services.kv_capacity[absent] > 0).all()


def test_narrower_padding_than_the_specs_is_ignored() -> None:
    assert Fleet.from_specs([spec(pool(), BIG)], pools=1).pools == 2


def test_overwritten_row_keeps_nothing_of_the_old_service() -> None:
    services = Fleet.from_specs([spec(BIG, spot(), BIG), spec(BIG, spot(), BIG)])
    services.set_row(1, spec(pool(), slo={"ttft_s": 9, "tpot_s": 1}, objective={"miss_price": 5}))
    untouched = Fleet.from_specs([spec(BIG, spot(), BIG)])
    fresh = Fleet.from_specs([spec(pool(), slo={"ttft_s": 9, "tpot_s": 1}, objective={"miss_price": 5})], pools=3)
    assert rows(services, 0) == rows(untouched, 0)
    assert rows(services, 1) == rows(fresh, 0)


def test_free_misses_have_a_finite_price() -> None:
    assert fleet(objective={"miss_price": 0}).log_miss_price.tolist() == [np.log(1e-3)]
