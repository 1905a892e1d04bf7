"""Caps and drains on a real HAProxy with streams under way: nothing is dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from servers import Engine, HAProxy, wait_until

from autoscaler.actuators.base import pools_of
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.actuators.haproxy_api import RuntimeApi, Server
from autoscaler.metrics import presets
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

PROFILE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=PROFILE, max_replicas=8),))
(CHAT,) = pools_of([SPEC])


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Engine]]:
    folder = tmp_path_factory.mktemp("engines")
    running = [Engine(folder) for _ in range(2)]
    for engine in running:
        engine.ready()
    yield running
    for engine in running:
        engine.stop()


@pytest.fixture
def actuator(haproxy: HAProxy, engines: list[Engine]) -> HAProxyActuator:
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), route=("chat",)), [SPEC])
    made.follow(CHAT, {f"r{number}": engine.address for number, engine in enumerate(engines)}, ())
    return made


def servers(haproxy: HAProxy, backend: str = "chat") -> dict[str, Server]:
    return RuntimeApi(str(haproxy.socket), 2.0).servers(backend)


def routed(haproxy: HAProxy, backend: str = "chat") -> dict[str, str]:
    """Addresses of the servers that get requests while they are well, by name."""
    found = servers(haproxy, backend).items()
    return {name: one.address for name, one in found if not one.away and not one.draining}


def cap(actuator: HAProxyActuator, value: int) -> None:
    actuator.apply(Target(np.array([[2]]), np.array([[value]])))


def stream(haproxy: HAProxy, tokens: int) -> int:
    """Events of one streamed answer."""
    body = {"prompt": "hello", "max_tokens": tokens, "stream": True}
    response = requests.post(f"{haproxy.url('chat')}/v1/completions", json=body, stream=True, timeout=120)
    assert response.status_code == 200
    return sum(line.startswith(b"data: {") for line in response.iter_lines())


def load(pool: ThreadPoolExecutor, haproxy: HAProxy, requests_: int, tokens: int) -> list[Future[int]]:
    return [pool.submit(stream, haproxy, tokens) for _ in range(requests_)]


def sessions(haproxy: HAProxy) -> tuple[int, int]:
    """(in the replicas, in the queue), as HAProxy exports them."""
    text = requests.get(f"http://127.0.0.1:{haproxy.metrics_port}/metrics", timeout=5).text
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if 'proxy="chat"' in line]
    running = sum(float(value) for name, value in lines if name.startswith("haproxy_server_current_sessions"))
    queued = sum(float(value) for name, value in lines if "current_queue{" in name)
    return int(running), int(queued)


def test_a_cap_holds_for_streams_under_way_and_nothing_is_dropped(actuator: HAProxyActuator, haproxy: HAProxy) -> None:
    cap(actuator, 2)
    with ThreadPoolExecutor(12) as pool:
        answers = load(pool, haproxy, 12, 200)
        wait_until(lambda: sessions(haproxy) == (4, 8), "two in each replica, the others in the queue")
        cap(actuator, 6)
        wait_until(lambda: sessions(haproxy)[1] == 0, "a higher cap empties the queue")
        cap(actuator, 1)
        assert [answer.result() for answer in answers] == [200] * 12
    assert actuator.state().batch_cap[0, 0] == 1


def test_a_drained_replica_finishes_what_it_has_and_gets_nothing_new(
    actuator: HAProxyActuator, haproxy: HAProxy, engines: list[Engine]
) -> None:
    cap(actuator, 8)
    members = {f"r{number}": engine.address for number, engine in enumerate(engines)}
    first = {"r0": members["r0"]}
    with ThreadPoolExecutor(8) as pool:
        before = load(pool, haproxy, 4, 300)
        wait_until(lambda: sessions(haproxy)[0] == 4, "requests are under way")
        assert actuator.drain(CHAT, first)["r0"] > 0
        actuator.follow(CHAT, members, first)  # routing goes on meanwhile
        finished = served(engines[0])
        after = load(pool, haproxy, 4, 20)
        assert [answer.result() for answer in after] == [20] * 4
        assert [answer.result() for answer in before] == [300] * 4
    assert actuator.drain(CHAT, first) == {"r0": 0}
    assert served(engines[0]) - finished <= 4  # those that it had
    assert actuator.state().replicas_ready[0, 0] == 1
    actuator.follow(CHAT, members, ())
    assert actuator.state().replicas_ready[0, 0] == 2


def served(engine: Engine) -> int:
    text = requests.get(f"http://{engine.address}/metrics", timeout=5).text
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in text.splitlines() if "request_success_total{" in line)


def arrived(haproxy: HAProxy) -> int:
    """By the metric that snapshots read."""
    (name,) = presets.GATEWAYS["haproxy"].names["arrival"]
    text = requests.get(f"http://127.0.0.1:{haproxy.metrics_port}/metrics", timeout=5).text
    return int(next(line for line in text.splitlines() if line.startswith(f'{name}{{proxy="chat"}}')).rsplit(" ", 1)[1])


def test_requests_count_as_arrived_when_they_come_not_when_they_are_answered(
    actuator: HAProxyActuator, haproxy: HAProxy
) -> None:
    cap(actuator, 1)
    with ThreadPoolExecutor(8) as pool:
        answers = load(pool, haproxy, 8, 200)
        wait_until(lambda: sessions(haproxy) == (2, 6), "two are served, the others wait")
        assert arrived(haproxy) == 8
        assert [answer.result() for answer in answers] == [200] * 8
    with requests.Session() as connection:  # kept alive by the client: one session of HAProxy's for each request
        for _ in range(3):
            body = {"prompt": "hello", "max_tokens": 2}
            assert connection.post(f"{haproxy.url('chat')}/v1/completions", json=body, timeout=60).status_code == 200
    assert arrived(haproxy) == 11


def test_follows_replicas_that_come_and_go(actuator: HAProxyActuator, haproxy: HAProxy, engines: list[Engine]) -> None:
    first, second = (engine.address for engine in engines)
    assert routed(haproxy) == {"jevons-1": first, "jevons-2": second}
    cap(actuator, 5)
    for _ in range(2):
        actuator.follow(CHAT, {"r1": second}, ())
        assert routed(haproxy) == {"jevons-2": second}
    cap(actuator, 7)
    actuator.follow(CHAT, {"r1": second, "r2": first}, ())  # the address of one that went
    assert routed(haproxy) == {"jevons-1": first, "jevons-2": second}
    assert {one.cap for one in servers(haproxy).values()} == {7}
    assert stream(haproxy, 3) == 3


def test_a_slot_goes_to_the_next_replica_and_none_is_ever_deleted(
    actuator: HAProxyActuator, haproxy: HAProxy, engines: list[Engine]
) -> None:
    actuator.follow(CHAT, {"r1": engines[1].address}, ())
    for port in (11, 12, 13):
        actuator.follow(CHAT, {"r1": engines[1].address, f"r{port}": f"127.0.0.1:{port}"}, ())
        assert routed(haproxy) == {"jevons-1": f"127.0.0.1:{port}", "jevons-2": engines[1].address}
        actuator.follow(CHAT, {"r1": engines[1].address}, ())
    assert set(servers(haproxy)) == {"jevons-1", "jevons-2"}


def test_servers_of_others_and_services_that_are_not_named_are_left_alone(
    haproxy_with_servers: HAProxy, engines: list[Engine]
) -> None:
    def set_up() -> dict[str, dict[str, tuple[object, ...]]]:
        """Servers without what their health checks, which fail here, make of them."""
        return {
            backend: {
                name: (one.address, one.away, one.draining, one.cap)
                for name, one in servers(haproxy_with_servers, backend).items()
            }
            for backend in ("chat", "code")
        }

    before = set_up()
    code = ScalingSpec(service="code", slo=SPEC.slo, pools=SPEC.pools)
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy_with_servers.socket),), route=("chat",)), [SPEC, code])
    for pool in pools_of([SPEC, code]):
        made.follow(pool, {"pod": engines[0].address, "known": "127.0.0.1:9"}, ())
        assert made.drain(pool, {"known": "127.0.0.1:9"}) == {"known": 0}
        made.follow(pool, {}, ())
    after = set_up()
    assert after["code"] == before["code"]
    assert {name: one for name, one in after["chat"].items() if name != "jevons-1"} == before["chat"]
    assert servers(haproxy_with_servers)["jevons-1"].away


def test_one_reading_serves_all_services_and_none_outlives_our_own_change(
    haproxy: HAProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = ScalingSpec(service="code", slo=SPEC.slo, pools=SPEC.pools)
    specs = [SPEC, code]
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), route=("*",)), specs)
    (process,) = made._processes
    asked: list[str] = []
    ask = process.ask
    monkeypatch.setattr(process, "ask", lambda command, *rest: (asked.append(command), ask(command, *rest))[1])
    made.state()
    assert asked == ["show stat -1 6 -1", "show servers state"]
    for number, pool in enumerate(pools_of(specs)):
        made.follow(pool, {"r1": f"127.0.0.1:{number + 11}"}, ())
    assert made.state().replicas_ready.tolist() == [[1.0], [1.0]]  # what was added just now is seen
    missing = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), backend="nobody"), [SPEC])
    assert missing.state().problems == (f"{haproxy.socket}: backend nobody: there is none by that name",)


@pytest.mark.parametrize(
    ("version", "ok"), [("2.6.12-1+deb12u2", True), ("3.0.5", True), ("2.4.22", False), ("", False)]
)
def test_check_names_a_version_that_routing_is_not_tested_with(
    haproxy: HAProxy, monkeypatch: pytest.MonkeyPatch, version: str, ok: bool
) -> None:
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), route=("chat",)), [SPEC])
    assert [line.ok for line in made.check() if line.subject.endswith(" version")] == [True]
    monkeypatch.setattr(made._processes[0], "version", lambda: version)
    assert [line.ok for line in made.check() if line.subject.endswith(" version")] == [ok]


def test_pools_that_share_a_backend_keep_their_own_servers_and_caps(haproxy: HAProxy) -> None:
    other = PoolSpec(engine=find_engine("llama-3.1-8b-l40s", Path()), max_replicas=8)
    spec = ScalingSpec(service="chat", slo=SPEC.slo, pools=(*SPEC.pools, other))
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),), route=("*",)), [spec])
    for number, pool in enumerate(pools_of([spec])):
        made.follow(pool, {f"r{number}": f"127.0.0.1:{number + 11}"}, ())
    made.apply(Target(np.array([[1, 1]]), np.array([[5, 9]])))
    assert sorted((one.address, one.cap) for one in servers(haproxy).values()) == [
        ("127.0.0.1:11", 5),
        ("127.0.0.1:12", 9),
    ]
    assert made.state().batch_cap.tolist() == [[5, 9]]


@pytest.mark.plays(
    "replicas die under load",
    "their slots go into maintenance, none is deleted; HAProxy lives",
)
def test_a_replica_that_dies_and_comes_back_200_times_under_load_does_not_hurt_haproxy(
    actuator: HAProxyActuator, haproxy: HAProxy, engines: list[Engine]
) -> None:
    """HAProxy 2.6 dies where a server is deleted while a request is still being tried on it."""
    cap(actuator, 64)
    stop = threading.Event()

    def ask() -> int:
        answers = 0
        while not stop.is_set():
            try:
                answers += requests.get(haproxy.url("chat") + "/health", timeout=30).status_code == 200
            except requests.ConnectionError:
                time.sleep(0.01)
        return answers

    living = {"r1": engines[1].address}
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask) for _ in range(8)]
        for number in range(200):
            actuator.follow(CHAT, living | {f"dead{number}": f"127.0.0.1:{number % 7 + 1}"}, ())
            actuator.follow(CHAT, living, ())
        stop.set()
        assert all(answer.result() > 0 for answer in answers)
    assert haproxy.process.poll() is None
    assert routed(haproxy) == {"jevons-2": engines[1].address}


def test_check_says_where_requests_would_find_no_replica(haproxy: HAProxy) -> None:
    sleeping = ScalingSpec(
        service="code", slo=SPEC.slo, pools=(PoolSpec(engine=PROFILE, min_replicas=0, max_replicas=8),)
    )
    config = HAProxyConfig(sockets=(str(haproxy.socket),), route=("code",))
    lines = {line.subject: line for line in HAProxyActuator(config, [SPEC, sleeping]).check()}
    assert not lines["backend chat"].ok
    assert lines["backend chat"].detail.endswith("list its servers in HAProxy's configuration, or add chat to `route`")
    assert not lines["backend code"].ok
    assert lines["backend code"].detail.endswith("at zero replicas HAProxy answers 503 at once: set min_replicas to 1")


def test_without_maxconn_the_engines_own_limit_is_in_force(actuator: HAProxyActuator) -> None:
    """As HAProxy is configured in the documentation; nothing is set before Jevons acts."""
    assert actuator.state().batch_cap.tolist() == [[PROFILE.max_num_seqs]]
    line = next(line for line in actuator.check() if line.subject == "backend chat")
    assert line.ok
    assert f"maxconn none: until Jevons sets it, the engine's own limit of {PROFILE.max_num_seqs}" in line.detail
    cap(actuator, 5)
    assert actuator.state().batch_cap.tolist() == [[5]]
    cap(actuator, 4000)  # more than an engine takes is no limit either
    assert actuator.state().batch_cap.tolist() == [[PROFILE.max_num_seqs]]


def test_an_unreachable_haproxy_is_a_problem_not_a_zero(tmp_path: Path) -> None:
    lost = HAProxyActuator(HAProxyConfig(sockets=(str(tmp_path / "none"),)), [SPEC])
    state = lost.state()
    assert np.isnan(state.batch_cap[0, 0])
    assert "No such file" in state.problems[0]
    assert [line.ok for line in lost.check()] == [False]
