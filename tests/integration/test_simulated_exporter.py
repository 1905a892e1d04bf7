"""One cluster, two ways to read it: through a real Prometheus, and in process. The decisions are the same.

A live service reads Prometheus, which scrapes the simulated cluster in real time, and acts on it. At each tick
in-process controllers, told the same target in force, decide on what the cluster itself says of the last window.

**What is equal**: replicas, batch cap, what `hpa` would have done, and what a network would have done. **Within what**:
the newest sample that Prometheus holds is between nothing and one scrape old, and a rate over a window is taken between
the first and the last sample in it, which is up to a scrape less. So there are in-process controllers for a window that
is whole, one that begins a scrape later, one that ends a scrape earlier, and one that ends when the tick acts, since
the queries are asked some time before that. The decision through Prometheus is theirs,
or lies between them where they differ because the load has jumped at the edge of a window. What is left is rounding:
requests are whole, so a rate is some percent off, and where a demand is that near to a whole replica, rounding up makes
a replica of it. So never more than one replica, and in most ticks none. And a replica that was removed counts for one
more window (a failed scrape looks the same), so at the tick after a scale-down less may be given back.

The age of the oldest request in the queue is nobody's metric (docs/metrics.md): it is estimated from others, and the
in-process controllers are given the same estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters import ExportedWorld, Exporter
from live_fakes import live_config
from servers import Prometheus, start
from slow_engine import slow_engine

from autoscaler.hosting.config import LiveConfig
from autoscaler.versions.counterfactuals import Counterfactuals
from autoscaler.versions.timed_answers import TimedAnswers
from envs.cluster.reading import Reading
from envs.traffic.trace import Trace
from policies.contract import Decision, Snapshot
from policies.decider import Decider
from policies.fleet import Fleet
from policies.learned import load_bundle, write_bundle
from policies.lineup import SHIPPED_BUNDLE, make_policy
from policies.spec import ScalingSpec

INTERVAL_S, SCRAPE_S = 4.0, 0.5
CALM_S, BURST_S, TOTAL_S = 22.0, 44.0, 116.0
CALM_RPS, BURST_RPS = 4.0, 14.0
MOST = 40
PROFILE = slow_engine(c_us_per_seq=2000.0, max_num_seqs=8, warmup_s=6.0)


def spec() -> ScalingSpec:
    return ScalingSpec.model_validate(
        {
            "service": "chat",
            "slo": {"ttft_s": 2.0, "tpot_s": 0.2, "attainment": 0.9},
            "pools": [{"engine": PROFILE, "min_replicas": 1, "max_replicas": MOST, "cold_start_cv": 0.0}],
            "interface": {"window": {"control_interval_s": INTERVAL_S, "metrics_delay_s": 0.0}},
            "guardrails": {"scale_down_cooldown_s": 12.0},
        }
    )


def traffic() -> Trace:
    times = np.concatenate(
        [
            np.arange(0.0, CALM_S, 1.0 / CALM_RPS),
            np.arange(CALM_S, CALM_S + BURST_S, 1.0 / BURST_RPS),
            np.arange(CALM_S + BURST_S, TOTAL_S, 1.0 / CALM_RPS),
        ]
    )
    return Trace.from_arrays(
        arrival_s=times,
        prompt_tokens=np.full(len(times), 100),
        output_tokens=np.full(len(times), 20),
        duration_s=TOTAL_S,
    )


def network(path: Path) -> Path:
    """The shipped network under this interface. What it decides here means nothing, but it reads every feature."""
    shipped = load_bundle(SHIPPED_BUNDLE)
    interface = spec().interface
    manifest = shipped.manifest.model_copy(update={"interface": interface, "interface_digest": interface.digest()})
    write_bundle(path, manifest, shipped.weights)
    return path


def config(folder: Path, url: str) -> LiveConfig:
    return live_config(
        folder,
        spec(),
        metrics={"url": url, "gateway": "llm-d-epp", "replica_label": "pod", "deadline_s": 3.0},
        policy={
            "reference": "token-demand:memory_s=20",
            "challenger": str(network(folder / "network.zip")),
            "cache": folder / "policies",
        },
        counterfactuals=["hpa"],
        supervision={"revalidation": {"wait_s": 0.0}},
    )


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=SCRAPE_S)
    yield server
    server.stop()


class InProcess:
    """The decision core, the policy and the peers of the live service on another reading of the same cluster."""

    def __init__(self, live: LiveConfig) -> None:
        specs = live.services
        self.fleet = Fleet.from_specs(specs)
        self.decider = Decider(self.fleet, specs[0].interface.window, specs[0].guardrails)
        self.policy = make_policy(live.policy.reference, self.fleet, specs)
        peers = {"hpa": make_policy("hpa", self.fleet, specs)}
        peers["challenger"] = make_policy(str(live.policy.challenger), self.fleet, specs)
        self.peers = Counterfactuals(peers, self.fleet, np.zeros(1), TimedAnswers(60.0))

    def decide(self, seen: Snapshot, through_prometheus: Decision) -> Decision:
        """Its own decision; the other one's is in force afterwards."""
        shared = ("time_s", "window_s", "oldest_wait_s", "replicas_target", "batch_cap")
        seen = replace(seen, **{name: getattr(through_prometheus.snapshot, name) for name in shared})
        observation = self.decider.observe(seen)
        decision = self.decider.decide(observation, self.policy)
        details = self.peers.of_peers(observation, self.decider)
        self.decider.amend(through_prometheus.settled, seen.time_s)
        return replace(decision, details=details)


