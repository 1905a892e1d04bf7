"""The metrics port answers probes whatever its other clients do, and holds few connections."""

from __future__ import annotations

import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry, Gauge

from autoscaler.hosting import server
from autoscaler.hosting.server import MAX_CONNECTIONS, StatusServer

BEGINNING = b"GET /metrics HTTP/1.1\r\nX: "


@pytest.fixture
def served() -> Iterator[StatusServer]:
    made = StatusServer("127.0.0.1", 0, CollectorRegistry(), lambda: "", lambda: "")
    yield made
    made.close()


def connect(served: StatusServer, said: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", served.port), timeout=10)
    client.sendall(said)
    return client


def healthy(served: StatusServer) -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.port}/healthz", timeout=5) as answer:
        return bool(answer.read() == b"ok\n")


def answering() -> int:
    """Threads of connections."""
    return sum("process_request_thread" in thread.name for thread in threading.enumerate())


@pytest.mark.parametrize("said", [b"", BEGINNING])
def test_probes_are_answered_while_many_slow_clients_hold_connections(served: StatusServer, said: bytes) -> None:
    before = answering()
    clients = [connect(served, said) for _ in range(5 * MAX_CONNECTIONS)]
    for _ in range(3):
        assert healthy(served)
    assert answering() - before <= MAX_CONNECTIONS
    clients[0].recv(1000)  # the oldest had to go
    clients[-1].settimeout(0.2)
    with pytest.raises(TimeoutError):
        clients[-1].recv(1)
    for client in clients:
        client.close()


def test_a_request_has_a_deadline_however_often_its_client_sends(
    served: StatusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.5)
    with connect(served, BEGINNING) as client:
        client.settimeout(0.1)
        until_s = time.monotonic() + 8  # each byte comes in time
        shut = False
        while not shut and time.monotonic() < until_s:
            with suppress(TimeoutError):
                client.recv(1)
                shut = True
            with suppress(OSError):
                client.sendall(b"a")
        assert shut


def test_an_answer_that_nobody_reads_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.5)
    registry = CollectorRegistry()
    gauge = Gauge("large", "More than the buffers of a socket hold.", ["name"], registry=registry)
    for number in range(30_000):
        gauge.labels(f"{number}{'x' * 200}").set(1)
    served = StatusServer("127.0.0.1", 0, registry, lambda: "", lambda: "")
    before = answering()
    with connect(served, b"GET /metrics HTTP/1.1\r\n\r\n"):
        until_s = time.monotonic() + 20
        time.sleep(1)
        while answering() > before and time.monotonic() < until_s:
            time.sleep(0.1)
        assert answering() <= before
    served.close()


def test_clients_that_go_away_leave_no_word(
    served: StatusServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "REQUEST_S", 0.5)
    silent = connect(served)
    for said in (b"", BEGINNING, b"GET /healthz HTTP/1.1\r\n\r\n"):
        reset = connect(served, said)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
    assert silent.recv(10) == b""
    assert healthy(served)
    assert capfd.readouterr() == ("", "")
