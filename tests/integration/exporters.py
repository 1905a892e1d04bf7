"""Made-up targets for a real Prometheus: constant engines, and the simulated cluster in real time."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from live_fakes import LiveWorld

from autoscaler.actuators.base import FleetState
from autoscaler.hosting.config import LiveConfig
from autoscaler.hosting.service import LiveService
from envs.cluster.reading import Reading
from envs.traffic.trace import Trace
from policies.contract import TPOT_EDGES_S, TTFT_EDGES_S, Snapshot, Target
from policies.spec import ScalingSpec


class Exporter:
    """Serves what `text` says when it is asked.

    Args:
        text: an exposition in Prometheus's text format.
    """

    def __init__(self, text: Callable[[], str]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                with contextlib.suppress(OSError):  # a scraper that did not wait
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class ConstantEngine(Exporter):
    """An engine that exposes what it is told.

    Args:
        gauges: values by name; anything that can be printed.
        rates: counters by name, that grow by so much per second.
    """

    def __init__(self, gauges: dict[str, float | str], rates: dict[str, float]) -> None:
        self.gauges, self.rates = gauges, rates
        self.began_s = time.monotonic()
        self.sample_age_s: float | None = None
        super().__init__(self.exposition)

    def exposition(self) -> str:
        stamp = "" if self.sample_age_s is None else f" {int((time.time() - self.sample_age_s) * 1000)}"
        grown_s = time.monotonic() - self.began_s
        lines = [f"{name} {value}{stamp}" for name, value in self.gauges.items()]
        return "\n".join([*lines, *(f"{name} {rate * grown_s}{stamp}" for name, rate in self.rates.items())]) + "\n"


class ExportedWorld(LiveWorld):
    """The simulated cluster of one service with one pool in real time, under the metric names of vLLM and llm-d's EPP.

    Its clock follows the wall; whoever looks moves the cluster on to the present. Per replica it exports an equal share
    of the pool's running requests; what the cluster counts per service is exported once.
    """

    def __init__(self, specs: Sequence[ScalingSpec], traces: Sequence[Trace]) -> None:
        super().__init__(specs, traces)
        self._lock = threading.RLock()
        self._began_s, self._zero_s = time.time(), time.monotonic()
        self._ttft = np.zeros(len(TTFT_EDGES_S) + 1)
        self._tpot = np.zeros(len(TPOT_EDGES_S) + 1)

    # Clock

    @property
    def now_s(self) -> float:
        return self._began_s + time.monotonic() - self._zero_s

    def wait_until(self, time_s: float) -> None:
        time.sleep(max(time_s - self.now_s, 0.0))

    # Actuator

    def state(self) -> FleetState:
        with self._lock:
            self._move()
            return super().state()

    def apply(self, target: Target) -> None:
        with self._lock:
            self._move()
            super().apply(target)

    # Driving

    def service(self, config: LiveConfig) -> LiveService:
        """A live service that reads Prometheus and acts on this world, started."""
        made = LiveService(config, actuator=self, clock=self)
        made.start()
        return made

    # In process

    def reading(self) -> Reading:
        """Every counter and level of the cluster as they are now."""
        with self._lock:
            self._move()
            return self.cluster._latest

    def window(self, first: Reading, last: Reading) -> Snapshot:
        """What the cluster itself says of the window between two readings."""
        with self._lock:
            cluster = self.cluster
            latest, previous = cluster._latest, cluster._previous
            cluster._latest, cluster._previous, cluster._moved = last, first, None
            seen = cluster.read()
            cluster._latest, cluster._previous, cluster._moved = latest, previous, None
            return seen

    # Target of a scrape

    def exposition(self) -> str:
        with self._lock:
            self._move()
            seen = self.cluster.read()
            count = {
                name: float(self.cluster.counter(name)[0])
                for name in (
                    *("arrived", "prefill_tokens", "generated_tokens", "finished"),
                    *("finished_prompt_tokens", "finished_output_tokens"),
                )
            }
        replicas = int(seen.replicas_ready[0, 0] + seen.replicas_draining[0, 0])
        lines = []
        for name, values in (("num_requests_running", seen.running), ("num_requests_waiting", seen.waiting)):
            lines += [f'vllm:{name}{{pod="{place}"}} {values[0, 0] / max(replicas, 1)}' for place in range(replicas)]
        lines += [f'vllm:kv_cache_usage_perc{{pod="{place}"}} {seen.kv_cache_usage[0, 0]}' for place in range(replicas)]
        lines += [
            f"vllm:prompt_tokens_total {count['prefill_tokens']}",
            f"vllm:generation_tokens_total {count['generated_tokens']}",
            f"vllm:request_success_total {count['finished']}",
            f"vllm:request_prompt_tokens_sum {count['finished_prompt_tokens']}",
            f"vllm:request_generation_tokens_sum {count['finished_output_tokens']}",
            f"vllm:request_generation_tokens_count {count['finished']}",
            f'llm_d_epp_request_total{{model_name="chat"}} {count["arrived"]}',
            f'llm_d_epp_flow_control_queue_size{{model_name="chat"}} {seen.queue_requests[0]}',
            *_buckets("llm_d_epp_request_ttft_seconds", TTFT_EDGES_S, self._ttft),
            *_buckets("llm_d_epp_request_streaming_tpot_seconds", TPOT_EDGES_S, self._tpot),
        ]
        return "\n".join(lines) + "\n"

    def _move(self) -> None:
        """To the present; the histograms of the cluster are those of what it has just moved over."""
        self.cluster.wait_until(time.monotonic() - self._zero_s)
        seen = self.cluster.read()
        self._ttft += seen.ttft_histogram_rps[0] * seen.window_s[0]
        self._tpot += seen.tpot_histogram_rps[0] * seen.window_s[0]


def _buckets(name: str, edges: Sequence[float], counts: np.ndarray) -> list[str]:
    """A cumulative histogram of whole events."""
    totals = np.rint(np.cumsum(counts)).astype(int).tolist()
    texts = [*(f"{edge:g}" for edge in edges), "+Inf"]
    return [
        f'{name}_bucket{{model_name="chat",le="{edge}"}} {total}' for edge, total in zip(texts, totals, strict=True)
    ]
