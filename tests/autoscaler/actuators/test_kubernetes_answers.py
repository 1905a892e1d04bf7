"""What is written to an API server that answers in part; the real server's part is in `tests/integration`."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from autoscaler.actuators.base import PartlyFailed, PoolName
from autoscaler.actuators.kube_api import Json, KubeApi, KubeConnection, KubeError, Needed
from autoscaler.actuators.kubernetes import KubernetesActuator, KubernetesConfig
from autoscaler.actuators.kubernetes_owners import ClaimReader
from policies.contract import Target
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())


class PlayedApi:
    """An API server with Deployments of two replicas, whose pods cannot be watched."""

    def __init__(self, refused: dict[str, int]) -> None:
        self.connection = KubeConnection(timeout_s=0.1, deadline_s=0.1)
        self.refused = refused
        """HTTP status by the end of a path."""
        self.puts: list[tuple[str, int]] = []
        self.asked: list[Needed] = []

    def one_operation(self) -> Any:
        return nullcontext()

    def until_s(self) -> float:
        return time.monotonic() + self.connection.deadline_s

    def get(self, path: str, **_: str) -> Json:
        status = next((code for end, code in self.refused.items() if path.endswith(end)), 200)
        if status != 200:
            raise KubeError(status, f"HTTP {status}")
        name = path.removesuffix("/scale").rpartition("/")[2]
        labels = {"matchLabels": {"app": name}}
        return {
            "metadata": {"name": name, "namespace": "default", "resourceVersion": "1"},
            "spec": {"replicas": 2} if path.endswith("/scale") else {"replicas": 2, "selector": labels},
            "status": {"replicas": 2, "readyReplicas": 2},
        }

    def items(self, path: str, **_: str) -> list[Json]:
        names = ("chat", "code") if path.endswith("/deployments") else ()
        return [self.get(f"{path}/{name}") for name in names]

    def pages(self, path: str, **_: str) -> Any:
        raise KubeError(403, "HTTP 403")

    def put(self, path: str, body: Json, **_: str) -> Json:
        self.puts.append((path, body["spec"]["replicas"]))
        return body

    def allowed(self, needed: Needed, namespace: str) -> bool:
        self.asked.append(needed)
        return True

    def close(self) -> None:
        pass


def actuator(
    monkeypatch: pytest.MonkeyPatch, refused: dict[str, int], *services: str, **options: Any
) -> tuple[KubernetesActuator, PlayedApi]:
    api = PlayedApi(refused)
    monkeypatch.setattr("autoscaler.actuators.kubernetes.KubeApi", lambda connection: api)
    specs = [
        ScalingSpec(service=one, slo=Slo(ttft_s=0.5, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),))
        for one in services
    ]
    config = KubernetesConfig.model_validate({"least_loaded_first": False, **options})
    return KubernetesActuator(config, specs), api


@pytest.mark.parametrize("replicas", [1, 4])
def test_nothing_is_written_over_a_count_that_could_not_be_read(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    made, api = actuator(monkeypatch, {"/deployments/chat": 500}, "chat")
    wish = Target(np.array([[replicas]]), np.array([[8]]))
    with pytest.raises(PartlyFailed, match="deployments/chat in default: the count in force is not known"):
        made.apply(wish)
    assert api.puts == []
    api.refused = {}
    made.apply(wish)
    made.close()
    assert [count for _, count in api.puts] == [replicas]


def test_each_object_that_is_not_there_is_named_beside_other_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = actuator(monkeypatch, {"/deployments/chat": 403, "/deployments/code": 404}, "chat", "code")
    problems = made.state().problems
    assert "deployments/chat in default: HTTP 403" in problems
    assert "deployments/code in default: HTTP 404" in problems
    with pytest.raises(PartlyFailed) as failed:
        made.apply(Target(np.full((2, 1), 3), np.full((2, 1), 8)))
    assert failed.value.failures == {"chat": problems[0], "code": problems[1]}
    made.close()


def test_of_a_listed_namespace_too_the_objects_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [f"more-{number}" for number in range(32)]
    made, _ = actuator(monkeypatch, {}, "chat", *others)
    problems = made.state().problems
    made.close()
    assert {f"deployments/{one} in default: not found" for one in others} <= set(problems)
    assert not any("deployments/chat" in problem for problem in problems)


@pytest.mark.parametrize(("kind", "needed"), [("deployment", True), ("statefulset", False)])
def test_pods_are_patched_for_deployments_alone(monkeypatch: pytest.MonkeyPatch, kind: str, needed: bool) -> None:
    made, api = actuator(monkeypatch, {}, "chat", least_loaded_first=True, target={"resource": kind})
    made.check()
    made.close()
    assert (Needed("patch", "", "pods") in api.asked) == needed


def test_control_characters_of_an_owner_do_not_reach_a_terminal() -> None:
    owner = {"kind": "Fleet\x1b[31m", "name": "big\x07", "controller": True}
    item = {"metadata": {"name": "chat", "namespace": "default", "ownerReferences": [owner]}, "spec": {"replicas": 1}}
    reader = ClaimReader(cast("KubeApi", PlayedApi({})), own=False)
    claim = reader.read(PoolName("chat", "", 0, 0), item, [])
    assert claim.remark.startswith("belongs to Fleet[31m big, ")
    assert claim.author == "perhaps the controller of Fleet[31m big"
