import contextlib
import gzip
import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from envs.traffic.formats import import_trace
from envs.traffic.prefix_blocks import block_sessions, prefix_hits
from envs.traffic.trace import Trace, TraceError
from envs.traffic.trace_files import load_trace, write_trace

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2224670,879,55
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:01+00:00,2399,6
2024-05-10 02:00:01.500+02:00,76,15
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
"""
MOONCAKE = [
    {"timestamp": 0, "input_length": 1_200, "output_length": 52, "hash_ids": [0, 1, 2]},
    {"timestamp": 0, "input_length": 1_500, "output_length": 7, "hash_ids": [0, 1, 3]},
    {"timestamp": 3_000, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]},
    {"timestamp": 6_000, "input_length": 512, "output_length": 1, "hash_ids": [9]},
]
MAP = {"arrival_s": "when", "prompt_tokens": "in", "output_tokens": "out"}


@pytest.fixture
def file(tmp_path):
    """Write a file whose name says nothing."""

    def write(content):
        path = tmp_path / "log.dat"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def lines(records):
    return "\n".join(json.dumps(record) for record in records) + "\n"


def test_azure_2023_is_recognised_by_its_columns(file):
    result = import_trace(file(AZURE_2023))
    assert (result.format, result.rows_read, result.rows_skipped, result.notes) == ("azure", 3, 0, ())
    assert result.trace.arrival_s == pytest.approx([0.0, 4.314579, 4.541877], abs=1e-5)
    assert result.trace.prompt_tokens.tolist() == [374, 396, 879]
    assert result.trace.output_tokens.tolist() == [44, 109, 55]


def test_azure_2024_times_carry_offsets_and_any_precision(file):
    assert import_trace(file(AZURE_2024)).trace.arrival_s == pytest.approx([0.0, 0.99007, 1.49007], abs=1e-6)


def test_burstgpt_failures_are_left_out_and_counted(file):
    result = import_trace(file(BURSTGPT))
    assert (result.format, result.rows_read, result.rows_skipped, result.first_errors) == ("burstgpt", 3, 1, ())
    assert result.notes == ("1 rows without response tokens are failed requests and were left out",)
    assert result.trace.models == ("ChatGPT", "GPT-4")
    assert result.trace.arrival_s.tolist() == [0.0, 113.0]


def test_burstgpt_sessions_are_kept_where_the_file_has_them(file):
    text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    text += "1,x,2,GPT-4,5,6,11,API log\n2,y,2,GPT-4,5,6,11,API log\n3,x,2,GPT-4,5,6,11,API log\n"
    assert import_trace(file(text)).trace.session_id.tolist() == [0, 1, 0]


def test_mooncake_blocks_become_prefix_hits_and_sessions_and_ticks_are_spread(file):
    result = import_trace(file(lines(MOONCAKE)))
    assert result.format == "mooncake"
    assert result.trace.prefix_hit_tokens.tolist() == [0, 1_024, 600, 0]
    assert result.trace.session_id.tolist() == [0, 0, 0, 1]
    assert np.floor(result.trace.arrival_s / 3).tolist() == [0, 0, 1, 2]
    assert len(set(result.trace.arrival_s)) == 4
    assert result.notes == ("arrivals lay on ticks of 3 s and were spread uniformly over them",)


def test_mooncake_arrivals_off_the_ticks_stay_as_they_are(file):
    records = [MOONCAKE[0], MOONCAKE[1] | {"timestamp": 27_482}]
    assert import_trace(file(lines(records))).trace.arrival_s.tolist() == [0.0, 27.482]


def test_bailian_has_the_names_of_mooncake_in_seconds_with_small_blocks_and_says_its_conversations(file):
    shape = {"input_length": 40, "output_length": 5, "type": "text"}
    records = [
        {"chat_id": 7, "parent_chat_id": -1, "timestamp": 61.5, "turn": 1, "hash_ids": [1, 2, 3]} | shape,
        {"chat_id": 8, "parent_chat_id": -1, "timestamp": 62.0, "turn": 1, "hash_ids": [1, 9, 10]} | shape,
        {"chat_id": 9, "parent_chat_id": 7, "timestamp": 90.0, "turn": 2, "hash_ids": [1, 2, 3, 4]} | shape,
        {"chat_id": 10, "parent_chat_id": 9, "timestamp": 99.0, "turn": 3, "hash_ids": [5]} | shape,
        {"chat_id": 11, "parent_chat_id": 3, "timestamp": 99.5, "turn": 2, "hash_ids": [6]} | shape,
    ]
    result = import_trace(file(lines(records)))
    assert result.format == "bailian"
    assert result.trace.arrival_s.tolist() == [0.0, 0.5, 28.5, 37.5, 38.0]
    assert result.trace.prefix_hit_tokens.tolist() == [0, 16, 40, 0, 0]
    assert result.trace.session_id.tolist() == [0, 1, 0, 0, 2]
    with pytest.raises(TraceError, match="the times of bailian are in s, not in ms"):
        import_trace(file(lines(records)), unit="ms")


def every_50(column: str, step: float) -> str:
    """Twenty requests a second, whose times are in some unit."""
    rows = "".join(f"{50 * step * row:.15g},5,6\n" for row in range(200))
    return f"{column},in,out\n{rows}"


@pytest.mark.parametrize(("unit", "step"), [("s", 1e-3), ("ms", 1.0), ("us", 1e3), ("ns", 1e6)])
def test_arrivals_from_a_start_are_in_the_unit_that_is_said_or_that_their_name_says(file, unit, step):
    said = import_trace(file(every_50("when", step)), MAP, unit=unit)
    named = import_trace(file(every_50(f"when_{unit}", step)), MAP | {"arrival_s": f"when_{unit}"})
    for result in (said, named):
        assert result.trace.arrival_s[-1] == pytest.approx(0.05 * 199)
    assert named.notes == (() if unit == "s" else (f"arrivals were read as {unit}, as the name 'when_{unit}' says",))


def test_whole_numbers_that_would_be_a_thousand_times_too_slow_are_asked_for(file):
    path = file(every_50("when", 1.0))
    with pytest.raises(TraceError) as error:
        import_trace(path, MAP)
    assert str(error.value) == (
        f"{path}: field 'when': 0.02 requests/s over 2.76 h if these are seconds, 20 requests/s over 0.166 min if they "
        "are milliseconds; say which to `jevons trace import`: --unit s or --unit ms"
    )
    assert import_trace(path, MAP, unit="s").trace.arrival_s[-1] == 50.0 * 199
    fast = "".join(f"{row // 3},5,6\n" for row in range(200))
    assert import_trace(file(HEADER + fast), MAP).trace.arrival_s[-1] == 66.0


@pytest.mark.parametrize(
    ("odd", "usual", "shown"),
    [
        ("1970-01-01T00:00:00Z", "2026-05-01T00:{:02}:00Z", "1970-01-01T00:00:00+00:00"),
        ("2262-01-01T00:00:00Z", "2026-05-01T00:{:02}:00Z", "2262-01-01T00:00:00+00:00"),
        ("0", "17778900{:02}", "0 s"),
        ("0", "17778900{:02}000", "0 s"),
        ("1e15", "{}.5", "1e+15 s"),
    ],
)
def test_a_time_far_from_all_others_is_named_and_can_be_left_out(file, odd, usual, shown):
    rows = [f"{usual.format(row)},5,6\n" for row in range(40)]
    path = file(HEADER + "".join([*rows[:7], f"{odd},7,8\n", *rows[7:]]))
    with pytest.raises(TraceError) as error:
        import_trace(path, MAP)
    sentence = f"{path}: field 'when': 1 of 41 times lie more than a month from all others, the first is {shown}"
    assert str(error.value) == f"{sentence}; --skip-bad leaves them out"
    result = import_trace(path, MAP, skip_bad=True)
    assert (len(result.trace), result.rows_skipped, result.first_errors) == (40, 1, (sentence,))
    assert result.trace.digest() == import_trace(file(HEADER + "".join(rows)), MAP).trace.digest()


def test_a_pause_of_months_in_a_log_is_no_stray_time(file):
    rows = [f"2026-{month}-01T00:{row:02}:00Z,5,6\n" for month in ("01", "05") for row in range(40)]
    assert len(import_trace(file(HEADER + "".join(rows)), MAP).trace) == 80


def test_a_block_used_by_many_requests_does_not_join_sessions():
    blocks = [[0, 10 + row] for row in range(41)] + [[0, 10, 99]]
    assert block_sessions(blocks).tolist() == [*range(41), 0]


@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=20))
def test_prefix_hits_count_leading_blocks_seen_before(blocks):
    expected = []
    for row, ids in enumerate(blocks):
        seen = {block for earlier in blocks[:row] for block in earlier}
        leading = next((at for at, block in enumerate(ids) if block not in seen), len(ids))
        expected.append(512 * leading)
    assert prefix_hits(blocks, 512).tolist() == expected


def test_other_csv_is_read_through_a_column_map(file):
    text = "in;out;when;who\n5;6;10.5;a\n7;8;11.0;\n"
    result = import_trace(file(text), MAP | {"tenant": "who"})
    assert (result.format, result.trace.tenants, result.trace.tenant.tolist()) == ("csv", ("a",), [0, -1])
    assert result.trace.arrival_s.tolist() == [0.0, 0.5]


def test_other_jsonl_is_read_through_a_column_map(file):
    records = [
        {"when": "2025-01-01T00:00:00Z", "in": 5, "out": 6, "hash_ids": 1},
        {"when": "2025-01-01T00:00:02Z", "in": 7, "out": 8},
    ]
    result = import_trace(file(lines(records)), MAP)
    assert (result.format, result.trace.arrival_s.tolist()) == ("jsonl", [0.0, 2.0])


NESTED = [
    {"at": {"start": 10.5}, "usage": {"in": 5, "out": 6}, "text": 'a } ] " \\ {', "more": [{"x": [1]}]},
    {"at": {"start": 11.0}, "usage": {"in": 7, "out": 8}},
]
NESTED_MAP = {"arrival_s": "at.start", "prompt_tokens": "usage.in", "output_tokens": "usage.out"}


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_an_array_of_objects_is_read_however_it_is_spread_over_lines(file, indent):
    as_lines = import_trace(file(lines(NESTED)), NESTED_MAP)
    result = import_trace(file(json.dumps(NESTED, indent=indent)), NESTED_MAP)
    assert (result.format, result.rows_read) == ("jsonl", 2)
    assert result.trace.digest() == as_lines.trace.digest()
    assert result.trace.prompt_tokens.tolist() == [5, 7]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[section]\nkey = 1\n", "line 1: expected an array of JSON objects, at least one"),
        ("[]", "line 1: expected an array of JSON objects, at least one"),
        (
            json.dumps([*NESTED, {"at": 3, "usage": {"in": 5, "out": 6}}], indent=1),
            "line 28: expected a field 'at.start'",
        ),
        (json.dumps(NESTED, indent=1)[:-20], "line 19: the file ends within the array"),
        (json.dumps([NESTED[0], [5]]), "line 1: expected a JSON object"),
    ],
)
def test_a_damaged_array_is_one_sentence_with_its_line(file, text, sentence):
    with pytest.raises(TraceError) as error:
        import_trace(file(text), NESTED_MAP)
    assert sentence in str(error.value)


def test_csv_with_canonical_names_needs_no_map(file):
    text = "arrival_s,prompt_tokens,output_tokens,prefix_hit_tokens,session_id\n0,5,6,4,s\n1,5,6,0,s\n"
    trace = import_trace(file(text)).trace
    assert (trace.prefix_hit_tokens.tolist(), trace.session_id.tolist()) == ([4, 0], [0, 0])


def test_gzip_and_a_byte_order_mark_are_seen_through(file):
    assert len(import_trace(file(gzip.compress(b"\xef\xbb\xbf" + AZURE_2023.encode()))).trace) == 3


def test_canonical_parquet_is_recognised(file, tmp_path):
    trace = Trace.from_arrays([0, 1], [5, 5], [1, 1], name="original")
    write_trace(trace, tmp_path / "trace.csv")
    result = import_trace(tmp_path / "trace.csv")
    assert (result.format, result.trace.digest(), result.trace.name) == ("canonical", trace.digest(), "original")


def test_unsorted_rows_are_sorted_with_a_note(file, tmp_path):
    shuffled = "\n".join([*AZURE_2023.splitlines()[:1], *AZURE_2023.splitlines()[:0:-1]]) + "\n"
    result = import_trace(file(shuffled))
    assert result.trace.digest() == import_trace(file(AZURE_2023)).trace.digest()
    assert result.notes == ("rows were not in order of arrival and were sorted",)
    columns = {"arrival_s": [2.0, 1.0], "prompt_tokens": [7, 8], "output_tokens": [1, 1]}
    pl.DataFrame(columns).write_parquet(tmp_path / "unsorted")
    result = import_trace(tmp_path / "unsorted")
    assert (result.trace.prompt_tokens.tolist(), len(result.notes)) == ([8, 7], 1)


def test_a_library_of_sessions_is_refused(tmp_path):
    columns = {"arrival_s": [5.0, 0.0], "prompt_tokens": [7, 8], "output_tokens": [1, 1], "think_time_s": [0.0, 0.0]}
    pl.DataFrame(columns).write_parquet(tmp_path / "library")
    with pytest.raises(TraceError, match="library of sessions"):
        import_trace(tmp_path / "library")


HEADER = "when,in,out\n"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("1,5", "expected 3 values as in the header, got 2"),
        ("1,5,6,7", "expected 3 values as in the header, got 4"),
        ("soon,5,6", "field 'when': expected a number of seconds, got 'soon'"),
        ("nan,5,6", "field 'when': expected a finite number of seconds, got 'nan'"),
        ("1,-5,6", "field 'in': expected a number from 1 to 2147483647, got '-5'"),
        ("1,5,-6", "field 'out': expected a number from 0 to 2147483647, got '-6'"),
        ("1,5,0", "field 'out': expected at least 1, got 0"),
        ("1,5.5,6", "field 'in': expected a whole number of tokens, got '5.5'"),
        ("1,,6", "field 'in': expected a whole number of tokens, got ''"),
        ("1," + "9" * 500 + ",6", "field 'in': expected a whole number of tokens, got '" + "9" * 59),
        ("1,1e99,6", "field 'in': expected a number from 1 to 2147483647, got '1e99'"),
    ],
)
def test_a_bad_row_stops_the_import_or_is_counted(file, row, sentence):
    path = file(HEADER + "0,5,6\n\n" + row + "\n3,7,8\n")
    with pytest.raises(TraceError) as error:
        import_trace(path, MAP)
    assert str(error.value) == f"{path}: line 4: {sentence}"
    result = import_trace(path, MAP, skip_bad=True)
    assert (len(result.trace), result.rows_read, result.rows_skipped) == (2, 3, 1)
    assert result.first_errors == (f"{path}: line 4: {sentence}",)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object"),
        ("9" * 5_000, "expected a JSON object"),
        (
            '{"timestamp": ' + "9" * 400 + ', "input_length": 5, "output_length": 1, "hash_ids": []}',
            "field 'timestamp'",
        ),
        ('{"timestamp": 1, "input_length": 5}', "expected a field 'output_length' for output_tokens"),
        ('{"timestamp": 1, "input_length": true, "output_length": 1}', "field 'input_length': expected a whole number"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1}', "field 'hash_ids': expected a list of block ids"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [[]]}', "field 'hash_ids'"),
    ],
)
def test_a_bad_json_line_is_named(file, line, sentence):
    path = file(lines(MOONCAKE[:1]) + line + "\n")
    with pytest.raises(TraceError) as error:
        import_trace(path)
    assert str(error.value).startswith(f"{path}: line 2: {sentence}")
    assert import_trace(path, skip_bad=True).rows_skipped == 1


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (HEADER, "no known format has columns in, out, when; map them"),
        (AZURE_2023.splitlines()[0] + "\n", "has a header but no rows"),
        ("{not json\n", "line 1: expected a JSON object: Expecting property name"),
        (b"\x93NUMPY\xff\xfe\x00", "expected Parquet, or CSV or JSONL as UTF-8 text"),
        (b"PAR1 but not really", "cannot be read as Parquet"),
        (b"\x1f\x8b but not really", "cannot be read"),
    ],
)
def test_a_file_of_no_known_content_is_refused_in_one_sentence(file, content, sentence):
    path = file(content)
    with pytest.raises(TraceError, match=sentence) as error:
        import_trace(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@settings(max_examples=150, deadline=None)
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(b"PAR1".__add__),
        st.binary(max_size=60).map(b"\x1f\x8b\x08\x00".__add__),
        st.text(max_size=60).map(str.encode),
        st.text(max_size=60).map(lambda text: (AZURE_2023 + text).encode()),
        st.text(max_size=60).map(lambda text: (lines(MOONCAKE) + text).encode()),
    ),
    skip_bad=st.booleans(),
)
def test_no_content_leads_to_another_error(content, skip_bad, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(content)
    with contextlib.suppress(TraceError):
        result = import_trace(path, skip_bad=skip_bad)
        assert len(result.trace) == result.rows_read - result.rows_skipped


def test_a_wrong_column_map_is_named(file):
    path = file(HEADER + "0,5,6\n")
    with pytest.raises(TraceError, match="unknown field 'tokens'"):
        import_trace(path, MAP | {"tokens": "in"})
    with pytest.raises(TraceError, match="expected a column for output_tokens"):
        import_trace(path, {"arrival_s": "when", "prompt_tokens": "in"})
    with pytest.raises(TraceError, match="line 1: expected a column 'sent' for arrival_s, got in, out, when"):
        import_trace(path, MAP | {"arrival_s": "sent"})
    with pytest.raises(TraceError, match="no such file"):
        import_trace(path.with_name("none"))


def test_a_file_of_bad_rows_only_is_refused(file):
    with pytest.raises(TraceError, match=r"none of 1 rows is a request; the first: .*line 2: field 'in'"):
        import_trace(file(HEADER + "0,x,6\n"), MAP, skip_bad=True)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**6), st.integers(1, 10**6)), min_size=1, max_size=30)
)
def test_what_is_imported_is_what_was_logged(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text(HEADER + "".join(f"{when},{prompt},{output}\n" for when, prompt, output in requests))
    trace = import_trace(path, MAP).trace
    first = min(when for when, _, _ in requests)
    expected = sorted(((when - first, prompt, output) for when, prompt, output in requests), key=lambda row: row[0])
    got = zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True)
    assert [tuple(map(int, row)) for row in got] == expected
    write_trace(trace, path)
    assert load_trace(path).digest() == trace.digest()
