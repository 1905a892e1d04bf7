"""The references: bound <= plan <= best static, and the exact optimum on cases small enough to try everything."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.traffic.trace import Trace
from policies.engine import ColdStart, EngineProfile, StepModel
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs
from training.references.clairvoyant import (
    Bench,
    best_static,
    cheapest_path,
    choose,
    demand_of,
    find_plan,
    timetable_of,
)
from training.references.fluid_bound import Unservable, boot_charge_s, fluid_bound, work_of
from training.references.timetable import Timetable

NO_START = ColdStart(node_s=0, image_s=0, weights_s=0, warmup_s=0)
SLOW = EngineProfile(
    name="slow",
    model="toy",
    gpu="toy",
    backend="toy",
    precision="toy",
    gpus_per_replica=1,
    gpus_per_node=1,
    step=StepModel(
        a_ms=100, b_us_per_prefill_token=100, c_us_per_seq=10_000, d_us_per_1k_kv_tokens=0, e_ns_per_prefill_token2=0
    ),
    kv_capacity_tokens=1_000_000,
    max_num_seqs=4,
    max_num_batched_tokens=100_000,
    cold_start=NO_START,
    usd_per_gpu_hour=3600.0,  # a dollar a second
    fitted_on="nothing",
)


def toy_spec(most: int = 4, start: ColdStart = NO_START, initial: int | None = 1, **slo) -> ScalingSpec:
    pool = PoolSpec(engine=SLOW, max_replicas=most, initial_replicas=initial, cold_start=start, cold_start_cv=0.0)
    limits = {"ttft_s": 3.0, "tpot_s": 0.2, "attainment": 0.9, **slo}
    return ScalingSpec(slo=Slo(**limits), pools=(pool,))


def evenly(requests_per_s: float, until_s: float, output: int = 21, start_s: float = 0.0) -> list[tuple[float, int]]:
    return [(start_s + i / requests_per_s, output) for i in range(round(requests_per_s * (until_s - start_s)))]


def trace_of(requests: list[tuple[float, int]], duration_s: float, prompt: int = 100) -> Trace:
    requests = sorted(requests)
    return Trace.from_arrays(
        [time_s for time_s, _ in requests],
        [prompt] * len(requests),
        [output for _, output in requests],
        duration_s=duration_s,
    )


def test_the_bound_is_the_work_at_full_batches_where_nothing_else_binds():
    """No misses allowed to speak of, no boot, work far from the horizon: the programme has a closed form."""
    trace = trace_of(evenly(2.0, 100.0), duration_s=160.0)
    spec = toy_spec(attainment=0.9999, initial=None).model_copy(
        update={"pools": (toy_spec(initial=None).pools[0].model_copy(update={"min_replicas": 0}),)}
    )
    prefill_s, decode_s = 100 * 100e-6, 20 * (0.01 + 0.1 / 4)
    by_hand = 200 * (prefill_s + decode_s) * 1.15
    assert fluid_bound(spec, trace, 160.0).usd == pytest.approx(by_hand, rel=1e-3)


def test_the_bound_pays_the_minimum_where_there_is_no_work():
    trace = trace_of([(0.0, 2)], duration_s=100.0)
    bound = fluid_bound(toy_spec(), trace, 100.0)
    assert (bound.usd, bound.replica_hours) == (pytest.approx(115.0), pytest.approx(100 / 3600))


def test_a_boot_is_paid_for_every_replica_above_the_first_ones():
    burst = evenly(8.0, 90.0, start_s=45.0)
    start = ColdStart(node_s=0, image_s=0, weights_s=15, warmup_s=0)
    free, paid = (fluid_bound(toy_spec(start=stages), trace_of(burst, 120.0), 120.0) for stages in (NO_START, start))
    assert boot_charge_s(toy_spec(start=start).pools[0]) == pytest.approx(15.0)
    assert paid.usd > free.usd


def test_more_work_than_all_replicas_can_do_is_unservable():
    with pytest.raises(Unservable, match="cannot hold the SLO"):
        fluid_bound(toy_spec(most=1), trace_of(evenly(20.0, 100.0), 100.0), 100.0)


def test_the_fixed_time_of_an_iteration_is_shared_by_no_more_than_the_engine_admits():
    work = work_of(trace_of([(0.0, 21)], 10.0), toy_spec().pools[0])
    assert (work.prefill_s.tolist(), work.decode_s.tolist()) == ([pytest.approx(0.01)], [pytest.approx(0.7)])


@settings(max_examples=60, deadline=None)
@given(
    need=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    boot=st.floats(0.0, 4.0),
    initial=st.none() | st.integers(0, 3),
)
def test_the_path_is_the_cheapest_of_all_paths(need, boot, initial):
    def cost(path):
        before = path[0] if initial is None else initial
        return sum(path) + boot * sum(max(b - a, 0) for a, b in itertools.pairwise([before, *path]))

    paths = itertools.product(range(4), repeat=len(need))
    best = min(cost(path) for path in paths if all(has >= needs for has, needs in zip(path, need, strict=True)))
    found = cheapest_path(np.array(need), 0, 3, boot, initial)
    assert (found >= need).all()
    assert cost(found.tolist()) == pytest.approx(best)


def test_starts_are_asked_for_ahead_and_given_back_on_time():
    assert timetable_of(np.array([1, 1, 1, 3, 3, 1, 1]), 2).tolist() == [3, 3, 3, 3, 1, 1]


def test_demand_is_work_per_time():
    """One request of 100 tokens and 21 out: 10 ms and a share of an iteration, then 20 steps in batches of 4."""
    trace = trace_of([(0.0, 21)], 30.0)
    demand = demand_of(toy_spec(), trace, np.array([4]), 15.0, 2)
    assert demand.sum() * 15.0 == pytest.approx(0.01 + 0.1 * 100 / 100_000 + 20 * (0.01 + 0.1 / 4))
    assert demand[1].tolist() == [0.0]


@pytest.fixture(scope="module")
def tiny() -> Bench:
    """Four ticks, quiet, a burst, quiet; up to three replicas that start at once."""
    trace = trace_of(evenly(0.6, 75.0) + evenly(2.6, 45.0, start_s=30.0), duration_s=75.0)
    return Bench(toy_spec(most=3), trace, seed=0)


def test_the_plan_is_the_optimum_of_all_timetables_of_a_tiny_case(tiny):
    cap = np.array([4])
    tables = [Timetable(np.array(sizes)[:, np.newaxis], cap) for sizes in itertools.product((1, 2, 3), repeat=5)]
    optimum = choose(tiny, tiny.try_all(tables))
    plan = find_plan(tiny, best_static(tiny), tiny.replays + 200)
    assert tiny.holds(optimum)
    assert plan.usd == pytest.approx(optimum.usd)


def test_the_best_static_fleet_is_the_smallest_of_all_sizes_that_holds(tiny):
    every = tiny.try_all([tiny.constant(np.array([size]), np.array([4])) for size in (1, 2, 3)])
    assert best_static(tiny).usd == min(trial.usd for trial in every if tiny.holds(trial))


def test_where_no_fleet_holds_the_best_attainment_is_reported():
    trace = trace_of(evenly(4.0, 60.0), duration_s=60.0)
    bench = Bench(toy_spec(most=2, initial=None), trace, seed=0)
    static = best_static(bench)
    assert not bench.holds(static)
    assert static.plan.replicas[0].tolist() == [2]
    assert not bench.holds(find_plan(bench, static, 50))


@pytest.mark.parametrize(
    ("profile", "engine", "mean_rps", "pools"),
    [("chat", "llama-3.1-8b-l40s", 6, 1), ("code", "llama-3.1-8b-h100", 20, 2)],
)
def test_bound_at_most_plan_at_most_best_static(profile, engine, mean_rps, pools):
    from envs.traffic.generator import GeneratorSpec, generate

    trace = generate(GeneratorSpec(profile=profile, duration_s=900, mean_rps=mean_rps), 0)
    found = find_engine(engine, shipped_configs())
    start = ColdStart(node_s=0, image_s=10, weights_s=20, warmup_s=30)
    named = [
        PoolSpec(name=f"p{i}", engine=found, max_replicas=5, min_replicas=1 - i, initial_replicas=3, cold_start=start)
        for i in range(pools)
    ]
    spec = ScalingSpec(slo=Slo(ttft_s=2.0, tpot_s=0.08, attainment=0.95), pools=tuple(named))
    bench = Bench(spec, trace, seed=3)
    static = best_static(bench)
    plan = find_plan(bench, static, bench.replays + 80)
    assert bench.holds(static)
    assert bench.holds(plan)
    assert fluid_bound(spec, trace, 900.0).usd <= plan.usd <= static.usd
