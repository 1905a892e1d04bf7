"""Requests of several traces in one set of arrays, as the cluster kernel reads them.

This module must not know about clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.traffic.trace import Trace
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

    def rows(self, traces: Ints, time_s: Floats) -> Ints:
        """First row of each listed trace (k,) whose request arrives at `time_s` (..., k) or later; its end if none."""
        # One binary search for all, because hundreds of episodes may begin in one step.
        low = np.broadcast_to(self.first[traces], time_s.shape)
        high = np.broadcast_to(self.first[traces + 1], time_s.shape)
        while (searching := low < high).any():
            middle = (low + high) // 2
            earlier = searching & (self.arrival_s[np.where(searching, middle, 0)] < time_s)
            low = np.where(earlier, middle + 1, low)
            high = np.where(searching & ~earlier, middle, high)
        return low

    def totals(self, first: Ints, end: Ints) -> Floats:
        """(k, 4) requests, prompt tokens, computed prompt tokens and output tokens of the row ranges [first, end)."""
        return np.concatenate([(end - first)[:, np.newaxis], self._sums[end] - self._sums[first]], axis=1)
