"""Canonical traces as Parquet files: read within bounds, and written whole.

This module must not know the logs of other projects.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from envs.traffic.arrival_clock import clock_of
from envs.traffic.trace import IntArray, Trace, TraceError
from policies.atomic_files import write_whole
from policies.json_text import read_json

_METADATA_KEY = b"jevons.trace"
_REQUIRED = ("arrival_s", "prompt_tokens", "output_tokens")
_OPTIONAL = ("prefix_hit_tokens", "session_id", "tenant", "model")
LABELS = ("tenant", "model")
LONGEST_LABEL = 1000
"""Characters of a name of a tenant, a model or a session."""
NAME_BYTES = 4
"""Of a name of a tenant or a model, which is read as a number."""
WORKING_BYTES = 96
"""Of memory for each request beside its columns, to make a trace of them and to summarise it; measured."""
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
COARSEST_S = 0.1
"""Times that their number type rounds to more than this many seconds are no times of requests."""


@dataclass(frozen=True)
class TraceLimits:
    """How much of a file is read before it is refused: a small archive can unpack to more than any memory holds.

    Attributes:
        rows: most requests.
        size: most bytes of unpacked text, or of a Parquet file without compression.
        memory: most bytes of memory that a Parquet file may take to read; half of what this process can have.
    """

    rows: int = 100_000_000
    size: int = 16 * 2**30
    memory: int = field(default_factory=lambda: memory_bytes() // 2)


def load_trace(path: Path | str, limits: TraceLimits | None = None) -> Trace:
    """Read a canonical Parquet trace (see ``docs/traces.md``); columns that are not part of it are ignored.

    Raises:
        TraceError: when the file is missing, is not Parquet, is larger than the limits, lacks a column, breaks a rule
            of `Trace`, or does not match the digest written with it.
    """
    path = Path(path)
    if not path.is_file():
        raise TraceError(f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}")
    return trace_from_table(read_table(path, limits), str(path), path.stem)


def read_table(path: Path, limits: TraceLimits | None = None, *further: str) -> pa.Table:
    """The canonical columns of a Parquet file, and `further` ones that are there.

    Raises:
        TraceError: when it cannot be read, or is larger than the limits.
    """
    limits = limits or TraceLimits()
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
        found = schema.names
        wanted = [column for column in (*_REQUIRED, *_OPTIONAL, *further) if column in found]
        if len(set(found)) < len(found):
            raise TraceError(f"{path}: names a column twice")
        # Names stay numbers and a list: written out, a few bytes of them can fill any memory.
        texts = [name for name in LABELS if name in wanted and _is_text(schema.field(name).type)]
        width = _row_bytes(path, schema, wanted, texts)
        groups = [metadata.row_group(at) for at in range(metadata.num_row_groups)]
        rows = sum(group.num_rows for group in groups)
        # Of all columns: asked for one of a damaged file, Arrow may end the process.
        size = sum(group.total_byte_size for group in groups)
        if rows > limits.rows or size > limits.size:
            raise TraceError(
                f"{path}: holds {rows} requests in {size} bytes, expected at most {limits.rows} in {limits.size}; "
                "raise --max-rows or --max-bytes of `jevons trace import`"
            )
        if rows * width > limits.memory:
            raise TraceError(
                f"{path}: holds {rows} requests, which take {rows * width / 2**30:.1f} GiB of memory to read, expected "
                f"at most {limits.memory / 2**30:.1f} GiB, half of what there is"
            )
        return pq.ParquetFile(path, read_dictionary=texts).read(columns=wanted)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise TraceError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None


def memory_bytes() -> int:
    """Bytes of memory that this process can have: the machine's, or fewer where a limit or its container says so."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    found += [soft] if soft != resource.RLIM_INFINITY else []
    for file in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or `max`
            found.append(int(file.read_text(encoding="ascii")))
    return min(found)


