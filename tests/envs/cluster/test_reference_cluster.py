"""The reference simulator on cases small enough to compute by hand; times in the comments are milliseconds.

An iteration of the toy engine takes ``10 + 0.1 p + B + 0.001 KV + sum of 0.001 chunk (prefix + chunk/2)`` ms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from reference_cluster import ReferencePool, ReferenceResult, simulate

from policies.engine import ColdStart, EngineProfile, StepModel


def toy(kv: int = 100_000, budget: int = 2048, slowdown: float = 1.0) -> EngineProfile:
    """An engine with round coefficients."""
    return EngineProfile(
        name="toy",
        model="toy",
        gpu="toy",
        backend="toy",
        precision="bf16",
        gpus_per_replica=1,
        gpus_per_node=8,
        step=StepModel(
            a_ms=10 * slowdown,
            b_us_per_prefill_token=100 * slowdown,
            c_us_per_seq=1000 * slowdown,
            d_us_per_1k_kv_tokens=1000 * slowdown,
            e_ns_per_prefill_token2=1000 * slowdown,
        ),
        kv_capacity_tokens=kv,
        max_num_seqs=256,
        max_num_batched_tokens=budget,
        cold_start=ColdStart(node_s=0, image_s=0, weights_s=0, warmup_s=0),
        usd_per_gpu_hour=1.0,
        fitted_on="nothing",
    )


def run(
    requests: Sequence[tuple[float, int, int] | tuple[float, int, int, int]],
    pools: list[ReferencePool] | None = None,
    until_s: float | None = None,
    drain_at: dict[int, float] | None = None,
    kill_at: dict[int, float] | None = None,
) -> ReferenceResult:
    """Simulate requests given as (arrival in seconds, prompt, output[, prefix hit])."""
    rows = [(*request, 0)[:4] for request in requests]
    return simulate(
        [row[0] for row in rows],
        [row[1] for row in rows],
        [row[2] for row in rows],
        [row[3] for row in rows],
        pools or [ReferencePool(toy(), 1, 64)],
        until_s,
        drain_at=drain_at,
        kill_at=kill_at,
    )


def ms(*values: float) -> object:
    """Expected times, given in milliseconds."""
    return pytest.approx([value / 1000 for value in values], abs=1e-12, nan_ok=True)


def test_single_request() -> None:
    result = run([(1.0, 100, 4)])
    # Prefill 10 + 10 + 0.001*100*50 = 25; decodes read 100, 101, 102 tokens: 11.1 + 11.101 + 11.102 = 33.303.
    assert result.first_token_s == ms(1025)
    assert result.finish_s == ms(1058.303)
    assert result.replica.tolist() == [0]
    assert result.preemptions.tolist() == [0]
    assert result.emitted.tolist() == [4]
    assert result.iterations.tolist() == [4]
    assert result.total_iterations == 4
    assert result.tokens_generated == 4
    assert result.tokens_lost == 0
    assert result.busy_s == ms(58.303)
    assert result.peak_kv.tolist() == [103]
    assert result.end_s == pytest.approx(1.058303)


def test_one_token_output_leaves_with_its_first_token() -> None:
    result = run([(0.0, 100, 1)])
    assert result.first_token_s == ms(25)
    assert result.finish_s == ms(25)
    assert result.peak_kv.tolist() == [100]


def test_chunked_prefill() -> None:
    result = run([(0.0, 100, 1)], [ReferencePool(toy(budget=64), 1, 64)])
    # 10 + 6.4 + 0.001*64*32 = 18.448, then 36 tokens after 64: 10 + 3.6 + 0.001*36*82 = 16.552.
    assert result.first_token_s == ms(35)
    assert result.iterations.tolist() == [2]


def test_two_prefills_share_an_iteration() -> None:
    result = run([(0.0, 100, 2), (0.0, 60, 2)])
    # 10 + 16 + 5 + 1.8 = 32.8, then 10 + 2 + 0.16 = 12.16.
    assert result.first_token_s == ms(32.8, 32.8)
    assert result.finish_s == ms(44.96, 44.96)
    assert result.iterations.tolist() == [2]


def test_budget_left_by_one_prefill_goes_to_the_next() -> None:
    result = run([(0.0, 40, 1), (0.0, 40, 1)], [ReferencePool(toy(budget=64), 1, 64)])
    # 40 + 24 tokens: 10 + 6.4 + 0.8 + 0.288 = 17.488; then 16 after 24: 10 + 1.6 + 0.001*16*32 = 12.112.
    assert result.finish_s == ms(17.488, 29.6)


def test_arrival_in_mid_iteration_joins_at_the_boundary() -> None:
    result = run([(0.0, 100, 2), (0.005, 60, 1)])
    # From 25: one decode reading 100 and a chunk of 60: 10 + 6 + 1 + 0.1 + 1.8 = 18.9.
    assert result.first_token_s == ms(25, 43.9)
    assert result.finish_s == ms(43.9, 43.9)


def test_arrival_at_the_end_of_an_iteration_joins_the_next() -> None:
    boundary = float(run([(0.0, 100, 1)]).finish_s[0])
    result = run([(0.0, 100, 2), (boundary, 60, 1)])
    assert result.finish_s == ms(43.9, 43.9)
    just_late = run([(0.0, 100, 2), (float(np.nextafter(boundary, 1)), 60, 1)])
    # The first decodes alone (11.1) up to 36.1, then 10 + 6 + 1.8 = 17.8.
    assert just_late.finish_s == ms(36.1, 53.9)


def test_idle_replica_starts_at_the_arrival() -> None:
    assert run([(0.0, 100, 1), (2.0, 100, 1)]).finish_s == ms(25, 2025)


def test_decodes_take_from_the_budget_but_leave_sixteen() -> None:
    budget_64 = run([(0.0, 10, 3), (0.001, 64, 1)], [ReferencePool(toy(budget=64), 1, 64)])
    # 11.05; one decode leaves 63 of 64 tokens: 10 + 1 + 0.010 + 6.3 + 1.9845 = 19.2945;
    # then the last token after 63, with a decode reading 11: 10 + 1 + 0.011 + 0.1 + 0.0635 = 11.1745.
    assert budget_64.finish_s == ms(41.519, 41.519)
    budget_16 = run([(0.0, 10, 3), (0.001, 32, 1)], [ReferencePool(toy(budget=16), 1, 64)])
    # 11.05; 16 tokens: 10 + 1 + 0.010 + 1.6 + 0.128 = 12.738; 16 after 16: 10 + 1 + 0.011 + 1.6 + 0.384 = 12.995.
    assert budget_16.finish_s == ms(36.783, 36.783)


def test_prefix_hit_is_skipped_but_occupies() -> None:
    result = run([(0.0, 100, 1, 60)])
    # 40 tokens after 60: 10 + 4 + 0.001*40*80 = 17.2.
    assert result.first_token_s == ms(17.2)
    assert result.peak_kv.tolist() == [100]


@pytest.mark.parametrize("hit", [99, 100, 5000])
def test_full_prefix_hit_computes_one_token(hit: int) -> None:
    # 10 + 0.1 + 0.001*99.5.
    assert run([(0.0, 100, 1, hit)]).first_token_s == ms(10.1995)


def test_batch_cap_queues_at_the_gateway() -> None:
    result = run([(0.0, 100, 1)] * 3, [ReferencePool(toy(), 1, 1)])
    assert result.first_token_s == ms(25, 50, 75)
    # With room for two, the third starts when both leave: 10 + 20 + 10 = 40.
    assert run([(0.0, 100, 1)] * 3, [ReferencePool(toy(), 1, 2)]).first_token_s == ms(40, 40, 65)


def test_equal_arrivals_go_round_by_input_order() -> None:
    result = run([(0.0, 100, 1), (0.0, 60, 1), (0.0, 20, 1)], [ReferencePool(toy(), 2, 1)])
    assert result.replica.tolist() == [0, 1, 1]
    # Replica 1: 10 + 6 + 1.8 = 17.8, then 10 + 2 + 0.2 = 12.2.
    assert result.finish_s == ms(25, 17.8, 30)
    assert run([(0.0, 10, 1)] * 5, [ReferencePool(toy(), 3, 9)]).replica.tolist() == [0, 1, 2, 0, 1]


def test_least_loaded_replica_wins() -> None:
    # The third is put behind the first; when the fourth comes, replica 1 is idle again.
    result = run([(0.0, 100, 9), (0.0, 10, 1), (0.005, 10, 1), (0.2, 10, 1)], [ReferencePool(toy(), 2, 9)])
    assert result.replica.tolist() == [0, 1, 0, 0]
    result = run([(0.0, 100, 9), (0.0, 10, 1), (0.02, 10, 1)], [ReferencePool(toy(), 2, 9)])
    assert result.replica.tolist() == [0, 1, 1]


def test_pools_share_by_nominal_decode_rate() -> None:
    pools = [ReferencePool(toy(slowdown=2.5), 1, 4), ReferencePool(toy(), 1, 4)]
    # In units of the fast replica's weight: fast 1, 2, 3, 4; slow 2.5, 5.
    assert run([(0.0, 100, 2)] * 6, pools).replica.tolist() == [1, 1, 0, 1, 1, 0]
    # The weight depends on the cap too: 1/(10 + 1 + 1) = 0.083 and 4/(10 + 4 + 4) = 0.222.
    assert run([(0.0, 100, 2)] * 3, [ReferencePool(toy(), 1, 1), ReferencePool(toy(), 1, 4)]).replica.tolist() == [
        1,
        1,
        0,
    ]


def test_kv_pressure_preempts_the_latest_admitted() -> None:
    result = run([(0.0, 8, 6), (0.0, 7, 6)], [ReferencePool(toy(kv=20), 1, 64)])
    # Prefill of 15: 10 + 1.5 + 0.032 + 0.0245 = 11.5565; decodes of both reading 15 and 17: 12.015, 12.017.
    # Then 19 are occupied and 2 needed: the second goes back with 3 tokens out, to wait for 10 + 1 tokens.
    # The first alone, reading 10, 11, 12: 11.010, 11.011, 11.012, up to 68.6215.
    # The second again: prefill of 10 emits its fourth token, 11.05, then reading 10 and 11: 11.010, 11.011.
    assert result.first_token_s == ms(11.5565, 11.5565)
    assert result.finish_s == ms(68.6215, 101.6925)
    assert result.preemptions.tolist() == [0, 1]
    assert result.iterations.tolist() == [9]
    assert result.tokens_generated == 12
    assert result.peak_kv.tolist() == [19]


def test_prefix_hit_is_gone_after_a_preemption() -> None:
    result = run([(0.0, 8, 6), (0.0, 7, 6, 5)], [ReferencePool(toy(kv=20), 1, 64)])
    # Only the first iteration differs: 10 + 1 + 0.032 + 0.001*2*6 = 11.044 rather than 11.5565.
    assert result.first_token_s == ms(11.044, 11.044)
    assert result.finish_s == ms(68.109, 101.18)


def test_preempted_prefill_keeps_its_prefix_hit() -> None:
    result = run([(0.0, 10, 5), (0.001, 48, 2, 4)], [ReferencePool(toy(kv=60, budget=16), 1, 64)])
    # The first: prefill 11.05. The second is admitted at once (48 + 1 <= 60 - 10 - 1) and prefills 16 tokens after 4
    # and 16 after 20 beside decodes reading 10 and 11: 12.802, 13.059. Then 60 are occupied: it goes back.
    # The first alone, reading 12 and 13: 11.012, 11.013, up to 58.936.
    # The second: 16 after 4, 16 after 20, 12 after 36: 11.792, 12.048, 11.704; then reading 48: 11.048.
    assert result.first_token_s == ms(11.05, 94.48)
    assert result.finish_s == ms(58.936, 105.528)
    assert result.preemptions.tolist() == [0, 1]
    assert result.peak_kv.tolist() == [60]


def test_admission_waits_for_room_in_order() -> None:
    # Three prompts of 8, 9 and 1: the second needs 10 of the 12 left, the third 2 of the 3 left then.
    pool = [ReferencePool(toy(kv=20), 1, 64)]
    assert run([(0.0, 8, 1), (0.0, 9, 1), (0.0, 1, 1)], pool).iterations.tolist() == [1]
    # The second needs 13 of 12: it waits, and the third waits behind it although it would fit.
    result = run([(0.0, 8, 1), (0.0, 12, 1), (0.0, 1, 1)], pool)
    # 10 + 0.8 + 0.032 = 10.832; then 12 and 1: 10 + 1.3 + 0.072 + 0.0005 = 11.3725.
    assert result.finish_s == ms(10.832, 22.2045, 22.2045)


def test_request_that_fits_nowhere_is_rejected() -> None:
    result = run([(0.0, 15, 6), (0.0, 15, 5)], [ReferencePool(toy(kv=20), 1, 64)])
    assert result.rejected.tolist() == [True, False]
    assert np.isnan(result.finish_s).tolist() == [True, False]
    assert np.isnan(result.first_token_s).tolist() == [True, False]
    assert result.replica.tolist() == [-1, 0]
    assert result.tokens_generated == 5


def test_large_request_waits_for_the_pool_that_holds_it() -> None:
    pools = [ReferencePool(toy(kv=20), 1, 8), ReferencePool(toy(kv=200), 1, 1)]
    result = run([(0.0, 100, 1), (0.0, 100, 1), (0.0, 10, 1)], pools)
    # The second waits at the head of the gateway queue for replica 1, and the third behind it.
    assert result.replica.tolist() == [1, 1, 0]
    assert result.finish_s == ms(25, 50, 36.05)
    assert not result.rejected.any()


def test_draining_replica_finishes_what_it_has() -> None:
    pools = [ReferencePool(toy(kv=120), 2, 2)]
    requests = [(0.0, 100, 1), (0.0, 100, 1), (0.0, 60, 1), (0.02, 10, 1), (0.021, 10, 1)]
    result = run(requests, pools, drain_at={0: 0.02})
    # The third waits on replica 0 for its KV, drains with it; what arrives at 20 or later goes to replica 1.
    assert result.replica.tolist() == [0, 1, 0, 1, 1]
    # Replica 0: 25, then 17.8. Replica 1: 25, then 10 + 1 + 0.05; the last waits at the gateway until 25.
    assert result.finish_s == ms(25, 25, 42.8, 37.1, 37.1)


def test_killed_replica_returns_its_requests() -> None:
    result = run([(0.0, 100, 4)], [ReferencePool(toy(), 2, 4)], kill_at={0: 0.03})
    assert result.replica.tolist() == [1]
    assert result.first_token_s == ms(55)
    assert result.finish_s == ms(88.303)
    assert result.tokens_generated == 5
    assert result.tokens_lost == 1
    assert result.busy_s == ms(30, 58.303)
    assert result.iterations.tolist() == [1, 4]


def test_killed_requests_go_ahead_of_the_queue_in_arrival_order() -> None:
    # Replica 0 has 0 and 2, replica 1 has 1 and 3; 4 waits. After the kill, 0 and 2 go before 4.
    result = run([(0.0, 100, 1)] * 5, [ReferencePool(toy(), 2, 2)], kill_at={0: 0.01})
    # Replica 1: 40 for 1 and 3, 40 for 0 and 2, 25 for 4.
    assert result.replica.tolist() == [1] * 5
    assert result.finish_s == ms(80, 40, 80, 40, 105)


def test_iteration_that_ends_at_the_kill_takes_effect() -> None:
    boundary = float(run([(0.0, 100, 1)]).finish_s[0])
    result = run([(0.0, 100, 1)], kill_at={0: boundary})
    assert result.finish_s == ms(25)
    assert result.tokens_lost == 0


def test_no_replica_left_leaves_requests_unfinished() -> None:
    result = run([(0.0, 100, 4), (1.0, 10, 1)], kill_at={0: 0.03})
    assert np.isnan(result.first_token_s).all()
    assert not result.rejected.any()
    assert result.tokens_lost == result.tokens_generated == 1


def test_until_stops_the_clock() -> None:
    result = run([(0.0, 100, 4), (1.0, 100, 4)], until_s=0.03)
    assert result.first_token_s == ms(25, float("nan"))
    assert np.isnan(result.finish_s).all()
    assert result.iterations.tolist() == [1]
    assert result.busy_s == ms(30)
    assert result.emitted.tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(6))
def test_every_token_is_accounted_for(seed: int) -> None:
    """Random work under KV pressure: the invariants inside hold, everything finishes, in a plausible order."""
    rng = np.random.default_rng(seed)
    n = 120
    arrival = np.cumsum(rng.exponential(0.02, n))
    prompt = rng.integers(1, 120, n)
    output = rng.integers(1, 60, n)
    hit = np.where(rng.random(n) < 0.4, rng.integers(0, 120, n), 0)
    pools = [ReferencePool(toy(kv=300, budget=32), 2, 12), ReferencePool(toy(kv=150, slowdown=1.5), 1, 6)]
    result = simulate(arrival, prompt, output, hit, pools, drain_at={1: 1.0}, kill_at={1: 1.5})
    small = prompt + output <= 300
    assert (result.rejected == ~small).all()
    assert (result.emitted == np.where(small, output, 0)).all()
    assert result.tokens_generated - result.tokens_lost == output[small].sum()
    assert result.preemptions.sum() > 0
    assert (result.peak_kv <= [300, 300, 150]).all()
    assert (result.first_token_s[small] > arrival[small]).all()
    # No token takes less than an iteration's fixed time.
    assert (result.finish_s - result.first_token_s >= 0.01 * (output - 1) - 1e-9)[small].all()
    assert (result.busy_s <= result.end_s).all()


@pytest.mark.parametrize(
    "requests",
    [[(1.0, 10, 1), (0.0, 10, 1)], [(-1.0, 10, 1)], [(0.0, 0, 1)], [(0.0, 10, 0)], [(0.0, 10, 1, -1)]],
)
def test_what_is_not_a_workload_is_refused(requests: list[tuple[float, int, int]]) -> None:
    with pytest.raises(ValueError, match=r"arrivals|request"):
        run(requests)


def test_what_is_not_a_fleet_is_refused() -> None:
    with pytest.raises(ValueError, match="fleet is empty"):
        run([(0.0, 10, 1)], [ReferencePool(toy(), 0, 4)])
    with pytest.raises(ValueError, match="batch cap 300"):
        run([(0.0, 10, 1)], [ReferencePool(toy(), 1, 300)])
    with pytest.raises(ValueError, match="does not exist"):
        run([(0.0, 10, 1)], kill_at={1: 0.0})
    with pytest.raises(ValueError, match="equally long"):
        simulate([0.0], [10], [1, 2], [0], [ReferencePool(toy(), 1, 4)])
