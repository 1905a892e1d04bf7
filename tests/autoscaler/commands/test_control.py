"""The live commands: orders reach the database, and bad input is one sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from live_fakes import LiveWorld, burst
from servers import wait_until
from typer.testing import CliRunner

from autoscaler.authority.controls import ANNOTATION, Controls, DownWatch, Mode
from autoscaler.authority.leases import holder_name
from autoscaler.hosting.attempts import hear
from autoscaler.hosting.config import load_live_config
from autoscaler.hosting.presence import Presence
from autoscaler.records.database import CONTROLLERS, Database
from policies.contract import Outcome
from policies.spec import shipped_configs
from training.commands.main import app

EXAMPLES = sorted((shipped_configs() / "live").glob("*.yaml"))


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The metric-only example, with its files in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    data = yaml.safe_load((shipped_configs() / "live" / "metric_only.yaml").read_text())
    spec = yaml.safe_load((shipped_configs() / "live" / "services" / "chat.yaml").read_text())
    data |= {"services": [spec], "name": "test", "exposition": {"port": None}, "policy": {"reference": "token-demand"}}
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def jevons(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_a_live_configuration_that_advises(path: Path) -> None:
    assert load_live_config(path).mode == "advise"


def test_examples_have_names_of_their_own() -> None:
    names = [load_live_config(path).name for path in EXAMPLES]
    assert len(set(names)) == len(names) == 5


def test_what_is_deployed_is_the_kubernetes_example() -> None:
    deployed = load_live_config(shipped_configs() / "deploy" / "jevons.yaml")
    example = load_live_config(shipped_configs() / "live" / "kubernetes.yaml")
    assert deployed.model_copy(update={"name": example.name}) == example


def test_status_before_anything_ran(config: Path) -> None:
    code, out, _ = jevons("status", "--config", config, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["controllers"] == []
    assert [(row["service"], row["mode"], row["outcome"]) for row in found["services"]] == [
        ("chat", "advise", "none yet")
    ]


def test_orders_decide_what_a_controller_does(config: Path, database_url: str) -> None:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "records": {"url": database_url}}))
    loaded = load_live_config(config).located(config.parent)
    world = LiveWorld(loaded.services, [burst(peak_rps=4.0)])
    service = world.service(loaded)

    def outcome() -> str:
        service.heartbeat.beat()
        return Outcome(int(world.run(service, 1)[0].outcome[0])).name.lower()

    assert outcome() == "advised"
    assert jevons("mode", "chat", "act", "--config", config)[0] == 0
    assert outcome() in {"scaled", "unchanged"}
    assert jevons("pause", "chat", "--config", config)[0] == 0
    assert outcome() == "held"
    assert jevons("resume", "chat", "--config", config)[2].endswith("chat: act\n")  # what it was paused from
    assert outcome() in {"scaled", "unchanged"}
    assert jevons("resume", "chat", "--config", config)[2].endswith("chat: act\n")
    assert outcome() in {"scaled", "unchanged"}
    assert jevons("mode", "chat", "advise", "--config", config)[0] == 0
    assert jevons("pause", "chat", "--config", config)[0] == 0
    assert jevons("pause", "chat", "--config", config)[0] == 0
    assert jevons("resume", "chat", "--config", config)[2].endswith("chat: advise\n")
    assert outcome() == "advised"
    assert jevons("resume", "chat", "--act", "--config", config)[0] == 0
    assert outcome() in {"scaled", "unchanged"}
    assert jevons("pause", "--all", "--config", config)[0] == 0
    assert (config.parent / "runs" / "live" / "STOP").exists()
    assert outcome() == "held"
    assert "KILL SWITCH" in jevons("status", "--config", config)[1]
    assert jevons("resume", "--all", "--config", config)[0] == 0
    assert outcome() in {"scaled", "unchanged"}

    code, out, _ = jevons("explain", "chat", "--config", config)
    assert code == 0
    assert "mode act" in out
    code, out, _ = jevons("explain", "chat", "--config", config, "--json", "--tick", 1)
    assert json.loads(out)["outcome"] == "advised"
    code, _, error = jevons("explain", "chat", "--config", config, "--tick", 99)
    assert (code, error) == (2, "error: no decision for 'chat' is recorded at tick 99\n")
    service.close()


def test_other_peoples_texts_do_not_control_the_terminal(config: Path) -> None:
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    state = {"state": "held", "reason": "replicas were set to 1 by \x1b[2Jmallory [bold]\u202e", "until_s": None}
    said = {"services": 1, "leads": 1, "policy": "none", "problems": ["\x1b]0;owned\x07"], "states": {"chat": state}}
    Presence(database, "test").tell({**said, "controller": "test", "doing": "acts"})
    Presence(database, "of another release").tell({"controller": "of another release"})
    code, out, _ = jevons("status", "--config", config)
    assert (code, "mallory" in out) == (0, True)
    assert all(letter.isprintable() or letter == "\n" for letter in out), repr(out)
    world = LiveWorld(loaded.services, [burst()])
    world.owners = ("\x1b]0;mallory\x07",)
    service = world.service(loaded.model_copy(update={"mode": Mode.ACT}))
    world.run(service, 2)
    service.close()
    code, out, _ = jevons("explain", "chat", "--config", config)
    assert (code, "mallory" in out) == (0, True)
    assert all(letter.isprintable() or letter == "\n" for letter in out), repr(out)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoscaler.commands.control.QUIET_S", 0.1)


def test_an_order_that_nobody_hears_says_so_and_one_that_stops_fails(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that is given in another folder, where the database of the configuration is another one."""
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    Presence(database, "test").tell({"controller": "test", "doing": "acts", "states": {}})
    nobody = "nobody hears this yet: "
    for words in (("mode", "chat", "act"), ("pause", "chat"), ("resume", "chat"), ("pause", "--all")):
        code, _, error = jevons(*words, "--config", config)
        assert (code, nobody in error) == (0, False)
    code, _, error = jevons("mode", "chat", "act", "--config", config)
    assert error == "chat: act; the kill switch is engaged: `jevons resume --all` releases it\n"
    elsewhere = config.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    there = elsewhere / "runs" / "live" / "jevons.db"
    never = f"no controller 'test' has ever run with {there}"
    for words, expected in (
        (("mode", "chat", "act"), 0),
        (("pause", "chat"), 1),
        (("resume", "chat"), 0),
        (("pause", "--all"), 1),
        (("resume", "--all"), 0),
        (("down",), 2),
    ):
        code, _, error = jevons(*words, "--config", config)
        assert (code, never in error) == (expected, True), words
        assert "counts from the folder in which a command runs" in error
    assert never.partition(" 'test'")[0] in jevons("status", "--config", config)[1]
    assert str(there) in jevons("status", "--config", config)[1]


