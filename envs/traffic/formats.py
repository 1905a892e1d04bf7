"""Importers of published and user-made request logs into `Trace`.

The format is recognised by content: canonical Parquet, the Azure LLM inference CSVs of 2023 and 2024, BurstGPT's CSV,
Mooncake's JSONL, and any CSV or JSONL with a column map; text files may be gzip-compressed.
Nothing is dropped silently: a bad row stops the import, or is counted and reported where the caller asked for it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from envs.traffic.request_rows import COLUMNS, SORTED_NOTE, ImportResult, RowReader
from envs.traffic.trace import TraceError, load_trace, trace_from_table

_AZURE = {"arrival_s": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
_BURSTGPT = {
    "arrival_s": "Timestamp",
    "prompt_tokens": "Request tokens",
    "output_tokens": "Response tokens",
    "model": "Model",
}
_MOONCAKE = {"arrival_s": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}


def import_trace(
    path: Path | str, column_map: Mapping[str, str] | None = None, skip_bad: bool = False, seed: int = 0
) -> ImportResult:
    """Read a request log of any known format.

    Args:
        path: the file; its name does not matter.
        column_map: for other CSV and JSONL files: from ``arrival_s``, ``prompt_tokens`` and ``output_tokens``
            (optionally ``prefix_hit_tokens``, ``session_id``, ``tenant``, ``model``) to the file's column names.
            Arrivals are seconds or ISO 8601 times; times without an offset are read as UTC.
        skip_bad: leave bad rows out and count them, instead of stopping at the first.
        seed: seeds the spreading of Mooncake's 3-s ticks.

    Raises:
        TraceError: with file, line, field and what was expected.
    """
    path = Path(path)
    unknown = sorted(set(column_map or ()) - set(COLUMNS))
    if unknown:
        raise TraceError(f"column map: unknown field {unknown[0]!r}, expected one of {', '.join(COLUMNS)}")
    missing = [name for name in COLUMNS[:3] if column_map is not None and name not in column_map]
    if missing:
        raise TraceError(f"column map: expected a column for {missing[0]}")
    if not path.is_file():
        raise TraceError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            return _import_parquet(path, column_map)
        raw: Any = gzip.open(path, "rb") if head[:2] == b"\x1f\x8b" else path.open("rb")  # noqa: SIM115
        with raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            return _import_text(path, text, column_map, skip_bad, seed)
    except UnicodeDecodeError:
        raise TraceError(f"{path}: expected Parquet, or CSV or JSONL as UTF-8 text; this is neither") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None


def _import_parquet(path: Path, column_map: Mapping[str, str] | None) -> ImportResult:
    if column_map is not None:
        raise TraceError(f"{path}: a column map applies to CSV and JSONL, but this is Parquet; rename its columns")
    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise TraceError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    arrivals = table["arrival_s"].to_numpy() if "arrival_s" in table.column_names else np.empty(0)
    if arrivals.dtype.kind not in "iuf" or not (np.diff(arrivals) < 0).any():
        trace = load_trace(path)
        return ImportResult(trace, "canonical", len(trace), 0)
    if "think_time_s" in table.column_names:
        raise TraceError(f"{path}: is a library of sessions on their own clocks, expected requests on one clock")
    # The digest in the metadata belongs to the file as it was written, sorted; this one was changed since.
    table = table.replace_schema_metadata(None).sort_by("arrival_s")
    trace = trace_from_table(table, str(path), path.stem)
    return ImportResult(trace, "canonical", len(trace), 0, notes=(SORTED_NOTE,))


def _import_text(
    path: Path, text: TextIO, column_map: Mapping[str, str] | None, skip_bad: bool, seed: int
) -> ImportResult:
    first = next((line for line in text if line.strip()), None)
    if first is None:
        raise TraceError(f"{path}: is empty, expected a header or a JSON object and at least one request")
    text.seek(0)
    if first.lstrip().startswith("{"):
        try:
            names = set(json.loads(first))
        except (ValueError, RecursionError):
            raise TraceError(f"{path}: line 1: expected a JSON object per line") from None
        kind, columns = _recognise(path, names, column_map, "jsonl")
        reader = RowReader(path, columns, columns, skip_bad)
        reader.reads_blocks = kind == "mooncake"
        reader.read(_json_records(text))
    else:
        # Semicolons and tabs separate what spreadsheets export in half of the world.
        delimiter = max(",;\t", key=first.count)
        rows = csv.reader(text, delimiter=delimiter)
        header = [name.strip() for name in next(row for row in rows if row)]
        kind, columns = _recognise(path, set(header), column_map, "csv")
        reader = RowReader(path, columns, {name: header.index(column) for name, column in columns.items()}, skip_bad)
        reader.failed_output_tokens = 0 if kind == "burstgpt" else None
        reader.read(_csv_records(rows, len(header)))
    return reader.result(kind, seed)


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
    if set(_AZURE.values()) <= names:
        return "azure", dict(_AZURE)
    if {*_BURSTGPT.values(), "Log Type"} <= names:
        session = {"session_id": "Session ID"} if "Session ID" in names else {}
        return "burstgpt", _BURSTGPT | session
    if {*_MOONCAKE.values(), "hash_ids"} <= names:
        return "mooncake", dict(_MOONCAKE)
    raise TraceError(
        f"{path}: line 1: no known format has columns {_listed(names)}; "
        "map them, for example arrival_s=time,prompt_tokens=input,output_tokens=output"
    )


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:12])
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


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


def _json_records(text: TextIO) -> Iterator[tuple[int, Any]]:
    for line, content in enumerate(text, start=1):
        if not content.strip():
            continue
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            # Not only malformed JSON: digits without end and nesting without end are refused by other errors.
            yield line, ValueError(f"expected a JSON object: {str(error)[:100]}")
            continue
        yield line, record if isinstance(record, dict) else ValueError("expected a JSON object")
