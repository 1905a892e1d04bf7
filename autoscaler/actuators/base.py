"""The contract of live actuators: apply a target, read what is in force, prove the rights to change it.

Targets are absolute and every call is idempotent: the controller repeats them each tick, and an actuator that had to
wait (for capacity, for a drain) goes on from there. A service with a `LEAVE_ALONE` count is not touched.
This module must not know about any particular server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from policies.contract import LEAVE_ALONE, ActuationFailed, Bools, Floats, Target
from policies.spec import ScalingSpec

ReplicaLoads = Callable[[], Mapping[str, float]]
"""Running requests by replica name, to remove the least loaded first."""


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
    batch_cap: Floats
    owners: tuple[str, ...]
    """(n,) other autoscalers that act on a service's pools, in words; empty where there is none."""
    problems: tuple[str, ...] = ()
    """What could not be read, in words."""
    owners_unread: tuple[int, ...] = ()
    """Rows of which nobody knows whether another autoscaler acts on them; `problems` says why."""

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

    def route(self, rows: Bools) -> None:
        """Route the requests of the masked services (n,) to the replicas that there are; repeating it is harmless.

        Raises:
            PartlyFailed: naming the services for which it could not be done.
        """
        ...


def pools_of(specs: Sequence[ScalingSpec]) -> list[PoolName]:
    """Every pool of every service. The only pool of a service needs no name."""
    return [
        PoolName(spec.service, pool.label if len(spec.pools) > 1 else "", row, column)
        for row, spec in enumerate(specs)
        for column, pool in enumerate(spec.pools)
    ]


def shape_of(pools: Sequence[PoolName]) -> tuple[int, int]:
    """(n, P) of the arrays that hold the pools."""
    return max(pool.row for pool in pools) + 1, max(pool.column for pool in pools) + 1


def wanted(target: Target, pools: Sequence[PoolName]) -> Iterator[tuple[PoolName, int, int]]:
    """(pool, replicas, batch cap) of every pool that is not to be left alone."""
    for pool in pools:
        replicas = int(target.replicas[pool.row, pool.column])
        if replicas != LEAVE_ALONE:
            yield pool, replicas, int(target.batch_cap[pool.row, pool.column])
