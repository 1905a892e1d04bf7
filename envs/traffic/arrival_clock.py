"""The clock that a log's arrivals are on, told by how large they are.

Times from the start of a trace stay below three years; what is larger is the Unix clock, in a unit that its size names.
This module must not know where the times were read.
"""

from __future__ import annotations

from typing import NamedTuple

from envs.traffic.trace import FloatArray, TraceError

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


def _place(value: float) -> int:
    """Index in `CLOCKS`, -1 below all."""
    return sum(value >= LATEST_S / clock.seconds for clock in CLOCKS) - 1


def _named(place: int) -> str:
    return f"{CLOCKS[place].unit} of the Unix clock" if place >= 0 else "seconds from a start"
