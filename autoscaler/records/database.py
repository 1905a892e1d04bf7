"""The controller's database: its tables, and how a connection is opened.

SQLite, or PostgreSQL where its URL is given. Arrays are stored as NumPy archives, never as pickles.
This module must not know what is decided.
"""

from __future__ import annotations

import io
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa
from pydantic import Field
from sqlalchemy import event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from autoscaler.controller import RecordsUnavailable
from policies.engine import ConfigError, Positive, StrictModel
from policies.redaction import redacted
from policies.secret_url import Url

Arrays = Mapping[str, npt.NDArray[Any]]
BUSY_S = 2.0
"""How long a statement waits for another process's lock on a SQLite file, seconds."""
POOL_S = 2.0
"""How long a transaction waits while all connections are in use, seconds."""
CREATE_S, CREATE_PAUSE_S = 5.0, 0.05
"""How long the tables are tried to be made, and the pause between two tries, seconds."""
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
"""What a URL may begin with, and the driver that is used then."""
LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
"""Somebody else holds a lock that SQLite does not wait for."""
LOCK_NOT_AVAILABLE = "55P03"
"""The same in PostgreSQL."""
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""It is not set aside by itself: whoever began anew without its orders might scale what somebody has paused."""
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
    sa.Column("reasons", sa.BigInteger, nullable=False),
    sa.Column("replicas_before", sa.Integer),
    sa.Column("replicas_after", sa.Integer),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Index("decisions_by_service", "service", "tick"),
)
"""One decision for one service, in brief; the whole of it is in the arrays of its tick."""

STATE_FORMAT = 1
"""Of what is in `STATES`: another one is not read. Raised when arrays change their meaning and keep their names."""

STATES = sa.Table(
    "states",
    METADATA,
    sa.Column("controller", sa.String(200), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("time_s", sa.Float, nullable=False),
    sa.Column("services", sa.LargeBinary, nullable=False),
    sa.Column("arrays", sa.LargeBinary, nullable=False),
)
"""What a controller needs to go on after a restart, or another one to take over; a row per process.

Processes of one name can each lead some of the services, so they must not share a row.
"""

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
INSERTS: Mapping[str, Callable[[sa.Table], Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


class RecordsConfig(StrictModel):
    """Where decisions are kept, and for how long."""

    url: Url = Field(
        default=Url("sqlite:///runs/live/jevons.db"),
        description="sqlite:/// or postgresql:// URL. Secrets: ${NAME} is the environment's.",
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
        try:
            parsed = sa.make_url(url)
            if parsed.drivername not in DRIVERS:
                raise ValueError(f"expected sqlite:///FILE or postgresql://USER@HOST/NAME, got {parsed.drivername}:")
            parsed = parsed.set(drivername=DRIVERS[parsed.drivername])
            if parsed.get_backend_name() == "sqlite":
                if parsed.database:
                    _make_sqlite(Path(parsed.database))
                self.engine = sa.create_engine(parsed, pool_timeout=POOL_S, connect_args={"timeout": BUSY_S})
                event.listen(self.engine, "connect", _prepare_sqlite)
            else:
                self.engine = _postgresql(parsed)
        except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
            why = redacted(" ".join(str(error).split()))
            raise ConfigError(f"records.url {redacted(url)!r}: cannot be used: {why}") from None

    @property
    def place(self) -> str:
        """Where it is, for people: a file's absolute path, or a URL without its password."""
        url = self.engine.url
        return str(url.database) if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)

    def create(self) -> None:
        """Make the tables that are not there, one process at a time: shards and a standby start together.

        Raises:
            RecordsUnavailable: when that cannot be done.
        """
        with faults(str(self.engine.url.database)):
            until_s = time.monotonic() + CREATE_S
            while True:
                try:
                    with self.engine.begin() as connection:
                        _lock_schema(connection)
                        METADATA.create_all(connection)
                    return
                except DBAPIError as error:
                    if not _locked(error) or time.monotonic() > until_s:
                        raise  # what no pause of ours mends is the caller's to try again
                    time.sleep(CREATE_PAUSE_S)

    @contextmanager
    def begin(self, write: bool = False) -> Iterator[sa.Connection]:
        """A transaction: all of it is kept, or nothing.

        Args:
            write: whether what is read in it is the ground for what it writes: nobody else may write meanwhile. SQLite
                locks the file; with PostgreSQL the rows are to be read `with_for_update`.

        Raises:
            RecordsUnavailable: when the database does not do as it is told.
        """
        with faults(str(self.engine.url.database)), self.engine.begin() as connection:
            if write and connection.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def _postgresql(url: sa.URL) -> sa.Engine:
    try:
        from autoscaler.records import postgresql as bounded
    except ImportError as error:
        raise ImportError(f"PostgreSQL needs an extra, pip install 'jevons[postgresql]' ({error})") from None
    engine = sa.create_engine(url, pool_pre_ping=True, pool_timeout=POOL_S)
    bounded.bound(engine)
    return engine


