import numpy as np
import polars as pl
import pytest

from envs.traffic.trace import Trace, TraceError
from policies.engine import ConfigError
from policies.spec import find_engine, shipped_configs
from training.replaying.fixed_fleet import simulate


@pytest.fixture
def engine():
    profile = find_engine("llama-3.1-8b-h100", shipped_configs())
    step = profile.step.model_copy(
        update={
            "a_ms": 10.0,
            "b_us_per_prefill_token": 100.0,
            "c_us_per_seq": 0.0,
            "d_us_per_1k_kv_tokens": 0.0,
            "e_ns_per_prefill_token2": 0.0,
        }
    )
    return profile.model_copy(update={"step": step, "kv_capacity_tokens": 1000})


def test_latencies_of_one_request_by_hand(engine):
    # Prefill of 100 tokens: 10 ms + 100 * 0.1 ms; then 4 decodes of 10 ms.
    replay = simulate(Trace.from_arrays([3.0], [100], [5]), engine, 1)
    assert replay.ttft_s == pytest.approx([0.020], abs=1e-9)
    assert replay.tpot_s == pytest.approx([0.010], abs=1e-9)
    assert replay.finish_s == pytest.approx([3.060], abs=1e-9)


def test_a_batch_cap_of_one_serves_one_after_the_other(engine):
    replay = simulate(Trace.from_arrays([0.0, 0.0], [100, 100], [5, 1]), engine, 1, batch_cap=1)
    assert replay.finish_s == pytest.approx([0.060, 0.080], abs=1e-9)
    assert replay.ttft_s == pytest.approx([0.020, 0.080], abs=1e-9)
    assert np.isnan(replay.tpot_s[1])


def test_there_is_no_cold_start(engine):
    replay = simulate(Trace.from_arrays([0.0, 0.0], [100, 100], [5, 5]), engine, 2, batch_cap=1)
    assert replay.finish_s == pytest.approx([0.060, 0.060], abs=1e-9)


def test_a_request_that_cannot_fit_is_rejected_and_counts_as_a_miss(engine, tmp_path):
    replay = simulate(Trace.from_arrays([0.0, 1.0, 2.0], [100, 2000, 100], [5, 5, 1]), engine, 1)
    summary = replay.summary(ttft_s=1.0, tpot_s=1.0)
    assert (summary["finished"], summary["rejected"], summary["output_tokens"]) == (2, 1, 6)
    assert summary["ttft_attainment"] == summary["tpot_attainment"] == summary["attainment"] == pytest.approx(2 / 3)
    replay.write_requests(tmp_path / "requests.parquet")
    rows = pl.read_parquet(tmp_path / "requests.parquet")
    assert rows.columns == ["arrival_s", "prompt_tokens", "output_tokens", "ttft_s", "tpot_s", "finish_s"]
    assert rows["ttft_s"].is_null().to_list() == [False, True, False]
    assert rows["tpot_s"].is_null().to_list() == [False, True, True]
    assert rows["finish_s"].null_count() == 1


def test_an_overloaded_fleet_is_run_until_the_last_request(engine):
    replay = simulate(Trace.from_arrays(np.zeros(500), np.full(500, 400), np.full(500, 400)), engine, 1, batch_cap=2)
    assert replay.summary()["finished"] == 500
    assert replay.finish_s.max() > 900.0


@pytest.mark.parametrize(
    ("replicas", "cap", "field"), [(0, 8, "replicas"), (1001, 8, "replicas"), (1, 9999, "batch cap")]
)
def test_counts_out_of_range_are_refused(engine, replicas, cap, field):
    with pytest.raises(ConfigError, match=field):
        simulate(Trace.from_arrays([0.0], [1], [1]), engine, replicas, cap)


def test_an_empty_trace_is_refused(engine):
    with pytest.raises(TraceError, match="no request"):
        simulate(Trace.from_arrays([], [], []), engine, 1)
