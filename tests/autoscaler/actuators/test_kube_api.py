"""The connection to an API server: answers that drip, and logins that are refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from dripping_server import PARTS, DrippingServer

from autoscaler.actuators.kube_api import KubeApi, KubeConnection, KubeError, NoAnswer
from autoscaler.actuators.kube_watch import KubeWatch


def connection(folder: Path, url: str, **waits: float) -> KubeConnection:
    file = folder / "kubeconfig"
    config = {
        "current-context": "local",
        "clusters": [{"name": "local", "cluster": {"server": url}}],
        "users": [{"name": "user", "user": {"token": "t"}}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": "user"}}],
    }
    file.write_text(yaml.safe_dump(config))
    return KubeConnection.model_validate({"kubeconfig": file, **waits})


@pytest.fixture(params=[part for part in PARTS if part != "status"])
def dripping(request: pytest.FixtureRequest) -> Iterator[DrippingServer]:
    server = DrippingServer(request.param)
    yield server
    server.stop()


def test_an_answer_that_drips_ends_with_its_time_out(dripping: DrippingServer, tmp_path: Path) -> None:
    api = KubeApi(connection(tmp_path, dripping.url, timeout_s=0.3, deadline_s=0.4))
    began_s = time.monotonic()
    with pytest.raises(NoAnswer, match="timed out"):
        api.get("/api")
    assert time.monotonic() - began_s < 3.0
    api.close()


def test_a_watch_that_drips_is_unknown_and_ends(tmp_path: Path) -> None:
    server = DrippingServer("body")
    api = KubeApi(connection(tmp_path, server.url, timeout_s=0.2, deadline_s=0.4, watch_s=1.0))
    with pytest.raises(KubeError, match="timed out"):
        list(api.watch("/api/v1/pods", 1.0))
    pods = KubeWatch(api, "/api/v1/pods", dict, {})
    with pytest.raises(KubeError):
        pods.read()
    pods.close()
    api.close()
    server.stop()


class Refusing:
    """Refuses every login, over connections that it keeps."""

    def __init__(self) -> None:
        self.open = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with lock:
                    outer.open += 1
                super().handle()
                with lock:
                    outer.open -= 1

            def do_GET(self) -> None:
                self.send_response(401)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_login_that_stays_refused_leaves_no_connections_behind(tmp_path: Path) -> None:
    """Whoever still holds one of the clients before, such as a watch that reads."""
    server = Refusing()
    api = KubeApi(connection(tmp_path, server.url))
    held = []
    for _ in range(10):
        held.append(api._client)
        with pytest.raises(KubeError, match="HTTP 401"):
            api.get("/api")
    until_s = time.monotonic() + 10.0
    while server.open > 1 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert server.open == 1
    api.close()
    server.stop()


HALF_WRITTEN = {
    "cut": '{"users": [{"name": "x", "us',
    "empty": "",
    "a list": "[1, 2]",
    "no text": "\x00\x01",
    "no base64": yaml.safe_dump(
        {
            "current-context": "x",
            "clusters": [{"name": "x", "cluster": {"server": "https://127.0.0.1:9"}}],
            "users": [{"name": "x", "user": {"client-certificate-data": "QUJ"}}],
            "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
        }
    ),
}


@pytest.mark.parametrize("text", HALF_WRITTEN.values(), ids=HALF_WRITTEN)
def test_a_kubeconfig_that_is_half_written_is_named_and_read_again(text: str, tmp_path: Path) -> None:
    server = Refusing()
    whole = connection(tmp_path, server.url, deadline_s=0.3)
    api = KubeApi(whole)
    file = tmp_path / "kubeconfig"
    before = file.read_text()
    file.write_text(text)
    with pytest.raises(KubeError, match=f"^no usable kubeconfig in {file}: .*"):
        api.get("/api")
    with pytest.raises(KubeError, match=f"^no usable kubeconfig in {file}: .*"):
        KubeApi(whole)
    file.write_text(before)
    with pytest.raises(KubeError, match="HTTP 401"):
        api.get("/api")
    api.close()
    server.stop()


def test_a_server_that_is_gone_is_named_with_its_address_and_the_cause(tmp_path: Path) -> None:
    api = KubeApi(connection(tmp_path, "http://127.0.0.1:9", deadline_s=0.3))
    refused = r"no answer from http://127\.0\.0\.1:9: Failed to establish a new connection: \[Errno 111\] .* refused"
    with pytest.raises(NoAnswer, match=f"^{refused}$"):
        api.get("/api")
    with api.one_operation(), pytest.raises(NoAnswer, match=f"^{refused}$"):
        api.get("/api")
    api.close()
