"""Exactly one acting controller per service: leases with fencing tokens.

A lease is renewed by its holder. Another controller takes it over only after it has seen no new renewal for the lease's
whole duration *on its own steady clock*, so no jump of any wall clock can create two holders; the holder itself stops
acting well before. A holder on this very host whose process is gone is replaced at once. The token grows with every
change of holder: a write with an older token is refused.
This module must not know what holders do.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
import sqlalchemy as sa
from pydantic import Field, model_validator

from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import LEASES, Database, put_missing
from policies.contract import Ints
from policies.engine import Positive, StrictModel
from policies.names import Name

SteadyClock = Callable[[], float]
NOT_HELD = -1
TRUSTED_SHARE = 2.0 / 3.0
"""Part of a lease's duration after its last renewal in which the holder still acts."""


class LeasesUnavailable(RuntimeError):  # noqa: N818 - reads as the state that it reports
    """Raised when nobody can be asked who holds a lease."""


class LeaseSpec(StrictModel):
    """How controllers agree on who acts."""

    kind: Literal["database", "kubernetes"] = Field(
        default="database", description="Where leases are kept: a table of the records database, or Lease objects."
    )
    duration_s: Positive = Field(
        default=45.0, description="A lease that is not renewed for this long may be taken over, seconds."
    )
    namespace: Name = Field(default="default", description="Namespace of the Lease objects.")
    prefix: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9.-]*)?$")] = Field(
        default="jevons-", description="Name of a service's Lease object is this and the service."
    )
    connection: KubeConnection = Field(default=KubeConnection(), description="How to reach the API server.")

    @property
    def period_s(self) -> float:
        """Pause between two renewals, seconds."""
        return min(self.duration_s / 6.0, 5.0)

    @model_validator(mode="after")
    def _outlasts_a_slow_server(self) -> LeaseSpec:
        """All are renewed together, so that one which is slow must not let the others lapse."""
        longest_s = TRUSTED_SHARE * self.duration_s - self.period_s
        if self.kind == "kubernetes" and self.connection.deadline_s > longest_s:
            raise ValueError(
                f"connection.deadline_s: {self.connection.deadline_s:g} s is too long for a duration_s of "
                f"{self.duration_s:g} s, of which the holder trusts two thirds; set it to {longest_s:g} or less"
            )
        return self


class Leases(Protocol):
    """Who may act on which service."""

    def renew(self) -> Ints:
        """Renew what is held and take what is free; (n,) fencing tokens, `NOT_HELD` where another one holds it.

        Raises:
            LeasesUnavailable: when nobody can be asked.
        """
        ...

    def unread(self) -> tuple[str, ...]:
        """(n,) why the last renewal does not know who holds a service's lease, in words; empty where it knows."""
        ...

    def annotated(self) -> tuple[str, ...]:
        """(n,) why a mark on the lease stops all action on its service, as of the last renewal; empty where none."""
        ...

    def release(self) -> None:
        """Let go of every lease, so that another controller need not wait.

        Raises:
            LeasesUnavailable: when that cannot be done for all; those leases expire by themselves.
        """
        ...

    def close(self) -> None:
        """Drop connections."""
        ...


def holder_name(controller: str) -> str:
    """A name that no other controller has, in this process or another: host, process namespace, number, start, name."""
    return f"{socket.gethostname()}/{_namespace()}/{os.getpid()}/{_started(os.getpid())}/{controller}"


def process_gone(holder: str) -> bool:
    """Whether the holder was a process of this host and is certainly not there any more."""
    words = holder.split("/")
    if len(words) != 5 or words[:2] != [socket.gethostname(), _namespace()] or "?" in words:
        return False
    try:
        return _started(int(words[2])) != words[3]
    except ValueError:
        return False


