"""The live commands: orders reach the database, and bad input is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from live_fakes import LiveWorld, burst
from typer.testing import CliRunner

from autoscaler.hosting.config import load_live_config
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


def test_orders_decide_what_a_controller_does(config: Path) -> None:
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("mode", "chat", "on"), "error: mode 'on': expected advise, act or paused"),
        (("mode", "code", "act"), "no service named 'code'; there are chat"),
        (("pause",), "error: name at least one service, or --all"),
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


def test_two_configurations_of_one_name_are_refused(config: Path) -> None:
    code, _, error = jevons("run", "--config", config, config)
    assert (code, "two configurations have the name 'test'" in error) == (2, True)
