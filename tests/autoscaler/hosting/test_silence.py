"""A controller that has fallen silent in the database is asked at its own port: it may live, and cannot write."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.authority.leases import holder_name
from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.service import LiveService
from autoscaler.hosting.silence import CAUSES, Silent, ask
from autoscaler.hosting.status import status_of
from autoscaler.records.database import CONTROLLERS


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveService]:
    """It leads, serves its metrics, and has written nothing for 100 s: its disk is full."""
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, exposition={"port": 0}))
    world.run(service, 2)

    def full(*_: object) -> None:
        raise RecordsUnavailable("database or disk is full")

    monkeypatch.setattr(service.records, "record", full)
    monkeypatch.setattr(service._presence, "_put", full)
    world.run(service, 1)
    with service.database.begin() as connection:
        connection.execute(CONTROLLERS.update().values(beat_s=time.time() - 100.0))
    yield service
    service.close()


def found(service: LiveService) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `jevons status` knows of the controller and of its service."""
    status = status_of(service.config, service.database, ask_silent=True)
    return status["controllers"][0], status["services"][0]


@pytest.mark.plays("the disk of the records is full", "`jevons status` asks the controller itself, and shows its cause")
def test_one_that_lives_says_itself_what_is_wrong(silent: LiveService) -> None:
    controller, row = found(silent)
    url = f"http://127.0.0.1:{silent.metrics_port}"
    assert (controller["doing"], controller["leads"]) == ("silent", 1)
    assert controller["problems"][0] == f"{url} answers: it lives, and what it says does not reach this database"
    assert "record: database or disk is full" in controller["problems"]
    assert (row["state"], row["reason"]) == ("held", "database or disk is full")


def test_one_that_does_not_answer_is_said_with_what_may_be_the_matter(silent: LiveService) -> None:
    assert silent._server is not None
    silent._server.close()
    controller, row = found(silent)
    silent._server = None
    assert controller["problems"][0].endswith(f"Connection refused): {CAUSES}")
    assert row["reason"] == f"its controller has been silent for 100 s: {controller['problems'][0]}"


def test_the_answer_of_another_process_is_not_taken_for_its_own(silent: LiveService) -> None:
    (answer,) = ask([Silent(holder_name("other"), socket.gethostname(), silent.metrics_port)], "0.0.0.0")
    assert (answer.told, answer.said) == (
        f"another process answers at http://127.0.0.1:{silent.metrics_port}: {CAUSES}",
        {},
    )


@pytest.mark.parametrize(("host", "port"), [("elsewhere", 9490), (socket.gethostname(), None)])
def test_one_that_cannot_be_asked_from_here_is_not(host: str, port: int | None) -> None:
    assert ask([Silent("a", host, port)], "127.0.0.1")[0].told == CAUSES


def test_all_are_asked_side_by_side_and_within_a_second() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        began_s = time.monotonic()
        answers = ask([Silent("a", socket.gethostname(), nobody.getsockname()[1])] * 5, "127.0.0.1")
    assert time.monotonic() - began_s < 3.0
    assert {answer.told.partition(" does not")[2] for answer in answers} == {f" answer (no answer in time): {CAUSES}"}
