"""The whole controller at control intervals of 5 to 60 s: what counts seconds counts the same ones at each of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import LiveWorld, burst, live_config, service_spec

from policies.contract import Decision
from policies.error_budget import ErrorBudget
from policies.fleet import Fleet
from policies.lineup import BASELINES
from policies.spec import GuardrailSpec, InterfaceSpec, ScalingSpec, WindowSpec

INTERVALS_S = (5.0, 15.0, 60.0)
RUN_S = 1800.0
BURST_S = 900.0
"""The burst begins at 600 s and is over then."""
COOLDOWN_S = 90.0
WARM_S = 60.0
"""Seconds before the first sums begin, so that the grids of all intervals share their borders."""


def spec_at(interval_s: float) -> ScalingSpec:
    window = WindowSpec(control_interval_s=interval_s, metrics_delay_s=0.0)
    changes = {
        "interface": InterfaceSpec(window=window),
        "guardrails": GuardrailSpec(scale_down_cooldown_s=COOLDOWN_S),
    }
    return service_spec().model_copy(update=changes)


def played(folder: Path, interval_s: float, reference: str, run_s: float = RUN_S) -> tuple[list[Decision], Any]:
    """The decisions of one run, and the service that took them."""
    spec = spec_at(interval_s)
    world = LiveWorld([spec], [burst()])
    service = world.service(live_config(folder, spec, policy={"reference": reference, "cache": folder / "p"}))
    decisions = world.run(service, round(run_s / interval_s))
    service.close()
    return decisions, service


@pytest.mark.parametrize("interval_s", INTERVALS_S)
def test_ticks_windows_and_cooldowns_are_seconds(tmp_path: Path, interval_s: float) -> None:
    decisions, service = played(tmp_path, interval_s, "token-demand")
    assert service.config.interval_s == interval_s
    times = np.array([decision.snapshot.time_s[0] for decision in decisions])
    np.testing.assert_allclose(np.diff(times), interval_s)
    assert {float(decision.snapshot.window_s[0]) for decision in decisions} == {interval_s}
    settled = np.array([decision.settled.replicas.sum() for decision in decisions])
    assert settled.max() > 6
    assert settled[-1] < settled.max()
    down, changed = np.diff(settled) < 0, np.flatnonzero(np.diff(settled)) + 1
    for tick in np.flatnonzero(down) + 1:
        earlier = changed[changed < tick]
        assert not len(earlier) or times[tick] - times[earlier[-1]] >= COOLDOWN_S - 1e-6


def test_dollars_requests_histograms_and_the_error_budget_are_the_same_at_every_interval(tmp_path: Path) -> None:
    """One fleet that does not change, one traffic: only how often it is looked at differs."""
    found: dict[str, list[float]] = {}
    for interval_s in INTERVALS_S:
        decisions, service = played(tmp_path / f"{interval_s:g}", interval_s, "static")
        spec = spec_at(interval_s)
        budget = ErrorBudget(Fleet.from_specs([spec]))
        sums = dict.fromkeys(("seconds", "finished", "ttft", "tpot", "missed"), 0.0)
        first_s = float(decisions[0].snapshot.time_s[0]) - interval_s
        for decision in decisions:
            seen = decision.snapshot
            spending = budget.account(seen)
            if seen.time_s[0] - first_s <= WARM_S:
                continue
            sums["seconds"] += float(spending.seconds[0])
            sums["finished"] += float(seen.finished_rps[0] * seen.window_s[0])
            sums["ttft"] += float(seen.ttft_histogram_rps[0].sum() * seen.window_s[0])
            sums["tpot"] += float(seen.tpot_histogram_rps[0].sum() * seen.window_s[0])
            sums["missed"] += float(spending.missed[0])
        paid = float(service.exposition.meter.usd.sum()) / (RUN_S - interval_s)  # the first window is only looked at
        for name, value in {**sums, "usd_per_s": paid}.items():
            found.setdefault(name, []).append(value)
    assert found["seconds"] == [RUN_S - WARM_S] * len(INTERVALS_S)
    for name in ("finished", "ttft", "tpot", "usd_per_s"):
        np.testing.assert_allclose(found[name], found[name][0], rtol=0.02, err_msg=name)
    np.testing.assert_allclose(found["missed"], found["missed"][0], atol=0.01 * found["finished"][0])


@pytest.mark.parametrize(
    ("reference", "interval_s"), [*((reference, 60.0) for reference in BASELINES), ("hpa", 5.0), ("reactive", 5.0)]
)
def test_rules_follow_a_burst_at_other_intervals(tmp_path: Path, reference: str, interval_s: float) -> None:
    decisions, service = played(tmp_path, interval_s, reference, BURST_S)
    in_force = [int(decision.snapshot.replicas_target.sum()) for decision in decisions]
    assert max(in_force) > 6
    assert service.problems() == []
