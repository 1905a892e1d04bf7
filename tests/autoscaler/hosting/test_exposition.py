"""The controller's own metrics: families, the arithmetic of cost per token, and what is left out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families


def values(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """Samples of service `chat` by name and pool, outcome or reason."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if labels.pop("service", "chat") == "chat":
                found[sample.name, next(iter(labels.values()), "")] = sample.value
    return found


def test_every_metric_is_in_the_guide() -> None:
    root = Path(__file__).parents[3]
    sources = [file for room in ("hosting", "actuators") for file in (root / "autoscaler" / room).glob("*.py")]
    words = [node for file in sources for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = [node.value for node in words if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    exported = {text for text in texts if re.fullmatch(r"jevons_[a-z_]+[a-z]", text)}
    assert {"jevons_leader", "jevons_cost_usd", "jevons_cost_usd_per_hour", "jevons_desired_replicas"} <= exported
    guide = (root / "docs" / "live.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `jevons_")]
    named = {re.sub("_(total|info)$", "", name) for row in rows for name in re.findall(r"jevons_[a-z_]+", row)}
    assert exported - named == set(), "add them to the table of docs/live.md"
    assert named - exported == set(), "nobody exports these"


def test_families_are_those_that_the_guide_names(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 3)
    names = {family.name for family in text_string_to_metric_families(generate_latest(service.registry).decode())}
    assert names == {
        "jevons_policy_info",
        "jevons_tick_age_seconds",
        "jevons_tick_stall_seconds",
        "jevons_problems",
        "jevons_leader",
        "jevons_mode",
        "jevons_kill_switch",
        "jevons_owner_conflict",
        "jevons_service_state",
        "jevons_hold_until_timestamp_seconds",
        "jevons_thread_restarts",
        "jevons_cost_usd",
        "jevons_tokens",
        "jevons_stage_errors",
        "jevons_implausible_values",
        "jevons_decisions",
        "jevons_held_decisions",
        "jevons_stage_seconds",
        "jevons_last_tick_timestamp_seconds",
        "jevons_cost_usd_per_hour",
        "jevons_cost_usd_per_million_tokens",
        "jevons_tokens_per_second",
        "jevons_ttft_attainment_ratio",
        "jevons_tpot_attainment_ratio",
        "jevons_attainment_target_ratio",
        "jevons_queue_requests",
        "jevons_utilization_ratio",
        "jevons_observation_distance",
        "jevons_pool_cost_usd_per_hour",
        "jevons_pool_cost_usd_per_million_tokens",
        "jevons_decided_replicas",
        "jevons_decided_batch_cap",
        "jevons_target_replicas",
        "jevons_ready_replicas",
        "jevons_starting_replicas",
        "jevons_min_replicas",
        "jevons_max_replicas",
        "jevons_stuck_replicas",
    }
    service.close()


def test_impossible_measurements_are_counted_by_service_and_signal(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    vars(service.source)["implausible"] = {("chat", "running"): 3}
    assert values(service.registry)["jevons_implausible_values_total", "running"] == 3
    service.close()


def test_cost_per_million_tokens_is_the_bill_over_the_tokens(tmp_path: Path) -> None:
    spec = service_spec()
    world = LiveWorld([spec], [burst()])
    service = world.service(live_config(tmp_path))
    usd = tokens = before = 0.0
    pool = spec.pools[0]
    for tick in range(10):
        (decision,) = world.run(service, 1)
        snapshot = decision.snapshot
        paid = snapshot.replicas_ready + snapshot.replicas_starting + snapshot.replicas_draining
        rate = float(paid[0, 0]) * pool.usd_per_replica_hour * 1.15
        token_rate = float(snapshot.finished_rps[0] * (snapshot.prompt_tokens_mean[0] + snapshot.output_tokens_mean[0]))
        if tick:  # the first one only looks
            usd += rate / 3600.0 * service.config.interval_s
            tokens += (before + token_rate) / 2.0 * service.config.interval_s
        before = token_rate
        found = values(service.registry)
        assert found["jevons_cost_usd_per_hour", ""] == pytest.approx(rate)
        assert found["jevons_cost_usd_per_million_tokens", ""] == pytest.approx(rate / 3600.0 / token_rate * 1e6)
        assert found["jevons_pool_cost_usd_per_million_tokens", pool.label] == pytest.approx(
            found["jevons_cost_usd_per_million_tokens", ""]
        )
    assert found["jevons_cost_usd_total", pool.label] == pytest.approx(usd)
    assert found["jevons_tokens_total", pool.label] == pytest.approx(tokens)
    service.close()


def test_a_bill_is_shown_by_whoever_leads_and_never_begins_at_zero_again(tmp_path: Path) -> None:
    """Prometheus would take the way from 0 to what was spent before for new dollars."""
    world, key = LiveWorld([service_spec()], [burst()]), ("jevons_cost_usd_total", service_spec().pools[0].label)
    first = world.service(live_config(tmp_path))
    world.run(first, 5)
    spent = values(first.registry)[key]
    assert spent > 0.0
    first.close()
    assert key not in values(first.registry)
    second = world.service(live_config(tmp_path))
    assert key not in values(second.registry)
    world.run(second, 1)
    assert values(second.registry)[key] > spent
    second.close()


def test_what_is_not_known_is_left_out_and_holds_are_counted_by_reason(tmp_path: Path) -> None:
    world = LiveWorld([service_spec()], [burst()])
    service = world.service(live_config(tmp_path))
    world.run(service, 2)
    world.blind = True
    world.run(service, 3)
    found = values(service.registry)
    assert ("jevons_cost_usd_per_million_tokens", "") not in found
    assert ("jevons_ready_replicas", "llama-3.1-8b-l40s") not in found
    assert found["jevons_decisions_total", "held"] == 3
    (tmp_path / "STOP").touch()
    world.blind = False
    world.run(service, 2)
    assert values(service.registry)["jevons_held_decisions_total", "kill_switch"] == 2
    service.close()
