"""Statistics of a trace: how bursty it is and how long its requests are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from envs.traffic.trace import Trace, TraceError

PERCENTILES = (1, 5, 25, 50, 75, 90, 95, 99)
WINDOWS_S = (1.0, 10.0, 60.0, 300.0, 3600.0)
MAX_WINDOWS = 10_000_000


@dataclass(frozen=True)
class TraceSummary:
    """What describes a trace in reports; a value that the trace is too short or too empty for is NaN.

    Attributes:
        name: the trace's name.
        requests: number of requests.
        duration_s: observed time, seconds.
        mean_rps: requests per second.
        iat_cv: coefficient of variation of the times between arrivals; 1 for a Poisson process.
        dispersion: index of dispersion of counts by window length in seconds; 1 at every window for a Poisson process.
        peak_to_mean_10s: largest over mean request count of 10-s bins.
        empty_10s_share: share of 10-s bins without a request, 0..1.
        prompt_percentiles: prompt tokens by percentile.
        output_percentiles: output tokens by percentile.
        prompt_tokens: sum over requests.
        output_tokens: sum over requests.
        prefix_hit_share: prefix-hit tokens over prompt tokens, 0..1.
        sessions: number of distinct sessions.
        tenants: number of tenants that occur.
        models: number of models that occur.
        digest: the trace's digest.
    """

    name: str
    requests: int
    duration_s: float
    mean_rps: float
    iat_cv: float
    dispersion: dict[float, float]
    peak_to_mean_10s: float
    empty_10s_share: float
    prompt_percentiles: dict[int, float]
    output_percentiles: dict[int, float]
    prompt_tokens: int
    output_tokens: int
    prefix_hit_share: float
    sessions: int
    tenants: int
    models: int
    digest: str


def summarize(trace: Trace) -> TraceSummary:
    """Compute every statistic of `TraceSummary`."""
    prompt_sum = int(trace.prompt_tokens.sum(dtype=np.int64))
    hit_sum = int(trace.prefix_hit_tokens.sum(dtype=np.int64))
    return TraceSummary(
        name=trace.name,
        requests=len(trace),
        duration_s=trace.duration_s,
        mean_rps=trace.mean_rps,
        iat_cv=iat_cv(trace),
        dispersion={window_s: dispersion(trace, window_s) for window_s in WINDOWS_S},
        peak_to_mean_10s=peak_to_mean(trace, 10.0),
        empty_10s_share=empty_share(trace, 10.0),
        prompt_percentiles=_percentiles(trace.prompt_tokens),
        output_percentiles=_percentiles(trace.output_tokens),
        prompt_tokens=prompt_sum,
        output_tokens=int(trace.output_tokens.sum(dtype=np.int64)),
        prefix_hit_share=hit_sum / prompt_sum if prompt_sum else math.nan,
        sessions=_distinct(trace.session_id),
        tenants=_distinct(trace.tenant),
        models=_distinct(trace.model),
        digest=trace.digest(),
    )


def counts(trace: Trace, window_s: float) -> NDArray[np.int64]:
    """Requests per window, shape ``(windows,)``; the incomplete last window is left out.

    Raises:
        TraceError: when there are more than ten million windows.
    """
    windows = _windows(trace, window_s)
    if windows > MAX_WINDOWS:
        raise TraceError(f"trace {trace.name!r}: {windows} windows of {window_s:g} s, expected at most {MAX_WINDOWS}")
    index = np.floor(trace.arrival_s / window_s).astype(np.int64)
    return np.bincount(index[index < windows], minlength=windows).astype(np.int64)


def _windows(trace: Trace, window_s: float) -> int:
    return math.floor(trace.duration_s / window_s + 1e-9)


def _occupied(trace: Trace, window_s: float) -> NDArray[np.int64]:
    """Requests per window that has any: what a trace of years with few requests can afford."""
    index = np.floor(trace.arrival_s / window_s)
    index = index[index < _windows(trace, window_s)]
    starts = np.flatnonzero(np.diff(index, prepend=-1.0))
    return np.diff(starts, append=len(index)).astype(np.int64)


def dispersion(trace: Trace, window_s: float) -> float:
    """Index of dispersion: variance over mean of the counts per window; NaN with fewer than two windows."""
    windows, per_window = _windows(trace, window_s), _occupied(trace, window_s)
    if windows < 2 or not len(per_window):
        return math.nan
    mean = per_window.sum() / windows
    variance = (((per_window - mean) ** 2).sum() + (windows - len(per_window)) * mean**2) / windows
    return float(variance / mean)


def iat_cv(trace: Trace) -> float:
    """Standard deviation over mean of the times between arrivals; NaN with fewer than two gaps or no time passed."""
    gaps_s = np.diff(trace.arrival_s)
    if len(gaps_s) < 2 or not gaps_s.any():
        return math.nan
    return float(gaps_s.std() / gaps_s.mean())


def peak_to_mean(trace: Trace, window_s: float) -> float:
    """Largest over mean count per window; NaN without a request in a complete window."""
    per_window = _occupied(trace, window_s)
    return float(per_window.max() * _windows(trace, window_s) / per_window.sum()) if len(per_window) else math.nan


def empty_share(trace: Trace, window_s: float) -> float:
    """Share of windows without a request, 0..1; NaN without a complete window."""
    windows = _windows(trace, window_s)
    return 1.0 - len(_occupied(trace, window_s)) / windows if windows else math.nan


def _percentiles(tokens: NDArray[np.int32]) -> dict[int, float]:
    values = np.percentile(tokens, PERCENTILES) if len(tokens) else [math.nan] * len(PERCENTILES)
    return {percentile: float(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def _distinct(ids: NDArray[np.int32]) -> int:
    return len(np.unique(ids[ids >= 0]))