def put(connection: sa.Connection, table: sa.Table, row: Mapping[str, Any]) -> None:
    """Write a row, in the place of the one with the same key where there is one."""
    insert = INSERTS[connection.dialect.name](table).values(**row)
    keys = [column.name for column in table.primary_key]
    others = {name: value for name, value in row.items() if name not in keys}
    connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=others))


def put_missing(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows for whose keys there is none yet."""
    connection.execute(INSERTS[connection.dialect.name](table).on_conflict_do_nothing(), list(rows))


@contextmanager
def faults(file: str) -> Iterator[None]:
    """Every fault of the database becomes `RecordsUnavailable`, with the way out where it does not pass by itself."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        first = str(error).split("\n")[0]
        if _sqlite_code(error) in DAMAGED:
            first += (
                f"; {file} is damaged, and this does not pass: end the controllers, then move it away with its -wal "
                "and -shm; orders (pauses too), memory and history are in it"
            )
        raise RecordsUnavailable(redacted(f"the database: {first}")) from error


def _locked(error: BaseException) -> bool:
    return _sqlite_code(error) in LOCKED or getattr(_cause(error), "sqlstate", "") == LOCK_NOT_AVAILABLE


def _sqlite_code(error: BaseException) -> int:
    """What SQLite says, without the code's extension; 0 of another error."""
    return int(getattr(_cause(error), "sqlite_errorcode", 0)) & 0xFF


def _cause(error: BaseException) -> object:
    return getattr(error, "orig", None)


def _lock_schema(connection: sa.Connection) -> None:
    """Keep other processes from making the tables until the transaction ends."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})


def _make_sqlite(path: Path) -> None:
    """A new file is its owner's alone, and so are those that SQLite puts beside it. One that is there stays as it is.

    It is not even opened: to close it would give up the locks that this process holds on it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):  # what is wrong SQLite will say, and when it has passed
        os.close(os.open(path.resolve(), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


CACHE_KIB = 512


def _prepare_sqlite(connection: Any, record: Any) -> None:
    """A reader never waits for the writer; a commit outlives the process, though not a loss of power right after.

    What a tick writes is small, and history is read once: each connection keeps `CACHE_KIB` of it, not SQLite's 2 MB.
    """
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA cache_size=-{CACHE_KIB}")
    cursor.close()


MAX_UNPACKED_BYTES = 2**28
TOO_LARGE = f"it unpacks to more than {MAX_UNPACKED_BYTES // 2**20} MiB"


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
        RecordsUnavailable: when they are damaged, or larger than any that Jevons writes.
    """
    try:
        with np.load(io.BytesIO(_inflated(packed)), allow_pickle=False) as archive:
            if sum(member.file_size for member in archive.zip.infolist()) > MAX_UNPACKED_BYTES:
                raise ValueError(TOO_LARGE)
            return {name.replace("|", "/"): archive[name] for name in archive.files}
    except Exception as error:  # a damaged archive raises errors of many kinds
        raise RecordsUnavailable(f"a stored archive is damaged: {error}") from None


def pack_names(names: tuple[str, ...]) -> bytes:
    """Names, one a line."""
    return zlib.compress("\n".join(names).encode(), 1)


def unpack_names(packed: bytes) -> tuple[str, ...]:
    """The names of `pack_names`.

    Raises:
        RecordsUnavailable: when they are damaged, or larger than any that Jevons writes.
    """
    try:
        text = _inflated(packed).decode()
    except (zlib.error, ValueError) as error:
        raise RecordsUnavailable(f"stored names are damaged: {error}") from None
    return tuple(text.split("\n")) if text else ()


def _inflated(packed: bytes) -> bytes:
    """Unpacked within bounds: who may write to the database must not fill the controller's memory."""
    inflating = zlib.decompressobj()
    raw = inflating.decompress(packed, MAX_UNPACKED_BYTES)
    if inflating.unconsumed_tail:
        raise ValueError(TOO_LARGE)
    if not inflating.eof:
        raise ValueError("it is cut short")
    return raw


def database_file(url: Url) -> Path | None:
    """The file of an SQLite URL, None for another database.

    Raises:
        ConfigError: when it is no URL of a database.
    """
    try:
        parsed = sa.make_url(url.template)
    except (SQLAlchemyError, ValueError) as error:
        raise ConfigError(f"records.url {str(url)!r}: {redacted(str(error))}") from None
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None
