"""Time as a peer sees it: its own tick, and sliding windows over what it has measured.

Everything is per service and follows the snapshots' clocks, which may differ from service to service and start anew
after a reset. This module must not know what is measured.
"""

from __future__ import annotations

import numpy as np

from policies.contract import Bools, Floats
from policies.durable import HISTORY, State

TOLERANCE_S = 1e-6


class Tick:
    """Says when a loop with a period of its own is due. A period below the control interval is due every time.

    A longer period keeps its phase: 20 s on a clock of 15 s is due at 0, 30, 45, 60, 90 s, three times a minute.
    """

    def __init__(self, n: int, period_s: float) -> None:
        self.period_s = period_s
        self._next_s = np.full(n, -np.inf)

    def reset(self, rows: Bools) -> None:
        """The masked services begin anew: due at once."""
        self._next_s[rows] = -np.inf

    @property
    def fresh(self) -> Bools:
        """(n,) services that have not been due yet."""
        return np.isneginf(self._next_s)

    def due(self, time_s: Floats, able: Bools) -> Bools:
        """(n,) where an evaluation is due; one that cannot be made (`able` False) stays due."""
        due: Bools = (time_s >= self._next_s - TOLERANCE_S) & able
        start = np.where(self.fresh, time_s, self._next_s)
        periods = np.floor((time_s - start + TOLERANCE_S) / self.period_s) + 1.0
        self._next_s = np.where(due, start + periods * self.period_s, self._next_s)
        return due


class SlidingWindow:
    """Samples (n, *width) of the last `span_s` seconds. A sample that is NaN or not wanted is not remembered."""

    def __init__(self, n: int, span_s: float, *width: int) -> None:
        self.span_s = span_s
        self._shape = (n, *width)
        self._times_s: list[Floats] = []
        self._values: list[Floats] = []

    def __len__(self) -> int:
        """Samples kept, of the service that has most."""
        return len(self._times_s)

    def reset(self, rows: Bools) -> None:
        """Forget the masked services."""
        for time_s in self._times_s:
            time_s[rows] = -np.inf

    def state(self) -> dict[str, Floats]:
        """Every sample, oldest first: its time and its values, (n, T, 1 + values)."""
        n = self._shape[0]
        samples = [
            np.column_stack([time_s, values.reshape(n, -1)])
            for time_s, values in zip(self._times_s, self._values, strict=True)
        ]
        width = 1 + int(np.prod(self._shape[1:]))
        return {HISTORY: np.stack(samples, axis=1) if samples else np.zeros((n, 0, width))}

    def restore(self, state: State) -> None:
        """Go on from what `state` returned."""
        samples = np.moveaxis(np.array(state[HISTORY], np.float64), 1, 0)
        self._times_s = [sample[:, 0].copy() for sample in samples]
        self._values = [sample[:, 1:].reshape(self._shape).copy() for sample in samples]

    def add(self, time_s: Floats, values: Floats, wanted: Bools | None = None) -> None:
        """Remember `values` (n, ...) as of `time_s` (n,) where `wanted` (n,), everywhere when None."""
        keep = ~np.isnan(values.reshape(self._shape[0], -1)).any(axis=1) & ~np.isnan(time_s)
        if wanted is not None:
            keep &= wanted
        self._times_s.append(np.where(keep, time_s, -np.inf))
        self._values.append(values)
        oldest_s = np.nan_to_num(time_s, nan=-np.inf) - self.span_s
        while self._times_s and not (self._times_s[0] > oldest_s - TOLERANCE_S).any():
            self._times_s.pop(0)
            self._values.pop(0)

    def count(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """(n,) samples in the last `span_s` seconds."""
        inside, _ = self._stacked(time_s, span_s)
        counted: Floats = inside.sum(axis=0).astype(np.float64)
        return counted

    def mean(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """Mean (n, ...) of the samples; NaN where there are none."""
        return self._reduced(time_s, span_s, "mean")

    def sum(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """Sum (n, ...) of the samples; NaN where there are none."""
        return self._reduced(time_s, span_s, "sum")

    def max(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """Largest (n, ...) of the samples; NaN where there are none."""
        return self._reduced(time_s, span_s, "max")

    def min(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """Smallest (n, ...) of the samples; NaN where there are none."""
        return self._reduced(time_s, span_s, "min")

    def deviation(self, time_s: Floats, span_s: float | None = None) -> Floats:
        """Standard deviation (n, ...) of the samples; NaN where there are none."""
        mean = self.mean(time_s, span_s)
        inside, values = self._stacked(time_s, span_s)
        mask = inside.reshape(*inside.shape, *([1] * (values.ndim - 2)))
        squares = np.where(mask, (values - mean) ** 2, 0.0).sum(axis=0)
        deviation: Floats = np.sqrt(squares / np.maximum(mask.sum(axis=0), 1))
        return np.where(mask.any(axis=0), deviation, np.nan)

    def _stacked(self, time_s: Floats, span_s: float | None) -> tuple[Bools, Floats]:
        if not self._times_s:
            return np.zeros((0, self._shape[0]), bool), np.zeros((0, *self._shape))
        times_s = np.array(self._times_s)
        span = self.span_s if span_s is None else span_s
        # A sample exactly `span_s` old is out, as in Kubernetes and Knative.
        inside = (times_s > time_s - span + TOLERANCE_S) & (times_s <= time_s + TOLERANCE_S)
        return inside, np.array(self._values)

    def _reduced(self, time_s: Floats, span_s: float | None, how: str) -> Floats:
        inside, values = self._stacked(time_s, span_s)
        if not len(values):
            return np.full(self._shape, np.nan)
        mask = inside.reshape(*inside.shape, *([1] * (values.ndim - 2)))
        some = mask.any(axis=0)
        if how == "max":
            reduced = np.where(mask, values, -np.inf).max(axis=0)
        elif how == "min":
            reduced = np.where(mask, values, np.inf).min(axis=0)
        else:
            reduced = np.where(mask, values, 0.0).sum(axis=0)
            if how == "mean":
                reduced = reduced / np.maximum(mask.sum(axis=0), 1)
        return np.where(some, reduced, np.nan)


class Streak:
    """How long a desired count has pointed the same way, in samples and in seconds; any other sample begins anew."""

    def __init__(self, n: int) -> None:
        self._sign = np.zeros(n)
        self._since_s = np.zeros(n)
        self._samples = np.zeros(n)

    def reset(self, rows: Bools) -> None:
        """Forget the masked services."""
        self._sign[rows] = 0.0
        self._samples[rows] = 0.0

    def update(self, time_s: Floats, sign: Floats, sampled: Bools) -> tuple[Floats, Floats]:
        """Fold in the sign (n,) of a desired change where `sampled`; samples (n,) and seconds (n,) so far."""
        new = sampled & (sign != self._sign)
        self._since_s = np.where(new, time_s, self._since_s)
        self._samples = np.where(sampled, np.where(new, 0.0, self._samples) + (sign != 0), self._samples)
        self._sign = np.where(sampled, sign, self._sign)
        return self._samples, time_s - self._since_s
