"""A line for what changes, none for what stays."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from autoscaler.hosting.decision_log import TEXT, DecisionLog, JsonLines, TextLines


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "jevons")
    return caplog


def said(lines: pytest.LogCaptureFixture) -> list[str]:
    """What was said since the last look."""
    messages = [record.getMessage() for record in lines.records if record.name == "jevons"]
    lines.clear()
    return messages


def test_a_hold_is_one_line_with_its_cause_and_one_when_it_ends(
    tmp_path: Path, lines: pytest.LogCaptureFixture
) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, policy={"reference": "static:replicas=2"}))
    world.run(service, 3)
    said(lines)
    world.blind = True
    world.run(service, 3)
    assert said(lines) == ["chat held; missing_metrics", "read: no answer"]
    assert service.status()["problems"] == ["read: no answer"]
    world.blind = False
    world.run(service, 3)
    first, *others = said(lines)
    assert first.startswith("chat unchanged: ")
    assert others == ["no longer: read: no answer"]
    service.close()


def test_a_problem_whose_times_change_is_one_problem(lines: pytest.LogCaptureFixture) -> None:
    log = DecisionLog(["chat"], [["l40s"]])
    for left_s in (0.507, 1.9, 0.4):
        log.troubled(
            [f"read: Read timed out. (read timeout={left_s})", f"chat: the newest sample is {90 + left_s:.0f} s old"]
        )
    assert said(lines) == ["chat: the newest sample is 91 s old", "read: Read timed out. (read timeout=0.507)"]
    log.troubled(["chat: 3 of 4 replicas are scraped"])
    assert said(lines) == [
        "chat: 3 of 4 replicas are scraped",
        "no longer: chat: the newest sample is 91 s old",
        "no longer: read: Read timed out. (read timeout=0.507)",
    ]
    log.troubled(["chat: 2 of 4 replicas are scraped"])
    assert said(lines) == ["chat: 2 of 4 replicas are scraped", "no longer: chat: 3 of 4 replicas are scraped"]


def test_every_target_that_differs_is_a_line(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    decisions = world.run(service, 12)
    found = [int(decision.settled.replicas[0, 0]) for decision in decisions]
    changes = [one for before, one in zip([2, *found], found, strict=False) if one != before]
    scaled = [line for line in said(lines) if line.startswith("chat scaled: ")]
    assert len(changes) >= 2
    for replicas in changes:
        assert any(f" {replicas} (cap " in line for line in scaled)
    service.close()


def test_json_lines_carry_the_fields_of_the_decision(tmp_path: Path, lines: pytest.LogCaptureFixture) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path, mode="advise", policy={"reference": "static:replicas=4"}))
    world.run(service, 1)
    (record,) = [record for record in lines.records if record.name == "jevons"]
    found = json.loads(JsonLines().format(record))
    assert {name: found[name] for name in ("level", "service", "outcome", "replicas")} == {
        "level": "info",
        "service": "chat",
        "outcome": "advised",
        "replicas": {"llama-3.1-8b-l40s": 4},
    }
    assert found["message"].startswith("chat advised: llama-3.1-8b-l40s 4 (cap ")
    service.close()


def test_failures_are_counted_by_stage(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.blind = True
    world.run(service, 2)
    assert service.registry.get_sample_value("jevons_stage_errors_total", {"stage": "read"}) == 2
    service.close()


def test_no_line_of_a_traceback_can_pass_for_one_of_ours() -> None:
    try:
        raise RuntimeError("bad\x1b[2J\x1b]0;owned\x07")
    except RuntimeError:
        record = logging.LogRecord("jevons", logging.ERROR, "", 0, "it failed", (), sys.exc_info())
    text = TextLines(TEXT).format(record)
    assert "\x1b" not in text
    assert "RuntimeError: bad\\x1b[2J" in text
