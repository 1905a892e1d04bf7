"""The batch cap of each replica as HAProxy's `maxconn` per server, and the set of servers, through the Runtime API.

No reload and no dropped request: a lower cap waits for requests to finish, a drained server finishes what it has.
Servers of ours are slots that are never deleted: a slot whose replica is gone goes into maintenance, and the next
replica gets it. HAProxy 2.6 crashes when a server is deleted while a request is still being tried on it (haproxy#2298,
#2323, #2378).
HAProxy keeps what cannot be admitted in a queue in front of the replicas, so its wait is part of the time to first
token (see `autoscaler.metrics.prometheus`).
This module must not know about replica counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from autoscaler.actuators.base import Access, FleetState, PartlyFailed, PoolName, pools_of, wanted
from autoscaler.actuators.haproxy_api import HAProxyError, RuntimeApi, Server
from policies.contract import Target
from policies.engine import Positive, StrictModel
from policies.names import NameTemplate, ObjectName
from policies.spec import ScalingSpec

EVERY = "*"
OLDEST = (2, 6)
"""The oldest HAProxy that routing is tested with: servers are added at run time, with health checks."""
NAMED = 5
"""Servers that a message names."""
OURS = "jevons-"
"""How the names of our servers begin. All others are somebody else's: their caps are set, and nothing else."""

CHECKED = "check inter 2s fastinter 500ms fall 3 rise 1"
"""A replica that refuses connections is out within three seconds, nobody has to take it out, and one whose loop stands
still for a few seconds stays in. What is asked is the backend's `option httpchk`."""
PORT_ALONE, UNTRIED = {"L4OK", "L6OK"}, {"", "INI"}
"""Of a check that asks the engine nothing, and before the first answer (`check_status` in the management guide)."""
LOST = "so a replica that fails goes on getting requests"


class HAProxyConfig(StrictModel):
    """Batch caps in one or several HAProxy processes."""

    kind: Literal["haproxy"] = Field(default="haproxy", description="Which actuator this is.")
    sockets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Runtime API of each process: a socket's path, or host:port. The cap is shared out among them."
    )
    backend: NameTemplate = Field(
        default="{service}", description="Backend of a service; {service} and {pool} are filled in."
    )
    backends: dict[str, ObjectName] = Field(default={}, description="Backend by `service` or `service/pool`.")
    route: tuple[str, ...] = Field(
        default=(),
        description="Services whose backends follow the ready replicas, in every mode; `*` stands for all. It needs"
        " `composite` with Kubernetes replicas. Only servers whose names begin with `jevons-` are added or changed.",
    )
    server_options: Annotated[str, Field(pattern=r"^[A-Za-z0-9 ._:/,=%+-]*$")] = Field(
        default=CHECKED,
        description="Options of servers that are added, as on a `server` line; HAProxy's `default-server` is not for"
        " them. Without `check` a replica that dies gets requests until the controller takes it out.",
    )
    timeout_s: Positive = Field(
        default=2.0, description="Longest wait for one answer, or for all that one reading asks of every process."
    )

    def waits_s(self) -> dict[str, float]:
        """Longest waits of one reading of what is in force, by field, seconds."""
        return {"timeout_s": self.timeout_s}

    def backend_of(self, pool: PoolName) -> str:
        """The backend of a pool."""
        return self.backends.get(pool.label) or pool.render(self.backend)

    def routes(self, service: str) -> bool:
        """Whether the backends of a service follow its replicas."""
        return EVERY in self.route or service in self.route


