from __future__ import annotations

import io
import os
import socket
import stat
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from autoscaler.authority.controls import Controls
from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import CREATE_S, METADATA, Database, pack, unpack, unpack_names


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.glob("jevons.db*")}


def opened(file: Path) -> Database:
    database = Database(f"sqlite:///{file}")
    database.create()
    return database


def test_a_new_sqlite_file_and_those_beside_it_are_their_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        database = opened(tmp_path / "jevons.db")
        assert {path.name for path in tmp_path.iterdir()} == {"jevons.db", "jevons.db-wal", "jevons.db-shm"}
        assert modes(tmp_path) == {0o600}
        database.close()
        (tmp_path / "target").mkdir()
        (tmp_path / "link.db").symlink_to(tmp_path / "target" / "jevons.db")
        opened(tmp_path / "link.db").close()
        assert modes(tmp_path / "target") == {0o600}
    finally:
        os.umask(before)


def test_a_sqlite_file_that_was_opened_up_to_a_group_stays_open(tmp_path: Path) -> None:
    opened(tmp_path / "jevons.db").close()
    (tmp_path / "jevons.db").chmod(0o660)
    database = opened(tmp_path / "jevons.db")
    assert modes(tmp_path) == {0o660}
    database.close()


def test_shards_that_start_together_on_a_new_database_all_find_it_made(new_database: Callable[[], str]) -> None:
    for _ in range(10):
        barrier, url = threading.Barrier(8), new_database()

        def start(url: str = url, barrier: threading.Barrier = barrier) -> list[str]:
            database = Database(url)
            barrier.wait()
            database.create()
            names = sa.inspect(database.engine).get_table_names()
            database.close()
            return names

        with ThreadPoolExecutor(8) as pool:
            for names in pool.map(lambda _, start=start: start(), range(8)):
                assert set(names) == set(METADATA.tables)


@pytest.mark.plays("a damaged database file", "named with the way out; nothing is scaled until somebody moves it away")
@pytest.mark.parametrize("offset", [0, 4096], ids=["header", "pages"])
def test_a_damaged_database_is_named_at_once_with_the_way_out(tmp_path: Path, offset: int) -> None:
    file = tmp_path / "jevons.db"
    database = Database(f"sqlite:///{file}")
    database.create()
    database.close()
    with file.open("r+b") as raw:
        raw.seek(offset)
        raw.write(b"x" * (file.stat().st_size - offset))
    database, began_s = Database(f"sqlite:///{file}"), time.monotonic()

    def opened() -> None:
        database.create()
        Controls(database).read()

    with pytest.raises(RecordsUnavailable, match=r"^the database: .*jevons.db is damaged, .*move it away"):
        opened()
    assert time.monotonic() - began_s < CREATE_S / 2  # who tries again makes the pauses
    assert file.exists()


def test_what_unpacks_without_end_is_refused_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoscaler.records.database.MAX_UNPACKED_BYTES", 2**20)
    whole = pack({"x": np.arange(1000)})
    assert unpack(whole)["x"].tolist() == list(range(1000))
    archive = io.BytesIO()
    np.savez_compressed(archive, x=np.zeros(2**20))  # small until its member is read
    for packed in (zlib.compress(bytes(2**24)), zlib.compress(archive.getvalue()), whole[:-5]):
        with pytest.raises(RecordsUnavailable, match="damaged"):
            unpack(packed)
    for packed in (zlib.compress(bytes(2**24)), b"", b"x"):
        with pytest.raises(RecordsUnavailable, match="damaged"):
            unpack_names(packed)


def test_a_database_that_cannot_be_reached_is_named_at_once() -> None:
    pytest.importorskip("psycopg")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began_s = time.monotonic()
    with pytest.raises(RecordsUnavailable, match="refused"):
        Database(f"postgresql://127.0.0.1:{port}/jevons").create()
    assert time.monotonic() - began_s < CREATE_S / 2


def test_a_lock_of_somebody_else_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoscaler.records.database.BUSY_S", 0.01)
    database, other = Database(f"sqlite:///{tmp_path / 'jevons.db'}"), Database(f"sqlite:///{tmp_path / 'jevons.db'}")
    other.create()
    with other.begin(write=True):
        thread = threading.Thread(target=database.create)
        thread.start()
        time.sleep(0.3)
        assert thread.is_alive()
    thread.join(CREATE_S)
    assert not thread.is_alive()
