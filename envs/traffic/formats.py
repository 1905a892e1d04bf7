"""Importers of published and user-made request logs into `Trace`.

The format is recognised by content: canonical Parquet, the Azure LLM inference CSVs of 2023 and 2024, BurstGPT's CSV,
Bailian's and Mooncake's JSONL, and any CSV, JSONL or JSON array with a column map; text files may be gzip-compressed.
Nothing is dropped silently: a bad row stops the import, or is counted and reported where the caller asked for it.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa

from envs.traffic.arrival_clock import Unit, clock_of
from envs.traffic.json_records import json_array, json_lines, paths_of
from envs.traffic.request_rows import COLUMNS, SORTED_NOTE, ImportResult, RowReader
from envs.traffic.trace import TraceError
from envs.traffic.trace_files import TraceLimits, arrivals_of, read_table, trace_from_table
from policies.redaction import shown


@dataclass(frozen=True)
class LogFormat:
    """How the log of another project is recognised and read.

    Attributes:
        columns: the log's column for each column of a trace.
        marks: further columns by which the log is recognised.
        optional: columns of a trace that only some of its files have.
        failed_output_tokens: a request with this many output tokens has failed and is left out; None for none.
        unit: of arrivals from a start; None where nobody has said it.
        block_tokens: tokens of each block that ``hash_ids`` names, which only JSONL can hold; None for none.
        parent: the column that names the request before this one in its conversation, as ``session_id`` names it.
        tick_s: grid on which arrivals may have been rounded, seconds; they are spread over it then.
    """

    columns: Mapping[str, str]
    marks: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    failed_output_tokens: int | None = None
    unit: Unit | None = "s"
    block_tokens: int | None = None
    parent: str = ""
    tick_s: float | None = None

    def found_in(self, names: set[str]) -> bool:
        """Whether a log with these columns has this format."""
        return {*self.columns.values(), *self.marks} <= names


FORMATS: dict[str, LogFormat] = {
    "azure": LogFormat(
        {"arrival_s": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
    ),
    "burstgpt": LogFormat(
        {
            "arrival_s": "Timestamp",
            "prompt_tokens": "Request tokens",
            "output_tokens": "Response tokens",
            "model": "Model",
        },
        marks=("Log Type",),
        optional={"session_id": "Session ID"},
        failed_output_tokens=0,
    ),
    # Alibaba's traces of Bailian have Mooncake's names, in seconds and with small blocks.
    "bailian": LogFormat(
        {
            "arrival_s": "timestamp",
            "prompt_tokens": "input_length",
            "output_tokens": "output_length",
            "session_id": "chat_id",
        },
        marks=("hash_ids", "parent_chat_id"),
        block_tokens=16,
        parent="parent_chat_id",
    ),
    "mooncake": LogFormat(
        {"arrival_s": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"},
        marks=("hash_ids",),
        unit="ms",
        block_tokens=512,
        tick_s=3.0,
    ),
}
"""Logs of other projects, by the name of the format; the first that fits is taken."""
PLAIN = LogFormat({}, unit=None)
"""Logs with a column map, or with the names of a trace."""
LONGEST_LINE = 16 * 2**20


def import_trace(
    path: Path | str,
    column_map: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    limits: TraceLimits | None = None,
    unit: Unit | None = None,
) -> ImportResult:
    """Read a request log of any known format.

    Args:
        path: the file; its name does not matter.
        column_map: for other CSV and JSONL files: from ``arrival_s``, ``prompt_tokens`` and ``output_tokens``
            (optionally ``prefix_hit_tokens``, ``session_id``, ``tenant``, ``model``) to the file's column names; to
            what lies in objects of a JSON log by path, as in ``usage.input_tokens``.
            Arrivals are seconds, the Unix clock in seconds, milliseconds, microseconds or nanoseconds, told by their
            size, or ISO 8601 times; times without an offset are read as UTC.
        skip_bad: leave bad rows out and count them, instead of stopping at the first.
        seed: seeds the spreading of Mooncake's 3-s ticks.
        limits: how much of the file is read before it is refused.
        unit: of arrivals from a start, where the log does not say it; it is asked for where seconds are unlikely.

    Raises:
        TraceError: with file, line, field and what was expected.
    """
    path, limits = Path(path), limits or TraceLimits()
    unknown = sorted(set(column_map or ()) - set(COLUMNS))
    if unknown:
        raise TraceError(f"column map: unknown field {unknown[0]!r}, expected one of {', '.join(COLUMNS)}")
    missing = [name for name in COLUMNS[:3] if column_map is not None and name not in column_map]
    if missing:
        raise TraceError(f"column map: expected a column for {missing[0]}")
    if not path.is_file():
        raise TraceError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            return _import_parquet(path, column_map, limits, unit)
        raw: Any = gzip.open(path, "rb") if head[:2] == b"\x1f\x8b" else path.open("rb")  # noqa: SIM115
        with raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            return _import_text(path, text, column_map, skip_bad, seed, limits, unit)
    except UnicodeDecodeError:
        raise TraceError(f"{path}: expected Parquet, or CSV or JSONL as UTF-8 text; this is neither") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None


def _import_parquet(
    path: Path, column_map: Mapping[str, str] | None, limits: TraceLimits, unit: Unit | None
) -> ImportResult:
    if column_map is not None:
        raise TraceError(f"{path}: a column map applies to CSV and JSONL, but this is Parquet; rename its columns")
    if unit not in (None, "s"):
        raise TraceError(f"{path}: a unit applies to CSV and JSONL; arrival_s of a Parquet file is in seconds")
    table, where = read_table(path, limits, "think_time_s"), str(path)
    notes = []
    if "arrival_s" in table.column_names:
        arrivals = arrivals_of(table, where)
        falls = bool((np.diff(arrivals) < 0).any())
        if falls and "think_time_s" in table.column_names:
            raise TraceError(f"{path}: is a library of sessions on their own clocks, expected requests on one clock")
        try:
            clock = clock_of(arrivals)
        except TraceError as error:
            raise TraceError(f"{path}: field arrival_s: {error}") from None
        if clock is not None:
            place = table.column_names.index("arrival_s")
            table = table.set_column(place, "arrival_s", pa.array((arrivals - arrivals.min()) * clock.seconds))
            notes.append(clock.note)
        if falls:
            table = table.sort_by("arrival_s")
            notes.append(SORTED_NOTE)
        if notes:  # the digest in the metadata belongs to the file as it was written
            table = table.replace_schema_metadata(None)
    trace = trace_from_table(table, where, path.stem)
    return ImportResult(trace, "canonical", len(trace), 0, notes=tuple(notes))


def _import_text(
    path: Path,
    text: TextIO,
    column_map: Mapping[str, str] | None,
    skip_bad: bool,
    seed: int,
    limits: TraceLimits,
    unit: Unit | None,
) -> ImportResult:
    first = next((line for line in _lines(path, text, limits) if line.strip()), None)
    if first is None:
        raise TraceError(f"{path}: is empty, expected a header or a JSON object and at least one request")
    text.seek(0)
    lines = _lines(path, text, limits)
    if first.lstrip()[0] in "{[":
        records = json_lines(lines) if first.lstrip()[0] == "{" else json_array(lines, LONGEST_LINE)
        line, record = next(records, (1, ValueError("expected an array of JSON objects, at least one")))
        if isinstance(record, ValueError):
            raise TraceError(f"{path}: line {line}: {record}")
        kind, columns = _recognise(path, paths_of(record), column_map, "jsonl")
        reader = _reader(path, kind, columns, columns, skip_bad, limits, unit)
        reader.read(itertools.chain([(line, record)], records))
    else:
        # Semicolons and tabs separate what spreadsheets export in half of the world.
        delimiter = max(",;\t", key=first.count)
        rows = csv.reader(lines, delimiter=delimiter)
        header = [name.strip() for name in next(row for row in rows if row)]
        kind, columns = _recognise(path, set(header), column_map, "csv")
        places = {name: header.index(column) for name, column in columns.items()}
        reader = _reader(path, kind, columns, places, skip_bad, limits, unit)
        reader.read(_csv_records(rows, len(header)))
    return reader.result(kind, seed)


def _reader(
    path: Path,
    kind: str,
    columns: Mapping[str, str],
    places: Mapping[str, int | str],
    skip_bad: bool,
    limits: TraceLimits,
    unit: Unit | None,
) -> RowReader:
    log = FORMATS.get(kind, PLAIN)
    if unit not in (None, log.unit) and log is not PLAIN:
        raise TraceError(f"{path}: the times of {kind} are in {log.unit}, not in {unit}")
    reader = RowReader(path, columns, places, skip_bad, limits.rows)
    reader.failed_output_tokens, reader.tick_s, reader.unit = log.failed_output_tokens, log.tick_s, unit or log.unit
    reader.block_tokens, reader.parent = log.block_tokens, log.parent
    return reader


def _recognise(
    path: Path, names: set[str], column_map: Mapping[str, str] | None, fallback: str
) -> tuple[str, dict[str, str]]:
    """The format's name, and the file's column for each column of a trace."""
    if column_map is not None:
        for name, column in column_map.items():
            if column not in names:
                raise TraceError(f"{path}: line 1: expected a column {column!r} for {name}, got {_listed(names)}")
        return fallback, dict(column_map)
    if set(COLUMNS[:3]) <= names:
        return fallback, {name: name for name in COLUMNS if name in names}
    for kind, known in FORMATS.items():
        if known.found_in(names):
            optional = {name: column for name, column in known.optional.items() if column in names}
            return kind, {**known.columns, **optional}
    raise TraceError(
        f"{path}: line 1: no known format has columns {_listed(names)}; "
        "map them, for example arrival_s=time,prompt_tokens=input,output_tokens=output"
    )


def _listed(names: set[str]) -> str:
    listed = shown(", ".join(sorted(names)[:12]))
    return listed if len(listed) <= 200 else f"{listed[:200]}..."


def _csv_records(rows: Any, width: int) -> Iterator[tuple[int, Any]]:
    """Yield line number and fields; a malformed row comes as the `ValueError` that says so."""
    while True:
        try:
            record = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield rows.line_num, ValueError(f"expected comma-separated values: {error}")
            continue
        if not record:
            continue
        if len(record) != width:
            yield rows.line_num, ValueError(f"expected {width} values as in the header, got {len(record)}")
        else:
            yield rows.line_num, record


def _lines(path: Path, text: TextIO, limits: TraceLimits) -> Iterator[str]:
    """Line by line, none of which fills the memory, and no more than the limits allow."""
    read, number = 0, 0
    while line := text.readline(LONGEST_LINE + 1):
        read, number = read + len(line), number + 1
        if len(line) > LONGEST_LINE:
            raise TraceError(f"{path}: line {number}: longer than {LONGEST_LINE} characters, expected a request")
        if read > limits.size:
            raise TraceError(
                f"{path}: line {number}: unpacks to more than {limits.size} bytes; raise --max-bytes of "
                "`jevons trace import` where that is right"
            )
        yield line
