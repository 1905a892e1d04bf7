"""What one tick asks of a real API server, and of Prometheus for the load of replicas: everything once.

Two services whose counts are Deployments of a real API server, routed by a real HAProxy, measured by a made-up engine
each that a real Prometheus scrapes. Nobody plays the kubelet: pods are there, and stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy
from kube_objects import create_deployment, create_pod, replicas_of, set_ready
from kube_server import KubeApiServer
from servers import HAProxy, Prometheus, start, wait_until
from test_faults import engine

from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from policies.spec import find_engine

SERVICES = ("chat", "code")
REPLICAS = 3


class Counted:
    """A live service behind proxies that count what it asks."""

    def __init__(self, service: LiveService, kube: FaultProxy, prometheus: FaultProxy) -> None:
        self.service, self._kube, self._prometheus = service, kube, prometheus
        # The watch of the pods begins too, with one list of them.
        wait_until(lambda: not service.source.read().blind().any(), "both are measured")

    def tick(self) -> tuple[dict[str, int], int]:
        """Requests to the API server, by what was asked for, and how many there were to Prometheus."""
        self._kube.seen.clear()
        self._prometheus.seen.clear()
        self.service.step()
        paths = [(method, path.partition("/namespaces/default/")[2]) for method, path in list(self._kube.seen)]
        return Counter(f"{method} {path}" for method, path in paths if method != "WATCH"), len(self._prometheus.seen)


@pytest.fixture
def world(
    kube: KubeApiServer, faulty_kube: tuple[FaultProxy, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    # A busy machine must not make readings old before they are used.
    for module in ("composite", "kubernetes"):
        monkeypatch.setattr(f"autoscaler.actuators.{module}.STATE_AGE_S", 60.0)
    with ExitStack() as stack:
        proxy, kubeconfig = faulty_kube
        prometheus = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5)
        stack.callback(prometheus.stop)
        prometheus_proxy = FaultProxy(prometheus.url)
        stack.callback(prometheus_proxy.stop)
        haproxy = start(HAProxy, tmp_path / "haproxy", list(SERVICES))
        stack.callback(haproxy.stop)
        groups = []
        for number, name in enumerate(SERVICES):
            create_deployment(kube, name, REPLICAS)
            for pod in range(REPLICAS):
                create_pod(kube, f"{name}-{pod}", name, f"127.0.{number}.{pod + 2}")
                made = engine(0.1, 1.0)
                stack.callback(made.stop)
                groups.append((made.address, {"service": name}))
            set_ready(kube, name, REPLICAS)
        prometheus.scrape(groups)
        prometheus.wait_scraped([address for address, _ in groups])

        def make(policy: str) -> Counted:
            data = {
                "services": [
                    {
                        "service": name,
                        "slo": {"ttft_s": 2.0, "tpot_s": 0.05, "attainment": 0.9},
                        "pools": [{"engine": find_engine("llama-3.1-8b-h100", Path()), "max_replicas": 8}],
                        "guardrails": {
                            "scale_down_cooldown_s": 0.0,
                            "scale_down_window_s": 0.0,
                            "scale_down_worth_s": 0.0,
                        },
                    }
                    for name in SERVICES
                ],
                "metrics": {"url": prometheus_proxy.url, "window_s": 4.0},
                "actuator": {
                    "kind": "composite",
                    "replicas": {"kind": "kubernetes", "connection": {"kubeconfig": kubeconfig}, "events": False},
                    "batch_cap": {"kind": "haproxy", "sockets": [str(haproxy.socket)], "route": ["*"]},
                },
                "mode": "act",
                "policy": {"reference": policy, "cache": tmp_path / "policies"},
                "counterfactuals": [],
                "kill_file": tmp_path / "STOP",
                "records": {"url": f"sqlite:///{tmp_path / 'jevons.db'}"},
                "exposition": {"port": None},
                "supervision": {"revalidation": {"wait_s": 0.0}, "max_reading_age_s": 60.0},
            }
            service = LiveService(LiveConfig.model_validate(data))
            service.start()
            stack.callback(service.close)
            return Counted(service, proxy, prometheus_proxy)

        yield make


READING = {
    "GET deployments/chat": 1,
    "GET deployments/code": 1,
    "GET horizontalpodautoscalers": 1,
    "GET scaledobjects": 1,
}
WRITES = {f"{method} deployments/{name}/scale": 1 for method in ("GET", "PUT") for name in SERVICES}


def test_an_acting_tick_that_changes_nothing_reads_the_cluster_once(world: Any) -> None:
    counted = world(f"static:replicas={REPLICAS}")
    assert [counted.tick()[0] for _ in range(2)] == [READING, READING]


def test_a_tick_that_scales_up_reads_once_and_each_count_again_before_it_is_written(
    world: Any, kube: KubeApiServer
) -> None:
    counted = world("static:replicas=5")
    assert counted.tick()[0] == READING | WRITES
    assert [replicas_of(kube, name) for name in SERVICES] == [5, 5]


def test_a_tick_that_scales_down_lists_the_pods_of_each_pool_once_and_asks_for_all_loads_once(
    world: Any, kube: KubeApiServer
) -> None:
    counted = world("static:replicas=1")
    asked, queries = counted.tick()
    marks = {f"PATCH pods/{name}-{number}": 1 for name in SERVICES for number in range(REPLICAS - 1)}
    tried_and_done = {write: 2 * times for write, times in WRITES.items()}
    assert asked == READING | tried_and_done | marks | {"GET pods": len(SERVICES)}
    assert [replicas_of(kube, name) for name in SERVICES] == [1, 1]
    asked, queries_of_a_reading = counted.tick()
    assert asked == READING
    assert queries == queries_of_a_reading + 1
