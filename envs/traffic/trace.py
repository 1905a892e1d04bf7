"""Request traces: what arrives, when and how long, as arrays.

A trace is measured (see ``envs/traffic/formats.py``), read from a file (``envs/traffic/trace_files.py``), generated
(``envs/traffic/generator.py``) or made from others (``envs/traffic/scaling.py``).
This module must not know about engines, clusters or prices.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

_INT32_MAX = int(np.iinfo(np.int32).max)


class TraceError(ValueError):
    """Raised when a trace cannot be used; the message names the file, the row, the field and what was expected."""


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Requests sorted by arrival; every array has shape ``(requests,)`` and is treated as immutable.

    Attributes:
        arrival_s: arrival times, float64 seconds from the start of the trace, ascending, at least 0.
        prompt_tokens: int32, at least 1, the cached part included.
        output_tokens: int32, at least 1.
        prefix_hit_tokens: int32, 0 to ``prompt_tokens``: leading prompt tokens that an unbounded prefix cache holds.
        session_id: int32, -1 for a request of no session.
        tenant: int32 code into `tenants`, -1 for none.
        tenants: the tenants' names.
        model: int32 code into `models`, -1 for none. ServeGen's files keep their client ids here.
        models: the models' names.
        name: what the trace is called in reports; not part of the digest.
        duration_s: observed time, seconds, at least the last arrival (and the default: the last arrival).
            A trace may end with idle time.

    Raises:
        TraceError: on construction, naming the first offending row and field.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    prefix_hit_tokens: IntArray
    session_id: IntArray
    tenant: IntArray
    tenants: tuple[str, ...]
    model: IntArray
    models: tuple[str, ...]
    name: str
    duration_s: float = math.nan

    def __post_init__(self) -> None:
        for field in ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", *_CODE_FIELDS):
            wanted = np.float64 if field == "arrival_s" else np.int32
            object.__setattr__(self, field, _as_array(getattr(self, field), wanted, f"trace {self.name!r}", field))
        object.__setattr__(self, "tenants", tuple(self.tenants))
        object.__setattr__(self, "models", tuple(self.models))
        if math.isnan(self.duration_s):
            object.__setattr__(self, "duration_s", float(self.arrival_s[-1]) if len(self.arrival_s) else 0.0)
        self._validate()

    @classmethod
    def from_arrays(
        cls,
        arrival_s: ArrayLike,
        prompt_tokens: ArrayLike,
        output_tokens: ArrayLike,
        *,
        prefix_hit_tokens: ArrayLike | None = None,
        session_id: ArrayLike | None = None,
        tenant: ArrayLike | None = None,
        tenants: Sequence[str] = (),
        model: ArrayLike | None = None,
        models: Sequence[str] = (),
        name: str = "trace",
        duration_s: float = math.nan,
    ) -> Trace:
        """Build a trace from the columns at hand: absent hits are 0, absent ids and codes are -1.

        Raises:
            TraceError: when an array breaks the rules listed for the class.
        """
        requests = np.asarray(arrival_s).shape[0] if np.ndim(arrival_s) else 0
        none = np.full(requests, -1, np.int32)
        columns: dict[str, Any] = {
            "prefix_hit_tokens": np.zeros(requests, np.int32) if prefix_hit_tokens is None else prefix_hit_tokens,
            "session_id": none if session_id is None else session_id,
            "tenant": none if tenant is None else tenant,
            "model": none if model is None else model,
        }
        required: dict[str, Any] = {
            "arrival_s": arrival_s,
            "prompt_tokens": prompt_tokens,
            "output_tokens": output_tokens,
        }
        return cls(
            **required, **columns, tenants=tuple(tenants), models=tuple(models), name=name, duration_s=duration_s
        )

    def __len__(self) -> int:
        return len(self.arrival_s)

    def __repr__(self) -> str:
        return f"Trace({self.name!r}, requests={len(self)}, duration_s={self.duration_s:.6g})"

    @property
    def mean_rps(self) -> float:
        """Requests per second over `duration_s`; 0 for a trace without duration."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    def digest(self) -> str:
        """SHA-256 over the requests and the duration, hexadecimal; the name does not count."""
        sha = hashlib.sha256(b"jevons-trace-1")
        labels = json.dumps([self.tenants, self.models, len(self), self.duration_s])
        sha.update(labels.encode())
        for field in ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", *_CODE_FIELDS):
            array = getattr(self, field)
            # A fixed byte order, and one spelling of zero, keep the digest equal across machines and round trips.
            sha.update(np.ascontiguousarray(array + 0, array.dtype.newbyteorder("<")).tobytes())
        return sha.hexdigest()

    def take(self, rows: NDArray[Any]) -> Trace:
        """The given rows (an ascending index array or a boolean mask, shape ``(requests,)``), at unchanged times."""
        fields = ("arrival_s", "prompt_tokens", "output_tokens", "prefix_hit_tokens", *_CODE_FIELDS)
        return replace(self, **{field: getattr(self, field)[rows] for field in fields})

    def slice(self, start_s: float, end_s: float) -> Trace:
        """Requests with ``start_s <= arrival_s < end_s``, with `start_s` as the new time 0.

        An `end_s` at or past the end of the trace includes its last request.

        Raises:
            TraceError: unless ``0 <= start_s < end_s`` and `start_s` lies inside the trace.
        """
        if not 0 <= start_s < end_s:
            raise TraceError(f"trace {self.name!r}: slice needs 0 <= start_s < end_s, got {start_s} and {end_s}")
        if start_s >= self.duration_s:
            raise TraceError(f"trace {self.name!r}: slice start_s {start_s} lies past the end, {self.duration_s} s")
        first = int(np.searchsorted(self.arrival_s, start_s, "left"))
        last = len(self) if end_s >= self.duration_s else int(np.searchsorted(self.arrival_s, end_s, "left"))
        kept = self.take(np.arange(first, last))
        return replace(kept, arrival_s=kept.arrival_s - start_s, duration_s=min(end_s, self.duration_s) - start_s)

    def split(self, train: float = 0.6, validation: float = 0.2) -> tuple[Trace, Trace, Trace]:
        """Cut by time, never shuffled, into train, validation and test (the rest), each rebased to 0.

        Raises:
            TraceError: unless both shares are above 0, their sum below 1 and the trace has a duration.
        """
        if not (train > 0 and validation > 0 and train + validation < 1):
            raise TraceError(
                f"trace {self.name!r}: split needs train > 0, validation > 0 and train + validation < 1, "
                f"got {train} and {validation}"
            )
        cuts = (0.0, train * self.duration_s, (train + validation) * self.duration_s, self.duration_s)
        parts = [
            replace(self.slice(start, end), name=f"{self.name}-{part}")
            for start, end, part in zip(cuts[:-1], cuts[1:], ("train", "validation", "test"), strict=True)
        ]
        return parts[0], parts[1], parts[2]

    def _validate(self) -> None:
        where = f"trace {self.name!r}"
        requests = len(self.arrival_s)
        for field in ("prompt_tokens", "output_tokens", "prefix_hit_tokens", *_CODE_FIELDS):
            if len(getattr(self, field)) != requests:
                got = len(getattr(self, field))
                raise TraceError(f"{where}: field {field}: expected {requests} values, as in arrival_s, got {got}")
        _check(self.arrival_s, ~np.isfinite(self.arrival_s), where, "arrival_s", "a finite number of seconds")
        _check(self.arrival_s, self.arrival_s < 0, where, "arrival_s", "at least 0")
        falls = np.diff(self.arrival_s, prepend=-math.inf) < 0
        _check(self.arrival_s, falls, where, "arrival_s", "rows sorted by arrival_s")
        _check(self.prompt_tokens, self.prompt_tokens < 1, where, "prompt_tokens", "at least 1")
        _check(self.output_tokens, self.output_tokens < 1, where, "output_tokens", "at least 1")
        outside = (self.prefix_hit_tokens < 0) | (self.prefix_hit_tokens > self.prompt_tokens)
        _check(self.prefix_hit_tokens, outside, where, "prefix_hit_tokens", "between 0 and prompt_tokens")
        _check(self.session_id, self.session_id < -1, where, "session_id", "at least -1")
        for field, labels in (("tenant", self.tenants), ("model", self.models)):
            codes = getattr(self, field)
            outside = (codes < -1) | (codes >= len(labels))
            _check(codes, outside, where, field, f"-1 or a code below {len(labels)}, the number of {field}s")
            if len(set(labels)) != len(labels):
                raise TraceError(f"{where}: field {field}s: expected distinct names")
        last_s = float(self.arrival_s[-1]) if requests else 0.0
        if not (math.isfinite(self.duration_s) and self.duration_s >= last_s):
            raise TraceError(
                f"{where}: field duration_s: expected at least the last arrival, {last_s} s, got {self.duration_s}"
            )


