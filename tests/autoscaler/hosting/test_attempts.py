"""What stops a shard at its start or later: tried again where that can help, said, and given up where it cannot."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from live_fakes import live_config, service_spec
from servers import wait_until

from autoscaler.actuators.base import Refused
from autoscaler.authority.controls import OPEN_S, Controls, DownWatch
from autoscaler.controller import RecordsUnavailable
from autoscaler.hosting.attempts import Attempts
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.presence import Doing
from autoscaler.hosting.progress import Watchdog
from autoscaler.hosting.status import status_of
from autoscaler.records.database import CONTROLLERS, Database
from policies.engine import ConfigError
from policies.learned import BundleMismatch


class Loop:
    """A loop that ends as it is told."""

    doing = Doing.ACTS

    def __init__(self, end: Exception | None = None) -> None:
        self.end, self.closed = end, False
        self.ran, self.stopped = False, threading.Event()

    def run(self, watchdog: Watchdog) -> None:
        self.ran = True
        if self.end is not None:
            raise self.end

    def stop(self) -> None:
        self.stopped.set()

    def close(self) -> None:
        self.closed = True


def making(*steps: Exception | Loop) -> Callable[[LiveConfig, int, DownWatch], Loop]:
    left = list(steps)

    def make(config: LiveConfig, shard: int, down: DownWatch) -> Loop:
        step = left.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    return make


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoscaler.hosting.attempts.FIRST_PAUSE_S", 0.01)


@pytest.mark.plays("a controller that cannot run")
@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ConfigError("lease.kind: no"), "lease.kind: no"),
        (BundleMismatch("it does not fit"), "it does not fit"),
        (Refused(0, "no usable kubeconfig"), "no usable kubeconfig"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
)
def test_what_cannot_pass_is_final_and_in_the_status(tmp_path: Path, error: Exception, problem: str) -> None:
    config = live_config(tmp_path, name="test")
    attempts = Attempts(config, 0, Watchdog(), make=making(error))
    attempts.run()
    assert (attempts.standing.doing, attempts.standing.problem) == ("failed", problem)
    (row,) = status_of(config, Database(config.database_url))["controllers"]
    assert (row["doing"], row["problems"], row["leads"]) == ("failed", [problem], 0)


def test_what_can_pass_is_tried_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempts = Attempts(
        live_config(tmp_path, name="test"),
        0,
        Watchdog(),
        make=making(RecordsUnavailable("the database: no route"), OSError("the port is taken"), Loop()),
    )
    attempts.run()
    assert attempts.standing.doing == "ended"
    assert [record.getMessage() for record in caplog.records] == [
        "test: the database: no route; trying again in 0.01 s",
        "test: the port is taken; trying again in 0.02 s",
    ]


def test_a_loop_that_has_given_up_lets_go_and_another_one_begins(tmp_path: Path) -> None:
    first, second = Loop(RuntimeError("ten ticks in a row")), Loop()
    attempts = Attempts(live_config(tmp_path), 0, Watchdog(), make=making(first, second))
    attempts.run()
    assert (first.closed, second.closed, attempts.standing.doing) == (True, False, "ended")


@pytest.fixture
def controls(tmp_path: Path) -> Controls:
    """Of the database of `live_config(tmp_path)`."""
    database = Database(live_config(tmp_path).database_url)
    database.create()
    return Controls(database)


def refused(controls: Controls, at: int, give: Callable[[Controls], object]) -> Callable[..., Loop]:
    """A shard that cannot start, and an order that is given at one of its attempts."""
    left = [at]

    def make(config: LiveConfig, shard: int, down: DownWatch) -> Loop:
        left[0] -= 1
        if left[0] == 0:
            give(controls)
        assert left[0] > -2, "it goes on"
        raise OSError("the port is taken")

    return make


@pytest.mark.plays("an order while its controller waits, restarts or starts")
def test_a_shard_that_waits_hears_jevons_down(tmp_path: Path, controls: Controls) -> None:
    config = live_config(tmp_path, name="test")
    controls.ended("test", controls.end("test"))  # carried out before it began, and so not for it
    attempts = Attempts(config, 0, Watchdog(), make=refused(controls, 3, lambda controls: controls.end("test")))
    attempts.run()
    assert attempts.standing.doing == "ended"
    (row,) = status_of(config, Database(config.database_url))["controllers"]
    assert (row["doing"], row["problems"]) == ("ended", [])


def test_a_long_wait_is_said_again_and_ended_at_once(
    tmp_path: Path, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pause may be longer than the time after which a controller counts as silent."""
    monkeypatch.setattr("autoscaler.hosting.attempts.FIRST_PAUSE_S", 60.0)
    monkeypatch.setattr("autoscaler.hosting.attempts.LOOK_S", 0.02)
    config = live_config(tmp_path, name="test")
    attempts = Attempts(config, 0, Watchdog(), make=refused(controls, 9, lambda controls: None))
    thread = threading.Thread(target=attempts.run)
    thread.start()

    def seen_s() -> float:
        rows = status_of(config, Database(config.database_url))["controllers"]
        return float(time.time() - rows[0]["seen_s_ago"]) if rows and rows[0]["doing"] == "waits" else 0.0

    wait_until(lambda: seen_s() > 0.0, "it is said")
    first_s = seen_s()
    wait_until(lambda: seen_s() > first_s + 0.01, "it is said again")
    controls.end("test")
    thread.join(10)
    assert (thread.is_alive(), attempts.standing.doing) == (False, "ended")


