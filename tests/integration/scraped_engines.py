"""Made-up engines with vLLM's names behind a real Prometheus, and a source that reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from exporters import ConstantEngine
from servers import Prometheus

from autoscaler.actuators.base import FleetState, pools_of
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

ENGINE = find_engine("llama-3.1-8b-h100", Path())
WINDOW_S = 3.0


def spec(service: str = "chat", ttft_s: float = 0.5) -> ScalingSpec:
    return ScalingSpec(
        service=service, slo=Slo(ttft_s=ttft_s, tpot_s=0.05), pools=(PoolSpec(engine=ENGINE, max_replicas=8),)
    )


def vllm(prefix: str = "vllm:", scale: float = 1.0, labels: str = "") -> ConstantEngine:
    """Five requests per second of 100 prompt and 20 output tokens; 80 % of first tokens within 0.5 s."""
    return together([part(prefix, scale, labels)])


def together(parts: Sequence[tuple[Mapping[str, float | str], Mapping[str, float]]]) -> ConstantEngine:
    """One target with the series of several parts."""
    gauges: dict[str, float | str] = {}
    rates: dict[str, float] = {}
    for some, more in parts:
        gauges |= some
        rates |= more
    return ConstantEngine(gauges, rates)


def part(
    prefix: str = "vllm:", scale: float = 1.0, labels: str = ""
) -> tuple[dict[str, float | str], dict[str, float]]:
    """Gauges, and counters per second, of an engine or one rank of it."""

    def named(metric: str, more: str = "") -> str:
        inside = ",".join(one for one in (labels, more) if one)
        return f"{prefix}{metric}" + (f"{{{inside}}}" if inside else "")

    gauges: dict[str, float | str] = {
        named("num_requests_running"): 6 * scale,
        named("num_requests_waiting"): 2 * scale,
        named("kv_cache_usage_perc"): 0.25,
    }
    rates = {
        named("prompt_tokens_total"): 500,
        named("prompt_tokens_cached_total"): 200,
        named("generation_tokens_total"): 100,
        named("request_success_total", 'finished_reason="length"'): 5,
        named("request_prompt_tokens_sum"): 500,
        named("request_generation_tokens_sum"): 100,
        named("request_generation_tokens_count"): 5,
        **{
            named("time_to_first_token_seconds_bucket", f'le="{edge}"'): rate
            for edge, rate in (("0.25", 2), ("0.5", 4), ("1.0", 5), ("+Inf", 5))
        },
        **{named("request_time_per_output_token_seconds_bucket", f'le="{edge}"'): 5 for edge in ("0.05", "+Inf")},
    }
    return gauges, {name: rate * scale for name, rate in rates.items()}


def scrape(
    prometheus: Prometheus, groups: Sequence[tuple[ConstantEngine, Mapping[str, str]]], wait_s: float = WINDOW_S + 0.7
) -> None:
    """Scrape made-up engines until the window is full."""
    prometheus.scrape([(exporter.address, labels) for exporter, labels in groups])
    prometheus.wait_scraped([exporter.address for exporter, _ in groups])
    time.sleep(wait_s)


def state_of(
    specs: Sequence[ScalingSpec], ready: int | Sequence[int] = 1, starting: int = 0
) -> Callable[[], FleetState]:
    def state() -> FleetState:
        known = np.broadcast_to(np.asarray(ready, np.float64).reshape(-1, 1), (len(specs), 1))
        none = np.zeros((len(specs), 1))
        return replace(
            FleetState.unknown(pools_of(specs)),
            replicas_target=known + starting,
            replicas_ready=known,
            replicas_starting=none + starting,
            replicas_draining=none,
            batch_cap=none + 64,
        )

    return state


def source(
    url: str, specs: Sequence[ScalingSpec], ready: int | Sequence[int] = 1, starting: int = 0, **options: object
) -> PrometheusSource:
    config = PrometheusConfig.model_validate({"url": url, "window_s": WINDOW_S, **options})
    return PrometheusSource(config, specs, state_of(specs, ready, starting))


def near(values: np.ndarray, *wanted: float) -> bool:
    """Within 20 %: a scrape that waits 0.4 s for a busy machine moves the rate of a window of 3 s by 13 %."""
    return values.tolist() == pytest.approx(list(wanted), rel=0.2, nan_ok=True)