def _namespace() -> str:
    """The kernel's name of the namespace in which process numbers count, `?` where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return "?"


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; `?` when there is none or nobody knows."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else "?"
    fields = stat.rpartition(")")[2].split()
    return "gone" if fields[0] in "ZX" else fields[19]


class Watch:
    """Which leases of others have stood still for their whole duration, by this process's steady clock."""

    def __init__(self, services: Sequence[str], duration_s: float, now: SteadyClock = time.monotonic) -> None:
        self._seen: dict[str, tuple[object, float]] = dict.fromkeys(services, (None, now()))
        self._duration_s = duration_s
        self._now = now

    def expired(self, service: str, holder: str, renewal: object) -> bool:
        """Whether the holder's lease may be taken: `renewal`, which changes with each one, has stood still."""
        if process_gone(holder):
            return True
        seen, since_s = self._seen[service]
        if seen != renewal:
            self._seen[service] = (renewal, self._now())
            return False
        return self._now() - since_s >= self._duration_s


class DatabaseLeases:
    """Leases as rows of the records database.

    Args:
        database: where they are.
        services: which services to hold.
        holder: name of this controller, unlike any other's.
        duration_s: how long a lease lasts without a renewal, seconds.
        now: a clock that never jumps, seconds.
    """

    def __init__(
        self,
        database: Database,
        services: Sequence[str],
        holder: str,
        duration_s: float,
        now: SteadyClock = time.monotonic,
    ) -> None:
        self.holder = holder
        self._database = database
        self._services = tuple(services)
        self._watch = Watch(services, duration_s, now)

    def renew(self) -> Ints:
        """One transaction for all services."""
        try:
            return self._renew()
        except RecordsUnavailable as error:
            raise LeasesUnavailable(str(error)) from error

    def _renew(self) -> Ints:
        tokens = dict.fromkeys(self._services, NOT_HELD)
        ours = LEASES.c.service.in_(self._services)
        # Rows are locked in the order of their names, here and where records are written: nobody waits in a circle.
        everything = LEASES.select().where(ours).order_by(LEASES.c.service)
        own = sa.and_(LEASES.c.holder == self.holder, ours)
        with self._database.begin(write=True) as connection:
            connection.execute(everything.where(LEASES.c.holder == self.holder).with_for_update()).all()
            connection.execute(LEASES.update().where(own).values(renewals=LEASES.c.renewals + 1))
            rows = connection.execute(everything).all()
            new = sorted({*self._services} - {row.service for row in rows})
            if new:
                free = [{"service": name, "holder": "", "token": 0, "renewals": 0} for name in new]
                put_missing(connection, LEASES, free)
                rows = connection.execute(everything).all()
            for row in rows:
                if row.holder == self.holder:
                    tokens[row.service] = row.token
                elif not row.holder or self._watch.expired(row.service, row.holder, (row.token, row.renewals)):
                    tokens[row.service] = self._take(connection, row)
        return np.array([tokens[service] for service in self._services], np.int64)

    def _take(self, connection: sa.Connection, row: sa.Row[tuple[str, str, int, int]]) -> int:
        """Take a lease over, unless somebody else was faster."""
        unchanged = sa.and_(
            LEASES.c.service == row.service, LEASES.c.token == row.token, LEASES.c.renewals == row.renewals
        )
        taken = connection.execute(
            LEASES.update().where(unchanged).values(holder=self.holder, token=row.token + 1, renewals=0)
        )
        return row.token + 1 if taken.rowcount == 1 else NOT_HELD

    def unread(self) -> tuple[str, ...]:
        """All are read in one transaction, or none."""
        return ("",) * len(self._services)

    def annotated(self) -> tuple[str, ...]:
        """Rows carry no marks: orders have a table of their own."""
        return ("",) * len(self._services)

    def release(self) -> None:
        """The rows stay, for their tokens; the holder is nobody."""
        try:
            with self._database.begin() as connection:
                own = sa.and_(LEASES.c.holder == self.holder, LEASES.c.service.in_(self._services))
                connection.execute(LEASES.update().where(own).values(holder=""))
        except RecordsUnavailable as error:
            raise LeasesUnavailable(str(error)) from error

    def close(self) -> None:
        """The database is somebody else's to close."""
