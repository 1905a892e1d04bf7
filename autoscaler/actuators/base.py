"""The contract of live actuators: apply a target, read what is in force, prove the rights to change it.

Targets are absolute and every call is idempotent: the controller repeats them each tick, and an actuator that had to
wait (for capacity, for a drain) goes on from there. A service with a `LEAVE_ALONE` count is not touched.
This module must not know about any particular server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from autoscaler.stages import left_behind
from policies.contract import LEAVE_ALONE, ActuationFailed, Bools, Floats, Target
from policies.engine import ConfigError
from policies.spec import ScalingSpec

STATE_AGE_S = 2.0
"""Whoever carries targets out goes by what was in force at most so long ago."""
ReplicaLoads = Callable[[], Mapping[str, float]]
"""Running requests by the replica's name, or by its address and port, to remove the least loaded first."""


class PoolName(NamedTuple):
    """One pool of one service, by name and by its place in the arrays."""

    service: str
    pool: str
    row: int
    column: int

    @property
    def label(self) -> str:
        """`service` for the only pool of a service, `service/pool` otherwise."""
        return f"{self.service}/{self.pool}" if self.pool else self.service

    def render(self, template: str) -> str:
        """A name made from a template with ``{service}`` and ``{pool}``."""
        return template.format(service=self.service, pool=self.pool)


@dataclass(frozen=True, eq=False)
class FleetState:
    """What is in force. All arrays (n, P); NaN is unknown, and 0 where a service has no such pool."""

    replicas_target: Floats
    replicas_starting: Floats
    replicas_ready: Floats
    replicas_draining: Floats
    """Beyond those asked for, and paid for: those that finish their requests, and the surplus of a rollout."""
    batch_cap: Floats
    owners: tuple[str, ...]
    """(n,) other autoscalers that act on a service's pools, in words; empty where there is none."""
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""
    owners_unread: tuple[int, ...] = ()
    """Rows of which nobody knows whether another autoscaler acts on them; `problems` says why."""
    set_by: tuple[str, ...] = ()
    """(n,) who set the counts in force, in words; empty where that is not known, or nowhere."""
    edits_put_back: bool = False
    """Whether the counts are declared to be ours, so that what others set is overwritten and not left alone."""

    def author(self, row: int) -> str:
        """Who set the counts of a service, empty where that is not known."""
        return self.set_by[row] if self.set_by else ""

    replicas_stuck: Floats = field(default_factory=lambda: np.zeros(()))
    """(n, P) or one for all: replicas that have been starting for so long that they are not on their way any more.
    They are not in `replicas_starting`; `problems` says why."""
    replicas_stuck_paid: Floats = field(default_factory=lambda: np.zeros(()))
    """(n, P) or one for all: how many of `replicas_stuck` hold their GPUs all the same, such as those that crash."""

    @classmethod
    def unknown(cls, pools: Sequence[PoolName], problems: tuple[str, ...] = ()) -> FleetState:
        """A state of which nothing is known."""
        shape = shape_of(pools)

        def blank() -> Floats:
            values = np.zeros(shape)
            for pool in pools:
                values[pool.row, pool.column] = np.nan
            return values

        return cls(blank(), blank(), blank(), blank(), blank(), ("",) * shape[0], problems)


@dataclass(frozen=True)
class Access:
    """One line of `jevons check`."""

    subject: str
    ok: bool
    detail: str


