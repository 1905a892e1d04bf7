"""The alerting rules: Prometheus accepts them, each fires on what it is for, and each has its section in the guide."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from live_fakes import LiveWorld, burst, live_config, service_spec
from missing import missing_server
from prometheus_client import generate_latest

from autoscaler.hosting.config import load_live_config

ROOT = Path(__file__).parents[3]
RULES = ROOT / "configs" / "deploy" / "alerts.yaml"
GUIDE = ROOT / "docs" / "alerts.md"

FIRES: dict[str, tuple[str, dict[str, str]]] = {
    # one series, values minute by minute for six hours, that makes the alert fire and no other
    "JevonsAbsent": ("", {}),
    "JevonsTickStalled": ("jevons_tick_age_seconds", {"instance": "a"}),
    "JevonsNobodyLeads": ("jevons_leader", {"service": "chat"}),
    "JevonsBlind": ("jevons_service_state", {"service": "chat", "state": "blind"}),
    "JevonsHeld": ("jevons_service_state", {"service": "chat", "state": "held"}),
    "JevonsObjectivesMissed": ("jevons_tpot_attainment_ratio", {"service": "chat"}),
    "JevonsMaximumReached": ("jevons_decided_replicas", {"service": "chat", "pool": "h100"}),
    "JevonsReplicasStuck": ("jevons_stuck_replicas", {"service": "chat"}),
    "JevonsOwnerConflict": ("jevons_owner_conflict", {"service": "chat"}),
    "JevonsKillSwitch": ("jevons_kill_switch", {"service": "chat"}),
    "JevonsPaused": ("jevons_service_state", {"service": "chat", "state": "paused"}),
    "JevonsStageFails": ("jevons_stage_errors_total", {"instance": "a", "stage": "read"}),
    "JevonsThreadFails": ("jevons_thread_restarts_total", {"instance": "a", "thread": "heartbeat"}),
}
BAD = {
    "jevons_tick_age_seconds": "60x400",
    "jevons_leader": "0x400",
    "jevons_tpot_attainment_ratio": "0.9x400",
    "jevons_decided_replicas": "8x400",
    "_total": "0+2x400",
}
POOL = {"service": "chat", "pool": "h100"}


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def promtool(*words: object) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        missing_server("promtool is not installed: apt-get install -y --no-install-recommends prometheus")
    return subprocess.run(
        [str(program), *(str(word) for word in words)], capture_output=True, text=True, check=False, timeout=120
    )


def test_promtool_accepts_the_rules() -> None:
    result = promtool("check", "rules", RULES)
    assert result.returncode == 0, result.stderr
    assert f"{len(rules())} rules found" in result.stdout


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    sections = re.findall(r"^## (\w+)$", GUIDE.read_text(), re.MULTILINE)
    assert sections == [rule["alert"] for rule in rules()] == list(FIRES)
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"
    parts = re.split(r"^## \w+$", GUIDE.read_text(), flags=re.MULTILINE)[1:]
    assert all(all(f"**{word}.**" in part for word in ("Means", "Look at", "Do")) for part in parts)


def test_the_rules_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    exposed = generate_latest(service.registry).decode()
    world.blind = True
    world.run(service, 1)
    exposed += generate_latest(service.registry).decode()
    for rule in rules():
        for name in re.findall(r"jevons_\w+", rule["expr"]):
            assert f"\n{name}{{" in exposed or f"\n{name} " in exposed, name
    service.close()


@pytest.mark.parametrize("alert", FIRES)
def test_an_alert_fires_on_what_it_is_for_and_only_then(alert: str, tmp_path: Path) -> None:
    well = {
        "jevons_tick_age_seconds": ({"instance": "a"}, "10x400"),
        "jevons_tick_stall_seconds": ({"instance": "a"}, "100x400"),
        "jevons_leader": ({"service": "chat"}, "1x400"),
        "jevons_mode": ({"service": "chat", "mode": "act"}, "1x400"),
        "jevons_ttft_attainment_ratio": ({"service": "chat"}, "0.99x400"),
        "jevons_tpot_attainment_ratio": ({"service": "chat"}, "0.99x400"),
        "jevons_attainment_target_ratio": ({"service": "chat"}, "0.95x400"),
        "jevons_decided_replicas": (POOL, "7x400"),
        "jevons_min_replicas": (POOL, "1x400"),
        "jevons_max_replicas": (POOL, "8x400"),
        "jevons_stuck_replicas": ({"service": "chat"}, "0x400"),
    }
    name, labels = FIRES[alert]
    if alert == "JevonsAbsent":
        well = {}
    elif name:
        bad = next((values for end, values in BAD.items() if name.endswith(end)), "1x400")
        well[name] = (labels, bad)
    series = [{"series": f"{one}{{{labelled(found)}}}", "values": values} for one, (found, values) in well.items()]
    checks = []
    for rule in rules():
        fired = [] if rule["alert"] != alert else [{"exp_labels": {**rule["labels"], **labels}}]
        for alert_of in fired:  # rules look at services
            for label in ("state", "pool"):
                alert_of["exp_labels"].pop(label, None)
        checks.append({"eval_time": "6h", "alertname": rule["alert"], "exp_alerts": fired})
    play(tmp_path, "1m", series, checks)


def test_a_loop_that_stands_still_once_is_told_although_its_process_ends_itself(tmp_path: Path) -> None:
    """The age never gets beyond that at which the process ends: by default 90 s, 45 s after the alert's threshold."""
    series = [
        {"series": 'jevons_tick_age_seconds{instance="a"}', "values": "10x20 25 40 55 70 85 10x200"},
        {"series": 'jevons_tick_stall_seconds{instance="a"}', "values": "90x300"},
    ]
    (rule,) = (rule for rule in rules() if rule["alert"] == "JevonsTickStalled")
    fired = {"exp_labels": {**rule["labels"], "instance": "a"}}
    checks = [
        {"eval_time": when, "alertname": rule["alert"], "exp_alerts": found}
        for when, found in (("5m", []), ("6m30s", [fired]), ("14m", [fired]), ("30m", []))
    ]
    play(tmp_path, "15s", series, checks)


