"""Drawn worlds: repeatable, within their ranges, and possible to serve."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from envs.randomization import Randomization, ScenarioBank, draw_bank, mean_demand
from envs.traffic.trace import Trace
from policies.engine import ConfigError, parse_model
from policies.spec import (
    GuardrailSpec,
    InterfaceSpec,
    ObjectiveSpec,
    PoolSpec,
    ScalingSpec,
    Slo,
    find_engine,
    shipped_configs,
)

RANGES = Randomization(
    traces=6,
    scenarios=60,
    trace_s=3600.0,
    mean_replicas=(1.0, 3.0),
    max_replicas=12,
    spot_scenarios=0.5,
)


@cache
def bank(seed: int = 0) -> ScenarioBank:
    return draw_bank(RANGES, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), seed)


def test_the_same_seed_draws_the_same_bank_and_another_seed_another_one() -> None:
    again = draw_bank(RANGES, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 0)
    assert [spec.digest() for spec in again.specs] == [spec.digest() for spec in bank().specs]
    assert [trace.digest() for trace in again.traces] == [trace.digest() for trace in bank().traces]
    np.testing.assert_array_equal(again.pools, bank().pools)
    np.testing.assert_array_equal(again.trace, bank().trace)
    other = bank(1)
    assert not {spec.digest() for spec in other.specs} & {spec.digest() for spec in bank().specs}
    assert not {trace.digest() for trace in other.traces} & {trace.digest() for trace in bank().traces}


def test_every_trace_gets_its_share_of_the_scenarios() -> None:
    assert len(bank()) == 60
    assert np.bincount(bank().trace).tolist() == [10] * 6


def test_draws_stay_within_their_ranges() -> None:
    for spec in bank().specs:
        on_demand = spec.pools[0]
        profile = find_engine(on_demand.engine.name, shipped_configs())
        assert on_demand.engine.name in RANGES.engines
        for name, value in profile.step.model_dump().items():
            assert 0.75 * value <= on_demand.engine.step.model_dump()[name] <= 1.25 * value
        assert 60.0 * (1 - 1e-9) <= on_demand.start.total_s <= 600.0 * (1 + 1e-9)
        assert 0.5 <= on_demand.gpu_usd_per_hour / profile.usd_per_gpu_hour <= 1.5
        assert spec.slo.ttft_s >= 1.0
        assert 3.0 <= spec.slo.tpot_s / (on_demand.engine.step.a_ms / 1000.0) <= 12.0 + 1e-9
        assert spec.slo.attainment in RANGES.attainment
        assert 2 <= on_demand.max_replicas <= 12
        assert [pool.price_class for pool in spec.pools] == ["on_demand", "spot"][: len(spec.pools)]
        for pool in spec.pools[1:]:
            assert 0.3 <= pool.gpu_usd_per_hour / on_demand.gpu_usd_per_hour <= 0.6
            assert 0.2 <= pool.spot.reclaims_per_replica_day <= 6.0
            assert 0.2 <= pool.spot.storms_per_day <= 4.0
            assert (pool.min_replicas, pool.max_replicas) == (0, on_demand.max_replicas)
    with_spot = sum(len(spec.pools) == 2 for spec in bank().specs)
    assert 15 <= with_spot <= 45  # 30 expected, standard deviation 3.9


def test_interface_guardrails_and_objective_are_the_given_ones_everywhere() -> None:
    guardrails, objective = GuardrailSpec(max_scale_up_step=7), ObjectiveSpec(miss_price=3.0)
    small = RANGES.model_copy(update={"traces": 1, "scenarios": 3})
    drawn = draw_bank(small, InterfaceSpec(), guardrails, objective, 0)
    assert [(spec.guardrails, spec.objective) for spec in drawn.specs] == [(guardrails, objective)] * 3
    assert (drawn.guardrails, drawn.objective, drawn.interface) == (guardrails, objective, InterfaceSpec())


def test_bounds_leave_room_above_the_ten_minute_peak_or_end_at_the_hard_limit() -> None:
    tight = 0
    for spec, row in zip(bank().specs, bank().trace.tolist(), strict=True):
        trace = bank().traces[row]
        peak = max(mean_demand(spec, trace, at, at + 600.0) for at in np.arange(0.0, trace.duration_s, 600.0))
        most = spec.pools[0].max_replicas
        assert most >= min(2.0 * peak + 1.0, 12)
        tight += most == 12
    assert tight < 60


def test_an_idle_replica_meets_the_ttft_objective_on_nearly_every_prompt() -> None:
    for spec, row in zip(bank().specs, bank().trace.tolist(), strict=True):
        trace = bank().traces[row]
        a, b, _, _, e = spec.pools[0].engine.step.seconds
        computed = np.maximum(trace.prompt_tokens - trace.prefix_hit_tokens, 1)
        chunks = np.ceil(computed / spec.pools[0].engine.max_num_batched_tokens)
        prefill_s = chunks * a + computed * (b + e * (trace.prompt_tokens - 0.5 * computed))
        assert (prefill_s <= spec.slo.ttft_s).mean() > 0.98


def test_kernel_records_and_fleet_say_what_the_specs_say() -> None:
    drawn = bank()
    for row, spec in enumerate(drawn.specs):
        for column, pool in enumerate(spec.pools):
            record = drawn.pools[row, column]
            assert record["kv_capacity"] == drawn.fleet.kv_capacity[row, column] == pool.engine.kv_capacity_tokens
            assert record["a"] == drawn.fleet.a[row, column] == pool.engine.step.seconds[0]
            assert record["reclaim_per_s"] * 86400.0 == pytest.approx(
                pool.spot.reclaims_per_replica_day if pool.price_class == "spot" else 0.0
            )
            assert drawn.fleet.max_replicas[row, column] == pool.max_replicas
    assert drawn.pools["replica_rows"].sum(axis=1).max() == drawn.rows
    assert drawn.slots == max(pool.engine.max_num_seqs for spec in drawn.specs for pool in spec.pools)


def test_progress_is_told_trace_by_trace() -> None:
    told: list[tuple[int, int]] = []
    small = RANGES.model_copy(update={"traces": 3, "scenarios": 3})
    draw_bank(
        small, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 0, lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_joined_bank_adds_scenarios_on_their_own_traces() -> None:
    extra = Trace.from_arrays(arrival_s=[0.0, 1.0], prompt_tokens=[10, 20], output_tokens=[3, 4], name="extra")
    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    spec = ScalingSpec(
        slo=Slo(ttft_s=1.0, tpot_s=0.1),
        pools=(PoolSpec(engine=engine, max_replicas=3),),
        guardrails=GuardrailSpec(max_scale_up_step=9),
    )
    joined = bank().joined([spec], [extra], [0])
    assert len(joined) == 61
    assert joined.trace.tolist() == [*bank().trace.tolist(), 6]
    assert joined.specs[:60] == bank().specs
    assert joined.specs[60] == spec.model_copy(update={"guardrails": GuardrailSpec()})
    first, end = joined.library.rows(np.array([6]), np.array([[0.0], [10.0]])).ravel()
    assert joined.library.prompt_tokens[first:end].tolist() == [10, 20]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("cold_start_s", [600.0, 60.0], "cold_start_s: the lowest value 600.0 is above the highest 60.0"),
        ("mean_replicas", [3.0, 1.0], "mean_replicas: the lowest value 3.0 is above the highest 1.0"),
        ("engine_spread", 1.5, "engine_spread"),
        ("profiles", {"chat": 0.0}, "profiles"),
        ("profiles", {"chess": 1.0}, "profiles"),
        ("traces", 0, "traces"),
        ("max_replica", 3, "max_replica"),
    ],
)
def test_a_bad_range_is_refused_in_one_sentence_that_names_it(field: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_model({field: value}, Randomization, "worlds.yaml")
    (line,) = str(refused.value).strip().splitlines()
    assert line.startswith("worlds.yaml")
    assert words in line


def test_an_unknown_engine_is_refused_with_the_names_there_are() -> None:
    unknown = RANGES.model_copy(update={"engines": ("gpt-17",)})
    with pytest.raises(ConfigError, match=r"no engine profile named 'gpt-17'; shipped profiles: .*llama-3\.1-8b-h100"):
        draw_bank(unknown, InterfaceSpec(), GuardrailSpec(), ObjectiveSpec(), 0)
