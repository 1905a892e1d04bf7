"""An answer that comes a byte at a time ends with the time-out of its request, wherever it drips."""

from __future__ import annotations

import datetime
import gzip
import ipaddress
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import urllib3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from dripping_server import PARTS, DrippingServer

from autoscaler.answer_size import MAX_ANSWER_BYTES
from autoscaler.bounded_http import BoundedAdapter, bound

TIMEOUT_S = 0.4
LATE_S = 1.6
"""The machine may be busy; a drip would last for minutes."""


@pytest.fixture(params=[part for part in PARTS if part != "status"])
def dripping(request: pytest.FixtureRequest) -> Iterator[DrippingServer]:
    server = DrippingServer(request.param)
    yield server
    server.stop()


def test_of_requests_a_time_out_is_that_of_the_whole_answer(dripping: DrippingServer) -> None:
    with requests.Session() as session:
        session.mount("http://", BoundedAdapter())
        began_s = time.monotonic()
        with pytest.raises(requests.RequestException):
            session.get(dripping.url, timeout=TIMEOUT_S)
        assert TIMEOUT_S / 2 < time.monotonic() - began_s < TIMEOUT_S + LATE_S


def test_of_urllib3_a_time_out_is_that_of_the_whole_answer(dripping: DrippingServer) -> None:
    manager = urllib3.PoolManager(retries=False)
    bound(manager)
    began_s = time.monotonic()
    with pytest.raises(urllib3.exceptions.HTTPError):
        manager.request("GET", dripping.url, timeout=urllib3.Timeout(total=TIMEOUT_S), preload_content=False).read()
    assert TIMEOUT_S / 2 < time.monotonic() - began_s < TIMEOUT_S + LATE_S


def test_an_answer_that_drips_for_less_comes_whole_and_its_connection_is_kept() -> None:
    server = DrippingServer("status")
    with requests.Session() as session:
        session.mount("http://", BoundedAdapter())
        assert session.get(server.url, timeout=30.0).text == "{}"
    server.stop()


def test_an_answer_that_unpacks_to_more_than_any_is_refused() -> None:
    packed = gzip.compress(bytes(MAX_ANSWER_BYTES + 2**20))
    assert len(packed) < 2**17

    class Packed(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(packed)))
            self.end_headers()
            self.wfile.write(packed)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Packed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with requests.Session() as session:
        session.mount("http://", BoundedAdapter())
        with pytest.raises(requests.RequestException, match="the answer is larger than 64 MiB"):
            session.get(f"http://127.0.0.1:{server.server_port}", timeout=30.0)
    server.shutdown()
    server.server_close()


def test_an_encrypted_answer_ends_in_time_too(tmp_path: Path) -> None:
    server = DrippingServer("body", certificate(tmp_path))
    with requests.Session() as session:
        session.mount("https://", BoundedAdapter())
        began_s = time.monotonic()
        with pytest.raises(requests.RequestException, match="timed out"):
            session.get(server.url, timeout=TIMEOUT_S, verify=str(tmp_path / "certificate.pem"))
        assert time.monotonic() - began_s < TIMEOUT_S + LATE_S
    server.stop()


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's context with a certificate of its own, which is kept in the folder."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    made = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file = folder / "certificate.pem"
    file.write_bytes(made.public_bytes(pem) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context