def test_who_resumes_is_told_what_an_annotation_still_stops(config: Path) -> None:
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    why = f"kill switch: annotation {ANNOTATION} of Lease jevons-chat; `kubectl annotate ...` ends it"
    state = {"state": "paused", "reason": why, "until_s": None}
    Presence(database, "test").tell({"controller": "test", "doing": "acts", "states": {"chat": state}})
    for words in (("resume", "--all"), ("resume", "chat")):
        code, _, error = jevons(*words, "--config", config)
        assert (code, error.endswith(f"; chat: {why}\n")) == (0, True)


def test_whoever_has_fallen_silent_is_named_to_who_gives_an_order(config: Path) -> None:
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    Presence(database, "test").tell({"controller": "test", "doing": "acts", "states": {}})
    with database.begin() as connection:
        connection.execute(CONTROLLERS.update().values(beat_s=CONTROLLERS.c.beat_s - 100.0))
    code, _, error = jevons("pause", "chat", "--config", config)
    assert code == 0  # it obeys when it wakes
    assert "nobody hears this yet: test" in error
    assert re.search(r"is silent, 1\d\d s ago", error)


@pytest.mark.usefixtures("hasty")
def test_down_waits_for_the_controllers_of_its_own_configuration(config: Path) -> None:
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    said = {"services": 1, "leads": 1, "policy": "none", "problems": [], "states": {}}
    Presence(database, "other").tell({**said, "controller": "other", "doing": "acts"})
    code, _, error = jevons("down", "--config", config)
    assert (code, "error: no controller 'test' has ever run with " in error) == (2, True)
    for doing in ("acts", "stands by", "fails", "starts", "waits"):
        Presence(database, "test").tell({**said, "controller": "test", "doing": doing})
        code, _, error = jevons("down", "--config", config, "--wait-s", 0.1)
        assert (code, error.startswith("error: test: still says that it runs after 0.1 s; it ends")) == (2, True)
    with database.begin() as connection:
        connection.execute(CONTROLLERS.update().values(beat_s=CONTROLLERS.c.beat_s - 100.0))
    code, _, error = jevons("down", "--config", config)
    assert (code, error.startswith("test: ended; test ")) == (0, True)
    assert "has been silent for 10" in error


