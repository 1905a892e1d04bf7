from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.traffic.scaling import regenerate_from_rates, scale, spread_ticks, superpose, thin
from envs.traffic.summary import counts, dispersion, empty_share, iat_cv, peak_to_mean, summarize
from envs.traffic.trace import Trace, TraceError, merge
from envs.traffic.trace_files import load_trace, write_trace

MEASURED = Path(__file__).parents[4] / "shared" / "traces"
needs_measured = pytest.mark.skipif(not MEASURED.is_dir(), reason="measured traces are not here")


@st.composite
def traces(draw, min_size=0):
    gaps_s = draw(st.lists(st.floats(0, 1e3, allow_subnormal=False), min_size=min_size, max_size=40))
    size = len(gaps_s)

    def column(low, high):
        return np.array(draw(st.lists(st.integers(low, high), min_size=size, max_size=size)), np.int32)

    prompt = column(1, 10_000)
    return Trace.from_arrays(
        np.cumsum(gaps_s),
        prompt,
        column(1, 1_000),
        prefix_hit_tokens=np.minimum(column(0, 10_000), prompt),
        session_id=column(-1, 5),
        tenant=column(-1, 2),
        tenants=("a", "b", "ü"),
        model=column(-1, 1),
        models=("m1", "c001*"),
        name=draw(st.text(max_size=5)),
        duration_s=float(sum(gaps_s)) * 1.01 + draw(st.floats(1, 100)),
    )


def poisson(requests=5_000, rps=5.0, seed=0, **columns):
    rng = np.random.default_rng(seed)
    arrival_s = np.cumsum(rng.exponential(1 / rps, requests))
    lengths = rng.integers(1, 1_000, (2, requests))
    return Trace.from_arrays(arrival_s, lengths[0], lengths[1], name="poisson", **columns)


def rows(trace):
    """Requests as a sorted list, for comparing contents."""
    return sorted(zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), trace.tenant.tolist(), strict=True))


def test_absent_columns_become_zero_hits_and_no_ids():
    trace = Trace.from_arrays([0.0, 1.5], [10, 20], [1, 2])
    assert trace.prefix_hit_tokens.tolist() == [0, 0]
    assert trace.session_id.tolist() == trace.tenant.tolist() == trace.model.tolist() == [-1, -1]
    assert (len(trace), trace.duration_s, trace.arrival_s.dtype, trace.prompt_tokens.dtype) == (2, 1.5, "f8", "i4")


def test_an_empty_trace_is_allowed():
    trace = Trace.from_arrays([], [], [])
    assert (len(trace), trace.duration_s, trace.mean_rps) == (0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"arrival_s": [0, 2, 1]}, "row 3: field arrival_s: expected rows sorted by arrival_s, got 1.0"),
        ({"arrival_s": [-1, 0, 1]}, "row 1: field arrival_s: expected at least 0, got -1.0"),
        ({"arrival_s": [0, float("nan"), 1]}, "row 2: field arrival_s: expected a finite number of seconds, got nan"),
        ({"arrival_s": [[0, 1, 2]]}, "field arrival_s: expected a one-dimensional array, got shape (1, 3)"),
        ({"prompt_tokens": [1, 0, 1]}, "row 2: field prompt_tokens: expected at least 1, got 0"),
        ({"prompt_tokens": [1, 2**31, 1]}, "row 2: field prompt_tokens: expected a whole number of at most 2147483647"),
        ({"prompt_tokens": [1, 1.5, 1]}, "row 2: field prompt_tokens: expected a whole number"),
        ({"prompt_tokens": ["1", "2", "3"]}, "field prompt_tokens: expected numbers"),
        ({"output_tokens": [1, 1, -5]}, "row 3: field output_tokens: expected at least 1, got -5"),
        ({"output_tokens": [1, 1]}, "field output_tokens: expected 3 values, as in arrival_s, got 2"),
        ({"prefix_hit_tokens": [0, 99, 0]}, "row 2: field prefix_hit_tokens: expected between 0 and prompt_tokens"),
        ({"session_id": [0, -2, 0]}, "row 2: field session_id: expected at least -1, got -2"),
        ({"tenant": [0, 1, -1], "tenants": ["a"]}, "row 2: field tenant: expected -1 or a code below 1"),
        ({"model": [0, 0, 0], "models": ["a", "a"]}, "field models: expected distinct names"),
        ({"duration_s": 1.0}, "field duration_s: expected at least the last arrival, 2.0 s, got 1.0"),
    ],
)
def test_a_broken_rule_is_named_with_its_row_and_field(columns, sentence):
    good = {"arrival_s": [0, 1, 2], "prompt_tokens": [5, 5, 5], "output_tokens": [1, 1, 1]}
    with pytest.raises(TraceError) as error:
        Trace.from_arrays(**(good | columns), name="t")
    assert str(error.value).startswith("trace 't': ")
    assert sentence in str(error.value)


