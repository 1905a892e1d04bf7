"""The controller's clock: Unix time at the start of the process, then only what has really passed.

A wall clock that jumps (by hand, by NTP) therefore moves no tick, no cooldown and no lease.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol


class StoppableClock(Protocol):
    """A clock whose waits can be ended."""

    @property
    def now_s(self) -> float:
        """Seconds on this clock."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Return when the clock reads `time_s`, or `stop` is called."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        ...

    def stop(self) -> None:
        """End the present wait and every later one."""
        ...


class SteadyWallClock:
    """Time for a live controller; `stop` ends a wait at once.

    Args:
        wall: Unix time, asked once.
        steady: seconds that never jump.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._steady = steady
        self._offset_s = wall() - steady()
        self._stop = threading.Event()

    @property
    def now_s(self) -> float:
        """Unix time, as of the start of the process plus what has passed since, seconds."""
        return self._steady() + self._offset_s

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def wait_until(self, time_s: float) -> None:
        """Return when the clock reads `time_s`, or `stop` is called."""
        self._stop.wait(max(time_s - self.now_s, 0.0))

    def stop(self) -> None:
        """End the present wait and every later one."""
        self._stop.set()
