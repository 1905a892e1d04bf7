import numpy as np
import pytest

from envs.closed_loop import LoadProtocol
from policies.engine import ConfigError
from training.measurements import Limits, LoopLatencyTable, StepTimes, read_measurements

LIMITS = Limits(kv_capacity_tokens=100_000, max_num_batched_tokens=2048)
LOOPS = "isl,osl,silicon_concurrency,batch_size,silicon_ttft_ms,silicon_tpot_ms\n"


def written(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return path


def test_published_columns_are_understood(tmp_path):
    table = read_measurements(written(tmp_path, LOOPS + "1024,128,8.0,8,190.5,7.9\n2048,128,,16,200,8\n"), LIMITS)
    assert isinstance(table, LoopLatencyTable)
    assert table.prompt_tokens.tolist() == [1024, 2048]
    assert table.concurrency.tolist() == [8, 16]
    assert table.protocols is None
    np.testing.assert_allclose(table.measured["ttft"], [0.1905, 0.2])
    np.testing.assert_allclose(table.measured["tpot"], [0.0079, 0.008])


def test_a_sweep_says_how_it_was_run(tmp_path):
    header = "prompt_tokens,output_tokens,concurrency,requests_per_client,length_spread,ttft_ms,ttft_p90_ms,tpot_ms\n"
    table = read_measurements(written(tmp_path, header + "64,32,4,6,0.25,20,30,5\n"), LIMITS)
    assert isinstance(table, LoopLatencyTable)
    assert table.protocols == (LoadProtocol(requests_per_client=6, length_spread=0.25),)
    assert set(table.measured) == {"tpot", "ttft", "ttft_p90"}


def test_step_times_become_a_design(tmp_path):
    text = "num_prefill,prefill_tokens,prefill_kv,decode_batch,context,t_ms\n2,200,50,3,10,7.5\n"
    table = read_measurements(written(tmp_path, text), LIMITS)
    assert isinstance(table, StepTimes)
    np.testing.assert_allclose(table.design, [[1, 200, 3, 30, 200 * (50 + 50)]])
    np.testing.assert_allclose(table.measured["step"], [0.0075])


def test_rows_of_one_engine_can_be_chosen(tmp_path):
    path = written(tmp_path, "tp_size," + LOOPS + "1.0,64,8,1,1,9,8\n2.0,64,8,1,1,9,4\n")
    with pytest.raises(ConfigError, match=r"tp_size: rows of several engines .*--where tp_size=VALUE"):
        read_measurements(path, LIMITS)
    table = read_measurements(path, LIMITS, {"tp_size": "2"})
    np.testing.assert_allclose(table.measured["tpot"], [0.004])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("isl,osl,concurrency,tpot_ms\n1,2,3,4\n", "missing column ttft_ms or silicon_ttft_ms"),
        (LOOPS + "64,8,1,1,-5,8\n", "line 2: silicon_ttft_ms: expected a number above 0, got -5"),
        (LOOPS + "64,8,1,1,5,0\n", "line 2: silicon_tpot_ms: expected a number above 0, got 0"),
        (LOOPS + "64,8,1,1,5,8\n64,x,1,1,5,8\n", "line 3: osl: expected a number, got 'x'"),
        (LOOPS + "64,8,1,1,,8\n", "line 2: silicon_ttft_ms is blank, expected a number"),
        (LOOPS + "64,8,1,1,nan,8\n", "line 2: silicon_ttft_ms: expected a number above 0, got nan"),
        (LOOPS, "no row"),
        (LOOPS + "99000,2000,1,1,5,8\n", "line 2: a request of 101,000 tokens can never fit"),
        (
            "prefill_tokens,decode_batch,context,t_ms\n-1,1,1,1\n",
            "line 2: prefill_tokens: expected a number of at least 0",
        ),
    ],
)
def test_a_bad_table_is_refused_in_a_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_measurements(written(tmp_path, text), LIMITS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.csv: no such file"):
        read_measurements(tmp_path / "nothing.csv", LIMITS)
