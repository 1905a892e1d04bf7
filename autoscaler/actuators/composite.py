"""Replicas by one actuator and batch caps by another, in an order that loses no request and leaves none waiting.

Caps rise at once and fall only when the capacity that makes up for them is ready. Replicas rise at once and fall after
the caps, and after the replicas to remove have finished what they had. What has to wait is done by a later call: the
controller repeats its targets each tick.
This module must not know which servers are behind its parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from autoscaler.actuators.base import Access, FleetState, LiveActuator, PartlyFailed, PoolName, pools_of, wanted
from policies.contract import LEAVE_ALONE, ActuationFailed, Bools, Target
from policies.spec import ScalingSpec


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

    def follow(self, members: Mapping[str, Mapping[str, str]]) -> None:
        """Route to these replicas."""
        ...

    def drain(self, pool: PoolName, servers: Sequence[str]) -> Mapping[str, int]:
        """Route no new requests to these; how many each still has."""
        ...

    def undrain(self, pool: PoolName, servers: Sequence[str]) -> None:
        """Route to these again."""
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

        self._follow(failures)
        caps = replace(
            target, batch_cap=np.where(cap_waits, np.nan_to_num(cap_now, nan=1.0), target.batch_cap).astype(np.int64)
        )
        self._part(self.batch_cap, caps, failures)
        self._stop_draining(target, up, failures)
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

    def _follow(self, failures: dict[str, str]) -> None:
        """Route to the replicas that there are, except those being drained."""
        if isinstance(self.replicas, NamesReplicas) and isinstance(self.batch_cap, RoutesRequests):
            members = {label: dict(names) for label, names in self.replicas.members().items()}
            try:
                self.batch_cap.follow(members)
            except PartlyFailed as error:
                failures |= error.failures

    def _stop_draining(self, target: Target, up: Bools, failures: dict[str, str]) -> None:
        """Replicas whose removal is no longer wanted get requests again."""
        if not isinstance(self.batch_cap, RoutesRequests):
            return
        for pool in list(self._leaving):
            if up[pool.row, pool.column] and target.replicas[pool.row, pool.column] != LEAVE_ALONE:
                try:
                    self.batch_cap.undrain(pool, list(self._leaving[pool]))
                    del self._leaving[pool]
                except RuntimeError as error:
                    failures[pool.service] = str(error)

    def _drained(self, target: Target, down: Bools, state: FleetState, failures: dict[str, str]) -> Bools:
        """(n, P) True where the replicas to remove have no request left, or were waited for long enough."""
        done = np.ones_like(down)
        if not (isinstance(self.replicas, NamesReplicas) and isinstance(self.batch_cap, RoutesRequests)):
            return done
        now_s = self._clock()
        for pool, replicas, _ in wanted(target, self._pools):
            at = (pool.row, pool.column)
            if not down[at]:
                continue
            count = int(state.replicas_target[at]) - replicas
            leaving = self._leaving.setdefault(pool, {})
            if len(leaving) != count:
                # Those already drained stay chosen; the rest is filled up with the least loaded of the others.
                order = [*leaving, *(one for one in self.replicas.victims(pool, 10**6) if one not in leaving)]
                chosen = order[:count]
                try:
                    self.batch_cap.undrain(pool, [one for one in leaving if one not in chosen])
                except RuntimeError as error:
                    failures[pool.service] = str(error)
                self._leaving[pool] = leaving = {one: leaving.get(one, now_s) for one in chosen}
            try:
                left = self.batch_cap.drain(pool, list(leaving))
            except RuntimeError as error:
                failures[pool.service] = str(error)
                done[at] = False
                continue
            done[at] = all(not left.get(one) or now_s - since >= self._drain_s for one, since in leaving.items())
            if done[at]:
                self.replicas.prefer(pool, list(leaving))
                del self._leaving[pool]
        return done
