"""The HTTP server of a controller: /metrics for Prometheus, /healthz and /readyz for whoever hosts it, and /status.

This module must not know what is measured.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from socket import AF_INET6, SHUT_RDWR
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from autoscaler.hosting.presence import OWN_PAGE

Cause = Callable[[], str]
"""What is wrong, in words; empty when nothing is."""
LOG = logging.getLogger("jevons")
TEXT = ("Content-Type", "text/plain; charset=utf-8")
MAX_CONNECTIONS = 16
"""At once. Whoever connects asks for one page, so one more than that shuts the oldest: probes are always answered."""
REQUEST_S = 10.0
"""Longest time from connect to the last byte of the answer, however slowly a client sends or reads, seconds."""
SHUT_S = 1.0
"""Longest wait for the thread of a connection that was shut, seconds."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128  # a probe that finds the queue full tries again after a second at the earliest

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[Any, float | None] = {}  # when each was accepted, the oldest first; None once it is shut
        self._closed = threading.Condition()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._closed:
            if len(self._open) >= MAX_CONNECTIONS:
                oldest = next((one for one, since_s in self._open.items() if since_s is not None), None)
                if oldest is not None:
                    self._shut(oldest)
                self._closed.wait_for(lambda: len(self._open) < MAX_CONNECTIONS, SHUT_S)
            if len(self._open) >= MAX_CONNECTIONS:
                self.shutdown_request(request)
                return
            self._open[request] = time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._closed:
            self._open.pop(request, None)
            self._closed.notify_all()

    def service_actions(self) -> None:
        """Called by the loop about twice a second."""
        now_s = time.monotonic()
        with self._closed:
            for request, since_s in self._open.items():
                if since_s is not None and now_s - since_s > REQUEST_S:
                    self._shut(request)

    def _shut(self, request: Any) -> None:
        """Its thread, which waits for the client, reads the end or fails to write, and closes it."""
        self._open[request] = None
        with suppress(OSError):
            request.shutdown(SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):  # a client that went away is nobody's error
            LOG.error("a request to the metrics port failed", exc_info=error)


class _ServerIPv6(_Server):
    address_family = AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class StatusServer:
    """Serves in the background until it is closed.

    Args:
        host: address to listen on.
        port: any for 0.
        registry: what /metrics shows.
        unhealthy: why the process should be started again.
        unready: why it should not count as there.
        said: what the controller says of itself, as JSON, for who cannot hear it otherwise.

    Raises:
        OSError: when the address cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        unhealthy: Cause,
        unready: Cause,
        said: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        metrics = make_wsgi_app(registry)
        probes = {"/healthz": unhealthy, "/readyz": unready}

        def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                answer: Iterable[bytes] = metrics(environ, start_response)
                return answer
            if path == OWN_PAGE:
                page = json.dumps(said())
                start_response("200 OK", [("Content-Type", "application/json")])
                return [page.encode()]
            if path not in probes:
                start_response("404 Not Found", [TEXT])
                return [b"/metrics, /healthz, /readyz and /status are here\n"]
            cause = probes[path]()
            start_response("503 Service Unavailable" if cause else "200 OK", [TEXT])
            return [f"{cause or 'ok'}\n".encode()]

        try:
            self._server = make_server(host, port, app, _ServerIPv6 if ":" in host else _Server, _Quiet)
        except OSError as error:
            raise OSError(f"exposition.port: {host}:{port}: {error.strerror or error}") from None
        threading.Thread(target=self._server.serve_forever, name="jevons-http", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._server.server_port

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
