"""Whether the loop of a controller goes on: leases, health, readiness and the end of a stuck process hang on it.

This module must not know what a tick does.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable


class Progress:
    """When the last tick came to its end, and when the last one was completed.

    Args:
        stall_s: without an end of a tick for so long, the loop stands still; without a completed one it does not do its
            work, seconds.
        now: a clock that never jumps, seconds.
    """

    def __init__(self, stall_s: float, now: Callable[[], float] = time.monotonic) -> None:
        self.stall_s = stall_s
        self.ticks = 0
        """How many ticks have come to their end."""
        self._now = now
        self._ended_s = self._completed_s = now()

    def ended(self) -> None:
        """A tick has come to its end: with a decision, standing by, or with an error that was named."""
        self.ticks += 1
        self._ended_s = self._now()

    def completed(self) -> None:
        """A tick has done what it is for: it has decided, or stood by."""
        self._completed_s = self._now()

    @property
    def age_s(self) -> float:
        """Seconds since the last end of a tick; since the start before the first."""
        return self._now() - self._ended_s

    def stalled(self) -> str:
        """Why the loop counts as standing still, in words; empty while it goes on."""
        age_s = self.age_s
        return f"no tick has come to its end for {age_s:.0f} s" if age_s > self.stall_s else ""

    def failing(self) -> str:
        """Why another controller should have its services, in words; empty while ticks are completed."""
        age_s = self._now() - self._completed_s
        return f"no tick has been completed for {age_s:.0f} s" if age_s > self.stall_s else ""

    def unready(self) -> str:
        """Why nothing is decided here yet, or any more; empty when ticks come."""
        return self.stalled() or ("" if self.ticks else "no tick has come to its end yet")


class Watchdog:
    """Ends this process when a loop in it stands still, with the stacks of all its threads on standard error.

    The timer is `faulthandler`'s: a native thread that needs no interpreter lock, so that native code which never gives
    that lock back cannot stop it. A process has one such timer; it is set to the loop that is due first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._due_s: dict[str, float] = {}

    def fed(self, name: str, limit_s: float) -> None:
        """The named loop is alive, and will say so again within `limit_s`."""
        with self._lock:
            self._due_s[name] = time.monotonic() + limit_s
            self._set()

    def forget(self, name: str) -> None:
        """The named loop has ended in order."""
        with self._lock:
            self._due_s.pop(name, None)
            self._set()

    def _set(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._due_s:
            left_s = max(min(self._due_s.values()) - time.monotonic(), 0.001)
            faulthandler.dump_traceback_later(left_s, exit=True, file=sys.__stderr__ or 2)
