"""Figures of the live controller: what a tick costs beside its queries, what a service costs in memory, and a takeover.

Snapshots come from a small simulated cluster, repeated; nothing answers on a network. CPU seconds of this thread count.
"""

from __future__ import annotations

import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.actuators.base import Access, FleetState
from autoscaler.authority.controls import Mode
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.queries import build_queries
from envs.cluster.simulation import SimulatedCluster
from envs.traffic.trace import Trace
from policies.contract import Snapshot, Target, take_rows
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine, shipped_configs

WIDTHS = (1, 100, 1000, 10_000)
WORLDS = 32
TICKS = {1: 300, 100: 200, 1000: 60, 10_000: 12}


class Still:
    """A source that repeats one snapshot with a moving time, and an actuator that does nothing."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.tick = 0
        self.watch: Any = None

    def read(self) -> Snapshot:
        self.tick += 1
        self.watch()
        values = {name: getattr(self.snapshot, name) for name in Snapshot.__dataclass_fields__}
        return Snapshot(**{**values, "time_s": self.snapshot.time_s + 15.0 * self.tick})

    def apply(self, target: Target) -> None:
        """Nothing to do."""

    def state(self) -> FleetState:
        seen = self.snapshot
        n = len(seen)
        counts = (seen.replicas_target, seen.replicas_starting, seen.replicas_ready, seen.replicas_draining)
        return FleetState(*counts, seen.batch_cap, ("",) * n)

    def check(self) -> list[Access]:
        return []

    def close(self) -> None:
        """Nothing to release."""


def spec(name: str) -> ScalingSpec:
    engine = find_engine("llama-3.1-8b-h100", shipped_configs())
    pools = (PoolSpec(engine=engine, max_replicas=8),)
    return ScalingSpec(service=name, slo=Slo(ttft_s=2.0, tpot_s=0.05), pools=pools)


def snapshots() -> Snapshot:
    """Of 32 worlds after a minute of traffic."""
    rng = np.random.default_rng(0)
    trace = Trace.from_arrays(
        arrival_s=np.cumsum(rng.exponential(0.5, 600)),
        prompt_tokens=rng.integers(100, 2000, 600),
        output_tokens=rng.integers(10, 400, 600),
        name="benchmark",
    )
    cluster = SimulatedCluster.replay([spec("s")] * WORLDS, [trace] * WORLDS, range(WORLDS))
    cluster.wait_until(60.0)
    return cluster.read()


def live(n: int, folder: Path, seen: Snapshot, *peers: str) -> LiveService:
    """A service of `n` services in act mode with the shipped policy."""
    config = LiveConfig.model_validate(
        {
            "services": [spec(f"s{row}") for row in range(n)],
            "metrics": PrometheusConfig(url="http://127.0.0.1:9"),
            "actuator": {"kind": "metric_only"},
            "mode": Mode.ACT,
            "counterfactuals": peers,
            "kill_file": folder / "STOP",
            "policy": {"cache": folder / "policies"},
            "records": {"url": f"sqlite:///{folder / f'{n}.db'}"},
            "exposition": {"port": None},
        }
    )
    still = Still(take_rows(seen, np.arange(n) % WORLDS))
    made = LiveService(config, source=still, actuator=still)
    made.controller.stages.limits_s.clear()  # in this thread, so that its CPU time counts
    still.watch = made.state
    made.start()
    return made


def tick_ms(service: LiveService, ticks: int) -> dict[str, tuple[float, float]]:
    """CPU milliseconds, median and 99th percentile, of the decision and of the whole tick."""
    service.step()
    spent: dict[str, list[float]] = {"decide": [], "tick": []}
    decide = service.controller._decide

    def timed(snapshot: Snapshot) -> Any:
        began_s = time.thread_time()
        try:
            return decide(snapshot)
        finally:
            spent["decide"].append(time.thread_time() - began_s)

    service.controller._decide = timed  # type: ignore[method-assign]
    for _ in range(ticks):
        began_s = time.thread_time()
        service.step()
        spent["tick"].append(time.thread_time() - began_s)
    return {
        name: (float(np.quantile(values, 0.5)) * 1e3, float(np.quantile(values, 0.99)) * 1e3)
        for name, values in spent.items()
    }


def memory_kib(folder: Path, seen: Snapshot) -> float:
    """KiB that one more service takes, of 1,000."""
    tracemalloc.start()
    service = live(1000, folder, seen)
    service.step()
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    service.close()
    return taken / 1000 / 1024


def takeover_ms(folder: Path, seen: Snapshot, n: int) -> float:
    """Milliseconds that a standby takes for its first tick once the leases are free: leases, memory, decisions."""
    first, second = live(n, folder, seen), live(n, folder, seen)
    first.step()
    first.heartbeat.stop(release=True)
    began_s = time.perf_counter()
    second.heartbeat.beat()
    second.step()
    taken_s = time.perf_counter() - began_s
    second.close()
    return taken_s * 1e3


def figures() -> Iterator[tuple[str, float, str]]:
    """All of them, as they are measured."""
    seen = snapshots()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in WIDTHS:
            service = live(n, folder, seen)
            for what, (p50, p99) in tick_ms(service, TICKS[n]).items():
                yield f"live_{what}_p50_ms_n{n}", p50, "CPU-ms"
                yield f"live_{what}_p99_ms_n{n}", p99, "CPU-ms"
            service.close()
        peers = live(1000, folder / "peers", seen, "token-demand", "hpa")
        yield "live_decide_p50_ms_n1000_two_peers", tick_ms(peers, 30)["decide"][0], "CPU-ms"
        peers.close()
        config = PrometheusConfig(url="http://127.0.0.1:9", gateway="haproxy", replicas="kube-state-metrics")
        for n in (1, 1000):
            queries = build_queries(config, [spec(f"s{row}") for row in range(n)])
            yield f"live_queries_per_tick_n{n}", float(len(queries)), "queries"
        yield "live_memory_per_service", memory_kib(folder / "memory", seen), "KiB"
        yield "live_takeover_n1000", takeover_ms(folder / "takeover", seen, 1000), "ms"
