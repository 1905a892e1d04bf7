"""Importers of published and user-made request logs into `Trace`.

The format is recognised by content: canonical Parquet, the Azure LLM inference CSVs of 2023 and 2024, BurstGPT's CSV,
Mooncake's JSONL, and any CSV or JSONL with a column map; text files may be gzip-compressed.
Nothing is dropped silently: a bad row stops the import, or is counted and reported where the caller asked for it.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from envs.traffic.scaling import spread_ticks
from envs.traffic.trace import Trace, TraceError, load_trace, trace_from_table

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", "session_id", "tenant", "model")
MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_TICK_S = 3.0
# A block used more often than this is a shared system prompt rather than the history of one conversation.
_SESSION_BLOCK_USES = 40
_ERRORS_KEPT = 5

_AZURE = {"arrival_s": "TIMESTAMP", "prompt_tokens": "ContextTokens", "output_tokens": "GeneratedTokens"}
_BURSTGPT = {
    "arrival_s": "Timestamp",
    "prompt_tokens": "Request tokens",
    "output_tokens": "Response tokens",
    "model": "Model",
}
_MOONCAKE = {"arrival_s": "timestamp", "prompt_tokens": "input_length", "output_tokens": "output_length"}

_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)
_SORTED_NOTE = "rows were not in order of arrival and were sorted"


@dataclass(frozen=True)
class ImportResult:
    """What an import found.

    Attributes:
        trace: the requests.
        format: the format recognised: ``canonical``, ``azure``, ``burstgpt``, ``mooncake``, ``csv`` or ``jsonl``.
        rows_read: data rows in the file.
        rows_skipped: rows that are not in the trace: failed requests of BurstGPT, and bad rows with ``skip_bad``.
        first_errors: the first few bad rows, one sentence each.
        notes: what was done to the data, one sentence each (sorted, spread over ticks, failed requests left out).
    """

    trace: Trace
    format: str
    rows_read: int
    rows_skipped: int
    first_errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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
    return ImportResult(trace, "canonical", len(trace), 0, notes=(_SORTED_NOTE,))


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
        reader = _Reader(path, columns, columns, skip_bad)
        reader.reads_blocks = kind == "mooncake"
        reader.read(_json_records(text))
    else:
        # Semicolons and tabs separate what spreadsheets export in half of the world.
        delimiter = max(",;\t", key=first.count)
        rows = csv.reader(text, delimiter=delimiter)
        header = [name.strip() for name in next(row for row in rows if row)]
        kind, columns = _recognise(path, set(header), column_map, "csv")
        reader = _Reader(path, columns, {name: header.index(column) for name, column in columns.items()}, skip_bad)
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


class _Reader:
    """Reads records into columns, and keeps account of what was left out."""

    def __init__(self, path: Path, columns: Mapping[str, str], places: Mapping[str, int | str], skip_bad: bool) -> None:
        self.path = path
        self.columns = columns
        self.places = places
        self.skip_bad = skip_bad
        self.failed_output_tokens: int | None = None
        self.reads_blocks = False
        self.rows_read = 0
        self.rows_bad = 0
        self.rows_failed = 0
        self.first_errors: list[str] = []
        self.numbers: dict[str, list[Any]] = {name: [] for name in columns if name in COLUMNS[:4]}
        self.labels: dict[str, list[str]] = {name: [] for name in columns if name in COLUMNS[4:]}
        self.blocks: list[list[Any]] = []
        self._parse_time: Callable[[Any], float] | None = None

    def read(self, records: Iterator[tuple[int, Any]]) -> None:
        """Take every record in.

        Raises:
            TraceError: at the first bad one, unless bad ones are to be skipped.
        """
        for line, record in records:
            self.rows_read += 1
            try:
                if isinstance(record, ValueError):
                    raise record
                self._add(record)
            except ValueError as error:
                sentence = f"{self.path}: line {line}: {error}"
                if not self.skip_bad:
                    raise TraceError(sentence) from None
                self.rows_bad += 1
                if len(self.first_errors) < _ERRORS_KEPT:
                    self.first_errors.append(sentence)

    def result(self, kind: str, seed: int) -> ImportResult:
        """Make the trace: sort, rebase to 0, number the labels.

        Raises:
            TraceError: when no request is left.
        """
        kept = len(self.numbers["arrival_s"])
        if not kept:
            if not self.rows_read:
                raise TraceError(f"{self.path}: has a header but no rows, expected at least one request")
            reason = f"; the first: {self.first_errors[0]}" if self.first_errors else ""
            raise TraceError(f"{self.path}: none of {self.rows_read} rows is a request{reason}")
        notes: list[str] = []
        arrival_s = np.array(self.numbers["arrival_s"], np.float64)
        order = np.argsort(arrival_s, kind="stable")
        if (np.diff(arrival_s) < 0).any():
            notes.append(_SORTED_NOTE)
        if self.rows_failed:
            notes.append(f"{self.rows_failed} rows without response tokens are failed requests and were left out")
        columns: dict[str, Any] = {
            name: np.array(values, np.int64)[order] for name, values in self.numbers.items() if name != "arrival_s"
        }
        for name, values in self.labels.items():
            codes, known = _codes([values[row] for row in order])
            columns[name] = codes
            if name != "session_id":
                columns[f"{name}s"] = known
        if self.blocks:
            blocks = [self.blocks[row] for row in order]
            columns["prefix_hit_tokens"] = np.minimum(prefix_hits(blocks), columns["prompt_tokens"])
            columns["session_id"] = block_sessions(blocks)
        trace = Trace.from_arrays(arrival_s[order] - arrival_s[order[0]], **columns, name=self.path.stem)
        ticks = np.round(trace.arrival_s / MOONCAKE_TICK_S) * MOONCAKE_TICK_S
        if kind == "mooncake" and kept > 1 and (np.abs(trace.arrival_s - ticks) <= 0.002).all():
            trace = spread_ticks(trace, seed, MOONCAKE_TICK_S)
            notes.append(f"arrivals lay on ticks of {MOONCAKE_TICK_S:g} s and were spread uniformly over them")
        return ImportResult(
            trace, kind, self.rows_read, self.rows_bad + self.rows_failed, tuple(self.first_errors), tuple(notes)
        )

    def _add(self, record: Any) -> None:
        row: dict[str, Any] = {}
        for name, place in self.places.items():
            try:
                value = record[place]
            except KeyError:
                raise ValueError(f"expected a field {place!r} for {name}") from None
            try:
                if name == "arrival_s":
                    row[name] = self._time(value)
                elif name in self.numbers:
                    row[name] = _whole(value, 1 if name == "prompt_tokens" else 0)
                else:
                    row[name] = "" if value is None else str(value).strip()
            except ValueError as error:
                raise ValueError(f"field {self.columns[name]!r}: {error}") from None
        if row["output_tokens"] == self.failed_output_tokens:
            self.rows_failed += 1
            return
        if row["output_tokens"] < 1:
            raise ValueError(f"field {self.columns['output_tokens']!r}: expected at least 1, got 0")
        if row.get("prefix_hit_tokens", 0) > row["prompt_tokens"]:
            raise ValueError(
                f"field {self.columns['prefix_hit_tokens']!r}: expected at most the prompt's "
                f"{row['prompt_tokens']} tokens, got {row['prefix_hit_tokens']}"
            )
        if self.reads_blocks:
            ids = record.get("hash_ids")
            if not isinstance(ids, list) or not all(isinstance(block, int | str) for block in ids):
                raise ValueError(f"field 'hash_ids': expected a list of block ids, got {ids!r:.60}")
            row["arrival_s"] /= 1000.0
            self.blocks.append(ids)
        for name, value in row.items():
            (self.numbers if name in self.numbers else self.labels)[name].append(value)

    def _time(self, value: Any) -> float:
        if self._parse_time is None:
            # The first row decides, so that a log cannot mix seconds and dates.
            try:
                seconds = _seconds(value)
                self._parse_time = _seconds
            except ValueError:
                seconds = _iso_seconds(value)
                self._parse_time = _iso_seconds
            return seconds
        return self._parse_time(value)


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"expected a number of seconds, got {value!r:.60}") from None
    if not math.isfinite(seconds) or isinstance(value, bool):
        raise ValueError(f"expected a finite number of seconds, got {value!r:.60}")
    return seconds


def _iso_seconds(value: Any) -> float:
    """Seconds since 2020 of an ISO 8601 time; digits past the microsecond are cut."""
    try:
        time = datetime.fromisoformat(str(value).strip())
        # An epoch nearby leaves a float64 precise to 0.03 us.
        return ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH).total_seconds()
    except (ValueError, OverflowError):
        raise ValueError(f"expected seconds or an ISO 8601 time, got {value!r:.60}") from None


def _whole(value: Any, at_least: int) -> int:
    # Logs have millions of rows, and nearly every value in them is plain digits.
    if type(value) is str and value.isascii() and value.isdigit() and len(value) < 10 and int(value) >= at_least:
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not (number == math.floor(number) if math.isfinite(number) else False):
        raise ValueError(f"expected a whole number of tokens, got {value!r:.60}")
    if not at_least <= number < 2**31:
        raise ValueError(f"expected a number from {at_least} to {2**31 - 1}, got {value!r:.60}")
    return int(number)


def _codes(values: list[str]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Number labels in order of first use; an empty one is -1."""
    known: dict[str, int] = {}
    codes = [known.setdefault(value, len(known)) if value else -1 for value in values]
    return np.array(codes, np.int32), tuple(known)


