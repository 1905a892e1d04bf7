"""Decisions in the database: written before they are carried out, concluded after, and dropped when they are old.

A tick is one row of arrays; each of its decisions also is a narrow row of its own, for queries. The state that a
restarted controller needs is written in the same transaction as the decisions.
This module must not know how decisions are made.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import (
    DECISIONS,
    LEASES,
    STATE_FORMAT,
    STATES,
    TICKS,
    Arrays,
    Database,
    pack,
    pack_names,
    put,
)
from autoscaler.records.memory import TOKEN, forget_others
from autoscaler.records.ticks import PENDING
from autoscaler.stages import left_behind
from policies.contract import Bools, Decision, Ints, Outcome, Snapshot

RETENTION_PERIOD_S = 600.0
ROWS_PER_STATEMENT = 1000
TICKS_PER_SWEEP = 200
"""Old ticks that one sweep drops at most; what is left goes with the next ticks."""


class Written(NamedTuple):
    """Where a decision was written.

    Attributes:
        snapshot: what it is of: a conclusion that comes late must not be taken for another decision's.
        tick: its identifier.
        rows: places of its services.
    """

    snapshot: Snapshot
    tick: int
    rows: Ints


class Records:
    """Writes the decisions of one controller; satisfies the controller's `Recorder`.

    Args:
        database: where they are.
        controller: name of this controller.
        services: names, in the order of the rows.
        memory: what to keep for a restart, arrays with leading axis n; called at every record.
        version: version of the acting policy.
        keep_days: age at which decisions are dropped.
        fenced: whether the leases are in the same database, so that an older token is refused.
        seconds: what the stages of the present tick took so far.
        now: Unix time.
    """

    def __init__(
        self,
        database: Database,
        controller: str,
        services: Sequence[str],
        memory: Callable[[], Arrays],
        version: Callable[[], str],
        keep_days: float,
        fenced: bool,
        seconds: Callable[[], dict[str, float]],
        now: Callable[[], float] = time.time,
    ) -> None:
        self.controller = controller
        self.services = tuple(services)
        self._process = f"{controller} {uuid.uuid4().hex}"
        self._database = database
        self._memory = memory
        self._version = version
        self._keep_s = keep_days * 86400.0
        self._fenced = fenced
        self._now = now
        self._written: Written | None = None
        self._next_sweep_s = -np.inf
        self._seconds = seconds

    def record(self, decision: Decision) -> None:
        """One transaction: the tick, its decisions, and the state after them. Services of others are left out."""
        rows, self._written = np.flatnonzero(self._own(decision)), None
        if not len(rows):
            return
        with self._database.begin(write=True) as connection:
            self._check_tokens(connection, decision, rows)
            self._write_state(connection, decision)
            written = Written(decision.snapshot, self._write_tick(connection, decision, rows), rows)
            connection.execute(DECISIONS.insert(), self._brief(decision, written, pending=True))
            if self._now() >= self._next_sweep_s:
                self._sweep(connection, rows)
            _in_time()
        self._written = written

    def conclude(self, decision: Decision) -> None:
        """What became of it."""
        written = self._written
        if written is None or written.snapshot is not decision.snapshot:
            return
        with self._database.begin() as connection:
            values = {"concluded": True, "seconds": self._seconds()}
            connection.execute(TICKS.update().where(TICKS.c.id == written.tick).values(**values))
            alike: dict[tuple[str, int], list[int]] = {}
            for row in self._brief(decision, written, pending=False):
                alike.setdefault((row["outcome"], row["reasons"]), []).append(row["row"])
            for (outcome, reasons), places in alike.items():  # few statements, however many services
                for first in range(0, len(places), ROWS_PER_STATEMENT):
                    mine = DECISIONS.c.row.in_(places[first : first + ROWS_PER_STATEMENT])
                    change = DECISIONS.update().where(DECISIONS.c.tick == written.tick, mine)
                    connection.execute(change.values(outcome=outcome, reasons=reasons))
            self._write_state(connection, decision)
            _in_time()

    def _own(self, decision: Decision) -> Bools:
        tokens = decision.details.get("token")
        return np.ones(len(self.services), bool) if tokens is None else np.asarray(tokens >= 0, bool)

    def _check_tokens(self, connection: sa.Connection, decision: Decision, rows: Ints) -> None:
        """Refuse to write beside a newer holder of a lease."""
        if not self._fenced:
            return
        tokens = decision.details["token"]
        wanted = {self.services[row]: int(tokens[row]) for row in rows}
        # Locked until the commit: nobody takes a lease over between this look and what is written below it.
        held = sa.select(LEASES.c.service, LEASES.c.token).where(LEASES.c.service.in_(list(wanted)))
        found = connection.execute(held.order_by(LEASES.c.service).with_for_update(read=True)).all()
        newer = [row.service for row in found if row.token > wanted[row.service]]
        if newer:
            raise RecordsUnavailable(f"another controller has taken over {newer[0]}: its token is newer")

    def _write_state(self, connection: sa.Connection, decision: Decision) -> None:
        own = np.flatnonzero(self._own(decision))
        memory = {name: array[own] for name, array in self._memory().items()}
        tokens = decision.details.get("token")
        values = {
            "controller": self._process,
            "version": STATE_FORMAT,
            "time_s": self._now(),
            "services": pack_names(tuple(self.services[row] for row in own)),
            # Overwritten at every tick: time counts, space does not.
            "arrays": pack(memory if tokens is None else {**memory, TOKEN: tokens[own]}, level=0),
        }
        put(connection, STATES, values)

    def _write_tick(self, connection: sa.Connection, decision: Decision, rows: Ints) -> int:
        arrays = {name: array[rows] for name, array in arrays_of(decision).items()}
        inserted = connection.execute(
            TICKS.insert().values(
                controller=self.controller,
                time_s=self._now(),
                policy=f"{decision.policy} {self._version()}"[:200],
                concluded=False,
                services=pack_names(tuple(self.services[row] for row in rows)),
                arrays=pack(arrays),
                seconds={},
            )
        )
        key = inserted.inserted_primary_key
        assert key is not None
        return int(key[0])

    def _brief(self, decision: Decision, written: Written, pending: bool) -> list[dict[str, Any]]:
        rows, now_s = written.rows, self._now()
        modes = decision.details["mode"][rows].tolist()
        before = decision.details["in_force"][rows].sum(axis=1).tolist()
        known = (decision.details["in_force"][rows].min(axis=1) >= 0).tolist()
        after = decision.settled.replicas[rows].sum(axis=1).tolist()
        outcomes = [OUTCOMES[outcome] for outcome in decision.outcome[rows].tolist()]
        reasons = decision.reasons[rows].tolist()
        tokens = decision.details["token"][rows].tolist()
        return [
            {
                "tick": written.tick,
                "row": place,
                "service": self.services[row],
                "time_s": now_s,
                "mode": modes[place],
                "outcome": PENDING if pending and outcomes[place] in CARRIED_OUT else outcomes[place],
                "reasons": reasons[place],
                "replicas_before": before[place] if known[place] else None,
                "replicas_after": after[place] if known[place] else None,
                "token": tokens[place],
            }
            for place, row in enumerate(rows.tolist())
        ]

    def _sweep(self, connection: sa.Connection, rows: Ints) -> None:
        """Drop what is older than the retention; in the transaction of a tick, so never much of it at once."""
        forget_others(connection, self._process, [self.services[row] for row in rows])
        oldest_s = self._now() - self._keep_s
        old = sa.select(TICKS.c.id).where(TICKS.c.time_s < oldest_s).order_by(TICKS.c.id).limit(TICKS_PER_SWEEP)
        ids = connection.execute(old).scalars().all()
        if ids:
            connection.execute(DECISIONS.delete().where(DECISIONS.c.tick <= ids[-1]))
            connection.execute(TICKS.delete().where(TICKS.c.id <= ids[-1]))
        if len(ids) < TICKS_PER_SWEEP:
            self._next_sweep_s = self._now() + RETENTION_PERIOD_S


def _in_time() -> None:
    """Take a transaction back whose stage was given up: the next tick goes on without it.

    To be asked last: what is written by then is locked, so that whoever comes later writes after it.

    Raises:
        RecordsUnavailable: when it was.
    """
    if left_behind():
        raise RecordsUnavailable("the database: it was too late")


OUTCOMES = {int(outcome): outcome.name.lower() for outcome in Outcome}
CARRIED_OUT = {OUTCOMES[Outcome.SCALED], OUTCOMES[Outcome.UNCHANGED]}


def arrays_of(decision: Decision) -> dict[str, npt.NDArray[Any]]:
    """All of a decision as arrays with leading axis n."""
    arrays = {f"snapshot/{item.name}": getattr(decision.snapshot, item.name) for item in fields(Snapshot)}
    for name, target in (("proposed", decision.proposed), ("settled", decision.settled)):
        arrays |= {f"{name}/replicas": target.replicas, f"{name}/batch_cap": target.batch_cap}
    return {**arrays, "reasons": decision.reasons, "outcome": decision.outcome, **decision.details}
