"""A proxy in front of a real server that fails when it is told to."""

from __future__ import annotations

import contextlib
import http.client
import queue
import select
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Quiet(ThreadingHTTPServer):
    """A client that was killed leaves no traceback."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class FaultProxy:
    """Passes HTTP requests on to a real server, and fails in the way it is told: what comes back is what users see.

    `fault` is called with method and path and returns what to do: None to pass on, an HTTP status to answer with,
    "slow" to wait for `delay_s` and pass on what is still waited for then, "cut" to end the connection in the middle
    of the answer, "empty" for no body, bytes for a body of its own with status 200. A watch is passed on event by
    event, and broken off as soon as there is a fault that is not "silent".
    """

    def __init__(self, upstream: str, ca: Path | None = None) -> None:
        self.upstream, self.delay_s = upstream, 5.0
        self.fault: Callable[[str, str], int | str | bytes | None] = lambda method, path: None
        self.seen: list[tuple[str, str]] = []
        context = ssl.create_default_context(cafile=str(ca)) if ca else None
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def _pass(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else None
                path = self.path.partition("?")[0]
                proxy.seen.append(("WATCH" if "watch=true" in self.path else self.command, path))
                fault = proxy.fault(self.command, path)
                if fault in ("slow", "silent"):
                    time.sleep(proxy.delay_s)
                    if self._abandoned():
                        self.close_connection = True
                        return
                if isinstance(fault, bytes):
                    self._send(200, fault, "text/html")
                    return
                if isinstance(fault, int):
                    message = b'{"kind":"Status","message":"made to fail"}'
                    self._send(fault, message, "application/json")
                    return
                request = urllib.request.Request(f"{proxy.upstream}{self.path}", body, method=self.command)
                for name, value in self.headers.items():
                    if name.lower() not in ("host", "content-length", "connection", "accept-encoding"):
                        request.add_header(name, value)
                try:
                    with urllib.request.urlopen(request, timeout=30, context=context) as response:
                        if "watch=true" in self.path:
                            self._stream(response, path)
                            return
                        status, data = response.status, response.read()
                        kind = response.headers.get("Content-Type", "application/json")
                except urllib.error.HTTPError as error:
                    status, data, kind = error.code, error.read(), error.headers.get("Content-Type", "application/json")
                except OSError:
                    status, data, kind = 502, b"{}", "application/json"
                if fault == "cut":
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self._send(status, b"" if fault == "empty" else data, kind)

            def _stream(self, response: http.client.HTTPResponse, path: str) -> None:
                self.close_connection = True
                self.send_response(response.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                lines: queue.Queue[bytes] = queue.Queue()

                def read() -> None:
                    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed by the other thread
                        for line in response:
                            lines.put(line)
                    lines.put(b"")

                threading.Thread(target=read, daemon=True).start()
                while not self._abandoned():
                    fault = proxy.fault(self.command, path)
                    if fault == "silent":
                        time.sleep(0.05)
                        continue
                    if fault is not None:
                        return
                    try:
                        line = lines.get(timeout=0.05)
                    except queue.Empty:
                        continue
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    if not line:
                        return

            def _abandoned(self) -> bool:
                """Whether the client has hung up: what waits in front of a slow server is dropped then."""
                readable, _, _ = select.select([self.connection], [], [], 0)
                return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

            def _send(self, status: int, data: bytes, kind: str) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client did not wait

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass  # noqa: N815

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
