"""No output of a live controller holds a secret: terminal, log, JSON, metrics page, database or any other file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from policies.spec import shipped_configs

SENTINEL = "s3ntinel"
ENVIRONMENT = {
    "DB_PASSWORD": f"{SENTINEL}-database",
    "PROM_TOKEN": f"{SENTINEL}-token",
    "MLFLOW_TRACKING_PASSWORD": f"{SENTINEL}-mlflow-password",
    "RAY_AUTH_TOKEN": f"{SENTINEL}-ray-token",
}


class Echo(BaseHTTPRequestHandler):
    """Refuses everything, and repeats what it was sent, as gateways do in their errors."""

    def do_GET(self) -> None:
        body = json.dumps({"status": "error", "error": f"{dict(self.headers)} \x1b[2J {self.headers}"}).encode()
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def write_config(folder: Path, echo: str, **changes: Any) -> Path:
    path = folder / "live.yaml"
    spec = yaml.safe_load((shipped_configs() / "live" / "services" / "chat.yaml").read_text())
    data = {
        "name": "secrets",
        "services": [spec],
        "metrics": {
            "url": f"http://me:{SENTINEL}-prometheus@{echo}",
            "engines": ["ray-serve"],
            "gateway": "ray-serve",
            "auth": {"bearer_token_env": "PROM_TOKEN"},
            "attempts": 1,
        },
        "actuator": {
            "kind": "ray_serve",
            "address": f"http://me:{SENTINEL}-serve@{echo}",
            "deadline_s": 1.0,
        },
        "policy": {
            "reference": "models:/jevons-policy@champion",
            "tracking_uri": f"http://me:{SENTINEL}-mlflow@{echo}",
            "cache": str(folder / "cache"),
        },
        "records": {"url": f"sqlite:///{folder / 'records.db'}"},
        "kill_file": str(folder / "STOP"),
        "targets_file": str(folder / "targets.json"),
        "exposition": {"port": 0},
        "ray": {"address": f"ray://me:{SENTINEL}-ray@{echo}"},
        **changes,
    }
    path.write_text(yaml.safe_dump(data))
    return path


def jevons(*words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jevons", *map(str, words)],
        env={**os.environ, **ENVIRONMENT, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(*words: str | Path) -> str:
    output, _ = jevons(*words).communicate(timeout=120)
    return output


def without_secrets(text: str) -> str:
    assert SENTINEL not in text, next(line for line in text.splitlines() if SENTINEL in line)
    assert "\x1b" not in text
    return text


def test_a_controller_that_reaches_nothing_writes_its_secrets_nowhere(tmp_path: Path, echo: str) -> None:
    config = write_config(tmp_path, echo)
    text = without_secrets(said("check", "--config", config))
    assert f"http://me:***@{echo}" in text
    without_secrets(said("check", "--config", config, "--json"))

    running = jevons("run", "--no-ray", "--config", config)
    try:
        status: dict[str, Any] = {"controllers": []}
        for _ in range(60):
            found = without_secrets(said("status", "--config", config, "--json"))
            status = json.loads(found[found.index("{") :])
            if status["controllers"] and status["controllers"][0]["doing"] == "acts":
                break
            time.sleep(0.5)
        controller = status["controllers"][0]
        assert controller["doing"] == "acts"
        assert any("***" in problem for problem in controller["problems"])
        without_secrets(said("status", "--config", config))
        without_secrets(said("explain", "chat", "--config", config, "--json"))
        with urllib.request.urlopen(f"http://127.0.0.1:{controller['metrics_port']}/metrics") as page:
            without_secrets(page.read().decode())
    finally:
        running.send_signal(signal.SIGTERM)
        log, _ = running.communicate(timeout=60)
    assert "***" in without_secrets(log)
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != config]
    assert tmp_path / "records.db" in written
    assert [path for path in written if SENTINEL.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("words", "url"),
    [
        (("status",), "postgresql://me:${DB_PASSWORD}@127.0.0.1:9/jevons"),
        (("run", "--no-ray"), f"postgresql+nowhere://me:{SENTINEL}-plain@127.0.0.1:9/jevons"),
        (("pause", "--all"), f"me:{SENTINEL}@h"),
        (("explain", "chat"), f"sqlite:////nowhere/x.db?password={SENTINEL}"),
    ],
)
def test_a_database_that_is_not_there_is_named_without_its_password(
    tmp_path: Path, echo: str, words: tuple[str, ...], url: str
) -> None:
    text = without_secrets(said(*words, "--config", write_config(tmp_path, echo, records={"url": url})))
    assert "error: " in text


def test_a_misplaced_secret_is_not_repeated(tmp_path: Path, echo: str) -> None:
    metrics = {"url": f"http://{echo}", "auth": {"bearer_token": f"{SENTINEL}-in-the-wrong-place"}}
    text = without_secrets(said("status", "--config", write_config(tmp_path, echo, metrics=metrics)))
    assert "field metrics.auth.bearer_token: Extra inputs are not permitted" in text
