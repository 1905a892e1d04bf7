"""A server whose answers begin at once and then come a byte at a time, so that no wait for the next byte is long."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading

PAUSE_S = 0.02
"""Between two bytes."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
PARTS = {
    "status": (b"HTTP", b"/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"),
    "header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x" * 10_000),
    "body": (HEAD + b"Content-Length: 10000\r\n\r\n", b" " * 10_000),
    "chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n2710\r\n", b" " * 10_000),
    "until it closes": (HEAD + b"Connection: close\r\n\r\n", b" " * 10_000),
}
"""What is sent at once, and what drips, by where it drips."""


class DrippingServer:
    """Takes connections, and drips on each.

    Args:
        part: where it drips.
        tls: its certificate; plain text when None.
    """

    def __init__(self, part: str, tls: ssl.SSLContext | None = None) -> None:
        self._whole, self._drops = PARTS[part]
        self._tls = tls
        self._stopped = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._drip, args=(connection,), daemon=True).start()

    def _drip(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            stream = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            stream.recv(65536)
            stream.sendall(self._whole)
            for place in range(len(self._drops)):
                if self._stopped.wait(PAUSE_S):
                    return
                stream.sendall(self._drops[place : place + 1])
