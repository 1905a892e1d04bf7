"""What the driver makes of an actor's answers, with a Ray that answers as it is told."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from live_fakes import live_config, service_spec
from servers import wait_until

from autoscaler.authority.controls import Controls, DownWatch
from autoscaler.hosting.attempts import Run
from autoscaler.hosting.config import LiveConfig, RayConfig
from autoscaler.hosting.ray_host import (
    EXIT_ENDED,
    EXIT_FAILED,
    Watched,
    _as_word,
    _of_word,
    answers,
    drive,
    remove_ended,
    supervise,
)
from autoscaler.hosting.status import status_of
from autoscaler.records.database import Database
from policies.engine import ConfigError
from policies.secret_url import REVEALED


class GetTimeoutError(Exception):
    pass


class RayActorError(Exception):
    actor_init_failed = False


class ActorUnavailableError(RayActorError):
    pass


class FakeRay:
    """Actors that answer what is in `answers`, one look after the other."""

    exceptions = SimpleNamespace(
        GetTimeoutError=GetTimeoutError, RayActorError=RayActorError, ActorUnavailableError=ActorUnavailableError
    )

    def __init__(self, *found: Any) -> None:
        self.found, self.made = list(found), 0
        self.there: list[Any] = []  # actors of earlier drivers
        self.removed: list[Any] = []

    def remote(self, actor: type) -> FakeRay:
        return self

    def options(self, **_: Any) -> Any:
        def make(config: str, shard: int, before_s: float | None) -> Any:
            self.made += 1
            self.before_s = before_s
            return SimpleNamespace(standing=SimpleNamespace(remote=lambda: "asked"))

        return SimpleNamespace(remote=make)

    def get_actor(self, name: str, namespace: str) -> Any:
        if not self.there:
            raise ValueError(f"no actor {name}")
        return self.there[0]

    def kill(self, actor: Any, no_restart: bool) -> None:
        self.removed.append(actor)

    def get(self, asked: Any, timeout: float) -> Any:
        found = self.found.pop(0)
        if isinstance(found, Exception):
            raise found
        return found


def watched(folder: Path, *found: Any) -> tuple[Watched, FakeRay, list[str]]:
    ray, said = FakeRay(*found), []
    run = Run(folder / "live.yaml", live_config(folder, name="test"), DownWatch("test"))
    return Watched(ray, run, 0, said.append), ray, said


def test_what_changes_is_said_once(tmp_path: Path) -> None:
    one, _, said = watched(tmp_path, ("acts", ""), ("acts", ""), ("waits", "no route"), ("acts", ""), ("ended", ""))
    assert [one.look().doing for _ in range(5)] == ["acts", "acts", "waits", "acts", "ended"]
    assert said == ["test acts", "test waits: no route", "test acts", "test ended"]


def test_an_actor_that_cannot_be_made_is_final_and_in_the_status(tmp_path: Path) -> None:
    error = RayActorError("The actor died because of its creation task\n\nModuleNotFoundError: No module named 'x'")
    error.actor_init_failed = True
    one, ray, said = watched(tmp_path, error)
    assert one.look().doing == "failed"
    sentence = "its Ray actor cannot be made: ModuleNotFoundError: No module named 'x'"
    assert (said, ray.made) == ([f"test failed: {sentence}"], 1)
    config = live_config(tmp_path, name="test")
    (row,) = status_of(config, Database(config.database_url))["controllers"]
    assert (row["doing"], row["problems"]) == ("failed", [sentence])


def test_a_dead_actor_is_made_again_and_one_that_ray_restarts_is_not(tmp_path: Path) -> None:
    one, ray, _ = watched(tmp_path, ActorUnavailableError(), RayActorError("killed"), ("acts", ""))
    assert (one.look().doing, ray.made) == ("waits", 1)
    assert (one.look().doing, ray.made) == ("waits", 2)
    assert (one.look().doing, ray.made) == ("acts", 2)


def test_an_actor_that_does_not_answer_is_said_after_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("autoscaler.hosting.ray_host.time.monotonic", lambda: now[0])
    one, _, said = watched(tmp_path, ("acts", ""), *(GetTimeoutError() for _ in range(5)), ("acts", ""))
    doing = []
    for _ in range(7):
        doing.append(one.look().doing)
        now[0] += 6.0
    assert doing == ["acts", "acts", "acts", "waits", "waits", "waits", "acts"]
    assert said == ["test acts", "test waits: its Ray actor has not answered for 10 s or more", "test acts"]


@pytest.mark.parametrize(
    ("standing", "removed"), [(("ended", ""), 1), (("failed", "no"), 1), (("acts", ""), 0), (GetTimeoutError(), 0)]
)
def test_an_actor_that_has_ended_without_a_driver_is_not_taken_for_the_next(
    tmp_path: Path, standing: Any, removed: int
) -> None:
    """With --detach nobody removes it after `jevons down`; the next run would end with it."""
    ray = FakeRay(standing)
    config = live_config(tmp_path, name="test")
    remove_ended(ray, config, 0)
    assert ray.removed == []
    ray.there = [SimpleNamespace(standing=SimpleNamespace(remote=lambda: "asked"))]
    remove_ended(ray, config, 0)
    assert len(ray.removed) == removed


@pytest.fixture
def handlers() -> Iterator[None]:
    """A driver sets them for its process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run_of(config: LiveConfig) -> Run:
    return Run(Path("live.yaml"), config, DownWatch(config.name))


