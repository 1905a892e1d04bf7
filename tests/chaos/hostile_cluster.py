"""The simulated cluster, scraped by a Prometheus in this process, with the faults that live outside a controller.

This module must not know when a fault begins, nor what must hold.
"""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from live_fakes import LiveWorld

from autoscaler.actuators.base import FleetState, PartlyFailed
from envs.cluster.state import DRAINING, READY, RECLAIMED, STAGE_WARMUP, STARTING
from envs.traffic.trace import Trace
from policies.contract import LEAVE_ALONE, TPOT_EDGES_S, TTFT_EDGES_S, Target
from policies.spec import ScalingSpec
from tests.chaos.fake_prometheus import FakePrometheus
from tests.chaos.invariants import Write

SCRAPE_S = 5.0
REPLICA_COUNTERS = {
    "vllm:prompt_tokens_total": "prefill_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
    "vllm:request_success_total": "finished",
    "vllm:request_prompt_tokens_sum": "finished_prompt_tokens",
    "vllm:request_generation_tokens_sum": "finished_output_tokens",
    "vllm:request_generation_tokens_count": "finished",
}
COUNTERS = {**REPLICA_COUNTERS, "arrived": "arrived"}
ODD = (-5.0, float("nan"), 1e12, float("inf"))
"""Numbers of running requests that no engine can have."""


def traffic(seed: int, duration_s: float) -> Trace:
    """Stretches of five to thirty minutes at rates from nothing to a burst."""
    rng = np.random.default_rng(seed)
    times, at_s = [], 0.0
    while at_s < duration_s:
        length_s = rng.uniform(300.0, 1800.0)
        rps = float(rng.choice([0.0, 0.5, 2.0, 5.0, 10.0, 20.0], p=[0.05, 0.15, 0.3, 0.25, 0.2, 0.05]))
        times.append(at_s + rng.uniform(0.0, length_s, rng.poisson(rps * length_s)))
        at_s += length_s
    arrivals = np.sort(np.concatenate(times))
    arrivals = arrivals[arrivals < duration_s]
    return Trace.from_arrays(
        arrival_s=arrivals,
        prompt_tokens=rng.integers(50, 2000, len(arrivals)),
        output_tokens=rng.integers(10, 300, len(arrivals)),
        duration_s=duration_s,
    )