class Refused(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when a server refused or did not answer.

    Attributes:
        status: HTTP status; 0 when there was no answer.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class PartlyFailed(ActuationFailed):
    """Raised when a target could not be carried out for some services; the others are done.

    Attributes:
        failures: what went wrong by service name.
    """

    def __init__(self, failures: Mapping[str, str]) -> None:
        self.failures = dict(failures)
        shown = [f"{service}: {why}" for service, why in list(self.failures.items())[:3]]
        more = f" (and {len(self.failures) - len(shown)} more services)" if len(self.failures) > len(shown) else ""
        super().__init__("; ".join(shown) + more)


class LiveActuator(Protocol):
    """What carries targets out in a real cluster."""

    def apply(self, target: Target) -> None:
        """Carry out an absolute target; repeating it is harmless.

        Raises:
            PartlyFailed: naming the services for which it could not be done.
        """
        ...

    def state(self) -> FleetState:
        """What is in force now. What cannot be read is NaN; faults of the cluster are not raised."""
        ...

    def check(self) -> list[Access]:
        """Prove that every pool is there and may be changed, without changing anything."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


@runtime_checkable
class Router(Protocol):
    """An actuator that also decides where requests go. It needs no permission to scale for that."""

    def route(self, rows: Bools, adrift: Bools) -> None:
        """Route requests to the replicas that there are; repeating it is harmless.

        Args:
            rows: (n,) services that are followed.
            adrift: (n,) services of which nobody can say whose they are: only a gateway that has forgotten all of its
                servers gets them back.

        Raises:
            PartlyFailed: naming the services for which it could not be done.
        """
        ...


@runtime_checkable
class TellsWrites(Protocol):
    """An actuator that knows which counts were in force for certain, however soon somebody replaced them."""

    def wrote(self) -> Floats:
        """(n, P) counts that the last `apply` wrote; NaN where it wrote none."""
        ...


@runtime_checkable
class DrainsFirst(Protocol):
    """An actuator that lowers a count only once the replicas to remove are empty."""

    def draining(self) -> Bools:
        """(n, P) pools whose count the last `apply` has left as it was until then."""
        ...


class Announcement(NamedTuple):
    """What those who watch a service's objects should know."""

    row: int
    column: int | None
    """Which pool; None for all of the service."""
    warning: bool
    reason: str
    """One word in camel case, such as `ScaledUp`."""
    note: str
    """In a sentence."""
    at_s: float = 0.0
    """Unix time at which it was so."""


@runtime_checkable
class Announces(Protocol):
    """An actuator whose server keeps announcements beside the objects."""

    def announce(self, announcement: Announcement) -> None:
        """Tell it.

        Raises:
            ActuationFailed: when it could not be told.
        """
        ...


def pools_of(specs: Sequence[ScalingSpec]) -> list[PoolName]:
    """Every pool of every service. The only pool of a service needs no name."""
    return [
        PoolName(spec.service, pool.label if len(spec.pools) > 1 else "", row, column)
        for row, spec in enumerate(specs)
        for column, pool in enumerate(spec.pools)
    ]


def refuse_shared(places: Mapping[PoolName, str]) -> None:
    """Refuse pools that have one object: each tick the last of them would set the others' counts or caps back.

    Args:
        places: what holds the target of each pool, in words.

    Raises:
        ConfigError: naming the two pools and what they share.
    """
    owners: dict[str, PoolName] = {}
    for pool, place in places.items():
        first = owners.setdefault(place, pool)
        if first is not pool:
            raise ConfigError(
                f"actuator: {first.label!r} and {pool.label!r} have one object, {place}; give each its own name"
            )


def shape_of(pools: Sequence[PoolName]) -> tuple[int, int]:
    """(n, P) of the arrays that hold the pools."""
    return max(pool.row for pool in pools) + 1, max(pool.column for pool in pools) + 1


def wanted(target: Target, pools: Sequence[PoolName]) -> Iterator[tuple[PoolName, int, int]]:
    """(pool, replicas, batch cap) of every pool that is not to be left alone.

    Raises:
        ActuationFailed: when the tick has gone on without this thread: orders and leases may be others by now.
    """
    for pool in pools:
        replicas = int(target.replicas[pool.row, pool.column])
        if replicas != LEAVE_ALONE:
            if left_behind():
                raise ActuationFailed(f"{pool.label}: the tick has ended, so nothing more of its target is carried out")
            yield pool, replicas, int(target.batch_cap[pool.row, pool.column])
