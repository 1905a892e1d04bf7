"""The metric names of SGLang, TGI and TensorRT-LLM through a real Prometheus: a green check, right snapshots.

The names, types and labels are those of the engines' own sources; the values are made up. One engine of each at five
requests per second of 100 prompt and 20 output tokens, 80 % of first tokens within a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters import ConstantEngine
from servers import Guard, Prometheus, start

from autoscaler.actuators.base import FleetState
from autoscaler.check import check_metrics
from autoscaler.metrics.client import PrometheusConfig
from autoscaler.metrics.prometheus import PrometheusSource
from policies.contract import MetricsUnavailable
from policies.spec import PoolSpec, ScalingSpec, Slo, find_engine

WINDOW_S = 6.0
MODEL = 'model_name="m"'
SPEC = ScalingSpec(
    service="chat",
    slo=Slo(ttft_s=1.0, tpot_s=0.1),
    pools=(PoolSpec(engine=find_engine("llama-3.1-8b-h100", Path()), max_replicas=8),),
)


def histogram(name: str, shares: dict[str, float], labels: str) -> dict[str, float]:
    """Five events per second, cumulative shares by edge."""
    return {f'{name}_bucket{{{labels},le="{edge}"}}': 5 * share for edge, share in {**shares, "+Inf": 1.0}.items()}


def sglang() -> ConstantEngine:
    labels = f'{MODEL},engine_type="unified",tp_rank="0",pp_rank="0"'
    return ConstantEngine(
        {
            f"sglang:num_running_reqs{{{labels}}}": 6,
            f"sglang:num_queue_reqs{{{labels}}}": 2,
            f"sglang:token_usage{{{labels}}}": 0.25,
        },
        {
            f"sglang:prompt_tokens_total{{{MODEL}}}": 500,
            f'sglang:cached_tokens_total{{{MODEL},cache_source="device"}}': 200,
            f"sglang:generation_tokens_total{{{MODEL}}}": 100,
            f"sglang:num_requests_total{{{MODEL}}}": 5,
            f"sglang:prompt_tokens_histogram_sum{{{MODEL}}}": 500,
            f"sglang:generation_tokens_histogram_sum{{{MODEL}}}": 100,
            f"sglang:generation_tokens_histogram_count{{{MODEL}}}": 5,
            **histogram("sglang:time_to_first_token_seconds", {"0.4": 0.5, "1.0": 0.8, "2.0": 1.0}, MODEL),
            **histogram("sglang:inter_token_latency_seconds", {"0.1": 1.0}, MODEL),
        },
    )


def tgi() -> ConstantEngine:
    return ConstantEngine(
        {"tgi_batch_current_size": 6, "tgi_queue_size": 2},
        {
            "tgi_request_input_length_sum": 500,
            "tgi_request_generated_tokens_sum": 100,
            "tgi_request_generated_tokens_count": 5,
            'tgi_request_success{method="single"}': 5,
            **histogram("tgi_request_mean_time_per_token_duration", {"0.1": 1.0}, 'method="single"'),
        },
    )


def tensorrt() -> ConstantEngine:
    labels = f'{MODEL},engine_type="trtllm"'
    return ConstantEngine(
        {
            f"trtllm_num_requests_running{{{labels}}}": 6,
            f"trtllm_num_requests_waiting{{{labels}}}": 2,
            f"trtllm_kv_cache_utilization{{{labels}}}": 0.25,
        },
        {
            f"trtllm_prompt_tokens_total{{{labels}}}": 500,
            f"trtllm_generation_tokens_total{{{labels}}}": 100,
            f'trtllm_request_success_total{{{labels},finished_reason="stop"}}': 5,
            **histogram("trtllm_time_to_first_token_seconds", {"0.5": 0.5, "1.0": 0.8, "2.5": 1.0}, labels),
            **histogram("trtllm_time_per_output_token_seconds", {"0.1": 1.0}, labels),
        },
    )


def triton() -> ConstantEngine:
    """TensorRT-LLM behind Triton: what runs and waits, and memory."""
    labels = 'model="tensorrt_llm",version="1"'
    return ConstantEngine(
        {
            f'nv_trt_llm_request_metrics{{{labels},request_type="scheduled"}}': 6,
            f'nv_trt_llm_request_metrics{{{labels},request_type="waiting"}}': 2,
            f'nv_trt_llm_kv_cache_block_metrics{{{labels},kv_cache_block_type="fraction"}}': 0.25,
        },
        {},
    )


def picker() -> ConstantEngine:
    """llm-d's endpoint picker in front of engines that do not measure their latencies."""
    labels = 'model_name="chat",target_model_name="m"'
    return ConstantEngine(
        {f"llm_d_epp_flow_control_queue_size{{{labels}}}": 3},
        {
            f"llm_d_epp_request_total{{{labels}}}": 5,
            **histogram("llm_d_epp_request_ttft_seconds", {"1": 0.8, "2": 1.0}, labels),
            **histogram("llm_d_epp_request_streaming_tpot_seconds", {"0.1": 1.0}, labels),
        },
    )


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5)
    yield server
    server.stop()


