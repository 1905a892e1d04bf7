"""The policy that Ray Serve asks ten times a second."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoscaler.hosting.serve_policy import TARGETS_FILE_VARIABLE, policy


def context(deployment: str = "chat", app: str = "app", current: int = 3) -> SimpleNamespace:
    return SimpleNamespace(
        deployment_name=deployment,
        app_name=app,
        target_num_replicas=current,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=10,
    )


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "targets.json"
    monkeypatch.setenv(TARGETS_FILE_VARIABLE, str(path))
    return path


def entry(replicas: object, age_s: float = 0.0) -> dict[str, object]:
    return {"replicas": replicas, "batch_cap": 64, "time_s": time.time() - age_s}


def test_follows_the_published_target(file: Path) -> None:
    file.write_text(json.dumps({"chat": {"h100": entry(7)}}))
    assert policy(context()) == (7, {})


def test_follows_a_target_that_changed(file: Path) -> None:
    for replicas in (2, 10):
        file.write_text(json.dumps({"chat": {"h100": entry(replicas)}}))
        assert policy(context()) == (replicas, {})


def test_finds_the_service_by_application_and_the_pool_by_deployment(file: Path) -> None:
    file.write_text(json.dumps({"app": {"on-demand": entry(4), "spot": entry(6)}}))
    assert policy(context(deployment="spot")) == (6, {})
    assert policy(context(deployment="elsewhere")) == (3, {})  # two pools, neither is meant


def test_stays_within_the_bounds_of_the_deployment(file: Path) -> None:
    for asked, settled in ((0, 1), (50, 10)):
        file.write_text(json.dumps({"chat": {"h100": entry(asked)}}))
        assert policy(context()) == (settled, {})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"chat": 1}',
        '{"chat": {"h100": {}}}',
        '{"chat": {"h100": {"replicas": "x", "time_s": 9e9}}}',
        pytest.param(json.dumps({"chat": {"h100": entry(9, age_s=121.0)}}), id="too old"),
        pytest.param(json.dumps({"chat": {"h100": entry(9, age_s=-3600.0)}}), id="of the future"),
    ],
)
def test_keeps_the_count_without_a_fresh_target(file: Path, text: str) -> None:
    file.write_text(text)
    assert policy(context(current=5)) == (5, {})


def test_keeps_the_count_without_a_file(file: Path) -> None:
    assert policy(context(current=4)) == (4, {})
