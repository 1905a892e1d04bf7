"""What one reading of many targets costs a real Prometheus, beside one that asks for no counter's birth.

A small HTTP server in this process plays 300 replicas of vLLM in 20 services, with the series that are read. CPU time
is that of the Prometheus process; the ratio, measured in one run, says what it costs to see the first requests of a
series that was not there before.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from autoscaler.emulation.engine import TPOT_BUCKETS, TTFT_BUCKETS
from autoscaler.metrics import promql
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

TARGETS, SERVICES, READINGS = 300, 20, 6
SCRAPE_S, WINDOW_S = 5.0, 15.0
HISTOGRAMS = {
    "time_to_first_token_seconds": TTFT_BUCKETS,
    "request_time_per_output_token_seconds": TPOT_BUCKETS,
    "inter_token_latency_seconds": TPOT_BUCKETS,
}
GAUGES = {"num_requests_running": 5.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.4}
RATES = {
    "prompt_tokens_total": 1000.0,
    "generation_tokens_total": 200.0,
    "prompt_tokens_cached_total": 100.0,
    "request_prompt_tokens_sum": 1000.0,
    "request_generation_tokens_sum": 200.0,
    "request_generation_tokens_count": 1.0,
    **{f'request_success_total{{finished_reason="{reason}"}}': 0.25 for reason in ("stop", "length", "abort", "error")},
    **{f'{name}_bucket{{le="{edge}"}}': 1.0 for name, edges in HISTOGRAMS.items() for edge in (*edges, "+Inf")},
}


class Replicas(ThreadingHTTPServer):
    """Every address of the loopback network is another replica, and all of them say the same."""

    daemon_threads = True
    request_queue_size = TARGETS

    def __init__(self) -> None:
        began_s = time.monotonic()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                grown_s = time.monotonic() - began_s
                values = GAUGES | {name: rate * grown_s for name, rate in RATES.items()}
                body = "".join(f"vllm:{name} {value}\n" for name, value in values.items()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("0.0.0.0", 0), Handler)
        self.addresses = [f"127.0.{row // 250}.{row % 250 + 1}:{self.server_port}" for row in range(TARGETS)]
        threading.Thread(target=self.serve_forever, daemon=True).start()


def cpu_ms(pid: int) -> float:
    """CPU time that a process has used, milliseconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reading_ms(prometheus: Any, specs: list[ScalingSpec]) -> float:
    """CPU milliseconds of Prometheus for one reading, the least of several: it scrapes meanwhile."""
    source = PrometheusSource(
        PrometheusConfig(url=prometheus.url, window_s=WINDOW_S, timeout_s=60.0, deadline_s=60.0), specs
    )
    spent = []
    for _ in range(READINGS):
        before_ms = cpu_ms(prometheus.process.pid)
        snapshot = source.read()
        spent.append(cpu_ms(prometheus.process.pid) - before_ms)
        assert (snapshot.generation_tps > 0).all(), source.problems
    source.close()
    return min(spent)


def figures() -> Iterator[tuple[str, float, str]]:
    """All of them, as they are measured; none where Prometheus is not installed."""
    sys.path.append(str(Path(__file__).parents[1] / "integration"))  # servers that other folders of tests own
    from servers import Missing, Prometheus  # type: ignore[import-not-found]

    pool = PoolSpec(engine=find_engine("llama-3.1-8b-h100", Path()), max_replicas=50)
    slo = Slo(ttft_s=0.5, tpot_s=0.05)
    specs = [ScalingSpec(service=f"s{row:02d}", slo=slo, pools=(pool,)) for row in range(SERVICES)]
    with tempfile.TemporaryDirectory() as folder:
        try:
            prometheus = Prometheus(Path(folder) / "prometheus", scrape_s=SCRAPE_S)
        except Missing as missing:
            print(f"prometheus_reading: {missing}", file=sys.stderr)
            return
        replicas = Replicas()
        try:
            targets = [(at, {"service": f"s{row % SERVICES:02d}"}) for row, at in enumerate(replicas.addresses)]
            prometheus.scrape(targets)
            prometheus.wait_scraped(replicas.addresses)
            time.sleep(WINDOW_S + 3 * SCRAPE_S)
            whole_ms = reading_ms(prometheus, specs)
            with mock.patch.object(promql, "_counted", lambda series, _, window_s: promql._rates(series, window_s)):
                rates_ms = reading_ms(prometheus, specs)
        finally:
            replicas.shutdown()
            replicas.server_close()
            prometheus.stop()
    yield f"prometheus_reading_{TARGETS}_targets", whole_ms, "CPU-ms of Prometheus"
    yield f"prometheus_reading_{TARGETS}_targets_births", whole_ms / rates_ms, "ratio to rates alone"
