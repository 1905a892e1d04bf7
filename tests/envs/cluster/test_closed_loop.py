import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.cluster.closed_loop import ClosedLoops, LoadProtocol, _blank_engine, loop_lengths
from envs.traffic.trace import Trace
from policies.engine import StepModel
from training.replaying.fixed_fleet import simulate

STEP = StepModel(
    a_ms=6.0, b_us_per_prefill_token=20.0, c_us_per_seq=15.0, d_us_per_1k_kv_tokens=40.0, e_ns_per_prefill_token2=1.0
)


def test_one_client_sees_the_step_times_themselves():
    a, b, c, d, e = STEP.seconds
    prompt, output = 500, 40
    found = ClosedLoops([prompt], [output], [1], [LoadProtocol(requests_per_client=3)], 2048).run(STEP.seconds, 10_000)
    contexts = np.arange(prompt, prompt + output - 1)
    assert found.ttft_mean_s == pytest.approx(a + b * prompt + e * prompt**2 / 2)
    assert found.ttft_p90_s == pytest.approx(found.ttft_mean_s)
    assert found.tpot_mean_s == pytest.approx(np.mean(a + c + d * contexts))


@settings(max_examples=20, deadline=None)
@given(
    clients=st.integers(1, 9),
    per_client=st.integers(1, 5),
    output=st.integers(2, 60),
    prompt=st.integers(1, 900),
    spread=st.sampled_from([0.0, 0.5]),
    kv=st.integers(1000, 4000),
)
def test_requests_sent_as_clients_would_send_them_are_served_alike(clients, per_client, output, prompt, spread, kv):
    """Requests queued behind the cap at time 0 are served as if each arrived when its client was free again."""
    protocol = LoadProtocol(requests_per_client=per_client, length_spread=spread)
    lengths = loop_lengths(protocol, output, clients)
    engine = _blank_engine(64, 512).model_copy(update={"kv_capacity_tokens": kv, "step": STEP})
    columns = {"prompt_tokens": np.full(len(lengths), prompt), "output_tokens": lengths}
    queued = simulate(Trace.from_arrays(np.zeros(len(lengths)), **columns), engine, 1, clients)
    sent_s = np.concatenate([np.zeros(clients), np.sort(queued.finish_s)])[: len(lengths)]
    arriving = simulate(Trace.from_arrays(sent_s, **columns), engine, 1)
    np.testing.assert_allclose(arriving.first_token_s, queued.first_token_s, rtol=1e-9)
    found = ClosedLoops([prompt], [output], [clients], [protocol], 512).run(STEP.seconds, kv)
    assert found.ttft_mean_s == pytest.approx(np.mean(queued.first_token_s - sent_s))


def test_a_client_that_always_waits_adds_a_place_in_the_queue():
    loops = [
        ClosedLoops([100], [50], [4], [LoadProtocol(requests_per_client=10, waiting=waiting)], 2048)
        for waiting in (0, 1)
    ]
    without, with_one = (loop.run(STEP.seconds, 10_000) for loop in loops)
    assert with_one.ttft_mean_s > without.ttft_mean_s
    assert with_one.tpot_mean_s == without.tpot_mean_s


def test_a_steady_start_leaves_the_first_wave_out():
    burst, steady = (
        ClosedLoops([1000], [100], [16], [LoadProtocol(requests_per_client=4, start=start)], 2048)
        for start in ("burst", "steady")
    )
    assert steady.run(STEP.seconds, 100_000).ttft_mean_s < burst.run(STEP.seconds, 100_000).ttft_mean_s


def test_runs_can_be_repeated_with_other_coefficients():
    loops = ClosedLoops([100, 200], [50, 20], [4, 8], [LoadProtocol()] * 2, 2048)
    first = loops.run(STEP.seconds, 10_000)
    slower = loops.run([2 * value for value in STEP.seconds], 10_000)
    again = loops.run(STEP.seconds, 10_000)
    np.testing.assert_array_equal(first.tpot_mean_s, again.tpot_mean_s)
    np.testing.assert_allclose(slower.tpot_mean_s, 2 * first.tpot_mean_s)


def test_output_lengths_stay_within_their_spread():
    lengths = loop_lengths(LoadProtocol(requests_per_client=50, length_spread=0.25), 100, 20)
    assert lengths.shape == (1000,)
    assert lengths.min() >= 75
    assert lengths.max() <= 125
    assert abs(lengths.mean() - 100) < 2
    np.testing.assert_array_equal(
        lengths, loop_lengths(LoadProtocol(requests_per_client=50, length_spread=0.25), 100, 20)
    )


def test_a_run_ends_at_its_max_requests_but_serves_every_client():
    assert len(loop_lengths(LoadProtocol(requests_per_client=20, max_requests=100), 50, 8)) == 100
    assert len(loop_lengths(LoadProtocol(requests_per_client=20, max_requests=100), 50, 4)) == 80
    assert len(loop_lengths(LoadProtocol(requests_per_client=20, max_requests=100), 50, 128)) == 128


def test_a_prefix_in_the_cache_is_not_computed_again():
    a, b, _, _, e = STEP.seconds
    protocol = LoadProtocol(requests_per_client=3, cached_share=0.75)
    found = ClosedLoops([400], [40], [1], [protocol], 2048).run(STEP.seconds, 10_000)
    assert found.ttft_mean_s == pytest.approx(a + 100 * (b + e * (300 + 100 / 2)))


def test_a_request_that_can_never_fit_is_refused():
    with pytest.raises(ValueError, match="150 tokens can never fit a KV cache of 149 tokens"):
        ClosedLoops([100], [50], [1], [LoadProtocol()], 2048).run(STEP.seconds, 149)
