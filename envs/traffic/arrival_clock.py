"""The clock that a log's arrivals are on, told by how large they are.

Times from the start of a trace stay below three years; what is larger is the Unix clock, in a unit that its size names.
This module must not know where the times were read.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import numpy as np

from envs.traffic.trace import FloatArray, TraceError
from policies.contract import Bools

Unit = Literal["s", "ms", "us", "ns"]
UNITS_S: dict[Unit, float] = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
"""Seconds of each unit that arrivals may be in."""
ENDINGS: dict[Unit, str] = {
    "s": "s|sec|secs|seconds",
    "ms": "ms|msec|millis|milliseconds",
    "us": "us|usec|micros|microseconds",
    "ns": "ns|nsec|nanos|nanoseconds",
}
"""What the name of a column ends in that says its unit."""
FEWEST = 100
"""Requests by which a rate can be judged."""
STRAY_GAP_S, STRAY_FACTOR, STRAY_SHARE = 30 * 86_400.0, 10.0, 0.01
WHOLE_RPS, ANY_RPS = 1.0, 0.05
"""Requests per second below which arrivals in seconds are doubted: whole numbers, and any."""

LATEST_S = 1e8
"""Seconds from the start of a trace, or Unix seconds: three years, or March 1973."""


class Clock(NamedTuple):
    """A unit of the Unix clock."""

    unit: str
    seconds: float

    @property
    def note(self) -> str:
        """What is done with such times, one sentence."""
        return f"arrivals are {self.unit} of the Unix clock and were counted from the first one"


# Each unit holds a thousand times the numbers of the one before: 1973 to 5138, until the next one begins.
CLOCKS = (Clock("seconds", 1.0), Clock("milliseconds", 1e-3), Clock("microseconds", 1e-6), Clock("nanoseconds", 1e-9))


def clock_of(arrivals: FloatArray) -> Clock | None:
    """The unit of arrivals on the Unix clock; None for times from a start.

    Args:
        arrivals: (requests,) finite numbers in any order.

    Raises:
        TraceError: when some are on another clock, or in another unit, than others.
    """
    if not len(arrivals):
        return None
    low, high = float(arrivals.min()), float(arrivals.max())
    first, last = _place(low), _place(high)
    if first != last:
        raise TraceError(
            f"arrivals lie between {low:.12g} ({_named(first)}) and {high:.12g} ({_named(last)}), expected all on one "
            "clock and in one unit"
        )
    return CLOCKS[first] if first >= 0 else None


def unit_named(column: str) -> Unit | None:
    """The unit that the name of a column says.

    >>> [unit_named(name) for name in ("arrival_s", "Time (ms)", "start.us", "timestamp", "items")]
    ['s', 'ms', 'us', None, None]
    """
    words = re.split(r"[^a-z]+", column.strip().lower().rstrip(")]"))
    if len(words) < 2:
        return None
    return next((unit for unit, endings in ENDINGS.items() if words[-1] in endings.split("|")), None)


def doubt_seconds(arrivals: FloatArray) -> str:
    """Why times from a start may not be seconds, in words; empty where nothing speaks against it.

    Whole milliseconds, read as seconds, are a thousand times too slow, and one replica then suffices for anything.

    Args:
        arrivals: (requests,) finite numbers in any order, from a start.
    """
    span = float(np.ptp(arrivals)) if len(arrivals) >= FEWEST else 0.0
    if span <= 0.0:
        return ""
    rps = (len(arrivals) - 1) / span
    whole = bool((arrivals == np.floor(arrivals)).all())
    if rps >= (WHOLE_RPS if whole else ANY_RPS):
        return ""
    return (
        f"{rps:.3g} requests/s over {span / 3600.0:,.3g} h if these are seconds, {1e3 * rps:.3g} requests/s over "
        f"{span / 60e3:,.3g} min if they are milliseconds"
    )


def stray(arrivals: FloatArray) -> Bools:
    """(requests,) which requests lie so far from all others that their time is none: a row of 1970 in a log of today.

    They are the few beyond a gap of more than a month that is ten times as long as what lies on either side of it.

    Args:
        arrivals: (requests,) seconds, in any order.
    """
    order = np.argsort(arrivals, kind="stable")
    strays = np.zeros(len(arrivals), bool)
    low, high = 0, len(arrivals)
    while high - low > 2:
        kept = arrivals[order[low:high]]
        gaps = np.diff(kept)
        cut = int(gaps.argmax()) + 1
        longest_s = max(float(kept[cut - 1] - kept[0]), float(kept[-1] - kept[cut]))
        few = min(cut, len(kept) - cut)
        if gaps[cut - 1] <= max(STRAY_GAP_S, STRAY_FACTOR * longest_s) or few > max(1, STRAY_SHARE * len(kept)):
            break
        low, high = (low + cut, high) if cut == few else (low, low + cut)
    strays[order[:low]] = strays[order[high:]] = True
    return strays


def _place(value: float) -> int:
    """Index in `CLOCKS`, -1 below all."""
    return sum(value >= LATEST_S / clock.seconds for clock in CLOCKS) - 1


def _named(place: int) -> str:
    return f"{CLOCKS[place].unit} of the Unix clock" if place >= 0 else "seconds from a start"
