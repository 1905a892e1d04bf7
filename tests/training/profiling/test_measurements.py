import numpy as np
import pytest

from envs.cluster.closed_loop import LoadProtocol
from policies.engine import ConfigError
from training.profiling.measurements import Limits, LoopLatencyTable, StepTimes, read_measurements

LIMITS = Limits(kv_capacity_tokens=100_000, max_num_batched_tokens=2048)
LOOPS = "isl,osl,silicon_concurrency,batch_size,silicon_ttft_ms,silicon_tpot_ms\n"

SWEPT = "prompt_tokens,output_tokens,concurrency,ttft_ms,tpot_ms,requests_per_client,length_spread\n"


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
        (LOOPS + "64,8,1,1,-5,8\n", "line 2: silicon_ttft_ms: expected a number of milliseconds above 0.*, got -5"),
        (LOOPS + "64,8,1,1,5,0\n", "line 2: silicon_tpot_ms: expected a number of milliseconds above 0.*, got 0"),
        (LOOPS + "64,8,1,1,5,8\n64,x,1,1,5,8\n", "line 3: osl: expected a number, got 'x'"),
        (LOOPS + "64,8,1,1,,8\n", "line 2: silicon_ttft_ms is blank, expected a number"),
        (LOOPS + "64,8,1,1,nan,8\n", "line 2: silicon_ttft_ms: expected a number of milliseconds above 0.*, got nan"),
        (LOOPS + "64,8,1,1,inf,8\n", "line 2: silicon_ttft_ms: expected a number of milliseconds above 0.*, got inf"),
        (LOOPS + "0.4,8,1,1,5,8\n", "line 2: isl: expected a number from 1 to a billion, got 0.4"),
        (LOOPS + "64,8,1e9,1,5,8\n", "line 2: silicon_concurrency: expected a number from 1 to 65,536, got 1e9"),
        (LOOPS + "64,8,1,1,5\n", "line 2: silicon_tpot_ms is blank, expected a number"),
        (LOOPS + "64,8,1,1,5,8,5\n", "line 2: has more cells than the header has columns"),
        (LOOPS + '64,8,1,1,"5,5",8\n', "line 2: silicon_ttft_ms: expected a number, got '5,5'"),
        (SWEPT + "64,8,1,5,8,2000,0\n", "line 2: requests_per_client: expected a number from 1 to 1,000, got 2000"),
        (SWEPT + "64,8,1,5,8,4,1\n", "line 2: length_spread: expected a share from 0 to 0.9, got 1"),
        ("", "is empty, expected a CSV with a header"),
        ("a,b\n1,2\n", r"neither step times \(column step_ms\) nor closed loops .* commas; columns: a, b"),
        ("step_ms,step_ms\n1,2\n", "column 'step_ms' stands twice in the header"),
        (LOOPS, "no row below the header"),
        (LOOPS + "99000,2000,1,1,5,8\n", "line 2: a request of 101,000 tokens can never fit"),
        (
            "prefill_tokens,decode_batch,context,t_ms\n-1,1,1,1\n",
            "line 2: prefill_tokens: expected a number from 0 to a billion, got -1",
        ),
    ],
)
def test_a_bad_table_is_refused_in_a_sentence(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        read_measurements(written(tmp_path, text), LIMITS)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.csv: no such file"):
        read_measurements(tmp_path / "nothing.csv", LIMITS)


@pytest.mark.parametrize("content", [LOOPS.encode("utf-16"), bytes(range(256)), b"step_ms\n\xe9\n"])
def test_a_file_that_is_no_text_is_named(tmp_path, content):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=r"rows\.csv: cannot be read as CSV: is no UTF-8 text"):
        read_measurements(tmp_path / "rows.csv", LIMITS)


def test_a_folder_is_no_table(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read as CSV: Is a directory$"):
        read_measurements(tmp_path, LIMITS)


def test_files_of_other_systems_are_read_alike(tmp_path):
    text = "isl, osl, concurrency, ttft_ms, tpot_ms\r\n1024, 128, 8, 190.5, 7.9\r\n"
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = read_measurements(tmp_path / "rows.csv", LIMITS)
    assert isinstance(table, LoopLatencyTable)
    assert (table.prompt_tokens.tolist(), table.concurrency.tolist()) == ([1024], [8])
