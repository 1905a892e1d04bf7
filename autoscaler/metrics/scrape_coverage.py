"""Whether what is scraped covers a service: fresh, of enough of its replicas, and of no more than there are.

Counted are targets: a replica is one, however many series it has and however often it is scraped.
This module must not know what the series mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np

from autoscaler.metrics.client import PrometheusConfig
from autoscaler.problem_texts import some_of
from policies.contract import Bools, Floats

RATED = 2
"""Samples of a window that a rate needs."""
SAID_WINDOWS = 3.0
"""Where every other window has enough samples, it is said all the time that some have not."""


@dataclass(frozen=True)
class Targets:
    """What is scraped of `n` services.

    Attributes:
        scrapers: for each service, who has scraped each of its targets within the window, by the target's name.
        newest_s: for each service, when each target's newest sample was taken, seconds since the epoch; also where it
            was before the window.
        samples: for each service, how many samples of each target the window holds.
    """

    scrapers: Sequence[Mapping[str, Set[str]]]
    newest_s: Sequence[Mapping[str, float]]
    samples: Sequence[Mapping[str, float]]

    def known(self) -> list[set[str]]:
        """The targets of each service that are scraped, within the window or before it."""
        return [set(times) | set(found) for times, found in zip(self.newest_s, self.scrapers, strict=True)]

    def newest(self) -> Floats:
        """(n,) when each service's newest sample was taken; NaN without any."""
        return np.array([max(times.values(), default=np.nan) for times in self.newest_s], np.float64)


