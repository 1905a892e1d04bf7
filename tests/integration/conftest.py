"""Fixtures: one real server of each kind per session; a test ends, with the reason, where one is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from fault_proxy import FaultProxy
from kube_objects import create_deployment, empty_namespace, kube_api
from kube_server import KubeApiServer
from servers import HAProxy, Prometheus, start

from autoscaler.actuators.kube_api import KubeApi

Server = TypeVar("Server")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    server = start(Prometheus, tmp_path_factory.mktemp("prometheus"))
    yield server
    server.stop()


@pytest.fixture(params=[2, 3], ids=["prometheus2", "prometheus3"])
def each_prometheus(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Prometheus]:
    """Both versions, one of its own for each test: what another test scraped would be answered for five minutes."""
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, major=request.param)
    yield server
    server.stop()


@pytest.fixture
def haproxy(tmp_path: Path) -> Iterator[HAProxy]:
    server = start(HAProxy, tmp_path / "haproxy", ["chat", "code"])
    yield server
    server.stop()


@pytest.fixture
def haproxy_with_servers(tmp_path: Path) -> Iterator[HAProxy]:
    """Backends chat and code, each with two servers of the configuration file at which nobody answers."""
    servers = {service: [("r1", "127.0.0.1:9 check"), ("r2", "127.0.0.1:10 check")] for service in ("chat", "code")}
    server = start(HAProxy, tmp_path / "haproxy", list(servers), servers)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def kube_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubeApiServer]:
    server = start(KubeApiServer, tmp_path_factory.mktemp("kube"))
    yield server
    server.stop()


@pytest.fixture
def kube(kube_server: KubeApiServer) -> KubeApiServer:
    """The session's API server; each test finds an empty namespace, whatever the one before it has left."""
    empty_namespace(kube_server)
    return kube_server


@pytest.fixture
def api(kube: KubeApiServer) -> Iterator[KubeApi]:
    """Deployment chat of two replicas, and nothing else in the namespace."""
    create_deployment(kube, "chat", replicas=2)
    api = kube_api(kube)
    yield api
    api.close()


@pytest.fixture
def faulty_kube(kube: KubeApiServer) -> Iterator[tuple[FaultProxy, Path]]:
    """A proxy in front of the real API server, and a kubeconfig that goes through it."""
    proxy = FaultProxy(f"https://127.0.0.1:{kube.port}", ca=kube.ca)
    yield proxy, kube.write_kubeconfig("faulty", "admin-token", proxy.url)
    proxy.stop()


@pytest.fixture
def faulty_prometheus(prometheus: Prometheus) -> Iterator[FaultProxy]:
    proxy = FaultProxy(prometheus.url)
    yield proxy
    proxy.stop()


@pytest.fixture(scope="session")
def targets_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Serve's controller looks for targets."""
    return tmp_path_factory.mktemp("targets") / "targets.json"


@pytest.fixture(scope="session")
def ray_serve(targets_file: Path) -> Iterator[str]:
    """The address of a Ray cluster's dashboard, with Serve running. Without token authentication."""
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_SERVE_LOG_TO_STDERR="0")
    os.environ["JEVONS_TARGETS_FILE"] = str(targets_file)
    import ray
    from ray import serve
    from servers import free_port

    port = free_port()
    for attempt in range(4):
        try:
            context = ray.init(
                num_cpus=4,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                dashboard_port=port,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level="ERROR",
            )
            break
        except Exception:  # Ray gives a busy machine 30 s to start and raises no class of its own
            ray.shutdown()
            if attempt == 3:
                raise
    serve.start(http_options={"host": "127.0.0.1", "port": free_port()})
    yield f"http://{context.dashboard_url}"
    serve.shutdown()
    ray.shutdown()
