"""One contract for every actuator, on the real servers: absolute, idempotent, leaves alone, names what failed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from kube_objects import create_deployment, set_ready
from kube_server import KubeApiServer
from servers import HAProxy, wait_until

from autoscaler.actuators.base import LiveActuator, PartlyFailed, pools_of
from autoscaler.actuators.build import CompositeConfig, build_actuator
from autoscaler.actuators.config_map import ConfigMapConfig
from autoscaler.actuators.haproxy import HAProxyConfig
from autoscaler.actuators.kube_api import KubeConnection
from autoscaler.actuators.kubernetes import KubernetesConfig
from autoscaler.actuators.metric_only import MetricOnlyConfig
from autoscaler.actuators.ray_serve import RayServeConfig
from policies.contract import LEAVE_ALONE, Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SERVICES = ("chat", "code")


def spec(service: str) -> ScalingSpec:
    pool = PoolSpec(engine=ENGINE, max_replicas=8)
    return ScalingSpec(service=service, slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(pool,))


SPECS = [spec(service) for service in SERVICES]


def target(replicas: tuple[int, int], caps: tuple[int, int]) -> Target:
    return Target(np.array(replicas)[:, None], np.array(caps)[:, None])


@dataclass
class World:
    """An actuator, which parts of a target it carries out, and how to break it."""

    make: Callable[[list[ScalingSpec]], LiveActuator]
    replicas: bool
    caps: bool
    missing_fails: bool = True
    settle: Callable[[], None] = lambda: None
    ticks: int = 1
    """How often a controller repeats a target until it is in force."""


@pytest.fixture(
    params=[
        "kubernetes",
        "haproxy",
        "config_map",
        "metric_only",
        "composite",
        pytest.param("ray_serve", marks=pytest.mark.ray),
    ]
)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    def kubernetes() -> KubernetesConfig:
        server: KubeApiServer = request.getfixturevalue("kube")
        for service in SERVICES:
            create_deployment(server, service, replicas=2)
        return KubernetesConfig(connection=KubeConnection(kubeconfig=server.kubeconfig))

    def haproxy() -> HAProxyConfig:
        server: HAProxy = request.getfixturevalue("haproxy_with_servers")
        return HAProxyConfig(sockets=(str(server.socket),))

    match request.param:
        case "kubernetes":
            config: Any = kubernetes()
            return World(lambda specs: build_actuator(config, specs), True, False)
        case "haproxy":
            config = haproxy()
            return World(lambda specs: build_actuator(config, specs), False, True)
        case "config_map":
            server: KubeApiServer = request.getfixturevalue("kube")
            config = ConfigMapConfig(connection=KubeConnection(kubeconfig=server.kubeconfig), name="{service}-caps")
            return World(lambda specs: build_actuator(config, specs), False, True, missing_fails=False)
        case "metric_only":
            return World(lambda specs: build_actuator(MetricOnlyConfig(), specs), True, True, missing_fails=False)
        case "composite":
            config = CompositeConfig(
                replicas=kubernetes(),
                batch_cap=ConfigMapConfig(
                    connection=KubeConnection(kubeconfig=request.getfixturevalue("kube").kubeconfig), key="composite"
                ),
            )
            for service in SERVICES:
                set_ready(request.getfixturevalue("kube"), service, 8)
            # A cap falls only after the replicas asked for are ready: one tick later at the soonest.
            return World(lambda specs: build_actuator(config, specs), True, True, ticks=2)
        case _:
            address = request.getfixturevalue("serve_applications")
            config = RayServeConfig(address=address)
            return World(
                lambda specs: build_actuator(config, specs), True, True, settle=lambda: deployments_settle(address)
            )


@pytest.fixture
def actuator(world: World) -> Iterator[LiveActuator]:
    made = world.make(SPECS)
    yield made
    made.close()


def carry_out(world: World, actuator: LiveActuator, wish: Target) -> None:
    for _ in range(world.ticks):
        actuator.apply(wish)


def in_force(world: World, actuator: LiveActuator) -> dict[str, list[float]]:
    state = actuator.state()
    found = {}
    if world.replicas:
        found["replicas"] = state.replicas_target[:, 0].tolist()
    if world.caps:
        found["caps"] = state.batch_cap[:, 0].tolist()
    return found


def expected(world: World, replicas: list[float], caps: list[float]) -> dict[str, list[float]]:
    return ({"replicas": replicas} if world.replicas else {}) | ({"caps": caps} if world.caps else {})


def test_a_target_is_in_force_after_it_was_applied(world: World, actuator: LiveActuator) -> None:
    carry_out(world, actuator, target((3, 4), (16, 32)))
    assert in_force(world, actuator) == expected(world, [3.0, 4.0], [16.0, 32.0])


def test_repeating_a_target_changes_nothing(world: World, actuator: LiveActuator) -> None:
    for _ in range(2):
        carry_out(world, actuator, target((3, 2), (24, 8)))
    assert in_force(world, actuator) == expected(world, [3.0, 2.0], [24.0, 8.0])


def test_a_target_that_is_set_back_at_once_is_not_lost(world: World, actuator: LiveActuator) -> None:
    for replicas, caps in (((2, 3), (12, 14)), ((4, 2), (30, 6)), ((2, 3), (12, 14))):
        carry_out(world, actuator, target(replicas, caps))
    assert in_force(world, actuator) == expected(world, [2.0, 3.0], [12.0, 14.0])
    world.settle()
    assert in_force(world, actuator) == expected(world, [2.0, 3.0], [12.0, 14.0])


def test_a_service_to_be_left_alone_keeps_what_it_has(world: World, actuator: LiveActuator) -> None:
    carry_out(world, actuator, target((2, 2), (20, 20)))
    carry_out(world, actuator, target((3, LEAVE_ALONE), (40, 5)))
    assert in_force(world, actuator) == expected(world, [3.0, 2.0], [40.0, 20.0])


def test_what_failed_is_named_and_the_rest_is_done(world: World) -> None:
    actuator = world.make([SPECS[0], spec("nobody")])
    if not world.missing_fails:  # it makes what is missing
        actuator.apply(target((4, 1), (48, 8)))
        actuator.close()
        return
    with pytest.raises(PartlyFailed) as failed:
        actuator.apply(target((4, 1), (48, 8)))
    assert set(failed.value.failures) == {"nobody"}
    state = actuator.state()
    done = {"replicas": state.replicas_target[0, 0], "caps": state.batch_cap[0, 0]}
    wanted = {"replicas": 4.0, "caps": 48.0}
    kinds = [kind for kind, carried in (("replicas", world.replicas), ("caps", world.caps)) if carried]
    assert {kind: done[kind] for kind in kinds} == {kind: wanted[kind] for kind in kinds}
    actuator.close()


def test_a_missing_service_is_unknown_never_zero(world: World) -> None:
    actuator = world.make([SPECS[0], spec("nobody")])
    state = actuator.state()
    if not world.missing_fails:  # it makes what is missing
        assert state.problems == ()
        actuator.close()
        return
    assert np.isnan(state.replicas_target[1, 0])
    assert np.isnan(state.batch_cap[1, 0])
    assert state.problems != ()
    actuator.close()


def test_check_changes_nothing_and_finds_nothing_wrong(world: World, actuator: LiveActuator) -> None:
    carry_out(world, actuator, target((2, 3), (12, 14)))
    world.settle()
    lines = actuator.check()
    assert [line for line in lines if not line.ok] == []
    assert in_force(world, actuator) == expected(world, [2.0, 3.0], [12.0, 14.0])


def test_names_of_pools_lead_back_to_their_places() -> None:
    two = SPECS[0].model_copy(
        update={"pools": (SPECS[0].pools[0], PoolSpec(name="spot", engine=ENGINE, max_replicas=3))}
    )
    labels = {pool.label: (pool.row, pool.column) for pool in pools_of([SPECS[1], two])}
    assert labels == {"code": (0, 0), f"chat/{ENGINE.name}": (1, 0), "chat/spot": (1, 1)}


@pytest.fixture(scope="session")
def serve_applications(ray_serve: str) -> str:
    """Three declared applications: two are ours, one is not."""
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serve_apps:build",
            "args": {"name": name},
            "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
            "deployments": [{"name": name, "num_replicas": 1, "max_ongoing_requests": 8}],
        }
        for name in (*SERVICES, "bystander")
    ]
    answer = requests.put(
        f"{ray_serve}/api/serve/applications/", data=json.dumps({"applications": applications}), timeout=60
    )
    assert answer.status_code == 200, answer.text
    deployments_settle(ray_serve)
    return ray_serve


def deployments_settle(address: str) -> None:
    def running() -> bool:
        found = requests.get(f"{address}/api/serve/applications/", timeout=10).json()["applications"]
        return len(found) >= 3 and all(one["status"] == "RUNNING" for one in found.values())

    wait_until(running, "applications run", limit_s=400.0, pause_s=0.3)
