"""A CSV file as rows that know their line, and its columns as checked numbers.

This module must not know what the columns mean.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from policies.contract import Floats
from policies.engine import ConfigError


class Range(NamedTuple):
    """Numbers that a column may hold, both ends included, and their name in an error."""

    low: float
    high: float
    words: str


@dataclass(frozen=True)
class Rows:
    """Rows of a file.

    Attributes:
        path: of the file.
        header: names of the columns.
        lines: per row, its line in the file, from 1, and its cells by column; blank where the row ends early.
    """

    path: Path
    header: tuple[str, ...]
    lines: tuple[tuple[int, Mapping[str, str]], ...]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, wanted: Mapping[str, str]) -> Rows:
        """Rows whose columns have these values; numbers are compared as numbers.

        Raises:
            ConfigError: when there is no such column or no such row.
        """
        for column in wanted:
            if column not in self.header:
                raise ConfigError(
                    f"{self.path}: no column {column!r} to choose rows by; columns: {', '.join(self.header)}"
                )
        kept = [(line, row) for line, row in self.lines if all(_same(row[name], wanted[name]) for name in wanted)]
        if not kept:
            chosen = ", ".join(f"{name}={value}" for name, value in wanted.items())
            raise ConfigError(f"{self.path}: no row{f' with {chosen}' if chosen else ' below the header'}")
        return replace(self, lines=tuple(kept))

    def numbers(self, names: Sequence[str], within: Range, default: float | None = None) -> Floats:
        """(rows,) numbers of the first of these columns that is not blank.

        Args:
            names: columns, at least one; those that the file lacks are passed over.
            within: what they may be.
            default: where all are blank or absent; None makes that an error.

        Raises:
            ConfigError: naming the line and the column.
        """
        there = [name for name in names if name in self.header]
        if not there and default is None:
            raise ConfigError(f"{self.path}: missing column {' or '.join(names)}; columns: {', '.join(self.header)}")
        values = []
        for line, row in self.lines:
            name = next((name for name in there if row[name].strip()), None)
            if name is None:
                if default is None:
                    raise ConfigError(f"{self.path}: line {line}: {there[0]} is blank, expected a number")
                values.append(default)
                continue
            try:
                value = float(row[name])
            except ValueError:
                raise ConfigError(f"{self.path}: line {line}: {name}: expected a number, got {row[name]!r}") from None
            if not within.low <= value <= within.high:
                raise ConfigError(f"{self.path}: line {line}: {name}: expected {within.words}, got {row[name]}")
            values.append(value)
        return np.array(values)


def read_rows(path: Path) -> Rows:
    """Read a CSV file with a header; a byte-order mark and spaces after commas do no harm.

    Raises:
        ConfigError: naming the file and what is wrong with it.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, skipinitialspace=True)
            header = tuple(reader.fieldnames or ())
            lines = []
            for row in reader:
                if None in row:
                    raise ConfigError(f"{path}: line {reader.line_num}: has more cells than the header has columns")
                lines.append((reader.line_num, {name: value or "" for name, value in row.items()}))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read as CSV: is no UTF-8 text") from None
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read as CSV: {reason}") from None
    if not header:
        raise ConfigError(f"{path}: is empty, expected a CSV with a header")
    twice = [name for name in header if name and header.count(name) > 1]
    if twice:
        raise ConfigError(f"{path}: column {twice[0]!r} stands twice in the header")
    return Rows(path, header, tuple(lines))


def _same(text: str, wanted: str) -> bool:
    try:
        return float(text) == float(wanted)
    except ValueError:
        return text == wanted
