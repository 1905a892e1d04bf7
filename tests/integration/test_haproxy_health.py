"""Replicas that fail while no controller takes them out, on the real HAProxy."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from servers import ROOT, Engine, HAProxy, Process, free_port, program, start, wait_until

from autoscaler.actuators.base import pools_of
from autoscaler.actuators.composite import CompositeActuator
from autoscaler.actuators.haproxy import CHECKED, HAProxyActuator, HAProxyConfig
from autoscaler.actuators.haproxy_api import RuntimeApi, Server
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

PROFILE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=PROFILE, max_replicas=8),))
(CHAT,) = pools_of([SPEC])
OUT_S = 30.0
"""Generous; what is documented is 3 s for a refused connection and 9 s for an address that is gone."""


class Replica(ThreadingHTTPServer):
    """Answers every request with one status; it can be made to answer another, to die and to vanish."""

    status = 200
    request_queue_size = 1
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.address = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        self._waiting: list[socket.socket] = []

    def fails(self) -> None:
        self.status = 503

    def dies(self) -> None:
        self.shutdown()
        self.server_close()

    def vanishes(self) -> None:
        """Nothing answers a new connection any more: the queue of those that nobody takes is full."""
        self.shutdown()
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(self.server_address)
            self._waiting.append(one)

    def stop(self) -> None:
        self.dies()
        for one in self._waiting:
            one.close()


class Handler(BaseHTTPRequestHandler):
    server: Replica

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    running = [Replica() for _ in range(3)]
    yield running
    for one in running:
        one.stop()


def made(socket_: Path, **changes: Any) -> HAProxyActuator:
    return HAProxyActuator(HAProxyConfig(sockets=(str(socket_),), route=("chat",), **changes), [SPEC])


def follow(actuator: HAProxyActuator, addresses: list[str]) -> None:
    actuator.follow(CHAT, {f"r{number}": address for number, address in enumerate(addresses)}, ())


def servers(socket_: Path) -> dict[str, Server]:
    return RuntimeApi(str(socket_), 2.0).servers("chat")


def serving(socket_: Path) -> set[str]:
    """Addresses that get requests."""
    return {one.address for one in servers(socket_).values() if one.ready}


def statuses(url: str, count: int = 40) -> set[int]:
    return {requests.get(url, timeout=30).status_code for _ in range(count)}


@pytest.mark.plays(
    "a replica dies, vanishes or answers only errors while no controller runs",
    "HAProxy's health check takes it out within seconds and back when it is well; the others get its requests",
)
@pytest.mark.parametrize("happens", [Replica.dies, Replica.vanishes, Replica.fails])
def test_a_replica_that_fails_gets_no_requests_though_nobody_takes_it_out(
    haproxy: HAProxy, replicas: list[Replica], happens: Callable[[Replica], None]
) -> None:
    follow(made(haproxy.socket), [one.address for one in replicas])
    happens(replicas[0])
    left = {one.address for one in replicas[1:]}
    wait_until(lambda: serving(haproxy.socket) == left, "it is taken out", OUT_S)
    assert statuses(haproxy.url("chat")) == {200}
    if happens is Replica.fails:
        replicas[0].status = 200
        wait_until(lambda: len(serving(haproxy.socket)) == 3, "it is well again", OUT_S)


def test_a_slot_is_checked_at_the_address_of_its_next_replica(haproxy: HAProxy, replicas: list[Replica]) -> None:
    first, second, third = replicas
    actuator = made(haproxy.socket)
    for addresses in ([first.address, second.address], [second.address], [second.address, third.address]):
        follow(actuator, addresses)
    first.dies()  # not its replica any more
    wait_until(lambda: servers(haproxy.socket)["jevons-1"].check_status == "L7OK", "asked at its new address", OUT_S)
    assert servers(haproxy.socket)["jevons-1"].address == third.address
    third.fails()
    wait_until(lambda: serving(haproxy.socket) == {second.address}, "the next one is taken out, too", OUT_S)
    assert actuator.drain(CHAT, {"r1": third.address}) == {"r1": 0}
    follow(actuator, [second.address])
    assert servers(haproxy.socket)["jevons-1"].away


@pytest.mark.parametrize("got_to", ["add", "enable"])
def test_a_check_that_was_left_switched_off_by_a_controller_that_died_is_switched_on(
    haproxy: HAProxy, replicas: list[Replica], got_to: str
) -> None:
    api = RuntimeApi(str(haproxy.socket), 2.0)
    api.ask(f"add server chat/jevons-1 {replicas[0].address} {CHECKED}")
    if got_to == "enable":
        api.ask("enable server chat/jevons-1")
    follow(made(haproxy.socket), [replicas[0].address])
    wait_until(lambda: servers(haproxy.socket)["jevons-1"].check_status == "L7OK", "it is checked", OUT_S)
    assert serving(haproxy.socket) == {replicas[0].address}


def health_line(actuator: HAProxyActuator) -> tuple[bool, str]:
    (line,) = [one for one in actuator.check() if one.subject == "health checks of backend chat"]
    return line.ok, line.detail


def test_check_says_which_servers_have_no_health_check(haproxy: HAProxy, replicas: list[Replica]) -> None:
    assert health_line(made(haproxy.socket)) == (True, "what is asked can be told when one has gone well")
    without = made(haproxy.socket, server_options="")
    follow(without, [replicas[0].address])
    ok, detail = health_line(without)
    assert (ok, detail.partition(",")[0]) == (False, "`server_options` has no `check`")
    ok, detail = health_line(made(haproxy.socket))
    assert (ok, detail.partition(",")[0]) == (False, "there is none of jevons-1")


def test_check_says_where_only_the_port_is_asked(tmp_path: Path, replicas: list[Replica]) -> None:
    for health, expected in (("option httpchk GET /health", True), ("", False)):
        proxy = start(HAProxy, tmp_path / f"{expected:d}", ["chat"], health=health)
        try:
            actuator = made(proxy.socket)
            follow(actuator, [replicas[0].address])
            wait_until(lambda at=proxy.socket: servers(at)["jevons-1"].check_status[-2:] == "OK", "checked", OUT_S)
            ok, detail = health_line(actuator)
            assert (ok, "option httpchk" in detail) == (expected, not expected)
        finally:
            proxy.stop()


class Documented(Process):
    """HAProxy with the configuration of docs/actuators.md, but for its places."""

    def __init__(self, folder: Path) -> None:
        page = (ROOT / "docs/actuators.md").read_text(encoding="utf-8")
        (text,) = re.findall(r"```haproxy\n(.*?)```", page, re.DOTALL)
        self.socket, self.state, self.url = folder / "admin.sock", folder / "state", f"http://127.0.0.1:{free_port()}"
        for said, here in (
            ("/run/haproxy/admin.sock", str(self.socket)),
            ("/var/lib/haproxy/state", str(self.state)),
            ("bind :8080", f"bind {self.url.removeprefix('http://')}"),
            ("bind 127.0.0.1:8405", f"bind 127.0.0.1:{free_port()}"),
            ("jevons- 16", "jevons- 2"),
        ):
            assert said in text
            text = text.replace(said, here)
        (folder / "haproxy.cfg").write_text(text)
        self._folder = folder
        self.begin()

    def begin(self) -> None:
        self.socket.unlink(missing_ok=True)
        command = [program("haproxy", "haproxy"), "-db", "-f", str(self._folder / "haproxy.cfg")]
        super().__init__(command, self._folder / "haproxy.log")
        self.wait(self.socket.exists, "HAProxy")

    def save_state(self) -> None:
        """As the loop of the page does."""
        self.state.write_text(RuntimeApi(str(self.socket), 2.0).ask("show servers state") + "\n")


@pytest.fixture
def documented(tmp_path: Path) -> Iterator[Documented]:
    server = start(Documented, tmp_path)
    yield server
    server.stop()


def test_no_request_is_lost_when_an_engine_is_killed_under_load(documented: Documented, tmp_path: Path) -> None:
    """With the configuration that is documented, and no controller."""
    engines = [Engine(tmp_path, name=f"engine{number}") for number in range(3)]
    try:
        for engine in engines:
            engine.ready()
        follow(made(documented.socket), [one.address for one in engines])
        enough, found = threading.Event(), list[int]()

        def ask() -> None:
            while not enough.is_set():
                body = {"prompt": "hello", "max_tokens": 20}
                found.append(requests.post(f"{documented.url}/v1/completions", json=body, timeout=60).status_code)

        with ThreadPoolExecutor(6) as pool:
            asking = [pool.submit(ask) for _ in range(6)]
            wait_until(lambda: len(found) > 20, "requests are under way")
            engines[0].kill()
            wait_until(lambda: engines[0].address not in serving(documented.socket), "it is taken out", OUT_S)
            after = len(found)
            wait_until(lambda: len(found) > after + 40, "the others go on")
            enough.set()
            for one in asking:
                one.result()
        assert set(found) == {200}
    finally:
        for engine in engines:
            engine.stop()


class Cluster:
    """Says which replicas there are, while it is not away."""

    def __init__(self, addresses: list[str]) -> None:
        self.addresses, self.away = addresses, False

    def members(self) -> dict[str, dict[str, str]]:
        return {} if self.away else {"chat": {f"r{number}": one for number, one in enumerate(self.addresses)}}

    def nothing(self, *_: object) -> Any:
        """All else that replicas can do is not asked."""

    apply = state = check = close = victims = prefer = rehearse = nothing


@pytest.mark.plays(
    "HAProxy restarts while the API server is away",
    "the controller that led last gives the empty backends the replicas that it saw last; it drains and removes none",
)
@pytest.mark.parametrize("adrift", [False, True], ids=["it leads", "its lease cannot be renewed"])
def test_a_gateway_that_restarts_while_nobody_knows_the_replicas_gets_those_that_were_last_known(
    documented: Documented, replicas: list[Replica], adrift: bool
) -> None:
    cluster, addresses = Cluster([one.address for one in replicas]), {one.address for one in replicas}
    routing = CompositeActuator(cluster, made(documented.socket), [SPEC], 60.0)
    yes, no = np.array([True]), np.array([False])
    rows = (no, yes) if adrift else (yes, no)
    routing.route(yes, no)
    assert serving(documented.socket) == addresses
    cluster.away = True
    documented.kill()
    documented.begin()
    assert statuses(documented.url, 3) == {503}
    routing.route(*rows)
    assert serving(documented.socket) == addresses
    assert statuses(documented.url) == {200}
    api = RuntimeApi(str(documented.socket), 2.0)
    api.tell("set server chat/jevons-1 state maint")
    api.tell("set server chat/jevons-2 state drain")
    before = servers(documented.socket)
    routing.route(*rows)  # what is known is old, and the gateway is not empty
    after = servers(documented.socket)
    assert {name: (one.away, one.draining) for name, one in after.items()} == {
        name: (one.away, one.draining) for name, one in before.items()
    }


def test_after_a_restart_slots_of_the_configuration_come_back_and_added_ones_do_not(
    documented: Documented, replicas: list[Replica]
) -> None:
    actuator, addresses = made(documented.socket), [one.address for one in replicas]
    follow(actuator, addresses)  # two slots of the configuration, and one that is added
    assert {name: one.address for name, one in servers(documented.socket).items() if not one.away} == {
        f"jevons-{number}": address for number, address in enumerate(addresses, 1)
    }
    documented.save_state()
    documented.kill()
    documented.begin()
    assert serving(documented.socket) == set(addresses[:2])
    assert statuses(documented.url) == {200}
    follow(actuator, addresses)
    assert serving(documented.socket) == set(addresses)
    assert health_line(actuator)[0]
