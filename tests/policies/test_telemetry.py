"""No library tells its makers anything on behalf of Jevons."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from policies.telemetry import OFF

BUILD = """
from policies.fleet import Fleet
from policies.lineup import build, resolve
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs
pool = PoolSpec(engine=find_engine("llama-3.1-8b-h100", shipped_configs()), max_replicas=4)
spec = ScalingSpec(service="chat", slo=Slo(ttft_s=1, tpot_s=1), pools=(pool,))
build(resolve("learned"), Fleet.from_specs([spec]), spec.interface)
"""
"""The network that ships, ready to decide."""


def environment_after(code: str, **environment: str) -> dict[str, str]:
    """What `OFF` names, as some code leaves it where nobody has said anything of telemetry."""
    outer = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith("XDG_")}
    show = f"{code}\nimport json, os; print(json.dumps({{name: os.environ.get(name) for name in {list(OFF)}}}))"
    told = subprocess.run(
        [sys.executable, "-c", show], env={**outer, **environment}, stdout=subprocess.PIPE, check=True, text=True
    )
    return dict(json.loads(told.stdout))


def test_onnxruntime_leaves_nothing_in_the_home_of_its_user(tmp_path: Path) -> None:
    """While it is imported, it makes a device's number and a store of what to send below ~/.cache/Microsoft."""
    assert environment_after(BUILD, HOME=str(tmp_path)) == OFF
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize(
    "use",
    [
        "import training.versions.tracking",
        "from autoscaler.versions.registry import connect; connect('sqlite://')",
        "from autoscaler.hosting.local_ray import options; options()",
    ],
)
def test_mlflow_and_ray_are_told_before_they_are_imported(tmp_path: Path, use: str) -> None:
    assert environment_after(use, HOME=str(tmp_path)) == OFF


def test_what_an_operator_has_set_stays() -> None:
    code = "from policies.telemetry import turn_off; turn_off()"
    assert environment_after(code, RAY_USAGE_STATS_ENABLED="1") == {**OFF, "RAY_USAGE_STATS_ENABLED": "1"}
