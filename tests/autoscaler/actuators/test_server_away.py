"""A server that is away is named before the stage that asks it is over, with the settings that are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import yaml

from autoscaler.actuators import kube_api, serve_api
from autoscaler.actuators.base import LiveActuator
from autoscaler.actuators.build import build_actuator
from autoscaler.actuators.config_map import ConfigMapActuator, ConfigMapConfig
from autoscaler.actuators.kube_api import KubeConnection, KubeError, NoAnswer
from autoscaler.actuators.kuberay import KubeRayConfig
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from autoscaler.hosting.config import SPARE_S, StageLimits
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPECS = [
    ScalingSpec(
        service=f"chat-{number}", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),)
    )
    for number in range(200)
]


class VirtualTime:
    """Time passes only by waiting."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.module = SimpleNamespace(monotonic=lambda: self.now_s, sleep=self.wait)

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture(params=["down", "hangs"])
def clock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VirtualTime:
    """No server answers; one that hangs takes the whole time-out of each request."""
    made = VirtualTime()
    hangs = request.param == "hangs"

    def kubernetes(client: Any, method: str, path: str, query: Any, body: Any, wait_s: float) -> Any:
        made.wait(wait_s if hangs else 0.001)
        raise NoAnswer(0, "no answer")

    def serve(session: Any, method: str, url: str, timeout: float, **_: Any) -> Any:
        made.wait(timeout if hangs else 0.001)
        raise requests.ConnectionError("no answer")

    monkeypatch.setattr(kube_api, "time", made.module)
    monkeypatch.setattr(serve_api, "time", made.module)
    monkeypatch.setattr(kube_api, "_response", kubernetes)
    monkeypatch.setattr(requests.Session, "request", serve)
    return made


@pytest.mark.parametrize("kind", ["kubernetes", "config_map", "ray_serve"])
def test_a_server_that_is_away_is_named_in_time(kind: str, clock: VirtualTime, tmp_path: Path) -> None:
    connection = connected(tmp_path)
    actuators: dict[str, LiveActuator] = {
        "kubernetes": KubernetesActuator(KubernetesConfig(connection=connection), SPECS),
        "config_map": ConfigMapActuator(ConfigMapConfig(connection=connection), SPECS),
        "ray_serve": RayServeActuator(RayServeConfig(), SPECS),
    }
    problems = actuators[kind].state().problems
    for actuator in actuators.values():
        actuator.close()
    assert "no answer" in problems[0]
    limits = StageLimits()
    # `read` asks for the metrics before, and `permit` for the state alone.
    assert clock.now_s <= min(limits.permit_s, limits.read_s - 2.0)


@pytest.mark.parametrize(("kind", "services"), [("kubernetes", 20), ("config_map", 200), ("ray_serve", 200)])
def test_a_server_that_answers_slowly_does_not_take_longer_than_one_that_is_away(
    kind: str, services: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each answer comes well within its time-out; their sum would be longer than the stage."""
    clock = VirtualTime()
    item = {"metadata": {"name": "chat-0", "namespace": "default"}, "spec": {"replicas": 2}, "items": []}

    def kubernetes(client: Any, method: str, path: str, query: Any, body: Any, wait_s: float) -> Any:
        clock.wait(min(0.4, wait_s))
        if wait_s < 0.4:
            raise NoAnswer(0, "no answer: timed out")
        return SimpleNamespace(read=lambda: json.dumps(item))

    def serve(session: Any, method: str, url: str, timeout: float, **_: Any) -> Any:
        clock.wait(min(3.5, timeout))
        return SimpleNamespace(status_code=200, content=b'{"applications": {}}')

    monkeypatch.setattr(kube_api, "time", clock.module)
    monkeypatch.setattr(serve_api, "time", clock.module)
    monkeypatch.setattr(kube_api, "_response", kubernetes)
    monkeypatch.setattr(requests.Session, "request", serve)
    connection = connected(tmp_path)
    made = {
        "kubernetes": KubernetesConfig(connection=connection),
        "config_map": ConfigMapConfig(connection=connection),
        "ray_serve": RayServeConfig(kuberay=KubeRayConfig(connection=connection, name="chat")),
    }[kind]
    actuator = build_actuator(made, SPECS[:services])  # type: ignore[arg-type]
    problems = actuator.state().problems
    actuator.close()
    assert clock.now_s < sum(made.waits_s().values()) + SPARE_S  # type: ignore[attr-defined]
    assert kind == "ray_serve" or any("s that earlier answers left of 4 s" in one for one in problems)


def test_what_is_refused_in_one_place_leaves_the_others_readable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its retries take all the time of the reading."""
    clock = VirtualTime()
    item = {"metadata": {"name": "chat-1", "namespace": "right"}, "spec": {"replicas": 2}}

    def answer(client: Any, method: str, path: str, *_: Any) -> Any:
        if "/namespaces/broken/" in path:
            raise KubeError(500, "HTTP 500")
        body = item if path.endswith("/deployments/chat-1") else {"metadata": {}, "items": []}
        return SimpleNamespace(read=lambda: json.dumps(body))

    monkeypatch.setattr(kube_api, "time", clock.module)
    monkeypatch.setattr(kube_api, "_response", answer)
    targets = {"chat-0": {"namespace": "broken"}, "chat-1": {"namespace": "right"}}
    config = KubernetesConfig.model_validate({"connection": connected(tmp_path), "targets": targets})
    made = KubernetesActuator(config, SPECS[:2])
    state = made.state()
    made.close()
    assert np.isnan(state.replicas_target[0, 0])
    assert (state.replicas_target[1, 0], state.owners_unread) == (2.0, (0,))


def connected(folder: Path) -> KubeConnection:
    """To an address at which nobody is."""
    file = folder / "kubeconfig"
    config = {
        "current-context": "local",
        "clusters": [{"name": "local", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "user", "user": {"token": "t"}}],
        "contexts": [{"name": "local", "context": {"cluster": "local", "user": "user"}}],
    }
    file.write_text(yaml.safe_dump(config))
    return KubeConnection(kubeconfig=file)