def _row_bytes(path: Path, schema: pa.Schema, columns: Sequence[str], texts: Sequence[str]) -> int:
    """Bytes of memory that one request takes, however small it is packed."""
    total = WORKING_BYTES
    for name in columns:
        kind = schema.field(name).type
        try:
            total += NAME_BYTES if name in texts else -(-kind.bit_width // 8)
        except ValueError:  # a value can be of any length
            expected = "text" if name in LABELS else "numbers"
            raise TraceError(f"{path}: field {name}: expected {expected}, got {kind}") from None
    return total


def trace_from_table(table: pa.Table, where: str, name: str) -> Trace:
    """Make a trace of a table with the canonical columns.

    Args:
        table: the columns; others are ignored.
        where: names the source in errors.
        name: the trace's name, unless the table's metadata holds one.

    Raises:
        TraceError: as for `load_trace`.
    """
    missing = [column for column in _REQUIRED if column not in table.column_names]
    if missing:
        raise TraceError(f"{where}: expected columns {', '.join(_REQUIRED)}, but {', '.join(missing)} is missing")
    try:
        metadata = dict(read_json((table.schema.metadata or {}).get(_METADATA_KEY, b"{}")))
        duration_s = float(metadata.get("duration_s", math.nan))
    except (TypeError, ValueError):
        raise TraceError(f"{where}: the metadata written with the trace cannot be read; the file was altered") from None
    numbers: dict[str, Any] = {
        column: arrivals_of(table, where) if column == "arrival_s" else _numbers(where, column, table[column])
        for column in (*_REQUIRED, "prefix_hit_tokens", "session_id")
        if column in table.column_names
    }
    labels = {
        column: _labels(where, column, table[column], metadata.get(f"{column}s"))
        for column in ("tenant", "model")
        if column in table.column_names
    }
    try:
        clock = clock_of(numbers["arrival_s"])
    except TraceError as error:
        raise TraceError(f"{where}: field arrival_s: {error}") from None
    if clock is not None:
        raise TraceError(
            f"{where}: field arrival_s: expected seconds from the start of the trace, got {clock.unit} of the Unix "
            "clock; `jevons trace import` counts them from the first one"
        )
    named: dict[str, Any] = {column: codes for column, (codes, _) in labels.items()}
    named |= {f"{column}s": names for column, (_, names) in labels.items()}
    try:
        trace = Trace.from_arrays(
            **numbers,
            **named,
            name=str(metadata.get("name", name)),
            duration_s=duration_s,
        )
    except TraceError as error:
        raise TraceError(f"{where}: {error}") from None
    if "digest" in metadata and metadata["digest"] != trace.digest():
        raise TraceError(f"{where}: the requests do not match the digest written with them; the file was altered")
    return trace


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write canonical Parquet (zstd) with name, duration and digest in the metadata, replacing `path` in one step.

    Columns that hold nothing (no session, no tenant, ...) are left out.

    Raises:
        TraceError: when the file cannot be written.
    """
    path = Path(path)
    columns: dict[str, Any] = {name: pa.array(getattr(trace, name)) for name in _REQUIRED}
    for name, empty in (("session_id", -1), ("prefix_hit_tokens", 0)):
        values = getattr(trace, name)
        if (values != empty).any():
            columns[name] = pa.array(values)
    for name, labels in (("tenant", trace.tenants), ("model", trace.models)):
        if labels:
            codes = getattr(trace, name)
            indices = pa.array(codes, mask=codes < 0)
            columns[name] = pa.DictionaryArray.from_arrays(indices, pa.array(labels, pa.string()))
    metadata = {
        "name": trace.name,
        "duration_s": trace.duration_s,
        "digest": trace.digest(),
        # The names are written here too: a reader may renumber a dictionary column, the codes must survive.
        "tenants": trace.tenants,
        "models": trace.models,
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(metadata).encode()})
    try:
        write_whole(path, lambda partial: pq.write_table(table, partial, compression="zstd"))
    except OSError as error:
        raise TraceError(str(error)) from None


def _numbers(where: str, column: str, values: Any) -> NDArray[Any]:
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise TraceError(f"{where}: field {column}: expected numbers, got {values.type}")
    if values.null_count:
        row = values.is_null().to_numpy().argmax() + 1
        raise TraceError(f"{where}: row {row}: field {column}: expected a number, got nothing")
    array: NDArray[Any] = values.to_numpy()
    return array


def arrivals_of(table: pa.Table, where: str) -> NDArray[np.float64]:
    """Arrivals (requests,) as they are in a table, on whichever clock.

    Raises:
        TraceError: when they are no finite numbers, or too coarse.
    """
    array = _numbers(where, "arrival_s", table["arrival_s"])
    if not np.isfinite(array).all():
        row = int((~np.isfinite(array)).argmax())
        raise TraceError(f"{where}: row {row + 1}: field arrival_s: expected a finite number, got {array[row]}")
    if array.dtype.kind == "f" and len(array):
        largest = np.abs(array).max()
        apart_s = float(np.spacing(largest))
        if array.dtype.itemsize < 8 and apart_s > COARSEST_S:
            raise TraceError(
                f"{where}: field arrival_s: {8 * array.dtype.itemsize}-bit floats of {float(largest):.6g} are "
                f"{apart_s:g} apart, which moves requests; expected 64-bit floats"
            )
    return array.astype(np.float64)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(where: str, column: str, values: Any, known: object) -> tuple[IntArray, tuple[str, ...]]:
    """Codes and names of a text column; `known` fixes the codes, else names are numbered in sorted order."""
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if not _is_text(kind):
        raise TraceError(f"{where}: field {column}: expected text, got {kind}")
    if not pa.types.is_dictionary(values.type):
        values = values.dictionary_encode()
    parts = []  # of each chunk: the row's index in the chunk's own names, -1 for none, and these names
    present: set[str] = set()
    for chunk in values.chunks:
        rows = chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)
        longest = pc.max(pc.utf8_length(chunk.dictionary)).as_py() or 0
        if longest > LONGEST_LABEL:
            raise TraceError(f"{where}: field {column}: a name of {longest} characters, expected {LONGEST_LABEL}")
        names = chunk.dictionary.to_pylist()
        present |= {names[at] for at in np.unique(rows[rows >= 0])} - {None}
        parts.append((rows, names))
    fixed = tuple(map(str, known)) if isinstance(known, list) and present <= set(map(str, known)) else None
    labels = fixed if fixed is not None else tuple(sorted(present))
    code = {label: at for at, label in enumerate(labels)}
    # The entry appended at the end is what index -1 looks up.
    codes = [np.array([*(code.get(name, -1) for name in names), -1], np.int32)[rows] for rows, names in parts]
    return np.concatenate([np.empty(0, np.int32), *codes]), labels
