"""What servers may take to answer fits into the stages that ask them: at load, with the sentence that says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from live_fakes import live_config

from autoscaler.hosting.config import LiveConfig, StageLimits, load_live_config
from policies.engine import ConfigError
from policies.spec import shipped_configs

KUBERNETES = {"kind": "kubernetes", "connection": {"deadline_s": 6.0}}
HAPROXY = {"kind": "haproxy", "sockets": ["/a.sock", "/b.sock", "/c.sock"], "timeout_s": 3.0}
BOTH = {"kind": "composite", "replicas": KUBERNETES, "batch_cap": HAPROXY}
METRICS = {"url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"metrics": {**METRICS, "deadline_s": 9.0}, "limits": {"read_s": 9.0}},
            "limits.read_s: 9 s is too short for metrics.deadline_s of 9 s; set it to 9.5 or more, or lower what it "
            "has to hold",
        ),
        (
            {"actuator": BOTH, "limits": {"read_s": 9.0}},
            "limits.read_s: 9 s is too short for actuator.replicas.connection.deadline_s of 6 s and "
            "actuator.batch_cap.timeout_s of 3 s; set it to 9.5 or more, or lower what it has to hold",
        ),
        (
            {"actuator": BOTH, "limits": {"permit_s": 10.0}},
            "limits.permit_s: 10 s is too short for actuator.replicas.connection.deadline_s of 6 s and "
            "actuator.batch_cap.timeout_s of 3 s; set it to 10.5 or more, or lower what it has to hold",
        ),
        (
            {"actuator": {"kind": "ray_serve", "address": "http://chat-head-svc:8265"}, "limits": {"read_s": 8.0}},
            "limits.read_s: 8 s is too short for actuator.deadline_s of 4 s and "
            "actuator.kuberay.connection.deadline_s of 4 s; set it to 8.5 or more, or lower what it has to hold",
        ),
    ],
)
def test_a_stage_that_would_end_before_its_servers_deadlines_is_refused(
    changes: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole sentence is compared
        live_config(tmp_path, **changes)
    assert refused.value.errors()[0]["msg"] == f"Value error, {sentence}"  # type: ignore[attr-defined]


def test_it_is_said_with_the_file(tmp_path: Path) -> None:
    shipped = shipped_configs() / "live" / "kubernetes.yaml"
    file = tmp_path / "live.yaml"
    text = shipped.read_text().replace("services/chat.yaml", str(shipped.parent / "services" / "chat.yaml"))
    file.write_text(f"{text}limits: {{read_s: 5}}\n")
    with pytest.raises(ConfigError, match=rf"^{file}: .*limits.read_s: 5 s is too short for metrics.deadline_s of 5 s"):
        load_live_config(file)


@pytest.mark.parametrize(
    "actuator",
    [
        {"kind": "kubernetes"},
        {"kind": "config_map"},
        {"kind": "haproxy", "sockets": [f"/{number}.sock" for number in range(20)]},
        {"kind": "metric_only"},
        {"kind": "ray_serve", "kuberay": {"name": "chat"}},
        {
            "kind": "composite",
            "replicas": {"kind": "kubernetes"},
            "batch_cap": {"kind": "haproxy", "sockets": ["/a.sock"]},
        },
        {"kind": "composite", "replicas": {"kind": "kubernetes"}, "batch_cap": {"kind": "config_map"}},
    ],
)
def test_what_is_shipped_fits(actuator: dict[str, Any], tmp_path: Path) -> None:
    made = live_config(tmp_path, actuator=actuator, metrics=METRICS, limits={})
    assert isinstance(made, LiveConfig)
    assert made.limits == StageLimits()