class HostileCluster(LiveWorld):
    """The simulated cluster, scraped by a Prometheus of its own, with the faults that live outside the controller."""

    def __init__(self, specs: tuple[ScalingSpec, ...], traces: list[Trace], database: Path) -> None:
        super().__init__(specs, traces)
        self.database = database
        self.prometheus = FakePrometheus(lambda: self.now_s)
        self.gap = False  # whether Prometheus scrapes nothing
        self.missing: dict[int, float] = {}  # share of a service's replicas that is not scraped
        self.twice: dict[int, float] = {}  # share that is scraped twice
        self.no_latency: set[int] = set()
        self.implausible: dict[int, float] = {}
        self.uncounted: set[int] = set()
        self.unreadable = ""  # why the API server does not answer
        self.cut: set[int] = set()
        self.refused_rows: set[int] = set()
        self.slow_read_s = 0.0
        self.writes: dict[int, list[Write]] = {}
        n = len(self.specs)
        self._counted = {name: np.zeros(n) for name in COUNTERS}  # as of the last scrape
        self._replicas: list[dict[str, dict[str, float]]] = [{} for _ in range(n)]  # counters by replica
        self._ttft = np.zeros((n, len(TTFT_EDGES_S) + 1))
        self._tpot = np.zeros((n, len(TPOT_EDGES_S) + 1))

    def counts(self) -> Any:
        """(n,) replicas asked for."""
        pool = self.cluster.arrays.pool.reshape(len(self.cluster), self.cluster.arrays.pools)
        return pool["replicas_target"].sum(axis=1).astype(int)

    # Clock and scrapes

    def wait_until(self, time_s: float) -> None:
        while self.now_s < time_s - 1e-6:
            super().wait_until(min(time_s, self.now_s + SCRAPE_S))
            self._scrape()

    def _scrape(self) -> None:
        """One scrape of every replica and of each service's gateway."""
        seen, arrays = self.cluster.read(), self.cluster.arrays
        self._ttft += seen.ttft_histogram_rps * seen.window_s[:, np.newaxis]
        self._tpot += seen.tpot_histogram_rps * seen.window_s[:, np.newaxis]
        now = {name: self.cluster.counter(column).copy() for name, column in COUNTERS.items()}
        grown = {name: now[name] - self._counted[name] for name in COUNTERS}
        self._counted = now
        targets: dict[tuple[str, str], tuple[dict[str, str], list[Any]]] = {}
        for row, spec in enumerate(self.specs):
            places = range(row * arrays.rows, (row + 1) * arrays.rows)
            live = [g for g in places if arrays.status[g] in (READY, DRAINING, RECLAIMED)]
            names = {f"{spec.service}-{g}-{arrays.replica['ready_at_s'][g]:.0f}": g for g in live}
            counters = self._replicas[row] = {
                name: self._replicas[row].get(name, dict.fromkeys(REPLICA_COUNTERS, 0.0)) for name in names
            }
            odd = self.implausible.get(row)
            for place, (name, g) in enumerate(names.items()):
                for counter in REPLICA_COUNTERS:
                    counters[name][counter] += grown[counter][row] / len(names)
                running = seen.running[row, 0] / len(names) if odd is None else ODD[int(odd * len(ODD))]
                exposed: list[Any] = [
                    ("vllm:num_requests_running", {}, running),
                    ("vllm:num_requests_waiting", {}, seen.waiting[row, 0] / len(names)),
                    ("vllm:kv_cache_usage_perc", {}, seen.kv_cache_usage[row, 0] * (1.0 if odd is None else 100.0)),
                    *((counter, {}, value) for counter, value in counters[name].items()),
                ]
                labels = {"service": spec.service, "pod": name}
                at = f"10.0.{row}.{g - places[0]}:8000"
                if place >= self.missing.get(row, 0.0) * len(names):
                    targets["engines", at] = (labels, exposed)
                if place < self.twice.get(row, 0.0) * len(names):
                    targets["again", at] = (labels, exposed)
            model = {"model_name": spec.service}
            gateway = [
                ("llm_d_epp_request_total", model, now["arrived"][row]),
                ("llm_d_epp_flow_control_queue_size", model, seen.queue_requests[row]),
            ]
            if row not in self.no_latency:
                gateway += buckets("llm_d_epp_request_ttft_seconds_bucket", model, TTFT_EDGES_S, self._ttft[row])
                gateway += buckets(
                    "llm_d_epp_request_streaming_tpot_seconds_bucket", model, TPOT_EDGES_S, self._tpot[row]
                )
            if self.missing.get(row, 0.0) < 1.0:
                targets["gateway", f"10.1.{row}.1:9090"] = ({}, gateway)
        if not self.gap:
            self.prometheus.scrape(targets)
            self.prometheus.forget(self.prometheus.time_s - 1200.0)

    # Actuator

    def state(self) -> FleetState:
        if self.slow_read_s:
            late_s, self.slow_read_s = self.slow_read_s, 0.0
            self.wait_until(self.now_s + late_s)
        state = super().state()
        problems: tuple[str, ...] = ()
        if self.owners_unread:
            problems = ("HPAs: HTTP 500",)
        lost = list(range(len(self.specs)) if self.unreadable else self.uncounted)
        for values in (state.replicas_target, state.replicas_starting, state.replicas_ready, state.replicas_draining):
            values[lost] = np.nan
        problems += tuple(f"{self.specs[row].service}: {self.unreadable or 'not found'}" for row in lost)
        unread = tuple(lost) if self.unreadable else state.owners_unread
        return replace(state, problems=problems, owners_unread=unread)

    def apply(self, target: Target) -> None:
        before = self.counts()
        allowed, failures = target.replicas.copy(), {}
        for row, spec in enumerate(self.specs):
            if allowed[row, 0] == LEAVE_ALONE:
                continue
            if self.unreadable or row in self.refused_rows:
                allowed[row] = LEAVE_ALONE
                failures[spec.service] = self.unreadable or "refused"
            elif row in self.cut:
                failures[spec.service] = "connection cut"
            if allowed[row, 0] not in (LEAVE_ALONE, before[row]):
                count = int(allowed[row].sum())
                write = Write(int(before[row]), count, self._recorded(spec.service, count))
                self.writes.setdefault(row, []).append(write)
        self.before_apply()
        self.set(allowed, target.batch_cap)
        self.after_apply()
        if failures:
            raise PartlyFailed(failures)

    def _recorded(self, service: str, replicas: int) -> bool:
        """Whether the newest decision in the database is this one, not carried out yet."""
        query = "SELECT outcome, replicas_after FROM decisions WHERE service = ? ORDER BY tick DESC LIMIT 1"
        with suppress(sqlite3.Error):
            connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=0.01)
            try:
                return connection.execute(query, (service,)).fetchone() == ("pending", replicas)
            finally:
                connection.close()
        return False

    # What happens to replicas

    def lose(self, row: int, share: float) -> None:
        """A share of the replicas is gone at once; the cluster starts others in their place."""
        arrays = self.cluster.arrays
        pool = arrays.pool[row * arrays.pools]
        rng, at_s = np.random.default_rng(int(self.now_s)), self.cluster.now_s
        first = row * arrays.rows + int(pool["first_replica"])
        ready = [g for g in range(first, first + int(pool["replica_rows"])) if arrays.status[g] == READY]
        for place in rng.permutation(ready)[: int(np.ceil(share * len(ready)))]:
            arrays.replica["reclaim_s"][place] = at_s
        arrays.service["next_event_s"][row] = at_s

    def stall(self, row: int, stalled: bool) -> None:
        """What starts does not get ready until the end of the stall."""
        arrays = self.cluster.arrays
        pool = arrays.pool[row * arrays.pools : row * arrays.pools + 1]
        pool["warmup_s"] = 1e7 if stalled else self.specs[row].pools[0].start.warmup_s  # its node is there, and paid
        if not stalled:
            for g in range(row * arrays.rows, (row + 1) * arrays.rows):
                replica = arrays.replica[g : g + 1]
                if arrays.status[g] == STARTING:
                    replica["warmup_s"] = np.minimum(replica["warmup_s"], 5.0)
                    if replica["stage"] == STAGE_WARMUP:
                        replica["stage_end_s"] = np.minimum(replica["stage_end_s"], self.cluster.now_s + 5.0)
            arrays.service["next_event_s"][row] = self.cluster.now_s


def buckets(name: str, labels: dict[str, str], edges: tuple[float, ...], counts: Any) -> list[Any]:
    """A cumulative histogram."""
    totals = np.rint(np.cumsum(counts)).tolist()
    texts = [*(f"{edge:g}" for edge in edges), "+Inf"]
    return [(name, {**labels, "le": edge}, total) for edge, total in zip(texts, totals, strict=True)]
