"""Replicas by one actuator and batch caps by another, in an order that loses no request and leaves none waiting.

Caps rise at once and fall only when the capacity that makes up for them is ready. Replicas rise at once and fall after
the caps, and after the replicas to remove have finished what they had. What has to wait is done by a later call: the
controller repeats its targets each tick.
This module must not know which servers are behind its parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from autoscaler.actuators.base import Access, FleetState, LiveActuator, PartlyFailed, PoolName, pools_of, wanted
from policies.contract import LEAVE_ALONE, ActuationFailed, Bools, Target
from policies.spec import ScalingSpec

ALL_REPLICAS = 10**6
"""More than any pool has."""


@runtime_checkable
class NamesReplicas(Protocol):
    """An actuator of replicas that can say which there are."""

    def members(self) -> Mapping[str, Mapping[str, str]]:
        """Ready replicas by pool label: name to address."""
        ...

    def victims(self, pool: PoolName, count: int) -> list[str]:
        """The replicas that a scale-down by `count` should take."""
        ...

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        """Take these first when the count falls."""
        ...


@runtime_checkable
class RoutesRequests(Protocol):
    """An actuator of caps that decides which replicas get requests."""

    def follow(self, pool: PoolName, members: Mapping[str, str], leaving: Collection[str]) -> None:
        """Route to these replicas, name to address, but send nothing new to those that are leaving."""
        ...

    def drain(self, pool: PoolName, members: Mapping[str, str]) -> Mapping[str, int]:
        """Route no new requests to these; how many each still has."""
        ...


class CompositeActuator:
    """Two actuators as one.

    Args:
        replicas: sets replica counts.
        batch_cap: sets caps; where it routes requests too, it follows the replicas and drains them.
        specs: the services.
        drain_s: longest wait for a replica's requests before it is removed all the same.
        clock: seconds that only go forward.
    """

    def __init__(
        self,
        replicas: LiveActuator,
        batch_cap: LiveActuator,
        specs: Sequence[ScalingSpec],
        drain_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas = replicas
        self.batch_cap = batch_cap
        self._pools = pools_of(specs)
        self._drain_s = drain_s
        self._clock = clock
        self._leaving: dict[PoolName, dict[str, float]] = {}  # replicas being drained, and since when
        self._asked_s: dict[PoolName, float] = {}  # when their removal was asked for last

    def apply(self, target: Target) -> None:
        """Carry out what is safe now. Raises `PartlyFailed`."""
        state = self.state()
        now, cap_now = state.replicas_target, state.batch_cap
        # An unknown count or cap is written as asked.
        up = np.isnan(now) | (target.replicas >= now)
        # Where nobody counts replicas (metrics alone), none can be waited for; where counting failed, it is waited.
        uncounted = np.isnan(state.replicas_ready) & (not state.problems)
        enough = uncounted | (state.replicas_ready >= target.replicas)
        lower_cap = ~np.isnan(cap_now) & (target.batch_cap < cap_now)
        cap_waits = lower_cap & ~enough & up
        failures: dict[str, str] = {}

        caps = replace(
            target, batch_cap=np.where(cap_waits, np.nan_to_num(cap_now, nan=1.0), target.batch_cap).astype(np.int64)
        )
        self._part(self.batch_cap, caps, failures)
        self._stop_draining(target, up)
        ready_to_leave = self._drained(target, ~up, state, failures)
        counts = np.where(up | ready_to_leave, target.replicas, np.nan_to_num(now)).astype(np.int64)
        held = target.replicas == LEAVE_ALONE
        for pool in self._pools:
            # Capacity never goes before its cap has been set.
            if pool.service in failures and not up[pool.row, pool.column]:
                counts[pool.row, pool.column] = int(np.nan_to_num(now[pool.row, pool.column]))
        self._part(self.replicas, replace(target, replicas=np.where(held, LEAVE_ALONE, counts)), failures)
        if failures:
            raise PartlyFailed(failures)

    def route(self, rows: Bools) -> None:
        """Route the requests of the masked services (n,) to the replicas that there are. Raises `PartlyFailed`.

        Those being drained get nothing new, unless nobody has asked for their removal for `drain_s`: a controller that
        may no longer scale does not keep them idle.
        """
        if not (isinstance(self.replicas, NamesReplicas) and isinstance(self.batch_cap, RoutesRequests)):
            return
        now_s = self._clock()
        for pool in [pool for pool in self._leaving if now_s - self._asked_s[pool] > self._drain_s]:
            del self._leaving[pool]
        members, failures = self.replicas.members(), {}
        for pool in self._pools:
            if rows[pool.row] and pool.label in members:
                try:
                    self.batch_cap.follow(pool, members[pool.label], self._leaving.get(pool, {}))
                except RuntimeError as error:
                    failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """Counts of one, caps of the other."""
        counts, caps = self.replicas.state(), self.batch_cap.state()
        owners = tuple(one or other for one, other in zip(counts.owners, caps.owners, strict=True))
        return replace(
            counts,
            batch_cap=caps.batch_cap,
            owners=owners,
            problems=(*counts.problems, *caps.problems),
            owners_unread=tuple(sorted({*counts.owners_unread, *caps.owners_unread})),
        )

    def check(self) -> list[Access]:
        """Both."""
        return [*self.replicas.check(), *self.batch_cap.check()]

    def close(self) -> None:
        """Both."""
        self.replicas.close()
        self.batch_cap.close()

    def _part(self, actuator: LiveActuator, target: Target, failures: dict[str, str]) -> None:
        try:
            actuator.apply(target)
        except PartlyFailed as error:
            failures |= error.failures
        except ActuationFailed as error:
            failures |= {pool.service: str(error) for pool, _, _ in wanted(target, self._pools)}

    def _stop_draining(self, target: Target, up: Bools) -> None:
        """Replicas whose removal is no longer wanted get requests again, from the next routing on.

        One that was drained and given back stays out of routing until it is gone.
        """
        if not (isinstance(self.replicas, NamesReplicas) and self._leaving):
            return
        members = self.replicas.members()
        for pool, replicas, _ in wanted(target, self._pools):
            if pool in self._leaving and up[pool.row, pool.column]:
                surplus = max(0, len(members.get(pool.label, ())) - replicas)
                self._leaving[pool] = dict(list(self._leaving[pool].items())[:surplus])

    def _drained(self, target: Target, down: Bools, state: FleetState, failures: dict[str, str]) -> Bools:
        """(n, P) True where the replicas to remove have no request left, or were waited for long enough."""
        done = np.ones_like(down)
        if not (isinstance(self.replicas, NamesReplicas) and isinstance(self.batch_cap, RoutesRequests)):
            return done
        now_s, members = self._clock(), self.replicas.members()
        for pool, replicas, _ in wanted(target, self._pools):
            at = (pool.row, pool.column)
            if not down[at]:
                continue
            order = self.replicas.victims(pool, ALL_REPLICAS)
            # Some may be there still that an earlier scale-down has given back.
            count = max(int(state.replicas_target[at]), len(order)) - replicas
            # Those already drained stay chosen; the rest is filled up with the least loaded of the others.
            draining = self._leaving.get(pool, {})
            order.sort(key=lambda one: one not in draining)
            self._leaving[pool] = leaving = {one: draining.get(one, now_s) for one in order[:count]}
            self._asked_s[pool] = now_s
            known = members.get(pool.label, {})
            try:
                left = self.batch_cap.drain(pool, {one: known[one] for one in leaving if one in known})
            except RuntimeError as error:
                failures[pool.service] = str(error)
                done[at] = False
                continue
            done[at] = all(not left.get(one) or now_s - since >= self._drain_s for one, since in leaving.items())
            if done[at]:
                self.replicas.prefer(pool, list(leaving))
        return done