def source(config: PrometheusConfig) -> PrometheusSource:
    one, none = np.ones((1, 1)), np.zeros((1, 1))
    return PrometheusSource(config, [SPEC], lambda: FleetState(one, none, one, none, 16 * one, ("",)))


ALL = {
    "running": 6.0,
    "waiting": 2.0,
    "kv_cache_usage": 0.25,
    "generation_tps": 100.0,
    "prefill_tps": 500.0,
    "finished_rps": 5.0,
    "arrival_rps": 5.0,
    "prompt_tps": 500.0,
    "prompt_tokens_mean": 100.0,
    "output_tokens_mean": 20.0,
    "ttft_attainment": 0.8,
    "tpot_attainment": 1.0,
    "queue_requests": 0.0,
}
GATEWAY = {"queue_requests": 3.0}
UNMEASURED = ("generation_tps", "prefill_tps", "finished_rps", "prompt_tps", "prompt_tokens_mean", "output_tokens_mean")
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, float]]] = {
    "sglang": (sglang, {"engines": ["sglang"]}, {"prefill_tps": 300.0}),
    "tgi": (tgi, {"engines": ["tgi"], "gateway": "llm-d-epp"}, {"kv_cache_usage": math.nan, **GATEWAY}),
    "tensorrt-llm": (tensorrt, {"engines": ["tensorrt-llm"]}, {}),
    "tensorrt-llm behind triton": (
        triton,
        {"engines": ["tensorrt-llm"], "gateway": "llm-d-epp"},
        {**dict.fromkeys(UNMEASURED, math.nan), **GATEWAY},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_engines_names_give_a_green_check_and_a_right_snapshot(prometheus: Prometheus, name: str) -> None:
    make, options, differs = CASES[name]
    engines = [make(), picker()] if "gateway" in options else [make()]
    try:
        prometheus.scrape([(engines[0].address, {"service": "chat"}), *((one.address, {}) for one in engines[1:])])
        prometheus.wait_scraped([one.address for one in engines])
        time.sleep(WINDOW_S + 1.0)
        config = PrometheusConfig.model_validate({"url": prometheus.url, "window_s": WINDOW_S, **options})
        lines = check_metrics(config, [SPEC])
        assert [line for line in lines if not line.ok] == []
        snapshot = source(config).read()
    finally:
        for one in engines:
            one.stop()
    found = {field: float(getattr(snapshot, field).ravel()[0]) for field in ALL}
    assert found == pytest.approx({**ALL, **differs}, rel=0.1, nan_ok=True)
    assert not snapshot.blind()[0]


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[tuple[Prometheus, Guard]]:
    guard = start(Guard, tmp_path / "guard")
    server = start(Prometheus, tmp_path / "prometheus", scrape_s=0.5, guard=guard)
    yield server, guard
    server.stop()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_authority_of_ones_own_and_a_password(
    guarded: tuple[Prometheus, Guard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prometheus, guard = guarded
    engine = sglang()
    prometheus.scrape([(engine.address, {"service": "chat"})])
    prometheus.wait_scraped([engine.address])
    time.sleep(WINDOW_S + 1.0)
    password = tmp_path / "password"
    password.write_text(f"{guard.PASSWORD}\n")
    monkeypatch.setenv("PROMETHEUS_PASSWORD", guard.PASSWORD)

    def config(**auth: object) -> PrometheusConfig:
        options = {"url": prometheus.url, "engines": ["sglang"], "window_s": WINDOW_S, "attempts": 1, "auth": auth}
        return PrometheusConfig.model_validate(options)

    login = {"username": guard.USER, "password_file": password}
    for good in (
        config(ca_file=guard.ca, **login),
        config(ca_file=guard.ca, username=guard.USER, password_env="PROMETHEUS_PASSWORD"),
        config(verify_tls=False, **login),
    ):
        assert [line for line in check_metrics(good, [SPEC]) if not line.ok] == []
        assert source(good).read().running[0, 0] == 6.0
    with pytest.raises(MetricsUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        source(config(**login)).read()
    with pytest.raises(MetricsUnavailable, match="401"):
        source(config(ca_file=guard.ca)).read()
    password.write_text("wrong")
    with pytest.raises(MetricsUnavailable, match="401"):
        source(config(ca_file=guard.ca, **login)).read()
    wrong = check_metrics(config(**login), [SPEC])
    assert [(line.subject, line.ok) for line in wrong] == [(f"Prometheus {prometheus.url}", False)]
    engine.stop()
