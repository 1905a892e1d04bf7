"""How long the oldest unserved request has waited: nothing exports it, so it is estimated.

This module must not know where the counts come from.
"""

from __future__ import annotations

import numpy as np

from policies.contract import Floats


class QueueAge:
    """Remembers when the queues of `n` services were last seen empty.

    Args:
        n: services.
        window_s: time between two readings, seconds.
    """

    def __init__(self, n: int, window_s: float) -> None:
        self._window_s = window_s
        self._empty_s = np.full(n, np.nan)  # when the queue was last seen empty

    def oldest_wait_s(self, backlog: Floats, finished_rps: Floats, now_s: float) -> Floats:
        """(n,) estimated age of the oldest unserved request, seconds; NaN where the backlog is unknown.

        By Little's law the last of `backlog` requests waits backlog over rate; and none waits longer than there has
        been a queue.

        Args:
            backlog: (n,) requests that wait.
            finished_rps: (n,) requests finished per second.
            now_s: time of the reading.
        """
        known = ~np.isnan(backlog)
        empty = known & (backlog <= 0)
        self._empty_s = np.where(empty | np.isnan(self._empty_s) | (self._empty_s > now_s), now_s, self._empty_s)
        queued_for_s = now_s - self._empty_s + self._window_s
        with np.errstate(divide="ignore", invalid="ignore"):
            by_rate = np.where(finished_rps > 0, backlog / finished_rps, np.inf)
        return np.where(empty, 0.0, np.where(known, np.minimum(by_rate, queued_for_s), np.nan))
