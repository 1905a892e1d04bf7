"""What the Ray Serve actuator makes of answers that a real Serve gives for a moment only.

Against a real one: `tests/integration/test_ray_serve.py` and the contract of all actuators.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaler.actuators.ray_serve import RayServeActuator, RayServeConfig
from autoscaler.actuators.serve_api import APPLICATIONS, ServeApi
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
SPEC = ScalingSpec(service="chat", slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))


class PlayedServe(ServeApi):
    """Always gives one answer; keeps what it is asked."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(RayServeConfig())
        self.answer: dict[str, Any] = answer
        self.asked: list[tuple[str, str, dict[str, Any] | None]] = []

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if method == "GET":
            return self.answer
        self.asked.append((method, path, body))
        return {}


class Played(RayServeActuator):
    """An actuator on a played Serve."""

    def __init__(self, answer: dict[str, Any], **config: Any) -> None:
        super().__init__(RayServeConfig(**config), [SPEC])
        self._api = self.serve = PlayedServe(answer)

    @property
    def asked(self) -> list[tuple[str, str, dict[str, Any] | None]]:
        return self.serve.asked


def answer(declared: dict[str, Any], runs: tuple[int, int], **application: Any) -> dict[str, Any]:
    """One application, as it was declared and as its count and cap run."""
    external = application.pop("external_scaler_enabled", False)
    config = {"name": "chat", "external_scaler_enabled": external, "deployments": [{"name": "chat", **declared}]}
    found = {"target_num_replicas": runs[0], "deployment_config": {"max_ongoing_requests": runs[1]}, "replicas": []}
    one = {"status": "RUNNING", "deployed_app_config": config, "deployments": {"chat": found}, **application}
    return {"applications": {"chat": one}}


def target(replicas: int, cap: int) -> Target:
    return Target(np.array([[replicas]]), np.array([[cap]]))


def sent(actuator: Played) -> dict[str, Any]:
    """The deployment in the one configuration that was written."""
    ((method, path, body),) = [one for one in actuator.asked if one[0] == "PUT"]
    assert (method, path) == ("PUT", APPLICATIONS)
    return dict(body["applications"][0]["deployments"][0])


def test_a_target_that_runs_but_is_no_longer_declared_is_sent() -> None:
    actuator = Played(answer({"num_replicas": 3, "max_ongoing_requests": 16}, runs=(1, 8)))
    state = actuator.state()
    assert (state.replicas_target[0, 0], state.batch_cap[0, 0]) == (3, 16)
    actuator.apply(target(1, 8))
    assert sent(actuator) == {"name": "chat", "num_replicas": 1, "max_ongoing_requests": 8}


def test_what_is_declared_and_not_yet_running_is_not_sent_again() -> None:
    actuator = Played(answer({"num_replicas": 3, "max_ongoing_requests": 16}, runs=(1, 8)))
    actuator.apply(target(3, 16))
    assert actuator.asked == []


def test_a_declaration_that_failed_is_not_in_force_and_is_taken_back() -> None:
    actuator = Played(answer({"num_replicas": 3, "max_ongoing_requests": 16}, runs=(1, 8), status="DEPLOY_FAILED"))
    state = actuator.state()
    assert (state.replicas_target[0, 0], state.batch_cap[0, 0]) == (1, 8)
    actuator.apply(target(1, 8))
    assert sent(actuator) == {"name": "chat", "num_replicas": 1, "max_ongoing_requests": 8}


@pytest.mark.parametrize("declared", [{}, {"num_replicas": None, "max_ongoing_requests": None}])
def test_what_is_not_declared_is_as_it_runs(declared: dict[str, Any]) -> None:
    state = Played(answer(declared, runs=(2, 8))).state()
    assert (state.replicas_target[0, 0], state.batch_cap[0, 0]) == (2, 8)


def test_a_share_of_the_capacity_is_waited_for_not_all_that_was_declared() -> None:
    actuator = Played(answer({"num_replicas": 4, "max_ongoing_requests": 16}, runs=(2, 16)) | {"target_capacity": 50.0})
    assert (actuator.state().replicas_target[0, 0], actuator.state().replicas_starting[0, 0]) == (2, 2)


def test_a_new_cap_does_not_set_an_external_count_back() -> None:
    asked = answer({"max_ongoing_requests": 16}, runs=(2, 16), external_scaler_enabled=True)
    actuator = Played(asked, replicas="external")
    actuator.apply(target(3, 8))
    assert sent(actuator) == {"name": "chat", "num_replicas": 3, "max_ongoing_requests": 8}
    assert actuator.asked[-1] == (
        "POST",
        "/api/v1/applications/chat/deployments/chat/scale",
        {"target_num_replicas": 3},
    )
    only_count = Played(asked, replicas="external")
    only_count.apply(target(3, 16))
    assert [method for method, _, _ in only_count.asked] == ["POST"]