class HAProxyActuator:
    """Sets batch caps of `n` services, and the servers of their backends.

    Args:
        config: where HAProxy is.
        specs: the services.
    """

    def __init__(self, config: HAProxyConfig, specs: Sequence[ScalingSpec]) -> None:
        self.config = config
        self._pools = pools_of(specs)
        self._backends = {pool: config.backend_of(pool) for pool in self._pools}
        self._processes = [RuntimeApi(address, config.timeout_s) for address in config.sockets]
        self._caps: dict[PoolName, int] = {}
        self._limits = {pool: specs[pool.row].pools[pool.column].engine.max_num_seqs for pool in self._pools}
        self._asleep = {spec.service for spec in specs if spec.sleeps}

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
        """Caps and servers in force; what cannot be read is NaN. All processes are asked at the same time."""
        state = FleetState.unknown(self._pools)
        problems = []
        with ThreadPoolExecutor(len(self._processes)) as threads:
            asked = [(process, threads.submit(process.read)) for process in self._processes]
        for pool in self._pools:
            try:
                servers = [process.within(read.result(), self._backends[pool]) for process, read in asked]
            except HAProxyError as error:
                problems.append(str(error))
                continue
            at = (pool.row, pool.column)
            first = {name: server for name, server in servers[0].items() if _counts(server, pool)}
            # Without a maxconn everything goes to the engine, whose own limit then holds.
            used = [
                [one[name].cap or np.inf for one in servers if name in one] for name in first if not first[name].away
            ]
            state.batch_cap[at] = min(max(map(sum, used)), self._limits[pool]) if used else np.nan
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
            lines += [self._check_version(process)] if self.config.route else []
            for pool in self._pools:
                lines += [self._check_backend(process, pool), *self._check_health(process, pool)]
        return lines

    def close(self) -> None:
        """Nothing stays open between commands."""

    def routes(self, service: str) -> bool:
        """Whether the backends of a service follow its replicas."""
        return self.config.routes(service)

    def follow(self, pool: PoolName, members: Mapping[str, str], leaving: Collection[str]) -> None:
        """Route to the members, name to ``address:port``, but to those that are leaving send nothing new.

        Raises:
            HAProxyError: when a process does not answer or refuses.
        """
        if self.routes(pool.service):
            for process in self._processes:
                self._follow(process, pool, members, leaving)

    def refill(self, pool: PoolName, members: Mapping[str, str]) -> bool:
        """Route to the members in each process that has none of our servers in service, as after a restart.

        Where one is in service nothing is changed: the members may be old.

        Returns:
            Whether there is such a process.

        Raises:
            HAProxyError: when a process does not answer or refuses.
        """
        empty = [process for process in self._processes if self.routes(pool.service) and not self._slots(process, pool)]
        for process in empty:
            self._follow(process, pool, members, ())
        return bool(empty)

    def drain(self, pool: PoolName, members: Mapping[str, str]) -> dict[str, int]:
        """Send no new requests to these; requests that each still has, over all processes.

        Those that are not there, or not ours, have none left.

        Raises:
            HAProxyError: when a process does not answer.
        """
        left = dict.fromkeys(members, 0)
        if not self.routes(pool.service):
            return left
        backend = self._backends[pool]
        for process in self._processes:
            slots = self._slots(process, pool)
            for address in members.values():
                if address in slots and not slots[address].draining:
                    process.tell(f"set server {backend}/{slots[address].name} state drain")
            slots = self._slots(process, pool)  # what came until it was drained counts
            for name, address in members.items():
                left[name] += slots[address].sessions if address in slots else 0
        return left

    @staticmethod
    def _check_version(process: RuntimeApi) -> Access:
        subject = f"HAProxy {process.address} version"
        try:
            version = process.version()
        except HAProxyError as error:
            return Access(subject, False, str(error))
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version)
        ok = numbers is not None and (int(numbers[1]), int(numbers[2])) >= OLDEST
        wanted_version = ".".join(map(str, OLDEST))
        return Access(
            subject, ok, version if ok else f"{version or 'unknown'}: `route` needs {wanted_version} or newer"
        )

    def _check_backend(self, process: RuntimeApi, pool: PoolName) -> Access:
        backend = self._backends[pool]
        try:
            servers = process.servers(backend)
        except HAProxyError as error:
            return Access(f"backend {backend}", False, str(error))
        caps = sorted({server.cap for server in servers.values()})
        ready, routed = sum(server.ready for server in servers.values()), self.routes(pool.service)
        detail = (
            f"{len(servers)} servers, {ready} ready, maxconn {', '.join(str(cap or 'none') for cap in caps) or 'none'}"
        )
        if 0 in caps:
            detail += f": until Jevons sets it, the engine's own limit of {self._limits[pool]} is what holds"
        detail += ", follows the replicas" if routed else ""
        if not routed and not servers:
            detail += f"; list its servers in HAProxy's configuration, or add {pool.service} to `route`"
        elif pool.service in self._asleep:
            detail += "; at zero replicas HAProxy answers 503 at once: set min_replicas to 1"
        return Access(f"backend {backend}", (routed or bool(servers)) and pool.service not in self._asleep, detail)

    def _check_health(self, process: RuntimeApi, pool: PoolName) -> list[Access]:
        """Whether a replica that dies, or answers nothing but errors, is taken out by HAProxy itself."""
        backend = self._backends[pool]
        try:
            known = [one for one in process.servers(backend).values() if _counts(one, pool)]
        except HAProxyError:
            return []  # said of the backend
        subject = f"health checks of backend {backend}"
        if self.routes(pool.service) and not self._adds_checks:
            return [Access(subject, False, f"`server_options` has no `check`, {LOST}")]
        bare = [one for one in known if not one.has_check and not (one.away and _is_slot(one, pool))]
        if bare:
            names = ", ".join(one.name for one in bare[:NAMED]) + (", ..." if len(bare) > NAMED else "")
            way = "write `check` on their `server` lines; those that Jevons added go with a reload of HAProxy"
            return [Access(subject, False, f"there is none of {names}, {LOST}: {way}")]
        ends = {one.check_status for one in known if one.ready}
        if ends & PORT_ALONE:
            detail = f"only the port is asked, {LOST} as long as the port is open: "
            return [Access(subject, False, f"{detail}write `option httpchk GET /health` into the backend")]
        return [Access(subject, True, "" if ends - UNTRIED else "what is asked can be told when one has gone well")]

    def _slots(self, process: RuntimeApi, pool: PoolName) -> dict[str, Server]:
        """Our own servers that have a replica, by its address."""
        known = process.servers(self._backends[pool]).values()
        return {one.address: one for one in known if _is_slot(one, pool) and not one.away}

    def _share(self, cap: int) -> int:
        """One process's part of the cap, at least 1: they do not know of each other."""
        return max(1, cap // len(self._processes))

    def _set_cap(self, pool: PoolName, cap: int) -> None:
        self._caps[pool] = cap
        backend, share = self._backends[pool], self._share(cap)
        for process in self._processes:
            for name, server in process.servers(backend).items():
                if server.cap != share and _counts(server, pool):  # slots in maintenance too
                    process.tell(f"set maxconn server {backend}/{name} {share}")

    def _follow(
        self, process: RuntimeApi, pool: PoolName, members: Mapping[str, str], leaving: Collection[str]
    ) -> None:
        backend = self._backends[pool]
        known = process.servers(backend)
        # The first server of an address serves it, somebody else's before ours.
        serving: dict[str, Server] = {}
        for server in sorted(known.values(), key=lambda one: (_is_slot(one, pool), one.away, one.name)):
            serving.setdefault(server.address, server)
        routed = {serving[address].name for address in members.values() if address in serving}
        gone = [server for server in known.values() if _is_slot(server, pool) and server.name not in routed]
        for server in gone:
            if not server.away:
                process.tell(f"set server {backend}/{server.name} state maint")
        free = sorted(server.name for server in gone if server.away and not server.sessions)
        names = (_slot_name(pool, number) for number in range(1, len(known) + len(members) + 1))
        unused = (name for name in names if name not in known)
        for name, address in members.items():
            if address not in serving:
                if free:
                    self._move(process, f"{backend}/{free.pop(0)}", address)
                else:
                    self._add(process, f"{backend}/{next(unused)}", address, self._cap(pool, known))
            elif _is_slot(serving[address], pool) and name not in leaving:
                slot = serving[address]
                if slot.away or slot.draining:
                    process.tell(f"set server {backend}/{slot.name} state ready")
                if slot.has_check and not slot.check_runs:  # whoever added it got no further
                    process.tell(f"enable health {backend}/{slot.name}")

    def _cap(self, pool: PoolName, known: Mapping[str, Server]) -> int:
        """What a new server gets: the pool's cap, or before one was set that of its neighbours; 0 is none."""
        if pool in self._caps:
            return self._share(self._caps[pool])
        return max((one.cap for one in known.values() if _counts(one, pool) and not one.away), default=0)

    def _add(self, process: RuntimeApi, slot: str, address: str, cap: int) -> None:
        limit = f" maxconn {cap}" if cap else ""
        options = f" {self.config.server_options}" if self.config.server_options else ""
        process.tell(f"add server {slot} {address}{limit}{options}", ("New server registered",))
        process.tell(f"enable server {slot}")
        if self._adds_checks:  # HAProxy adds a server with its check switched off
            process.tell(f"enable health {slot}")

    @property
    def _adds_checks(self) -> bool:
        return "check" in self.config.server_options.split()

    @staticmethod
    def _move(process: RuntimeApi, slot: str, address: str) -> None:
        """Give a slot in maintenance to another replica."""
        host, _, port = address.rpartition(":")
        process.tell(f"set server {slot} addr {host} port {port}", ("IP changed", "port changed", "no need to change"))
        process.tell(f"set server {slot} state ready")


def _slot_name(pool: PoolName, number: int) -> str:
    return f"{OURS}{pool.pool}-{number}" if pool.pool else f"{OURS}{number}"


def _is_slot(server: Server, pool: PoolName) -> bool:
    """Whether a server is one of ours for this pool; pools may share a backend."""
    number = server.name.rpartition("-")[2]
    return re.fullmatch("[1-9][0-9]{0,8}", number) is not None and server.name == _slot_name(pool, int(number))


def _counts(server: Server, pool: PoolName) -> bool:
    """Whether the pool's cap is meant for a server: its own slots, and servers of other people."""
    return _is_slot(server, pool) or not server.name.startswith(OURS)