class Coverage:
    """Judges every reading of `n` services.

    Args:
        services: names, for sentences.
        config: the age, the share of replicas and the discovery time that are allowed.
        window_s: window of rates, seconds; it holds at least two scrapes.
    """

    def __init__(self, services: Sequence[str], config: PrometheusConfig, window_s: float) -> None:
        self._services = tuple(services)
        self._config = config
        self._window_s = window_s
        self._seldom_s = np.full(len(services), -np.inf)  # when each last had too few samples in its window
        self._since_s = np.full(len(services), np.inf)  # since when each has samples
        self._ready_history: deque[tuple[float, Floats]] = deque()
        self._alive_history: deque[tuple[float, list[dict[str, float]], Floats]] = deque()

    def lost(
        self, targets: Targets, ready: Floats, live: Floats, now_s: float, empty: Bools, problems: list[str]
    ) -> Bools:
        """(n,) True where a service's series are stale, cover too few of its replicas, or are of too many.

        A replica is covered when its window has the samples that a rate needs: else its load would be left out.

        Args:
            targets: what is scraped.
            ready: (n,) replicas that serve.
            live: (n,) replicas that may be scraped: starting, ready, draining; NaN where nobody but the metrics knows.
            now_s: time of the reading.
            empty: (n,) True where a service has no replica, so that nothing needs to be scraped.
            problems: told what is wrong, in words.
        """
        config = self._config
        newest = targets.newest()
        age_s = now_s - newest
        stale = ~(age_s <= config.max_age_s) & ~empty & ~np.isnan(newest)
        seen = np.array([len(found) for found in targets.scrapers], np.float64)
        known = np.array([len(found) for found in targets.known()], np.float64)
        rated = np.array([sum(count >= RATED for count in counts.values()) for counts in targets.samples], np.float64)
        expected = self._expected(ready, now_s)
        with np.errstate(invalid="ignore"):
            enough = config.min_coverage * expected
            partial = (rated < enough) & (expected >= 1) & (known > 0)
            # Those that are there and yet have no rate: it is the window that is too short for how they are scraped.
            seldom = (partial & (known >= enough)) | ((seen == 0) & (known > 0) & ~empty)
        self._name_seldom(seldom & ~stale, age_s, now_s, problems)
        many, most = self._too_many(targets, live, now_s)
        self._name_duplicates(targets, problems)
        problems += [
            f"{self._services[row]}: no series of its replicas in the last {self._window_s:g} s"
            for row in np.flatnonzero((known == 0) & ~empty)
        ]
        for row in np.flatnonzero(stale | partial | many):
            name = self._services[row]
            if stale[row]:
                problems.append(f"{name}: the newest sample is {age_s[row]:.0f} s old")
            elif partial[row] and not seldom[row]:
                problems.append(f"{name}: {seen[row]:.0f} of {expected[row]:.0f} replicas are scraped")
            elif many[row]:
                problems.append(
                    f"{name}: {most[row]:.0f} targets are scraped for {live[row]:.0f} replicas: one replica under two "
                    f"values of the label {config.replica_label}, or replicas of something else"
                )
        return np.asarray(stale | partial | many | seldom)

    def _name_seldom(self, seldom: Bools, age_s: Floats, now_s: float, problems: list[str]) -> None:
        gone = np.isnan(age_s)
        self._since_s = np.where(gone, np.inf, np.fmin(self._since_s, now_s))
        self._seldom_s[gone | (self._seldom_s > now_s)] = -np.inf  # a clock may go back
        self._seldom_s[seldom] = now_s
        for row in np.flatnonzero(now_s - self._seldom_s < SAID_WINDOWS * self._window_s):
            name, window = self._services[row], f"the window of {self._window_s:g} s"
            if now_s - self._since_s[row] < self._window_s:
                problems.append(
                    f"{name}: most of its replicas do not yet have the {RATED} samples in {window} that rates need"
                )
            else:
                problems.append(
                    f"{name}: scraped too seldom, most of its replicas lack the {RATED} samples in {window} that rates "
                    f"need, and the newest is {age_s[row]:.0f} s old: scrape more often, or set a longer "
                    "metrics.window_s"
                )

    def _expected(self, ready: Floats, now_s: float) -> Floats:
        """(n,) replicas that have been ready for long enough to be scraped; NaN where nobody has known for as long."""
        history = self._ready_history
        while history and history[-1][0] > now_s:  # a clock that went back
            history.pop()
        history.append((now_s, ready))
        while len(history) > 1 and history[0][0] < now_s - self._config.discovery_s:
            history.popleft()
        # A reading that failed says nothing: the others tell what has been ready.
        fewest: Floats = np.fmin.reduce([count for _, count in history])
        return fewest

    def _too_many(self, targets: Targets, live: Floats, now_s: float) -> tuple[Bools, Floats]:
        """(n,) True where more targets lived at one moment than there were replicas, and (n,) how many did.

        A replica that is gone stays in the window for a while. But a target that had a sample at one reading, and has
        a newer one half a window later, was there at the first reading: so many replicas must have been, too.
        """
        half_s = self._window_s / 2.0
        alive = [{one: at_s for one, at_s in times.items() if at_s >= now_s - half_s} for times in targets.newest_s]
        history = self._alive_history
        while history and history[-1][0] > now_s:  # a clock that went back
            history.pop()
        history.append((now_s, alive, live))
        while len(history) > 1 and history[1][0] <= now_s - half_s:
            history.popleft()
        first_s, before, _ = history[0]
        if first_s > now_s - half_s:
            return np.zeros(len(live), bool), np.zeros(len(live))
        both = np.array(
            [
                sum(times.get(one, at_s) > at_s for one, at_s in then.items())
                for times, then in zip(alive, before, strict=True)
            ],
            np.float64,
        )
        most_live = np.max([counts for _, _, counts in history], axis=0)  # NaN where any of them is
        return (both > most_live) & (most_live >= 1), both

    def _name_duplicates(self, targets: Targets, problems: list[str]) -> None:
        for name, found in zip(self._services, targets.scrapers, strict=True):
            twice = {target: scrapers for target, scrapers in found.items() if len(scrapers) > 1}
            if twice:
                by, which = some_of(sorted(set().union(*twice.values()))), some_of(sorted(twice))
                problems.append(f"{name}: {len(twice)} of {len(found)} replicas are scraped twice, by {by}: {which}")
