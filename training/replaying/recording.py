"""A replayable trace of a service's own traffic, from what its metrics have kept."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from autoscaler.metrics.traffic_recording import Lengths, Recording
from envs.traffic.trace import Trace

OPEN_BUCKET_FACTOR = 2.0
"""The bucket above the last finite edge is taken to end at this factor times the edge."""


def trace_from_recording(recording: Recording, name: str, seed: int) -> Trace:
    """Draw the requests that a recording describes.

    Arrivals are spread evenly over their span. Lengths are drawn from the histogram of the block in which a request
    came (of the nearest one that has any), evenly in the logarithm within a bucket.

    Args:
        recording: what was measured.
        name: the trace's name.
        seed: of the draws; the same seed gives the same trace.

    Raises:
        TraceError: when the recording is empty.
    """
    rng = np.random.default_rng(seed)
    spans = recording.arrivals
    count = np.round(np.cumsum(spans.count)).astype(np.int64)
    count = np.diff(count, prepend=0)
    starts, ends = np.repeat(spans.from_s, count), np.repeat(spans.until_s, count)
    moment = np.sort(starts + rng.random(len(starts)) * (ends - starts))
    inside = (moment >= recording.start_s) & (moment <= recording.start_s + recording.duration_s)
    moment = moment[inside]
    return Trace.from_arrays(
        arrival_s=moment - recording.start_s,
        prompt_tokens=_draw(recording.prompt, moment, rng),
        output_tokens=_draw(recording.output, moment, rng),
        name=name,
        duration_s=recording.duration_s,
    )


def _draw(lengths: Lengths, moment: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int32]:
    """Tokens of requests that came at the given Unix times."""
    upper = lengths.edges.copy()
    finite = upper[np.isfinite(upper)]
    upper[~np.isfinite(upper)] = OPEN_BUCKET_FACTOR * (finite[-1] if len(finite) else 1.0)
    lower = np.concatenate([[0.0], upper[:-1]])
    filled = np.flatnonzero(lengths.counts.sum(axis=1) > 0)
    tokens = np.ones(len(moment), np.int32)
    if not len(filled):
        return tokens
    # Requests finish after they came, so the block that ends next describes them; the nearest filled one stands in.
    block = np.searchsorted(lengths.until_s, moment, "left")
    nearest = filled[np.abs(block[:, np.newaxis] - filled[np.newaxis, :]).argmin(axis=1)]
    for place in np.unique(nearest):
        rows = np.flatnonzero(nearest == place)
        share = lengths.counts[place] / lengths.counts[place].sum()
        bucket = rng.choice(len(share), len(rows), p=share)
        # Whole tokens above the lower edge up to the upper one.
        low, high = np.floor(lower[bucket]) + 1.0, np.maximum(np.floor(upper[bucket]), np.floor(lower[bucket]) + 1.0)
        drawn = np.exp(np.log(low) + rng.random(len(rows)) * (np.log(high + 1.0) - np.log(low)))
        tokens[rows] = np.clip(np.floor(drawn), low, high).astype(np.int32)
    return tokens
