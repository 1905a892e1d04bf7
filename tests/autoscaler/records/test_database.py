from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import METADATA, Database


def test_shards_that_start_together_on_a_new_database_all_find_it_made(tmp_path: Path) -> None:
    for number in range(10):
        barrier = threading.Barrier(8)

        def start(number: int = number, barrier: threading.Barrier = barrier) -> list[str]:
            database = Database(f"sqlite:///{tmp_path / str(number)}.db")
            barrier.wait()
            database.create()
            names = sa.inspect(database.engine).get_table_names()
            database.close()
            return names

        with ThreadPoolExecutor(8) as pool:
            for names in pool.map(lambda _, start=start: start(), range(8)):
                assert set(names) == set(METADATA.tables)


def test_a_database_that_cannot_be_written_is_named_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoscaler.records.database.CREATE_S", 0.2)
    file = tmp_path / "jevons.db"
    file.write_text("this is no database")
    with pytest.raises(RecordsUnavailable, match="the database: "):
        Database(f"sqlite:///{file}").create()