@pytest.mark.usefixtures("hasty")
def test_what_starts_before_down_has_seen_the_end_ends_too_and_what_starts_after_it_runs(config: Path) -> None:
    loaded = load_live_config(config).located(config.parent)
    database = Database(loaded.database_url)
    database.create()
    said = {"services": 1, "leads": 1, "policy": "none", "problems": [], "states": {}, "controller": "test"}
    Presence(database, "test").tell({**said, "doing": "acts"})  # and is started again by somebody, as it looks
    assert jevons("down", "--config", config, "--wait-s", 0.1)[0] == 2
    for host in ("--ray", "--no-ray"):
        code, _, error = jevons("run", host, "--config", config)
        by = Controls(database).read().down["test"].by
        sentence = f"test is not started: `jevons down` by {by} has not seen the last one end"
        assert (code, error) == (0, f"{sentence}; say it again, then start\n")
    # It is seen at once that it was killed, and not whether somebody starts it again.
    host, namespace, *_ = holder_name("test").split("/")
    killed = Presence(database, "test")
    killed._process = f"{host}/{namespace}/{os.getpid()}/1/test"
    killed.tell({**said, "doing": "acts"})
    assert json.loads(jevons("status", "--config", config, "--json")[1])["controllers"][0]["doing"] == "silent"
    assert jevons("down", "--config", config, "--wait-s", 0.1)[0] == 2
    Presence(database, "test").tell({**said, "doing": "ended"})
    assert jevons("down", "--config", config) == (0, "", "test: ended\n")
    assert hear(loaded, DownWatch("test")) == ""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mode", "chat", "on"), "error: mode 'on': expected advise, act or paused"),
        (("mode", "code", "act"), "no service named 'code'; there are chat"),
        (("pause",), "error: name at least one service, or --all"),
        (("pause", "chat", "--all"), "name services or --all, not both"),
        (("resume", "chat", "--all"), "name services or --all, not both"),
        (("explain", "code"), "no service named 'code'"),
        (("explain", "chat"), "error: no decision for 'chat' is recorded"),
        (("replay", "--policy", "hpa"), "error: no decision of the last 24 hours is recorded"),
        (("run", "--detach"), "error: --detach needs a Ray cluster that stays"),
    ],
)
def test_bad_input_is_one_sentence(config: Path, words: tuple[str, ...], sentence: str) -> None:
    code, _, error = jevons(*words, "--config", config)
    assert code == 2
    assert sentence in error
    assert "Traceback" not in error


@pytest.mark.plays("native code ends the process", "the stacks of its threads are in the log")
def test_what_ends_a_controller_from_below_leaves_its_stacks_in_the_log(config: Path) -> None:
    jevons_file = Path(sys.executable).parent / "jevons"
    command = [jevons_file, "run", "--no-ray", "--config", config]
    database = Database(load_live_config(config).located(config.parent).database_url)
    database.create()

    def ticks() -> bool:
        with database.begin() as connection:
            return bool(connection.execute(CONTROLLERS.select()).all())

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        wait_until(ticks, "a first tick")
        running.send_signal(signal.SIGBUS)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in said
    assert "autoscaler/hosting/service.py" in said
    database.close()