def prefix_hits(blocks: list[list[Any]], block_tokens: int = MOONCAKE_BLOCK_TOKENS) -> NDArray[np.int64]:
    """Tokens in leading blocks seen in an earlier request, shape ``(requests,)``: an unbounded shared cache."""
    seen: set[Any] = set()
    hits = np.zeros(len(blocks), np.int64)
    for row, ids in enumerate(blocks):
        hits[row] = block_tokens * sum(1 for _ in itertools.takewhile(seen.__contains__, ids))
        seen.update(ids)
    return hits


def block_sessions(blocks: list[list[Any]]) -> NDArray[np.int32]:
    """Session ids derived from shared prompt blocks, shape ``(requests,)``.

    A request joins the session that owns its deepest block used at most 40 times in the log, else it opens one.
    """
    uses = Counter(block for ids in blocks for block in ids)
    owner: dict[Any, int] = {}
    sessions = np.zeros(len(blocks), np.int32)
    opened = 0
    for row, ids in enumerate(blocks):
        deepest = next((i for i in reversed(ids) if i in owner and uses[i] <= _SESSION_BLOCK_USES), None)
        if deepest is None:
            session, opened = opened, opened + 1
        else:
            session = owner[deepest]
        sessions[row] = session
        for block in ids:
            owner.setdefault(block, session)
    return sessions
