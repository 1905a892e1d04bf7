"""`jevons check` from end to end: a whole configuration on real servers."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from kube_objects import create_deployment, replicas_of, set_ready
from kube_server import KubeApiServer
from servers import Engine, Prometheus, free_port, start, wait_until
from typer.testing import CliRunner, Result

from training.commands.main import app

Config = dict[str, Any]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """An emulated engine that has answered, behind a real Prometheus."""
    folder = tmp_path_factory.mktemp("scraped")
    server = start(Prometheus, folder / "prometheus")
    engine = Engine(folder).ready()
    server.scrape([(engine.address, {"service": "chat"})])
    server.wait_scraped([engine.address])
    body = {"prompt": "one two three", "max_tokens": 5}
    assert requests.post(f"http://{engine.address}/v1/completions", json=body, timeout=60).status_code == 200

    def counted() -> bool:
        rows = requests.get(f"{server.url}/api/v1/query", {"query": "count_over_time(vllm:num_requests_running[15s])"})
        return any(int(row["value"][1]) > 3 for row in rows.json()["data"]["result"])

    wait_until(counted, "some scrapes")
    yield server
    engine.stop()
    server.stop()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sound(prometheus: str, kubeconfig: Path) -> Config:
    pool = {"engine": "llama-3.1-8b-h100", "max_replicas": 8}
    return {
        "services": [{"service": "chat", "slo": {"ttft_s": 0.5, "tpot_s": 0.05}, "pools": [pool]}],
        "metrics": {"url": prometheus},
        "actuator": {"kind": "kubernetes", "connection": {"kubeconfig": str(kubeconfig)}},
        "exposition": {"port": free_port()},
    }


def checked(config: Config, *words: str) -> Result:
    Path("live.yaml").write_text(yaml.safe_dump(config))
    return CliRunner().invoke(app, ["check", "--config", "live.yaml", *words])


def test_a_sound_configuration_passes(scraped: Prometheus, kube: KubeApiServer) -> None:
    create_deployment(kube, "chat", replicas=2)
    set_ready(kube, "chat", 1)
    result = checked(sound(scraped.url, kube.kubeconfig))
    assert result.exit_code == 0, result.output
    assert (
        "ok      running: vllm:num_requests_running: requests in the engines' batches, 1 of 1 services" in result.stdout
    )
    assert "ok      ttft_s 0.5 of chat: is a bucket edge" in result.stdout
    assert "ok      deployments/chat in default: replicas 2, ready 1; may scale" in result.stdout
    assert "ok      records sqlite:///" in result.stdout
    assert "ok      jevons: policy learned: default.zip" in result.stdout
    assert result.stderr.strip().endswith("0 problems")
    assert replicas_of(kube, "chat") == 2


def test_every_problem_is_said_and_the_exit_code_is_1(scraped: Prometheus, kube: KubeApiServer) -> None:
    create_deployment(kube, "chat", replicas=2)
    config = sound(scraped.url, kube.limited)
    config["services"][0]["slo"]["ttft_s"] = 0.42
    config["metrics"]["service_label"] = "app"
    result = checked(config, "--json")
    assert result.exit_code == 1
    problems = {line["subject"]: line["detail"] for line in json.loads(result.stdout) if not line["ok"]}
    assert problems["running"].endswith("nothing for chat; its series have no label app")
    assert problems["ttft_s 0.42 of chat"].endswith("use 0.25 or 0.5")
    assert problems["may update deployments/scale chat in default"] == "not granted: bind a Role that allows it"
    assert "HTTP 403" in problems["deployments/chat in default"]


def test_matchers_that_no_series_meets_are_named(scraped: Prometheus, kube: KubeApiServer) -> None:
    create_deployment(kube, "chat", replicas=2)
    config = sound(scraped.url, kube.kubeconfig)
    config["metrics"].update(GATEWAY, gateway_label="service", matchers={"namespace": "elsewhere"})
    result = checked(config, "--json")
    problems = {line["subject"]: line["detail"] for line in json.loads(result.stdout) if not line["ok"]}
    for signal in ("running", "arrival"):
        assert problems[signal].endswith('nothing for chat; its series do not have namespace="elsewhere": see matchers')


GATEWAY = {"gateway": "haproxy", "metrics": {"arrival": ["vllm:request_success_total"]}}
"""What stands in for a gateway's metric here."""
BROKEN: dict[str, tuple[Callable[[Config], object], str]] = {
    "Prometheus is not there": (
        lambda config: config["metrics"].update(url="http://127.0.0.1:9", deadline_s=0.5),
        r"Prometheus http://127.0.0.1:9: .*Connection refused",
    ),
    "the rate window is shorter than two scrapes": (
        lambda config: config["metrics"].update(window_s=1.0),
        r"scrape interval: .*scrape more often, or set a longer window_s",
    ),
    "the gateway's series have no such label": (
        lambda config: config["metrics"].update(GATEWAY, gateway_label="prxy"),
        r"arrival: .*nothing for chat; its series have no label prxy",
    ),
    "nothing would start a service at zero replicas": (
        lambda config: config["services"][0]["pools"][0].update(min_replicas=0, initial_replicas=1),
        r"from zero: chat: nothing counts requests while no replica runs.*set metrics.gateway, or min_replicas: 1",
    ),
    "no series names a pool": (
        lambda config: config["metrics"].update(pool_label="poool"),
        r"pool_label: none of the replicas' series has the label poool",
    ),
    "no series says who scraped": (
        lambda config: config["metrics"].update(scraper_labels=["job", "prometheus_replica", "replicaa"]),
        r"scraper_labels: none of the replicas' series has the label replicaa",
    ),
    "there is no kubeconfig": (
        lambda config: config["actuator"]["connection"].update(kubeconfig="nowhere.yaml"),
        r"actuator kubernetes: .*nowhere.yaml",
    ),
    "the Deployment has another name": (
        lambda config: config["actuator"].update(target={"name": "chat-server"}),
        r"deployments/chat-server in default: .*(404|not found)",
    ),
    "HAProxy's socket is not there": (
        lambda config: config.update(actuator={"kind": "haproxy", "sockets": ["nowhere.sock"]}),
        r"nowhere.sock.*No such file",
    ),
    "Ray Serve does not answer": (
        lambda config: config.update(
            actuator={"kind": "ray_serve", "address": "http://127.0.0.1:9", "timeout_s": 0.5, "deadline_s": 0.5}
        ),
        r"http://127.0.0.1:9.*",
    ),
    "the database's server is not there": (
        lambda config: config.update(records={"url": "postgresql://me:s3cret@127.0.0.1:9/jevons"}),
        r"records postgresql://me:\*\*\*@127.0.0.1:9/jevons: .*refused",
    ),
    "the database's secret is not set": (
        lambda config: config.update(records={"url": "postgresql://me:${NOT_SET}@127.0.0.1:9/jevons"}),
        r"records .*NOT_SET, which is not set",
    ),
    "the database's folder is a file": (
        lambda config: config.update(records={"url": "sqlite:///live.yaml/jevons.db"}),
        r"records .*live.yaml",
    ),
    "the port is somebody else's": (
        lambda config: config["exposition"].update(port=TAKEN.getsockname()[1]),
        r"port 127.0.0.1:\d+: Address already in use: set exposition.port to one that is free",
    ),
    "the targets file is in a file": (
        lambda config: config.update(targets_file="live.yaml/targets.json"),
        r"targets_file: folder .*live.yaml is no folder",
    ),
    "the bundle is not there": (
        lambda config: config.update(policy={"reference": "nowhere.zip"}),
        r"policy .*nowhere.zip: .*nowhere.zip",
    ),
    "the registry is not there": (
        lambda config: config.update(
            policy={"reference": "models:/chat@champion", "tracking_uri": "http://127.0.0.1:9"}
        ),
        r"policy models:/chat@champion: .*127.0.0.1",
    ),
    "the learned policy was trained for another interval": (
        lambda config: config["services"][0].update(interface={"window": {"control_interval_s": 30}}),
        r"trained for a decision every 15 s, but control_interval_s is 30 s",
    ),
    "a counterfactual has no such name": (
        lambda config: config.update(counterfactuals=["hpaa"]),
        r"jevons: .*hpaa",
    ),
}
TAKEN = socket.create_server(("127.0.0.1", 0))


@pytest.mark.parametrize("broken", BROKEN)
def test_each_broken_installation_has_its_sentence(scraped: Prometheus, kube: KubeApiServer, broken: str) -> None:
    create_deployment(kube, "chat", replicas=2)
    set_ready(kube, "chat", 1)
    config = sound(scraped.url, kube.kubeconfig)
    spoil, sentence = BROKEN[broken]
    spoil(config)
    result = checked(config)
    assert result.exit_code == 1, result.output
    problems = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM")]
    assert any(re.search(sentence, line) for line in problems), problems
    assert len(problems) <= 4, problems  # the sentence, and few that follow from it
    assert "s3cret" not in result.output
