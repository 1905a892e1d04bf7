"""Starts that never end: a replica that has been starting for several cold starts is not on its way any more.

No room on any node, an image that cannot be pulled, a crash loop, an exhausted quota: such a replica may stay so for
days. It costs nothing to give back, and it must not be a reason to keep replicas that are ready.
This module must not know how replicas are started, nor what is decided.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import FleetState, PoolName, pools_of
from policies.contract import Floats
from policies.engine import NonNegative, Positive, StrictModel
from policies.spec import ScalingSpec

NAMED = 3
"""Replicas named in one sentence."""


class StartSpec(StrictModel):
    """How long a start may take."""

    cold_starts: Positive = Field(
        default=3.0,
        description="A replica that has been starting for so many cold starts of its pool is not on its way any more:"
        " it is given back first, and keeps no ready replica.",
    )
    at_least_s: NonNegative = Field(default=300.0, description="No start is given up before this time, seconds.")


class Start(NamedTuple):
    """One replica that starts, as whoever starts it sees it."""

    name: str
    age_s: float
    reason: str
    """Why it does not get ready, in its own words; empty where nothing is wrong yet."""
    placed: bool = False
    """Whether it is on a node, and so holds its GPUs."""


class StartTimes:
    """When each of a changing number of starting replicas was first seen; the longest-starting ones leave first."""

    def __init__(self) -> None:
        self._since_s: list[float] = []

    def ages_s(self, count: int, now_s: float) -> Floats:
        """(count,) seconds since each of them was first seen, longest first."""
        del self._since_s[: max(0, len(self._since_s) - count)]
        self._since_s.extend([now_s] * (count - len(self._since_s)))
        return now_s - np.array(self._since_s)


class StartLedger:
    """Tells the replicas that are on their way from those that are not.

    Args:
        specs: the services; a pool's cold start is the expected time of its engine profile.
        spec: how long a start may take.
        clock: seconds that only go forward.
    """

    def __init__(
        self, specs: Sequence[ScalingSpec], spec: StartSpec, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._limit_s = {
            pool: max(spec.at_least_s, spec.cold_starts * specs[pool.row].pools[pool.column].start.total_s)
            for pool in pools_of(specs)
        }
        self._times = {pool: StartTimes() for pool in self._limit_s}

    def settle(self, state: FleetState, starts: Mapping[PoolName, Sequence[Start]] | None = None) -> FleetState:
        """The state with starts that take too long in `replicas_stuck` instead of `replicas_starting`, and named.

        Those of them that are known to hold their GPUs are in `replicas_stuck_paid` as well.

        Args:
            state: what is in force; every replica that is not ready counts as starting.
            starts: what is known of single replicas. Those of which nothing is known are as old as they have been
                seen here; a reason without a name (`Start("", 0, why)`) is theirs.
        """
        now_s = self._clock()
        starting, stuck = state.replicas_starting.copy(), np.zeros_like(state.replicas_starting)
        paid = np.zeros_like(stuck)
        problems = list(state.problems)
        for pool, limit_s in self._limit_s.items():
            at = (pool.row, pool.column)
            if np.isnan(starting[at]):
                continue
            count, known = int(starting[at]), list((starts or {}).get(pool, ()))
            ages_s = self._times[pool].ages_s(count, now_s)
            told_s = np.sort([one.age_s for one in known if one.name])[::-1][:count]
            ages_s[: len(told_s)] = np.maximum(ages_s[: len(told_s)], told_s)
            late = int((ages_s > limit_s).sum())
            if late:
                starting[at] -= late
                stuck[at] = late
                paid[at] = min(late, sum(one.placed for one in known if one.name and one.age_s > limit_s))
                problems.append(_sentence(pool, late, known, limit_s))
        return replace(
            state,
            replicas_starting=starting,
            replicas_stuck=stuck,
            replicas_stuck_paid=paid,
            problems=tuple(problems),
        )


def _sentence(pool: PoolName, late: int, known: Sequence[Start], limit_s: float) -> str:
    """The same for as long as nothing changes."""
    oldest = sorted((one for one in known if one.name and one.age_s > limit_s), key=lambda one: (-one.age_s, one.name))
    old = sorted(oldest[:late], key=lambda one: one.name)  # there may be more pods than replicas that were asked for
    shown = [f"{one.name}: {one.reason}" if one.reason else one.name for one in old[:NAMED]]
    if late > len(old):
        shown += [one.reason for one in known if not one.name]
    why = f" ({'; '.join(shown)})" if shown else ""
    what = (
        f"{late} {'replica has' if late == 1 else 'replicas have'} been starting for more than {limit_s / 60:.0f} min"
    )
    return f"{pool.label}: {what} and will be given back first{why}"
