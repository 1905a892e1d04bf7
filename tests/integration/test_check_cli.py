"""`jevons check` from end to end: a whole configuration on real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from kube_objects import create_deployment, replicas_of, set_ready
from kube_server import KubeApiServer
from servers import Engine, Prometheus, start, wait_until
from typer.testing import CliRunner

from training.commands.main import app


@pytest.fixture
def scraped(tmp_path: Path) -> Iterator[Prometheus]:
    """An emulated engine that has answered, behind a real Prometheus."""
    server = start(Prometheus, tmp_path / "prometheus")
    engine = Engine(tmp_path).ready()
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


def write(tmp_path: Path, prometheus: str, kubeconfig: Path, ttft_s: float, **metrics: object) -> Path:
    pool = {"engine": "llama-3.1-8b-h100", "max_replicas": 8}
    service = {"service": "chat", "slo": {"ttft_s": ttft_s, "tpot_s": 0.05}, "pools": [pool]}
    live = {
        "services": [service],
        "metrics": {"url": prometheus, **metrics},
        "actuator": {"kind": "kubernetes", "connection": {"kubeconfig": str(kubeconfig)}},
    }
    path = tmp_path / "live.yaml"
    path.write_text(yaml.safe_dump(live))
    return path


def test_a_sound_configuration_passes(scraped: Prometheus, kube: KubeApiServer, tmp_path: Path) -> None:
    create_deployment(kube, "chat", replicas=2)
    set_ready(kube, "chat", 1)
    config = write(tmp_path, scraped.url, kube.kubeconfig, 0.5)
    result = CliRunner().invoke(app, ["check", "--config", str(config)])
    assert result.exit_code == 0, result.output
    assert (
        "ok      running: vllm:num_requests_running: requests in the engines' batches, 1 of 1 services" in result.stdout
    )
    assert "ok      ttft_s 0.5 of chat: is a bucket edge" in result.stdout
    assert "ok      deployments/chat in default: replicas 2, ready 1; may scale" in result.stdout
    assert result.stderr.strip().endswith("0 problems")
    assert replicas_of(kube, "chat") == 2


def test_every_problem_is_said_and_the_exit_code_is_1(scraped: Prometheus, kube: KubeApiServer, tmp_path: Path) -> None:
    create_deployment(kube, "chat", replicas=2)
    config = write(tmp_path, scraped.url, kube.limited, 0.42, service_label="app")
    result = CliRunner().invoke(app, ["check", "--config", str(config), "--json"])
    assert result.exit_code == 1
    problems = {line["subject"]: line["detail"] for line in json.loads(result.stdout) if not line["ok"]}
    assert problems["running"].endswith("nothing for chat; its series have no label app")
    assert problems["ttft_s 0.42 of chat"].endswith("use 0.25 or 0.5")
    assert problems["may update deployments/scale in default"] == "not granted: bind a Role that allows it"
    assert "HTTP 403" in problems["deployments/chat in default"]


def test_an_unreachable_prometheus_is_one_problem(kube: KubeApiServer, tmp_path: Path) -> None:
    create_deployment(kube, "chat", replicas=2)
    config = write(tmp_path, "http://127.0.0.1:9", kube.kubeconfig, 0.5, deadline_s=0.5)
    result = CliRunner().invoke(app, ["check", "--config", str(config)])
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("PROBLEM")]
    assert len(wrong) == 1
    assert wrong[0].startswith("PROBLEM Prometheus http://127.0.0.1:9: ")