_CODE_FIELDS = ("session_id", "tenant", "model")


def _check(values: NDArray[Any], bad: NDArray[np.bool_], where: str, field: str, expected: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise TraceError(f"{where}: row {row + 1}: field {field}: expected {expected}, got {values[row]}")


def _as_array(values: Any, dtype: type[np.generic], where: str, field: str) -> NDArray[Any]:
    """Convert to a contiguous 1-d array without wrapping or rounding integers."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise TraceError(f"{where}: field {field}: expected a one-dimensional array, got shape {array.shape}")
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    if array.size and array.dtype.kind not in "iuf":
        raise TraceError(f"{where}: field {field}: expected numbers, got {array.dtype}")
    if dtype is np.int32:
        wide = array.astype(np.float64)
        fits = (np.abs(wide) <= _INT32_MAX) & (wide == np.floor(wide))
        _check(array, ~fits, where, field, f"a whole number of at most {_INT32_MAX}")
    return np.ascontiguousarray(array.astype(dtype))


def merge(traces: Sequence[Trace], name: str | None = None) -> Trace:
    """Overlay traces on one clock: sessions stay apart, equal tenant and model names become one.

    Raises:
        TraceError: when there is nothing to merge, or the session ids do not fit in 31 bits.
    """
    if not traces:
        raise TraceError("merge: expected at least one trace, got none")
    tenants = tuple(dict.fromkeys(label for trace in traces for label in trace.tenants))
    models = tuple(dict.fromkeys(label for trace in traces for label in trace.models))
    arrival_s = np.concatenate([trace.arrival_s for trace in traces])
    order = np.argsort(arrival_s, kind="stable")
    sessions: list[NDArray[np.int64]] = []
    offset = 0
    for trace in traces:
        ids = trace.session_id.astype(np.int64)
        sessions.append(np.where(ids < 0, -1, ids + offset))
        offset = max(offset, int(sessions[-1].max(initial=-1)) + 1)
    if offset > _INT32_MAX:
        raise TraceError(f"merge: field session_id: the ids of {len(traces)} traces do not fit in 31 bits")

    def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(arrays)[order]

    return Trace.from_arrays(
        arrival_s[order],
        joined([trace.prompt_tokens for trace in traces]),
        joined([trace.output_tokens for trace in traces]),
        prefix_hit_tokens=joined([trace.prefix_hit_tokens for trace in traces]),
        session_id=joined(sessions),
        tenant=joined([_recode(trace.tenant, trace.tenants, tenants) for trace in traces]),
        tenants=tenants,
        model=joined([_recode(trace.model, trace.models, models) for trace in traces]),
        models=models,
        name=name or "+".join(dict.fromkeys(trace.name for trace in traces)),
        duration_s=max(trace.duration_s for trace in traces),
    )


def _recode(codes: IntArray, old: tuple[str, ...], new: tuple[str, ...]) -> IntArray:
    # The entry appended at the end is what code -1 looks up.
    table = np.array([*(new.index(label) for label in old), -1], np.int32)
    return table[codes]
