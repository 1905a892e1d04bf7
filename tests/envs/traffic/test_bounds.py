"""Logs on other clocks are read right or refused, and no file fills the memory."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import call

from envs.traffic.formats import import_trace
from envs.traffic.scaling import scale
from envs.traffic.summary import counts, dispersion, empty_share, peak_to_mean, summarize
from envs.traffic.trace import Trace, TraceError
from envs.traffic.trace_files import TraceLimits, load_trace, write_trace

MAP = {"arrival_s": "time", "prompt_tokens": "in", "output_tokens": "out"}
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
UNIX_S = 1_772_445_600
OFFSETS_MS = (0, 500, 1000, 2000)


def table(arrivals: Any, **columns: Any) -> pa.Table:
    count = len(arrivals)
    return pa.table({"arrival_s": arrivals, "prompt_tokens": [5] * count, "output_tokens": [3] * count, **columns})


def times(unit: str) -> list[int]:
    return [(UNIX_S * 1000 + offset) * UNITS[unit] // 1000 for offset in OFFSETS_MS]


@pytest.mark.parametrize("unit", list(UNITS)[1:])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_units_of_the_unix_clock_are_told_by_their_size(tmp_path: Path, unit: str, kind: str) -> None:
    path = tmp_path / "log"
    if kind == "csv":
        path.write_text("time,in,out\n" + "".join(f"{time},5,3\n" for time in times(unit)))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"time": time, "in": 5, "out": 3}) + "\n" for time in times(unit)))
    else:
        pq.write_table(table(times(unit)), path)
    result = import_trace(path, None if kind == "parquet" else MAP)
    assert result.trace.arrival_s == pytest.approx([0.0, 0.5, 1.0, 2.0], abs=1e-6)
    assert result.notes == (f"arrivals are {unit} of the Unix clock and were counted from the first one",)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["sorted", "reversed"])
def test_unix_seconds_in_parquet_are_counted_from_the_first_as_in_text(tmp_path: Path, order: slice) -> None:
    arrivals = (np.array(OFFSETS_MS) / 1000 + UNIX_S)[order]
    pq.write_table(table(arrivals), tmp_path / "epoch.parquet")
    (tmp_path / "epoch.csv").write_text("time,in,out\n" + "".join(f"{time!r},5,3\n" for time in arrivals.tolist()))
    result, text = import_trace(tmp_path / "epoch.parquet"), import_trace(tmp_path / "epoch.csv", MAP)
    assert result.trace.arrival_s.tolist() == text.trace.arrival_s.tolist() == [0.0, 0.5, 1.0, 2.0]
    assert "arrivals are seconds of the Unix clock" in result.notes[0]
    with pytest.raises(TraceError, match=r"epoch\.parquet: .*(got seconds of the Unix|rows sorted by)"):
        load_trace(tmp_path / "epoch.parquet")


@pytest.mark.parametrize("other", [12.0, UNIX_S * 1000.0, 1e30])
def test_clocks_and_units_are_not_mixed(tmp_path: Path, other: float) -> None:
    (tmp_path / "log").write_text(f"time,in,out\n{UNIX_S},5,3\n{other!r},5,3\n")
    with pytest.raises(TraceError, match=r"log: field 'time': arrivals lie between .*expected all on one clock"):
        import_trace(tmp_path / "log", MAP)
    pq.write_table(table([UNIX_S * 1.0, other]), tmp_path / "log")
    with pytest.raises(TraceError, match=r"log: field arrival_s: arrivals lie between .*expected all on one clock"):
        import_trace(tmp_path / "log")


def test_times_that_their_number_type_has_rounded_are_refused(tmp_path: Path) -> None:
    pq.write_table(table(np.float32(UNIX_S) + np.arange(4, dtype=np.float32)), tmp_path / "log")
    with pytest.raises(TraceError, match=r"32-bit floats of 1\.77245e\+09 are 128 apart"):
        import_trace(tmp_path / "log")
    pq.write_table(table(np.arange(4, dtype=np.float32) + 90_000), tmp_path / "log")
    assert len(import_trace(tmp_path / "log").trace) == 4


def test_a_sparse_trace_of_years_takes_memory_by_its_requests() -> None:
    arrivals = np.sort(np.random.default_rng(0).uniform(0, 9e7, 1000))
    trace = Trace.from_arrays(arrivals, np.full(1000, 5), np.full(1000, 3))
    tracemalloc.start()
    summary = summarize(trace)
    scaled = scale(trace, 2.5, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert summary.dispersion[1.0] == pytest.approx(1.0, abs=1e-3)
    assert len(scaled) == 2500
    assert peak < 2e6
    with pytest.raises(TraceError, match="windows of 1 s, expected at most"):
        counts(trace, 1.0)
    with pytest.raises(TraceError, match="is more than 100000000"):
        scale(trace, 1e9, seed=0)


def test_statistics_of_occupied_windows_are_those_of_all_windows() -> None:
    arrivals = np.sort(np.random.default_rng(1).exponential(1.0, 500).cumsum() * 3)
    trace = Trace.from_arrays(arrivals, np.full(500, 5), np.full(500, 3), duration_s=2000.0)
    for window_s in (0.7, 10.0, 60.0):
        dense = counts(trace, window_s)
        assert dispersion(trace, window_s) == pytest.approx(dense.var() / dense.mean())
        assert peak_to_mean(trace, window_s) == pytest.approx(dense.max() / dense.mean())
        assert empty_share(trace, window_s) == pytest.approx((dense == 0).mean())


def test_an_archive_of_one_endless_line_is_read_no_further_than_a_line_goes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(128):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(TraceError, match=r"bomb\.csv\.gz: line 1: longer than 16777216 characters"):
        import_trace(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * 2**20  # of 128 MiB


@pytest.mark.parametrize(
    ("line", "limits", "why"),
    [
        ("1,5,3\n", TraceLimits(rows=1000), "line 1002: more than 1000 requests"),
        ("\n", TraceLimits(size=5000), "unpacks to more than 5000 bytes"),
        ("x,y,z\n", TraceLimits(rows=1000), "line 1002: more than 1000 requests"),
    ],
)
def test_an_archive_of_more_rows_than_are_allowed_is_refused(
    tmp_path: Path, line: str, limits: TraceLimits, why: str
) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(("time,in,out\n" + line * 10_000).encode()))
    with pytest.raises(TraceError, match=why):
        import_trace(path, MAP, skip_bad=True, limits=limits)


def test_blocks_of_prompts_count_as_rows(tmp_path: Path) -> None:
    record = {"timestamp": 0, "input_length": 9, "output_length": 1, "hash_ids": [1] * 600}
    (tmp_path / "log").write_text((json.dumps(record) + "\n") * 3)
    with pytest.raises(TraceError, match="more than 1000 requests, or blocks of prompts"):
        import_trace(tmp_path / "log", limits=TraceLimits(rows=1000))


def test_parquet_is_refused_by_what_it_would_hold_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(table(np.zeros(5_000_000)), path)
    assert path.stat().st_size < 200_000
    with pytest.raises(TraceError, match=r"holds 5000000 requests .* raise --max-rows"):
        import_trace(path, limits=TraceLimits(rows=1000))
    pq.write_table(table(np.random.default_rng(0).random(1000).cumsum()), path)
    with pytest.raises(TraceError, match="bytes, expected at most 1000 in 2000"):
        import_trace(path, limits=TraceLimits(rows=1000, size=2000))


@pytest.mark.parametrize("columns", [{}, {"session_id": np.ones(1_000_000, np.int64), "tenant": ["x"] * 1_000_000}])
def test_parquet_is_refused_by_the_memory_that_it_takes_before_it_is_read(
    tmp_path: Path, columns: dict[str, Any]
) -> None:
    path = tmp_path / "bomb.parquet"
    pq.write_table(table(np.zeros(1_000_000), **columns), path, compression="zstd")
    assert path.stat().st_size < 50_000
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    trace = load_trace(path)
    took = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert len(trace) == 1_000_000
    with pytest.raises(
        TraceError, match=r"holds 1000000 requests, which take 0\.1 GiB of memory .* half of what there is"
    ):
        load_trace(path, TraceLimits(memory=took))


def test_the_memory_for_a_trace_is_half_of_what_the_process_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory.max").write_text("4096\n")
    monkeypatch.setattr("envs.traffic.trace_files.CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "none"))
    assert TraceLimits().memory == 2048
    (tmp_path / "memory.max").write_text("max\n")
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert TraceLimits().memory == machine // 2
    monkeypatch.setattr("resource.getrlimit", lambda _: (10_000, -1))
    assert TraceLimits().memory == 5000


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("session_id", ["y" * 1000] * 100_000, "numbers"),
        ("think_time_s", ["y" * 1000] * 100_000, "numbers"),
        ("tenant", [["y"] * 3] * 100_000, "text"),
        ("tenant", [b"y" * 1000] * 100_000, "text"),
    ],
)
def test_a_column_whose_values_can_have_any_length_is_never_written_out(
    tmp_path: Path, name: str, values: list[Any], expected: str
) -> None:
    pq.write_table(table(np.zeros(100_000), **{name: values}), tmp_path / "bomb.parquet")
    before = pa.total_allocated_bytes()
    with pytest.raises(TraceError, match=rf"field {name}: expected {expected}, got"):
        import_trace(tmp_path / "bomb.parquet")
    assert pa.total_allocated_bytes() - before < 10e6


def test_memory_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Trace) -> None:
        raise MemoryError

    pq.write_table(table([0.0, 1.0]), tmp_path / "trace.parquet")
    monkeypatch.setattr("envs.traffic.summary.summarize", full)
    refused = call("trace", "info", tmp_path / "trace.parquet")
    assert (refused.exit_code, refused.stderr) == (2, "error: the trace needs more memory than there is\n")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_names_of_parquet_are_never_written_out(tmp_path: Path, kind: pa.DataType) -> None:
    path, count = tmp_path / "names.parquet", 100_000
    names = pa.array(["x" * 900, None] * (count // 2)).cast(kind)
    pq.write_table(table(np.zeros(count), tenant=names, unread=["y"] * count), path)
    before = pa.total_allocated_bytes()
    trace = import_trace(path).trace
    assert trace.tenants == ("x" * 900,)
    assert trace.tenant[:3].tolist() == [0, -1, 0]
    assert pa.total_allocated_bytes() - before < 20e6  # 45 MB written out
    pq.write_table(table([0.0], tenant=["x" * 1001]), path)
    with pytest.raises(TraceError, match="field tenant: a name of 1001 characters"):
        import_trace(path)


def test_a_name_that_is_a_page_is_no_name(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(f"time,in,out,who\n1,5,3,{'x' * 1001}\n")
    with pytest.raises(TraceError, match="line 2: field 'who': expected a name of at most 1000 characters, got 1001"):
        import_trace(tmp_path / "log", {**MAP, "tenant": "who"})


def test_the_limits_and_notes_are_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("time,in,out\n" + "".join(f"{time},5,3\n" for time in times("milliseconds")))
    words = ("trace", "import", str(tmp_path / "log.csv"), "--map", "arrival_s=time,prompt_tokens=in,output_tokens=out")
    refused = call(*words, "--out", str(tmp_path / "a.parquet"), "--max-rows", "3")
    assert (refused.exit_code, "more than 3 requests" in refused.stderr) == (2, True)
    done = call(*words, "--out", str(tmp_path / "a.parquet"))
    assert done.exit_code == 0
    assert "note: arrivals are milliseconds of the Unix clock" in done.stderr
    assert load_trace(tmp_path / "a.parquet").duration_s == pytest.approx(2.0)


def test_a_name_with_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    write_trace(Trace.from_arrays([0.0], [5], [3], name="[red]x\x1b[2J"), tmp_path / "a.parquet")
    shown = call("trace", "info", str(tmp_path / "a.parquet")).stdout
    assert "[red]x\\x1b[2J" in shown
