"""The live quickstart of the README, word for word, on real servers and an emulated engine.

Only the addresses in the configuration are changed, as the README says; once the controller is hosted without Ray.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from kube_objects import create_deployment, replicas_of
from kube_server import KubeApiServer
from played_fleet import PlayedFleet
from servers import ROOT, HAProxy, Process, Prometheus, wait_until

from policies.spec import find_engine

pytestmark = pytest.mark.timeout(900)
PORT = 8000
"""What the shipped configuration expects replicas to listen on."""
START_S = 400.0
"""Ray takes its time on a busy machine."""


def commands() -> list[str]:
    """The commands of the section on live control."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Live control")[2].partition("\n## ")[0]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return block[1].splitlines()


class Folder:
    """Where a user works: the shipped configurations with addresses of their own."""

    def __init__(self, path: Path, addresses: dict[str, str], kubeconfig: Path) -> None:
        self.path = path
        shutil.copytree(ROOT / "configs" / "live", path / "configs" / "live")
        config = path / "configs" / "live" / "kubernetes.yaml"
        text = config.read_text()
        for shipped, own in addresses.items():
            assert shipped in text
            text = text.replace(shipped, own)
        config.write_text(text)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "KUBECONFIG": str(kubeconfig),
            "RAY_AUTH_MODE": "disabled",
            "RAY_enable_worker_prestart": "0",
        }

    def do(self, command: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(command, comments=True)
        return subprocess.run(
            words, cwd=self.path, env=self.environment, capture_output=True, text=True, timeout=180, check=False
        )

    def found(self) -> dict[str, Any]:
        """What the status says."""
        answer = self.do("jevons status --json --config configs/live/kubernetes.yaml")
        assert answer.returncode == 0, answer.stderr
        return dict(json.loads(answer.stdout))

    def wait(self, true: Callable[[dict[str, Any]], object], what: str, limit_s: float = 120.0) -> None:
        wait_until(lambda: true(self.found()), what, limit_s=limit_s, pause_s=1.0)


@pytest.fixture
def folder(prometheus: Prometheus, haproxy: HAProxy, kube: KubeApiServer, tmp_path: Path) -> Iterator[Folder]:
    create_deployment(kube, "chat", 1)
    prometheus.scrape([(f"127.0.0.1:{haproxy.metrics_port}", {"job": "haproxy"})], "-haproxy")
    fleet = PlayedFleet(kube, prometheus, "chat", find_engine("llama-3.1-8b-h100", Path()), 1.0, PORT)
    try:
        wait_until(lambda: fleet.most >= 1, "the replica is ready")
        body = {"prompt": "one two three", "max_tokens": 5}
        for _ in range(3):
            answer = requests.post(f"http://127.0.1.1:{PORT}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200
        prometheus.wait_scraped([f"127.0.1.1:{PORT}", f"127.0.0.1:{haproxy.metrics_port}"])
        addresses = {
            "http://prometheus.monitoring:9090": prometheus.url,
            "haproxy.default:9999": str(haproxy.socket),
            "/var/lib/jevons": str(tmp_path),
            "port: 9490": "port: 0",
        }
        yield Folder(tmp_path / "work", addresses, kube.kubeconfig)
    finally:
        fleet.stop()


def one(found: dict[str, Any]) -> tuple[str, str]:
    """Mode and outcome of the service."""
    return found["services"][0]["mode"], found["services"][0]["outcome"]


@pytest.mark.parametrize("host", [pytest.param("", marks=pytest.mark.ray), "--no-ray"], ids=["on Ray", "without Ray"])
def test_the_readmes_live_quickstart_does_what_it_says(
    folder: Folder, kube: KubeApiServer, haproxy: HAProxy, tmp_path: Path, host: str
) -> None:
    in_force = {"scaled", "unchanged"}
    controller: Process | None = None
    done = []
    try:
        for command in commands():
            words = shlex.split(command, comments=True)
            done.append(words[1])
            if words[1] == "run":
                script = ["bash", "-c", f"cd {folder.path} && exec {shlex.join(words)} {host}"]
                controller = Process(script, tmp_path / "run.log", folder.environment)
                folder.wait(lambda found: one(found) == ("advise", "advised"), "it advises", START_S)
                wait_until(lambda: haproxy.serves("chat"), "requests are routed while it advises")
                continue
            answer = folder.do(command)
            assert answer.returncode == 0, f"{command}\n{answer.stdout}{answer.stderr}"
            match words[1]:
                case "check":
                    assert answer.stderr.strip().endswith("0 problems")
                case "status":
                    assert "leads 1 of 1 services, policy default.zip@" in answer.stdout
                    assert re.search(r"chat +READY .*advise +1 -> \d+ +advised", answer.stdout)
                case "explain":
                    assert "chat" in answer.stdout
                    assert "advise" in answer.stdout
                case "mode":
                    folder.wait(lambda found: one(found)[0] == "act" and one(found)[1] in in_force, "it acts")
                case "pause":
                    folder.wait(lambda found: found["killed"] and one(found) == ("act", "held"), "it is stopped")
                case "resume":
                    folder.wait(lambda found: not found["killed"] and one(found)[1] in in_force, "it goes on")
                case "down":
                    assert controller is not None
                    assert controller.process.wait(120) == 0
    finally:
        if controller is not None:
            controller.stop()
    assert done == ["check", "run", "status", "explain", "mode", "pause", "resume", "down"]
    assert replicas_of(kube, "chat") == 1  # nobody has sent a request
