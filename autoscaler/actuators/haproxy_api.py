"""Commands on one HAProxy process through its Runtime API, and its servers as it reports them.

This module must not know about services or targets.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass

from autoscaler.answer_size import whole
from policies.json_text import read_integer

DRAIN_FLAGS = 0x08 | 0x10
"""Administrative drain, forced or inherited, in the same place (HAProxy management guide, srv_admin_state)."""
MAINTENANCE_FLAGS = 0x01 | 0x02 | 0x20
"""Maintenance, in the same place. 0x04 is none: it says that the configuration once began with it (`disabled`)."""
CHECK_CONFIGURED, CHECK_ENABLED = 0x02, 0x04
"""Of a health check (srv_check_state)."""
RUNNING = (1, 2)
"""Operational states starting and running (srv_op_state)."""
MIN_CELLS = 10
SHARED_S = 0.5
"""One reading serves all backends for so long, except those that were written to since."""
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
    has_check: bool = False
    """It has a health check."""
    check_runs: bool = False
    """The health check is switched on; in maintenance it pauses all the same."""
    check_status: str = ""
    """How the latest check ended, such as L4OK or L7STS; empty before the first one."""


Backends = dict[str, dict[str, Server]]
"""Servers by backend and name."""


class RuntimeApi:
    """Commands on one HAProxy process. An empty answer is success.

    Args:
        address: path of the socket, or host:port.
        timeout_s: longest wait for one answer, or for both of a reading.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._read: Backends = {}
        self._read_s, self._took_s = -float("inf"), 0.0
        self._failure, self._failed_s = "", -float("inf")
        self._written: set[str] = set()  # backends that were written to since

    def ask(self, command: str, until_s: float | None = None) -> str:
        """The answer to one command.

        Args:
            command: one line.
            until_s: when it must be there, on `time.monotonic`; within the time-out when None.

        Raises:
            HAProxyError: when there is none in time, or the text would be more than one command.
        """
        if ";" in command or "<<" in command or not command.isprintable():
            raise HAProxyError(f"{self.address}: not sent, as it is no single command: {command!r:.100}")
        until_s = time.monotonic() + self._timeout_s if until_s is None else until_s
        try:
            with self._connect(_left_s(until_s)) as connection:
                connection.settimeout(_left_s(until_s))
                connection.sendall(f"{command}\n".encode())
                return whole(_parts(connection, until_s)).decode(errors="replace").strip()
        except OSError as error:
            raise HAProxyError(f"{self.address}: {error.strerror or error}") from None

    def tell(self, command: str, accepted: tuple[str, ...] = ()) -> None:
        """A command that changes something of the backend whose server it names as ``backend/server``.

        Raises:
            HAProxyError: when it is refused; answers that begin with an accepted text are none.
        """
        self._written.add(next((word for word in command.split() if "/" in word), "").partition("/")[0])
        answer = self.ask(command)
        if answer and not answer.startswith(accepted or ("\0",)):
            raise HAProxyError(f"{self.address}: {command}: {' '.join(answer.split())}")

    def servers(self, backend: str) -> dict[str, Server]:
        """Servers by name, at most `SHARED_S` old, and none of them older than our own last change of the backend.

        From a process that is slow they may be as old as twice the time that it took to say them. A failure is shared
        too. So a process that hangs, or is slow, costs one wait and not one for each backend.

        Raises:
            HAProxyError: when there is no such backend, or the answer is not one of HAProxy's.
        """
        if time.monotonic() - self._failed_s <= SHARED_S:
            raise HAProxyError(self._failure)
        if backend in self._written or time.monotonic() - self._read_s > max(SHARED_S, 2.0 * self._took_s):
            self.read()
        return self.within(self._read, backend)

    def read(self) -> Backends:
        """Every server of every backend, as they are now.

        Raises:
            HAProxyError: when the answer is not one of HAProxy's, or there is none in time.
        """
        self._written.clear()  # first: what is written meanwhile has to be read again
        began_s = time.monotonic()
        try:
            found = self._backends(began_s + self._timeout_s)
        except HAProxyError as error:
            self._failure, self._failed_s = str(error), time.monotonic()
            raise
        if began_s >= self._read_s:  # one that a tick has left behind must not undo a newer one
            self._read, self._read_s, self._took_s = found, began_s, time.monotonic() - began_s
        return found

    def within(self, read: Backends, backend: str) -> dict[str, Server]:
        """Servers of one backend by name. Raises `HAProxyError` when there is none by that name."""
        found = read.get(backend)
        if found is None:
            raise HAProxyError(f"{self.address}: backend {backend}: there is none by that name")
        return dict(found)

    def version(self) -> str:
        """Of the process, as it says it.

        Raises:
            HAProxyError: when it does not.
        """
        rows = [row.partition(":") for row in self.ask("show info").splitlines()]
        return next((value.strip() for name, _, value in rows if name == "Version"), "")

    def _backends(self, until_s: float) -> Backends:
        """Every server of every backend, with two commands however many there are."""
        # Types 2 and 4 are backends and servers; of every proxy.
        table = self.ask("show stat -1 6 -1", until_s).splitlines()
        rows = self.ask("show servers state", until_s).splitlines()
        titles = next((row.lstrip("# ").split() for row in rows if row.startswith("#")), None)
        if titles is None or not table or not table[0].startswith("# pxname,svname,"):
            raise HAProxyError(f"{self.address}: an answer of another shape: {' '.join([*table, *rows])[:200]}")
        names = table[0].lstrip("# ").split(",")
        stats = [dict(zip(names, row.split(","), strict=False)) for row in table[1:] if row]
        by_server = {(row["pxname"], row.get("svname", "")): row for row in stats}
        found: Backends = {proxy: {} for proxy, name in by_server if name == "BACKEND"}
        try:
            for row in rows:
                cells = row.split()
                if row.startswith("#") or len(cells) < len(titles) - 1 or len(cells) < MIN_CELLS:
                    continue
                server = dict(zip(titles, cells, strict=False))
                proxy, name = server["be_name"], server["srv_name"]
                found.setdefault(proxy, {})[name] = _server(server, by_server.get((proxy, name), {}))
        except (KeyError, ValueError) as error:
            raise HAProxyError(f"{self.address}: an answer of another shape: {error}") from None
        return found

    def _connect(self, timeout_s: float) -> socket.socket:
        host, colon, port = self.address.rpartition(":")
        if colon and port.isdigit() and "/" not in self.address:
            return socket.create_connection((host, int(port)), timeout_s)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(self.address)
        except OSError:
            connection.close()
            raise
        return connection


