"""Caps and drains on a real HAProxy with streams under way: nothing is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from servers import Engine, HAProxy, wait_until

from autoscaler.actuators.base import pools_of
from autoscaler.actuators.haproxy import HAProxyActuator, HAProxyConfig
from autoscaler.metrics import presets
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

PROFILE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=PROFILE, max_replicas=8),))


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
    made = HAProxyActuator(HAProxyConfig(sockets=(str(haproxy.socket),)), [SPEC])
    made.follow({"chat": {f"r{number}": engine.address for number, engine in enumerate(engines)}})
    return made


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
    pool_name = pools_of([SPEC])[0]
    with ThreadPoolExecutor(8) as pool:
        before = load(pool, haproxy, 4, 300)
        wait_until(lambda: sessions(haproxy)[0] == 4, "requests are under way")
        assert actuator.drain(pool_name, ["r0"])["r0"] > 0
        finished = served(engines[0])
        after = load(pool, haproxy, 4, 20)
        assert [answer.result() for answer in after] == [20] * 4
        assert [answer.result() for answer in before] == [300] * 4
    assert actuator.drain(pool_name, ["r0"]) == {"r0": 0}
    assert served(engines[0]) - finished <= 4  # those that it had
    assert actuator.state().replicas_ready[0, 0] == 1
    actuator.undrain(pool_name, ["r0"])
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
    cap(actuator, 5)
    actuator.follow({"chat": {"r1": engines[1].address, "r2": engines[0].address}})
    actuator.follow({"chat": {"r1": engines[1].address, "r2": engines[0].address}})
    servers = actuator._processes[0].servers("chat")
    assert {name: (one.address, one.cap, one.ready) for name, one in servers.items()} == {
        "r1": (engines[1].address, 5, True),
        "r2": (engines[0].address, 5, True),
    }
    assert stream(haproxy, 3) == 3


def test_an_unreachable_haproxy_is_a_problem_not_a_zero(tmp_path: Path) -> None:
    lost = HAProxyActuator(HAProxyConfig(sockets=(str(tmp_path / "none"),)), [SPEC])
    state = lost.state()
    assert np.isnan(state.batch_cap[0, 0])
    assert "No such file" in state.problems[0]
    assert [line.ok for line in lost.check()] == [False]
