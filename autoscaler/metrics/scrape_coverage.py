"""Whether what is scraped covers a service: fresh, of enough of its replicas, and each of them once.

This module must not know what the series mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np

from autoscaler.metrics.client import PrometheusConfig
from policies.contract import Bools, Floats


class Coverage:
    """Judges every reading of `n` services.

    Args:
        services: names, for sentences.
        config: the age, the share of replicas and the discovery time that are allowed.
        counts_known: whether replica counts come from an actuator, so that too many series can be told.
    """

    def __init__(self, services: Sequence[str], config: PrometheusConfig, counts_known: bool) -> None:
        self._services = tuple(services)
        self._config = config
        self._counts_known = counts_known
        self._twice = np.zeros(len(services), bool)  # whether the last reading had too many series
        self._ready_history: deque[tuple[float, Floats]] = deque()

    def lost(
        self,
        values: Mapping[str, Floats],
        ready: Floats,
        draining: Floats,
        now_s: float,
        empty: Bools,
        problems: list[str],
    ) -> Bools:
        """(n,) True where a service's series are stale, cover too few of its replicas, or are there twice.

        Args:
            values: signals by name; ``sample_time`` (n,) and ``seen`` (n, P) are looked at where they are there.
            ready: (n, P) replicas.
            draining: (n, P) replicas.
            now_s: time of the reading.
            empty: (n,) True where a service has no replica, so that nothing needs to be scraped.
            problems: told what is wrong, in words.
        """
        n, config = len(self._services), self._config
        newest = values["sample_time"] if "sample_time" in values else np.full(n, np.nan)
        age_s = now_s - newest
        stale = ~(age_s <= config.max_age_s) & ~empty & ~np.isnan(newest)
        seen_count = values["seen"].sum(axis=1) if "seen" in values else np.full(n, np.nan)
        ready_count, live = ready.sum(axis=1), (ready + draining).sum(axis=1)
        self._ready_history.append((now_s, ready_count))
        while len(self._ready_history) > 1 and self._ready_history[0][0] < now_s - config.discovery_s:
            self._ready_history.popleft()
        # A clock that went back leaves readings from the future behind.
        expected = np.min([count for at_s, count in self._ready_history if at_s <= now_s], axis=0)
        with np.errstate(invalid="ignore"):
            partial = (seen_count < config.min_coverage * expected) & (expected >= 1)
            many = (seen_count >= 2 * live) & (live >= 1) & self._counts_known
        # A replica that was just replaced is seen beside its successor for one window.
        twice, self._twice = many & self._twice, many
        for row in np.flatnonzero(stale | partial | twice):
            name = self._services[row]
            if stale[row]:
                problems.append(f"{name}: the newest sample is {age_s[row]:.0f} s old")
            elif partial[row]:
                problems.append(f"{name}: {seen_count[row]:.0f} of {expected[row]:.0f} replicas are scraped")
            else:
                problems.append(f"{name}: {seen_count[row]:.0f} series for {live[row]:.0f} replicas: scraped twice?")
        return np.asarray(stale | partial | twice)
