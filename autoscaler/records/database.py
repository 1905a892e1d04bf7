"""The controller's database: its tables, and how a connection is opened.

SQLite unless another SQLAlchemy URL is given. Arrays are stored as NumPy archives, never as pickles.
This module must not know what is decided.
"""

from __future__ import annotations

import io
import re
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from pydantic import Field
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from autoscaler.controller import RecordsUnavailable
from policies.engine import ConfigError, Positive, StrictModel

Arrays = Mapping[str, npt.NDArray[Any]]
BUSY_S = 2.0
"""How long a statement waits for another process's lock on a SQLite file, seconds."""
CREATE_S, CREATE_PAUSE_S = 5.0, 0.05
"""How long the tables are tried to be made, and the pause between two tries, seconds."""
SCHEMA_LOCK = 0x4A65766F6E73
"""Key of the advisory lock of a PostgreSQL database: the letters of Jevons."""
METADATA = sa.MetaData()

TICKS = sa.Table(
    "ticks",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("controller", sa.String(200), nullable=False),
    sa.Column("time_s", sa.Float, nullable=False),
    sa.Column("policy", sa.String(200), nullable=False),
    sa.Column("concluded", sa.Boolean, nullable=False),
    sa.Column("services", sa.LargeBinary, nullable=False),
    sa.Column("arrays", sa.LargeBinary, nullable=False),
    sa.Column("seconds", sa.JSON),
    sa.Index("ticks_by_time", "time_s"),
    sqlite_autoincrement=True,
)
"""One tick of one controller: every array of its decisions, rows in the order of `services`."""

DECISIONS = sa.Table(
    "decisions",
    METADATA,
    sa.Column("tick", sa.Integer, primary_key=True),
    sa.Column("row", sa.Integer, primary_key=True),
    sa.Column("service", sa.String(200), nullable=False),
    sa.Column("time_s", sa.Float, nullable=False),
    sa.Column("mode", sa.String(10), nullable=False),
    sa.Column("outcome", sa.String(10), nullable=False),
    sa.Column("reasons", sa.Integer, nullable=False),
    sa.Column("replicas_before", sa.Integer),
    sa.Column("replicas_after", sa.Integer),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Index("decisions_by_service", "service", "tick"),
)
"""One decision for one service, in brief; the whole of it is in the arrays of its tick."""

STATES = sa.Table(
    "states",
    METADATA,
    sa.Column("controller", sa.String(200), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("time_s", sa.Float, nullable=False),
    sa.Column("services", sa.LargeBinary, nullable=False),
    sa.Column("arrays", sa.LargeBinary, nullable=False),
)
"""What a controller needs to go on after a restart, or another one to take over."""

CONTROLS = sa.Table(
    "controls",
    METADATA,
    sa.Column("service", sa.String(200), primary_key=True),
    sa.Column("mode", sa.String(10), nullable=False),
    sa.Column("changed_s", sa.Float, nullable=False),
    sa.Column("changed_by", sa.String(200), nullable=False),
)
"""What people have ordered: a mode by service, and the kill switch under the name `*`."""

LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("service", sa.String(200), primary_key=True),
    sa.Column("holder", sa.String(200), nullable=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("renewals", sa.Integer, nullable=False),
)
"""Who may act on a service. The token grows with every change of holder."""

CONTROLLERS = sa.Table(
    "controllers",
    METADATA,
    sa.Column("name", sa.String(200), primary_key=True),
    sa.Column("host", sa.String(200), nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("beat_s", sa.Float, nullable=False),
    sa.Column("status", sa.JSON, nullable=False),
)
"""The controllers that run, with what they last said about themselves."""


class RecordsConfig(StrictModel):
    """Where decisions are kept, and for how long."""

    url: str = Field(
        default="sqlite:///runs/live/jevons.db", description="SQLAlchemy URL. Secrets: ${NAME} is the environment's."
    )
    keep_days: Positive = Field(default=30.0, description="Decisions older than this are dropped, days.")


class Database:
    """An engine on one URL.

    Args:
        url: an SQLAlchemy URL. The folder of an SQLite file is made.

    Raises:
        ConfigError: when the URL cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            parsed = sa.make_url(url)
            options: dict[str, Any] = {}
            if parsed.get_backend_name() == "sqlite":
                options["connect_args"] = {"timeout": BUSY_S}
                if parsed.database:
                    Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
            self.engine = sa.create_engine(parsed, pool_pre_ping=parsed.get_backend_name() != "sqlite", **options)
        except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
            raise ConfigError(f"records.url {url!r}: cannot be used: {' '.join(str(error).split())}") from None
        if parsed.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)

    def create(self) -> None:
        """Make the tables that are not there, one process at a time: shards and a standby start together.

        Raises:
            RecordsUnavailable: when that cannot be done.
        """
        with faults():
            until_s = time.monotonic() + CREATE_S
            while True:
                try:
                    with self.engine.begin() as connection:
                        _lock_schema(connection)
                        METADATA.create_all(connection)
                    return
                except DBAPIError:  # somebody else holds a lock that SQLite does not wait for
                    if time.monotonic() > until_s:
                        raise
                    time.sleep(CREATE_PAUSE_S)

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: all of it is kept, or nothing.

        Raises:
            RecordsUnavailable: when the database does not do as it is told.
        """
        with faults(), self.engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


@contextmanager
def faults() -> Iterator[None]:
    """Every fault of the database becomes `RecordsUnavailable`."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        first = str(error).split("\n")[0]
        raise RecordsUnavailable(f"the database: {first}") from error


def _lock_schema(connection: sa.Connection) -> None:
    """Keep other processes from making the tables until the transaction ends."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


def _prepare_sqlite(connection: Any, record: Any) -> None:
    """A reader never waits for the writer; a commit outlives the process, though not a loss of power right after."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def pack(arrays: Arrays, level: int = 1) -> bytes:
    """Arrays as a NumPy archive, compressed by zlib at a level from 0 (not at all) to 9.

    >>> {name: array.tolist() for name, array in unpack(pack({"x": np.arange(3)})).items()}
    {'x': [0, 1, 2]}
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name.replace("/", "|"): array for name, array in arrays.items()})
    return zlib.compress(buffer.getvalue(), level)


def unpack(packed: bytes) -> dict[str, npt.NDArray[Any]]:
    """The arrays of `pack`.

    Raises:
        RecordsUnavailable: when they are damaged.
    """
    try:
        with np.load(io.BytesIO(zlib.decompress(packed)), allow_pickle=False) as archive:
            return {name.replace("|", "/"): archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise RecordsUnavailable(f"a stored archive is damaged: {error}") from None


def pack_names(names: tuple[str, ...]) -> bytes:
    """Names, one a line."""
    return zlib.compress("\n".join(names).encode(), 1)


def unpack_names(packed: bytes) -> tuple[str, ...]:
    """The names of `pack_names`."""
    text = zlib.decompress(packed).decode()
    return tuple(text.split("\n")) if text else ()


def expand_secrets(url: str, environment: dict[str, str]) -> str:
    """The URL with ${NAME} replaced by the environment's values.

    >>> expand_secrets("postgresql://me:${PASSWORD}@db/jevons", {"PASSWORD": "secret"})
    'postgresql://me:secret@db/jevons'

    Raises:
        ValueError: when a name is not set.
    """

    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise ValueError(f"records.url names the environment variable {match[1]}, which is not set")
        return environment[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, url)


def database_file(url: str) -> Path | None:
    """The file of an SQLite URL, None for another database."""
    parsed = sa.make_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None
