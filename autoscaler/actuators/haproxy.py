"""The batch cap of each replica as HAProxy's `maxconn` per server, and the set of servers, through the Runtime API.

No reload and no dropped request: a lower cap waits for requests to finish, a drained server finishes what it has.
HAProxy keeps what cannot be admitted in a queue in front of the replicas, so its wait is part of the time to first
token (see `autoscaler.metrics.prometheus`).
This module must not know about replica counts.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of, wanted
from policies.contract import Target
from policies.engine import Positive, StrictModel
from policies.spec import ScalingSpec

DRAIN_FLAGS = 0x08 | 0x10
"""Administrative drain, forced or inherited, in the same place (HAProxy management guide, srv_admin_state)."""
MAINTENANCE_FLAGS = 0x01 | 0x02 | 0x04 | 0x20
BUFFER = 65536


class HAProxyConfig(StrictModel):
    """Batch caps in one or several HAProxy processes."""

    kind: Literal["haproxy"] = Field(default="haproxy", description="Which actuator this is.")
    sockets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Runtime API of each process: a socket's path, or host:port. The cap is shared out among them."
    )
    backend: str = Field(default="{service}", description="Backend of a service; {service} and {pool} are filled in.")
    backends: dict[str, str] = Field(default={}, description="Backend by `service` or `service/pool`.")
    server_options: str = Field(default="", description="Options of servers that are added, such as `check`.")
    timeout_s: Positive = Field(default=2.0, description="Longest wait for one answer.")


class HAProxyError(RuntimeError):
    """Raised when HAProxy did not answer or refused a command."""


@dataclass(frozen=True)
class Server:
    """One server of a backend."""

    name: str
    address: str
    ready: bool
    draining: bool
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
            HAProxyError: when there is no such backend.
        """
        rows = self.ask(f"show servers state {backend}").splitlines()
        titles = next((row.lstrip("# ").split() for row in rows if row.startswith("#")), None)
        if titles is None:
            raise HAProxyError(f"{self.address}: backend {backend}: {' '.join(rows) or 'no answer'}")
        stats = {(row["pxname"], row["svname"]): row for row in self._stats(backend)}
        found = {}
        for row in rows:
            cells = row.split()
            if row.startswith("#") or len(cells) < len(titles) - 1 or len(cells) < 10:
                continue
            server = dict(zip(titles, cells, strict=False))
            stat = stats.get((backend, server["srv_name"]), {})
            admin = int(server["srv_admin_state"])
            drains = bool(admin & DRAIN_FLAGS)
            away = bool(admin & MAINTENANCE_FLAGS)
            found[server["srv_name"]] = Server(
                name=server["srv_name"],
                address=f"{server['srv_addr']}:{server['srv_port']}",
                ready=int(server["srv_op_state"]) in (1, 2) and not drains and not away,
                draining=drains,
                sessions=int(stat.get("scur") or 0) + int(stat.get("qcur") or 0),
                cap=int(stat.get("slim") or 0),
            )
        return found

    def _stats(self, backend: str) -> list[dict[str, str]]:
        # Type 4 is servers; every proxy.
        rows = self.ask("show stat -1 4 -1").splitlines()
        if not rows:
            return []
        titles = rows[0].lstrip("# ").split(",")
        parsed = [dict(zip(titles, row.split(","), strict=False)) for row in rows[1:] if row]
        return [row for row in parsed if row.get("pxname") == backend]

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


