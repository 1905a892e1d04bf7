"""The records in a real PostgreSQL: stopped, frozen, and with a transaction that somebody has left open."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from live_fakes import LiveWorld, burst, live_config, service_spec
from postgres_server import PostgreSQL
from servers import wait_until

from autoscaler.authority.leases import DatabaseLeases, LeasesUnavailable
from autoscaler.controller import RecordsUnavailable
from autoscaler.records import postgresql as bounded
from autoscaler.records.database import LEASES, Database
from policies.contract import Outcome, Reason
from policies.engine import ConfigError

LONGEST_S = 2 * (bounded.CONNECT_S + bounded.SILENCE_S)
"""Of one transaction with a server that answers nothing: a silent connection is given up, and a new one not had."""


@pytest.fixture
def database(postgresql: PostgreSQL) -> Iterator[Database]:
    made = Database(postgresql.url())
    made.create()
    yield made
    postgresql.thaw()
    made.close()


def test_a_frozen_server_is_left_within_seconds_and_used_again_when_it_is_back(
    database: Database, postgresql: PostgreSQL
) -> None:
    with database.engine.connect() as connection:
        connection.execute(LEASES.select())
        postgresql.freeze()
        began_s = time.monotonic()
        with pytest.raises(sa.exc.OperationalError, match="the server has said nothing"):
            connection.execute(LEASES.select())
        assert time.monotonic() - began_s < LONGEST_S
    for _ in range(2):
        began_s = time.monotonic()
        with pytest.raises(RecordsUnavailable, match="the database: "), database.begin() as connection:
            connection.execute(LEASES.select())
        assert time.monotonic() - began_s < LONGEST_S
    postgresql.thaw()
    with database.begin() as connection:
        assert connection.execute(LEASES.select()).all() == []


@pytest.mark.plays(
    "PostgreSQL stopped, or frozen",
    "held (`not_recorded`); scaled again within two ticks of its return",
)
@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_while_the_server_is_away_decisions_are_held_and_two_ticks_later_they_are_not(
    postgresql: PostgreSQL, tmp_path: Path, fault: str
) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, records={"url": postgresql.url()}))
    world.run(service, 3)
    applied = len(world.targets)
    (postgresql.stop if fault == "stopped" else postgresql.freeze)()
    try:
        for _ in range(2):
            began_s = time.monotonic()
            (held,) = world.run(service, 1)
            assert time.monotonic() - began_s < 4 * LONGEST_S
            assert Outcome(int(held.outcome[0])) is Outcome.HELD
            assert Reason.NOT_RECORDED in Reason(int(held.reasons[0]))
            assert any(problem.startswith("record: the database: ") for problem in service.problems())
        assert len(world.targets) == applied
    finally:
        (postgresql.start if fault == "stopped" else postgresql.thaw)()
    world.run(service, 2)
    assert len(world.targets) > applied
    service.heartbeat.beat()
    assert service.problems() == []
    service.close()


@pytest.mark.plays(
    "a controller frozen in the middle of a transaction",
    "its session is ended after 10 s; the others renew and record again",
)
def test_a_transaction_that_a_frozen_controller_left_open_keeps_nobody_from_the_leases_for_long(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    DatabaseLeases(database, ("chat",), "a", 45.0).renew()
    monkeypatch.setattr(bounded, "IDLE_S", 3.0)
    frozen = Database(database.engine.url.render_as_string(hide_password=False))
    connection = frozen.engine.connect()
    connection.execute(LEASES.select().with_for_update())
    with pytest.raises(LeasesUnavailable, match="lock"):
        DatabaseLeases(database, ("chat",), "a", 45.0).renew()

    def renewed() -> bool:
        try:
            return DatabaseLeases(database, ("chat",), "a", 45.0).renew().tolist() == [1]
        except LeasesUnavailable:
            return False

    wait_until(renewed, "the lease can be renewed", limit_s=20.0)
    connection.invalidate()
    connection.close()
    frozen.close()


def test_controllers_of_many_services_that_renew_and_record_at_once_do_not_lock_each_other_out(
    postgresql: PostgreSQL, tmp_path: Path
) -> None:
    """The beat and the tick of one controller lock the same rows, from two threads."""
    specs = [service_spec(f"s{number}") for number in (5, 3, 1, 4, 2)]
    world = LiveWorld(specs, [burst(peak_rps=4.0, duration_s=600.0, seed=seed) for seed in range(5)])
    service = world.service(live_config(tmp_path, *specs, records={"url": postgresql.url()}))
    stop, problems = threading.Event(), set()

    def beat() -> None:
        while not stop.is_set():
            problems.add(service.heartbeat.beat().problem)

    thread = threading.Thread(target=beat)
    thread.start()
    decisions = world.run(service, 30)
    stop.set()
    thread.join()
    assert problems == {""}
    assert not any(Reason.NOT_RECORDED in Reason(int(bits)) for one in decisions for bits in one.reasons)
    service.close()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("mysql://db/jevons", "expected sqlite:///FILE or postgresql://USER@HOST/NAME, got mysql:"),
        ("postgresql+psycopg2://db/jevons", "got postgresql[+]psycopg2:"),
        ("not a url", "records.url"),
    ],
)
def test_a_database_that_cannot_be_bounded_is_refused(url: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Database(url)
