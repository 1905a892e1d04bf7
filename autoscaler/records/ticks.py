"""Recorded ticks, read back: what was seen, proposed and settled, and what became of it.

This module must not know who wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy.typing as npt
import sqlalchemy as sa

from autoscaler.records.database import DECISIONS, TICKS, Database, unpack, unpack_names
from policies.contract import Snapshot, Target

PENDING = "pending"
"""Outcome of a decision that was recorded and not concluded."""


@dataclass(frozen=True, eq=False)
class Tick:
    """A recorded tick.

    Attributes:
        id: of the row.
        time_s: Unix time of its decisions.
        policy: name and version of the policy that acted.
        services: names, in the order of the rows of every array.
        arrays: by name: `snapshot/...`, `proposed/...`, `settled/...`, `reasons`, `outcome` and the details.
        seconds: what each stage took.
        concluded: whether it is known what became of it.
    """

    id: int
    time_s: float
    policy: str
    services: tuple[str, ...]
    arrays: dict[str, npt.NDArray[Any]]
    seconds: dict[str, float]
    concluded: bool

    @property
    def snapshot(self) -> Snapshot:
        """What was seen."""
        return Snapshot(**{item.name: self.arrays[f"snapshot/{item.name}"] for item in fields(Snapshot)})

    def target(self, name: str) -> Target:
        """`proposed` or `settled`."""
        return Target(self.arrays[f"{name}/replicas"], self.arrays[f"{name}/batch_cap"])


def read_ticks(
    database: Database,
    service: str | None = None,
    since_s: float = 0.0,
    tick: int | None = None,
    last: int | None = None,
) -> list[Tick]:
    """Recorded ticks, oldest first.

    Args:
        database: where they are.
        service: only ticks in which it was decided.
        since_s: Unix time from which on.
        tick: only the one with this identifier.
        last: only this many, the newest.

    Raises:
        RecordsUnavailable: when they cannot be read.
    """
    query = sa.select(TICKS).where(TICKS.c.time_s >= since_s).order_by(TICKS.c.id.desc())
    if service is not None:
        query = query.where(TICKS.c.id.in_(sa.select(DECISIONS.c.tick).where(DECISIONS.c.service == service)))
    if tick is not None:
        query = query.where(TICKS.c.id == tick)
    if last is not None:
        query = query.limit(last)
    with database.begin() as connection:
        rows = connection.execute(query).all()
    return [
        Tick(
            id=row.id,
            time_s=row.time_s,
            policy=row.policy,
            services=unpack_names(row.services),
            arrays=unpack(row.arrays),
            seconds=dict(row.seconds or {}),
            concluded=bool(row.concluded),
        )
        for row in reversed(rows)
    ]


def read_outcome(database: Database, tick: int, service: str) -> tuple[str, int]:
    """Outcome and reasons of one decision as they are known by now.

    Raises:
        RecordsUnavailable: when they cannot be read.
    """
    with database.begin() as connection:
        query = sa.select(DECISIONS.c.outcome, DECISIONS.c.reasons)
        row = connection.execute(query.where(DECISIONS.c.tick == tick, DECISIONS.c.service == service)).one()
    return str(row.outcome), int(row.reasons)


def unconcluded(database: Database, services: Sequence[str]) -> set[str]:
    """Services whose newest decision was recorded and not concluded: nobody knows whether it was carried out.

    Raises:
        RecordsUnavailable: when that cannot be read.
    """
    newest = (
        sa.select(DECISIONS.c.service, sa.func.max(DECISIONS.c.tick).label("tick"))
        .where(DECISIONS.c.service.in_(list(services)))
        .group_by(DECISIONS.c.service)
        .subquery()
    )
    query = sa.select(DECISIONS.c.service).join(
        newest, sa.and_(DECISIONS.c.service == newest.c.service, DECISIONS.c.tick == newest.c.tick)
    )
    with database.begin() as connection:
        return set(connection.execute(query.where(DECISIONS.c.outcome == PENDING)).scalars())
