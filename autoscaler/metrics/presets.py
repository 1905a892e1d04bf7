"""Which metric of which server says what: one table, from signal to metric names and how they add up.

A metric name that does not exist is no error to Prometheus: the query answers nothing. Names therefore live in one
table with their older spellings, the rendered queries have goldens, and `jevons check` asks the live server for each.
This module must not know PromQL, nor how queries are sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Series = Literal["last", "average", "rate", "bucket_rate"]
Combine = Literal["sum", "avg", "max"]


@dataclass(frozen=True)
class Signal:
    """One quantity that a snapshot needs, and how series become one number for a service.

    A *target* is what Prometheus scrapes: one replica of an engine, one instance of a gateway. It may have several
    series of a metric, one for each of its *ranks* (data-parallel engines, processes, workers, served models).

    Attributes:
        series: what is made of one series over the window: its last sample, the mean of its samples, or its rate.
        ranks: how the ranks of a target become the target's number.
        targets: how targets become the service's number.
        per_pool: whether it is kept apart by pool.
        needed: whether a service can't be scaled safely without it.
        meaning: in words, for `jevons check`.
    """

    series: Series
    ranks: Combine
    targets: Combine
    per_pool: bool
    needed: bool
    meaning: str


SIGNALS: dict[str, Signal] = {
    "running": Signal("last", "sum", "sum", True, True, "requests in the engines' batches"),
    "waiting": Signal("last", "sum", "sum", True, False, "requests queued inside the engines"),
    "kv_cache_usage": Signal("last", "avg", "avg", True, False, "share of KV blocks in use"),
    "generation": Signal("rate", "sum", "sum", False, True, "tokens generated per second"),
    "prompt": Signal("rate", "sum", "sum", False, False, "prompt tokens processed per second, cache hits included"),
    "cached": Signal("rate", "sum", "sum", False, False, "prompt tokens taken from the prefix cache per second"),
    "finished": Signal("rate", "sum", "sum", False, False, "requests finished per second"),
    "prompt_sum": Signal("rate", "sum", "sum", False, False, "prompt tokens of finished requests per second"),
    "output_sum": Signal("rate", "sum", "sum", False, False, "output tokens of finished requests per second"),
    "length_count": Signal("rate", "sum", "sum", False, False, "finished requests with counted lengths, per second"),
    "ttft_bucket": Signal("bucket_rate", "sum", "sum", False, False, "first tokens per second by TTFT"),
    "tpot_bucket": Signal("bucket_rate", "sum", "sum", False, False, "requests or tokens per second by TPOT"),
    "arrival": Signal("rate", "sum", "sum", False, False, "requests that reached the gateway per second"),
    "queue": Signal("last", "sum", "sum", False, False, "requests waiting at the gateway"),
    "queue_mean": Signal("average", "sum", "sum", False, False, "requests waiting at the gateway, mean of the window"),
    "batch_cap": Signal("last", "max", "max", False, False, "requests admitted per replica"),
    "replicas_target": Signal("last", "max", "max", True, False, "replicas asked for"),
    "replicas_ready": Signal("last", "max", "max", True, False, "replicas ready"),
}

COPIES: dict[str, tuple[str, ...]] = {"sglang": ("tp_rank", "pp_rank", "moe_ep_rank")}
"""Labels of ranks that serve the same requests together, by engine: each reports the same, so one of them counts."""

Names = Mapping[str, tuple[str, ...]]


def _vllm(*names: str) -> tuple[str, ...]:
    """The spellings of a vLLM metric: its own, escaped by OpenMetrics 1.0 clients, and re-exported by Ray."""
    return tuple(f"{prefix}{name}" for name in names for prefix in ("vllm:", "vllm_", "ray_vllm_"))


def _sglang(*names: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}" for name in names for prefix in ("sglang:", "sglang_"))


ENGINES: dict[str, Names] = {
    # vLLM 0.33; older names after the current ones. TPOT per request first; the time between tokens is its stand-in.
    "vllm": {
        "running": _vllm("num_requests_running"),
        "waiting": _vllm("num_requests_waiting"),
        "kv_cache_usage": _vllm("kv_cache_usage_perc", "gpu_cache_usage_perc"),
        "generation": _vllm("generation_tokens_total"),
        "prompt": _vllm("prompt_tokens_total"),
        # Not gpu_prefix_cache_hits_total: it counted blocks.
        "cached": _vllm("prompt_tokens_cached_total", "prefix_cache_hits_total"),
        "finished": _vllm("request_success_total"),
        "prompt_sum": _vllm("request_prompt_tokens_sum"),
        "output_sum": _vllm("request_generation_tokens_sum"),
        "length_count": _vllm("request_generation_tokens_count"),
        "ttft_bucket": _vllm("time_to_first_token_seconds_bucket"),
        "tpot_bucket": _vllm(
            "request_time_per_output_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
            "time_per_output_token_seconds_bucket",
        ),
    },
    # SGLang 0.5.23.
    "sglang": {
        "running": _sglang("num_running_reqs"),
        "waiting": _sglang("num_queue_reqs"),
        "kv_cache_usage": _sglang("token_usage"),
        "generation": _sglang("generation_tokens_total"),
        "prompt": _sglang("prompt_tokens_total"),
        "cached": _sglang("cached_tokens_total"),
        "finished": _sglang("num_requests_total"),
        "prompt_sum": _sglang("prompt_tokens_histogram_sum"),
        "output_sum": _sglang("generation_tokens_histogram_sum"),
        "length_count": _sglang("generation_tokens_histogram_count"),
        "ttft_bucket": _sglang("time_to_first_token_seconds_bucket"),
        "tpot_bucket": _sglang(
            "request_time_per_output_token_seconds_bucket",
            "time_per_output_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
        ),
    },
    # Text Generation Inference: no KV usage, no TTFT; lengths and tokens only when a request has finished.
    "tgi": {
        "running": ("tgi_batch_current_size",),
        "waiting": ("tgi_queue_size",),
        "generation": ("tgi_request_generated_tokens_sum",),
        "prompt": ("tgi_request_input_length_sum",),
        "finished": ("tgi_request_success_total", "tgi_request_success"),
        "prompt_sum": ("tgi_request_input_length_sum",),
        "output_sum": ("tgi_request_generated_tokens_sum",),
        "length_count": ("tgi_request_generated_tokens_count",),
        "tpot_bucket": ("tgi_request_mean_time_per_token_duration_bucket",),
    },
    # trtllm-serve, tokens and lengths when a request has finished. Behind Triton load and memory only: latency has to
    # come from the gateway.
    "tensorrt-llm": {
        "running": ("trtllm_num_requests_running", 'nv_trt_llm_request_metrics{request_type="scheduled"}'),
        "waiting": ("trtllm_num_requests_waiting", 'nv_trt_llm_request_metrics{request_type="waiting"}'),
        "kv_cache_usage": (
            "trtllm_kv_cache_utilization",
            'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}',
        ),
        "generation": ("trtllm_generation_tokens_total",),
        "prompt": ("trtllm_prompt_tokens_total",),
        "finished": ("trtllm_request_success_total",),
        "prompt_sum": ("trtllm_prompt_tokens_total",),
        "output_sum": ("trtllm_generation_tokens_total",),
        "length_count": ("trtllm_request_success_total",),
        "ttft_bucket": ("trtllm_time_to_first_token_seconds_bucket",),
        "tpot_bucket": ("trtllm_time_per_output_token_seconds_bucket",),
    },
    # A Ray Serve deployment of any engine, by what Serve itself counts.
    "ray-serve": {
        "running": ("ray_serve_replica_processing_queries", "ray_serve_num_ongoing_requests_at_replicas"),
        "finished": ("ray_serve_deployment_request_counter_total", "ray_serve_deployment_request_counter"),
    },
}


@dataclass(frozen=True)
class Gateway:
    """What stands in front of the engines.

    Attributes:
        label: the label that names the service.
        names: metric names by signal.
        measures_ttft: its TTFT already includes the wait in its own queue.
    """

    label: str
    names: Names
    measures_ttft: bool = False


GATEWAYS: dict[str, Gateway] = {
    # The wait here is not in the engine's TTFT: it is taken off the objective, see `autoscaler.metrics.prometheus`.
    "haproxy": Gateway(
        label="proxy",
        names={
            # One session a request, when it comes; http_requests_total counts it when it has been answered.
            "arrival": ("haproxy_backend_sessions_total",),
            # Parts of one whole: requests without a server yet, and requests that wait for a particular one.
            "queue": ("~haproxy_(backend|server)_current_queue",),
            # HAProxy's own average is over the last 1,024 requests: without traffic it stands still for ever.
            "queue_mean": ("~haproxy_(backend|server)_current_queue",),
            "batch_cap": ("haproxy_server_limit_sessions",),
        },
    ),
    "llm-d-epp": Gateway(
        label="model_name",
        names={
            "arrival": (
                "llm_d_epp_request_total",
                "inference_objective_request_total",
                "inference_model_request_total",
            ),
            "queue": ("llm_d_epp_flow_control_queue_size", "inference_extension_flow_control_queue_size"),
            "ttft_bucket": ("llm_d_epp_request_ttft_seconds_bucket", "inference_objective_request_ttft_seconds_bucket"),
            "tpot_bucket": (
                "llm_d_epp_request_streaming_tpot_seconds_bucket",
                "inference_objective_request_streaming_tpot_seconds_bucket",
            ),
        },
        measures_ttft=True,
    ),
    "ray-serve": Gateway(
        label="deployment",
        names={
            "arrival": ("ray_serve_deployment_request_counter_total", "ray_serve_deployment_request_counter"),
            "queue": ("ray_serve_deployment_queued_queries",),
        },
    ),
}

REPLICA_SOURCES: dict[str, Gateway] = {
    "kube-state-metrics": Gateway(
        label="deployment",
        names={
            "replicas_target": ("kube_deployment_spec_replicas",),
            "replicas_ready": ("kube_deployment_status_replicas_ready",),
        },
    ),
}
