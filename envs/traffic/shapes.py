"""Measured constants of the built-in traffic profiles.

Arrivals of `chat`, `code` and `reasoning` are a Gamma renewal process whose intensity is a log-Ornstein-Uhlenbeck
process on a daily profile; `code` adds an on/off gate. Token counts are mixtures of lognormals.
The fits start from published ones and were adjusted where they missed the traces they describe; each constant says so.
``docs/traces.md`` compares generated with measured figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# Log rates of ServeGen's m-large, m-mid and m-small, less their mean daily profile, correlate by .86 to .88 from one
# 600-s window to the next, with standard deviations of .28, .33 and .16.
DRIFT_PHI = 0.87

SteadyProfile = Literal["chat", "code", "reasoning"]


@dataclass(frozen=True)
class Gate:
    """Alternating busy and idle times, both exponential.

    Attributes:
        on_s: mean busy time, seconds.
        off_s: mean idle time, seconds.
        floor: intensity while idle, as a share of that while busy.
    """

    on_s: float
    off_s: float
    floor: float


@dataclass(frozen=True)
class LengthMixture:
    """Mixture of lognormals of a token count, clipped to 1..`cap`.

    Attributes:
        weights: shares of the components, summing to 1.
        mu: means of ln tokens.
        sigma: standard deviations of ln tokens.
        cap: largest token count; real services cut there too, so that counts pile up at the cap.
    """

    weights: tuple[float, ...]
    mu: tuple[float, ...]
    sigma: tuple[float, ...]
    cap: int

    def sample(self, requests: int, rng: np.random.Generator) -> NDArray[np.int32]:
        """Draw token counts, shape ``(requests,)``."""
        component = np.searchsorted(np.cumsum(self.weights)[:-1], rng.uniform(size=requests), "right")
        log_tokens = np.asarray(self.mu)[component] + np.asarray(self.sigma)[component] * rng.standard_normal(requests)
        return np.clip(np.rint(np.exp(log_tokens)), 1, self.cap).astype(np.int32)


@dataclass(frozen=True)
class Shape:
    """How requests of one profile arrive and how long they are.

    Attributes:
        renewal_cv: coefficient of variation of the Gamma gaps on the intensity's clock; the gaps' CV on the wall clock
            is larger, since the intensity varies.
        slow_sigma: standard deviation of the log intensity that all sources share.
        slow_theta_s: its correlation time, seconds.
        fast_sigma: standard deviation of the log intensity that each source has of its own.
        fast_theta_s: its correlation time, seconds.
        gate: on/off gate of each source, or none.
        drift_sigma: standard deviation of the log rate over hours, beside the daily profile; its correlation over 600 s
            is `DRIFT_PHI`.
        source_rps: rate of one source, requests/s: the rate at which the profile was measured.
        diurnal_max_to_min: daily maximum over minimum of the rate.
        peak_hour: hour of the daily maximum, 0..24.
        prompt: prompt tokens.
        output: output tokens.
    """

    renewal_cv: float
    slow_sigma: float
    slow_theta_s: float
    fast_sigma: float
    fast_theta_s: float
    gate: Gate | None
    drift_sigma: float
    source_rps: float
    diurnal_max_to_min: float
    peak_hour: float
    prompt: LengthMixture
    output: LengthMixture


SHAPES: dict[str, Shape] = {
    # Measured on the Azure 2023 conversation trace. Its gaps' CV of 1.07 is that of the whole: of a log-OU intensity
    # (.25, 460 s) with Gamma gaps of CV 1.01. The published third prompt component (.15, 8.08, .33) spreads past the
    # limit near 4,100 tokens at which 12 % of the prompts pile up, and is split in two; the outputs' p99 of 705 (trace:
    # 612) called for a new fit (EM on ln tokens).
    # The daily profile is that of ServeGen's m-small (max/min 2.4, peak at hour 20-21 of the trace).
    "chat": Shape(
        renewal_cv=1.03,
        slow_sigma=0.25,
        slow_theta_s=460.0,
        fast_sigma=0.0,
        fast_theta_s=1.0,
        gate=None,
        drift_sigma=0.20,
        source_rps=5.56,
        diurnal_max_to_min=2.4,
        peak_hour=20.5,
        prompt=LengthMixture((0.48, 0.37, 0.04, 0.11), (5.89, 7.00, 7.60, 8.314), (0.82, 0.10, 0.40, 0.006), 14_050),
        output=LengthMixture((0.609, 0.306, 0.065, 0.020), (4.51, 6.00, 6.26, 2.74), (0.51, 0.05, 0.19, 0.17), 1_000),
    ),
    # Measured on the Azure 2023 code trace. The published gate (35 % on, x400, 25 s) with Gamma CV 2.2 and log-OU
    # (.9, 5 s) gives an index of dispersion of 21 at 1 s and 105 at 10 s where the trace has 13 and 70 to 72, so the
    # fast terms are weaker here. The daily profile is assumed: the trace lasts under an hour.
    "code": Shape(
        renewal_cv=1.4,
        slow_sigma=0.0,
        slow_theta_s=460.0,
        fast_sigma=0.65,
        fast_theta_s=5.0,
        gate=Gate(on_s=20.0, off_s=40.0, floor=1 / 4000),
        drift_sigma=0.20,
        source_rps=3.2,
        diurnal_max_to_min=4.0,
        peak_hour=14.0,
        prompt=LengthMixture((0.25, 0.75), (5.18, 7.60), (1.15, 0.75), 7_437),
        output=LengthMixture((0.51, 0.32, 0.17), (2.22, 2.95, 4.19), (0.30, 0.42, 0.80), 2_000),
    ),
    # Measured on ServeGen's r1 (a model of measured clients): published are CV 1.53 and a log intensity of sigma .52
    # with a very long correlation time, which is the daily profile and the drift here. A sinusoid of max/min 4 with
    # this drift spreads hourly rates about 1:5, as measured. The published length mixtures have medians of 202 in and
    # 838 out where the trace has 97 and 1,190; these were fitted to it (EM on ln tokens).
    "reasoning": Shape(
        renewal_cv=1.4,
        slow_sigma=0.0,
        slow_theta_s=460.0,
        fast_sigma=0.16,
        fast_theta_s=5.0,
        gate=None,
        drift_sigma=0.22,
        source_rps=7.86,
        diurnal_max_to_min=4.0,
        peak_hour=15.0,
        prompt=LengthMixture((0.258, 0.297, 0.211, 0.234), (2.88, 4.07, 5.56, 7.55), (0.42, 0.62, 0.40, 1.49), 54_924),
        output=LengthMixture((0.461, 0.233, 0.306), (6.24, 7.22, 8.15), (0.59, 0.19, 0.72), 32_768),
    ),
}
