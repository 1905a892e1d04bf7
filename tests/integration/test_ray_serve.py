"""Ray Serve: scaling keeps the processes and the other applications, and the policy hook follows the targets file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from fault_proxy import FaultProxy
from servers import wait_until

from autoscaler.actuators.base import PartlyFailed
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

pytestmark = pytest.mark.ray

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
LIMIT_S = 400.0


def target(replicas: int, cap: int) -> Target:
    return Target(np.array([[replicas]]), np.array([[cap]]))


def application(name: str, deployment: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": f"/{name}",
        "import_path": "serve_apps:build",
        "args": {"name": name},
        "runtime_env": {"env_vars": {"PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[2]}"}},
        "deployments": [{"name": name, **deployment}],
        **options,
    }


def details(address: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{address}/api/serve/applications/", timeout=30).json()["applications"]
    return found


def processes(address: str, name: str) -> set[int]:
    replicas = details(address)[name]["deployments"][name]["replicas"]
    return {one["pid"] for one in replicas if one["state"] == "RUNNING"}


def in_force(address: str, name: str) -> tuple[int, int]:
    """Count and cap that Serve's controller works by."""
    found = details(address)[name]["deployments"][name]
    return found["target_num_replicas"], found["deployment_config"]["max_ongoing_requests"]


@pytest.fixture
def deploy(ray_serve: str) -> Callable[..., str]:
    def put(*applications: dict[str, Any]) -> str:
        body = json.dumps({"applications": applications})
        answer = requests.put(f"{ray_serve}/api/serve/applications/", data=body, timeout=60)
        assert answer.status_code == 200, answer.text
        wanted = {one["name"] for one in applications}
        wait_until(
            lambda: {name for name, one in details(ray_serve).items() if one["status"] == "RUNNING"} == wanted,
            "applications run",
            LIMIT_S,
            0.3,
        )
        return ray_serve

    return put


def test_scaling_restarts_no_process_and_drops_no_application(deploy: Callable[..., str]) -> None:
    fixed = {"num_replicas": 1, "max_ongoing_requests": 8}
    address = deploy(application("chat", fixed), application("bystander", fixed))
    before, other = processes(address, "chat"), processes(address, "bystander")
    actuator = RayServeActuator(RayServeConfig(address=address), [SPEC])
    actuator.apply(target(2, 17))
    wait_until(lambda: actuator.state().replicas_ready[0, 0] == 2, "two replicas", LIMIT_S, 0.3)
    assert before <= processes(address, "chat")
    assert processes(address, "bystander") == other
    assert actuator.state().batch_cap[0, 0] == 17
    wait_until(lambda: in_force(address, "chat") == (2, 17), "what was declared is in force", LIMIT_S, 0.3)
    actuator.close()


def test_an_external_scale_survives_a_change_of_the_cap(deploy: Callable[..., str]) -> None:
    address = deploy(
        application("chat", {"max_ongoing_requests": 8}, external_scaler_enabled=True),
        application("bystander", {"max_ongoing_requests": 8}, external_scaler_enabled=True),
    )
    path = f"{address}/api/v1/applications/bystander/deployments/bystander/scale"
    assert requests.post(path, json={"target_num_replicas": 2}, timeout=30).status_code == 200
    actuator = RayServeActuator(RayServeConfig(address=address, replicas="external"), [SPEC])
    actuator.apply(target(2, 8))
    wait_until(lambda: actuator.state().replicas_ready[0, 0] == 2, "two replicas", LIMIT_S, 0.3)
    actuator.apply(target(2, 5))
    wait_until(lambda: actuator.state().batch_cap[0, 0] == 5, "the new cap", LIMIT_S, 0.3)
    assert actuator.state().replicas_target[0, 0] == 2
    assert details(address)["bystander"]["deployments"]["bystander"]["target_num_replicas"] == 2
    with pytest.raises(PartlyFailed, match="external_scaler_enabled is true"):
        RayServeActuator(RayServeConfig(address=address), [SPEC]).apply(target(3, 8))
    actuator.close()


def test_the_policy_hook_follows_the_published_target(deploy: Callable[..., str], targets_file: Path) -> None:
    scaling = {
        "min_replicas": 1,
        "max_replicas": 4,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "policy": {"policy_function": "autoscaler.hosting.serve_policy:policy"},
    }
    address = deploy(application("chat", {"autoscaling_config": scaling}))
    actuator = RayServeActuator(RayServeConfig(address=address, replicas="none"), [SPEC])
    assert actuator.state().owners == ("",)
    for replicas in (3, 1):

        def follows(replicas: int = replicas) -> bool:
            entry = {"replicas": replicas, "batch_cap": 8, "time_s": time.time()}
            targets_file.write_text(json.dumps({"chat": {"h100": entry}}))
            return bool(actuator.state().replicas_target[0, 0] == replicas)

        wait_until(follows, f"{replicas} replicas", LIMIT_S, 0.5)
    actuator.close()


@pytest.mark.parametrize(("fault", "said"), [(500, "HTTP 500"), (401, "refused the token"), ("cut", "")])
def test_a_failing_dashboard_is_named_and_nothing_is_known(ray_serve: str, fault: int | str, said: str) -> None:
    proxy = FaultProxy(ray_serve)
    proxy.fault = lambda method, path: fault
    actuator = RayServeActuator(RayServeConfig(address=proxy.url, deadline_s=1.5, timeout_s=1.0), [SPEC])
    state = actuator.state()
    assert np.isnan(state.replicas_target[0, 0])
    assert said in state.problems[0]
    with pytest.raises(PartlyFailed):
        actuator.apply(target(2, 8))
    proxy.stop()