class HAProxyActuator:
    """Sets batch caps of `n` services, and the servers of their backends.

    Args:
        config: where HAProxy is.
        specs: the services.
    """

    def __init__(self, config: HAProxyConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._backends = {pool: config.backends.get(pool.label) or pool.render(config.backend) for pool in self._pools}
        self._processes = [RuntimeApi(address, config.timeout_s) for address in config.sockets]
        self._caps: dict[PoolName, int] = {}

    def apply(self, target: Target) -> None:
        """Set the caps that differ. Raises `PartlyFailed`."""
        failures: dict[str, str] = {}
        for pool, _, cap in wanted(target, self._pools):
            try:
                self._set_cap(pool, cap)
            except HAProxyError as error:
                failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def state(self) -> FleetState:
        """Caps and servers in force; what cannot be read is NaN."""
        state = FleetState.unknown(self._pools)
        problems = []
        for pool in self._pools:
            try:
                servers = [process.servers(self._backends[pool]) for process in self._processes]
            except HAProxyError as error:
                problems.append(str(error))
                continue
            at = (pool.row, pool.column)
            first = servers[0]
            caps = [sum(one[name].cap for one in servers if name in one) for name in first]
            state.batch_cap[at] = max(caps) if caps and max(caps) > 0 else np.nan
            state.replicas_ready[at] = sum(server.ready for server in first.values())
            state.replicas_draining[at] = sum(
                server.draining and any(one[name].sessions for one in servers if name in one)
                for name, server in first.items()
            )
        return replace(state, problems=tuple(dict.fromkeys(problems)))

    def check(self) -> list[Access]:
        """Every process and backend, and whether the socket may change anything."""
        lines = []
        for process in self._processes:
            try:
                level = process.ask("show cli level")
                ok = level.strip() == "admin"
                lines.append(Access(f"HAProxy {process.address}", ok, f"level {level or 'unknown'}; admin is needed"))
            except HAProxyError as error:
                lines.append(Access(f"HAProxy {process.address}", False, str(error)))
                continue
            for pool in self._pools:
                backend = self._backends[pool]
                try:
                    servers = process.servers(backend)
                    caps = sorted({server.cap for server in servers.values()})
                    ready = sum(server.ready for server in servers.values())
                    detail = f"{len(servers)} servers, {ready} ready, maxconn {', '.join(map(str, caps)) or 'none'}"
                    lines.append(Access(f"backend {backend}", True, detail))
                except HAProxyError as error:
                    lines.append(Access(f"backend {backend}", False, str(error)))
        return lines

    def close(self) -> None:
        """Nothing stays open between commands."""

    def follow(self, members: Mapping[str, Mapping[str, str]]) -> None:
        """Make the servers of each backend those of `members`: by pool label, name to ``address:port``.

        New ones are added with the pool's cap. Others are drained, and deleted when they have no request left.

        Raises:
            PartlyFailed: naming the services for which it could not be done.
        """
        failures: dict[str, str] = {}
        for pool in self._pools:
            if pool.label not in members:
                continue
            try:
                for process in self._processes:
                    self._follow(process, pool, members[pool.label])
            except HAProxyError as error:
                failures[pool.service] = str(error)
        if failures:
            raise PartlyFailed(failures)

    def drain(self, pool: PoolName, servers: Sequence[str]) -> dict[str, int]:
        """Send no new requests to the servers; requests that each still has, over all processes.

        Servers that are not there have none left.

        Raises:
            HAProxyError: when a process does not answer.
        """
        left = dict.fromkeys(servers, 0)
        backend = self._backends[pool]
        for process in self._processes:
            known = process.servers(backend)
            for name in servers:
                if name in known:
                    if not known[name].draining:
                        process.tell(f"set server {backend}/{name} state drain")
                    left[name] += known[name].sessions
        return left

    def undrain(self, pool: PoolName, servers: Sequence[str]) -> None:
        """Send requests to the servers again. Raises `HAProxyError`."""
        backend = self._backends[pool]
        for process in self._processes:
            known = process.servers(backend)
            for name in servers:
                if name in known and known[name].draining:
                    process.tell(f"set server {backend}/{name} state ready")

    def _share(self, cap: int) -> int:
        """One process's part of the cap, at least 1: they do not know of each other."""
        return max(1, cap // len(self._processes))

    def _set_cap(self, pool: PoolName, cap: int) -> None:
        self._caps[pool] = cap
        backend, share = self._backends[pool], self._share(cap)
        for process in self._processes:
            for name, server in process.servers(backend).items():
                if server.cap != share:
                    process.tell(f"set maxconn server {backend}/{name} {share}")

    def _follow(self, process: RuntimeApi, pool: PoolName, members: Mapping[str, str]) -> None:
        backend = self._backends[pool]
        known = process.servers(backend)
        cap = (
            self._share(self._caps[pool]) if pool in self._caps else max((one.cap for one in known.values()), default=0)
        )
        for name, address in members.items():
            if name in known and known[name].address == address:
                continue
            if name in known:
                self._delete(process, backend, known[name])
            limit = f" maxconn {cap}" if cap else ""
            options = f" {self.config.server_options}" if self.config.server_options else ""
            process.tell(f"add server {backend}/{name} {address}{limit}{options}", ("New server registered",))
            process.tell(f"enable server {backend}/{name}")
            if "check" in self.config.server_options.split():
                process.tell(f"enable health {backend}/{name}")
        for name, server in known.items():
            if name not in members:
                self._delete(process, backend, server)

    def _delete(self, process: RuntimeApi, backend: str, server: Server) -> None:
        """Drain first; delete once nothing is left. A server of the configuration file stays, in maintenance."""
        if not server.draining:
            process.tell(f"set server {backend}/{server.name} state drain")
            if server.sessions:
                return
        if server.sessions:
            return
        process.tell(f"set server {backend}/{server.name} state maint")
        process.ask(f"del server {backend}/{server.name}")