@settings(max_examples=25, deadline=None)
@given(trace=traces())
def test_a_written_trace_reads_back_the_same(trace, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    write_trace(trace, path)
    read = load_trace(path)
    assert read.digest() == trace.digest()
    assert (read.name, read.duration_s) == (trace.name, trace.duration_s)
    assert (read.tenants, read.models) == (trace.tenants, trace.models)
    assert list(path.parent.iterdir()) == [path], "no partial file stays behind"


def test_the_digest_depends_on_every_column_but_not_on_the_name():
    trace = poisson(10, model=np.zeros(10), models=("m",), tenants=("t",))
    changes = [
        {"arrival_s": trace.arrival_s + 0.5, "duration_s": trace.duration_s + 0.5},
        {"duration_s": trace.duration_s + 1},
        *({field: getattr(trace, field) + 1} for field in ("prompt_tokens", "output_tokens", "prefix_hit_tokens")),
        *({field: getattr(trace, field) + 1} for field in ("session_id", "tenant")),
        {"models": ("other",)},
    ]
    digests = {replace(trace, **change).digest() for change in changes}
    assert len(digests | {trace.digest()}) == len(changes) + 1
    assert replace(trace, name="other").digest() == trace.digest()


def test_the_digest_is_stable_across_releases():
    trace = Trace.from_arrays([0.0, 1.5], [10, 20], [1, 2], tenant=[0, -1], tenants=["a"])
    assert trace.digest() == "6255a663c0273c9c3ec1db7912eb6ff01900ed6e342db8d127872073de98d44d"


def test_an_altered_file_is_refused(tmp_path):
    path = tmp_path / "trace.parquet"
    write_trace(poisson(10), path)
    table = pq.read_table(path)
    longer = table.set_column(1, "prompt_tokens", [np.full(10, 7, np.int32)])
    pq.write_table(longer.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(TraceError, match="do not match the digest"):
        load_trace(path)


def test_files_that_are_not_canonical_are_named(tmp_path):
    with pytest.raises(TraceError, match=r"none\.parquet: no such file"):
        load_trace(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(TraceError, match=r"text\.parquet: cannot be read as Parquet"):
        load_trace(tmp_path / "text.parquet")
    pl.DataFrame({"arrival_s": [0.0], "prompt_tokens": [1]}).write_parquet(tmp_path / "short.parquet")
    with pytest.raises(TraceError, match=r"short\.parquet: expected columns .* but output_tokens is missing"):
        load_trace(tmp_path / "short.parquet")
    columns = {"arrival_s": [0.0, None], "prompt_tokens": [1, 1], "output_tokens": [1, 1]}
    pl.DataFrame(columns).write_parquet(tmp_path / "null.parquet")
    with pytest.raises(TraceError, match=r"null\.parquet: row 2: field arrival_s: expected a number, got nothing"):
        load_trace(tmp_path / "null.parquet")


def test_writing_to_a_missing_folder_is_a_trace_error(tmp_path):
    with pytest.raises(TraceError, match="cannot be written"):
        write_trace(poisson(10), tmp_path / "none" / "trace.parquet")


def test_a_slice_starts_at_zero_and_keeps_its_idle_edges():
    trace = Trace.from_arrays([0, 10, 20, 30], [1, 2, 3, 4], [1, 1, 1, 1])
    part = trace.slice(5, 25)
    assert (part.arrival_s.tolist(), part.prompt_tokens.tolist(), part.duration_s) == ([5, 15], [2, 3], 20)
    assert trace.slice(20, 1e9).prompt_tokens.tolist() == [3, 4]
    with pytest.raises(TraceError, match="slice needs"):
        trace.slice(5, 5)
    with pytest.raises(TraceError, match="past the end"):
        trace.slice(30, 40)


def test_a_split_cuts_by_time_and_loses_no_request():
    trace = poisson()
    train, validation, test = trace.split()
    assert [part.duration_s / trace.duration_s for part in (train, validation, test)] == pytest.approx([0.6, 0.2, 0.2])
    joined = np.concatenate([part.prompt_tokens for part in (train, validation, test)])
    assert np.array_equal(joined, trace.prompt_tokens)
    with pytest.raises(TraceError, match="split needs"):
        trace.split(0.9, 0.1)


def test_merging_overlays_and_keeps_sessions_apart():
    first = Trace.from_arrays([0, 2], [1, 2], [1, 1], session_id=[0, 4], tenant=[0, 1], tenants=["a", "b"])
    second = Trace.from_arrays([1, 3], [3, 4], [1, 1], session_id=[0, -1], tenant=[-1, 0], tenants=["b"])
    both = merge([first, second], name="both")
    assert both.prompt_tokens.tolist() == [1, 3, 2, 4]
    assert both.session_id.tolist() == [0, 5, 4, -1]
    assert [both.tenants[code] if code >= 0 else None for code in both.tenant] == ["a", None, "b", "b"]
    with pytest.raises(TraceError, match="at least one trace"):
        merge([])


@settings(max_examples=40, deadline=None)
@given(trace=traces(min_size=1), copies=st.integers(1, 4), seed=st.integers(0, 99))
def test_superposing_repeats_every_request_and_mixes_no_session(trace, copies, seed):
    trace = replace(trace, duration_s=trace.duration_s + 2_000)
    many = superpose(trace, copies, seed)
    assert rows(many) == sorted(rows(trace) * copies)
    assert many.duration_s == trace.duration_s
    assert many.digest() == superpose(trace, copies, seed).digest()
    # A session may be cut in two where it wraps around, never joined to another.
    sizes = np.bincount(many.session_id[many.session_id >= 0], minlength=1)
    assert sizes.max() <= np.bincount(trace.session_id[trace.session_id >= 0], minlength=1).max()


def test_superposed_copies_lie_apart_and_keep_their_gaps():
    trace = Trace.from_arrays([100, 101], [1, 1], [1, 1], duration_s=7_200)
    many = superpose(trace, 5, seed=1)
    firsts = np.sort(many.arrival_s)[::2]
    assert np.diff(firsts).min() >= 300
    assert np.allclose(np.sort(many.arrival_s)[1::2] - firsts, 1.0)
    with pytest.raises(TraceError, match="30 copies shifted by at least 300"):
        superpose(trace, 30, seed=1)


@settings(max_examples=60, deadline=None)
@given(
    trace=traces(),
    keep=st.floats(0.01, 1),
    seed=st.integers(0, 99),
    by=st.sampled_from(["session", "tenant", "request"]),
)
def test_thinning_keeps_whole_groups_and_no_more_than_asked(trace, keep, seed, by):
    groups = {"session": trace.session_id, "tenant": trace.tenant, "request": np.arange(len(trace))}[by]
    if by == "tenant" and not (groups >= 0).any():
        groups = trace.model
    if len(trace) and not (groups >= 0).any():
        with pytest.raises(TraceError, match=f"has no {by} to thin by"):
            thin(trace, keep, seed, by)
        return
    kept = thin(trace, keep, seed, by)
    assert len(kept) <= round(keep * len(trace))
    assert kept.duration_s == trace.duration_s
    assert set(kept.arrival_s) <= set(trace.arrival_s)
    if by == "session":
        for session in set(kept.session_id.tolist()) - {-1}:
            assert (kept.session_id == session).sum() == (trace.session_id == session).sum()
    if by == "request":
        assert len(kept) == round(keep * len(trace))


def test_thinning_by_tenant_falls_back_to_the_model():
    model = np.repeat(np.arange(50, dtype=np.int32), 100)
    trace = poisson(5_000, model=model, models=tuple(f"c{code:03d}" for code in range(50)))
    kept = thin(trace, 0.3, seed=0, by="tenant")
    assert sorted(np.bincount(kept.model, minlength=50)) == [0] * 35 + [100] * 15


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.7, 4.0])
def test_scaling_reaches_the_rate_without_changing_the_duration(factor):
    trace = poisson()
    scaled = scale(trace, factor, seed=3)
    assert scaled.mean_rps == pytest.approx(factor * trace.mean_rps, rel=0.01)
    assert scaled.duration_s == trace.duration_s


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_scaling_by_no_positive_number_is_refused(factor):
    with pytest.raises(TraceError, match="factor above 0"):
        scale(poisson(10), factor, seed=0)


def test_scaling_up_keeps_second_long_bursts():
    starts_s = np.random.default_rng(0).uniform(0, 86_000, 500)
    arrival_s = np.sort(np.concatenate([start + np.linspace(0, 1, 50) for start in starts_s]))
    trace = Trace.from_arrays(arrival_s, np.ones(len(arrival_s)), np.ones(len(arrival_s)), duration_s=86_400)
    scaled = scale(trace, 3, seed=0)
    assert dispersion(scaled, 10.0) == pytest.approx(dispersion(trace, 10.0), rel=0.1)


def test_ticks_are_spread_over_their_length_in_order():
    ticks = np.repeat(np.arange(0, 3_000, 3.0), 4)
    sessions = np.tile([0, 1, 2, 3], 1_000)
    trace = Trace.from_arrays(ticks, np.arange(1, 4_001), np.ones(4_000), session_id=sessions)
    spread = spread_ticks(trace, seed=0)
    assert np.array_equal(np.floor(spread.arrival_s / 3) * 3, ticks)
    assert np.array_equal(spread.prompt_tokens, trace.prompt_tokens)
    assert (spread.arrival_s % 3).mean() == pytest.approx(1.5, abs=0.1)
    with pytest.raises(TraceError, match="expected a multiple of 3"):
        spread_ticks(poisson(10), seed=0)


def rate_table(rps=2.0, cv=3.0, windows=200):
    starts = np.arange(windows, dtype=np.int32) * 600
    return pl.DataFrame(
        {
            "window_start_s": np.concatenate([starts, starts]),
            "client_id": np.repeat(np.array([1, 7], np.int16), windows),
            "rate_rps": np.full(2 * windows, rps, np.float32),
            "iat_cv": np.full(2 * windows, cv, np.float32),
        }
    )


def test_requests_regenerated_from_rates_have_the_measured_rate_and_cv():
    lengths = Trace.from_arrays([0, 1, 2], [11, 22, 33], [1, 2, 3], model=[0, 1, 1], models=["c001", "c002*"])
    trace = regenerate_from_rates(rate_table(), lengths, seed=0)
    assert (trace.duration_s, trace.models) == (120_000.0, ("c001", "c007"))
    assert trace.mean_rps == pytest.approx(4.0, rel=0.03)
    assert iat_cv(thin(trace, 0.5, seed=0, by="tenant")) == pytest.approx(3.0, rel=0.1)
    assert set(trace.prompt_tokens[trace.model == 0].tolist()) == {11}, "a client keeps its own lengths"
    assert set(trace.prompt_tokens[trace.model == 1].tolist()) == {11, 22, 33}


def test_regeneration_takes_a_time_range_and_some_clients():
    trace = regenerate_from_rates(rate_table(), poisson(10), seed=0, start_s=6_000, end_s=12_000, clients=[7])
    assert (trace.duration_s, trace.models) == (6_000.0, ("c007",))
    assert trace.arrival_s[-1] < 6_000


@pytest.mark.parametrize(
    ("table", "options", "sentence"),
    [
        (rate_table().drop("iat_cv"), {}, "iat_cv is missing"),
        (rate_table(rps=-1.0), {}, "row 1: field rate_rps: expected a number of at least 0, got -1.0"),
        (rate_table(), {"clients": [99]}, "no client is active"),
        (rate_table(), {"max_requests": 1000}, "more than 1000"),
    ],
)
def test_rates_that_cannot_be_used_are_refused(table, options, sentence):
    with pytest.raises(TraceError, match=sentence):
        regenerate_from_rates(table, poisson(10), seed=0, **options)


def test_a_poisson_process_has_dispersion_and_cv_one():
    trace = poisson(200_000, rps=20.0)
    summary = summarize(trace)
    assert summary.iat_cv == pytest.approx(1.0, abs=0.02)
    assert summary.dispersion[1.0] == pytest.approx(1.0, abs=0.05)
    assert summary.mean_rps == pytest.approx(20.0, rel=0.02)
    assert summary.prompt_percentiles[50] == pytest.approx(500, abs=10)


def test_counts_leave_the_incomplete_last_window_out():
    trace = Trace.from_arrays([0, 1, 9.5, 10, 25], [1] * 5, [1] * 5)
    assert counts(trace, 10.0).tolist() == [3, 1]
    assert peak_to_mean(trace, 10.0) == 1.5
    assert empty_share(trace, 5.0) == pytest.approx(2 / 5)


def test_statistics_of_an_empty_trace_are_not_numbers():
    summary = summarize(Trace.from_arrays([], [], []))
    assert np.isnan([summary.iat_cv, summary.dispersion[1.0], summary.peak_to_mean_10s, summary.prefix_hit_share]).all()


@needs_measured
def test_measured_traces_load():
    trace = load_trace(MEASURED / "azure2023_code.parquet")
    assert (len(trace), trace.mean_rps) == (6_621, pytest.approx(3.182, abs=0.001))
    assert load_trace(MEASURED / "servegen_r1.parquet").models[0] == "c000"
    mooncake = spread_ticks(load_trace(MEASURED / "mooncake_conversation.parquet"), seed=0)
    assert iat_cv(mooncake) == pytest.approx(1.0, abs=0.1)


@needs_measured
def test_measured_rates_regenerate_at_native_scale():
    lengths = load_trace(MEASURED / "servegen_r1.parquet")
    rates = MEASURED / "servegen_r1_rates.parquet"
    trace = regenerate_from_rates(rates, lengths, seed=0)
    assert trace.mean_rps == pytest.approx(15.57, rel=0.05)
    assert np.median(trace.output_tokens) == pytest.approx(1_190, rel=0.03)
