"""Who may act: leases in the database, held, refused, expired and fenced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from autoscaler.authority.controls import Controls, Mode, kill_file_engaged
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.leases import NOT_HELD, DatabaseLeases, LeasesUnavailable, holder_name, process_gone
from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import Database, pack, unpack


class Steady:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(f"sqlite:///{tmp_path / 'jevons.db'}")
    made.create()
    return made


def leases(database: Database, holder: str, clock: Steady, *services: str) -> DatabaseLeases:
    return DatabaseLeases(database, services or ("chat",), holder, 45.0, clock)


def test_the_first_one_holds_and_the_second_waits(database: Database) -> None:
    clock = Steady()
    first, second = leases(database, "a", clock), leases(database, "b", clock)
    for _ in range(20):
        assert (first.renew().tolist(), second.renew().tolist()) == ([1], [NOT_HELD])
        clock.now_s += 10.0


def test_a_lease_that_stands_still_for_its_duration_is_taken_with_a_larger_token(database: Database) -> None:
    clock = Steady()
    first, second = leases(database, "a", clock), leases(database, "b", clock)
    first.renew()
    found = []
    for _ in range(7):
        found.append(second.renew().tolist()[0])
        clock.now_s += 9.0
    assert found == [NOT_HELD, NOT_HELD, NOT_HELD, NOT_HELD, NOT_HELD, 2, 2]
    assert first.renew().tolist() == [NOT_HELD]


def test_a_jump_of_the_observers_clock_alone_takes_nothing(database: Database) -> None:
    """What counts is how long the same renewal was seen, not what a wall clock says."""
    clock = Steady()
    first, second = leases(database, "a", clock), leases(database, "b", clock)
    first.renew()
    clock.now_s += 1e6
    assert second.renew().tolist() == [NOT_HELD]


def test_a_released_lease_is_free_at_once_and_its_token_goes_on(database: Database) -> None:
    clock = Steady()
    first, second = leases(database, "a", clock), leases(database, "b", clock)
    first.renew()
    first.release()
    assert second.renew().tolist() == [2]


def test_every_service_has_a_lease_of_its_own(database: Database) -> None:
    clock = Steady()
    assert leases(database, "a", clock, "x", "y").renew().tolist() == [1, 1]
    assert leases(database, "b", clock, "y", "z").renew().tolist() == [NOT_HELD, 1]


def test_the_holder_stops_to_act_before_anybody_may_take_over(database: Database, tmp_path: Path) -> None:
    clock = Steady()
    own = leases(database, "a", clock)
    heart = Heartbeat(("chat",), own, Controls(database), Mode.ACT, None, 45.0, clock)
    heart.beat()
    assert heart.leading().tolist() == [True]
    clock.now_s += 29.0
    assert heart.leading().tolist() == [True]
    clock.now_s += 2.0
    assert heart.leading().tolist() == [False]


def test_a_heart_that_cannot_reach_the_database_loses_its_leases_with_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Steady()
    own = leases(database, "a", clock)
    heart = Heartbeat(("chat",), own, Controls(database), Mode.ACT, None, 45.0, clock)
    heart.beat()

    def down() -> None:
        raise LeasesUnavailable("no route")

    monkeypatch.setattr(own, "renew", down)
    for _ in range(4):
        clock.now_s += 10.0
        heart.beat()
    assert heart.pulse.problem == "no route"
    assert heart.leading().tolist() == [False]


def test_orders_reach_the_next_pulse(database: Database) -> None:
    heart = Heartbeat(
        ("a", "b"), leases(database, "x", Steady(), "a", "b"), Controls(database), Mode.ADVISE, None, 45.0
    )
    controls = Controls(database)
    assert heart.beat().modes == (Mode.ADVISE, Mode.ADVISE)
    controls.set_mode(["b"], Mode.ACT)
    controls.kill()
    pulse = heart.beat()
    assert pulse.modes == (Mode.ADVISE, Mode.ACT)
    assert all(reason.startswith("ordered by ") for reason in pulse.killed)
    controls.revive()
    assert heart.beat().killed == ("", "")


def test_a_process_of_this_host_that_is_gone_is_known_to_be(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from autoscaler.authority.leases import holder_name; print(holder_name())"
    )
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    assert process_gone(done.stdout.strip())
    assert not process_gone(holder_name())
    host, namespace, _, _ = holder_name().split("/")
    assert process_gone(f"{host}/{namespace}/{os.getpid()}/1")  # its number is another process's now
    assert not process_gone(f"elsewhere/{namespace}/1/1")
    assert not process_gone("a name that nobody here gave")


def test_a_lease_of_a_dead_process_of_this_host_is_taken_at_once(database: Database) -> None:
    host, namespace, _, _ = holder_name().split("/")
    clock = Steady()
    leases(database, f"{host}/{namespace}/{os.getpid()}/1", clock).renew()
    assert leases(database, holder_name(), clock).renew().tolist() == [2]


def test_a_locked_database_is_a_fault_that_is_named(database: Database, tmp_path: Path) -> None:
    import sqlite3

    lock = sqlite3.connect(tmp_path / "jevons.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LeasesUnavailable, match="locked"):
        leases(database, "a", Steady()).renew()
    with pytest.raises(RecordsUnavailable, match="locked"):
        Controls(database).kill()
    lock.execute("ROLLBACK")
    assert leases(database, "a", Steady()).renew().tolist() == [1]


def test_a_kill_file_that_cannot_be_looked_at_counts_as_there(tmp_path: Path) -> None:
    assert kill_file_engaged(None) == ""
    assert kill_file_engaged(tmp_path / "STOP") == ""
    assert kill_file_engaged(tmp_path / ("x" * 300)) != ""
    (tmp_path / "STOP").touch()
    assert kill_file_engaged(tmp_path / "STOP") == f"the file {tmp_path / 'STOP'} exists"


def test_a_damaged_archive_is_a_fault_that_is_named() -> None:
    packed = pack({})
    assert unpack(packed) == {}
    with pytest.raises(RecordsUnavailable, match="damaged"):
        unpack(packed[:-3])
