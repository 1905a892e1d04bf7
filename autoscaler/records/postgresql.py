"""Connections to PostgreSQL that wait for nothing without a limit: the server, a lock, a session that was left open.

A server that is frozen keeps its connections and answers nothing; no timeout of its own or of TCP ends that wait.
This module is imported only where a URL names PostgreSQL: the driver is an optional extra.
"""

from __future__ import annotations

import time
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import PQGen
from sqlalchemy import event

CONNECT_S = 2
"""How long an address of the server may take to let a connection in; whole seconds, 2 is the library's least."""
SILENCE_S = 2.5
"""How long the server may say nothing while a statement runs, seconds; then the connection is closed."""
LOCK_S, IDLE_S = 2.0, 10.0
"""How long the server lets a statement wait for a lock, and a transaction stand still before it ends it, seconds: a
controller that freezes in the middle of one must not keep the others from the leases."""

Result = TypeVar("Result")


class BoundedConnection(psycopg.Connection[Any]):
    """Closes itself when the server is silent for too long."""

    def wait(self, gen: PQGen[Result], *args: Any, **options: Any) -> Result:
        """Wait for the server's answer.

        Raises:
            psycopg.OperationalError: when nothing came for `SILENCE_S`.
        """
        return super().wait(self._while_it_answers(gen), *args, **options)

    def _while_it_answers(self, gen: PQGen[Result]) -> PQGen[Result]:
        heard_s = time.monotonic()
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                now_s = time.monotonic()
                if ready:
                    heard_s = now_s
                elif now_s - heard_s > SILENCE_S:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server has said nothing for {SILENCE_S:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            answer: Result = end.value
            return answer


def bound(engine: sa.Engine) -> None:
    """Let every connection of an engine be a bounded one."""

    @event.listens_for(engine, "do_connect")
    def connect(dialect: Any, record: Any, arguments: list[Any], options: dict[str, Any]) -> BoundedConnection:
        options.setdefault("connect_timeout", CONNECT_S)
        options.setdefault("application_name", "jevons")
        return BoundedConnection.connect(*arguments, **options)

    @event.listens_for(engine, "connect")
    def prepare(connection: BoundedConnection, record: Any) -> None:
        connection.execute(f"SET lock_timeout = {LOCK_S * 1e3:.0f}")
        connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_S * 1e3:.0f}")
        connection.commit()
