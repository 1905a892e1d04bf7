"""The wait in HAProxy's queue is that of the window, on the real HAProxy, whose own average stands still."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from scraped_engines import WINDOW_S, near, scrape, source, spec, vllm
from servers import HAProxy, Prometheus, start

pytestmark = pytest.mark.scrapes

REQUESTS, AT_ONCE, SERVED_S = 80, 2, 0.1


class Backend(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        time.sleep(SERVED_S)
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 512, True


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[HAProxy]:
    """One server that takes two requests at once, 0.1 s each."""
    server = Server(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    proxy = start(HAProxy, tmp_path / "haproxy", ["chat"], {"chat": [("r1", f"127.0.0.1:{server.server_port}")]})
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(proxy.socket))
        admin.sendall(f"set maxconn server chat/r1 {AT_ONCE}\n".encode())
        admin.recv(100)
    yield proxy
    proxy.stop()
    server.shutdown()
    server.server_close()


def test_a_queue_that_is_over_no_longer_counts(prometheus: Prometheus, gateway: HAProxy) -> None:
    exposed = f"127.0.0.1:{gateway.metrics_port}"

    def request() -> None:
        urllib.request.urlopen(gateway.url("chat"), timeout=60).read()

    scrape(prometheus, [(vllm(), {"service": "chat"}), (SimpleNamespace(address=exposed), {})], wait_s=1.0)
    reader = source(prometheus.url, [spec()], gateway="haproxy")
    burst = [threading.Thread(target=request) for _ in range(REQUESTS)]
    for one in burst:
        one.start()
    time.sleep(WINDOW_S)
    during = reader.read()
    assert during.ttft_attainment[0] == 0.0  # dozens wait, five a second are given a first token
    for one in burst:
        one.join()
    time.sleep(WINDOW_S + 1.5)
    request()
    after = reader.read()
    assert near(after.ttft_attainment, 0.8)
    assert after.queue_requests.tolist() == [0.0]
    with urllib.request.urlopen(f"http://{exposed}/metrics", timeout=5) as response:
        name = 'haproxy_backend_queue_time_average_seconds{proxy="chat"} '
        lines = response.read().decode().splitlines()
    (average_s,) = [float(line.removeprefix(name)) for line in lines if line.startswith(name)]
    assert average_s > 0.1  # still, and a request would have to be so much faster in the engine