def played(prometheus: Prometheus, folder: Path) -> tuple[list[Decision], list[list[Decision]]]:
    """The decisions through Prometheus at each tick, and those of the in-process controllers."""
    world = ExportedWorld([spec()], [traffic()])
    exporter = Exporter(world.exposition)
    prometheus.scrape([(exporter.address, {"service": "chat"})])
    live = config(folder, prometheus.url)
    service, began_s = world.service(live), world.now_s
    controllers = [InProcess(live) for _ in range(4)]
    acted: list[Reading] = []
    world.before_apply = lambda: acted.append(world.reading())
    found: list[Decision] = []
    in_process: list[list[Decision]] = []
    before = [world.reading()] * 2
    try:
        for tick in range(1, int(TOTAL_S / INTERVAL_S) + 1):
            now = []
            for offset_s in (-SCRAPE_S, 0.0):
                world.wait_until(began_s + tick * INTERVAL_S + offset_s)
                now.append(world.reading())
            acted.clear()
            decision = service.step()
            assert decision is not None
            now.append(acted[0] if acted else world.reading())
            found.append(decision)
            windows = [(before[0], now[1]), (before[1], now[1]), (before[0], now[0]), (before[0], now[2])]
            seen = [world.window(first, last) for first, last in windows]
            if decision.snapshot.blind().any():
                assert tick == 1, "only the window in which Prometheus begins to scrape may be unknown"
                seen = [decision.snapshot] * len(windows)  # a peer's 15 s begin with the first window that it sees
            in_process.append(
                [controller.decide(one, decision) for controller, one in zip(controllers, seen, strict=True)]
            )
            world.wait_until(began_s + tick * INTERVAL_S + SCRAPE_S)
            before = [now[1], world.reading()]
    finally:
        service.close()
        exporter.stop()
    return found, in_process


RATES = ("arrival_rps", "prompt_tps", "prefill_tps", "generation_tps", "finished_rps")
LEVELS = ("running", "replicas_ready", "replicas_starting", "replicas_target", "batch_cap", "queue_requests")
SHARES = ("ttft_attainment", "tpot_attainment", "kv_cache_usage")
LENGTHS = ("prompt_tokens_mean", "output_tokens_mean")


COMPARED: dict[str, tuple[Callable[[Decision], Any], int]] = {
    "replicas": (lambda decision: decision.settled.replicas, 1),
    "batch cap": (lambda decision: decision.settled.batch_cap, 0),
    "hpa": (lambda decision: decision.details["peer hpa/replicas"], 1),
    "network": (lambda decision: decision.details["peer challenger/replicas"], 1),
}
"""What is compared, and by how much it may be off by rounding."""


def column(decisions: list[Decision], read: Callable[[Decision], Any]) -> np.ndarray:
    """The first (and only) entry of an array of each decision."""
    return np.array([float(np.ravel(read(decision))[0]) for decision in decisions])


@pytest.mark.long
def test_decisions_through_prometheus_are_those_in_process_within_the_metrics_delay(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    found, in_process = played(prometheus, tmp_path)
    agreed = {}
    replicas = column(found, COMPARED["replicas"][0])
    before = np.concatenate([[np.nan, np.nan], replicas])[: len(replicas)]
    removed = np.concatenate([[False], np.diff(replicas) < 0])[: len(replicas) - 1]
    still_counted = np.where(np.concatenate([[False], removed]), before, -np.inf)
    for name, (read, tolerance) in COMPARED.items():
        there = column(found, read)
        theirs = np.array([column(row, read) for row in in_process])
        low, high = theirs.min(axis=1), np.fmax(theirs.max(axis=1), still_counted if name != "batch cap" else -np.inf)
        print(name, *(f"{value:.0f} in {a:.0f}..{b:.0f}," for value, a, b in zip(there, low, high, strict=True)))
        off = np.maximum(low - there, there - high)
        assert np.flatnonzero(off > tolerance).tolist() == [], name
        assert (off <= 0).mean() >= 0.8, name
        agreed[name] = np.ptp(theirs, axis=1) == 0
    assert agreed["replicas"].mean() > 0.7  # where equality is exact
    assert len(set(replicas.tolist())) >= 4
    assert 4 <= replicas.max() < MOST

    # What was measured before the jump, when all has settled: the same, as far as samples a scrape apart can say.
    calm = slice(2, int(CALM_S / INTERVAL_S))
    for name in (*RATES, *LEVELS, *SHARES, *LENGTHS):
        want, got = (
            column(rows[calm], lambda decision, name=name: getattr(decision.snapshot, name)).mean()
            for rows in ([row[0] for row in in_process], found)
        )
        # A level is that of a moment, and requests are whole.
        assert got == pytest.approx(want, rel=0.1, abs=2.0 if name in LEVELS else 0.02), name
