"""Speed of the metrics side: queries per tick and the making of a snapshot, without a server.

Answers are what Prometheus would send for fleets of emulated services; network and JSON are left out of the CPU figure
by asking nothing, and counted in where it says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from autoscaler.metrics.queries import Query
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

SERVICES = (1, 100, 1000)
EDGES = ("0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "20.0", "+Inf")
REPLICAS = 4
REPEATS = 5


class Answers:
    """Answers queries from memory, in JSON as a server would."""

    def __init__(self, queries: list[Query], services: int) -> None:
        self.texts = {query.text: json.dumps(_rows(query, services)) for query in queries}

    def log_in(self) -> None:
        """Nothing to do."""

    def ask(self, text: str, until_s: float | None = None) -> list[dict[str, Any]]:
        """Parse the answer."""
        rows: list[dict[str, Any]] = json.loads(self.texts[text])
        return rows


def figures() -> Iterator[tuple[str, float, str]]:
    """Every figure as name, value, unit."""
    engine = find_engine("llama-3.1-8b-h100", Path())
    for services in SERVICES:
        slo = Slo(ttft_s=0.5, tpot_s=0.05)
        pools = (PoolSpec(engine=engine, max_replicas=8),)
        specs = [ScalingSpec(service=f"s{number}", slo=slo, pools=pools) for number in range(services)]
        for histograms in (True, False):
            config = PrometheusConfig(url="http://localhost:9090", gateway="haproxy", histograms=histograms)
            source = PrometheusSource(config, specs, partial(FleetState.unknown, pools_of(specs)))
            source._signals.client = Answers(source._signals.queries, services)  # type: ignore[assignment]
            kind = "" if histograms else "_slo_edges_only"
            if services == 1 and histograms:
                yield "prometheus_queries_per_tick_haproxy", float(len(source._signals.queries)), "queries"
            best = min(_cpu_s(source) for _ in range(REPEATS))
            yield f"snapshot_ms_n{services}{kind}", best * 1e3, "CPU ms"


def _cpu_s(source: PrometheusSource) -> float:
    started = time.process_time()
    source.read()
    return time.process_time() - started


def _rows(query: Query, services: int) -> list[dict[str, Any]]:
    now_s = 1.8e9
    edges: tuple[str, ...] = EDGES if query.signal.endswith("_bucket") else ("",)
    value = {"sample_time": str(now_s), "seen": "3"}.get(query.signal, "1.5")
    more: list[dict[str, str]] = [{"le": edge} if edge else {} for edge in edges]
    if query.signal in ("seen", "sample_time"):
        more = [{"instance": f"10.0.0.{replica}:8000", "job": "engines"} for replica in range(REPLICAS)]
    return [
        {"metric": {query.label: f"s{number}", **labels}, "value": [now_s, value]}
        for number in range(services)
        for labels in more
    ]