def rows(config: LiveConfig) -> list[tuple[str, str, list[str]]]:
    found = status_of(config, Database(config.database_url))["controllers"]
    return [(row["controller"], row["doing"], row["problems"]) for row in found]


@pytest.mark.plays("an order while its controller waits, restarts or starts")
@pytest.mark.usefixtures("handlers")
def test_a_driver_that_waits_for_its_cluster_is_in_the_status_and_hears_jevons_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoscaler.hosting.waiting.LOOK_S", 0.02)
    address = {"address": "127.0.0.1:6379"}
    one = live_config(tmp_path, service_spec("a"), service_spec("b"), shards=2, name="one", ray=address)
    two = live_config(tmp_path, name="two", ray=address)
    database = Database(one.database_url)
    database.create()
    controls, asked, said = Controls(database), [0], list[str]()
    waits = ["no Ray cluster answers at 127.0.0.1:6379; waiting for it"]
    controls.ended("one", controls.end("one"))  # carried out long before

    def answers(place: str) -> bool:
        asked[0] += 1
        if asked[0] == 2:
            found = [("one-0", "waits", waits), ("one-1", "waits", waits), ("two", "waits", waits)]
            assert sorted(rows(one)) == found
            controls.end("one")
            wait_until(lambda: sorted(rows(one))[0][1] == "ended", "the first one ends")
            assert sorted(rows(one)) == [("one-0", "ended", []), ("one-1", "ended", []), found[2]]
            controls.end("two")
        assert asked[0] < 99, "it waits on"
        return False

    monkeypatch.setattr("autoscaler.hosting.ray_host.answers", answers)
    assert drive([run_of(one), run_of(two)], detach=False, say=said.append) == EXIT_ENDED
    assert sorted(rows(one)) == [("one-0", "ended", []), ("one-1", "ended", []), ("two", "ended", [])]
    assert [line.partition(":")[0] for line in said] == [waits[0].partition(":")[0], "one ends", "two ends"]


@pytest.mark.usefixtures("handlers")
def test_a_driver_whose_run_was_told_to_end_starts_no_cluster(tmp_path: Path) -> None:
    config = live_config(tmp_path, name="test")
    database = Database(config.database_url)
    database.create()
    Controls(database).end("test")
    assert drive([run_of(config)], detach=False, say=lambda sentence: None) == EXIT_ENDED


@pytest.mark.usefixtures("handlers")
def test_a_driver_that_cannot_join_says_so_in_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(config: RayConfig) -> Any:
        raise ConfigError("no such address")

    monkeypatch.setattr("autoscaler.hosting.ray_host.connect", refused)
    config, said = live_config(tmp_path, name="test"), list[str]()
    assert drive([run_of(config)], detach=False, say=said.append) == EXIT_FAILED
    assert said == ["error: ray.address None: no such address"]
    assert rows(config) == [("test", "failed", ["ray.address None: no such address"])]


@pytest.mark.usefixtures("handlers")
def test_once_its_actors_are_there_a_driver_says_nothing_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do it themselves; of the driver nothing stays that would look as if somebody still waited."""
    config = live_config(tmp_path, name="test")
    database = Database(config.database_url)
    database.create()
    Controls(database).ended("test", before_s := Controls(database).end("test"))
    ray = FakeRay(("ended", ""), ("ended", ""))
    seen: list[list[Any]] = []

    def connect(_: RayConfig) -> Any:
        seen.append(rows(config))
        return ray

    context = SimpleNamespace(gcs_address="127.0.0.1:1")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context, raising=False)
    monkeypatch.setattr(ray, "shutdown", lambda: None, raising=False)
    monkeypatch.setattr("autoscaler.hosting.ray_host.connect", connect)
    monkeypatch.setattr("autoscaler.hosting.ray_host.answers", lambda place: True)
    monkeypatch.setattr(Watched, "is_another", lambda self: False)
    monkeypatch.setattr(Watched, "stop", lambda self: None)
    monkeypatch.setattr(Watched, "end", lambda self: None)
    assert drive([run_of(config)], detach=False, say=lambda sentence: None) == EXIT_ENDED
    assert (seen, rows(config)) == ([[("test", "starts", [])]], [])
    assert ray.before_s == before_s  # so that Ray's restarts of the actor know it, too


@pytest.mark.parametrize("before_s", [None, -math.inf, 1_700_000_000.25])
def test_what_a_run_has_heard_is_handed_to_its_next_driver(tmp_path: Path, before_s: float | None) -> None:
    data = live_config(tmp_path, name="test").model_dump(mode="json", context=REVEALED)
    path = tmp_path / "live it.yaml"
    path.write_text(yaml.safe_dump(data))
    again = _of_word(_as_word(Run(path, live_config(tmp_path), DownWatch("test", before_s))))
    assert (again.path, again.config.name, again.down.controller, again.down.before_s) == (
        path,
        "test",
        "test",
        before_s,
    )


@pytest.mark.usefixtures("handlers")
def test_a_driver_that_is_being_started_when_the_end_is_ordered_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[bool] = []

    class Child:
        def __init__(self, command: list[str], start_new_session: bool) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self) -> None:
            ended.append(True)

        def wait(self) -> int:
            assert ended, "it would run for ever"
            return -signal.SIGTERM

    monkeypatch.setattr("autoscaler.hosting.ray_host.subprocess.Popen", Child)
    assert supervise([], lambda sentence: None) == EXIT_ENDED


def test_a_head_is_there_where_somebody_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert answers(address)
    assert not answers(address)
