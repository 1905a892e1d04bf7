"""Commands on one HAProxy process through its Runtime API, and its servers as it reports them.

This module must not know about services or targets.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass

DRAIN_FLAGS = 0x08 | 0x10
"""Administrative drain, forced or inherited, in the same place (HAProxy management guide, srv_admin_state)."""
MAINTENANCE_FLAGS = 0x01 | 0x02 | 0x04 | 0x20
RUNNING = (1, 2)
"""Operational states starting and running (srv_op_state)."""
MIN_CELLS = 10
BUFFER = 65536


class HAProxyError(RuntimeError):
    """Raised when HAProxy did not answer or refused a command."""


@dataclass(frozen=True)
class Server:
    """One server of a backend."""

    name: str
    address: str
    ready: bool
    draining: bool
    away: bool
    """In maintenance: it gets no request, and its health is not checked."""
    sessions: int
    cap: int


class RuntimeApi:
    """Commands on one HAProxy process. An empty answer is success.

    Args:
        address: path of the socket, or host:port.
        timeout_s: longest wait for one answer.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s

    def ask(self, command: str) -> str:
        """The answer to one command.

        Raises:
            HAProxyError: when there is none in time.
        """
        until_s = time.monotonic() + self._timeout_s
        try:
            with self._connect() as connection:
                connection.sendall(f"{command}\n".encode())
                parts: list[bytes] = []
                while True:
                    connection.settimeout(max(0.01, until_s - time.monotonic()))
                    part = connection.recv(BUFFER)
                    if not part:
                        return b"".join(parts).decode(errors="replace").strip()
                    parts.append(part)
        except OSError as error:
            raise HAProxyError(f"{self.address}: {error.strerror or error}") from None

    def tell(self, command: str, accepted: tuple[str, ...] = ()) -> None:
        """A command that changes something.

        Raises:
            HAProxyError: when it is refused; answers that begin with an accepted text are none.
        """
        answer = self.ask(command)
        if answer and not answer.startswith(accepted or ("\0",)):
            raise HAProxyError(f"{self.address}: {command}: {' '.join(answer.split())}")

    def servers(self, backend: str) -> dict[str, Server]:
        """Servers by name.

        Raises:
            HAProxyError: when there is no such backend, or the answer is not one of HAProxy's.
        """
        rows = self.ask(f"show servers state {backend}").splitlines()
        titles = next((row.lstrip("# ").split() for row in rows if row.startswith("#")), None)
        if titles is None:
            raise HAProxyError(f"{self.address}: backend {backend}: {' '.join(rows) or 'no answer'}")
        stats = self._stats(backend)
        found = {}
        try:
            for row in rows:
                cells = row.split()
                if row.startswith("#") or len(cells) < len(titles) - 1 or len(cells) < MIN_CELLS:
                    continue
                server = dict(zip(titles, cells, strict=False))
                found[server["srv_name"]] = _server(server, stats.get(server["srv_name"], {}))
        except (KeyError, ValueError) as error:
            raise HAProxyError(f"{self.address}: backend {backend}: an answer of another shape: {error}") from None
        return found

    def _stats(self, backend: str) -> dict[str, dict[str, str]]:
        """Statistics by server name."""
        # Type 4 is servers; every proxy.
        rows = self.ask("show stat -1 4 -1").splitlines()
        titles = rows[0].lstrip("# ").split(",") if rows else []
        parsed = [dict(zip(titles, row.split(","), strict=False)) for row in rows[1:] if row]
        return {row.get("svname", ""): row for row in parsed if row.get("pxname") == backend}

    def _connect(self) -> socket.socket:
        host, colon, port = self.address.rpartition(":")
        if colon and port.isdigit() and "/" not in self.address:
            return socket.create_connection((host, int(port)), self._timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(self._timeout_s)
        try:
            connection.connect(self.address)
        except OSError:
            connection.close()
            raise
        return connection


def _server(state: dict[str, str], stat: dict[str, str]) -> Server:
    """One server from its row of `show servers state` and of `show stat`."""
    admin = int(state["srv_admin_state"])
    drains, away = bool(admin & DRAIN_FLAGS), bool(admin & MAINTENANCE_FLAGS)
    return Server(
        name=state["srv_name"],
        address=f"{state['srv_addr']}:{state['srv_port']}",
        ready=int(state["srv_op_state"]) in RUNNING and not drains and not away,
        draining=drains,
        away=away,
        sessions=int(stat.get("scur") or 0) + int(stat.get("qcur") or 0),
        cap=int(stat.get("slim") or 0),
    )
