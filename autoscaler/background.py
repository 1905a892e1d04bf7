"""Threads in the background of a controller: work that comes back again and again, and is begun again when it fails.

Nothing here may end in silence: a failure is counted, logged and named until the work has gone well again, and so is
work that does not come back.
This module must not know what the work is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

LOG = logging.getLogger("jevons")
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Background:
    """One thread that works until it is told to stop.

    Args:
        name: of the thread, in problems, the log and metrics.
        work: one round. It may wait on `stopping`, and must return soon after that is set.
        period_s: pause between two rounds; None: one round that ends well is enough.
        stuck_s: a round that takes longer is named among the problems; None: a round may last for ever.
        first_pause_s: pause after a first failure; each further one in a row doubles it, up to a minute.
        now: a clock that never jumps, seconds.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[], None],
        period_s: float | None,
        stuck_s: float | None = None,
        first_pause_s: float = FIRST_PAUSE_S,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.stopping = threading.Event()
        self.restarts = 0
        """How often the work was begun again after a failure."""
        self._work = work
        self._period_s = period_s
        self._stuck_s = stuck_s
        self._first_pause_s = first_pause_s
        self._now = now
        self._failure = ""
        self._began_s: float | None = None  # of the round under way
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str:
        """What is wrong with it now, in words; empty when nothing is."""
        began_s = self._began_s
        for_s = 0.0 if began_s is None else self._now() - began_s
        if self._stuck_s is not None and for_s > self._stuck_s:
            return f"thread {self.name}: has not come back for {for_s:.0f} s"
        return self._failure

    def start(self, after_s: float = 0.0) -> None:
        """Begin the first round after a pause."""
        self._thread = threading.Thread(target=self._run, args=(after_s,), name=f"jevons-{self.name}", daemon=True)
        self._thread.start()

    def stop(self, wait_s: float = 0.0) -> None:
        """No more rounds; wait at most so long for the one under way."""
        self.stopping.set()
        if self._thread is not None:
            self._thread.join(wait_s)

    def _run(self, pause_s: float) -> None:
        next_pause_s = self._first_pause_s
        while not self.stopping.wait(pause_s):
            self._began_s = self._now()
            try:
                self._work()
            except BaseException as error:  # a thread that dies takes its task with it, so that nothing may end it
                pause_s, next_pause_s = next_pause_s, min(2 * next_pause_s, LONGEST_PAUSE_S)
                self.restarts += 1
                self._failure = f"thread {self.name}: {type(error).__name__}: {error}; begun again in {pause_s:g} s"
                LOG.error("%s", self._failure, exc_info=error)
                continue
            finally:
                self._began_s = None
            next_pause_s, self._failure = self._first_pause_s, ""
            if self._period_s is None:
                return
            pause_s = self._period_s
