"""How far predictions are from measurements.

This module must not know what predicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.contract import Floats

INTERVAL = (5.0, 95.0)
"""Percentiles of the bootstrap: a 90 % interval."""


@dataclass(frozen=True)
class ErrorRow:
    """How far a quantity is off: absolute relative errors, 0.05 is 5 %."""

    quantity: str
    rows: int
    median: float
    mean: float
    mean_low: float
    mean_high: float
    p90: float
    worst: float

    @classmethod
    def of(cls, quantity: str, predicted: Floats, measured: Floats, seed: int = 0) -> ErrorRow:
        """Over the rows where both are known; the interval of the mean is a 90 % bootstrap.

        Raises:
            ValueError: when there is no such row.
        """
        errors = relative_errors(predicted, measured)
        errors = errors[~np.isnan(errors)]
        if not len(errors):
            raise ValueError(f"{quantity}: no row to compare")
        rng = np.random.default_rng(seed)
        means = errors[rng.integers(0, len(errors), (1000, len(errors)))].mean(axis=1)
        low, high = np.percentile(means, INTERVAL)
        return cls(
            quantity=quantity,
            rows=len(errors),
            median=float(np.median(errors)),
            mean=float(errors.mean()),
            mean_low=float(low),
            mean_high=float(high),
            p90=float(np.percentile(errors, 90)),
            worst=float(errors.max()),
        )


def relative_errors(predicted: Floats, measured: Floats) -> Floats:
    """(rows,) |predicted / measured - 1|, NaN where either is unknown."""
    errors: Floats = np.abs(predicted / measured - 1.0)
    return errors
