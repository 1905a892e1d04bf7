"""Replicas that a load needs, against hand-computed figures and the step-time formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import engine, fleet, missing, pool, snapshot, snapshots
from hypothesis import given, settings

from policies.contract import Snapshot
from policies.demand import LONGEST, Demand, RequestMix, estimate_demand
from policies.engine import StepModel
from policies.fleet import Fleet

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

ONE = fleet()
# 100 prompt and 200 output tokens: a mean context of 200; batches of 64 (the engine's most) meet 50 ms.
TOKEN_S = 0.01 / 64 + 1e-4 + 1e-7 * 200
PREFILL_S = 1e-4


def demand_of(seen: Snapshot, services: Fleet = ONE, mix: RequestMix | None = None) -> Demand:
    memory = mix or RequestMix(len(services))
    # The context is that of finished requests here: what running ones hold was not measured.
    memory.update(replace(seen, kv_cache_usage=np.full_like(seen.kv_cache_usage, np.nan)), services)
    return estimate_demand(seen, services, memory)


def values(demand: Demand) -> tuple[float, float, float]:
    return float(demand.tokens[0, 0]), float(demand.occupancy[0, 0]), float(demand.batch_limit[0, 0])


def test_steady_load_is_rates_times_costs() -> None:
    tokens, occupancy, limit = values(demand_of(snapshot()))
    assert limit == 64.0
    assert tokens == pytest.approx(400 * TOKEN_S + 200 * PREFILL_S)
    assert occupancy == pytest.approx(8 / 64 + 200 * PREFILL_S)


def test_what_one_replica_can_do_by_the_step_formula_needs_one_replica() -> None:
    step_s = 0.01 + 32 * 1e-4 + 64 * 1e-4 + 64 * 200 * 1e-7  # 64 decodes and half as many prefill tokens
    tps = 64 / step_s
    seen = snapshot(generation_tps=tps, prefill_tps=tps / 2, prompt_tps=tps / 2, finished_rps=tps / 200, running=64.0)
    tokens, occupancy, _ = values(demand_of(seen))
    assert tokens == pytest.approx(1.0)
    assert occupancy == pytest.approx(1.0 + tps / 2 * PREFILL_S)


def test_attention_costs_the_mean_position_in_the_prompt() -> None:
    step = StepModel(
        a_ms=10,
        b_us_per_prefill_token=0,
        c_us_per_seq=0,
        d_us_per_1k_kv_tokens=0,
        e_ns_per_prefill_token2=1000,
    )
    seen = snapshot(generation_tps=0.0, running=0.0)
    whole = demand_of(seen, fleet(pool(engine=engine(step=step))))
    # A whole prompt of 100 tokens costs e * 100 * 50.
    assert whole.tokens[0, 0] == pytest.approx(200 * 1e-6 * 50)


def test_batch_limit_is_the_largest_batch_within_the_pace() -> None:
    services = fleet(pool(engine=engine(max_num_seqs=4096, kv_capacity_tokens=10**8)))
    limit = demand_of(snapshot(), services).batch_limit[0, 0]
    step_s = 0.01 + limit * (1e-4 + 200 * 1e-7) + 0.5 * limit * 1e-4
    assert step_s == pytest.approx(0.05)


def test_prefills_without_decodes_shrink_the_batch_only_so_far() -> None:
    """A window with hardly a decode: four times the prefills that the mix expects with one, no more."""
    services = fleet(pool(engine=engine(max_num_seqs=4096, kv_capacity_tokens=10**8)))
    limit = demand_of(snapshot(generation_tps=1.0), services).batch_limit[0, 0]
    assert limit == pytest.approx((0.05 - 0.01) / (1e-4 + 200 * 1e-7 + 4 * 0.5 * PREFILL_S))


def test_batch_limit_fits_the_kv_cache() -> None:
    assert demand_of(snapshot(), fleet(pool(engine=engine(kv_capacity_tokens=2000)))).batch_limit[
        0, 0
    ] == pytest.approx(10.0)


def test_batch_limit_is_at_least_one_even_if_the_pace_cannot_be_met() -> None:
    assert demand_of(snapshot(), fleet(slo={"ttft_s": 1, "tpot_s": 0.001})).batch_limit[0, 0] == 1.0


def test_backlog_is_worked_off_in_thirty_seconds() -> None:
    calm, late = demand_of(snapshot()), demand_of(snapshot(queue_requests=20.0, waiting=10.0))
    request_s = 200 * TOKEN_S + 100 * PREFILL_S
    assert late.tokens - calm.tokens == pytest.approx(30 * request_s / 30.0)
    assert late.occupancy - calm.occupancy == pytest.approx(30 / 64)


def test_overload_does_not_look_like_cache_hits() -> None:
    """Ten times the prompts arrive that can be computed: the arrivals count in full."""
    over = demand_of(snapshot(prompt_tps=2000.0, queue_requests=100.0))
    request_s = 200 * TOKEN_S + 100 * PREFILL_S
    assert over.tokens[0, 0] == pytest.approx(400 * TOKEN_S + 200 * PREFILL_S + 100 * request_s / 30)
    assert over.occupancy[0, 0] == pytest.approx(108 / 64 + 2000 * PREFILL_S)


def test_a_fleet_that_has_served_nothing_yet_expects_to_compute_every_prompt() -> None:
    waking = snapshot(
        prefill_tps=0.0,
        generation_tps=0.0,
        finished_rps=0.0,
        prompt_tokens_mean=np.nan,
        output_tokens_mean=np.nan,
        running=0.0,
        prompt_tps=5000.0,
        queue_requests=75.0,
    )
    tokens, occupancy, limit = values(demand_of(waking))
    # A mix of 1,000 and 200 tokens: five prefilled tokens come along with every decode.
    assert limit == pytest.approx((0.05 - 0.01) / (1e-4 + 1e-7 * 1100 + 5 * PREFILL_S))
    default_request_s = 200 * (0.01 / limit + 1e-4 + 1e-7 * 1100) + 1000 * PREFILL_S
    assert tokens == pytest.approx(75 * default_request_s / 30)
    assert occupancy == pytest.approx(75 / limit + 5000 * PREFILL_S)


def test_cache_hits_make_arriving_prompts_cheaper() -> None:
    hits = demand_of(snapshot(prefill_tps=50.0))
    assert hits.occupancy[0, 0] == pytest.approx(8 / 64 + 50 * PREFILL_S)
    assert hits.tokens[0, 0] == pytest.approx(400 * TOKEN_S + 50 * PREFILL_S)


def test_cache_hits_never_make_prompts_free() -> None:
    seen = snapshot(prefill_tps=0.0)
    assert demand_of(seen).occupancy[0, 0] == pytest.approx(8 / 64 + 0.02 * 200 * PREFILL_S)


@pytest.mark.parametrize(
    "gap",
    [
        {"generation_tps": np.nan},
        {"prompt_tps": np.nan},
        {"prefill_tps": np.nan},
        {"prompt_tps": np.nan, "prefill_tps": np.nan},
        {"arrival_rps": np.nan, "prompt_tps": np.nan, "prefill_tps": np.nan},
        {"generation_tps": np.nan, "prompt_tps": np.nan, "prefill_tps": np.nan},
    ],
    ids=lambda gap: "+".join(gap),
)
def test_a_missing_rate_is_taken_from_its_relatives(gap: dict[str, Any]) -> None:
    """The steady load is consistent, so the answer must be that of the whole window."""
    assert values(demand_of(snapshot(**gap))) == pytest.approx(values(demand_of(snapshot())))


def test_idle_service_needs_nothing() -> None:
    idle: dict[str, Any] = dict.fromkeys(
        ("arrival_rps", "prompt_tps", "prefill_tps", "generation_tps", "finished_rps", "running"), 0.0
    )
    demand = demand_of(snapshot(**idle, prompt_tokens_mean=np.nan, output_tokens_mean=np.nan))
    assert (demand.tokens.tolist(), demand.occupancy.tolist()) == ([[0.0]], [[0.0]])


def test_slower_pool_needs_more_replicas_and_an_absent_one_none() -> None:
    slow = StepModel(
        a_ms=20,
        b_us_per_prefill_token=200,
        c_us_per_seq=200,
        d_us_per_1k_kv_tokens=200,
        e_ns_per_prefill_token2=0,
    )
    services = fleet(pool(), pool(name="slow", engine=engine(step=slow)), width=3)
    demand = demand_of(snapshot(pools=3, running=[8.0, 0.0, 0.0]), services)
    assert demand.tokens[0, 1] == pytest.approx(2 * demand.tokens[0, 0])
    assert (demand.tokens[0, 2], demand.occupancy[0, 2]) == (0.0, 0.0)


def test_mix_is_remembered_through_windows_without_a_finish() -> None:
    mix = RequestMix(1)
    mix.update(snapshot(), ONE)
    for _ in range(10):
        mix.update(snapshot(finished_rps=0.0, prompt_tokens_mean=np.nan, output_tokens_mean=np.nan), ONE)
    assert mix.lengths() == pytest.approx(np.array([[100.0], [200.0]]))


def test_mix_weighs_windows_by_finished_requests() -> None:
    mix = RequestMix(1)
    mix.update(snapshot(window_s=1e-6, finished_rps=3e6), ONE)
    mix.update(snapshot(window_s=1e-6, finished_rps=1e6, prompt_tokens_mean=500.0, output_tokens_mean=600.0), ONE)
    assert mix.lengths() == pytest.approx(np.array([[200.0], [300.0]]))


def test_mix_forgets_in_about_ten_minutes() -> None:
    mix = RequestMix(1)
    mix.update(snapshot(), ONE)
    mix.update(snapshot(window_s=600.0, finished_rps=2 * 15 / 600, prompt_tokens_mean=500.0), ONE)
    weight = np.exp(-1.0)
    assert mix.lengths()[0] == pytest.approx([(100 * weight + 500) / (weight + 1)])


def test_mix_of_a_reset_service_is_new_and_others_stay() -> None:
    services = fleet(n=2)
    mix = RequestMix(2)
    mix.update(snapshot(n=2, prefill_tps=50.0), services)
    mix.reset(np.array([True, False]))
    assert mix.lengths() == pytest.approx(np.array([[1000.0, 100.0], [200.0, 200.0]]))  # the defaults, and what was
    assert mix.uncached() == pytest.approx([1.0, 0.25])
    mix.update(snapshot(n=2, prompt_tokens_mean=500.0, prefill_tps=[500.0, 100.0]), services)
    prompt, _ = mix.lengths()
    assert prompt[0] == pytest.approx(500.0)
    assert 100.0 < prompt[1] < 500.0
    assert mix.uncached()[0] == pytest.approx(0.5)


def test_mix_ignores_windows_of_which_it_knows_only_half() -> None:
    mix = RequestMix(1)
    mix.update(snapshot(prefill_tps=50.0), ONE)
    mix.update(snapshot(prefill_tps=np.nan), ONE)
    mix.update(snapshot(finished_rps=np.nan), ONE)
    mix.update(snapshot(prompt_tokens_mean=np.nan), ONE)
    mix.update(missing(), ONE)
    assert mix.uncached() == pytest.approx([0.25])
    assert mix.lengths()[0] == pytest.approx([100.0])


@settings(max_examples=25, deadline=None)
@given(snapshots(n=2, pools=2))
def test_demand_is_finite_and_not_negative_whatever_is_seen(seen: Snapshot) -> None:
    services = fleet(pool(), n=2, width=2)
    demand = demand_of(seen, services)
    for estimate in demand:
        assert estimate.shape == (2, 2)
        assert np.isfinite(estimate).all()
        assert (estimate >= 0).all()
    assert (demand.batch_limit >= 1).all()
    assert (demand.batch_limit <= services.max_num_seqs).all()


def test_context_of_running_requests_is_measured_not_guessed_from_finished_ones() -> None:
    """A few long requests among many short ones fill the batch, though hardly any of the finished ones is long."""
    mix, finished = RequestMix(1), np.array([200.0])
    assert mix.context(otherwise=finished).tolist() == [200.0]
    mix.update(snapshot(window_s=60.0, running=10.0, kv_cache_usage=0.1), ONE)
    measured = 0.1 * ONE.kv_capacity[0, 0] * 2.0 / 10.0
    assert mix.context(finished) == pytest.approx([measured])
    mix.update(snapshot(window_s=60.0, running=10.0, kv_cache_usage=np.nan), ONE)
    assert mix.context(finished) == pytest.approx([measured])
    guessed, known = demand_of(snapshot()), estimate_demand(snapshot(), ONE, mix)
    assert known.tokens[0, 0] > guessed.tokens[0, 0]
    assert known.batch_limit[0, 0] < guessed.batch_limit[0, 0]


@pytest.mark.parametrize(
    ("kv_cache_usage", "running", "context"),
    [(0.9, 1.0, LONGEST * 300.0), (0.9, 0.55, LONGEST * 300.0), (0.0, 50.0, 200.0 / LONGEST)],
)
def test_context_is_bounded_by_the_lengths_of_finished_requests(
    kv_cache_usage: float, running: float, context: float
) -> None:
    """A gauge that counts one of several ranks, or cached blocks, must not close the batches."""
    mix = RequestMix(1)
    for _ in range(5):
        mix.update(snapshot(window_s=60.0, running=running, kv_cache_usage=kv_cache_usage), ONE)
    assert mix.context(np.array([200.0])) == pytest.approx([context])


def test_lengths_of_few_requests_bound_nothing() -> None:
    """The first to finish are the shortest."""
    mix = RequestMix(1)
    mix.update(snapshot(window_s=60.0, running=10.0, kv_cache_usage=0.5, finished_rps=0.1), ONE)
    assert mix.context(np.array([200.0])) == pytest.approx([0.5 * ONE.kv_capacity[0, 0] * 2.0 / 10.0])
