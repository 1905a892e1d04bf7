"""The live bill against the judge's, on the same run."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_fakes import LiveWorld, live_config, service_spec

from autoscaler.actuators.base import FleetState
from envs.traffic.trace import Trace
from policies.contract import MetricsUnavailable, Snapshot
from training.replaying.scores import Bill

RATES = (
    "arrival_rps", "prompt_tps", "prefill_tps", "generation_tps", "finished_rps",
    "prompt_tokens_mean", "output_tokens_mean", "ttft_attainment", "tpot_attainment",
)  # fmt: skip


class Averaged(LiveWorld):
    """Rates over a window that spans several ticks, as where scrapes are rare."""

    windows = 1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.past: deque[Snapshot] = deque(maxlen=self.windows)

    def read(self) -> Snapshot:
        self.past.append(super().read())
        with np.errstate(all="ignore"):
            means = {
                name: np.array([np.nanmean([getattr(one, name)[0] for one in self.past])])
                if any(not np.isnan(getattr(one, name)[0]) for one in self.past)
                else np.array([np.nan])
                for name in RATES
            }
        return replace(self.past[-1], **means)


def tides(duration_s: float, low_rps: float, high_rps: float) -> Trace:
    """Traffic that rises and falls once in six hours."""
    rng = np.random.default_rng(0)
    times = np.sort(rng.uniform(0.0, duration_s, int(high_rps * duration_s)))
    rps = low_rps + (high_rps - low_rps) * (1.0 - np.cos(2 * np.pi * times / 21600.0)) / 2.0
    times = times[rng.random(len(times)) < rps / high_rps]
    prompt, output = rng.integers(50, 2000, len(times)), rng.integers(10, 300, len(times))
    return Trace.from_arrays(arrival_s=times, prompt_tokens=prompt, output_tokens=output, duration_s=duration_s)


def run(world: LiveWorld, service: Any, hours: float) -> None:
    world.run(service, round(hours * 3600.0 / service.config.interval_s))


@pytest.mark.parametrize("windows", [1, 4, 8], ids=["15 s", "60 s", "120 s"])
def test_live_dollars_and_tokens_are_the_judges_through_outages_and_a_restart(tmp_path: Path, windows: int) -> None:
    spec = service_spec()
    world = type("World", (Averaged,), {"windows": windows})([spec], [tides(8 * 3600.0, 2.0, 25.0)])
    service = world.service(live_config(tmp_path))
    run(world, service, 3.0)
    world.blind = True  # half an hour without Prometheus
    run(world, service, 0.5)
    world.blind = False
    run(world, service, 1.0)
    service.close()
    world.stopped = False
    world.wait_until(world.now_s + 600.0)  # ten minutes without a controller
    service = world.service(live_config(tmp_path))
    run(world, service, 3.0)
    usage = world.cluster.usage()
    judged = Bill(spec, world.cluster.arrays.pools).total_usd(usage, 0)
    assert service.exposition.meter.usd.sum() == pytest.approx(judged, rel=0.01)
    assert service.exposition.meter.tokens.sum() == pytest.approx(usage.served_tokens[0], rel=0.01)
    service.close()


class Unread(LiveWorld):
    """A source that asks nobody else when its server is away."""

    def read(self) -> Snapshot:
        if self.blind:
            raise MetricsUnavailable("no answer")
        return super().read()


@pytest.mark.parametrize("mode", ["act", "advise"])
def test_what_others_do_to_the_fleet_while_metrics_are_missing_is_billed(tmp_path: Path, mode: str) -> None:
    """Replicas are counted by the actuator, which answers: an outage of an hour must not make a wrong bill."""
    spec = service_spec()
    world = Unread([spec], [tides(3 * 3600.0, 5.0, 5.0)])
    service = world.service(live_config(tmp_path, mode=mode))
    run(world, service, 0.5)
    world.blind = True
    run(world, service, 0.1)
    world.set([[9]])
    run(world, service, 0.5)
    world.set([[2]])
    run(world, service, 0.5)
    usage = world.cluster.usage()
    judged = Bill(spec, world.cluster.arrays.pools).total_usd(usage, 0)
    assert service.exposition.meter.usd.sum() == pytest.approx(judged, rel=0.02)
    service.close()


class Crashing(LiveWorld):
    """One replica more, whose engine crashes: it holds its GPUs."""

    def state(self) -> FleetState:
        return replace(super().state(), replicas_stuck=np.ones((1, 1)), replicas_stuck_paid=np.ones((1, 1)))


def test_a_replica_that_never_gets_ready_and_holds_its_gpus_is_billed(tmp_path: Path) -> None:
    spec = service_spec()
    per_hour = []
    for made in (LiveWorld, Crashing):
        world = made([spec], [tides(3600.0, 5.0, 5.0)])
        service = world.service(live_config(tmp_path / made.__name__, mode="advise"))
        run(world, service, 0.25)
        (gauge,) = (one for one in service.exposition.collect() if one.name == "jevons_cost_usd_per_hour")
        per_hour.append(gauge.samples[0].value)
        assert service.exposition.meter.usd.sum() / 0.25 == pytest.approx(per_hour[-1], rel=0.02)
        service.close()
    assert per_hour[1] == pytest.approx(1.5 * per_hour[0])  # three instead of two


def test_live_tokens_are_those_that_were_served_whatever_arrives(tmp_path: Path) -> None:
    spec = service_spec(max_replicas=1, initial_replicas=1)
    world = LiveWorld([spec], [tides(3600.0, 30.0, 30.0)])  # several times what one replica can serve
    service = world.service(live_config(tmp_path))
    run(world, service, 0.5)
    usage = world.cluster.usage()
    assert usage.arrivals[0] > 2 * usage.finished[0]
    assert service.exposition.meter.tokens.sum() == pytest.approx(usage.served_tokens[0], rel=0.01)
    service.close()