def test_a_run_that_begins_while_jevons_down_waits_is_ended_too(tmp_path: Path, controls: Controls) -> None:
    ordered_s = controls.end("test")
    config = live_config(tmp_path, name="test")
    ended = Attempts(config, 0, Watchdog(), make=making())
    ended.run()
    assert ended.standing.doing == "ended"  # and nothing was made
    controls.ended("test", ordered_s)
    begun = Attempts(config, 0, Watchdog(), make=making(loop := Loop()))
    begun.run()
    assert loop.ran


def test_an_order_whose_command_was_ended_is_nobodys_after_some_time(
    tmp_path: Path, controls: Controls, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls.end("test")
    now_s = time.time()
    for later_s, ran in ((OPEN_S - 10.0, False), (3600.0, True), (-86400.0, True)):  # a clock may have been set, too
        monkeypatch.setattr("autoscaler.authority.controls.time.time", lambda later_s=later_s: now_s + later_s)
        Attempts(live_config(tmp_path, name="test"), 0, Watchdog(), make=making(loop := Loop())).run()
        assert loop.ran == ran


def test_what_was_ordered_between_two_processes_of_a_run_ends_the_second(tmp_path: Path, controls: Controls) -> None:
    """Ray starts an actor again: the order may have been carried out by then, as far as anybody could see."""
    before_s = controls.end("test")
    controls.ended("test", before_s)
    down = DownWatch("test")
    down.told(controls.read())
    controls.ended("test", controls.end("test"))
    again = Attempts(live_config(tmp_path, name="test"), 0, Watchdog(), DownWatch("test", down.before_s), making())
    again.run()
    assert again.standing.doing == "ended"


@pytest.mark.plays("a port that is taken", "named with its address in the log and in `status`; waited for")
@pytest.mark.parametrize("taken", ["exposition", "actuator"])
def test_a_port_that_is_taken_is_named_and_in_the_status_beside_who_has_it(
    tmp_path: Path, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoscaler.hosting.attempts.FIRST_PAUSE_S", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        actuator = {"kind": "metric_only", **({"port": port} if taken == "actuator" else {})}
        exposition = {"port": port if taken == "exposition" else None}
        config = live_config(tmp_path, name="test", actuator=actuator, exposition=exposition)
        database = Database(config.database_url)
        database.create()
        runs = {"controller": "test", "doing": "acts", "services": 1, "leads": 1, "policy": "", "states": {}}
        with database.begin() as connection:
            row = {"name": "test 1@there", "host": "there", "pid": 1, "beat_s": time.time()}
            connection.execute(CONTROLLERS.insert().values(**row, status={**runs, "problems": []}))
        attempts = Attempts(config, 0, Watchdog())
        thread = threading.Thread(target=attempts.run, daemon=True)
        thread.start()
        until_s, found = time.monotonic() + 30.0, dict[str, list[str]]()
        while "waits" not in found and time.monotonic() < until_s:
            time.sleep(0.1)
            found = {one["doing"]: one["problems"] for one in status_of(config, database)["controllers"]}
        attempts.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert found == {
            "waits": [f"{taken}.port: 127.0.0.1:{port}: Address already in use"],
            "acts": [],
        }


def test_a_shard_that_waits_is_told_to_end(tmp_path: Path) -> None:
    config = live_config(tmp_path, service_spec("a"), service_spec("b"), shards=2, name="test")
    attempts = Attempts(config, 1, Watchdog(), make=making(*(OSError("not yet") for _ in range(99))))
    thread = threading.Thread(target=attempts.run)
    thread.start()
    attempts.stop()
    thread.join(10)
    assert not thread.is_alive()
    assert (attempts.name, attempts.standing.doing) == ("test-1", "ended")
