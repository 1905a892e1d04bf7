"""Replicas by one actuator and batch caps by another, in an order that loses no request and leaves none waiting.

Caps rise at once and fall only when the capacity that makes up for them is ready. Replicas rise at once and fall after
the caps, and after the replicas to remove have finished what they had. What has to wait is done by a later call: the
controller repeats its targets each tick.
This module must not know which servers are behind its parts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np

from autoscaler.actuators.base import (
    STATE_AGE_S,
    Access,
    Announcement,
    Announces,
    FleetState,
    LiveActuator,
    PartlyFailed,
    PoolName,
    TellsWrites,
    pools_of,
    shape_of,
    wanted,
)
from autoscaler.stages import left_behind
from policies.contract import LEAVE_ALONE, ActuationFailed, Bools, Floats, Ints, Target
from policies.spec import ScalingSpec

LOG = logging.getLogger("jevons")
ALL_REPLICAS = 10**6
"""More than any pool has."""


@runtime_checkable
class NamesReplicas(Protocol):
    """An actuator of replicas that can say which there are."""

    def members(self) -> Mapping[str, Mapping[str, str]]:
        """Ready replicas by pool label: name to address."""
        ...

    def victims(self, pool: PoolName, count: int) -> list[str]:
        """The replicas that a scale-down by `count` should take. Raises `RuntimeError` when they are not known."""
        ...

    def prefer(self, pool: PoolName, replicas: Sequence[str]) -> None:
        """Take these first when the count falls."""
        ...

    def rehearse(self, pool: PoolName, count: int) -> None:
        """Try a scale-down to `count` without making it. Raises `RuntimeError` when it would be refused."""
        ...


@runtime_checkable
class RoutesRequests(Protocol):
    """An actuator of caps that decides which replicas get requests."""

    def routes(self, service: str) -> bool:
        """Whether it decides that for a service."""
        ...

    def follow(self, pool: PoolName, members: Mapping[str, str], leaving: Collection[str]) -> None:
        """Route to these replicas, name to address, but send nothing new to those that are leaving."""
        ...

    def refill(self, pool: PoolName, members: Mapping[str, str]) -> bool:
        """Route to these where none of our servers is in service, and change nothing elsewhere; whether it was so."""
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
        self._services = [spec.service for spec in specs]
        self._drain_s = drain_s
        self._clock = clock
        self._leaving: dict[PoolName, dict[str, float]] = {}  # replicas being drained, and since when
        self._asked_s: dict[PoolName, float] = {}  # when their removal was asked for last
        self._given_back: dict[PoolName, set[str]] = {}  # replicas that may still be listed, and are going
        self._members: dict[str, Mapping[str, str]] = {}  # as last known, by pool label
        self._waits = np.zeros(shape_of(self._pools), bool)
        self._state = FleetState.unknown(self._pools)
        self._read_s = -np.inf
        self._written = False  # whether targets were carried out since it was read

    def apply(self, target: Target) -> None:
        """Carry out what is safe now. Raises `PartlyFailed`."""
        if self._written or time.monotonic() - self._read_s > STATE_AGE_S:
            self.state()
        self._written, state = True, self._state
        now, cap_now = state.replicas_target, state.batch_cap
        # An unknown count or cap is written as asked.
        up = np.isnan(now) | (target.replicas >= now)
        # Where nobody counts replicas (metrics alone), none can be waited for; where counting failed, it is waited.
        uncounted = np.isnan(state.replicas_ready) & (not state.problems)
        # One that will never come is not waited for either.
        enough = uncounted | (state.replicas_ready + state.replicas_stuck >= target.replicas)
        lower_cap = ~np.isnan(cap_now) & (target.batch_cap < cap_now)
        cap_waits = lower_cap & ~enough & up
        failures: dict[str, str] = {}

        caps = replace(
            target, batch_cap=np.where(cap_waits, np.nan_to_num(cap_now, nan=1.0), target.batch_cap).astype(np.int64)
        )
        self._part(self.batch_cap, caps, failures)
        self._stop_draining(target.replicas, up & (target.replicas != LEAVE_ALONE))
        ready_to_leave = self._drained(target, ~up, state, failures)
        counts = np.where(up | ready_to_leave, target.replicas, np.nan_to_num(now)).astype(np.int64)
        held = target.replicas == LEAVE_ALONE
        for pool in self._pools:
            # Capacity never goes before its cap has been set.
            if pool.service in failures and not up[pool.row, pool.column]:
                counts[pool.row, pool.column] = int(np.nan_to_num(now[pool.row, pool.column]))
        self._part(self.replicas, replace(target, replicas=np.where(held, LEAVE_ALONE, counts)), failures)
        for pool, leaving in self._leaving.items():
            at = (pool.row, pool.column)
            gone = not (up[at] or held[at]) and ready_to_leave[at]
            # Who is not routed is not refilled either, and nobody would forget them.
            if gone and pool.service not in failures and self._routes(pool):
                self._given_back.setdefault(pool, set()).update(leaving)
        failed = np.array([[one in failures] for one in self._services], bool)
        self._stop_draining(now, ~up & failed)
        self._waits = ~up & ~ready_to_leave
        if failures:
            raise PartlyFailed(failures)

    def route(self, rows: Bools, adrift: Bools) -> None:
        """Route the requests of `rows` (n,) to the replicas that there are. Raises `PartlyFailed`.

        Those being drained get nothing new, unless nobody has asked for their removal for `drain_s`: a controller that
        may no longer scale does not keep them idle. Where it is not known which replicas there are, and for the
        services `adrift` (n,), only an empty gateway is filled, with those that were last known: nobody has newer
        knowledge that they contradict, and health checks take out what has gone since.
        """
        if not (isinstance(self.replicas, NamesReplicas) and isinstance(self.batch_cap, RoutesRequests)):
            return
        routed = [pool for pool in self._pools if (rows | adrift)[pool.row] and self.batch_cap.routes(pool.service)]
        if not routed:
            return
        now_s = self._clock()
        for pool in [pool for pool in self._leaving if now_s - self._asked_s[pool] > self._drain_s]:
            del self._leaving[pool]
        members = self.replicas.members() if rows.any() else {}
        self._members |= members
        for pool, going in self._given_back.items():
            going &= set(members.get(pool.label, going))
        failures: dict[str, str] = {}
        for pool in routed:
            try:
                if rows[pool.row] and pool.label in members:
                    self.batch_cap.follow(pool, members[pool.label], self._leaving.get(pool, {}))
                else:
                    self._refill(self.batch_cap, pool)
            except RuntimeError as error:
                failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """Counts of one, caps of the other."""
        began_s = time.monotonic()
        counts, caps = self.replicas.state(), self.batch_cap.state()
        owners = tuple(one or other for one, other in zip(counts.owners, caps.owners, strict=True))
        state = replace(
            counts,
            batch_cap=caps.batch_cap,
            owners=owners,
            problems=(*counts.problems, *caps.problems),
            owners_unread=tuple(sorted({*counts.owners_unread, *caps.owners_unread})),
        )
        if not left_behind():  # a newer reading, or what has been written since, must not be undone
            self._state, self._read_s, self._written = state, began_s, False
        return state

    def wrote(self) -> Floats:
        """(n, P) counts that the last `apply` wrote, where their actuator tells."""
        if isinstance(self.replicas, TellsWrites):
            return self.replicas.wrote()
        return np.full(shape_of(self._pools), np.nan)

    def draining(self) -> Bools:
        """(n, P) pools whose count waits for a drain, as of the last `apply`."""
        return self._waits

    def announce(self, announcement: Announcement) -> None:
        """Beside the replicas' objects, where their actuator can. Raises `ActuationFailed`."""
        if isinstance(self.replicas, Announces):
            self.replicas.announce(announcement)

    def check(self) -> list[Access]:
        """Both."""
        return [*self.replicas.check(), *self.batch_cap.check()]

    def close(self) -> None:
        """Both."""
        self.replicas.close()
        self.batch_cap.close()

    def _routes(self, pool: PoolName) -> bool:
        return isinstance(self.batch_cap, RoutesRequests) and self.batch_cap.routes(pool.service)

    def _part(self, actuator: LiveActuator, target: Target, failures: dict[str, str]) -> None:
        try:
            actuator.apply(target)
        except PartlyFailed as error:
            failures |= error.failures
        except ActuationFailed as error:
            failures |= {pool.service: str(error) for pool, _, _ in wanted(target, self._pools)}

    def _refill(self, gateway: RoutesRequests, pool: PoolName) -> None:
        """Fill a gateway that has forgotten its servers. Raises `RuntimeError` where nobody knows with what."""
        last = self._members.get(pool.label)
        if last is not None:  # those that were to go may be gone by now, unless there are no others
            leaving = self._given_back.get(pool, set()) | self._leaving.get(pool, {}).keys()
            last = {one: where for one, where in last.items() if one not in leaving} or last
        if not gateway.refill(pool, last or {}):
            return
        if last is None:
            raise RuntimeError("its gateway has no server in service, and its replicas are not known")
        if last:
            LOG.warning(
                "%s: its gateway had no server in service, and got the %d replicas that were last seen ready",
                pool.label,
                len(last),
            )

    def _stop_draining(self, counts: Ints | Floats, pools: Bools) -> None:
        """Replicas of the masked pools (n, P) whose removal is not wanted, or has failed, are routed to again.

        One that was drained and given back stays out of routing until it is gone: those above `counts` (n, P).
        """
        stopped = [pool for pool in self._leaving if pools[pool.row, pool.column]]
        if not (isinstance(self.replicas, NamesReplicas) and stopped):
            return
        members = self.replicas.members()
        for pool in stopped:
            there = members.get(pool.label, {})
            still = [(one, since_s) for one, since_s in self._leaving[pool].items() if one in there]
            self._leaving[pool] = dict(still[: max(0, len(there) - int(counts[pool.row, pool.column]))])

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
            try:
                order = self.replicas.victims(pool, ALL_REPLICAS)
            except RuntimeError as error:
                failures[pool.service] = str(error)
                done[at] = False
                continue
            # Some may be there still that an earlier scale-down has given back.
            count = max(int(state.replicas_target[at]), len(order)) - replicas
            # Those already drained stay chosen; the rest is filled up with the least loaded of the others.
            draining = self._leaving.get(pool, {})
            order.sort(key=lambda one: one not in draining)
            leaving = {one: draining.get(one, now_s) for one in order[:count]}
            self.replicas.prefer(pool, list(leaving))
            known = members.get(pool.label, {})
            try:
                if leaving.keys() - draining.keys():  # none is drained for a removal that would be refused
                    self.replicas.rehearse(pool, replicas)
                self._leaving[pool], self._asked_s[pool] = leaving, now_s
                left = self.batch_cap.drain(pool, {one: known[one] for one in leaving if one in known})
            except RuntimeError as error:
                failures[pool.service] = str(error)
                done[at] = False
                continue
            done[at] = all(not left.get(one) or now_s - since >= self._drain_s for one, since in leaving.items())
        return done