@pytest.mark.parametrize(
    ("minutes", "fires_at", "silent_at"), [(2, [], ["5m", "7m", "9m"]), (30, ["20m", "31m"], ["6m", "38m"])]
)
def test_a_stage_that_failed_is_told_while_it_fails_and_not_after(
    minutes: int, fires_at: list[str], silent_at: list[str], tmp_path: Path
) -> None:
    """It fails from the fifth minute on, at every tick of 15 s."""
    series = [
        {
            "series": 'jevons_stage_errors_total{instance="a",stage="read"}',
            "values": f"0x20 1+1x{4 * minutes} {4 * minutes}x400",
        }
    ]
    (rule,) = (rule for rule in rules() if rule["alert"] == "JevonsStageFails")
    fired = {"exp_labels": {**rule["labels"], "instance": "a", "stage": "read"}}
    told = {one: [fired] for one in fires_at} | {one: [] for one in silent_at}
    checks = [{"eval_time": when, "alertname": rule["alert"], "exp_alerts": found} for when, found in told.items()]
    play(tmp_path, "15s", series, checks)


@pytest.mark.parametrize(
    ("name", "labels", "values", "alert"),
    [
        ("jevons_decided_replicas", POOL, "8x20 7x40", "JevonsMaximumReached"),
        ("jevons_tpot_attainment_ratio", {"service": "chat"}, "0.5x4 1x60", "JevonsObjectivesMissed"),
    ],
)
def test_what_was_short_and_is_over_is_not_told(
    name: str, labels: dict[str, str], values: str, alert: str, tmp_path: Path
) -> None:
    steady = {"jevons_min_replicas": "1x60", "jevons_max_replicas": "8x60"}
    series = [{"series": f"{one}{{{labelled(POOL)}}}", "values": found} for one, found in steady.items()]
    series.append({"series": 'jevons_attainment_target_ratio{service="chat"}', "values": "0.95x60"})
    series.append({"series": f"{name}{{{labelled(labels)}}}", "values": values})
    play(tmp_path, "1m", series, [{"eval_time": "40m", "alertname": alert, "exp_alerts": []}])


def test_a_fleet_whose_size_is_fixed_is_at_no_maximum(tmp_path: Path) -> None:
    series = [
        {"series": f"jevons_{one}_replicas{{{labelled(POOL)}}}", "values": "4x100"} for one in ("decided", "min", "max")
    ]
    play(tmp_path, "1m", series, [{"eval_time": "1h", "alertname": "JevonsMaximumReached", "exp_alerts": []}])


def test_somebody_else_who_scales_a_service_that_is_only_advised_is_no_alarm(tmp_path: Path) -> None:
    """The guide's way out of a conflict is to advise."""
    series = [
        {"series": 'jevons_owner_conflict{service="chat"}', "values": "1x400"},
        {"series": 'jevons_mode{service="chat",mode="act"}', "values": "0x400"},
    ]
    play(tmp_path, "1m", series, [{"eval_time": "6h", "alertname": "JevonsOwnerConflict", "exp_alerts": []}])


def test_the_page_says_when_a_loop_counts_as_standing_still() -> None:
    default_s = load_live_config(ROOT / "configs" / "live" / "metric_only.yaml").stall_s
    assert f"two intervals and all limits, {default_s:g} s by default" in (ROOT / "docs" / "live.md").read_text()


def play(folder: Path, interval: str, series: list[dict[str, str]], checks: list[dict[str, Any]]) -> None:
    """Let Prometheus evaluate the rules on series, and compare what fires."""
    found = folder / "test.yaml"
    tests = [{"interval": interval, "input_series": series, "alert_rule_test": checks}]
    found.write_text(
        yaml.safe_dump({"rule_files": [str(stripped(folder))], "evaluation_interval": interval, "tests": tests})
    )
    result = promtool("test", "rules", found)
    assert result.returncode == 0, result.stdout + result.stderr


def labelled(labels: dict[str, str]) -> str:
    return ",".join(f'{name}="{value}"' for name, value in labels.items())


def stripped(folder: Path) -> Path:
    """The rules without annotations, which promtool would compare word by word."""
    made = folder / "rules.yaml"
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules()]
    made.write_text(yaml.safe_dump({"groups": [{"name": "jevons", "rules": bare}]}))
    return made
