"""Requests of several traces in one set of arrays, as the cluster kernel reads them.

This module must not know about clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.traces import Trace
from policies.contract import Floats, Ints


@dataclass(frozen=True, eq=False)
class RequestLibrary:
    """Traces laid end to end. Trace `i` owns rows ``first[i] .. first[i + 1] - 1``, in arrival order from 0."""

    arrival_s: Floats  # (rows,)
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    prefix_hit_tokens: npt.NDArray[np.int32]
    first: Ints  # (traces + 1,)
    duration_s: Floats  # (traces,)
    _sums: Floats  # (rows + 1, 3) running sums of prompt, computed and output tokens

    @classmethod
    def of(cls, traces: Sequence[Trace]) -> RequestLibrary:
        """Lay traces end to end."""
        computed = [np.maximum(trace.prompt_tokens - trace.prefix_hit_tokens, 1) for trace in traces]
        stacked = np.stack(
            [
                np.concatenate([trace.prompt_tokens for trace in traces]),
                np.concatenate(computed),
                np.concatenate([trace.output_tokens for trace in traces]),
            ],
            axis=1,
        ).astype(np.float64)
        return cls(
            arrival_s=np.concatenate([trace.arrival_s for trace in traces]),
            prompt_tokens=np.concatenate([trace.prompt_tokens for trace in traces]),
            output_tokens=np.concatenate([trace.output_tokens for trace in traces]),
            prefix_hit_tokens=np.concatenate([trace.prefix_hit_tokens for trace in traces]),
            first=np.concatenate([[0], np.cumsum([len(trace) for trace in traces])]).astype(np.int64),
            duration_s=np.array([trace.duration_s for trace in traces]),
            _sums=np.concatenate([np.zeros((1, 3)), np.cumsum(stacked, axis=0)]),
        )

    def rows(self, trace: int, start_s: float, end_s: float) -> tuple[int, int]:
        """Row range [first, end) of the requests of `trace` that arrive in [start_s, end_s)."""
        low, high = self.first[trace], self.first[trace + 1]
        arrivals = self.arrival_s[low:high]
        return int(low + np.searchsorted(arrivals, start_s)), int(low + np.searchsorted(arrivals, end_s))

    def totals(self, first: Ints, end: Ints) -> Floats:
        """(k, 4) requests, prompt tokens, computed prompt tokens and output tokens of the row ranges [first, end)."""
        return np.concatenate([(end - first)[:, np.newaxis], self._sums[end] - self._sums[first]], axis=1)