def _parts(connection: socket.socket, until_s: float) -> Iterator[bytes]:
    """What is received until the other side ends, each part by the deadline."""
    while True:
        connection.settimeout(_left_s(until_s))
        part = connection.recv(BUFFER)
        if not part:
            return
        yield part


def _left_s(until_s: float) -> float:
    """Seconds until then. Raises `TimeoutError` when it is past, however many bytes still come."""
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s


def _server(state: dict[str, str], stat: dict[str, str]) -> Server:
    """One server from its row of `show servers state` and of `show stat`."""
    admin, check = read_integer(state["srv_admin_state"]), read_integer(state["srv_check_state"])
    drains, away = bool(admin & DRAIN_FLAGS), bool(admin & MAINTENANCE_FLAGS)
    return Server(
        name=state["srv_name"],
        address=f"{state['srv_addr']}:{state['srv_port']}",
        ready=read_integer(state["srv_op_state"]) in RUNNING and not drains and not away,
        draining=drains,
        away=away,
        sessions=read_integer(stat.get("scur") or "0") + read_integer(stat.get("qcur") or "0"),
        cap=read_integer(stat.get("slim") or "0"),
        has_check=bool(check & CHECK_CONFIGURED),
        check_runs=bool(check & CHECK_ENABLED),
        check_status=stat.get("check_status", "").removeprefix("* "),  # the asterisk: one is under way
    )
