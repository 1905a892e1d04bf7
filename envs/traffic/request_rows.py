"""Rows of a request log, whatever its format, into a trace; and an account of what was left out.

This module must not know how a format is recognised or split into rows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.traffic.arrival_clock import UNITS_S, Unit, clock_of, doubt_seconds, stray, unit_named
from envs.traffic.json_records import value_at
from envs.traffic.prefix_blocks import block_sessions, prefix_hits
from envs.traffic.scaling import spread_ticks
from envs.traffic.trace import Trace, TraceError
from envs.traffic.trace_files import LONGEST_LABEL

COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", "session_id", "tenant", "model")
SORTED_NOTE = "rows were not in order of arrival and were sorted"
_ERRORS_KEPT = 5
_EPOCH = datetime(2020, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class ImportResult:
    """What an import found.

    Attributes:
        trace: the requests.
        format: the format recognised: ``canonical``, ``azure``, ``burstgpt``, ``bailian``, ``mooncake``, ``csv`` or
            ``jsonl``.
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


class RowReader:
    """Reads records into columns, and keeps account of what was left out."""

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str],
        places: Mapping[str, int | str],
        skip_bad: bool,
        max_rows: int,
    ) -> None:
        self.path = path
        self.columns = columns
        self.places = places
        self.skip_bad = skip_bad
        self.max_rows = max_rows
        self.failed_output_tokens: int | None = None
        self.block_tokens: int | None = None
        self.parent = ""
        self.tick_s: float | None = None
        self.unit: Unit | None = None
        self.rows_read = 0
        self.rows_bad = 0
        self.rows_failed = 0
        self.first_errors: list[str] = []
        # Numbers in place instead of objects: a log of 100 million rows is a few GB then.
        self.numbers = {name: array("d" if name == "arrival_s" else "i") for name in columns if name in COLUMNS[:4]}
        self.codes = {name: array("i") for name in columns if name in COLUMNS[4:]}
        self.labels: dict[str, dict[str, int]] = {name: {} for name in self.codes}
        self.blocks: list[list[Any]] = []
        self.block_count = 0
        self._first_of: dict[str, str] = {}  # the first request of each one's conversation
        self._parse_time: Callable[[Any], float] | None = None

    def read(self, records: Iterator[tuple[int, Any]]) -> None:
        """Take every record in.

        Raises:
            TraceError: at the first bad one, unless bad ones are to be skipped.
        """
        for line, record in records:
            self.rows_read += 1
            if max(self.rows_read, self.block_count) > self.max_rows:
                raise TraceError(
                    f"{self.path}: line {line}: more than {self.max_rows} requests, or blocks of prompts; raise "
                    "--max-rows of `jevons trace import` where that is right"
                )
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
        arrival_s, rows = self._arrivals(notes)
        by_time = np.argsort(arrival_s, kind="stable")
        arrival_s, order = arrival_s[by_time], rows[by_time]
        if (np.diff(order) < 0).any():
            notes.append(SORTED_NOTE)
        if self.rows_failed:
            notes.append(f"{self.rows_failed} rows without response tokens are failed requests and were left out")
        columns: dict[str, Any] = {
            name: np.array(values, np.int64)[order] for name, values in self.numbers.items() if name != "arrival_s"
        }
        for name, codes in self.codes.items():
            columns[name], known = _renumbered(np.array(codes, np.int32)[order], tuple(self.labels[name]))
            if name != "session_id":
                columns[f"{name}s"] = known
        if self.blocks and self.block_tokens:
            blocks = [self.blocks[row] for row in order]
            columns["prefix_hit_tokens"] = np.minimum(prefix_hits(blocks, self.block_tokens), columns["prompt_tokens"])
            if "session_id" not in columns:
                columns["session_id"] = block_sessions(blocks)
        trace = Trace.from_arrays(arrival_s - arrival_s[0], **columns, name=self.path.stem)
        if self.tick_s is not None and len(trace) > 1:
            ticks = np.round(trace.arrival_s / self.tick_s) * self.tick_s
            if (np.abs(trace.arrival_s - ticks) <= 0.002).all():
                trace = spread_ticks(trace, seed, self.tick_s)
                notes.append(f"arrivals lay on ticks of {self.tick_s:g} s and were spread uniformly over them")
        return ImportResult(
            trace, kind, self.rows_read, self.rows_bad + self.rows_failed, tuple(self.first_errors), tuple(notes)
        )

    def _arrivals(self, notes: list[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Seconds on one clock, and the rows that have them: all but those whose time is none, if these may be skipped.

        Raises:
            TraceError: where clock or unit cannot be told, or a time is none.
        """
        column = self.columns["arrival_s"]
        field = f"{self.path}: field {column!r}"
        arrival_s = np.array(self.numbers["arrival_s"], np.float64)
        if self._parse_time is not _seconds:
            rows = self._within_reach(field, arrival_s, _iso_time)
            return arrival_s[rows], rows
        unit = self.unit or unit_named(column)
        arrival_s *= UNITS_S[unit or "s"]
        typical = clock_of(np.median(arrival_s, keepdims=True))
        rows = self._within_reach(field, arrival_s * (typical.seconds if typical else 1.0), "{:.12g} s".format)
        arrival_s = arrival_s[rows]
        try:
            clock = clock_of(arrival_s)
        except TraceError as error:
            raise TraceError(f"{field}: {error}") from None
        doubt = doubt_seconds(arrival_s) if clock is None and unit is None else ""
        if doubt:
            raise TraceError(f"{field}: {doubt}; say which to `jevons trace import`: --unit s or --unit ms")
        if self.unit is None and unit not in (None, "s"):
            notes.append(f"arrivals were read as {unit}, as the name {column!r} says")
        if clock is not None:
            arrival_s = (arrival_s - arrival_s.min()) * clock.seconds
            if clock.seconds < 1.0:
                notes.append(clock.note)
        return arrival_s, rows

    def _within_reach(
        self, field: str, arrival_s: NDArray[np.float64], shown: Callable[[float], str]
    ) -> NDArray[np.int64]:
        """The rows whose time is near the others'; the rest are bad ones."""
        strays = stray(arrival_s)
        if strays.any():
            first = float(arrival_s[strays][0])
            sentence = (
                f"{field}: {int(strays.sum())} of {len(strays)} times lie more than a month from all others, the first "
                f"is {shown(first)}"
            )
            if not self.skip_bad:
                raise TraceError(f"{sentence}; --skip-bad leaves them out")
            self.rows_bad += int(strays.sum())
            self.first_errors = [*self.first_errors, sentence][:_ERRORS_KEPT]
        return np.flatnonzero(~strays)

    def _add(self, record: Any) -> None:
        row: dict[str, Any] = {}
        for name, place in self.places.items():
            try:
                value = value_at(record, place) if isinstance(place, str) else record[place]
            except KeyError:
                raise ValueError(f"expected a field {place!r} for {name}") from None
            try:
                if name == "arrival_s":
                    row[name] = self._time(value)
                elif name in self.numbers:
                    row[name] = _whole(value, 1 if name == "prompt_tokens" else 0)
                else:
                    row[name] = _label(value)
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
        if self.parent:
            before = _label(record.get(self.parent))
            own = row["session_id"]
            row["session_id"] = self._first_of[own] = self._first_of.get(before, own)
        if self.block_tokens:
            ids = record.get("hash_ids")
            if not isinstance(ids, list) or not all(isinstance(block, int | str) for block in ids):
                raise ValueError(f"field 'hash_ids': expected a list of block ids, got {ids!r:.60}")
            self.blocks.append(ids)
            self.block_count += len(ids)
        for name, value in row.items():
            if name in self.numbers:
                self.numbers[name].append(value)
            else:
                known = self.labels[name]
                self.codes[name].append(known.setdefault(value, len(known)) if value else -1)

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


def _iso_time(seconds: float) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat(timespec="seconds")


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


def _label(value: Any) -> str:
    label = "" if value is None else str(value).strip()
    if len(label) > LONGEST_LABEL:
        raise ValueError(f"expected a name of at most {LONGEST_LABEL} characters, got {len(label)}")
    return label


def _renumbered(codes: NDArray[np.int32], labels: tuple[str, ...]) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Labels numbered in order of first use; one that is empty stays -1."""
    used, first = np.unique(codes, return_index=True)
    used = used[np.argsort(first, kind="stable")]
    used = used[used >= 0]
    # The entry appended at the end is what code -1 looks up.
    table = np.full(len(labels) + 1, -1, np.int32)
    table[used] = np.arange(len(used))
    return table[codes], tuple(labels[code] for code in used)