@pytest.mark.parametrize("interval_s", [5.0, 60.0])
def test_a_learned_policy_at_another_interval_is_refused_before_anything_runs(config: Path, interval_s: float) -> None:
    data = yaml.safe_load(config.read_text())
    data["services"][0]["interface"] = {"window": {"control_interval_s": interval_s, "metrics_delay_s": 2.0}}
    config.write_text(yaml.safe_dump({**data, "policy": {"reference": "learned"}}))
    sentence = (
        f"policy.reference 'learned': trained for a decision every 15 s, but control_interval_s is {interval_s:g} s; "
        "set policy.reference to a rule, such as token-demand"
    )
    code, _, error = jevons("run", "--no-ray", "--config", config)
    assert (code, error) == (2, f"error: {sentence}\n")
    code, out, _ = jevons("check", "--config", config)
    assert code == 1
    assert f"PROBLEM control interval: {sentence}" in out
    config.write_text(yaml.safe_dump({**data, "policy": {"reference": "token-demand"}}))
    assert f"ok      control interval: a decision every {interval_s:g} s" in jevons("check", "--config", config)[1]


def routed(replicas: str | None, service: str) -> dict[str, object]:
    """An actuator whose gateway follows replicas of a kind."""
    gateway = {"kind": "haproxy", "sockets": ["/run/haproxy.sock"], "route": [service]}
    return gateway if replicas is None else {"kind": "composite", "replicas": {"kind": replicas}, "batch_cap": gateway}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"mode": "go"}, "mode"),
        ({"shards": 2}, "shards: 2 actors for 1 services"),
        ({"colour": 1}, "colour"),
        ({"name": "Not a name"}, "name"),
        ({"services": ["nowhere.yaml"]}, "live.yaml: field services.0: "),
        ({"services": ["nowhere.yaml"]}, "nowhere.yaml: no such file"),
        ({"records": {"url": "sqlite:///x", "keep_days": 0}}, "records.keep_days"),
        ({"policy": {"first_prices": {"nobody": 3}}}, "policy.first_prices: there is no service 'nobody'"),
        ({"policy": {"first_prices": {"chat": 0}}}, "policy.first_prices.chat"),
        ({"actuator": routed(None, "chat")}, "actuator.route: only replicas in Kubernetes can be followed"),
        ({"actuator": routed("ray_serve", "chat")}, "actuator.batch_cap.route: only replicas in Kubernetes"),
        ({"actuator": routed("kubernetes", "chta")}, "actuator.batch_cap.route: there is no service 'chta'"),
    ],
)
def test_a_wrong_field_is_named(config: Path, change: dict[str, object], field: str) -> None:
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **change}))
    code, _, error = jevons("status", "--config", config)
    assert code == 2
    assert field in error


def test_two_routed_services_with_one_backend_are_refused(config: Path) -> None:
    data = yaml.safe_load(config.read_text())
    services = [*data["services"], {**data["services"][0], "service": "code"}]
    gateway = {"kind": "haproxy", "sockets": ["/run/haproxy.sock"], "backend": "engines", "route": ["*"]}
    actuator = {"kind": "composite", "replicas": {"kind": "kubernetes"}, "batch_cap": gateway}
    config.write_text(yaml.safe_dump({**data, "services": services, "actuator": actuator}))
    code, _, error = jevons("status", "--config", config)
    assert (code, "route: 'chat' and 'code' have one backend, 'engines'" in error) == (2, True)


def test_two_configurations_of_one_name_are_refused(config: Path) -> None:
    code, _, error = jevons("run", "--config", config, config)
    assert (code, "two configurations have the name 'test'" in error) == (2, True)
