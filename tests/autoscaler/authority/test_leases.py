"""Who may act: leases in the database, held, refused, expired and fenced."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaler.authority.build import build_leases
from autoscaler.authority.controls import Controls, Mode, _user, kill_file_engaged
from autoscaler.authority.heartbeat import Heartbeat
from autoscaler.authority.leases import (
    NOT_HELD,
    DatabaseLeases,
    LeaseSpec,
    LeasesUnavailable,
    holder_name,
    process_gone,
)
from autoscaler.controller import RecordsUnavailable
from autoscaler.records.database import CONTROLS, Database, pack, put, unpack


class Steady:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    made = Database(database_url)
    made.create()
    yield made
    made.close()


def leases(database: Database, holder: str, clock: Steady, *services: str) -> DatabaseLeases:
    return DatabaseLeases(database, services or ("chat",), holder, 45.0, clock)


@pytest.mark.plays("two controllers")
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


@pytest.mark.plays("the wall clock jumps by a day, either way")
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


def test_shards_of_one_process_release_their_own_leases_alone(database: Database) -> None:
    clock = Steady()
    one, other = leases(database, "a", clock, "x"), leases(database, "a", clock, "y")
    one.renew(), other.renew()
    one.release()
    assert leases(database, "b", clock, "x", "y").renew().tolist() == [2, NOT_HELD]


def test_two_configurations_with_one_service_in_one_process_are_two_holders(database: Database) -> None:
    one, other = (build_leases(LeaseSpec(), database, ("chat",), name) for name in ("blue", "green"))
    assert (one.renew().tolist(), other.renew().tolist()) == ([1], [NOT_HELD])


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


def test_what_has_been_handed_back_is_not_acted_on(database: Database) -> None:
    clock = Steady()
    heart = Heartbeat(("chat",), leases(database, "a", clock), Controls(database), Mode.ACT, None, 45.0, clock)
    heart.beat()
    heart.stop(release=True)
    assert heart.leading().tolist() == [False]
    assert leases(database, "b", clock).renew().tolist() == [2]


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
    assert (heart.pulse.problem, heart.pulse.unread) == ("no route", {"chat": "no route"})
    assert heart.leading().tolist() == [False]


def test_a_row_that_nobody_understands_stops_no_order_and_no_beat(database: Database) -> None:
    clock = Steady()
    heart = Heartbeat(("chat",), leases(database, "a", clock), Controls(database), Mode.ACT, None, 45.0, clock)
    heart.beat()
    with database.begin() as connection:
        for service, mode in (("another", "nonsense"), ("<another", "")):
            put(connection, CONTROLS, {"service": service, "mode": mode, "changed_s": 1e400, "changed_by": "me"})
    Controls(database).kill()
    heart.hear()
    assert heart.killed() == ("ordered by " + _user(),)
    assert (heart.beat().problem, heart.leading().tolist()) == ("", [True])


def test_a_beat_that_ends_in_any_error_is_named_and_orders_are_heard(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Steady()
    own = leases(database, "a", clock)
    heart = Heartbeat(("chat",), own, Controls(database), Mode.ACT, None, 45.0, clock)

    def broken() -> None:
        raise OverflowError("too large for a column")

    monkeypatch.setattr(own, "renew", broken)
    Controls(database).kill()
    assert heart.beat().problem == "orders and leases: OverflowError: too large for a column"
    assert heart.killed() == ("ordered by " + _user(),)
    monkeypatch.setattr(heart._controls, "read", broken)
    heart.hear()
    assert heart.pulse.problem == "orders and leases: OverflowError: too large for a column"


def test_a_lease_that_cannot_be_read_grows_old_alone_and_is_named(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Steady()
    own = leases(database, "a", clock, "chat", "code")
    heart = Heartbeat(("chat", "code"), own, Controls(database), Mode.ACT, None, 45.0, clock)
    heart.beat()
    renew = own.renew
    monkeypatch.setattr(own, "renew", lambda: np.where([False, True], NOT_HELD, renew()))
    monkeypatch.setattr(own, "unread", lambda: ("", "Lease jevons-code: HTTP 500"))
    leading = []
    for _ in range(4):
        clock.now_s += 10.0
        heart.beat()
        leading.append(heart.leading().tolist())
    assert leading == [[True, True], [True, True], [True, False], [True, False]]
    assert heart.pulse.problem == "Lease jevons-code: HTTP 500"
    assert heart.pulse.unread == {"code": "Lease jevons-code: HTTP 500"}
    monkeypatch.undo()
    heart.beat()
    assert (heart.leading().tolist(), heart.pulse.problem) == ([True, True], "")


@pytest.mark.parametrize(("duration_s", "most_s"), [(45.0, 25.0), (8.0, 4.0)])
def test_a_deadline_in_which_all_leases_would_lapse_is_refused(duration_s: float, most_s: float) -> None:
    data: dict[str, Any] = {"kind": "kubernetes", "duration_s": duration_s}
    LeaseSpec.model_validate({**data, "connection": {"deadline_s": most_s}})
    with pytest.raises(ValueError, match=rf"connection.deadline_s: .* set it to {most_s:g} or less"):
        LeaseSpec.model_validate({**data, "connection": {"deadline_s": most_s + 0.1}})


def test_orders_are_heard_while_nobody_can_be_asked_for_leases(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases in Kubernetes, orders in the database: a standby must hear `jevons down` all the same."""
    own = leases(database, "a", Steady())
    heart = Heartbeat(("chat",), own, Controls(database), Mode.ACT, None, 45.0, Steady())

    def down() -> None:
        raise LeasesUnavailable("no route")

    monkeypatch.setattr(own, "renew", down)
    heart.beat()
    assert heart.orders is not None
    assert heart.orders.down == {}
    Controls(database).set_mode(["chat"], Mode.PAUSED)
    Controls(database).end("jevons")
    pulse = heart.beat()
    assert (pulse.modes, pulse.problem) == ((Mode.PAUSED,), "no route")
    assert [*heart.orders.down] == ["jevons"]


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
        "from autoscaler.authority.leases import holder_name; print(holder_name('jevons'))"
    )
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-c", script, root], capture_output=True, text=True, check=True)
    assert process_gone(done.stdout.strip())
    assert not process_gone(holder_name("jevons"))
    host, namespace, *_ = holder_name("jevons").split("/")
    assert process_gone(f"{host}/{namespace}/{os.getpid()}/1/jevons")  # its number is another process's now
    assert not process_gone(f"elsewhere/{namespace}/1/1/jevons")
    assert not process_gone("a name that nobody here gave")


def test_a_lease_of_a_dead_process_of_this_host_is_taken_at_once(database: Database) -> None:
    host, namespace, *_ = holder_name("jevons").split("/")
    clock = Steady()
    leases(database, f"{host}/{namespace}/{os.getpid()}/1/jevons", clock).renew()
    assert leases(database, holder_name("jevons"), clock).renew().tolist() == [2]


def test_a_locked_database_is_a_fault_that_is_named(database: Database) -> None:
    leases(database, "a", Steady()).renew()
    lock = Database(database.engine.url.render_as_string(hide_password=False))
    connection = lock.engine.connect()
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN EXCLUSIVE")
    else:
        connection.exec_driver_sql("LOCK TABLE leases, controls")
    with pytest.raises(LeasesUnavailable, match="lock"):
        leases(database, "a", Steady()).renew()
    with pytest.raises(RecordsUnavailable, match="lock"):
        Controls(database).kill()
    connection.close()
    lock.close()
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
