"""Traces at another scale, without changing the shape of their bursts.

Timestamps are never divided or multiplied: that would stretch a second-long burst into a minute-long one.
A larger trace is several time-shifted copies laid over each other, a smaller one loses whole sessions, clients or
requests, and measured per-client rates can be turned into requests at any scale.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from envs.traffic.trace import Trace, TraceError, merge

ThinBy = Literal["session", "tenant", "request"]

RATE_WINDOW_S = 600.0
MAX_REQUESTS = 100_000_000
_RATE_COLUMNS = ("window_start_s", "client_id", "rate_rps", "iat_cv")
_MAX_SHIFT_S = 3 * 3600.0
# Published windows reach CVs of 1,000 from a few clumps; past 100 (shape 1e-4) a window holds one clump or none.
_MAX_CV = 100.0


def superpose(
    trace: Trace, copies: int, seed: int, min_shift_s: float = 300.0, max_shift_s: float | None = None
) -> Trace:
    """Lay `copies` of a trace over each other, each shifted circularly in time by its own amount.

    The first copy is not shifted.
    Shifts lie at least `min_shift_s` apart, so that bursts do not add up, and at most `max_shift_s` from 0, so that a
    daily profile survives (default: three hours, or more where the copies do not fit).
    Session ids are made distinct; a session that wraps around the end continues under another id.

    Raises:
        TraceError: when `copies` is below 1, or that many shifts do not fit in the trace.
    """
    if copies < 1:
        raise TraceError(f"trace {trace.name!r}: superpose needs copies >= 1, got {copies}")
    return _overlay([trace] * copies, seed, min_shift_s, max_shift_s)


def thin(trace: Trace, keep: float, seed: int, by: ThinBy = "session") -> Trace:
    """Keep about a share `keep` (above 0, at most 1) of the requests, chosen at random.

    By ``session`` or ``tenant``, whole groups are taken in random order as long as they fit, which keeps each group's
    burst shape; the share kept is then below `keep` by less than the smallest group left out. Requests of no group
    count as groups of one.
    By ``tenant``, a trace without tenants is thinned by model (ServeGen's client ids are there).
    By ``request``, exactly ``round(keep * requests)`` are taken, which makes arrivals more Poisson-like.

    Raises:
        TraceError: when `keep` is out of range, or the trace has nothing to group by.
    """
    if not 0 < keep <= 1:
        raise TraceError(f"trace {trace.name!r}: thin needs 0 < keep <= 1, got {keep}")
    rng = np.random.default_rng(seed)
    wanted = round(keep * len(trace))
    if by == "request":
        return trace.take(np.sort(rng.permutation(len(trace))[:wanted]))
    groups = trace.session_id
    if by == "tenant":
        groups = trace.tenant if (trace.tenant >= 0).any() else trace.model
    if len(trace) and not (groups >= 0).any():
        raise TraceError(f"trace {trace.name!r}: has no {by} to thin by; thin by request")
    loose = groups < 0
    ids = groups.astype(np.int64)
    ids[loose] = int(ids.max(initial=-1)) + 1 + np.arange(int(loose.sum()))
    _, members, sizes = np.unique(ids, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(sizes), bool)
    room = wanted
    for group in rng.permutation(len(sizes)):
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    return trace.take(chosen[members])


def scale(trace: Trace, factor: float, seed: int) -> Trace:
    """A trace with `factor` times the mean rate, over the same duration.

    The whole part of `factor` becomes shifted copies, the rest a thinned one: by session where there are sessions, else
    by tenant or client where whole clients reach the rate within 5 %, else by request.
    Factors above about 20 flatten the relative bursts as any sum of independent services does; to model one larger
    service with native bursts, use `regenerate_from_rates` or the generator.

    Raises:
        TraceError: when `factor` is not a finite number above 0, or makes more than 100 million requests.
    """
    if not (math.isfinite(factor) and factor > 0):
        raise TraceError(f"trace {trace.name!r}: scale needs a factor above 0, got {factor}")
    if factor * len(trace) > MAX_REQUESTS:
        raise TraceError(f"trace {trace.name!r}: {factor:g} times its requests is more than {MAX_REQUESTS}")
    whole = int(factor)
    rest = factor - whole
    parts = [trace] * whole
    if rest * len(trace) >= 0.5:
        parts.append(_thin_to_rate(trace, rest, seed))
    if not parts:
        return trace.take(np.arange(0))
    if len(parts) == 1:
        return parts[0]
    # A short trace cannot hold many copies five minutes apart; closer ones are the best that it can give.
    return _overlay(parts, seed, min(300.0, trace.duration_s / (2 * len(parts))), None)


def spread_ticks(trace: Trace, seed: int, tick_s: float = 3.0) -> Trace:
    """Spread arrivals that were recorded on ticks uniformly over their tick, keeping the order of requests.

    Raises:
        TraceError: when arrivals do not lie on multiples of `tick_s` (within 2 ms).
    """
    ticks = np.round(trace.arrival_s / tick_s)
    off = np.abs(trace.arrival_s - ticks * tick_s) > 0.002
    if off.any():
        row = int(off.argmax())
        raise TraceError(
            f"trace {trace.name!r}: row {row + 1}: field arrival_s: expected a multiple of {tick_s} s, "
            f"got {trace.arrival_s[row]}"
        )
    # Sorting the times but not the rows keeps the calls of a session in order.
    arrival_s = np.sort(ticks * tick_s + np.random.default_rng(seed).uniform(0.0, tick_s, len(trace)))
    return replace(trace, arrival_s=arrival_s, duration_s=trace.duration_s + tick_s)


def regenerate_from_rates(
    rates: pl.DataFrame | Path | str,
    lengths_from: Trace,
    seed: int,
    *,
    start_s: float = 0.0,
    end_s: float | None = None,
    clients: Collection[int] | None = None,
    max_requests: int = 50_000_000,
    name: str = "regenerated",
) -> Trace:
    """Make requests at native scale from measured per-client rates.

    Within each 600-s window a client is a stationary Gamma renewal process of the measured mean rate with shape
    ``1 / iat_cv**2``; a fitted family and its parameters are not used.
    Token counts are drawn together, with replacement, from the requests of the same client in `lengths_from`
    (``models`` named ``cNNN`` or ``cNNN*``), or from all its requests where the client has none.

    Args:
        rates: table or Parquet file with ``window_start_s``, ``client_id``, ``rate_rps``, ``iat_cv``.
        lengths_from: trace to draw lengths from.
        seed: seeds everything random.
        start_s: first window's start, rounded down to a window; becomes time 0.
        end_s: end, exclusive, rounded up to a window; default the end of the table.
        clients: ids to keep; default all.
        max_requests: refuse to make more than this many.
        name: the trace's name.

    Raises:
        TraceError: when the table lacks a column or holds a value out of range, when nothing is left, or when more
            than `max_requests` would be made.
    """
    where = "rates" if isinstance(rates, pl.DataFrame) else str(rates)
    table = _rate_table(rates, where)
    first_s = math.floor(start_s / RATE_WINDOW_S) * RATE_WINDOW_S
    end_of_table_s = float(table["window_start_s"].max() or 0) + RATE_WINDOW_S  # type: ignore[arg-type]
    last_s = end_of_table_s if end_s is None else math.ceil(end_s / RATE_WINDOW_S) * RATE_WINDOW_S
    table = table.filter(
        (pl.col("window_start_s") >= first_s) & (pl.col("window_start_s") < last_s) & (pl.col("rate_rps") > 0)
    )
    if clients is not None:
        table = table.filter(pl.col("client_id").is_in(list(clients)))
    if not len(table):
        raise TraceError(f"{where}: no client is active between {first_s} and {last_s} s; nothing to generate")
    if not len(lengths_from):
        raise TraceError(f"trace {lengths_from.name!r}: is empty, expected requests to draw lengths from")
    expected = float((table["rate_rps"] * RATE_WINDOW_S).sum())
    if expected > max_requests:
        raise TraceError(
            f"{where}: would make about {expected:.3g} requests, more than {max_requests}; "
            "choose a shorter time or fewer clients"
        )
    rng = np.random.default_rng(seed)
    table = table.sort("client_id", "window_start_s")
    starts = table["window_start_s"].to_numpy() - first_s
    rate_rps = table["rate_rps"].to_numpy().astype(np.float64)
    cv = np.clip(table["iat_cv"].fill_null(1.0).fill_nan(1.0).to_numpy().astype(np.float64), 1e-2, _MAX_CV)
    chunks = [
        start + _renewal(rate, 1.0 / spread**2, RATE_WINDOW_S, rng)
        for start, rate, spread in zip(starts, rate_rps, cv, strict=True)
    ]
    client = np.repeat(table["client_id"].to_numpy(), [len(chunk) for chunk in chunks])
    rows = _matching_rows(client, lengths_from, rng)
    arrival_s = np.concatenate(chunks)
    order = np.argsort(arrival_s, kind="stable")
    ids, codes = np.unique(client, return_inverse=True)
    return Trace.from_arrays(
        arrival_s[order],
        lengths_from.prompt_tokens[rows][order],
        lengths_from.output_tokens[rows][order],
        prefix_hit_tokens=lengths_from.prefix_hit_tokens[rows][order],
        model=codes[order],
        models=[f"c{client_id:03d}" for client_id in ids],
        name=name,
        duration_s=last_s - first_s,
    )


def _overlay(parts: Sequence[Trace], seed: int, min_shift_s: float, max_shift_s: float | None) -> Trace:
    """Merge traces of one duration, all but the first shifted circularly."""
    first = parts[0]
    duration_s = first.duration_s
    if len(parts) * min_shift_s > duration_s and len(parts) > 1:
        raise TraceError(
            f"trace {first.name!r}: {len(parts)} copies shifted by at least {min_shift_s} s need "
            f"{len(parts) * min_shift_s} s, but the trace lasts {duration_s} s"
        )
    room_s = max(_MAX_SHIFT_S, 2 * len(parts) * min_shift_s) if max_shift_s is None else max_shift_s
    room_s = min(room_s, duration_s)
    slack_s = room_s - len(parts) * min_shift_s
    if slack_s < 0:
        raise TraceError(
            f"trace {first.name!r}: {len(parts)} copies {min_shift_s} s apart need max_shift_s of at least "
            f"{len(parts) * min_shift_s} s, got {room_s} s"
        )
    rng = np.random.default_rng(seed)
    shifts = np.sort(rng.uniform(0.0, slack_s, len(parts) - 1)) + min_shift_s * np.arange(1, len(parts))
    shifted = [first, *(_rotated(part, float(shift)) for part, shift in zip(parts[1:], shifts, strict=True))]
    return merge(shifted, name=first.name)


def _rotated(trace: Trace, shift_s: float) -> Trace:
    """Move every request `shift_s` later, the last ones to the start."""
    if not len(trace):
        return trace
    arrival_s = trace.arrival_s + shift_s
    wrapped = arrival_s >= trace.duration_s
    arrival_s = np.where(wrapped, arrival_s - trace.duration_s, arrival_s)
    # Rounding may leave a hair below 0 or above the end.
    arrival_s = np.clip(arrival_s, 0.0, trace.duration_s)
    # Without a new id, the wrapped end of a session would come before its beginning.
    sessions = trace.session_id.astype(np.int64)
    sessions = np.where(wrapped & (sessions >= 0), sessions + int(sessions.max()) + 1, sessions)
    if int(sessions.max()) > np.iinfo(np.int32).max:
        raise TraceError(f"trace {trace.name!r}: field session_id: the ids of its copies do not fit in 31 bits")
    order = np.argsort(arrival_s, kind="stable")
    moved = replace(trace, session_id=sessions.astype(np.int32))
    return replace(_reordered(moved, order), arrival_s=arrival_s[order])


def _reordered(trace: Trace, order: NDArray[np.intp]) -> Trace:
    # Token columns first: `replace` validates, and times stay sorted until the caller sets them.
    return replace(
        trace,
        **{
            field: getattr(trace, field)[order]
            for field in ("prompt_tokens", "output_tokens", "prefix_hit_tokens", "session_id", "tenant", "model")
        },
    )


def _thin_to_rate(trace: Trace, keep: float, seed: int) -> Trace:
    if (trace.session_id >= 0).any():
        return thin(trace, keep, seed, by="session")
    if (trace.tenant >= 0).any() or (trace.model >= 0).any():
        whole_clients = thin(trace, keep, seed, by="tenant")
        if len(whole_clients) >= 0.95 * keep * len(trace):
            return whole_clients
    return thin(trace, keep, seed, by="request")


def _renewal(rate_rps: float, shape: float, length_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Arrival times in ``[0, length_s)`` of a stationary Gamma renewal process."""
    scale_s = 1.0 / (rate_rps * shape)
    # In equilibrium the gap that covers time 0 is length-biased, Gamma(shape + 1), and time 0 falls uniformly in it.
    times = [np.array([rng.gamma(shape + 1.0, scale_s) * rng.uniform()])]
    while times[-1][-1] < length_s:
        left = (length_s - times[-1][-1]) * rate_rps
        block = rng.gamma(shape, scale_s, int(left + 3.0 * math.sqrt(left / shape)) + 8)
        times.append(times[-1][-1] + np.cumsum(block))
    joined = np.concatenate(times)
    return joined[: np.searchsorted(joined, length_s, "left")]


def _matching_rows(client: NDArray[np.int16], source: Trace, rng: np.random.Generator) -> NDArray[np.intp]:
    """For each request, a row of `source` of the same client, or any row."""
    labels = np.array([label.rstrip("*") for label in source.models], dtype=np.str_)
    rows = np.empty(len(client), np.intp)
    for client_id in np.unique(client):
        own = np.isin(source.model, np.flatnonzero(labels == f"c{client_id:03d}"))
        pool = np.flatnonzero(own) if own.any() else np.arange(len(source))
        mine = client == client_id
        rows[mine] = rng.choice(pool, int(mine.sum()))
    return rows


def _rate_table(rates: pl.DataFrame | Path | str, where: str) -> pl.DataFrame:
    if not isinstance(rates, pl.DataFrame):
        if not Path(rates).is_file():
            raise TraceError(f"{where}: no such file")
        try:
            rates = pl.read_parquet(rates)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise TraceError(f"{where}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    missing = [column for column in _RATE_COLUMNS if column not in rates.columns]
    if missing:
        raise TraceError(f"{where}: expected columns {', '.join(_RATE_COLUMNS)}, but {', '.join(missing)} is missing")
    for column in ("window_start_s", "rate_rps"):
        bad = (rates[column].is_null() | ~(rates[column] >= 0) | rates[column].is_infinite()).fill_null(True)
        if bad.any():
            row = int(bad.arg_max() or 0)
            got = rates[column][row]
            raise TraceError(f"{where}: row {row + 1}: field {column}: expected a number of at least 0, got {got}")
    return rates
